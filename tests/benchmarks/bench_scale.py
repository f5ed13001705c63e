"""10,080 planned runs: to plan them, to submit them, to decide that nothing is to be submitted, to say how they are.

`make benchmarks`, or: python -m pytest tests/benchmarks/bench_scale.py
The runs are made and not trained: they wait in the queue of a real SLURM, with the events and metrics of a
training of hours on record for one in two.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from scaling.records import RunDirectory, StudyDirectory, append_record
from tests.benchmarks.page import PERFORMANCE, measured_on, write_block
from tests.slurm.cluster import Cluster, running_cluster

SECONDS = 10.0  # CPU time that each may take
AXES = (
    "sweep.axes.model=[xxt,xt,t,s,m,l,xl]",
    f"sweep.axes.data.hours=[{','.join(f'{0.001 * count:g}' for count in range(1, 21))}]",
    f"sweep.axes.seed=[{','.join(map(str, range(72)))}]",
)
ASKED = ("cluster=slurm", "cluster.gpus_per_node=0", "cluster.cpus_per_task=1", "cluster.mem_gb=1")
LATER = "cluster.additional_parameters={begin:'now+1hour'}"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster(("n1", "n2", "n3"), max_array_size=5001) as cluster:
        yield cluster


def timed(module: str, *words: str) -> tuple[float, float, str]:
    """A command: (seconds on the clock, seconds of CPU, what it printed)."""
    before, begun = os.times(), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", module, *words], capture_output=True, text=True, check=True, timeout=600
    )
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - begun, cpu, done.stdout


def trained(run: RunDirectory) -> None:
    """The records of a run of hours, still on its way."""
    run.log_event("launched", job="1_0", attempt=0, step=0, nodes="n1", processes=1)
    run.log_event("started", step=0)
    lines = "".join(f'{{"event": "checkpointed", "time": 1e9, "pid": 1, "step": {step}}}\n' for step in range(500))
    with run.events.open("a") as file:
        file.write(lines)
    for step in range(10):
        append_record(run.metrics, {"kind": "train", "step": step, "loss": 0.1, "audio_seconds_per_second": 9.0})


def test_ten_thousand_runs(cluster: Cluster, tiny_data: list[str], tiny_settings: tuple[str, ...], tmp_path: Path):
    tiny = [word for word in tiny_settings if not word.startswith("model=")]
    study = tmp_path / "study"
    words = ["+sweep=sizes", *tiny_data, *tiny, *AXES, *ASKED, LATER, f"study={study}"]
    rows = [("plan (dry_run=true)", *timed("launch.sweep", *words, "dry_run=true"))]
    rows.append(("submit all", *timed("launch.sweep", *words)))
    directory = StudyDirectory(study)
    plan = directory.read_plan()
    assert len(plan) == 7 * 20 * 72
    for row in plan[::2]:
        trained(directory.run(row["run_id"]))
    rows.append(("decide that nothing is missing", *timed("launch.sweep", *words)))
    rows.append(("status", *timed("launch.status", f"study={study}")))
    lines = [f"| {name} | {wall:.1f} | {cpu:.1f} |" for name, wall, cpu, _ in rows]
    head = [f"| {len(plan):,} runs: command | seconds | CPU seconds |", "| --- | --: | --: |"]
    note = f"`python -m pytest tests/benchmarks/bench_scale.py`, {measured_on('hydra-core')}, a real SLURM's queue."
    write_block(PERFORMANCE, "ten-thousand-runs", "\n".join([*head, *lines, "", note]))
    assert f"{len(plan)} runs are already queued or running" in rows[2][3]
    assert f"{len(plan)} runs: " in rows[3][3]
    for name, _, cpu, _ in rows:
        assert name == "submit all" or cpu < SECONDS, name
