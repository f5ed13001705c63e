"""Held-out prediction: a law is fitted again without its largest cells, and has to predict them.

It passes if they lie in prediction intervals that together hold with the level's probability, if it is nearer than the
nearest cell that was seen, and if the cells show all of the law.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from analysis.budgets import levels_of
from analysis.fit import Fit
from analysis.quantities import CEILINGS, Quantity, human_hours, human_macs
from analysis.settings import Settings

COLUMNS = ["label", "N", "D", "C", "seeds", "run_ids", "observed", "predicted", "low", "high"]
COLUMNS += ["error", "half_width", "naive", "naive_run_ids", "naive_error", "is_covered"]


@dataclass(frozen=True)
class HeldOut:
    """A prediction of cells that the fit did not see.

    left_out: the cells, in words.
    verdict: "pass" if every cell lies in its interval and the errors are smaller than the naive ones, and the cells
        show all of the law, with those left out and without; "fail"; or "not possible", with the reason.
    cells: one row a cell left out: label, N, D, C, seeds, run_ids, observed, predicted, low, high, error (predicted -
        observed; relative for losses), half_width (of the interval, in the unit of the error), naive (the nearest cell
        that was seen), naive_run_ids, naive_error, is_covered.
    fitted_run_ids: of the fit that predicts.
    """

    left_out: str
    verdict: str
    reason: str
    cells: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=COLUMNS))
    fitted_run_ids: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """Mean distance of the predictions from what was observed."""
        return float(np.abs(self.cells["error"]).mean()) if len(self.cells) else np.nan

    @property
    def half_width(self) -> float:
        """Mean half of the intervals' widths."""
        return float(self.cells["half_width"].mean()) if len(self.cells) else np.nan


def held_out(
    runs: pd.DataFrame,
    quantity: Quantity,
    what: str,
    variable: str,
    law: Fit,
    refit: Callable[[pd.DataFrame], Fit],
    settings: Settings,
) -> HeldOut:
    """Leave out the cells of the largest level of a variable and predict them by the law of the others.

    runs: with N, D, C, cell, label, size, the law's variables and the quantity, none that a rule excludes.
    what: the largest level, in words. law: that of all cells. refit: runs → the law of these.
    """
    levels = levels_of(runs[variable])
    if len(levels) < 2:
        return HeldOut(what, "not possible", f"{variable} has {len(levels)} level{'s' * (len(levels) != 1)}")
    is_last = runs[variable] >= levels[-1] * (1 - 1e-9)
    seen, unseen = runs[~is_last], runs[is_last]
    what = f"{what} ({_name(unseen, variable)})"
    trial = refit(seen)
    if not trial.is_usable:
        return HeldOut(what, "not possible", f"without it: {trial.status}, {trial.reason}")
    if not trial.has_interval:
        return HeldOut(what, "not possible", f"without it: {trial.why_no_interval}")
    # Intervals that together hold with the level's probability, so that many cells do not fail by chance.
    level = settings.level ** (1 / unseen["cell"].nunique())
    cells = pd.DataFrame(
        [
            _compared(cell, _nearest(seen, cell, variable), quantity, trial, level, settings.seed)
            for _, cell in unseen.groupby("cell")
        ]
    )
    if not np.isfinite(cells[["low", "high"]].to_numpy(dtype=float)).all():
        return HeldOut(what, "not possible", "without it: an interval without an end")
    return HeldOut(what, *_verdict(cells, law, trial), cells, tuple(seen["run_id"]))


def _compared(
    cell: pd.DataFrame, nearest: pd.DataFrame, quantity: Quantity, law: Fit, level: float, seed: int
) -> dict[str, Any]:
    """The row of a cell that was left out: what was observed, what the law of the others and the nearest cell say."""
    # A cell's x is the same for all its seeds, but for the loss, of which it is the mean.
    x = {name: np.array([cell[name].astype(float).mean()]) for name in law.law.variables}
    observed, predicted = float(cell[quantity.key].mean()), float(law.predict(x)[0])
    naive = float(nearest[quantity.key].mean())
    ceiling = CEILINGS.get(quantity.key, np.inf)
    low, high = (
        float(np.minimum(end, ceiling)[0]) for end in law.prediction_interval(x, level, seeds=len(cell), seed=seed)
    )
    unit = observed if law.law.has_log_residuals else 1.0
    return {
        "label": cell["label"].iloc[0],
        "N": cell["N"].iloc[0],
        "D": cell["D"].iloc[0],
        "C": cell["C"].iloc[0],
        "seeds": len(cell),
        "run_ids": " ".join(cell["run_id"]),
        "observed": observed,
        "predicted": predicted,
        "low": low,
        "high": high,
        "error": (predicted - observed) / unit,
        "half_width": (high - low) / 2 / unit,
        "naive": naive,
        "naive_run_ids": " ".join(nearest["run_id"]),
        "naive_error": (naive - observed) / unit,
        "is_covered": low <= observed <= high,
    }


def _nearest(seen: pd.DataFrame, cell: pd.DataFrame, variable: str) -> pd.DataFrame:
    """The runs of the cell by which a naive reader would predict one that is held out: a rule, not hindsight.

    Of the next level down of what is held out it is the cell of the nearest size, then of the nearest data, as factors.
    """
    near = seen[seen[variable] >= levels_of(seen[variable])[-1] * (1 - 1e-9)]
    for name in [name for name in ("N", "D") if name != variable]:
        away = np.abs(np.log(near[name].astype(float) / float(cell[name].iloc[0])))
        near = near[away <= away.min() + 1e-9]
    return near[near["cell"] == near["cell"].iloc[0]]


def _verdict(cells: pd.DataFrame, law: Fit, trial: Fit) -> tuple[str, str]:
    """(pass, fail or not possible, why). trial: the law without the cells."""
    failures = []
    if not cells["is_covered"].all():
        failures.append(f"{(~cells['is_covered']).sum()} of {len(cells)} cells outside the interval")
    if not cells["error"].abs().mean() < cells["naive_error"].abs().mean():
        failures.append("no nearer than the nearest cell that was seen")
    if failures:
        return "fail", "; ".join(failures)
    # A curve that its cells do not show may come near by chance: of that no pass is made.
    both = {"the law of all cells": law, "the law without it": trial}
    unshown = [f"{which} is {one.status} ({one.reason})" for which, one in both.items() if not one.is_shown]
    return ("not possible", "; ".join(unshown)) if unshown else ("pass", "")


def _name(runs: pd.DataFrame, variable: str) -> str:
    """The level that these runs share, in words."""
    if variable == "N":
        return ", ".join(dict.fromkeys(runs["size"]))
    if variable == "D":
        return f"{human_hours(runs['D'].max())} h"
    return human_macs(runs["C"].max())
