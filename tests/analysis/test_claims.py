"""From generated studies of a known law to what may be claimed of them, and what may not."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from analysis.claims import Claims, claims
from analysis.fit import CONVERGED, UNIDENTIFIABLE
from analysis.gather import gather
from analysis.settings import Settings
from scaling.records import StudyDirectory
from tests.analysis.generated import LAW, lines, run_record, true_loss, write_run

ROOT = Path(__file__).parents[2]


def test_the_joint_law_of_a_study_is_the_one_that_made_it(found: Claims):
    claim = found.loss("L(N, D)")
    assert claim is not None
    assert (claim.fitted.status, claim.fitted.bootstraps.resampled) == (CONVERGED, "seeds")
    assert found.data == "audio_hours_seen"
    for name, truth in LAW.items():
        low, high = claim.fitted.interval(name, 0.999)
        assert low <= truth <= high, name
    assert [test.verdict for test in claim.held_out] == ["pass"] * 3
    assert max(test.error for test in claim.held_out) < 0.02


def test_every_measure_of_size_is_fitted_and_compared(found: Claims):
    measures = {claim.measure: claim.fitted.aicc for claim in found.losses if claim.law.name == "L(N, D)"}
    assert set(measures) == {"macs_per_second", "num_params", "num_params_non_decoder"}
    assert min(measures, key=lambda m: measures[m]) == "macs_per_second", "the measure that made the losses"


def hours_study(path: Path, budgets: tuple[float, ...], hours: tuple[float, ...]) -> StudyDirectory:
    """Three sizes x audio seen x hours of distinct audio, of which 1 hour costs three tenths of the loss."""
    study, rng, plans = StudyDirectory(path), np.random.default_rng(1), []
    for size in ("c8", "xt", "c24"):
        for seen in budgets:
            for distinct in hours:
                for seed in range(2):
                    plan = run_record(size, seen, seed, hours=distinct, axes={"data.hours": distinct})
                    plan["run_id"] += f"-{distinct:g}h"
                    loss = true_loss(size, seen) * (1.3 if distinct < 5 else 1.0)
                    write_run(study, plan, loss * float(np.exp(rng.normal(0, 0.002))), rng)
                    plans.append(plan)
    study.plan.write_text(lines(plans))
    return study


def test_laws_of_the_audio_seen_are_of_one_amount_of_distinct_audio(tmp_path: Path):
    study = hours_study(tmp_path / "study", (10.0, 30.0, 100.0, 300.0), (1.0, 9.0))
    found = claims(gather(study.path), Settings(study.path, bootstraps=100))
    joint, against_data = found.loss("L(N, D)"), found.loss("L(D)")
    assert joint is not None
    assert against_data is not None
    assert joint.about == "all cells of 9 h of distinct audio; D is hours of audio seen in training"
    assert against_data.about == "hours of audio seen in training at size c24 of 9 h of distinct audio"
    assert joint.fitted.data.num_cells == 12
    low, high = joint.fitted.interval("beta", 0.999)
    assert low <= LAW["beta"] <= high


def test_audio_seen_that_grows_with_the_distinct_audio_is_one_variable(tmp_path: Path):
    study, plans = StudyDirectory(tmp_path / "study"), []
    for hours in (1.0, 2.0, 4.0, 8.0, 16.0):
        plan = run_record("xt", 10 * hours, hours=hours)
        write_run(study, plan, true_loss("xt", 10 * hours), np.random.default_rng(0))
        plans.append(plan)
    study.plan.write_text(lines(plans))
    claim = claims(gather(study.path), Settings(study.path, bootstraps=100)).loss("L(D)")
    assert claim is not None
    assert (claim.about, claim.fitted.data.num_cells) == ("hours of audio seen in training at size xt", 5)


def test_three_sizes_give_a_reason_and_no_law(tmp_path: Path):
    study, rng = StudyDirectory(tmp_path / "study"), np.random.default_rng(0)
    plans = [run_record(size, 100.0) for size in ("c8", "xt", "t")]
    for plan in plans:
        write_run(study, plan, true_loss(plan["size"]["name"], 100.0), rng)
    study.plan.write_text(lines(plans))
    claim = claims(gather(study.path), Settings(study.path, bootstraps=100)).loss("L(N)")
    assert claim is not None
    assert claim.fitted.status == UNIDENTIFIABLE
    assert claim.fitted.reason == "3 distinct points of N for 3 parameters; at least 4 are needed"
    assert claim.held_out[0].verdict == "not possible"
