"""No character of a table's text is one of the markup that it is written in."""

from __future__ import annotations

import pandas as pd

from analysis.markup import latex_escape, markdown_table


def test_latex_characters_are_escaped() -> None:
    assert latex_escape("a_b & 5% #1 {x} ~ \\ -0.3 <1") == (
        r"a\_b \& 5\% \#1 \{x\} \textasciitilde{} \textbackslash{} $-$0.3 $<$1"
    )


def test_headings_of_markdown_tables_are_escaped_like_their_cells() -> None:
    text = markdown_table(pd.DataFrame({"a|b": ["c|d"], "e\nf": ["g"]}))
    assert text.splitlines()[0] == r"| a\|b | e f |"
    assert text.splitlines()[2] == r"| c\|d | g |"
