"""A law passes where it predicts what its fit did not see, by more than chance, and fails where it does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from analysis.claims import Claims, claims
from analysis.gather import gather
from analysis.quantities import CEILINGS
from analysis.settings import Settings
from scaling.records import StudyDirectory, read_records
from tests.analysis.generated import COST, FAMILY, grid_study, lines, run_record, sizes_study, true_loss, write_run


def test_the_largest_size_is_predicted_from_the_others_or_the_prediction_fails(tmp_path: Path):
    study = sizes_study(tmp_path / "study")
    claim = claims(gather(study.path), Settings(study.path, bootstraps=300)).loss("L(N)")
    assert claim is not None
    (test,) = claim.held_out
    assert test.left_out == "the largest size (s)"
    assert (test.verdict, list(test.cells["seeds"])) == ("pass", [3])
    assert test.error < 0.02
    truth = true_loss("s", 100.0)
    assert float(test.cells["low"].iloc[0]) < truth < float(test.cells["high"].iloc[0])
    # The same study, but the largest size did not gain what the others promise.
    rng = np.random.default_rng(2)
    for seed in range(3):
        write_run(study, run_record("s", 100.0, seed), true_loss("t", 100.0) * 1.1, rng)
    worse = claims(gather(study.path), Settings(study.path, bootstraps=300)).loss("L(N)")
    assert worse is not None
    assert worse.held_out[0].verdict == "fail"
    assert "1 of 1 cells outside the interval" in worse.held_out[0].reason


def test_the_largest_budget_of_compute_is_tested_though_a_cheaper_cell_beats_it(tmp_path: Path):
    """Left to the frontier, a budget that the law fails would not be on it."""
    study = grid_study(tmp_path / "study", pmacs=(0.03, 0.1, 0.3, 1.0, 3.0), seeds=2)
    honest = claims(gather(study.path), Settings(study.path, bootstraps=200)).loss("L(C)")
    rng = np.random.default_rng(0)
    for size in FAMILY:
        hours = 3.0 * 1e15 / COST / FAMILY[size][4]
        for seed in range(2):
            write_run(study, run_record(size, hours, seed), 1.5 * true_loss(size, hours), rng)
    worse = claims(gather(study.path), Settings(study.path, bootstraps=200)).loss("L(C)")
    assert honest is not None
    assert worse is not None
    verdicts = [(test.verdict, test.left_out) for claim in (honest, worse) for test in claim.held_out]
    named = "the largest budget of compute (3.00 PMACs)"
    assert verdicts == [("pass", named), ("fail", named)]
    assert worse.fitted.data.num_cells == 4, "the law itself is of the frontier"
    (test,) = worse.held_out
    observed = set(test.cells["run_ids"].iloc[0].split())
    assert len(observed) == 2, "both seeds of the cell tested, which the law is not of"
    assert observed.isdisjoint(worse.run_ids)
    assert set(test.fitted_run_ids) == set(worse.run_ids)


def test_a_prediction_without_an_interval_is_no_test(tmp_path: Path):
    study = sizes_study(tmp_path / "study", seeds=1)
    claim = claims(gather(study.path), Settings(study.path, bootstraps=100)).loss("L(N)")
    assert claim is not None
    (test,) = claim.held_out
    assert (test.verdict, test.reason) == (
        "not possible",
        "without it: 2 degrees of freedom, of at least 3 for an interval",
    )


@pytest.mark.parametrize("draw", [0, 1, 4])
def test_sizes_that_do_not_differ_pass_no_test(tmp_path: Path, draw: int):
    """The mean of all is nearer to the largest size than the best of all is: a flat curve is no law for that."""
    study, plans = StudyDirectory(tmp_path / "study"), []
    losses = 0.03 * np.exp(np.random.default_rng(draw).normal(0, 0.004, (len(FAMILY), 3)))
    for size, of_seeds in zip(FAMILY, losses, strict=True):
        for seed, loss in enumerate(of_seeds):
            plans.append(run_record(size, 100.0, seed))
            write_run(study, plans[-1], float(loss), np.random.default_rng(0), utterances=0)
    study.plan.write_text(lines(plans))
    claim = claims(gather(study.path), Settings(study.path, bootstraps=200)).loss("L(N)")
    assert claim is not None
    (test,) = claim.held_out
    assert test.verdict != "pass"
    assert test.reason


def test_the_naive_prediction_is_the_nearest_cell_of_the_next_level_down(found: Claims):
    runs = found.runs.set_index("run_id")
    claim = found.loss("L(N, D)")
    assert claim is not None
    for test, column in zip(claim.held_out, ("N", "D", "C"), strict=True):
        for _, cell in test.cells.iterrows():
            nearest = runs.loc[cell["naive_run_ids"].split()]
            assert nearest["validation_loss"].mean() == pytest.approx(cell["naive"], rel=1e-12)
            assert len(nearest) == 3
            if column == "N":  # the next smaller size, of its four budgets the one whose audio is nearest
                assert set(nearest["size"]) == {"c48"}
                away = np.abs(np.log(runs.loc[runs["size"] == "c48", "D"] / cell["D"]))
                assert abs(np.log(nearest["D"].iloc[0] / cell["D"])) == pytest.approx(away.min())
            if column == "C":
                assert set(nearest["axes.train.budget.train_pmacs"]) == {1.0}
                assert cell["label"].partition(",")[0] in set(nearest["size"]), "the same size on less audio"


def test_an_interval_of_a_metric_ends_where_the_metric_does(tmp_path: Path):
    study = sizes_study(tmp_path / "study")
    rng = np.random.default_rng(3)
    for number, plan in enumerate(study.read_plan()):
        scores = study.run(plan["run_id"]).scores
        stoi = 0.999 - 0.02 * 0.4 ** (number // 3) + rng.normal(0, 0.0005)
        scores.write_text(lines([row | {"stoi": min(1.0, stoi)} for row in read_records(scores)]))
    metrics = claims(gather(study.path), Settings(study.path, bootstraps=100)).metrics
    ends = [
        test.cells["high"].iloc[0]
        for claim in metrics
        if claim.quantity.key == "stoi" and claim.law.variables == ("N",)
        for test in claim.held_out
        if len(test.cells)
    ]
    assert max(ends) == CEILINGS["stoi"]
