"""What ends a run is on record with its evidence, and each kind of it is treated in its own way."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch.queue import read_queue
from scaling.records import RunDirectory
from scaling.shards import ShardIndex
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import events_of, job_of, launch, runs_of, story, wait_for


@dataclass(frozen=True)
class Case:
    """Settings that make a run end in a way, and what is then to be on record."""

    settings: tuple[str, ...]
    attempts: int
    failure: str | None  # of the run; None: it finished after all
    reason: str
    has_damaged_shards: bool = False


ALONE = ("cluster.nodes=1", "cluster.processes_per_node=1")
LOCAL = 'cluster.setup=["export GLOO_SOCKET_IFNAME=lo",'
CASES = {
    # 32 crops of 4 seconds take about 2.6 GiB, 16 take 1.7, and the scoring less: SLURM ends what goes beyond 2.1.
    "memory ran out": Case(
        (
            *ALONE,
            "cluster.mem_gb=2.1",
            "train.global_batch=32",
            "train.norm_batch=4",
            "execution.micro_batch=32",
            "train.crop_seconds=4",
            "train.budget.steps=2",
            "train.optimiser.warmup_steps=1",
            "execution.scoring_processes=1",
        ),
        2,
        None,
        "memory limit",
    ),
    # Whatever python is started in the job is killed after eight seconds, and saves nothing by then.
    "killed again and again": Case(
        (
            *ALONE,
            "cluster.container='timeout --signal=KILL 8'",
            "cluster.max_fruitless_attempts=2",
            "execution.checkpoint_every=100000",
            "train.budget.steps=100000",
        ),
        2,
        "node failure",
        "2 attempts without a new committed step (the last is 0); of the last: rank 0 on",
    ),
    "master address unknown": Case(
        (f'{LOCAL}"export MASTER_ADDR=nowhere.invalid"]',), 1, "bad config", "nowhere.invalid"
    ),
    "diverged": Case((*ALONE, "train.optimiser.learning_rate=1e30"), 1, "diverged", "the loss of step"),
    # Both processes meet them, on two nodes; no checkpoint mends them, so the job does not come back.
    "shards are damaged": Case((), 1, "bad data", "more than data.max_damaged_share = 0.01: delete ", True),
    "ended by what nobody foresaw": Case(
        (*ALONE, f'{LOCAL}"ulimit -t 2"]'), 1, "code error", "CPU time limit exceeded"
    ),
}


def damaged_copy(shards: Path, copy: Path) -> Path:
    """Shards with every second half of a training shard overwritten, their sizes as they were."""
    shutil.copytree(shards, copy)
    for shard in copy.glob("train-*.tar"):
        size = shard.stat().st_size
        with shard.open("r+b") as file:
            file.seek(size // 2)
            file.write(b"\x55" * (size - size // 2))
    return copy


@pytest.fixture(scope="module")
def runs(cluster: Cluster, slurm_words: list[str], tiny_index: ShardIndex, tmp_path_factory) -> dict[str, RunDirectory]:
    studies = {name: tmp_path_factory.mktemp("study") / "study" for name in CASES}

    def go_through(name: str) -> RunDirectory:
        words = [*slurm_words, *CASES[name].settings, f"study={studies[name]}"]
        if CASES[name].has_damaged_shards:
            words.append(f"data.shards={damaged_copy(tiny_index.root, studies[name].with_name('shards'))}")
        launch("sweep", *words)
        (run,) = runs_of(studies[name])

        def is_over() -> bool:
            job = read_queue().get(job_of(run))
            return job is None or not job.is_live

        wait_for(is_over, f"{name} is over")
        return run

    with ThreadPoolExecutor(len(CASES)) as pool:
        return dict(zip(CASES, pool.map(go_through, CASES), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_failure_is_on_record_and_treated_in_its_own_way(name: str, runs: dict[str, RunDirectory]):
    case, run = CASES[name], runs[name]
    state, event = run.state()
    assert len(events_of(run, "launched")) == case.attempts, story(run)
    first = events_of(run, "ended")[0]
    assert case.reason in (event["reason"] if case.failure else first["reason"]), story(run)
    assert (state, event.get("failure")) == ("failed" if case.failure else "finished", case.failure), story(run)
    assert first["exit_status"] != 0
    assert first["seconds"] > 0
    said = launch("status", f"study={run.path.parents[1]}", check=False)
    assert said.returncode == (1 if case.failure else 0)
    assert (case.failure or "1 finished") in said.stdout


def test_memory_that_ran_out_is_answered_with_half_the_micro_batch_and_the_same_global_batch(runs):
    run = runs["memory ran out"]
    first, _ = events_of(run, "ended")
    assert first["failure"] == "out of memory"
    assert first["last_lines"]
    (requeued,) = events_of(run, "requeued")
    assert (requeued["treatment"], requeued["micro_batch"]) == ("halve", 16)
    assert [event["micro_batch"] for event in events_of(run, "launched")] == [None, 16]
    assert events_of(run, "started")[-1]["micro_batch"] == 16
    assert run.read_plan()["global_batch"] == 32


def test_the_logs_of_a_run_are_one_command_away(runs):
    run = runs["master address unknown"]
    done = launch("logs", run.run_id[:8], f"study={run.path.parents[1]}")
    assert done.stdout.count("==> ") == 3, "the batch shell's and two ranks'"
    assert "nowhere.invalid" in done.stdout
    one = launch("logs", run.run_id, f"study={run.path.parents[1]}", "rank=1", "lines=3")
    assert one.stdout.count("==> ") == 1
    assert len(one.stdout.splitlines()) <= 4
    none = launch("logs", run.run_id, f"study={run.path.parents[1]}", "attempt=7", check=False)
    assert (none.returncode, none.stdout) == (1, "")
    assert none.stderr.strip() == f"run {run.run_id} has no log of attempt 7 yet"
