"""Runs that a rule leaves out of a fit are on record, and in the fit that is made the other way."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from analysis.claims import claims
from analysis.gather import gather
from analysis.law_tables import exclusions_effect_table
from analysis.settings import Settings
from scaling.records import StudyDirectory
from tests.analysis.generated import FAMILY, lines, run_record, sizes_study, true_loss, write_run


def test_what_a_rule_leaves_out_is_on_record_and_fitted_the_other_way(tmp_path: Path):
    study = sizes_study(tmp_path / "study")
    plans = study.read_plan()
    diverged, running, *short = plans[0], *plans[3:6]  # the latter three are of one size
    study.run(diverged["run_id"]).events.write_text(
        lines([{"event": "failed", "failure": "diverged", "reason": "the loss of step 9 is nan", "time": 1.7e9}])
    )
    study.run(running["run_id"]).events.write_text(lines([{"event": "started", "time": 1.7e9}]))
    for plan in (running, *short):
        plan["science"]["train"]["optimiser"]["warmup_steps"] = 2000
    study.plan.write_text(lines(plans))
    found = claims(gather(study.path), Settings(study.path, bootstraps=100))
    rules = dict(zip(found.exclusions["run_id"], found.exclusions["rule"], strict=True))
    expected = {diverged["run_id"]: "diverged", running["run_id"]: "unfinished"}
    expected |= {plan["run_id"]: "too few steps" for plan in short}
    assert rules == expected
    claim = found.loss("L(N)")
    assert claim is not None
    assert not set(expected) & set(claim.run_ids)
    assert claim.with_excluded is not None
    assert claim.with_excluded.data.num_cells == claim.fitted.data.num_cells + 1
    assert len(claim.with_excluded.data.y) == len(claim.fitted.data.y) + 4
    assert claim.with_excluded.parameters != claim.fitted.parameters


def test_a_run_that_is_half_trained_is_in_no_fit_with_the_excluded_runs(tmp_path: Path):
    """Its last validation is at half of its steps; beside it one that only lacks the event that it finished."""
    study, plans = StudyDirectory(tmp_path / "study"), []
    for size in FAMILY:
        plans.append(run_record(size, 100.0))
        write_run(study, plans[-1], true_loss(size, 100.0), np.random.default_rng(0), utterances=0)
    study.plan.write_text(lines(plans))
    half, whole = (study.run(plan["run_id"]) for plan in plans[-2:])
    for run in (half, whole):
        run.events.write_text(lines([{"event": "started", "time": 1.7e9}]))
    half.metrics.write_text(lines([row for row in half.read_metrics() if row["step"] <= plans[-2]["steps"] / 2]))
    found = claims(gather(study.path), Settings(study.path, bootstraps=100))
    claim = found.loss("L(N)")
    assert claim is not None
    assert claim.excluded_run_ids == (whole.run_id,)
    assert claim.with_excluded is not None
    assert len(claim.with_excluded.data.y) == len(claim.run_ids) + 1
    assert dict(zip(found.exclusions["run_id"], found.exclusions["has_value"], strict=True)) == {
        half.run_id: False,
        whole.run_id: True,
    }
    caption = exclusions_effect_table(found).caption
    assert "with the excluded runs, those whose last validation is at the end of their training." in caption
