"""An attempt's end is put on record by the next one, where its own batch shell died with it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from launch.attempt import Attempt
from launch.submission import Settings, Submission
from scaling.records import Record, RunDirectory, StudyDirectory, append_record, write_whole
from tests.launch.stand_ins import stand_in

HOUR = 3600.0
LAUNCHED = {"event": "launched", "pid": 31, "job": "7_0", "attempt": 0, "step": 0, "nodes": "n[1-2]", "processes": 4}
STARTED = {"event": "started", "pid": 40, "step": 0, "world_size": 4, "nodes": 2}


@pytest.mark.parametrize(
    ("events", "last_row", "hours"),
    [
        ((LAUNCHED | {"time": 0.0},), None, 0.0),
        ((LAUNCHED | {"time": 0.0}, STARTED | {"time": 0.1 * HOUR}), None, 0.1),
        ((LAUNCHED | {"time": 0.0}, STARTED | {"time": 0.1 * HOUR}), 1.5 * HOUR, 1.5),
        ((LAUNCHED | {"time": 0.0}, {"event": "evaluating", "pid": 40, "time": 2.0 * HOUR}), 1.5 * HOUR, 2.0),
    ],
    ids=["before its training", "while it loads", "in training", "in evaluation"],
)
def test_an_attempt_that_died_without_a_word_ended_when_it_was_last_heard_of(
    events: tuple[Record, ...], last_row: float | None, hours: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its node is gone, and its job waits in the queue for a day."""
    now = time.time()
    begun = now - 24 * HOUR
    row = {"run_id": "xt-seed0-3f2a9c1b"}
    study = StudyDirectory(tmp_path / "study")
    settings = Settings(4, 4, {}, 1, str(tmp_path / "throughput.jsonl"), 3)
    submission = Submission.create(study, [row], settings)
    run: RunDirectory = study.run(row["run_id"])
    write_whole(run.plan, "{}\n")
    append_record(run.events, {"event": "submitted", "time": begun - HOUR, "pid": 9, "job": "7_0", "executor": "slurm"})
    for event in events:
        append_record(run.events, event | {"time": begun + event["time"]})
    if last_row is not None:
        for kind, at in (("train", last_row), ("validation", last_row - 60)):
            append_record(run.metrics, {"kind": kind, "step": 10, "time": begun + at, "loss": 0.1})
    for name, value in (("ARRAY_TASK_ID", "0"), ("ARRAY_JOB_ID", "7"), ("RESTART_COUNT", "1")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    stand_in(tmp_path, {"scontrol": "echo n1 n2"})
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    assert Attempt(submission, "n1 down*\n").begin()["MASTER_ADDR"] == "127.0.0.1"
    *_, ended, launched = run.read_events()
    assert (ended["event"], ended["failure"], ended["exit_status"]) == ("ended", "node failure", None)
    assert ended["seconds"] == pytest.approx(hours * HOUR)
    assert ended["device_hours"] == pytest.approx(4 * hours)
    assert (launched["event"], launched["attempt"]) == ("launched", 1)
    assert launched["time"] >= now


@pytest.mark.parametrize(
    ("said", "log", "has_scontrol", "failure", "reason"),
    [
        ("gpu077 down*\n", "", True, "preempted", "SLURM queued the job again; its processes recorded no reason"),
        ("gpu077 down*\nn2 down*\n", "", True, "node failure", "of its nodes n[1-2] SLURM says: n2 down*"),
        ("gpu077 down*\n", "", False, "preempted", "SLURM queued the job again; its processes recorded no reason"),
        ("", "slurmstepd: error: Detected 1 oom_kill event in StepId=5.0\n", True, "out of memory", "oom_kill"),
    ],
    ids=["another job's node", "its own node", "in a container", "its own log"],
)
def test_an_attempt_that_a_new_submission_buries_keeps_its_job_its_nodes_and_its_log(
    said: str,
    log: str,
    has_scontrol: bool,
    failure: str,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    row = {"run_id": "xt-seed0-3f2a9c1b"}
    study = StudyDirectory(tmp_path / "study")
    settings = Settings(4, 4, {}, 1, str(tmp_path / "throughput.jsonl"), 3)
    old, new = (Submission.create(study, [row], settings) for _ in range(2))
    run = study.run(row["run_id"])
    write_whole(run.plan, "{}\n")
    write_whole(old.batch_log(0), log)
    begun = time.time() - 24 * HOUR
    append_record(run.events, {"event": "submitted", "time": begun, "pid": 9, "job": "5_0", "executor": "slurm"})
    append_record(
        run.events, LAUNCHED | {"time": begun, "job": "5_0", "batch_log_bytes": 0, "log": str(old.batch_log(0))}
    )
    append_record(run.events, {"event": "submitted", "time": begun + HOUR, "pid": 9, "job": "7_0", "executor": "slurm"})
    stand_in(tmp_path, {"scontrol": '[ "$*" = "show hostnames n[1-2]" ] && echo n1 n2' if has_scontrol else "exit 127"})
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name, value in (("ARRAY_TASK_ID", "0"), ("ARRAY_JOB_ID", "7"), ("RESTART_COUNT", "0")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")

    Attempt(new, said).begin()
    ended = next(event for event in run.read_events() if event["event"] == "ended")
    assert (ended["job"], ended["failure"]) == ("5_0", failure)
    assert reason in ended["reason"]
