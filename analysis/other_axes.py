"""Which cells may stand in one law or table: those that differ in nothing but size, data, budget and seed.

Any setting can be an axis of a sweep. An axis whose values are not settled by the size, the hours of data and the
budget (a learning rate that every size is trained with, say) makes several settings of the same cells, which are not
seeds of each other: laws and tables are made of one of them, chosen by a rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.tables import axis_value

DATA_AXIS, BUDGET_AXES = "data.hours", "train.budget."


@dataclass(frozen=True)
class OtherAxes:
    """The axes beside size, data, budget and seed, and the one setting of them that laws and tables are made of.

    chosen: axis → its value in that setting, as text; none if the study has no such axis.
    settings: how many there are; rivals: how many of them cover as many cells as the chosen one.
    cells_left_out: of other settings.
    """

    chosen: dict[str, str]
    settings: int = 1
    rivals: int = 1
    cells_left_out: int = 0

    @property
    def setting(self) -> str:
        return ", ".join(f"{axis}={value}" for axis, value in self.chosen.items())

    @property
    def note(self) -> str:
        """For the caption of whatever is made of that setting; "" if there is nothing to say."""
        if not self.chosen:
            return ""
        return f"Of {self.setting}; {_cells(self.cells_left_out)} left out."

    @property
    def remark(self) -> str:
        if not self.chosen:
            return ""
        lowest = (
            f", of {self.rivals} that do so the one with the lowest mean validation loss" if self.rivals > 1 else ""
        )
        return (
            f"Laws, minima and the tables of sizes, budgets, differences and breakdowns are of {self.setting}: of "
            f"{self.settings} settings of {', '.join(self.chosen)} one that covers the most cells{lowest}. "
            f"{_cells(self.cells_left_out)} left out of them; the scaling table has all."
        )


def one_setting(runs: pd.DataFrame, axes: Sequence[str]) -> tuple[NDArray[np.bool_], OtherAxes]:
    """(which runs are of the chosen setting, that setting); runs as `analysis.claims` prepares them.

    Chosen is the setting that covers the most cells which no rule excludes, of several the one with the lowest mean
    validation loss, then the first of the plan.
    """
    others = _telling(runs, axes)
    if not others:
        return np.ones(len(runs), dtype=bool), OtherAxes({})
    columns = [f"axes.{axis}" for axis in others]
    setting = runs.groupby(columns, sort=False, dropna=False).ngroup()
    kept = runs[runs["excluded"] == ""]
    cells = kept.groupby([setting[kept.index].rename("setting"), "cell"])["validation_loss"].mean()
    covered = cells.groupby(level="setting").agg(["size", "mean"]).reindex(range(setting.max() + 1))
    covered["size"] = covered["size"].fillna(0)
    best = int(covered.sort_values(["size", "mean"], ascending=[False, True], kind="stable").index[0])
    mask = (setting == best).to_numpy()
    first = runs[mask].iloc[0]
    return mask, OtherAxes(
        {axis: axis_value(first[column]) for axis, column in zip(others, columns, strict=True)},
        len(covered),
        int((covered["size"] == covered["size"].max()).sum()),
        int(runs.loc[~mask, "cell"].nunique()),
    )


def _telling(runs: pd.DataFrame, axes: Sequence[str]) -> list[str]:
    """The axes that the size, the hours of data and the budget do not settle."""
    settled = [axis for axis in axes if axis == DATA_AXIS or axis.startswith(BUDGET_AXES)]
    known = ["size", "num_params", "macs_per_second", "budget_hours", *(f"axes.{axis}" for axis in settled)]
    groups = runs.groupby(known, dropna=False)
    return [axis for axis in axes if axis not in settled and (groups[f"axes.{axis}"].nunique(dropna=False) > 1).any()]


def _cells(count: int) -> str:
    return f"{count} cell{'' if count == 1 else 's'} of other settings {'is' if count == 1 else 'are'}"
