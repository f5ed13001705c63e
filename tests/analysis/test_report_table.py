"""The columns of the report's tables are set by what is in them."""

from __future__ import annotations

from analysis.report_table import column_kinds, table_of


def test_columns_of_words_are_left_and_those_of_numbers_right() -> None:
    rows = [
        {"Law": ("Loss: L(N, D)", ""), "Verdict": ("fail", ""), "Interval": ("0.1 to 0.2", ""), "Why": ("x" * 40, "")},
        {"Law": ("PESQ: m(L)", ""), "Verdict": ("pass", ""), "Interval": ("–", ""), "Why": ("", "")},
    ]
    table = table_of("held_out", "Title", "Caption.", rows)
    assert column_kinds(table.text) == ["label", "label", "number", "words"]
    assert r"\begin{tabular}{llrp{0.18\linewidth}}" in table.to_latex()
