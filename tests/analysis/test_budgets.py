"""Runs are of one budget where they have spent alike, and of none where nobody knows."""

from __future__ import annotations

import numpy as np

from analysis.budgets import of_equal_compute
from analysis.claims import Claims
from analysis.isoflop import isoflop
from scaling.records import StudyDirectory


def test_runs_whose_compute_is_not_known_are_at_no_level_of_it(grid: StudyDirectory, found: Claims):
    """Plans of an earlier version have no train_macs; NaN sorts behind the largest budget."""
    of_old = found.kept["size"].eq("c8") & (found.kept["axes.train.budget.train_pmacs"] == 0.1)
    runs = found.kept.drop(columns="axes.train.budget.train_pmacs")
    runs = runs.assign(C=runs["C"].mask(of_old))
    known, all_known = of_equal_compute(runs), of_equal_compute(runs[~of_old])
    assert [list(budget.index) for budget in known] == [list(budget.index) for budget in all_known]
    curves = isoflop(runs, bootstraps=100, seed=0).curves
    assert [curve.cells["size"].nunique() for curve in curves] == [5, 6, 6, 6]
    assert np.isfinite([curve.compute for curve in curves]).all()
