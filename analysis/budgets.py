"""Which runs have spent alike: the same audio, or the same training compute."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.quantities import human_hours, round_hours

SAME_LEVEL = 0.05  # relative: steps are whole numbers, so the cells of a budget differ by some percent


def levels_of(values: pd.Series) -> np.ndarray:
    """The lower ends of the distinct levels, ascending; a value up to SAME_LEVEL above one is of it."""
    ends: list[float] = []
    for value in np.sort(np.asarray(values, dtype=float)):
        if not ends or value > ends[-1] * (1 + SAME_LEVEL):
            ends.append(float(value))
    return np.array(ends)


def at_one_level(runs: pd.DataFrame, data: str) -> tuple[pd.DataFrame, str]:
    """The runs of one level of what `data` is not, of audio seen and distinct audio, if that varies beside it.

    Of several levels the one with the most cells, of several such the largest; and which it is, in words.
    """
    levels = {
        "audio_hours_seen": runs["audio_hours_seen"].astype(float).map(round_hours),
        "hours": runs["budget_hours"],
    }
    (other,) = levels.keys() - {data}
    kept = pd.DataFrame(levels)[runs["excluded"] == ""].assign(cell=runs["cell"])
    if (kept.groupby(data)[other].nunique() <= 1).all():  # the one follows from the other
        return runs, ""
    cells = kept.groupby(other)["cell"].nunique()
    best = cells[cells == cells.max()].index.max()
    words = {"hours": "of {} h of distinct audio", "audio_hours_seen": "of {} h of audio seen"}[other]
    return runs[levels[other] == best], f" {words.format(human_hours(best))}"


def at_one_budget(runs: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The runs of the budget (hours, audio seen) with the most sizes, of several the largest; and which it is."""
    kept = runs[runs["excluded"] == ""]
    seen = kept["audio_hours_seen"].astype(float).map(round_hours)
    sizes = kept.groupby([seen.rename("seen"), "budget_hours"])["size"].nunique()
    if sizes.empty:
        return runs[:0], "no run is left"
    best = sizes[sizes == sizes.max()].index.max()
    chosen = runs[
        (runs["audio_hours_seen"].astype(float).map(round_hours) == best[0]) & (runs["budget_hours"] == best[1])
    ]
    if sizes.max() < 2:
        return chosen, "no two sizes have seen the same audio"
    return chosen, f"{human_hours(best[0])} h seen, of {human_hours(best[1])} h of audio"


def of_equal_compute(runs: pd.DataFrame) -> list[pd.DataFrame]:
    """Runs by budget: as planned where compute is an axis, else those whose compute is nearly the same.

    Runs whose compute is not known, as plans of an earlier version have them, are of none. Those of a budget have one
    amount of distinct audio, that which the most sizes have, of several the most; but where compute was planned and
    each size has its own.
    """
    runs = runs[np.isfinite(runs["C"].astype(float)) & (runs["C"] > 0)]
    axis = "axes.train.budget.train_pmacs"
    if axis in runs and runs[axis].notna().any():
        planned = [budget for _, budget in runs.groupby(axis)]
        each = [(budget.groupby("size")["budget_hours"].nunique() <= 1).all() for budget in planned]
        return [budget if own else _of_one_data_budget(budget) for budget, own in zip(planned, each, strict=True)]
    if runs.empty:
        return []
    level = np.searchsorted(levels_of(runs["C"]), runs["C"].to_numpy(dtype=float), side="right")
    return [_of_one_data_budget(budget) for _, budget in runs.groupby(level)]


def _of_one_data_budget(runs: pd.DataFrame) -> pd.DataFrame:
    sizes = runs.groupby("budget_hours")["size"].nunique()
    return runs[runs["budget_hours"] == sizes[sizes == sizes.max()].index.max()]
