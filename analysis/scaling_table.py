"""The scaling table: one row a cell of the study, its numbers over the seeds that finished.

A cell is what differs in nothing but the seed: size, hours of audio, steps, and whatever other
axes the sweep had. Spread is the sample standard deviation over seeds, and a single seed has
none. What is planned and not finished is counted in its row and listed beneath the table. These
are the numbers; `analysis.scaling_table_text` has their text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from analysis.cells import cell_numbers, over_seeds
from analysis.families import family_names, has_shared_sizes, tells_families, unprocessed_mean, with_families
from analysis.gather import UNPROCESSED, Study
from analysis.quantities import (
    NOISIEST_GAIN,
    VALIDATION_LOSS,
    Quantity,
    axis_value,
    human_hours,
    loss_of,
    round_hours,
)
from analysis.reading import flatten

SIZE_COLUMNS = ("size", "num_params", "num_params_folded", "num_params_non_decoder", "macs_per_second")


@dataclass(frozen=True)
class ScalingTable:
    """The numbers of a scaling table.

    cells: one row a cell, by size, hours and steps; size, num_params, num_params_folded,
        num_params_non_decoder, macs_per_second, hours (rounded to the budget), steps, axes.NAME,
        family (its name; "" where axes alone tell families apart, or there is one),
        rtf (the real-time factor of streaming on one CPU thread, NaN where it was not measured),
        rtf_step (what enhanced the frames), rtf_cpu, label, steps_taken (mean over finished seeds;
        below the planned steps where any stopped early), seeds_finished, seeds_planned, run_ids
        and unfinished_run_ids (separated by spaces), and for each quantity QUANTITY_mean, QUANTITY_std (NaN below
        two seeds) and QUANTITY_n (seeds with a value); for metrics the same of METRIC_gain.
    unprocessed: the columns of the first row, the unprocessed input; NaN where runs differ in it.
    loss: what the validation loss is: of held-out speakers or not.
    axes: the axes that tell rows apart beyond size, hours and steps.
    unfinished: run_id, label, state, reason and log of every planned run without a result.
    """

    cells: pd.DataFrame
    unprocessed: pd.Series
    loss: Quantity
    metrics: tuple[Quantity, ...]
    axes: tuple[str, ...]
    unfinished: pd.DataFrame


def scaling_table(study: Study) -> ScalingTable:
    """Cells of a study: grouped over everything but the seed, and summed up over finished runs."""
    runs = study.runs.assign(hours=study.runs["hours"].map(round_hours))
    factors = real_time_factors(study)
    runs[factors.columns] = factors
    runs, axes_and_families = with_families(runs, study)
    found = [axis for axis in axes_and_families if axis not in study.axes and tells_families(axis)]
    axes = _telling_axes(runs, [axis for axis in axes_and_families if axis not in found])
    telling = [axis for axis in axes_and_families if axis not in axes and tells_families(axis)]
    runs["cell"] = cell_numbers(runs, axes_and_families)
    finished = runs[runs["state"] == "finished"]
    by_cell = runs.groupby("cell")

    of_axes = [f"axes.{axis}" for axis in (*axes, *telling)]
    cells = by_cell[[*SIZE_COLUMNS, "hours", "steps", *of_axes, *factors.columns]].first()
    cells["family"] = family_names(cells, telling)
    cells["label"] = _labels(cells, axes)
    cells["seeds_finished"] = finished.groupby("cell").size().reindex(cells.index, fill_value=0)
    cells["seeds_planned"] = by_cell.size()
    cells["steps_taken"] = finished.groupby("cell")["steps_taken"].mean().reindex(cells.index)
    quantities = [VALIDATION_LOSS.key, NOISIEST_GAIN.key]
    quantities += [column for metric in study.metrics for column in (metric.key, f"{metric.key}_gain")]
    cells = cells.join(over_seeds(finished, quantities))
    counts = [f"{quantity}_n" for quantity in quantities]
    cells[counts] = cells[counts].fillna(0).astype(int)
    unfinished = runs[runs["state"] != "finished"]
    for column, of in (("run_ids", finished), ("unfinished_run_ids", unfinished)):
        cells[column] = of.groupby("cell")["run_id"].agg(" ".join).reindex(cells.index, fill_value="")
    listed = unfinished.assign(
        label=unfinished["cell"].map(cells["label"]),
        log=pd.Series([_below(study.directory.path, log) for log in unfinished["log"]], unfinished.index, dtype=object),
    )
    return ScalingTable(
        cells=cells.sort_values(["num_params", "hours", "steps"], kind="stable").reset_index(drop=True),
        unprocessed=_unprocessed(finished, study.metrics),
        loss=loss_of(runs["train_on_validation"]),
        metrics=study.metrics,
        axes=axes,
        unfinished=listed[["run_id", "label", "seed", "state", "reason", "log"]].reset_index(drop=True),
    )


def real_time_factors(study: Study) -> pd.DataFrame:
    """rtf, rtf_step and rtf_cpu of each run's architecture, as `python -m scaling.rtf` measured it, or nothing."""
    measured = {_architecture(flatten({"model": row["model"]})): row for row in study.directory.read_rtf()}
    found = [measured.get(_architecture(study.science[run_id]), {}) for run_id in study.runs["run_id"]]
    columns = {"rtf": "rtf", "rtf_step": "step", "rtf_cpu": "cpu"}
    rows = [[row.get(name) for name in columns.values()] for row in found]
    return pd.DataFrame(rows, index=study.runs.index, columns=[*columns]).astype({"rtf": float})


def _architecture(science: dict[str, str]) -> frozenset[tuple[str, str]]:
    """What decides the network among the settings that decide a result."""
    return frozenset((name, value) for name, value in science.items() if name.startswith("model."))


def _telling_axes(runs: pd.DataFrame, axes: Sequence[str]) -> tuple[str, ...]:
    """The axes that size, hours and the axes before them do not already determine."""
    telling: list[str] = []
    known = ["size", "hours"]
    for axis in axes:
        if (runs.groupby(known, dropna=False)[f"axes.{axis}"].nunique(dropna=False) > 1).any():
            telling.append(axis)
            known.append(f"axes.{axis}")
    return tuple(telling)


def _labels(cells: pd.DataFrame, axes: Sequence[str]) -> list[str]:
    """A name for each row: its size, and of the rest what differs between rows."""
    labels = []
    is_shared = has_shared_sizes(cells)
    for _, cell in cells.iterrows():
        parts = [str(cell["size"])]
        if cells["hours"].nunique() > 1:
            parts.append(f"{human_hours(cell['hours'])} h")
        if cells["steps"].nunique() > 1:
            parts.append(f"{cell['steps']:,} steps")
        parts += [f"{axis}={axis_value(cell[f'axes.{axis}'])}" for axis in axes]
        labels.append(" · ".join(parts + [cell["family"]] * is_shared))
    return labels


def _unprocessed(finished: pd.DataFrame, metrics: Sequence[Quantity]) -> pd.Series:
    row: dict[str, object] = {"size": "unprocessed", "run_ids": " ".join(finished["run_id"])}
    for key in (VALIDATION_LOSS.key, *(metric.key for metric in metrics)):
        values = finished[UNPROCESSED + key]
        row |= {f"{key}_mean": unprocessed_mean(finished, UNPROCESSED + key), f"{key}_n": int(values.count())}
    return pd.Series(row)


def _below(folder: Path, log: object) -> str | None:
    """A log's path, from the study's folder where it lies in it."""
    if not isinstance(log, str):
        return None
    path, folder = Path(log).absolute(), folder.absolute()
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else log
