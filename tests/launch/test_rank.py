"""How a process of a run, or of a preflight, ends that a launcher started: under srun, and on this machine."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from launch.failures import REPORT
from launch.submission import Settings, Submission
from scaling.cli import load_config
from scaling.config import RunConfig
from scaling.plan import plan_run
from scaling.records import StudyDirectory, read_records
from scaling.shards import ShardIndex
from tests.shared_library import shared_library

# With a library that aborts what is torn down.
MODULE = """
import ctypes, runpy, sys
ctypes.CDLL(sys.argv.pop(1))
runpy.run_module(sys.argv.pop(1), run_name="__main__")
"""
TASK = """
import ctypes, pickle, sys
import scaling.run
from launch.task import RunTask

def execute(plan, stop):
    if sys.argv[3] == "a defect":
        raise ZeroDivisionError("a defect")
    return int(sys.argv[3])

ctypes.CDLL(sys.argv[1])
scaling.run.execute = execute
plan = pickle.load(open(sys.argv[2], "rb"))
try:
    print(RunTask(plan, port=1)())
finally:
    print("on file", end="")  # as submitit puts there what the task returned or raised
"""
ONE = {"NTASKS": "1", "NNODES": "1", "PROCID": "0", "LOCALID": "0", "ARRAY_TASK_ID": "0"}
SLURM = {f"SLURM_{name}": value for name, value in ONE.items()}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_library(Path(__file__).parents[1] / "aborting.c", tmp_path_factory.mktemp("aborting"))


def ended(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", *words],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("module", ["launch.rank", "launch.preflight_rank"])
def test_a_rank_that_fails_is_not_held_up_by_what_is_torn_down(module: str, library: Path, tmp_path: Path):
    submission = Submission.create(StudyDirectory(tmp_path), [{}], Settings(1, 1, {}, 1, str(tmp_path / "speeds"), 3))
    rank = ended(MODULE, library, module, submission.path, **SLURM)
    assert rank.returncode == 1
    assert REPORT in rank.stderr
    assert rank.stderr.splitlines()[-1].startswith("KeyError")


def test_a_preflight_that_passes_is_not_held_up_either(
    tiny_run: list[str], tiny_index: ShardIndex, library: Path, tmp_path: Path
):
    plan = plan_run(load_config(RunConfig, "run", tiny_run), tiny_index)
    settings = Settings(1, 1, {"gpus_per_node": 0}, 1, str(tmp_path / "speeds"), 3)
    submission = Submission.create(StudyDirectory(tmp_path / "preflight"), [plan.to_record()], settings)
    rank = ended(MODULE, library, "launch.preflight_rank", submission.path, **SLURM)
    assert rank.returncode == 0, rank.stderr
    assert len(list(read_records(submission.path / "checks.jsonl"))) == 4


@pytest.mark.parametrize(
    ("ends", "processes", "status", "said"),
    [
        ("a defect", 2, 1, "on file"),
        ("76", 2, 0, "76\non file"),  # to submitit a success, whatever it returned
        ("0", 1, 0, "0\non file"),
    ],
)
def test_a_rank_on_this_machine_ends_at_once_when_submitit_has_its_last_word(
    tiny_run: list[str],
    tiny_index: ShardIndex,
    library: Path,
    tmp_path: Path,
    ends: str,
    processes: int,
    status: int,
    said: str,
):
    path = tmp_path / "plan"
    path.write_bytes(pickle.dumps(plan_run(load_config(RunConfig, "run", tiny_run), tiny_index)))
    names = {"NTASKS": str(processes), "GLOBALID": "0", "LOCALID": "0"}
    rank = ended(TASK, library, path, ends, **{f"SUBMITIT_LOCAL_{name}": value for name, value in names.items()})
    assert rank.returncode == status, rank.stderr
    assert rank.stdout == said
    assert ("ZeroDivisionError: a defect" in rank.stderr) == (ends == "a defect")
