"""What is asked of SLURM, and made of its answers: its commands are stand-ins that answer as SLURM 22.05 does."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch.config import ClusterConfig
from launch.queue import read_queue
from launch.slurm import batch_script, settings_of, try_shape
from launch.submission import Submission
from scaling.errors import UserError
from scaling.records import RunDirectory, StudyDirectory, write_records
from tests.launch.stand_ins import stand_in

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
    requeue*) echo "scontrol $*" >> {calls}; {answer} ;;
esac
"""
SAID = "echo 'slurm_requeue error: Requested operation is presently disabled' >&2"


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
        "scontrol": SCONTROL.format(first=FIRST, second=SECOND, last=LAST, calls=calls, answer=""),
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
    scontrol = SCONTROL.format(
        first="", second="", last=LAST.replace("RUNNING", "COMPLETING"), calls=element.calls, answer=""
    )
    srun = f"echo 'srun' >> {element.calls}; echo '*** JOB 7 ON n1 CANCELLED AT 07:16:04{said} ***' >> {log}; exit 75"
    stand_in(element.calls.parent, {"scontrol": scontrol, "srun": srun})
    assert element.execute()[1:] == follows
    last = element.run.read_events()[-1]
    assert (last["event"], last["failure"]) == ("requeued" if follows else "preempted", "preempted")


def test_rank_0_may_score_for_longer_than_a_site_waits_for_the_last_process(element: Element):
    assert "--wait=0" in element.execute()[0].split()


def test_the_processes_have_the_shells_environment_whatever_a_site_wants_handed_on(element: Element):
    assert "--export=ALL" in element.execute()[0].split()


@pytest.mark.parametrize(
    ("answer", "tries", "last"),
    [
        (f"[ $(wc -l < {{calls}}) -ge 4 ] || {{{{ {SAID}; exit 1; }}}}", 3, "requeued"),
        (f"{SAID}; exit 1", 5, "failed"),
    ],
    ids=["away for a moment", "against it"],
)
def test_a_job_that_is_not_queued_again_at_once_is_asked_for_some_more_and_then_on_record(
    element: Element, answer: str, tries: int, last: str
):
    scontrol = SCONTROL.format(
        first="", second="", last=LAST, calls=element.calls, answer=answer.format(calls=element.calls)
    )
    stand_in(element.calls.parent, {"scontrol": scontrol, "sleep": ""})
    assert element.execute()[1:] == ["scontrol requeue 7_2"] * tries
    event = element.run.read_events()[-1]
    assert event["event"] == last
    if last == "failed":
        assert event["failure"] == "preempted"
        assert event["reason"].endswith("SLURM did not queue its job again: Requested operation is presently disabled")


def test_all_of_slurms_commands_look_at_the_same_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever defaults a user has set for them, of which sbatch has none."""
    shown = '[ -n "$SQUEUE_PARTITION$SLURM_CLUSTERS" ] || echo "5_0|RUNNING|None|n1|token"; echo $SLURM_CONF > conf'
    stand_in(tmp_path, {"squeue": shown})
    monkeypatch.chdir(tmp_path)
    for name, value in (
        ("PATH", f"{tmp_path}:{os.environ['PATH']}"),
        ("SLURM_CONF", "/etc/a"),
        ("SLURM_CLUSTERS", "b"),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SQUEUE_PARTITION", "gpu")
    assert list(read_queue()) == ["5_0"]
    assert (tmp_path / "conf").read_text() == "/etc/a\n"


@pytest.mark.parametrize("option", ["clusters", "comment", "dependency", "output"])
def test_an_option_by_which_a_sweep_knows_its_jobs_is_not_a_sites(option: str):
    with pytest.raises(UserError, match=f"cluster.additional_parameters has {option}, which is not a site's: "):
        ClusterConfig("slurm", additional_parameters={option: "x"})


def test_a_folder_of_any_name_has_its_logs_in_it(tmp_path: Path):
    """SLURM fills in patterns, and Python parts paths at a colon."""
    script = batch_script(SHAPE, {}, ROOT, tmp_path / "50%train")
    assert f"--output={tmp_path}/50%%train/$SLURM_ARRAY_TASK_ID." in script
    with pytest.raises(UserError, match=r"a path with ':' is two paths to Python"):
        try_shape(StudyDirectory(tmp_path / "10:30"), SHAPE, tmp_path / "10:30" / "code")
