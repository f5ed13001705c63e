"""What a preflight measures is what a run of its settings does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import preflight
from launch.config import ClusterConfig
from launch.submission import Settings, Submission
from scaling.cli import load_config
from scaling.config import RunConfig
from scaling.errors import UnreachableError
from scaling.plan import RunPlan, plan_run
from scaling.records import StudyDirectory, read_records
from scaling.shards import ShardIndex

RANK = """
import json, sys, torch
from launch import preflight_rank
from scaling import allocator
kept = allocator.keep_freed_memory.__code__
seen = []
sys.setprofile(lambda frame, event, _: seen.append(1) if event == "call" and frame.f_code is kept else None)
preflight_rank.main([sys.argv[1]])
print(json.dumps([torch.get_num_threads(), torch.backends.cudnn.allow_tf32, bool(seen)]))
"""


def test_a_preflight_computes_with_the_threads_and_the_arithmetic_of_the_run(
    tiny_run: list[str], tiny_index: ShardIndex, tmp_path: Path
):
    words = [*tiny_run, "execution.threads=2", "execution.num_validations=1"]
    plan = plan_run(load_config(RunConfig, "run", words), tiny_index)
    study = StudyDirectory(tmp_path / "preflight")
    submission = Submission.create(
        study, [plan.to_record()], Settings(1, 1, {"gpus_per_node": 0}, 1, str(tmp_path / "speeds"), 3)
    )
    slurm = {"SLURM_ARRAY_TASK_ID": "0", "SLURM_NTASKS": "1", "SLURM_NNODES": "1"}
    slurm |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    rank = subprocess.run(
        [sys.executable, "-c", RANK, str(submission.path)],
        env=os.environ | slurm,
        capture_output=True,
        text=True,
        check=False,
    )
    assert rank.returncode == 0, rank.stderr
    assert json.loads(rank.stdout) == [2, False, True]  # torch's own choice is TF32 in cuDNN
    checks = [row["check"] for row in read_records(submission.path / "checks.jsonl")]
    assert checks == ["rendezvous", "all-reduce", "training step", "checkpoint"]


def test_preflights_of_one_second_have_folders_of_their_own_below_the_study_wherever_it_is(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def run_here(folder: StudyDirectory, plan: RunPlan, shape: ClusterConfig) -> None:
        folders.append(folder.path)
        raise InterruptedError

    folders: list[Path] = []
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(preflight, "_run_here", run_here)
    monkeypatch.setattr("time.strftime", lambda form: "261129-154837")
    for _ in range(2):
        with pytest.raises(InterruptedError):
            preflight.main([*tiny_run, "study=~/checks"])
    assert {path.parent for path in folders} == {tmp_path / "checks"}
    assert len({*folders}) == 2


def test_a_preflight_of_this_machine_says_that_torch_cannot_use_its_gpu(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(UnreachableError, match="install a torch build for that driver"):
        preflight.main([*tiny_run, f"cluster.throughput={tmp_path / 'speeds'}"])
