"""The report's tables, in its order: results by size and budget, what they cost, differences and breakdowns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from analysis.breakdown import breakdown
from analysis.cells import over_seeds
from analysis.claims import Claim, Claims
from analysis.comparable import Comparable
from analysis.exclusions import stopped_early
from analysis.gather import Study
from analysis.isoflop import IsoFlop
from analysis.law_tables import exclusions_effect_table, exclusions_table, held_out_table, isoflop_table, laws_table
from analysis.quantities import (
    MISSING,
    VALIDATION_LOSS,
    Quantity,
    axis_value,
    human_count,
    human_hours,
    human_macs,
    loss_of,
    mean_and_spread,
    round_hours,
    steps_text,
)
from analysis.report_table import ReportTable, table_of
from analysis.settings import DATA, Settings
from analysis.significance import paired

MOST_CLIPS = 4  # named in a cell
# The tables of cells of one setting of the further axes (`analysis.other_axes`).
OF_ONE_SETTING = {"size_table", "data_table", "joint_table", "laws", "metric_laws", "fits_both_ways", "held_out"}
OF_ONE_SETTING |= {"isoflop", "significance", "breakdown"}
CELL_COLUMNS = (
    "size",
    "num_params",
    "num_params_non_decoder",
    "macs_per_second",
    "budget_hours",
    "audio_hours_seen",
    "steps",
    "train_macs",
)
# What of a budget tells cells apart, as the heading of a column has it.
BUDGET_WORDS: dict[str, Callable[[float], str]] = {
    "budget_hours": lambda hours: f"{human_hours(hours)} h of data",
    "seen": lambda hours: f"{human_hours(hours)} h seen",
    "steps": lambda steps: f"{steps:,.0f} steps",
}


def report_tables(
    study: Study, found: Claims, iso: IsoFlop, processes: pd.DataFrame, cells: Comparable
) -> list[ReportTable]:
    """All tables that have rows, in the report's order."""
    level, loss = found.settings.level, found.losses[0].quantity
    tables = [
        size_table(study, found),
        data_table(study, found),
        joint_table(found),
        efficiency_table(study, found),
        laws_table(found.losses, "laws", "Laws of the loss", level, found.data, loss),
        laws_table(found.metrics, "metric_laws", "Laws of metrics", level, found.data, loss),
        exclusions_effect_table(found),
        held_out_table(found),
        isoflop_table(iso, found),
        significance_table(cells, study.metrics, found.settings),
        breakdown_table(cells, study.metrics),
        process_table(processes),
        exclusions_table(found),
        replaced_table(study, found),
    ]
    note = found.other_axes.note
    return [
        replace(table, caption=f"{table.caption} {note}") if note and table.name in OF_ONE_SETTING else table
        for table in tables
        if len(table.text)
    ]


def _spread(runs: pd.DataFrame, quantity: Quantity) -> tuple[str, str]:
    """Mean ± standard deviation over seeds, of how many where some have no value, and the runs."""
    values = runs.loc[runs[quantity.key].notna(), quantity.key].astype(float)
    ids = " ".join(runs.loc[values.index, "run_id"])
    text = mean_and_spread(values.mean(), values.std(ddof=1), quantity)
    return f"{text}, of {len(values)}" if 0 < len(values) < len(runs) else text, ids


def _ids(runs: pd.DataFrame) -> str:
    return " ".join(runs["run_id"])


def _quantity_cells(study: Study, runs: pd.DataFrame) -> dict[str, tuple[str, str]]:
    quantities = (loss_of(runs["train_on_validation"]), *study.metrics)
    return {q.heading: _spread(runs, q) for q in quantities if study.runs[q.key].notna().any()}


def _numbers(study: Study, runs: pd.DataFrame) -> pd.DataFrame:
    """A row a cell: what it is, mean, standard deviation and count of each quantity, and the runs."""
    cells = runs.groupby("cell", sort=False)
    values = over_seeds(runs, [quantity.key for quantity in (VALIDATION_LOSS, *study.metrics)])
    taken = cells[["steps_taken", "hours_seen", "macs_spent"]].mean()
    return cells[list(CELL_COLUMNS)].first().join([values, taken]).assign(run_ids=cells["run_id"].agg(" ".join))


def size_table(study: Study, found: Claims) -> ReportTable:
    """Sizes at one budget."""
    claim = found.loss("L(N)")
    runs = _of_claim(found, claim).sort_values("macs_per_second")

    def columns(cell: pd.DataFrame) -> dict[str, str]:
        first = cell.iloc[0]
        return {
            "Size": str(first["size"]),
            "Parameters": human_count(first["num_params"]),
            "outside decoder": human_count(float(first["num_params_non_decoder"] or np.nan)),
            "MACs/s": human_count(first["macs_per_second"]),
        }

    about = claim.about if claim else ""
    return _table_of_cells(study, runs, "size_table", "Sizes at one budget", about, columns)


def data_table(study: Study, found: Claims) -> ReportTable:
    """Budgets at one size."""
    runs = _of_claim(found, found.loss("L(D)")).sort_values("D")

    def columns(cell: pd.DataFrame) -> dict[str, str]:
        first = cell.iloc[0]
        return {
            "Hours seen": human_hours(float(cell["hours_seen"].mean())),
            "Hours of data": human_hours(first["budget_hours"]),
            "Steps": steps_text(first["steps"], cell["steps_taken"].mean()),
        }

    about = f"size {runs['size'].iloc[0] if len(runs) else ''}"
    return _table_of_cells(study, runs, "data_table", "Budgets of data at one size", about, columns)


def _of_claim(found: Claims, claim: Claim | None) -> pd.DataFrame:
    """The runs that a law is fitted to."""
    return found.kept[found.kept["run_id"].isin(claim.run_ids if claim else ())]


def _table_of_cells(
    study: Study,
    runs: pd.DataFrame,
    name: str,
    title: str,
    about: str,
    columns: Callable[[pd.DataFrame], dict[str, str]],
) -> ReportTable:
    """A row a cell, in the order of the runs, if there are several.

    columns: a cell's runs → what tells it from the others; its seeds and quantities follow.
    """
    rows = []
    for _, cell in runs.groupby("cell", sort=False):
        ids = _ids(cell)
        told = {heading: (text, ids) for heading, text in (columns(cell) | {"Seeds": str(len(cell))}).items()}
        rows.append(told | _quantity_cells(study, cell))
    caption = f"Mean ± sample standard deviation over seeds; {about}."
    return table_of(name, title, caption, rows if len(rows) > 1 else [], _numbers(study, runs))


def joint_table(found: Claims) -> ReportTable:
    """Loss by size (rows) and budget (columns: compute where sizes share it, else hours, and what else it needs)."""
    runs = found.kept.sort_values("macs_per_second")
    axis = "axes.train.budget.train_pmacs"
    by_compute = axis in runs and runs[axis].notna().any()
    seen = runs["audio_hours_seen"].astype(float).map(round_hours)  # as planned: what seeds share
    hours = seen if found.data == "audio_hours_seen" else runs["budget_hours"]
    runs = runs.assign(budget=runs[axis].astype(float) if by_compute else hours, seen=seen)
    key, rows = _cell_key(runs), []
    levels = runs[key].dropna().drop_duplicates().sort_values(key)
    if len(levels) > 1 and runs["size"].nunique() > 1:
        for size, of_size in runs.groupby("size", sort=False):
            row = {"Size": (str(size), _ids(of_size))}
            for _, level in levels.iterrows():
                first = human_macs(level["budget"] * 1e15) if by_compute else f"{human_hours(level['budget'])} h"
                heading = ", ".join([first, *(BUDGET_WORDS[name](level[name]) for name in key[1:])])
                row[heading] = _spread(of_size[(of_size[key] == level).all(axis=1)], VALIDATION_LOSS)
            rows.append(row)
    what = "training compute" if by_compute else DATA[found.data]
    cells = runs.groupby(["size", *key], sort=False)
    data = cells["validation_loss"].agg(["mean", "std", "count"]).assign(run_ids=cells["run_id"].agg(" ".join))
    loss = loss_of(runs["train_on_validation"]).label
    caption = f"{loss}, mean ± sample standard deviation over seeds, by size and {what}."
    if told := stopped_early(runs):
        caption += f" As planned: {told}."
    return table_of("joint_table", "Sizes and budgets together", caption, rows, data.reset_index() if rows else None)


def _cell_key(runs: pd.DataFrame) -> list[str]:
    """What beside the size tells cells apart: the budget, and of BUDGET_WORDS as many as it takes."""
    key = ["budget"]
    for name in BUDGET_WORDS:
        if (runs.groupby(["size", *key])["cell"].nunique() > 1).any():
            key.append(name)
    return key


def efficiency_table(study: Study, found: Claims) -> ReportTable:
    """What each cell cost, estimated and actual, and what it bought."""
    rows, numbers = [], []
    for _, cell in (
        found.runs[found.runs["state"] == "finished"].sort_values(["macs_per_second", "D"]).groupby("cell", sort=False)
    ):
        first, ids = cell.iloc[0], _ids(cell)
        planned = cell["estimated_hours"].astype(float) * cell["world_size"].fillna(1)  # the plan's: the job's time
        estimated, actual = float(planned.mean()), float(cell["training_hours"].mean())
        speed = float(cell["audio_seconds_per_second"].median())
        spent = {name: float(cell[name].mean()) for name in ("steps_taken", "hours_seen", "macs_spent")}
        trained = spent["macs_spent"] / (spent["hours_seen"] * 3600) * speed
        loss = float(cell["validation_loss"].mean())
        gained = 1 - loss / float(cell["unprocessed_validation_loss"].mean())
        row = {
            "Size": str(first["size"]),
            **{axis: axis_value(first[f"axes.{axis}"]) for axis in found.other_axes.chosen},
            "Hours seen": human_hours(spent["hours_seen"]),
            "Training compute": human_macs(spent["macs_spent"]),
            "Audio-s/s": human_count(speed),
            "Training MACs per wall second": human_count(trained),
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
            | spent
            | {"estimated_hours": estimated, "training_hours": actual, "loss_removed": gained, "run_ids": ids}
            | {"audio_seconds_per_second": speed, "training_macs_per_wall_second": trained}
            | {name: float(cell[name].astype(float).mean()) for name in ("attempts", "device_hours")}
        )
    caption = (
        "Hours are wall hours times processes (estimated: as the plan has it, for all steps; actual: all sessions of a "
        "run, evaluation left out), a mean over seeds. Jobs and device-hours: of a cluster, all included that a run's "
        "jobs took. Training MACs per wall second: three times the MACs of a forward pass, which elsewhere are counted "
        "per second of audio. Loss removed: of the unprocessed input's."
    )
    return table_of("efficiency_table", "What it cost, and what it bought", caption, rows, numbers)


def _mean_text(values: pd.Series) -> str:
    mean = float(values.astype(float).mean())
    return f"{mean:.3g}" if np.isfinite(mean) else MISSING


def significance_table(cells: Comparable, metrics: Sequence[Quantity], settings: Settings) -> ReportTable:
    """A row a metric and pair of sizes: difference, interval and p; the CSV has both sizes' hours too."""
    pairs = paired(cells.scores, metrics, bootstraps=settings.bootstraps, level=settings.level, seed=settings.seed)
    seen = cells.runs.groupby("size")["hours_seen"].mean()
    pairs = pairs.assign(hours_seen=pairs["size"].map(seen), hours_seen_against=pairs["against"].map(seen))
    if not cells.is_shared:
        pairs = pairs.assign(p=np.nan, p_holm=np.nan, is_bound=False)
    digits = {metric.key: metric.digits for metric in metrics}
    names = {metric.key: metric.axis for metric in metrics}
    rows = []
    for _, pair in pairs.iterrows():
        d = digits[pair["metric"]]
        row = {
            "Metric": names[pair["metric"]],
            "Size": str(pair["size"]),
            "against": str(pair["against"]),
            "Hours seen": f"{human_hours(pair['hours_seen'])} and {human_hours(pair['hours_seen_against'])}",
            "Difference": f"{pair['difference']:+.{d}f}",
            "Interval": f"{pair['low']:+.{d}f} to {pair['high']:+.{d}f}{' *' if pair['of_runs_alone'] else ''}",
            "p": _p_text(pair["p"], pair["is_bound"]),
            "p (Holm)": _p_text(pair["p_holm"], pair["is_bound"]),
            "Utterances": str(pair["utterances"]),
            "Seeds": str(pair["seeds"]),
        }
        if cells.is_shared and seen.map(round_hours).nunique() == 1:
            del row["Hours seen"]  # the caption has them
        rows.append({heading: (text, str(pair["run_ids"])) for heading, text in row.items()})
    caption = (
        f"Paired over utterances, a cell of each size, {cells.caption}; {settings.level:.0%} intervals of "
        "bootstraps over utterances, with Student's t for the scatter of each size's seeds (Welch)."
    )
    ordered = cells.scores.sort_values("N")["size"].drop_duplicates()
    for metric, of_metric in pairs.groupby("metric", sort=False):
        sizes = {*of_metric["size"], *of_metric["against"]}
        if without := [str(size) for size in ordered if size not in sizes]:
            caption += f" {names[str(metric)]}: without {', '.join(without)}, of which it has no score."
    if not cells.is_shared:
        caption += " Budgets differ: there is no p."
    if pairs["of_runs_alone"].any():
        caption += (
            " * of these trained models alone, over other utterances: where a size has one seed nothing shows what "
            "another would change, so there is no p."
        )
    return table_of("significance", "Is one size better than another?", caption, rows, pairs)


def _p_text(p: float, is_bound: bool) -> str:
    return f"{'<' if is_bound else ''}{p:.2g}" if np.isfinite(p) else MISSING


def breakdown_table(cells: Comparable, metrics: Sequence[Quantity]) -> ReportTable:
    """A row a metric and level of SNR or noise, a column a size."""
    rows, numbers = [], []
    for metric in metrics:
        table = breakdown(cells, metric)
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
    caption = f"Mean gain over the unprocessed input, by SNR of the input and by noise: {cells.caption}."
    return table_of("breakdown", "Where it helps", caption, rows, data)


def process_table(processes: pd.DataFrame) -> ReportTable:
    """A row a number of processes, of each size and setting; processes as `process_scaling` has them."""
    rows, has_settings = [], bool((processes["setting"] != "").any())
    for _, entry in processes.iterrows():
        share = entry["communication_share"]
        row = {
            "Size": str(entry["size"]),
            **({"Setting": str(entry["setting"])} if has_settings else {}),
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
    caption = "Of runs that finished. Strong: the same global batch on more processes; weak: the batch grows with them."
    return table_of("node_scaling", "Training on more processes", caption, rows, processes)


def replaced_table(study: Study, found: Claims) -> ReportTable:
    """The runs in whose training damaged clips were replaced; the CSV has a row a crop."""
    runs = {run["run_id"]: run for run in found.runs.to_dict("records")}
    rows = []
    for run_id, crops in study.replaced.groupby("run_id", sort=False):
        run = runs[str(run_id)]
        share = len(crops) / float(run["last_step"] * run["global_batch"])
        reasons = crops["what"].value_counts()
        clips = list(dict.fromkeys(crops["id"]))
        more = ", …" if len(clips) > MOST_CLIPS else ""
        row = {
            "Run": str(run_id),
            "Cell": str(run["label"]),
            "Crops replaced": f"{len(crops):,}",
            "of all": f"{share:.2%}" if np.isfinite(share) else MISSING,
            "Damaged clips": f"{len(clips):,}: {', '.join(clips[:MOST_CLIPS])}{more}",
            "What was wrong": "; ".join(f"{what} ({count:,})" for what, count in list(reasons.items())[:MOST_CLIPS]),
        }
        rows.append({heading: (text, str(run_id)) for heading, text in row.items()})
    caption = (
        "A crop whose clip is damaged where it was to be read is replaced by one of another clip, always the same one. "
        "python -m scaling.verify lists all damage of the shards."
    )
    title = "Training crops replaced because of damaged clips"
    return table_of("replaced_crops", title, caption, rows, study.replaced)
