"""A study folder becomes frames that say what its records say, and no more."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from analysis import provenance
from analysis.gather import RUNS_A_TASK, gather
from analysis.reading import noisiest_quarter
from analysis.scaling_table import scaling_table
from scaling.records import Record, RecordError, StudyDirectory, append_record, write_records
from tests.analysis.conftest import WriteStudy, plan_row, score_row
from tests.analysis.generated import lines, run_record, write_run


def test_every_planned_run_has_a_row_with_its_state_and_reason(write_study: WriteStudy) -> None:
    plan = [plan_row(seed=seed) for seed in range(6)]
    ids = [row["run_id"] for row in plan]
    study = write_study(plan, skip=ids[1:])
    study.run(ids[2]).log_event("submitted")
    study.run(ids[3]).log_event("started")
    study.run(ids[3]).log_metrics("train", 17, loss=0.5)
    study.run(ids[4]).log_event("failed", failure="diverged", reason="loss is not finite at step 61", log="/logs/4.out")
    study.run(ids[5]).log_event("started")
    study.run(ids[5]).log_event("preempted")
    study.run(ids[5]).jobs.mkdir()

    runs = gather(study.path).runs.set_index("run_id")
    assert list(runs.index) == ids
    assert list(runs["state"]) == ["finished", "planned", "submitted", "running", "failed", "preempted"]
    assert runs.loc[ids[1], "reason"] == "never submitted"
    assert runs.loc[ids[3], "reason"] == "started, at step 17 of 40 by its records"
    assert runs.loc[ids[4], "reason"] == "diverged: loss is not finite at step 61"
    assert runs.loc[ids[4], "log"] == "/logs/4.out"
    assert runs.loc[ids[5], "reason"] == "interrupted from outside"
    assert runs.loc[ids[5], "log"] == str(study.run(ids[5]).jobs)


def test_a_run_with_all_its_numbers_but_no_finished_event_is_not_finished(write_study: WriteStudy) -> None:
    row = plan_row()
    study = write_study([row])
    events = study.run(row["run_id"]).read_events()
    write_records(study.run(row["run_id"]).events, events[:-1])
    gathered = gather(study.path)
    assert gathered.finished.empty
    assert gathered.runs.loc[0, "validation_loss"] == pytest.approx(0.25)  # as recorded, for rules of exclusion


def test_means_are_over_scored_utterances_and_gains_over_pairs(write_study: WriteStudy) -> None:
    row = plan_row()
    scores = [
        score_row(0, pesq_wb=2.0),
        score_row(1, pesq_wb=None, refused={"pesq_wb": "no speech found"}),
        score_row(2, pesq_wb=3.0, unprocessed_pesq_wb=None, refused={"unprocessed_pesq_wb": "no speech found"}),
        score_row(3, pesq_wb=2.6, unprocessed_pesq_wb=1.1),
    ]
    study = gather(write_study([row], scores={row["run_id"]: scores}).path)
    run = study.runs.loc[0]
    assert run["pesq_wb"] == pytest.approx((2.0 + 3.0 + 2.6) / 3)
    assert run["unprocessed_pesq_wb"] == pytest.approx((1.5 + 1.1) / 2), "over those that were not refused"
    assert run["pesq_wb_gain"] == pytest.approx((0.5 + 1.5) / 2)
    assert (run["pesq_wb_scored"], run["pesq_wb_refused"]) == (3, 1)
    assert (run["si_sdr_scored"], run["si_sdr_refused"], run["utterances"]) == (4, 0, 4)
    refused = study.refusals
    assert list(refused["id"]) == ["p232_001", "p232_002"]
    assert list(refused["metric"]) == ["pesq_wb", "unprocessed_pesq_wb"]
    assert set(refused["reason"]) == {"no speech found"}


def test_a_metric_is_averaged_over_the_utterances_that_no_finished_run_refused(write_study: WriteStudy) -> None:
    plan = [plan_row(size) for size in ("xxt", "xt", "t")] + [plan_row("t", seed=1)]
    weak, strong, broken, killed = (row["run_id"] for row in plan)
    said = {"pesq_wb": "no speech found", "si_sdr": "silence"}
    none = {"pesq_wb": None, "si_sdr": None, "refused": said}

    def rows(refused: set[int]) -> list[Record]:
        return [score_row(n, **(none if n in refused else {"pesq_wb": 1.0 if n in (0, 2) else 4.0})) for n in range(8)]

    scores = {weak: rows({0, 2}), strong: rows(set()), broken: rows({1, 2, 3, 4, 5}), killed: rows({7})}
    study = write_study(plan, scores=scores)
    study.run(killed).events.unlink()
    gathered = gather(study.path)
    runs = gathered.runs.set_index("run_id")
    assert list(runs["pesq_wb"][[weak, strong, killed]]) == [4.0] * 3  # the strong one's own eight have 3.25
    assert list(runs["si_sdr"][[weak, strong]]) == pytest.approx([10 + 26 / 6] * 2)
    assert list(runs["noisiest_si_sdr_gain"][[weak, strong]]) == [6.0] * 2  # of the quarter, 0 and 1, the one left
    assert runs.loc[broken, ["pesq_wb", "pesq_wb_gain", "si_sdr", "noisiest_si_sdr_gain"]].isna().all()
    assert list(runs["pesq_wb_refused"]) == [2, 0, 5, 1]
    valued = gathered.scores[gathered.scores["pesq_wb"].notna()].groupby("run_id", observed=True)["id"].agg(set)
    assert valued[strong] == valued[weak] == valued[killed] | {"p232_007"}
    assert broken not in valued
    remarks = " ".join(provenance.remarks(gathered, scaling_table(gathered)))
    assert "pesq_wb refused 7 utterances in 2 runs, left out of its means in every run" in remarks
    assert f"{broken} scored fewer than half: no mean of it, and nothing left out for it." in remarks


def test_an_utterance_scored_twice_counts_once_with_its_last_row(write_study: WriteStudy) -> None:
    row = plan_row()
    study = write_study([row], scores={row["run_id"]: [score_row(0, si_sdr=1.0)]})
    append_record(study.run(row["run_id"]).scores, score_row(0, si_sdr=9.0))
    gathered = gather(study.path)
    assert gathered.runs.loc[0, "utterances"] == 1
    assert gathered.runs.loc[0, "si_sdr"] == 9.0


def test_the_noisiest_quarter_is_the_lowest_snr_and_exactly_a_quarter() -> None:
    snr_db = np.array([2.5, 17.5, 2.5, 7.5, 2.5, 12.5, 17.5, 12.5])
    unprocessed = np.array([3.0, 17.0, 1.0, 7.0, 2.0, 12.0, 17.0, 12.0])
    chosen = noisiest_quarter(snr_db, unprocessed, list("abcdefgh"))
    assert list(np.flatnonzero(chosen)) == [2, 4]  # of three at 2.5 dB the two whose input is worse


def test_where_no_snr_is_known_the_inputs_si_sdr_tells_the_noisiest_quarter(write_study: WriteStudy) -> None:
    row = plan_row()
    scores = [score_row(n, snr_db=None, noise=None, unprocessed_si_sdr=10.0 - n, si_sdr=12.0) for n in range(8)]
    study = gather(write_study([row], scores={row["run_id"]: scores}).path)
    hard = study.scores[study.scores["noisiest_quarter"]]
    assert list(hard["id"]) == ["p232_006", "p232_007"]
    assert study.runs.loc[0, "noisiest_si_sdr_gain"] == pytest.approx((8.0 + 9.0) / 2)


def test_curves_hold_each_step_once_with_terms_as_columns_and_null_as_nan(write_study: WriteStudy) -> None:
    row = plan_row()
    study = write_study([row])
    run = study.run(row["run_id"])
    run.log_metrics("train", 40, loss=math.nan, terms={"magnitude": 0.7})  # the step again, after a crash
    curves = gather(study.path).curves
    assert len(curves) == 40 + 4
    train = curves[curves["kind"] == "train"].set_index("step")
    assert math.isnan(train.loc[40, "loss"])
    assert train.loc[40, "terms.magnitude"] == 0.7
    assert train.loc[10, "loss"] == pytest.approx(0.25 + 0.1)
    assert set(curves["run_id"]) == {row["run_id"]}


def test_a_null_final_loss_is_nan_and_not_an_earlier_value(write_study: WriteStudy) -> None:
    row = plan_row()
    gathered = gather(write_study([row], losses={row["run_id"]: math.nan}).path)
    assert math.isnan(gathered.runs.loc[0, "validation_loss"])
    assert gathered.runs.loc[0, "validation_step"] == 40


@pytest.mark.parametrize(("patience", "expected"), [(None, (0.25, 40)), (2, (0.1, 20))])
def test_the_validation_loss_is_that_of_the_weights_that_were_kept(
    write_study: WriteStudy, patience: int | None, expected: tuple[float, int]
) -> None:
    plan = plan_row(steps=40)
    plan["science"] = {"seed": 0, "train": {"early_stopping": {"patience": patience}}}
    study = write_study([plan])
    metrics = study.run(plan["run_id"]).metrics
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    for row in rows:
        if row["kind"] == "validation" and row["step"] == 20:
            row["loss"] = 0.1
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run,) = gather(study.path).runs.to_dict("records")
    assert (run["validation_loss"], run["validation_step"]) == expected


@pytest.mark.parametrize("place", ["file", "event"])
def test_scores_by_several_versions_of_a_metric_are_remarked_on(write_study: WriteStudy, place: str) -> None:
    plan = [plan_row(seed=seed) for seed in range(4)]
    of_first, again, silent, unscored = (row["run_id"] for row in plan)
    study = write_study(plan, scores={unscored: []})
    older = {"pesq_wb": "1, pesq 0.0.4", "stoi": "1, pystoi 0.4.1", "estoi": "1, pystoi 0.4.1", "si_sdr": "1"}
    newer = older | {"pesq_wb": "1, pesq 0.0.5"}
    for run_id in (of_first, again, silent):
        study.run(run_id).log_event("evaluating", metrics=older)
    if place == "file":
        write_records(study.run(again).versions, [newer])  # scored again: no event tells of it
    else:
        study.run(again).log_event("evaluating", metrics=newer)
    gathered = gather(study.path)
    assert gathered.provenance.loc[again, "metrics.pesq_wb"] == "1, pesq 0.0.5"
    entries = {entry.key: str(entry) for entry in provenance.provenance(gathered)}
    assert entries["metrics.pesq_wb"] == "1, pesq 0.0.4 (2 runs), 1, pesq 0.0.5 (1 run)"
    assert entries["metrics.si_sdr"] == "1", "a run without scores is no mixture"
    told = "Provenance is mixed in metrics.pesq_wb (see Provenance)."
    assert told in provenance.remarks(gathered, scaling_table(gathered))

    run = study.run(silent)
    run.events.write_text("".join(line for line in run.events.open() if "evaluating" not in line))
    run.versions.write_text("{torn")
    gathered = gather(study.path)
    assert gathered.provenance.loc[silent, "metrics.si_sdr"] == "not recorded"
    assert {entry.key for entry in provenance.provenance(gathered) if entry.is_mixed} == {
        f"metrics.{name}" for name in older
    }


def test_a_metric_unknown_to_the_tables_is_carried_along(write_study: WriteStudy) -> None:
    row = plan_row()
    scores = [score_row(0, dnsmos=3.0, unprocessed_dnsmos=2.0)]
    study = gather(write_study([row], scores={row["run_id"]: scores}).path)
    assert [metric.key for metric in study.metrics] == ["pesq_wb", "stoi", "estoi", "si_sdr", "dnsmos"]
    assert study.runs.loc[0, "dnsmos_gain"] == 1.0


def test_runs_that_the_plan_does_not_name_are_listed_and_not_mixed_in(write_study: WriteStudy) -> None:
    row = plan_row()
    study = write_study([row])
    study.run("stray").log_event("finished")
    gathered = gather(study.path)
    assert gathered.unplanned == ("stray",)
    assert list(gathered.runs["run_id"]) == [row["run_id"]]


@pytest.mark.parametrize("place", [("size", "num_params"), ("audio_hours_seen",), ("global_batch",), ("crop_seconds",)])
def test_a_plan_without_a_needed_entry_is_refused_by_name(write_study: WriteStudy, place: tuple[str, ...]) -> None:
    row = plan_row()
    del (row[place[0]] if len(place) > 1 else row)[place[-1]]
    study = write_study([plan_row(seed=1), row])
    with pytest.raises(RecordError, match=rf"row 2 has no {re.escape('.'.join(place))}; plan the study again"):
        gather(study.path)
    write_records(study.plan, [])
    with pytest.raises(RecordError, match="holds no planned run"):
        gather(study.path)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("size", "macs_per_second"), "fast", r"row 1 has size\.macs_per_second 'fast', not a number"),
        (("train_macs",), "many", "row 1 has train_macs 'many', not a number"),
        (("steps",), float("nan"), "row 1 has no steps"),
        (("axes",), ["xt"], r"row 1 has axes \['xt'\], not an object"),
    ],
)
def test_a_planned_entry_that_is_no_number_is_refused_by_name(
    write_study: WriteStudy, place: tuple[str, ...], value: object, said: str
) -> None:
    row = plan_row()
    study = write_study([row])
    inner = row
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    write_records(study.plan, [row])
    with pytest.raises(RecordError, match=said):
        gather(study.path)


@pytest.mark.parametrize("step", ['"x"', "null", "[1]", "1.5"])
def test_a_step_that_is_no_whole_number_is_refused_with_its_file_and_row(write_study: WriteStudy, step: str) -> None:
    row = plan_row()
    study = write_study([row])
    metrics = study.run(row["run_id"]).metrics
    with metrics.open("a") as file:
        file.write(f'{{"kind": "train", "step": {step}, "loss": 0.1}}\n')
    with pytest.raises(
        RecordError, match=rf"{metrics}: row 45 has kind 'train' and step .*; correct or delete the row"
    ):
        gather(study.path)


def test_a_run_costs_what_all_its_jobs_took(write_study: WriteStudy):
    plan = [plan_row(seed=0), plan_row(seed=1)]
    study = write_study(plan, skip=[row["run_id"] for row in plan])
    run = study.run(plan[0]["run_id"])
    run.log_event("started")
    for seconds in (3600.0, 1800.0):
        run.log_event("ended", seconds=seconds, device_hours=seconds * 4 / 3600)
    runs = gather(study.path).runs.set_index("run_id")
    assert tuple(runs.loc[plan[0]["run_id"], ["attempts", "device_hours"]]) == (2, 6.0)
    assert runs.loc[plan[1]["run_id"], ["attempts", "device_hours"]].isna().all()
    run.log_event("ended", seconds=60.0, device_hours=math.nan)  # null on record
    runs = gather(study.path).runs.set_index("run_id")
    assert runs.loc[plan[0]["run_id"], "attempts"] == 3
    assert math.isnan(runs.loc[plan[0]["run_id"], "device_hours"]), "not on record of all"


SUBMITTED = {"event": "submitted", "pid": 9}
SESSION = {"world_size": 4, "nodes": 2, "hosts": ["n1", "n2"]}
# hours and event, or hours and step of a row of training; the first session is of process 40
KILLED = [
    (-0.1, SUBMITTED),
    (0.0, {"event": "started", "pid": 40, "step": 0} | SESSION),
    (0.2, 10),
    (0.3, {"event": "checkpointed", "pid": 40, "step": 10}),
    (0.5, 20),
]
RESUMED = [
    (20.5, {"event": "resumed", "pid": 41, "step": 10} | SESSION),
    (20.75, 20),  # made again: of this step the metrics keep the later row alone
    (21.0, {"event": "evaluating", "pid": 41, "step": 40}),
    (22.0, {"event": "finished", "pid": 41, "step": 40}),
]
LAUNCHED = {"event": "launched", "pid": 31, "job": "7_0"}
ENDED = {"event": "ended", "pid": 32, "job": "7_0", "exit_status": None}
WITHOUT_A_WORD = {
    "event": "failed",
    "pid": 10,
    "failure": "node failure",
    "reason": "its process ended without recording a reason",
}
INTERRUPTED = {"event": "preempted", "pid": 40, "reason": "SIGUSR1"}


@pytest.mark.parametrize(
    ("records", "hours"),
    [
        ([(-0.05, LAUNCHED), *KILLED, (20.4, ENDED), (20.4, LAUNCHED), *RESUMED], 4.0),
        ([(-0.05, LAUNCHED), *KILLED, (0.6, INTERRUPTED), (0.61, ENDED), (20.4, LAUNCHED), *RESUMED], 4.4),
        ([(-0.05, LAUNCHED), *KILLED, (20.4, ENDED), (20.4, WITHOUT_A_WORD)], 2.0),
        ([*KILLED, (20.4, SUBMITTED), *RESUMED], 4.0),
        ([*KILLED, *RESUMED], 4.0),
        ([*KILLED, (20.4, SUBMITTED)], 2.0),
        ([*KILLED, (20.4, SUBMITTED), (20.45, WITHOUT_A_WORD)], 2.0),
        (KILLED, 2.0),
        (KILLED[:2], 0.0),
    ],
    ids=[
        "its node died, and its job was queued again",
        "told to stop, and queued again",
        "its node died, and it is not tried again",
        "killed, and the sweep typed again a day later",
        "killed, and executed again",
        "waiting for its second session",
        "the next process killed before it began",
        "running",
        "just begun",
    ],
)
def test_hours_of_compute_are_of_sessions_and_not_of_the_queue(
    records: list[tuple[float, Record | int]], hours: float, write_study: WriteStudy
):
    row = plan_row()
    study = write_study([row], skip=[row["run_id"]])
    run = study.run(row["run_id"])
    for at, record in records:
        time = {"time": 1.7e9 + at * 3600}
        if isinstance(record, int):
            append_record(run.metrics, {"kind": "train", "step": record, "loss": 0.3} | time)
        else:
            append_record(run.events, record | time)
    gathered = gather(study.path).runs.loc[0]
    assert gathered["training_hours"] == pytest.approx(hours)
    assert (gathered["world_size"], gathered["nodes"]) == (4, 2)


def test_a_script_without_a_main_guard_may_read_more_runs_than_one_process_takes(tmp_path: Path):
    study, plans = StudyDirectory(tmp_path / "study"), []
    for seed in range(RUNS_A_TASK + 1):
        plans.append(run_record("xt", 1.0, seed))
        if seed:
            first, other = study.run(plans[0]["run_id"]).path, study.run(plans[seed]["run_id"]).path
            other.mkdir()
            for name in ("plan.json", "events.jsonl", "metrics.jsonl", "scores.jsonl"):
                os.link(first / name, other / name)
        else:
            write_run(study, plans[0], 0.04, np.random.default_rng(0), rows=5)
    study.plan.write_text(lines(plans))
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\nfrom analysis.gather import gather\n"
        f"print('begun'); print(len(gather(Path({str(study.path)!r})).finished))"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == (f"begun\n{RUNS_A_TASK + 1}\n", "")


@pytest.mark.parametrize(("speeds", "median"), [([21.0], 21.0), ([5.0, 21.0], 21.0), ([5.0, 20.0, 21.0, 25.0], 21.0)])
def test_the_first_row_of_speed_counts_only_where_there_is_no_other(
    write_study: WriteStudy, speeds: list[float], median: float
) -> None:
    row = plan_row()
    study = write_study([row])
    rows = [
        {"kind": "train", "step": step, "time": 1.7e9 + step, "loss": 0.1, "audio_seconds_per_second": speed}
        for step, speed in enumerate(speeds, start=1)
    ]
    write_records(study.run(row["run_id"]).metrics, rows)
    assert gather(study.path).runs["audio_seconds_per_second"].iloc[0] == median


def test_the_speed_is_of_the_number_of_processes_beside_it(write_study: WriteStudy) -> None:
    """A run that went on with other processes than it began with, and was killed once more."""
    row = plan_row()
    study = write_study([row], skip=[row["run_id"]])
    run, rows = study.run(row["run_id"]), []
    for number, (world_size, speed) in enumerate([(1, 10.0), (8, 80.0), (8, 81.0)]):
        began = 1.7e9 + 3600 * number
        event = {"event": "resumed" if number else "started", "time": began, "world_size": world_size}
        append_record(run.events, event)
        rows += [
            {"kind": "train", "step": 10 * number + step, "time": began + step, "loss": 0.1}
            | {"audio_seconds_per_second": speed}
            for step in range(1, 10 if number else 60)
        ]
    write_records(run.metrics, rows)
    gathered = gather(study.path).runs.loc[0]
    assert gathered["world_size"] == 8
    assert 80.0 <= gathered["audio_seconds_per_second"] <= 81.0


def test_hours_of_compute_are_summed_over_sessions_and_processes(tmp_path: Path):
    study, plan = StudyDirectory(tmp_path / "study"), run_record("t", 1.0)
    write_run(study, plan, 0.04, np.random.default_rng(0))
    study.run(plan["run_id"]).events.write_text(
        lines(
            [
                {"event": "started", "time": 0.0, "world_size": 2},
                {"event": "checkpointed", "time": 1800.0},
                {"event": "resumed", "time": 9000.0, "world_size": 2},  # killed in between
                {"event": "evaluating", "time": 9000.0 + 3600},
                {"event": "finished", "time": 9000.0 + 4000},
            ]
        )
    )
    study.plan.write_text(lines([plan]))
    assert gather(study.path).runs.loc[0, "training_hours"] == pytest.approx(2 * 1.5)
