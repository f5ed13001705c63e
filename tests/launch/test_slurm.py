"""What is asked of SLURM, and made of its answers: its commands are stand-ins that answer as SLURM 22.05 does."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from launch.config import ClusterConfig
from launch.slurm import batch_script, settings_of, submit_to_slurm
from launch.submission import Submission, last_job, submissions
from scaling.cli import load_config
from scaling.config import RunConfig
from scaling.plan import plan_run
from scaling.records import RunDirectory, StudyDirectory, write_records
from scaling.shards import ShardIndex

ROOT = Path(__file__).parents[2]
SHAPE = ClusterConfig("slurm")
# Job 7 is an array of three, whose last element has the array's own id: by that all are meant.
FIRST, SECOND, LAST = (
    f"JobId={job} ArrayJobId=7 ArrayTaskId={index} JobState={state} Restarts=0 EndTime={end}T00:00:00"
    for index, (job, state, end) in enumerate(
        [(8, "COMPLETED", "2001-01-01"), (9, "RUNNING", "2101-01-01"), (7, "RUNNING", "2101-01-01")]
    )
)
SCONTROL = """\
case "$*" in
    "show hostnames"*) echo localhost ;;
    "show job --oneliner 7") printf '%s\\n' "{last}" "{second}" "{first}" ;;
    "show job --oneliner 7_2") echo "{last}" ;;
    requeue*) echo "scontrol $*" >> {calls} ;;
esac
"""


@dataclass(frozen=True)
class Element:
    """The last element of array 7, as its batch shell finds it."""

    submission: Submission
    run: RunDirectory
    path: str
    calls: Path

    def execute(self) -> list[str]:
        """Its batch script: what was asked of SLURM."""
        script = batch_script(SHAPE, {}, ROOT, self.submission.path)
        ids = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2", "SLURM_JOB_NODELIST": "n1"}
        subprocess.run(["bash", "-c", script], env=os.environ | ids | {"PATH": self.path}, check=False, timeout=120)
        return self.calls.read_text().splitlines()


def stand_in(folder: Path, commands: dict[str, str]) -> None:
    for name, script in commands.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)


@pytest.fixture
def element(tmp_path: Path) -> Element:
    """Its processes were told to stop, and have saved."""
    study, calls = StudyDirectory(tmp_path / "study"), tmp_path / "calls"
    rows = [{"run_id": f"xxt-seed{seed}"} for seed in range(3)]
    submission = Submission.create(study, rows, settings_of(SHAPE))
    submission.record_job("7")
    run = study.run("xxt-seed2")
    write_records(run.plan, [rows[2]])
    commands = {
        "scontrol": SCONTROL.format(first=FIRST, second=SECOND, last=LAST, calls=calls),
        "sinfo": "",
        "srun": f'echo "srun $*" >> {calls}; exit 75',
    }
    stand_in(tmp_path, commands)
    return Element(submission, run, f"{tmp_path}:{os.environ['PATH']}", calls)


def test_the_last_element_of_an_array_goes_back_into_the_queue_alone(element: Element):
    calls = element.execute()
    assert calls[1:] == ["scontrol requeue 7_2"]
    assert [event["event"] for event in element.run.read_events()] == ["submitted", "launched", "ended", "requeued"]
    assert element.run.read_events()[-1]["by"] == "this job"


@pytest.mark.parametrize(
    ("said", "follows"), [(" DUE TO PREEMPTION", ["scontrol requeue 7_2"]), ("", [])], ids=["for another", "by a user"]
)
def test_a_job_that_is_cancelled_for_another_comes_back_and_one_that_a_user_cancels_does_not(
    element: Element, said: str, follows: list[str]
):
    log = element.submission.batch_log(2)
    scontrol = SCONTROL.format(first="", second="", last=LAST.replace("RUNNING", "COMPLETING"), calls=element.calls)
    srun = f"echo 'srun' >> {element.calls}; echo '*** JOB 7 ON n1 CANCELLED AT 07:16:04{said} ***' >> {log}; exit 75"
    stand_in(element.calls.parent, {"scontrol": scontrol, "srun": srun})
    assert element.execute()[1:] == follows
    last = element.run.read_events()[-1]
    assert (last["event"], last["failure"]) == ("requeued" if follows else "preempted", "preempted")


def test_rank_0_may_score_for_longer_than_a_site_waits_for_the_last_process(element: Element):
    assert "--wait=0" in element.execute()[0].split()


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
    assert [options_of(script) for script in scripts] == [("0-5%5", ""), ("0-1%2", ""), ("0-0%1", "")]


def test_what_a_limit_cuts_off_waits_where_no_more_runs_may_go_at_once(submitted):
    _, _, scripts = submitted(9, replace(FEW, max_parallel=1))
    # The second array of four finds room for three: two, then one, after the first array and after one another.
    assert [options_of(script) for script in scripts] == [
        ("0-5%1", ""),
        ("0-1%1", "afterany:101"),
        ("0-0%1", "afterany:103"),
    ]


def test_a_limit_on_one_partition_keeps_no_run_of_another_out(submitted):
    told, jobs, _ = submitted(2, replace(SHAPE, partition="main", sizes={"xt": {"partition": "few"}}), "xt", "xxt")
    assert "takes no more jobs" in told
    assert [job is not None for job in jobs] == [True] * 2 + [False] * 3 + [True] * 5
