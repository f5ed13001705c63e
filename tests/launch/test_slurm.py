"""What is asked of SLURM, and made of its answers: its commands are stand-ins that answer as SLURM 22.05 does."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from launch.config import ClusterConfig
from launch.slurm import batch_script, settings_of, submit_to_slurm
from launch.submission import Submission, last_job, submissions
from scaling.cli import load_config
from scaling.config import RunConfig
from scaling.errors import UserError
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


# An sbatch that knows no more than a limit on submitted jobs, of what was queued before.
LIMITED = """\
[ "$1" != --test-only ] || exit 0
last=$(grep -oP 'array=0-\\K[0-9]+' "$2")
queued=$(cat {queued} 2> /dev/null || echo 0)
if [ $((queued + last + 1)) -gt {limit} ]; then
    echo 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2
    echo 'sbatch: error: Batch job submission failed: Job violates' >&2
    exit 1
fi
echo $((queued + last + 1)) > {queued}
echo $((queued + 100))"""


@pytest.mark.parametrize("limit", [0, 3, 7, 9])
def test_as_many_runs_are_queued_as_a_limit_on_submitted_jobs_lets_in(
    limit: int, tiny_run: list[str], tiny_index: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plans = [plan_run(load_config(RunConfig, "run", [*tiny_run, f"seed={seed}"]), tiny_index) for seed in range(10)]
    study = StudyDirectory(Path(plans[0].config.study))
    sbatch = LIMITED.format(queued=tmp_path / "queued", limit=limit)
    stand_in(tmp_path, {"sbatch": sbatch, "scontrol": 'if [ "$2" = config ]; then echo MaxArraySize = 6; fi'})
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with study.path.parent.joinpath("lock").open("w") as lock, pytest.raises(UserError) as refused:
        submit_to_slurm(study, plans, replace(SHAPE, max_parallel=2), lock.fileno())
    assert "(QOSMaxSubmitJobPerUserLimit; Batch job submission failed: Job violates): " in str(refused.value)
    told = f"{limit} of 10 runs are queued; when some of the jobs have ended the same command goes on with the other"
    assert told in str(refused.value)
    jobs = [last_job(plan.directory) for plan in plans]
    assert None not in jobs[:limit]
    assert jobs[limit:] == [None] * (10 - limit)
    submitted = list(submissions(study))
    assert sum(len(each.run_ids()) for each in submitted) == limit, "what SLURM refused is cleared away"
    # At most two runs at once: the site lets six into an array, and each array that was cut waits for what was cut off.
    waiting = [each for each in submitted if "dependency=afterany" in each.script.read_text()]
    assert len(waiting) >= len(submitted) - 2
