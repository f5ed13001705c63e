"""A table of the report: text under headings, and for every cell the runs that it comes from.

Each is written as Markdown, CSV and LaTeX (booktabs); the HTML report shows a cell's runs on a click.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from analysis.markup import booktabs, latex_escape, markdown_table
from analysis.quantities import MISSING

LATEX_WORDS = r"p{0.18\linewidth}"
LONGEST_LABEL, LONGEST_NUMBER = 20, 32  # characters: of more, a column has to be broken into lines


def column_kinds(text: pd.DataFrame) -> list[str]:
    """Of each column: "number" (figures, aligned right), "label" (short words) or "words" (long ones, to be broken)."""
    kinds = []
    for number, name in enumerate(text.columns):
        column = text[name].astype(str)
        is_text = number == 0 or column.str.match(r"[^\W\d_]").any()
        if column.str.len().max() > (LONGEST_LABEL if is_text else LONGEST_NUMBER):
            kinds.append("words")
        else:
            kinds.append("label" if is_text else "number")
    return kinds


@dataclass(frozen=True)
class ReportTable:
    """text: what a reader sees. sources: of the same shape, run ids separated by spaces. data: the numbers, for CSV."""

    name: str
    title: str
    caption: str
    text: pd.DataFrame
    sources: pd.DataFrame
    data: pd.DataFrame = field(default_factory=pd.DataFrame)

    def to_markdown(self) -> str:
        return f"{markdown_table(self.text, numbers=True)}\n\n{self.caption}\n"

    def to_csv(self) -> str:
        """The numbers in full precision, with run_ids, where the table has them; else its text."""
        frame = self.data if len(self.data.columns) else self.text
        return frame.to_csv(index=False, lineterminator="\n")

    def to_latex(self) -> str:
        r"""A booktabs tabular to \input."""
        columns = "".join({"number": "r", "label": "l", "words": LATEX_WORDS}[kind] for kind in column_kinds(self.text))
        rows = [[str(value) for value in row] for row in self.text.itertuples(index=False)]
        comment = f"{latex_escape(self.title)}: {latex_escape(self.caption)}"
        return booktabs(comment, columns, [[str(name) for name in self.text.columns]], rows)


def table_of(
    name: str, title: str, caption: str, rows: Sequence[dict[str, tuple[str, str]]], data: Any = None
) -> ReportTable:
    """rows: heading → (text, run ids)."""
    headings = list(dict.fromkeys(heading for row in rows for heading in row))
    text = pd.DataFrame([{h: row.get(h, (MISSING, ""))[0] for h in headings} for row in rows], columns=headings)
    sources = pd.DataFrame([{h: row.get(h, ("", ""))[1] for h in headings} for row in rows], columns=headings)
    return ReportTable(name, title, caption, text, sources, pd.DataFrame() if data is None else pd.DataFrame(data))
