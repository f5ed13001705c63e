"""Whatever ends an attempt from outside, the run goes on by itself, and its losses are those of a run left alone.

Each calamity has a study of its own with the same run in it, so that one uninterrupted run is the
twin of all. They happen side by side, since a requeued job waits 30 seconds in SLURM.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch.queue import read_queue
from scaling.records import RunDirectory
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import events_of, job_of, launch, runs_of, story, train_losses, wait_for

STEPS = 60
STEPS_BEFORE = 12  # the calamity


def left_alone(run: RunDirectory, cluster: Cluster) -> None: ...


def signalled(run: RunDirectory, cluster: Cluster) -> None:
    subprocess.run(["scancel", "--signal=USR1", job_of(run)], check=True)


def last_signalled(run: RunDirectory, cluster: Cluster) -> None:
    """Of the element that starts last, whose job has the array's own id."""
    job, command = job_of(run), ["scontrol", "show", "job", "--oneliner"]
    said = subprocess.run([*command, job], check=True, capture_output=True, text=True).stdout
    assert said.startswith(f"JobId={job.partition('_')[0]} "), said
    signalled(run, cluster)


def requeued(run: RunDirectory, cluster: Cluster) -> None:
    subprocess.run(["scontrol", "requeue", job_of(run)], check=True)


def rank_killed(run: RunDirectory, cluster: Cluster) -> None:
    os.kill(process_of(job_of(run), rank=1), signal.SIGKILL)


def node_killed(run: RunDirectory, cluster: Cluster) -> None:
    cluster.kill_node(events_of(run, "launched")[-1]["nodes"])


@dataclass(frozen=True)
class Calamity:
    """What happens to a run, and how it is executed until then and afterwards."""

    strikes: Callable[[RunDirectory, Cluster], None]
    settings: tuple[str, ...] = ("cluster.additional_parameters={exclude:'n3,n4'}",)
    twin: str = "left alone"  # whose losses are its own to the last bit
    only_in_full: bool = False
    seeds: str = "0"  # the run is of seed 0


CALAMITIES = {
    "left alone": Calamity(left_alone),
    "signalled": Calamity(last_signalled, seeds="1,0"),
    "requeued": Calamity(requeued, seeds="0,1"),
    "rank killed": Calamity(rank_killed),
    # Two processes on one of two nodes that nobody else is on: the other is left when it is gone.
    "node killed": Calamity(
        node_killed,
        ("cluster.nodes=1", "cluster.processes_per_node=2", "cluster.additional_parameters={exclude:'n1,n2'}"),
    ),
    # From checkpoints of which each rank has written a part.
    "zero2 requeued": Calamity(requeued, (*Calamity.settings, "deepspeed=zero2")),
    "zero3 requeued": Calamity(requeued, (*Calamity.settings, "deepspeed=zero3"), "zero3 left alone", True),
    "zero3 left alone": Calamity(left_alone, (*Calamity.settings, "deepspeed=zero3"), "zero3 left alone", True),
}


def process_of(job: str, rank: int) -> int:
    """The process of a rank of an array's element."""
    array, _, index = job.partition("_")
    wanted = {f"SLURM_ARRAY_JOB_ID={array}", f"SLURM_ARRAY_TASK_ID={index}", f"SLURM_PROCID={rank}"}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if "launch.rank" not in (path / "cmdline").read_text():
                continue
            if wanted <= set((path / "environ").read_text().split("\0")):
                return int(path.name)
        except OSError:
            continue
    raise AssertionError(f"no process of rank {rank} of job {job}")


def job_is_gone(run: RunDirectory) -> bool:
    job = read_queue().get(job_of(run))
    return job is None or not job.is_live


class Runs(dict[str, RunDirectory]):
    """By calamity; of one that is left to the full counts the test is skipped."""

    def __missing__(self, name: str) -> RunDirectory:
        pytest.skip("takes minutes: make reliability")


@pytest.fixture(scope="module")
def runs(cluster: Cluster, slurm_words: list[str], tmp_path_factory, pytestconfig: pytest.Config) -> Runs:
    """One run a calamity, each brought to its end through it."""
    is_full = pytestconfig.getoption("--reliability") == "full"
    names = [name for name, calamity in CALAMITIES.items() if is_full or not calamity.only_in_full]
    studies = {name: tmp_path_factory.mktemp("study") / "study" for name in names}

    def go_through(name: str) -> RunDirectory:
        words = [*slurm_words, *CALAMITIES[name].settings, f"train.budget.steps={STEPS}", f"study={studies[name]}"]
        launch("sweep", *words, f"sweep.axes.seed=[{CALAMITIES[name].seeds}]")
        run = runs_of(studies[name])[0]
        wait_for(lambda: len(train_losses(run)) >= STEPS_BEFORE, f"{name} has trained a little", run=run)
        CALAMITIES[name].strikes(run, cluster)
        attempts = 1 if CALAMITIES[name].strikes is left_alone else 2
        wait_for(lambda: len(events_of(run, "ended")) == attempts or job_is_gone(run), f"{name} is over")
        return run

    with ThreadPoolExecutor(len(names)) as pool:
        return Runs(zip(names, pool.map(go_through, names), strict=True))


@pytest.mark.parametrize("name", CALAMITIES)
def test_a_run_goes_on_by_itself_and_its_losses_are_those_of_one_left_alone(name: str, runs: Runs):
    run = runs[name]
    assert run.state()[0] == "finished", story(run)
    assert len(events_of(run, "submitted")) == 1, "nobody submitted it again"
    assert len(events_of(run, "launched")) == (1 if CALAMITIES[name].strikes is left_alone else 2), story(run)
    losses = train_losses(run)
    assert [step for step, _ in losses] == list(range(1, STEPS + 1))
    assert losses == train_losses(runs[CALAMITIES[name].twin]), story(run)


def test_parameters_in_parts_add_up_to_the_losses_of_whole_ones(runs: Runs):
    losses, expected = ([loss for _, loss in train_losses(runs[name])] for name in ("zero3 left alone", "left alone"))
    assert losses[:8] == pytest.approx(expected[:8], rel=1e-5)
    assert losses == pytest.approx(expected, rel=5e-3), "rounding grows with the steps"


@pytest.mark.parametrize(
    ("name", "kind", "status"),
    [
        ("signalled", "preempted", 75),
        ("requeued", "preempted", 75),
        ("rank killed", "node failure", 137),
        ("node killed", "node failure", None),
        ("zero2 requeued", "preempted", 75),
        ("zero3 requeued", "preempted", 75),
    ],
)
def test_the_end_of_an_attempt_is_on_record_with_its_evidence(name: str, kind: str, status: int | None, runs: Runs):
    run = runs[name]
    first, last = events_of(run, "ended")
    assert (first["failure"], first["exit_status"]) == (kind, status), story(run)
    assert last["exit_status"] == 0
    assert "failure" not in last
    assert first["device_hours"] > 0
    resumed = events_of(run, "resumed")[-1]
    saved = status == 75
    assert resumed["step"] >= STEPS_BEFORE if saved else resumed["step"] >= STEPS_BEFORE // 5 * 5 - 5
    ports = [event["meeting_at"] for event in events_of(run, "launched")]
    assert ports[0] != ports[1], "a port is not used again"
    if name == "rank killed":
        assert "rank 1" in first["reason"]
    if name.startswith("zero"):
        assert [event["zero_stage"] for event in events_of(run, "started", "resumed")] == [int(name[4])] * 2
    if name == "node killed":
        nodes = [event["nodes"] for event in events_of(run, "launched")]
        assert set(nodes) == {"n3", "n4"}
        assert nodes[0] in first["reason"]


@pytest.mark.parametrize("name", ["signalled", "requeued"])
def test_the_other_elements_of_an_array_are_left_alone(name: str, runs: Runs):
    twin, other = runs["left alone"], runs_of(runs[name].path.parents[1])[1]
    assert other.run_id != runs[name].run_id
    wait_for(lambda: other.state()[0] == "finished", "the other element is finished")
    assert len(events_of(other, "launched")) == 1, story(other)
    assert train_losses(other) != train_losses(twin)
