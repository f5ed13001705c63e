"""A difference between two sizes is called one only where the seeds of both bear it out, at one budget."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from analysis import significance
from analysis.quantities import METRICS
from analysis.significance import paired


def no_difference(rng: np.random.Generator, seeds: tuple[int, int], scatter: tuple[float, float]) -> pd.DataFrame:
    """Scores of two sizes of the same mean, whose seeds scatter differently."""
    hardness = rng.normal(0, 0.5, 20)
    rows = [
        {"size": size, "N": n, "run_id": f"{size}{seed}", "id": number, "pesq_wb": score}
        for size, n, count, spread in zip(("small", "large"), (1.0, 2.0), seeds, scatter, strict=True)
        for seed in range(count)
        for number, score in enumerate(3 + hardness + rng.normal(0, spread) + rng.normal(0, 0.02, 20))
    ]
    return pd.DataFrame(rows)


def test_two_seeds_of_an_unsteady_size_do_not_pass_for_the_scatter_of_five_of_a_steady_one(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(significance, "FEWEST_SAMPLES", 1000)  # there is no pair beside this
    rng, rejected, trials = np.random.default_rng(2), 0, 300
    for trial in range(trials):
        scores = no_difference(rng, (5, 2), (0.03, 0.09))
        table = paired(scores, METRICS[:1], bootstraps=1000, level=0.95, seed=trial)
        rejected += int(table.loc[0, "p"] < 0.05)
    assert rejected / trials <= 0.15, "Welch's rejects 10 %, pooled variances 22 %"


@pytest.mark.parametrize(("seeds", "has_p"), [((3, 1), False), ((1, 5), False), ((2, 2), True)])
def test_there_is_a_p_only_where_both_sizes_have_two_seeds(seeds: tuple[int, int], has_p: bool):
    scores = no_difference(np.random.default_rng(0), seeds, (0.1, 0.1))
    (row,) = paired(scores, METRICS[:1], bootstraps=100, level=0.95, seed=0).to_dict("records")
    assert np.isfinite([row["p"], row["p_holm"]]).tolist() == [has_p, has_p]
    assert (row["of_runs_alone"], bool(row["is_bound"])) == (not has_p, False)


def test_seeds_without_any_scatter_leave_that_of_utterances():
    scores = no_difference(np.random.default_rng(0), (2, 2), (0.0, 0.0))
    scores["pesq_wb"] = scores.groupby(["size", "id"])["pesq_wb"].transform("mean")
    (row,) = paired(scores, METRICS[:1], bootstraps=100, level=0.95, seed=0).to_dict("records")
    assert 0 < row["high"] - row["low"] < 0.03
    assert np.isfinite(row["p"])
