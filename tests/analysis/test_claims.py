"""From generated studies of a known law to what may be claimed of them, and what may not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from analysis.budgets import of_equal_compute
from analysis.claims import CEILINGS, Claims, claims
from analysis.comparable import comparable
from analysis.fit import CONVERGED, UNIDENTIFIABLE
from analysis.gather import gather
from analysis.isoflop import isoflop
from analysis.law_tables import exclusions_effect_table, laws_table
from analysis.process_scaling import process_scaling
from analysis.quantities import CHOSEN_METRICS, METRICS
from analysis.result_tables import report_tables
from analysis.settings import Settings
from scaling.dnsmos import CALIBRATION
from scaling.records import StudyDirectory, read_records
from tests.analysis.generated import COST, FAMILY, LAW, grid_study, lines, run_record, sizes_study, true_loss, write_run

ROOT = Path(__file__).parents[2]


def test_the_joint_law_of_a_study_is_the_one_that_made_it(found: Claims):
    claim = found.loss("L(N, D)")
    assert claim is not None
    assert (claim.fitted.status, claim.fitted.resampled) == (CONVERGED, "seeds")
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


def test_a_law_whose_bootstraps_find_no_optimum_has_no_interval_and_the_reason_is_in_the_table(tmp_path: Path):
    study = sizes_study(tmp_path / "study")
    metrics = claims(gather(study.path), Settings(study.path, bootstraps=200)).metrics
    table = laws_table(metrics, "laws", "Laws", 0.95, "audio_hours_seen")
    unfinished = [claim.fitted for claim in metrics if claim.fitted.unfinished > 0.05]
    assert unfinished
    for law in unfinished:
        assert not law.has_interval
        assert np.isnan(law.interval(law.law.parameters[0])).all()
    said = table.text["Status"].str.contains(r"no intervals: \d+% of the bootstraps found no optimum in 300 steps")
    assert said.sum() == len(unfinished)


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


def test_a_fixed_ceiling_is_the_highest_value_that_its_metric_can_take():
    names = ("dnsmos_sig", "dnsmos_bak", "dnsmos_ovrl")
    for name, (square, slope, constant) in zip(names, CALIBRATION, strict=True):
        assert CEILINGS[name] == pytest.approx(constant - slope**2 / (4 * square), abs=1e-3)
    assert {CEILINGS[name] for name in ("csig", "cbak", "covl", "dnsmos_p808")} == {5.0}
    unbounded = {"si_sdr", "segmental_snr"}
    assert set(CEILINGS) == {metric.key for metric in METRICS + CHOSEN_METRICS} - unbounded


def test_every_table_cell_with_a_number_names_the_runs_that_it_comes_from(grid: StudyDirectory, found: Claims):
    study = gather(grid.path)
    iso = isoflop(found.kept, bootstraps=100, seed=0)
    tables = {
        table.name: table
        for table in report_tables(study, found, iso, process_scaling(study), comparable(study, found))
    }
    wanted = {"data_table", "joint_table", "efficiency_table", "laws", "metric_laws", "held_out", "isoflop"}
    assert wanted | {"significance", "breakdown", "fits_both_ways"} <= set(tables)
    run_ids = set(study.runs["run_id"])
    for table in tables.values():
        assert table.text.shape == table.sources.shape
        for text, ids in zip(table.text.to_numpy().ravel(), table.sources.to_numpy().ravel(), strict=True):
            assert set(ids.split()) <= run_ids
            assert ids or not any(letter.isdigit() for letter in text) or table.name == "breakdown", (table.name, text)
        latex = table.to_latex()
        assert latex.count(r" \\") == len(table.text) + 1
        assert r"\toprule" in latex
        assert len(table.to_csv().splitlines()) > 1
    joint = tables["joint_table"]
    cell = study.runs[(study.runs["size"] == "t") & (study.runs["axes.train.budget.train_pmacs"] == 1.0)]
    row = joint.text.index[joint.text["Size"] == "t"][0]
    assert joint.text.loc[row, "1.00 PMACs"].startswith(f"{cell['validation_loss'].mean():.4f}")
    assert set(joint.sources.loc[row, "1.00 PMACs"].split()) == set(cell["run_id"])


def test_the_analysis_runs_where_torch_cannot_be_imported(tmp_path: Path):
    study = sizes_study(tmp_path / "study", seeds=2)
    blocked = tmp_path / "blocked"
    for name in ("torch", "hydra", "accelerate", "submitit", "omegaconf"):
        (blocked / name).mkdir(parents=True)
        (blocked / name / "__init__.py").write_text("raise ImportError('not installed here')")
    environment = os.environ | {"PYTHONPATH": f"{blocked}{os.pathsep}{ROOT}"}
    for command in (["analysis.report"], ["analysis.advise", "gpu_hours=2"]):
        words = [sys.executable, "-m", command[0], f"study={study.path}", "bootstraps=100", *command[1:]]
        done = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode in (0, 1), done.stderr
        assert "Error" not in done.stderr, done.stderr
    assert (study.report / "report.html").exists()


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
