"""What is asked of SLURM, and made of its answers: its commands are stand-ins that answer as SLURM 22.05 does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch.config import ClusterConfig
from launch.slurm import submit_to_slurm
from launch.submission import last_job
from scaling.cli import load_config
from scaling.config import RunConfig
from scaling.errors import UserError
from scaling.plan import plan_run
from scaling.records import StudyDirectory
from scaling.shards import ShardIndex

SHAPE = ClusterConfig("slurm")


def stand_in(folder: Path, commands: dict[str, str]) -> None:
    for name, script in commands.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)


def test_what_a_limit_on_submitted_jobs_lets_in_is_on_record_and_named(
    tiny_run: list[str], tiny_index: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plans = [plan_run(load_config(RunConfig, "run", [*tiny_run, f"seed={seed}"]), tiny_index) for seed in range(5)]
    study = StudyDirectory(Path(plans[0].config.study))
    refusal = "sbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: Batch job submission failed: Job violates"
    sbatch = f"""\
[ "$1" != --test-only ] || exit 0
[ ! -e {tmp_path}/queued ] || {{ echo '{refusal}' >&2; exit 1; }}
touch {tmp_path}/queued; echo 7"""
    stand_in(tmp_path, {"sbatch": sbatch, "scontrol": 'if [ "$2" = config ]; then echo MaxArraySize = 2; fi'})
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with study.path.parent.joinpath("lock").open("w") as lock, pytest.raises(UserError) as refused:
        submit_to_slurm(study, plans, SHAPE, lock.fileno())
    assert "(QOSMaxSubmitJobPerUserLimit; Batch job submission failed: Job violates): 2 of 5 runs" in str(refused.value)
    assert [last_job(plan.directory) for plan in plans] == ["7_0", "7_1", None, None, None]
