"""What ended an attempt, told from its status and its logs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launch import failures
from launch.config import ClusterConfig
from launch.failures import classify_attempt, report_line
from launch.slurm import settings_of
from launch.submission import Submission
from scaling.errors import UserError
from scaling.records import StudyDirectory

REPORT = report_line(UserError("data.hours = 9: too many"))


@pytest.mark.parametrize(
    ("log", "kind", "reason"),
    [
        (REPORT, "bad config", "rank 0: data.hours = 9: too many"),
        (
            "[rank0]: warns " + REPORT.rstrip("\n") + "[rank0]: of its store\n",
            "bad config",
            "rank 0: data.hours = 9: too many",
        ),
        (REPORT[: len(REPORT) // 2], "code error", "rank 0: exit status 1"),
    ],
    ids=["whole", "between others", "cut off"],
)
def test_what_a_rank_reports_is_read_whatever_else_its_log_has_on_the_line(log: str, kind: str, reason: str):
    failure = classify_attempt(1, [], "", lambda rank: log)
    assert (failure.kind, failure.reason) == (kind, reason)


def test_what_rank_0_alone_met_is_told_as_its_own_though_another_rank_ended_first():
    logs = {0: "rank 0 waits\n" + REPORT, 1: "the store is gone\n"}
    failure = classify_attempt(1, [], "srun: error: n2: task 1: Exited with exit code 1\n", logs.__getitem__)
    assert (failure.kind, failure.reason) == ("bad config", "rank 0: data.hours = 9: too many")
    assert failure.last_lines == logs[0].strip()


def test_a_rank_writes_its_report_and_the_end_of_the_line_at_once(tmp_path: Path):
    submission = Submission.create(StudyDirectory(tmp_path), [{}], settings_of(ClusterConfig("slurm")))
    names = ("SLURM_NTASKS", "SLURM_NNODES", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_ARRAY_TASK_ID")
    environment = os.environ | dict(zip(names, "11000", strict=True))
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)  # each write is a message of its own
    rank = subprocess.Popen(
        [sys.executable, "-u", "-m", "launch.rank", str(submission.path)], env=environment, stderr=its.fileno()
    )
    ours.settimeout(120)
    try:
        written = next(text for text in iter(lambda: ours.recv(65536).decode(), "") if failures.REPORT in text)
    finally:
        rank.kill()
        rank.wait()
    assert written.endswith("}\n")


@pytest.mark.parametrize(
    "said",
    [
        "srun: error: Unable to create step for job 5: Unable to contact slurm controller (connect failure)",
        "srun: error: Unable to confirm allocation for job 5: Zero Bytes were transmitted or received",
        "srun: error: Task launch for StepId=5.0 failed on node n2: Socket timed out on send/recv operation",
    ],
    ids=["no step", "no allocation", "no launch"],
)
def test_a_cluster_that_does_not_answer_while_a_run_is_started_is_no_fault_of_the_code(said: str):
    failure = classify_attempt(1, [], said + "\n", lambda rank: "")
    assert (failure.kind, failure.reason) == ("node failure", said)


@pytest.mark.parametrize(("number", "kind"), [(116, "node failure"), (2, "code error")])
def test_a_file_system_that_does_not_answer_while_a_rank_imports_is_its_nodes(number: int, kind: str):
    log = f"Traceback (most recent call last):\n  ...\nOSError: [Errno {number}] said by the system\n"
    assert classify_attempt(1, [], "", lambda rank: log).kind == kind
