"""Which cell of each size stands for it where sizes are set side by side: all of one budget, so size alone differs.

The budget (hours of data and of audio seen, as planned) that the most sizes share, of several the largest. Where more
sizes share a level of training compute than any budget of audio, as in a study of equal compute, they are compared
there. Sizes that lack it are left out and named. Where no two sizes share anything each stands at its largest budget:
then the budgets may be what differs, and nothing is tested. Runs that stopped early are compared by what they were
allowed: how much of it they used is part of what size does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.budgets import at_one_budget, of_equal_compute
from analysis.claims import Claims
from analysis.exclusions import stopped_early
from analysis.gather import Study
from analysis.quantities import human_macs, round_hours

SHOWN = ["run_id", "size", "N", "cell", "hours_seen"]


@dataclass(frozen=True)
class Comparable:
    """runs: run_id, size, N, cell and hours_seen, of one cell a size; scores: theirs, with these columns.

    about: where they are compared, in words. is_shared: False where each size is at its own budget.
    left_out: sizes without a cell there.
    """

    runs: pd.DataFrame
    scores: pd.DataFrame
    about: str
    is_shared: bool = True
    left_out: tuple[str, ...] = ()

    @property
    def caption(self) -> str:
        """Of a table or figure: "at 100 h seen, of 9 h of audio; without t, which lacks it"."""
        if not self.left_out:
            return self.about
        return f"{self.about}; without {', '.join(self.left_out)}, which lack{'s' * (len(self.left_out) == 1)} it"


def comparable(study: Study, found: Claims) -> Comparable:
    """The runs to compare sizes by: of those that have scores and that no rule excludes."""
    runs = found.kept[found.kept["run_id"].isin(study.scores["run_id"].drop_duplicates().astype(str))]
    shared, about = at_one_budget(runs)
    budgets = of_equal_compute(runs.assign(C=runs["train_macs"].astype(float)))
    levels = [(budget["size"].nunique(), float(budget["C"].mean()), budget) for budget in budgets]
    most, compute, level = max(levels, key=lambda one: one[:2], default=(0, 0.0, runs))
    if most > max(1, shared["size"].nunique()):
        shared, about = level, f"{human_macs(compute)} each"
    if shared["size"].nunique() < 2:
        about = "at each size's largest budget"
        if runs["size"].nunique() > 1:
            about += "; no two sizes share a budget of audio or compute, so differences may be those of the budgets"
        return _compared(study, runs, about, is_shared=False)
    sizes = set(shared["size"])
    ordered = runs.sort_values("N", kind="stable")["size"].drop_duplicates()
    left_out = tuple(str(size) for size in ordered if size not in sizes)
    about = "; ".join(filter(None, [f"at {about}", stopped_early(shared)]))
    return _compared(study, shared, about, left_out=left_out)


def _compared(study: Study, runs: pd.DataFrame, about: str, **how: Any) -> Comparable:
    cells = largest_budgets(runs)[SHOWN]
    scores = study.scores[study.scores["run_id"].isin(cells["run_id"])]  # few of what may be millions
    scores = scores.assign(run_id=scores["run_id"].astype(str)).merge(cells, on="run_id")
    return Comparable(cells, scores, about, **how)


def largest_budgets(runs: pd.DataFrame) -> pd.DataFrame:
    """Of each size the runs of the cell of the most audio seen, then of the most hours of data."""
    cells = runs.drop_duplicates("cell").assign(seen=lambda cells: cells["audio_hours_seen"].map(round_hours))
    ordered = cells.sort_values(["seen", "budget_hours", "steps"], kind="stable", na_position="first")
    largest = ordered.drop_duplicates("size", keep="last")["cell"]
    return runs[runs["cell"].isin(largest)]
