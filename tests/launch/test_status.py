"""Which runs of a study are shown and can be stopped, whatever plan they are of; SLURM's commands are stand-ins."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import cancel, status
from launch.config import ClusterConfig
from launch.queue import QueuedJob
from launch.slurm import settings_of
from launch.state import look
from launch.submission import Submission
from scaling.records import RunDirectory, StudyDirectory, write_records


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudyDirectory:
    """Seeds 0 to 2 were swept first, of which 0 has ended by now, then seed 3: its plan holds that one alone."""
    study = StudyDirectory(tmp_path / "study")
    rows = [{"run_id": f"xxt-seed{seed}", "steps": 10, "audio_hours_seen": 1.0} for seed in range(4)]
    for job, part in (("5", rows[:3]), ("6", rows[3:])):
        Submission.create(study, part, settings_of(ClusterConfig("slurm"))).record_job(job)
    write_records(study.plan, rows[3:])
    commands = {
        "squeue": (
            f"flock --nonblock {study.lock} true || echo 'squeue, locked' >> {tmp_path / 'calls'}\n"
            "echo '5_0|FAILED|None|n1|'; echo '5_1|RUNNING|None|n1|'\n"
            "echo '5_2|PENDING|Priority||'; echo '6_0|PENDING|Priority||'"
        ),
        "scancel": f"echo scancel $* >> {tmp_path / 'calls'}",
    }
    for name, script in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return study


def test_runs_of_an_earlier_plan_are_shown_for_as_long_as_they_wait_or_run(
    study: StudyDirectory, capsys: pytest.CaptureFixture[str]
):
    assert status.main([f"study={study.path}"]) == 0
    said = capsys.readouterr().out
    assert "3 runs: 2 queued, 1 starting" in " ".join(said.split())  # a long folder breaks the line
    assert [line.split()[0] for line in said.splitlines() if "seed" in line] == ["xxt-seed3", "xxt-seed1", "xxt-seed2"]


def test_runs_of_an_earlier_plan_are_stopped_with_the_study_and_by_name(
    study: StudyDirectory, capsys: pytest.CaptureFixture[str]
):
    calls = study.path.parent / "calls"
    cancel.main(["xxt-seed2", f"study={study.path}"])
    assert calls.read_text().splitlines() == ["squeue, locked", "scancel 5_[2]"]
    cancel.main([f"study={study.path}"])
    assert calls.read_text().splitlines()[2:] == ["squeue, locked", "scancel 6_[0]", "scancel 5_[1,2]"]
    assert "told 3 runs to stop" in capsys.readouterr().out


def test_a_job_that_was_cancelled_for_another_is_over_and_its_run_preempted(tmp_path: Path):
    """Where it could not even queue itself again."""
    run, log = RunDirectory(tmp_path / "run"), tmp_path / "log"
    log.write_text("slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-23T07:16:04 DUE TO PREEMPTION ***\n")
    run.log_event("submitted", job="7_0", executor="slurm", log=str(log))
    run.log_event("launched", job="7_0", attempt=0)
    job = QueuedJob("7_0", "PREEMPTED", "None", "n1", "")
    assert not job.is_live
    assert [look(run, 10, 1.0, queue).state for queue in ({"7_0": job}, {})] == ["preempted", "preempted"]


def test_a_reader_of_the_table_that_has_gone_is_no_failure(study: StudyDirectory):
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run(
        [sys.executable, "-m", "launch.status", f"study={study.path}"], stdout=writes, stderr=subprocess.PIPE, text=True
    )
    os.close(writes)
    assert (done.returncode, done.stderr) == (0, "")
