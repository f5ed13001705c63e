"""Tables of text in Markdown and LaTeX."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pandas as pd

from analysis.quantities import MISSING


def markdown_table(frame: pd.DataFrame, numbers: bool = False) -> str:
    """A frame of text as a Markdown table; with `numbers`, all but the first column aligned right."""
    lines = [[_markdown_cell(name) for name in frame.columns]]
    lines.append(["---", *["--:" if numbers else "---"] * (len(frame.columns) - 1)])
    lines += [[_markdown_cell(value) for value in row] for row in frame.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _markdown_cell(value: object) -> str:
    return one_line(str(value)).replace("|", "\\|")


def booktabs(comment: str, columns: str, *parts: Sequence[Sequence[str]]) -> str:
    r"""A booktabs tabular to \input, with a rule between its parts, each of rows of text.

    comment: what stands above it, already escaped; columns: its column specification.
    """
    lines = [f"% \\usepackage{{booktabs}}; {comment}", f"\\begin{{tabular}}{{{columns}}}"]
    for number, rows in enumerate(parts):
        lines.append(r"\midrule" if number else r"\toprule")
        lines += [" & ".join(latex_escape(text) for text in row) + r" \\" for row in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def latex_escape(text: str) -> str:
    """Text with LaTeX's special characters, and those it lacks in text mode, as commands."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {character: f"\\{character}" for character in "&%$#_{}"}
    special |= {"±": r"$\pm$", "<": "$<$", ">": "$>$", "↑": r"$\uparrow$", "↓": r"$\downarrow$"}
    special |= {MISSING: "--", "·": r"$\cdot$"}
    escaped = "".join(special.get(character, character) for character in one_line(text))
    return re.sub(r"(?<![\w.-])-(?=\d)", "$-$", escaped)


def one_line(text: str) -> str:
    """Text without line breaks, and no more than one space between words."""
    return " ".join(text.split())
