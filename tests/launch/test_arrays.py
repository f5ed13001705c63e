"""How runs become arrays of jobs, where a site limits how many a user may submit."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from launch.arrays import _shares, submit_to_slurm
from launch.config import ClusterConfig
from launch.submission import last_job, submissions
from scaling.cli import load_config
from scaling.config import RunConfig
from scaling.plan import plan_run
from scaling.records import StudyDirectory
from scaling.shards import ShardIndex
from tests.launch.stand_ins import stand_in

SHAPE = ClusterConfig("slurm")
# An sbatch that knows no more than a limit on submitted jobs in the partition "few", of what was queued before.
LIMITED = """\
[ "$1" != --test-only ] || exit 0
last=$(grep -oP 'array=0-\\K[0-9]+' "$2")
job=$(($(cat {folder}/job 2> /dev/null || echo 100) + 1))
echo $job > {folder}/job
if grep -q partition=few "$2"; then
    queued=$(cat {folder}/queued 2> /dev/null || echo 0)
    if [ $((queued + last + 1)) -gt {limit} ]; then
        echo 'sbatch: error: {reason}' >&2
        echo 'sbatch: error: Batch job submission failed: Job violates' >&2
        exit 1
    fi
    echo $((queued + last + 1)) > {folder}/queued
fi
echo $job"""
FEW = replace(SHAPE, partition="few")


@pytest.fixture
def submitted(tiny_run: list[str], tiny_index: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What becomes of ten runs at a limit: (what was told, of each run its job, the array's script of each)."""

    def submit(limit: int, shape: ClusterConfig, *models: str, reason: str = "QOSMaxSubmitJobPerUserLimit"):
        cells = [[f"model={model}", f"seed={seed}"] for model in models or ("xxt", "xt") for seed in range(5)]
        plans = [plan_run(load_config(RunConfig, "run", [*tiny_run, *cell]), tiny_index) for cell in cells]
        study = StudyDirectory(Path(plans[0].config.study))
        sbatch = LIMITED.format(folder=tmp_path, limit=limit, reason=reason)
        scontrol = 'if [ "$2" = config ]; then echo MaxArraySize = 6; fi'
        stand_in(tmp_path, {"sbatch": sbatch, "scontrol": scontrol})
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        with study.path.parent.joinpath("lock").open("w") as lock:
            done = submit_to_slurm(study, plans, shape, lock.fileno())
        assert [each.path for each in submissions(study)] == sorted(each.path for each in done.arrays)
        return (
            done.full,
            [last_job(plan.directory) for plan in plans],
            [each.script.read_text() for each in done.arrays],
        )

    return submit


def options_of(script: str) -> tuple[str, str]:
    """(--array, --dependency)"""
    found = (re.search(rf"--{name}=(\S+)", script) for name in ("array", "dependency"))
    return tuple(match[1] if match else "" for match in found)  # type: ignore[return-value]


@pytest.mark.parametrize("limit", [0, 3, 7, 9])
@pytest.mark.parametrize("reason", ["QOSMaxSubmitJobPerUserLimit", "AssocMaxSubmitJobLimit", "MaxSubmitJobsPerAccount"])
def test_as_many_runs_are_queued_as_a_limit_on_submitted_jobs_lets_in(submitted, limit: int, reason: str):
    told, jobs, _ = submitted(limit, FEW, reason=reason)
    assert told == (
        f"SLURM takes no more jobs ({reason}; Batch job submission failed: Job violates): run the same command again "
        "when some have ended"
    )
    assert None not in jobs[:limit]
    assert jobs[limit:] == [None] * (10 - limit)


def test_what_a_limit_cuts_off_runs_beside_as_far_as_runs_at_once_allow_and_then_after(submitted):
    _, _, scripts = submitted(9, replace(FEW, max_parallel=10))  # the site lets six into an array
    assert [options_of(script) for script in scripts] == [("0-5%6", ""), ("0-1%2", ""), ("0-0%1", "")]


def test_what_a_limit_cuts_off_waits_where_no_more_runs_may_go_at_once(submitted):
    _, _, scripts = submitted(9, replace(FEW, max_parallel=1))
    # The second array of four finds room for three: two, then one, after the first array and after one another.
    assert [options_of(script) for script in scripts] == [
        ("0-5%1", ""),
        ("0-1%1", "afterany:101"),
        ("0-0%1", "afterany:103"),
    ]


@pytest.mark.parametrize(
    ("total", "sizes", "shares"),
    [
        (16, [3, 15, 3], [3, 10, 3]),
        (4, [1, 1, 30], [1, 1, 2]),
        (5, [9, 9], [3, 2]),
        (50, [9, 9], [9, 9]),
        (2, [9, 9, 9], [1, 1, 1]),
        (None, [9, 1], [9, 1]),
    ],
)
def test_what_a_small_array_cannot_use_of_the_runs_at_once_the_others_have(
    total: int | None, sizes: list[int], shares: list[int]
):
    assert _shares(total, sizes) == shares


def test_a_limit_on_one_partition_keeps_no_run_of_another_out(submitted):
    told, jobs, _ = submitted(2, replace(SHAPE, partition="main", sizes={"xt": {"partition": "few"}}), "xt", "xxt")
    assert "takes no more jobs" in told
    assert [job is not None for job in jobs] == [True] * 2 + [False] * 3 + [True] * 5
