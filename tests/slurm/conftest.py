"""A real cluster of four nodes for these tests, and runs on it. Nothing here is mocked."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scaling.records import RunDirectory, StudyDirectory
from tests.slurm.cluster import Cluster, MissingError, require_programs, running_cluster

# What runs on this cluster ask for beside the tests' tiny run: two processes over two nodes, no GPU.
SLURM_RUN = (
    "cluster=slurm",
    "cluster.gpus_per_node=0",
    "cluster.cpus_per_task=1",
    "cluster.nodes=2",
    "cluster.mem_gb=2",
    "cluster.timeout_min=20",
    "cluster.signal_seconds=30",
    'cluster.setup=["export GLOO_SOCKET_IFNAME=lo"]',
    "train.global_batch=4",
    "train.norm_batch=2",
    "execution.micro_batch=2",
    "execution.metrics=[si_sdr]",
)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    try:
        require_programs()
    except MissingError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    with running_cluster(("n1", "n2", "n3", "n4")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def slurm_words(cluster: Cluster, tiny_data: list[str], tiny_settings: tuple[str, ...], tmp_path_factory) -> list[str]:
    """Overrides of a sweep of one tiny run on two nodes; the caller adds a study and what it changes."""
    throughput = tmp_path_factory.mktemp("throughput") / "throughput.jsonl"
    tiny = [word for word in tiny_settings if not word.startswith(("model=", "train.global_batch", "train.norm_batch"))]
    axes = ["sweep.axes.model=[xxt]", "sweep.axes.seed=[0]"]
    return ["+sweep=sizes", *tiny_data, *tiny, *SLURM_RUN, *axes, f"cluster.throughput={throughput}"]


def launch(module: str, *words: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command of the launcher, as a user on the login node types it."""
    done = subprocess.run(
        [sys.executable, "-m", f"launch.{module}", *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def runs_of(study: Path) -> list[RunDirectory]:
    """The runs of a study by their ids."""
    return [RunDirectory(path) for path in sorted(StudyDirectory(study).runs.iterdir())]


def wait_for(holds: Callable[[], object], what: str, seconds: float = 400, run: RunDirectory | None = None) -> None:
    """Wait until it holds; no longer than `seconds`, nor than until `run` has failed."""
    deadline = time.monotonic() + seconds
    while not holds():
        is_in_vain = time.monotonic() > deadline or (run is not None and run.state()[0] == "failed")
        assert not is_in_vain, f"waited in vain until {what}\n{story(run) if run else ''}"
        time.sleep(0.25)


def events_of(run: RunDirectory, *kinds: str) -> list[dict]:
    return [event for event in run.read_events() if event["event"] in kinds]


def job_of(run: RunDirectory) -> str:
    return events_of(run, "submitted")[-1]["job"]


def train_losses(run: RunDirectory) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in run.read_metrics() if row["kind"] == "train"]


def story(run: RunDirectory) -> str:
    """What a failed assertion is understood by: the events, and the ends of the logs."""
    lines = [str(event) for event in run.read_events() if event["event"] != "checkpointed"]
    for event in events_of(run, "submitted"):
        log = Path(event["log"])
        for path in sorted(log.parent.glob(f"{log.stem}.*log")):
            lines += [f"--- {path.name}", path.read_text(errors="replace")[-1500:]]
    return "\n".join(lines)
