"""The report's page: what stands in which section of report.html."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from analysis import html
from analysis.claims import Claims
from analysis.gather import Study
from analysis.provenance import provenance, provenance_frame, trained
from analysis.report_table import ReportTable
from analysis.scaling_table import ScalingTable
from analysis.scaling_table_text import listed, note, written
from analysis.settings import SIZES

Figures = dict[str, tuple[Figure | None, str, str]]  # name → figure, its caption, why there is none


@dataclass(frozen=True)
class Contents:
    """What a report says, in numbers, tables, figures and words."""

    study: Study
    table: ScalingTable
    claims: Claims
    tables: list[ReportTable]
    figures: Figures
    remarks: list[str]


def html_page(contents: Contents) -> str:
    """The text of report.html; its figures are read from the report's folder, where they have been written."""
    study, table, figures = contents.study, contents.table, contents.figures
    registry = html.Registry()
    by_name = {one.name: one for one in contents.tables}
    report = study.directory.report

    def shown(*names: str) -> list[str]:
        parts = []
        for name in names:
            if name in by_name:
                parts.append(html.report_table(by_name[name], registry))
            elif name in figures:
                figure, caption, why = figures[name]
                parts.append(
                    html.paragraph(no_figure(name, why)) if figure is None else html.figure(report / name, caption)
                )
        return parts

    text = written(table)
    sources = pd.DataFrame("", index=text.index, columns=text.columns)
    for number, ids in enumerate([table.unprocessed["run_ids"], *table.cells["run_ids"]]):
        sources.iloc[number] = ids
    scaling = ReportTable("scaling_table", "Every cell of the study", note(table), text, sources)
    breakdowns = [name for name in figures if name.startswith("breakdown_") and figures[name][0] is not None]
    sections = [
        html.Section("Held-out prediction", [*_verdicts(contents.claims), *shown("held_out")]),
        html.Section(
            "Results",
            [html.report_table(scaling, registry), *shown("scaling", "size_table", "data_table", "joint_table")],
        ),
        html.Section("What was trained", _trained(study)),
        html.Section("Laws", shown("laws", "loss_laws", "fits_both_ways", "metric_laws")),
        html.Section("Equal compute", shown("isoflop", "isoflop_curves")),
        html.Section("Beside published systems", shown("published")),
        html.Section("Differences and breakdown", shown("significance", *breakdowns, "breakdown")),
        html.Section("Cost", shown("efficiency_table", "node_scaling", "processes")),
        html.Section("Training curves", shown("curves")),
        html.Section("What is missing", _missing(contents, shown("exclusions", "replaced_crops"))),
        html.Section(
            "Provenance", [html.paragraph(recorded(study)), html.plain_table(provenance_frame(provenance(study)))]
        ),
    ]
    sections = [section for section in sections if section.parts]
    if contents.remarks:
        sections.insert(0, html.Section("Remarks", [html.bullets(contents.remarks)]))
    lead = (
        f"{len(study.finished)} of {len(study.runs)} planned runs finished, in {len(table.cells)} cells. In the laws N "
        f"is {SIZES[contents.claims.settings.size]}. Click a table cell to see which runs it comes from."
    )
    return html.page(f"Scaling study {study.directory.path.resolve().name}", lead, sections, registry)


def _verdicts(found: Claims) -> list[str]:
    """A pass or fail line for each law of the loss that could be tested, with N as the settings have it."""
    lines = []
    for claim in found.losses:
        if claim.measure != found.settings.size:
            continue
        for test in claim.held_out:
            if test.verdict == "not possible":
                continue
            why = f": {test.reason}" if test.reason else ""
            text = f"{test.verdict.upper()}: {claim.law.name} without {test.left_out}, error {test.error:.2%}"
            text += f", interval ±{test.half_width:.2%}{why}"
            lines.append(html.verdict(text, test.verdict))
    if not lines:
        reasons = {
            claim.law.name: claim.held_out[0].reason if claim.fitted.is_usable else claim.fitted.reason
            for claim in found.losses
        }
        lines.append(html.verdict("NOT TESTED: no law of the loss can be fitted without its largest cells", "none"))
        lines.append(html.bullets([f"{law}: {reason}" for law, reason in reasons.items()]))
    return lines


def _missing(contents: Contents, tables: Sequence[str]) -> list[str]:
    """Runs without a result, runs that no fit uses, figures that could not be drawn, laws that are not identified.

    tables: of the runs that no fit uses, and of crops that were replaced, as HTML.
    """
    found = contents.claims
    parts = []
    unfinished = listed(contents.table)
    if len(unfinished):
        parts += [html.paragraph(f"{len(unfinished)} planned runs have no result:"), html.plain_table(unfinished)]
    else:
        parts.append(html.paragraph("Every planned run has finished."))
    parts += tables
    said = [no_figure(name, why) for name, (figure, _, why) in contents.figures.items() if figure is None]
    for claim in [*found.losses, *found.metrics]:
        if not claim.fitted.is_usable and claim.measure == found.settings.size:
            said.append(f"{claim.quantity.label}, {claim.law.name}: {claim.fitted.status}, {claim.fitted.reason}.")
    if said:
        parts.append(html.bullets(said))
    return parts


def _trained(study: Study) -> list[str]:
    settings = trained(study)
    return [html.plain_table(settings)] if len(settings) else []


def no_figure(name: str, why: str) -> str:
    """In place of a figure, why there is none."""
    return f"No {name.replace('_', ' ')} figure: {why}."


def recorded(study: Study) -> str:
    """Of how many runs the provenance is on record."""
    return f"Recorded by {len(study.provenance)} of {len(study.runs)} planned runs."
