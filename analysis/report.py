"""The report of a study: `python -m analysis.report study=DIR`.

Reads the study's records and writes to DIR/report/:

    report.md             the table and the figures, what is missing, where the numbers come from
    scaling_table.md      the scaling table; .csv in full precision with run ids; .tex for \\input
    runs.csv              one row a planned run, finished or not
    scaling.png, .svg     loss and metrics against parameters and MACs
    curves.png, .svg      training curves

Exit status: 0, also where some runs are missing (they are listed); 1 if no run has finished;
2 for a mistake in the command or a folder that holds no study.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console

from analysis import style
from analysis.figures import curves_figure, scaling_figure
from analysis.gather import Study, gather
from analysis.provenance import provenance, provenance_frame, remarks
from analysis.tables import ScalingTable, markdown_table, scaling_table, to_csv, to_latex, to_markdown, to_terminal
from scaling.records import RecordError, write_whole

USAGE = "usage: python -m analysis.report study=DIR"
KEYS = {"study": "the study's folder, the one that holds plan.jsonl and runs/"}
NO_TERMINAL_WIDTH = 160  # of output into a file: one table, not parts


class UsageError(Exception):
    """A mistake in the command line."""


@dataclass(frozen=True)
class Report:
    """What a report is made of, and the files it went to."""

    study: Study
    table: ScalingTable
    remarks: list[str]
    files: list[Path]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a study's report and print its table; the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if any(argument in ("-h", "--help", "help") for argument in arguments):
        print("\n".join([USAGE, "", *(f"  {key}  {what}" for key, what in KEYS.items()), "", (__doc__ or "").strip()]))
        return 0
    try:
        report = write_report(Path(parsed(arguments)["study"]))
    except (UsageError, RecordError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if report.study.finished.empty:
        states = report.study.runs["state"].value_counts()
        counts = ", ".join(f"{count} {state}" for state, count in states.items())
        listing = report.study.directory.report / "report.md"
        print(f"no run of the {len(report.study.runs)} planned has finished ({counts}): see {listing}", file=sys.stderr)
        return 1
    console = Console() if sys.stdout.isatty() else Console(width=NO_TERMINAL_WIDTH)
    console.print(to_terminal(report.table, console.width))
    for remark in report.remarks:
        print(f"note: {remark}")
    for path in report.files:
        print(f"wrote {path}")
    return 0


def parsed(arguments: Sequence[str]) -> dict[str, str]:
    """{key: value} of key=value arguments; UsageError names the right keys."""
    values = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in KEYS:
            raise UsageError(f"unknown argument {argument!r}; the keys are: {', '.join(KEYS)} ({USAGE})")
        values[key] = value
    missing = [key for key in KEYS if not values.get(key)]
    if missing:
        raise UsageError(f"{missing[0]}= is missing: {KEYS[missing[0]]} ({USAGE})")
    return values


def write_report(directory: Path) -> Report:
    """Gather a study and write its report folder; RecordError if there is no study."""
    study = gather(directory)
    table = scaling_table(study)
    report = study.directory.report
    texts = {
        "scaling_table.md": to_markdown(table),
        "scaling_table.csv": to_csv(table),
        "scaling_table.tex": to_latex(table),
    }
    texts["runs.csv"] = study.runs.to_csv(index=False, lineterminator="\n")
    said = remarks(study, table)
    figures = {
        "scaling": (scaling_figure(table), "no finished run has a validation loss or score on record"),
        "curves": (curves_figure(study), "no run has a finite loss on record"),
    }
    texts["report.md"] = _report_text(study, table, said, figures)
    try:
        for name, text in texts.items():
            write_whole(report / name, text)
        files = [report / name for name in texts]
        for name, (figure, _) in figures.items():
            files += _written_figure(figure, report / name)
    except OSError as error:
        raise RecordError(f"cannot write the report to {report}: {os.strerror(error.errno or 0)}") from None
    return Report(study, table, said, sorted(files))


def _written_figure(figure: Figure | None, stem: Path) -> list[Path]:
    if figure is not None:
        return style.save(figure, stem)
    # A figure of an earlier report would pass for one of this.
    for kind in ("png", "svg"):
        stem.with_name(f"{stem.name}.{kind}").unlink(missing_ok=True)
    return []


def _report_text(
    study: Study, table: ScalingTable, said: Sequence[str], figures: dict[str, tuple[Figure | None, str]]
) -> str:
    captions = {
        "scaling": "Validation loss and metrics against parameters, MACs per second and, where it varies, hours. "
        "Bars: sample standard deviation over seeds.",
        "curves": "Validation loss and smoothed training loss over optimiser steps.",
    }
    count = f"{len(study.finished)} of {len(study.runs)} planned runs finished"
    parts = [f"# Scaling study {study.directory.path.resolve().name}", f"{count}, in {len(table.cells)} cells."]
    if said:
        parts += ["## Remarks", "\n".join(f"- {remark}" for remark in said)]
    parts += ["## Scaling table", to_markdown(table).rstrip()]
    parts.append("The same table: [CSV in full precision](scaling_table.csv), [LaTeX](scaling_table.tex).")
    parts.append("## Figures")
    for name, (figure, why) in figures.items():
        parts.append(f"No {name} figure: {why}." if figure is None else f"![{name}]({name}.png)\n\n{captions[name]}")
    parts += ["## Which runs each row comes from", markdown_table(_sources(table))]
    parts.append("Every planned run with its numbers: [runs.csv](runs.csv).")
    parts += ["## Provenance", _provenance_text(study)]
    return "\n\n".join(parts) + "\n"


def _sources(table: ScalingTable) -> pd.DataFrame:
    rows = [
        {
            "Row": cell["label"],
            "From": ", ".join(cell["run_ids"].split()) or "no run has finished",
            "Planned, without a result": ", ".join(cell["unfinished_run_ids"].split()),
        }
        for _, cell in table.cells.iterrows()
    ]
    return pd.DataFrame(rows)


def _provenance_text(study: Study) -> str:
    recorded = f"Recorded by {len(study.provenance)} of {len(study.runs)} planned runs."
    entries = provenance(study)
    return f"{recorded}\n\n{markdown_table(provenance_frame(entries))}" if entries else recorded


if __name__ == "__main__":
    sys.exit(main())
