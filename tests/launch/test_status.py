"""Which runs of a study are shown and can be stopped, whatever plan they are of; SLURM's commands are stand-ins."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from launch import cancel, status
from launch.config import ClusterConfig
from launch.queue import QueuedJob
from launch.slurm import settings_of
from launch.state import look
from launch.submission import Submission, require_own
from scaling.errors import UserError
from scaling.records import RunDirectory, StudyDirectory, write_records
from tests.launch.stand_ins import stand_in


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


def test_brackets_are_shown_as_they_are(study: StudyDirectory, capsys: pytest.CaptureFixture[str]):
    """As in what gloo says of a lost connection."""
    reason = "[/src/gloo/pair.cc:553] shapes [batch, time] differ :smile:"
    study.run("xxt-seed3").log_event("failed", failure="node failure", reason=reason, job="6_0")
    stand_in(study.path.parent, {"squeue": ""})
    assert status.main([f"study={study.path}"]) == 1
    assert reason in " ".join(capsys.readouterr().out.split())


def test_a_queue_that_cannot_be_asked_costs_no_table(study: StudyDirectory, capsys: pytest.CaptureFixture[str]):
    stand_in(study.path.parent, {"squeue": "echo 'squeue: error: Unable to contact slurm controller' >&2; exit 1"})
    assert status.main([f"study={study.path}"]) == 0
    said = capsys.readouterr()
    assert "4 runs: 4 queued" in " ".join(said.out.split())
    assert said.err.startswith("squeue --me: Unable to contact slurm controller: is the cluster's controller up?")


def test_what_another_user_submitted_is_neither_lost_nor_submitted_or_cancelled(
    study: StudyDirectory, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    me = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: me + 1)
    stand_in(study.path.parent, {"squeue": ""})
    assert status.main([f"study={study.path}"]) == 0
    said = capsys.readouterr()
    assert "4 runs: 4 queued" in " ".join(said.out.split())
    name = pwd.getpwuid(me).pw_name
    assert said.err == f"Of jobs submitted by {name} these are the states on record.\n"
    with pytest.raises(UserError, match=f"run .*xxt-seed. was submitted by {name}, whose jobs are not in your queue"):
        cancel.main([f"study={study.path}"])
    for seed in range(4):
        study.run(f"xxt-seed{seed}").log_event("preempted", failure="preempted", reason="its job was cancelled")
    require_own(study)


def test_a_runs_name_is_not_the_beginning_of_anothers(tmp_path: Path):
    study = StudyDirectory(tmp_path)
    names = ("t-seed1-3f2a9c1b", "t-seed10-3f2a9c1c", "tiny-seed1-3f2a9c1d")
    write_records(study.plan, [{"run_id": name} for name in names])
    for asked, found in (("t", names[:2]), ("t-seed1", names[:1]), ("t-s", names[:2]), ("ti", names[2:])):
        assert [run.run_id for run in cancel.named_runs(study, [asked])] == list(found)
