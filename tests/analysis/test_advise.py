"""The best size at a budget: by curves of equal compute, and by the planner from the joint law."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from analysis.advise import RefusalError, advise, main, summary
from analysis.claims import Claims, claims
from analysis.fit import CONVERGED
from analysis.gather import gather
from analysis.isoflop import AT_EDGE, isoflop
from analysis.law_tables import isoflop_table
from analysis.laws import joint_law
from analysis.quantities import MISSING
from analysis.settings import Settings
from scaling.records import StudyDirectory
from tests.analysis.generated import COST, FAMILY, LAW, grid_study, lines, run_record, sizes_study, true_loss, write_run


def optimum(compute: float) -> float:
    """The best size at a budget of compute by the law that made the studies (Hoffmann et al., eq. 4)."""
    a, b = LAW["alpha"], LAW["beta"]
    return float((a * LAW["A"] / (b * LAW["B"])) ** (1 / (a + b)) * (compute / COST) ** (b / (a + b)))


def test_each_curve_finds_the_best_size_and_the_path_its_exponent(found: Claims):
    iso = isoflop(found.kept, bootstraps=400, seed=0)
    assert [round(p.compute / 1e14, 6) for p in iso.curves] == [1, 3, 10, 30]
    for curve in iso.curves:
        assert curve.best_size == pytest.approx(optimum(curve.compute), rel=0.25)
        low, high = curve.interval(0.95)
        assert low < curve.best_size < high
    assert iso.path.status == CONVERGED
    assert iso.path.exponent == pytest.approx(0.45 / 0.85, abs=0.05)


def test_the_joint_law_says_the_best_size_of_each_budget_beside_its_curve(found: Claims):
    table = isoflop_table(isoflop(found.kept, bootstraps=100, seed=0), found)
    claim = found.loss("L(N, D)")
    assert claim is not None
    for row in table.data.to_dict("records"):
        truth = optimum(row["train_macs"])
        assert row["law_best_size"] == pytest.approx(truth, rel=0.1)
        assert row["law_low"] < truth < row["law_high"]
        assert row["law_run_ids"] == " ".join(claim.run_ids)
    assert MISSING not in set(table.text["By L(N, D)"])


def test_a_minimum_beyond_the_sizes_trained_is_said_and_not_extrapolated(found: Claims):
    small = found.kept[found.kept["size"].isin(["c8", "xt", "c24", "t"]) & (found.kept["C"] > 2e15)]
    (curve,) = isoflop(small, bootstraps=100, seed=0).curves
    assert curve.status == AT_EDGE
    assert np.isnan(curve.best_size)
    assert "larger sizes are needed" in curve.reason
    few = isoflop(small[small["size"] != "c8"], bootstraps=100, seed=0).curves[0]
    assert few.reason.startswith("3 sizes; a curve with a minimum needs 4")


def test_the_planner_recommends_what_the_law_and_the_speeds_make_best(found: Claims):
    advice = advise(found, 0.05)
    assert list(advice.options["size"]) == list(FAMILY)
    n = np.geomspace(FAMILY["c8"][4], FAMILY["s"][4], 4000)
    losses = LAW["E"] + LAW["A"] * n ** -LAW["alpha"] + LAW["B"] * (0.05 * 1e9 / (0.001 * n + 4e5)) ** -LAW["beta"]
    assert advice.best_size == pytest.approx(n[losses.argmin()], rel=0.3)
    assert advice.loss_interval[0] < losses.min() < advice.loss_interval[1]
    assert advice.best_size_interval[0] <= advice.best_size <= advice.best_size_interval[1]
    assert advise(found, 0.01).best_size < advice.best_size
    largest = advise(found, 1e5)
    assert largest.remarks[0].startswith("The best is the largest size trained")
    assert largest.best_size_interval[1] == np.inf
    assert "beyond the largest) on" in summary(largest, found)
    last = largest.options.iloc[-1]
    assert (last["low"], last["high"]) == pytest.approx(largest.loss_interval, rel=1e-9), "one interval a point"


def test_the_planner_says_when_its_compute_lies_beyond_the_study_though_its_audio_does_not(found: Claims):
    """The longest run of a study of equal compute is the smallest size's."""
    advice = advise(found, 8.0)
    assert advice.hours < found.kept["D"].max()
    compute = COST * advice.best_size * advice.hours
    assert compute > 10 * found.kept["C"].max()
    (said,) = (remark for remark in advice.remarks if "of training" in remark)
    assert said.endswith(
        f"{compute / found.kept['C'].max():.3g} times the study's most: too far for the interval to be trusted."
    )


def test_the_planner_speaks_of_the_distinct_audio_that_its_law_is_of(tmp_path: Path):
    study, rng, plans = StudyDirectory(tmp_path / "study"), np.random.default_rng(0), []
    for hours in (1.0, 9.0):
        for size in FAMILY:
            for seen in (30.0, 100.0, 300.0) if hours == 1 else (30.0, 100.0):
                plan = run_record(size, seen, hours=hours) | {"run_id": f"{size}-{seen}-{hours}"}
                plan["axes"] |= {"data.hours": hours}
                write_run(study, plan, true_loss(size, seen) * (1.3 if hours == 1 else 1.0), rng)
                plans.append(plan)
    study.plan.write_text(lines(plans))
    found = claims(gather(study.path), Settings(study.path, bootstraps=100))
    advice = advise(found, 0.2)
    assert "of 1 h of distinct audio" in summary(advice, found)
    assert advice.options["passes"].to_numpy() == pytest.approx(advice.options["hours"].to_numpy())


def test_the_planner_says_when_its_audio_lies_below_the_study_and_refuses_far_below(found: Claims):
    few = advise(found, 0.0005)
    assert few.hours < found.kept["D"].min()
    assert any("times the audio of the study's shortest run: below" in remark for remark in few.remarks)
    with pytest.raises(RefusalError, match=r"gpu_hours=1e-09 buys \S+ h of audio, less than a tenth of the study's"):
        advise(found, 1e-9)


def test_the_planner_recommends_no_size_whose_runs_all_diverged(tmp_path: Path):
    study = grid_study(tmp_path / "study")
    for row in study.read_plan():
        if row["size"]["name"] == "s":
            failed = {"event": "failed", "failure": "diverged", "reason": "the loss of step 9 is nan", "time": 1.7e9}
            study.run(row["run_id"]).events.write_text(lines([failed]))
    advice = advise(claims(gather(study.path), Settings(study.path, bootstraps=100)), 1e4)
    assert list(advice.options["size"]) == ["c8", "xt", "c24", "t", "c48"]
    assert advice.best_size <= FAMILY["c48"][4] * (1 + 1e-9)


def test_the_planner_refuses_where_the_law_is_not_identified(
    tmp_path: Path, grid: StudyDirectory, capsys: pytest.CaptureFixture[str]
):
    study = sizes_study(tmp_path / "study", seeds=2)
    with pytest.raises(RefusalError, match=r"unidentifiable \(D has 1 level"):
        advise(claims(gather(study.path), Settings(study.path, bootstraps=100)), 1.0)
    assert main([f"study={study.path}", "gpu_hours=1"]) == 1
    assert capsys.readouterr().err.startswith("no advice: L(N, D) of this study is unidentifiable (D has 1 level")
    for hours in ("-1", "nan", "1e300"):
        assert main([f"study={grid.path}", f"gpu_hours={hours}"]) == 2
        assert capsys.readouterr().err == f"error: gpu_hours={hours}: expected a number above 0 and at most 1e+09\n"
    assert main([f"study={grid.path}", "gpu_hours=3", "bootstraps=200"]) == 0
    out = capsys.readouterr().out
    assert "Best between the sizes trained" in out
    assert "without the largest size (s): pass" in out


def test_the_planner_says_of_a_law_at_a_bound_what_would_free_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    study, rng, plans = StudyDirectory(tmp_path / "study"), np.random.default_rng(0), []
    for budget in (0.1, 1.0, 10.0):
        for size in ("c8", "xt", "t", "s"):
            hours = budget * 1e15 / COST / FAMILY[size][4]
            plan = run_record(size, hours)  # every size and budget still gains, as if there were no floor
            write_run(study, plan, float(joint_law(FAMILY[size][4], hours, **LAW | {"E": 0.0})), rng)
            plans.append(plan)
    study.plan.write_text(lines(plans))
    assert main([f"study={study.path}", "gpu_hours=1", "bootstraps=100"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("no advice: L(N, D) of this study is at a bound (E = ")
    assert "add larger budgets or sizes to the sweep" in told
    assert "isoflop" not in told, "the study is of equal compute already"


def test_the_planner_says_when_the_sizes_trained_on_different_machines(tmp_path: Path):
    study = grid_study(tmp_path / "study", seeds=1, utterances=0)
    for row in study.read_plan():
        run = study.run(row["run_id"])
        gpu = "H200" if row["size"]["name"] in ("t", "c48", "s") else "T4"
        events = [
            event | ({"hardware": event["hardware"] | {"gpu": gpu}} if event["event"] == "started" else {})
            for event in run.read_events()
        ]
        run.events.write_text(lines(events))
    remarks = advise(claims(gather(study.path), Settings(study.path, bootstraps=100)), 0.05).remarks
    told = "The runs trained on 2 kinds of GPUs (c8, xt, c24 on T4; t, c48, s on H200): the hours are of no one kind."
    assert told in remarks
    assert not any("CPUs" in remark for remark in remarks)


def trained_with_threads(path: Path, threads: dict[str, int], gpu: str | None = None) -> Claims:
    """Of a study whose sizes have so many threads a process and are as many times as fast; a GPU's speed is its own."""
    study = grid_study(path, seeds=1, rows=6, utterances=0)
    for row in study.read_plan():
        run, number = study.run(row["run_id"]), threads.get(row["size"]["name"], 1)
        events, metrics = run.read_events(), run.read_metrics()
        events[1]["hardware"] |= {"threads": number, "gpu": gpu}
        for record in metrics:
            if record["kind"] == "train" and gpu is None:
                record["audio_seconds_per_second"] *= number
        run.events.write_text(lines(events))
        run.metrics.write_text(lines(metrics))
    return claims(gather(study.path), Settings(path, bootstraps=100))


def test_hours_of_a_cpu_are_of_its_cores_whatever_the_threads_of_a_process(tmp_path: Path):
    alone = advise(trained_with_threads(tmp_path / "one", {}), 0.05)
    for name, threads in (("all", dict.fromkeys(FAMILY, 8)), ("some", dict.fromkeys(("t", "c48", "s"), 8))):
        advice = advise(trained_with_threads(tmp_path / name, threads), 0.05)
        assert list(advice.options["hours"]) == pytest.approx(list(alone.options["hours"]))
        assert advice.best_size == alone.best_size
        told = (
            "The runs trained on 2 numbers of threads a process (c8, xt, c24 on 1; t, c48, s on 8): the hours are of no"
        )
        assert [told in remark for remark in advice.remarks if "threads" in remark] == [True] * (name == "some")
    on_gpus = advise(trained_with_threads(tmp_path / "gpu", dict.fromkeys(("t", "s"), 8), gpu="H200"), 0.05)
    assert list(on_gpus.options["hours"]) == pytest.approx(list(alone.options["hours"])), "of a process, which has one"
    assert not any("threads" in remark for remark in on_gpus.remarks)
