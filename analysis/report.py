"""The report of a study: `python -m analysis.report study=DIR`.

Reads the study's records and writes to DIR/report/:

    report.html           all of it in one self-contained file: laws, tables, figures, provenance, what is missing
    report.md             the scaling table and the figures, what is missing, where the numbers come from
    scaling_table.md      the scaling table; .csv in full precision with run ids; .tex for \\input
    tables/               every other table as .md, .csv and .tex
    runs.csv              one row a planned run, finished or not
    *.png, *.svg          the figures: scaling and training curves, laws, isoFLOP curves, published systems, breakdown

docs/analysis.md says what each number means. Exit status: 0, also where some runs are missing (they are listed);
1 if no run has finished; 2 for a mistake in the command or a folder that holds no study.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console

from analysis import style
from analysis.claims import Claims, claims
from analysis.command import run_main
from analysis.comparable import Comparable, comparable
from analysis.figures import curves_figure, scaling_figure
from analysis.gather import Study, gather
from analysis.isoflop import IsoFlop, isoflop
from analysis.law_figures import breakdown_figure, isoflop_figure, laws_figure, published_figure
from analysis.markup import markdown_table
from analysis.process_scaling import process_figure, process_scaling
from analysis.provenance import provenance, provenance_frame, remarks, trained
from analysis.published import CORPUS, SOURCES
from analysis.report_page import Contents, Figures, html_page, no_figure, recorded
from analysis.result_tables import report_tables
from analysis.scaling_table import ScalingTable, scaling_table
from analysis.scaling_table_text import to_csv, to_latex, to_markdown, to_terminal
from analysis.settings import KEYS, Settings, UsageError, parsed, settings_from
from scaling.records import RecordError, write_whole

USAGE = "usage: python -m analysis.report study=DIR"
NO_TERMINAL_WIDTH = 160  # of output into a file: one table, not parts


@dataclass(frozen=True)
class Report:
    """What a report says, and the files it went to."""

    contents: Contents
    files: list[Path]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a study's report and print its table; the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if any(argument in ("-h", "--help", "help") for argument in arguments):
        print("\n".join([USAGE, "", *(f"  {key}  {what}" for key, what in KEYS.items()), "", (__doc__ or "").strip()]))
        return 0
    try:
        report = write_report(settings_from(parsed(arguments, KEYS, ("study",), USAGE)))
    except (UsageError, RecordError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    study = report.contents.study
    if study.finished.empty:
        states = study.runs["state"].value_counts()
        counts = ", ".join(f"{count} {state}" for state, count in states.items())
        listing = study.directory.report / "report.md"
        print(f"no run of the {len(study.runs)} planned has finished ({counts}): see {listing}", file=sys.stderr)
        return 1
    width = None if sys.stdout.isatty() else NO_TERMINAL_WIDTH
    console = Console(width=width, markup=False, emoji=False)
    console.print(to_terminal(report.contents.table, console.width))
    for remark in report.contents.remarks:
        print(f"note: {remark}")
    for path in report.files:
        print(f"wrote {path}")
    return 0


def write_report(settings: Settings) -> Report:
    """Gather a study and write its report folder; RecordError if there is no study."""
    contents = gathered(settings)
    report, table = contents.study.directory.report, contents.table
    texts = {
        "scaling_table.md": to_markdown(table),
        "scaling_table.csv": to_csv(table),
        "scaling_table.tex": to_latex(table),
        "runs.csv": contents.study.runs.to_csv(index=False, lineterminator="\n"),
        "report.md": _report_text(contents),
    }
    for one in contents.tables:
        texts |= {
            f"tables/{one.name}.md": one.to_markdown(),
            f"tables/{one.name}.csv": one.to_csv(),
            f"tables/{one.name}.tex": one.to_latex(),
        }
    try:
        shutil.rmtree(report / "tables", ignore_errors=True)  # a table of an earlier report would pass for one of this
        for name, text in texts.items():
            write_whole(report / name, text)
        files = [report / name for name in texts]
        for name, (figure, _, _) in contents.figures.items():
            files += _written_figure(figure, report / name)
        write_whole(report / "report.html", html_page(contents))
    except OSError as error:
        why = error.strerror or str(error)
        raise RecordError(
            f"cannot write the report to {report} ({why}): make it writable and free some space"
        ) from None
    return Report(contents, sorted([*files, report / "report.html"]))


def gathered(settings: Settings) -> Contents:
    """All that a report says of a study; RecordError if there is none."""
    study = gather(settings.study)
    table = scaling_table(study)
    found = claims(study, settings)
    iso = isoflop(found.kept, bootstraps=settings.bootstraps, seed=settings.seed, refusal=found.refusal)
    processes = process_scaling(study)
    cells = comparable(study, found)
    return Contents(
        study=study,
        table=table,
        claims=found,
        tables=report_tables(study, found, iso, processes, cells),
        figures=_figures(study, table, found, iso, processes, cells),
        remarks=[*filter(None, [found.other_axes.remark]), *remarks(study, table)],
    )


def _figures(
    study: Study, table: ScalingTable, found: Claims, iso: IsoFlop, processes: pd.DataFrame, cells: Comparable
) -> Figures:
    data = ", ".join(str(name) for name in study.runs["data"].dropna().unique()) or "its own data"
    other = (
        "" if data == CORPUS else f" This study's numbers are of another test set ({data}): compare shapes, not values."
    )
    figures: Figures = {
        "scaling": (
            scaling_figure(table),
            f"{table.loss.label} and metrics against parameters, MACs per second and, where it varies, hours. "
            "Bars: sample standard deviation over seeds.",
            "no finished run has a validation loss or score on record",
        ),
        "loss_laws": (
            laws_figure(found),
            f"{found.losses[0].quantity.label} and its laws. Dark band: interval of the law; light band: of a new run; "
            "open diamonds: what the fit without these cells predicts of them, drawn beside the cells.",
            "no law of one variable is identified by this study's cells",
        ),
        "isoflop_curves": (
            isoflop_figure(iso, found),
            "Loss against size at equal training compute, with the curve of each budget and its minimum; and the "
            "compute-optimal size against compute.",
            iso.reason or "no budget has enough sizes for a curve",
        ),
        "published": (
            published_figure(found, study.metrics, data),
            "Metrics against multiply-accumulates per second, of each size the cell of its largest budget, "
            f"beside published systems on VoiceBank+DEMAND ({SOURCES}).{other}",
            "no finished run has scores on record",
        ),
        "curves": (
            curves_figure(study),
            f"{table.loss.label}, and smoothed training loss, over optimiser steps.",
            "no run has a finite loss on record",
        ),
        "processes": (
            process_figure(processes),
            "Training speed and efficiency against the number of processes; ideal dashed.",
            "no two numbers of processes are of one size, setting and kind of hardware",
        ),
    }
    for metric in study.metrics:
        if found.kept[metric.key].notna().any():
            caption = (
                f"Gain of {metric.label} over the unprocessed input, by SNR and by noise, {cells.caption}. "
                "Bars: standard error over utterances."
            )
            why = "the scores name neither several SNRs nor several noises"
            figures[f"breakdown_{metric.key}"] = (breakdown_figure(cells, metric), caption, why)
    if note := found.other_axes.note:
        for name, (figure, caption, why) in figures.items():
            if name in ("loss_laws", "isoflop_curves", "published") or name.startswith("breakdown_"):
                figures[name] = (figure, f"{caption} {note}", why)
    return figures


def _written_figure(figure: Figure | None, stem: Path) -> list[Path]:
    if figure is not None:
        return style.save(figure, stem)
    # A figure of an earlier report would pass for one of this.
    for kind in ("png", "svg"):
        stem.with_name(f"{stem.name}.{kind}").unlink(missing_ok=True)
    return []


def _report_text(contents: Contents) -> str:
    study, table = contents.study, contents.table
    count = f"{len(study.finished)} of {len(study.runs)} planned runs finished"
    parts = [f"# Scaling study {study.directory.path.resolve().name}", f"{count}, in {len(table.cells)} cells."]
    parts.append("With laws, intervals and all tables: [report.html](report.html).")
    if contents.remarks:
        parts += ["## Remarks", "\n".join(f"- {remark}" for remark in contents.remarks)]
    parts += ["## Scaling table", to_markdown(table).rstrip()]
    parts.append("The same table: [CSV in full precision](scaling_table.csv), [LaTeX](scaling_table.tex).")
    parts.append("## Figures")
    for name, (figure, caption, why) in contents.figures.items():
        parts.append(no_figure(name, why) if figure is None else f"![{name}]({name}.png)\n\n{caption}")
    parts += ["## Which runs each row comes from", markdown_table(_sources(table))]
    parts.append("Every planned run with its numbers: [runs.csv](runs.csv).")
    if len(settings := trained(study)):
        parts += ["## What was trained", markdown_table(settings)]
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
    entries = provenance(study)
    return f"{recorded(study)}\n\n{markdown_table(provenance_frame(entries))}" if entries else recorded(study)


if __name__ == "__main__":
    run_main(main, "interrupted: the report is not whole; run the same command again")
