"""Which cells may stand in one law or table: those that differ in nothing but size, data, budget and seed.

Any setting can be an axis of a sweep. An axis whose values are not settled by the size, the hours of data and the
budget (a learning rate that every size is trained with, say) makes several settings of the same cells, which are not
seeds of each other: laws and tables are made of one of them, chosen by a rule. What tells families apart
(`analysis.families`) counts as an axis whatever settles it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.families import CORPUS, TRAINED_ON, tells_families
from analysis.quantities import axis_value

DATA_AXIS, BUDGET_AXES = "data.hours", "train.budget."
# Between runs that differ in one of these a lower loss is not a better model.
OF_THE_LOSS = ("train.losses.", "model.front_end", CORPUS, TRAINED_ON)


@dataclass(frozen=True)
class OtherAxes:
    """The axes beside size, data, budget and seed, and the one setting of them that laws and tables are made of.

    chosen: axis → its value in that setting, as text; none if the study has no such axis.
    settings: how many there are; rivals: how many of them cover as many cells as the chosen one.
    cells_left_out: of other settings.
    why_first: why the first of the rivals was taken, and not the one with the lowest loss; "" if that was.
    """

    chosen: dict[str, str]
    settings: int = 1
    rivals: int = 1
    cells_left_out: int = 0
    why_first: str = ""

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
        which = f"the first of the plan, since {self.why_first}" if self.why_first else ""
        which = which or "the one with the lowest mean validation loss"
        lowest = f", of {self.rivals} that do so {which}" if self.rivals > 1 else ""
        return (
            f"Laws, minima and the tables of sizes, budgets, differences and breakdowns are of {self.setting}: of "
            f"{self.settings} settings of {', '.join(self.chosen)} one that covers the most cells{lowest}. "
            f"{_cells(self.cells_left_out)} left out of them; the scaling table has all."
        )


def one_setting(
    runs: pd.DataFrame, axes: Sequence[str], science: Mapping[str, Mapping[str, str]]
) -> tuple[NDArray[np.bool_], OtherAxes]:
    """(which runs are of the chosen setting, that setting); runs as `analysis.claims` prepares them.

    Chosen is the setting that covers the most cells which no rule excludes, of several the one with the lowest mean
    validation loss, where their losses compare, then the first of the plan.
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
    rivals = covered[covered["size"] == covered["size"].max()]
    why_first = _why_no_lowest(runs[setting.isin(rivals.index)], science) if len(rivals) > 1 else ""
    if len(rivals) > 1 and rivals["mean"].isna().all():
        why_first = "no run of them may stand in a law"
    best = int((rivals if why_first else rivals.sort_values("mean", kind="stable")).index[0])
    mask = (setting == best).to_numpy()
    first = runs[mask].iloc[0]
    return mask, OtherAxes(
        {axis: axis_value(first[column]) for axis, column in zip(others, columns, strict=True)},
        len(covered),
        len(rivals),
        int(runs.loc[~mask, "cell"].nunique()),
        why_first,
    )


def _telling(runs: pd.DataFrame, axes: Sequence[str]) -> list[str]:
    """The axes that the size, the hours of data and the budget do not settle, and those that tell families apart."""
    settled = [axis for axis in axes if axis == DATA_AXIS or axis.startswith(BUDGET_AXES)]
    known = ["size", "num_params", "macs_per_second", "budget_hours", *(f"axes.{axis}" for axis in settled)]
    groups = runs.groupby(known, dropna=False)

    def tells(axis: str) -> bool:
        column = f"axes.{axis}"
        if tells_families(axis):
            return runs[column].nunique(dropna=False) > 1
        return axis not in settled and bool((groups[column].nunique(dropna=False) > 1).any())

    return [axis for axis in axes if tells(axis)]


def _why_no_lowest(runs: pd.DataFrame, science: Mapping[str, Mapping[str, str]]) -> str:
    """Why none of the settings of these runs is better for its lower loss; "" if one is."""
    settings = [science[run_id] for run_id in runs["run_id"]]
    keys = sorted({key for flat in settings for key in flat if key.startswith(OF_THE_LOSS)})
    if differing := [key for key in keys if len({flat.get(key) for flat in settings}) > 1]:
        return f"losses do not compare where {', '.join(differing)} differ{'s' * (len(differing) == 1)}"
    return "the loss is of training speakers" if runs["train_on_validation"].any() else ""


def _cells(count: int) -> str:
    return f"{count} cell{'' if count == 1 else 's'} of other settings {'is' if count == 1 else 'are'}"
