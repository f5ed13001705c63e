"""The report's tables: text under headings, and for every cell the runs that it comes from.

Each is written as Markdown, CSV and LaTeX (booktabs); the HTML report shows a cell's runs when it is pointed at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from analysis.claims import Claim, Claims
from analysis.fit import UNIDENTIFIABLE
from analysis.gather import Study
from analysis.isoflop import IsoFlop
from analysis.law_figures import at_largest_budget, breakdown
from analysis.quantities import MISSING, VALIDATION_LOSS, Quantity, human_count, human_hours
from analysis.settings import DATA, SIZES
from analysis.significance import paired
from analysis.tables import latex_escape, markdown_table


@dataclass(frozen=True)
class PaperTable:
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
        rows = [[latex_escape(str(value)) for value in row] for row in self.text.itertuples(index=False)]
        lines = [
            f"% \\usepackage{{booktabs}}; {latex_escape(self.title)}: {latex_escape(self.caption)}",
            f"\\begin{{tabular}}{{l{'r' * (self.text.shape[1] - 1)}}}",
            r"\toprule",
            " & ".join(latex_escape(str(name)) for name in self.text.columns) + r" \\",
            r"\midrule",
            *(" & ".join(row) + r" \\" for row in rows),
            r"\bottomrule",
            r"\end{tabular}",
        ]
        return "\n".join(lines) + "\n"


def paper_tables(study: Study, found: Claims, iso: IsoFlop, nodes: pd.DataFrame) -> list[PaperTable]:
    """All tables that have rows, in the report's order."""
    tables = [
        size_table(study, found),
        data_table(study, found),
        joint_table(found),
        efficiency_table(study, found),
        laws_table(found.losses, "laws", "Laws of the loss", found.settings.level),
        laws_table(found.metrics, "metric_laws", "Laws of metrics", found.settings.level),
        exclusions_effect_table(found),
        held_out_table([*found.losses, *found.metrics], found.settings.level),
        isoflop_table(iso, found),
        significance_table(study, found),
        breakdown_table(study, found),
        nodes_table(nodes),
        exclusions_table(found),
    ]
    return [table for table in tables if len(table.text)]


def _table(
    name: str, title: str, caption: str, rows: Sequence[dict[str, tuple[str, str]]], data: Any = None
) -> PaperTable:
    """rows: heading → (text, run ids)."""
    headings = list(dict.fromkeys(heading for row in rows for heading in row))
    text = pd.DataFrame([{h: row.get(h, (MISSING, ""))[0] for h in headings} for row in rows], columns=headings)
    sources = pd.DataFrame([{h: row.get(h, ("", ""))[1] for h in headings} for row in rows], columns=headings)
    return PaperTable(name, title, caption, text, sources, pd.DataFrame() if data is None else pd.DataFrame(data))


def _spread(runs: pd.DataFrame, quantity: Quantity) -> tuple[str, str]:
    """Mean ± standard deviation over seeds, and the runs."""
    values = runs.loc[runs[quantity.key].notna(), quantity.key].astype(float)
    ids = " ".join(runs.loc[values.index, "run_id"])
    if values.empty:
        return MISSING, ""
    digits = quantity.digits
    text = f"{values.mean():.{digits}f}"
    return (f"{text} ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else text), ids


def _ids(runs: pd.DataFrame) -> str:
    return " ".join(runs["run_id"])


def _quantity_cells(study: Study, runs: pd.DataFrame) -> dict[str, tuple[str, str]]:
    return {q.heading: _spread(runs, q) for q in (VALIDATION_LOSS, *study.metrics) if study.runs[q.key].notna().any()}


def _numbers(study: Study, runs: pd.DataFrame, about: Sequence[str]) -> pd.DataFrame:
    """A row a cell: what it is, mean, standard deviation and count of each quantity, and the runs."""
    rows = []
    for _, cell in runs.groupby("cell", sort=False):
        row: dict[str, Any] = {name: cell[name].iloc[0] for name in about}
        for quantity in (VALIDATION_LOSS, *study.metrics):
            values = cell[quantity.key].astype(float)
            row |= {f"{quantity.key}_mean": values.mean(), f"{quantity.key}_std": values.std(ddof=1)}
            row[f"{quantity.key}_n"] = int(values.notna().sum())
        rows.append(row | {"run_ids": _ids(cell)})
    return pd.DataFrame(rows)


ABOUT = (
    "size",
    "num_params",
    "num_params_non_decoder",
    "macs_per_second",
    "budget_hours",
    "audio_hours_seen",
    "steps",
    "train_macs",
)


def size_table(study: Study, found: Claims) -> PaperTable:
    """Sizes at one budget."""
    claim = found.loss("L(N)")
    about = claim.about if claim else ""
    runs = found.kept[found.kept["run_id"].isin(claim.run_ids if claim else ())].sort_values("macs_per_second")
    rows = []
    for size, cell in runs.groupby("size", sort=False):
        first, ids = cell.iloc[0], _ids(cell)
        row = {
            "Size": (str(size), ids),
            "Parameters": (human_count(first["num_params"]), ids),
            "outside decoder": (human_count(float(first["num_params_non_decoder"] or np.nan)), ids),
            "MACs/s": (human_count(first["macs_per_second"]), ids),
            "Seeds": (str(len(cell)), ids),
        }
        rows.append(row | _quantity_cells(study, cell))
    caption = f"Mean ± sample standard deviation over seeds; {about}."
    return _table("size_table", "Sizes at one budget", caption, rows, _numbers(study, runs, ABOUT))


def data_table(study: Study, found: Claims) -> PaperTable:
    """Budgets at one size."""
    claim = found.loss("L(D)")
    runs = found.kept[found.kept["run_id"].isin(claim.run_ids if claim else ())].sort_values("D")
    rows = []
    for _, cell in runs.groupby("cell", sort=False):
        first, ids = cell.iloc[0], _ids(cell)
        row = {
            "Hours seen": (human_hours(float(first["audio_hours_seen"])), ids),
            "Hours of data": (human_hours(first["budget_hours"]), ids),
            "Steps": (f"{first['steps']:,}", ids),
            "Seeds": (str(len(cell)), ids),
        }
        rows.append(row | _quantity_cells(study, cell))
    if len(rows) < 2:
        rows = []
    caption = f"Mean ± sample standard deviation over seeds; size {runs['size'].iloc[0] if len(runs) else ''}."
    return _table("data_table", "Budgets of data at one size", caption, rows, _numbers(study, runs, ABOUT))


def joint_table(found: Claims) -> PaperTable:
    """Loss by size (rows) and budget (columns: compute where sizes share it, else hours)."""
    runs = found.kept.sort_values("macs_per_second")
    axis = "axes.train.budget.train_pmacs"
    by_compute = axis in runs and runs[axis].notna().any()
    budget = runs[axis].astype(float) if by_compute else runs["D"].map(lambda d: float(f"{d:.3g}"))
    rows = []
    if budget.nunique() > 1 and runs["size"].nunique() > 1:
        for size, of_size in runs.groupby("size", sort=False):
            row = {"Size": (str(size), _ids(of_size))}
            for level in sorted(budget.dropna().unique()):
                heading = f"{human_count(level * 1e15)}MACs" if by_compute else f"{human_hours(level)} h"
                row[heading] = _spread(of_size[budget.loc[of_size.index] == level], VALIDATION_LOSS)
            rows.append(row)
    what = "training compute" if by_compute else DATA[found.data]
    data = (
        runs.assign(budget=budget)
        .groupby(["size", "budget"], sort=False)["validation_loss"]
        .agg(["mean", "std", "count"])
    )
    caption = f"Validation loss, mean ± sample standard deviation over seeds, by size and {what}."
    return _table("joint_table", "Sizes and budgets together", caption, rows, data.reset_index() if rows else None)


def efficiency_table(study: Study, found: Claims) -> PaperTable:
    """What each cell cost, estimated and actual, and what it bought."""
    rows, numbers = [], []
    for _, cell in (
        found.runs[found.runs["state"] == "finished"].sort_values(["macs_per_second", "D"]).groupby("cell", sort=False)
    ):
        first, ids = cell.iloc[0], _ids(cell)
        estimated, actual = float(cell["estimated_hours"].astype(float).mean()), float(cell["training_hours"].mean())
        loss = float(cell["validation_loss"].mean())
        gained = 1 - loss / float(cell["unprocessed_validation_loss"].mean())
        row = {
            "Size": str(first["size"]),
            "Hours seen": human_hours(float(first["audio_hours_seen"])),
            "Training compute": f"{human_count(float(first['C']))}MACs",
            "Audio-s/s": human_count(float(cell["audio_seconds_per_second"].median())),
            "MACs/s achieved": human_count(
                3 * first["macs_per_second"] * float(cell["audio_seconds_per_second"].median())
            ),
            "Estimated hours": f"{estimated:.3g}" if np.isfinite(estimated) else MISSING,
            "Actual hours": f"{actual:.3g}" if np.isfinite(actual) else MISSING,
            "Actual / estimated": f"{actual / estimated:.2f}" if estimated > 0 and np.isfinite(actual) else MISSING,
            "Jobs": _mean_text(cell["attempts"]),
            "Device-hours": _mean_text(cell["device_hours"]),
            "Loss removed": f"{gained:.1%}" if np.isfinite(gained) else MISSING,
        }
        rows.append({name: (text, ids) for name, text in row.items()})
        numbers.append(
            {"size": first["size"], "audio_hours_seen": first["audio_hours_seen"], "train_macs": first["train_macs"]}
            | {"estimated_hours": estimated, "training_hours": actual, "loss_removed": gained, "run_ids": ids}
            | {name: float(cell[name].astype(float).mean()) for name in ("attempts", "device_hours")}
        )
    caption = (
        "Hours are of one process (estimated: one core or GPU as the plan has it; actual: wall hours times processes, "
        "all sessions of a run, evaluation left out), a mean over seeds. Jobs and device-hours: of a cluster, all "
        "included that a run's jobs took. Loss removed: of the unprocessed input's."
    )
    return _table("efficiency_table", "What it cost, and what it bought", caption, rows, numbers)


def _mean_text(values: pd.Series) -> str:
    mean = float(values.astype(float).mean())
    return f"{mean:.3g}" if np.isfinite(mean) else MISSING


def laws_table(found: Sequence[Claim], name: str, title: str, level: float) -> PaperTable:
    rows, numbers = [], []
    for claim in found:
        ids, law = " ".join(claim.run_ids), claim.fitted
        if law.status == UNIDENTIFIABLE:
            values = MISSING
        else:
            values = "; ".join(_parameter(claim, parameter, level) for parameter in claim.law.parameters)
        aicc = law.aicc
        test = next((t for t in claim.held_out if t.verdict != "not possible"), None)
        needs_size = "N" in claim.law.variables
        row = {
            "Law": f"{claim.quantity.label}: {claim.law.name}",
            "N is": SIZES[claim.measure] if needs_size else MISSING,
            "Cells": str(law.data.num_cells),
            "Runs": str(len(claim.run_ids)),
            "Status": law.status + (f" ({law.reason})" if law.reason else ""),
            "Parameters": values,
            "AICc": f"{aicc:.1f}" if np.isfinite(aicc) else MISSING,
            "Held-out error": f"{test.error:.3g}" if test else MISSING,
        }
        rows.append({heading: (text, ids) for heading, text in row.items()})
        for parameter, value in law.parameters.items():
            entry: dict[str, Any] = {
                "quantity": claim.quantity.key,
                "law": claim.law.name,
                "measure": claim.measure,
                "status": law.status,
            }
            entry |= {"parameter": parameter, "value": value, "resampled": law.resampled}
            if law.bootstrap:
                low, high = law.interval(parameter, level)
                entry |= {"standard_error": law.standard_errors()[parameter], "low": low, "high": high}
            numbers.append(entry | {"run_ids": ids})
    resampled = {c.fitted.resampled for c in found if c.fitted.resampled}
    drawn = {"seeds": "the seeds within each cell", "cells": "cells (not every cell has several seeds)"}
    how = " or ".join(drawn[r] for r in sorted(resampled)) or MISSING
    caption = f"{level:.0%} intervals in brackets, of bootstraps over {how}. Losses: Huber on log residuals."
    return _table(name, title, caption, rows, numbers)


def _parameter(claim: Claim, name: str, level: float) -> str:
    text = f"{name} {claim.fitted.parameters[name]:.3g}"
    if not claim.fitted.bootstrap:
        return text
    low, high = claim.fitted.interval(name, level)
    return f"{text} [{low:.3g}, {high:.3g}]"


def exclusions_effect_table(found: Claims) -> PaperTable:
    """Fits both ways, without the runs that a rule excludes and with them; and least squares beside the robust."""
    rows = []
    for claim in found.losses:
        if not claim.fitted.is_usable:
            continue
        ways = [
            ("as claimed", claim.fitted),
            ("least squares", claim.squares),
            ("with the excluded runs", claim.with_excluded),
        ]
        for way, fitted in ways:
            if fitted is None:
                continue
            row = {"Law": claim.law.name, "N is": SIZES[claim.measure], "Fit": way, "Status": fitted.status}
            row |= {name: f"{value:.4g}" for name, value in fitted.parameters.items()}
            rows.append({heading: (text, " ".join(claim.run_ids)) for heading, text in row.items()})
    caption = "Exclusions and the loss function change a law; how much is shown by fitting the other way."
    return _table("fits_both_ways", "The same laws, fitted the other way", caption, rows)


def held_out_table(found: Sequence[Claim], level: float) -> PaperTable:
    """A row a test; the CSV has a row a cell."""
    rows, numbers = [], []
    for claim in found:
        digits, is_relative = claim.quantity.digits, claim.law.is_log

        def size_of(errors: pd.Series, digits: int = digits, is_relative: bool = is_relative) -> str:
            mean = float(errors.abs().mean())
            return f"{mean:.2%}" if is_relative else f"{mean:.{digits}f}"

        for test in claim.held_out:
            if test.verdict == "not possible" and not claim.fitted.is_usable:
                continue  # its law is listed as unidentifiable
            cells, ids = test.cells, " ".join(claim.run_ids)
            row = {
                "Law": f"{claim.quantity.label}: {claim.law.name}",
                "N is": SIZES[claim.measure],
                "Without": test.left_out,
                "Verdict": test.verdict,
            }
            if len(cells):
                last = cells.iloc[-1]
                row |= {
                    "Observed": f"{last['observed']:.{digits}f}",
                    "Predicted": f"{last['predicted']:.{digits}f}",
                    "Interval": f"{last['low']:.{digits}f} to {last['high']:.{digits}f}",
                    "Cells": str(len(cells)),
                    "Covered": str(int(cells["is_covered"].sum())),
                    "Mean error": size_of(cells["error"]),
                    "Naive error": size_of(cells["naive_error"]),
                }
                about = {"quantity": claim.quantity.key, "law": claim.law.name, "measure": claim.measure}
                numbers += [
                    about | {"left_out": test.left_out, **cell.to_dict(), "verdict": test.verdict, "run_ids": ids}
                    for _, cell in cells.iterrows()
                ]
            row["Why"] = test.reason
            rows.append({heading: (text, ids) for heading, text in row.items()})
    caption = (
        f"Each law is fitted without these cells and predicts their mean. Pass: all lie in their {level:.0%} "
        "prediction intervals (taken together), and the mean error is smaller than the naive one, of expecting no more "
        "than the best cell that was seen. Observed, predicted and interval are of the last cell; the CSV has all."
    )
    return _table("held_out", "Prediction of what the fit did not see", caption, rows, numbers)


def isoflop_table(iso: IsoFlop, found: Claims) -> PaperTable:
    rows = []
    level = found.settings.level
    for parabola in iso.parabolas:
        ids = _ids(found.kept[found.kept["cell"].isin(parabola.cells.index)])
        low, high = parabola.interval(level)
        has_best = np.isfinite(parabola.best_size)
        row = {
            "Training compute": f"{human_count(parabola.compute)}MACs",
            "Sizes": str(parabola.cells["size"].nunique()),
            "Best size": human_count(parabola.best_size) if has_best else MISSING,
            "Interval": f"{human_count(low)} to {human_count(high)}" if np.isfinite(low) else MISSING,
            "Loss there": f"{parabola.best_loss:.4f}" if has_best else MISSING,
            "Status": parabola.status + (f": {parabola.reason}" if parabola.reason else ""),
        }
        rows.append({heading: (text, ids) for heading, text in row.items()})
    path = iso.path
    if np.isfinite(path.exponent):
        bounds = ""
        if path.bootstrap is not None:
            low, high = np.nanquantile(path.bootstrap[0], [(1 - level) / 2, (1 + level) / 2])
            bounds = f" ({low:.3f} to {high:.3f})"
        told = f"N* grows as C^{path.exponent:.3f}{bounds}. {path.reason}"
    else:
        told = f"No path: {path.reason}."
    caption = f"The best size is in {SIZES[found.settings.size]}. {told}"
    return _table("isoflop", "Best size at each budget of compute", caption, rows)


def significance_table(study: Study, found: Claims) -> PaperTable:
    scores = at_largest_budget(study, found)
    settings = found.settings
    pairs = paired(scores, study.metrics, bootstraps=settings.bootstraps, level=settings.level, seed=settings.seed)
    digits = {metric.key: metric.digits for metric in study.metrics}
    names = {metric.key: metric.axis for metric in study.metrics}
    rows = []
    for _, pair in pairs.iterrows():
        d = digits[pair["metric"]]
        row = {
            "Metric": names[pair["metric"]],
            "Size": str(pair["size"]),
            "against": str(pair["against"]),
            "Difference": f"{pair['difference']:+.{d}f}",
            "Interval": f"{pair['low']:+.{d}f} to {pair['high']:+.{d}f}",
            "p": f"{pair['p']:.2g}",
            "p (Holm)": f"{pair['p_holm']:.2g}",
            "Utterances": str(pair["utterances"]),
            "Seeds": str(pair["seeds"]),
        }
        rows.append({heading: (text, str(pair["run_ids"])) for heading, text in row.items()})
    caption = (
        f"Paired over utterances at each size's largest budget; {settings.level:.0%} intervals of bootstraps over "
        "utterances and seeds. With one seed a size, the spread between seeds is not in them."
    )
    return _table("significance", "Is one size better than another?", caption, rows, pairs)


def breakdown_table(study: Study, found: Claims) -> PaperTable:
    rows, numbers = [], []
    for metric in study.metrics:
        table = breakdown(study, found, metric)
        for (by, level), part in table.groupby(["by", "level"], sort=False):
            row = {
                "Metric": (f"{metric.axis}, gain", ""),
                "Input": (f"{level:g} dB" if by == "snr_db" else str(level), ""),
            }
            for _, cell in part.sort_values("N").iterrows():
                row[str(cell["size"])] = (f"{cell['gain']:+.{metric.digits}f}", cell["run_ids"])
            rows.append(row)
        numbers.append(table.assign(metric=metric.key))
    data = pd.concat(numbers, ignore_index=True) if numbers else None
    caption = "Mean gain over the unprocessed input at each size's largest budget, by SNR of the input and by noise."
    return _table("breakdown", "Where it helps", caption, rows, data)


def nodes_table(nodes: pd.DataFrame) -> PaperTable:
    rows = []
    for _, entry in nodes.iterrows():
        share = entry["communication_share"]
        row = {
            "Size": str(entry["size"]),
            "Scaling": str(entry["scaling"]),
            "Processes": str(entry["processes"]),
            "Nodes": f"{entry['nodes']:.0f}" if np.isfinite(entry["nodes"]) else MISSING,
            "Global batch": str(entry["global_batch"]),
            "Audio-s/s": human_count(entry["audio_seconds_per_second"]),
            "Speedup": f"{entry['speedup']:.2f}",
            "Efficiency": f"{entry['efficiency']:.0%}",
            "In communication": f"{share:.0%}" if np.isfinite(share) else MISSING,
            "Runs": str(entry["runs"]),
        }
        rows.append({heading: (text, str(entry["run_ids"])) for heading, text in row.items()})
    caption = "Strong: the same global batch on more processes; weak: the batch grows with them."
    return _table("node_scaling", "Training on more processes", caption, rows, nodes)


def exclusions_table(found: Claims) -> PaperTable:
    rows = [
        {
            heading: (str(text), run["run_id"])
            for heading, text in (
                ("Run", run["run_id"]),
                ("Cell", run["label"]),
                ("Rule", run["rule"]),
                ("Detail", run["detail"]),
            )
        }
        for _, run in found.exclusions.iterrows()
    ]
    caption = "Left out of every fit by rule; fits with those that have a loss on record stand beside the others."
    return _table("exclusions", "Runs left out of fits", caption, rows, found.exclusions)
