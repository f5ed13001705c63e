"""One run on several processes: the same science, nobody missing, nobody waited for without end."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import psutil
import pytest
import torch
from torch import distributed

from scaling.checkpoint import load_newest
from scaling.config import ExecutionConfig
from scaling.errors import MeetingError, UserError
from scaling.liveness import SECONDS_BETWEEN_SIGNS
from scaling.own_time import OwnTime
from scaling.ports import free_port
from scaling.processes import VARIABLES, Processes, _check_devices, join
from scaling.records import RunDirectory
from scaling.run import classify
from scaling.shards import ShardIndex
from tests.ranks import Rank, end_all, run_ranks, start_ranks

STEPS = "train.budget.steps=8"
T = TypeVar("T")


def run_of(study: Path) -> RunDirectory:
    (path,) = (study / "runs").iterdir()
    return RunDirectory(path)


def rows_of(study: Path) -> list[tuple]:
    return [(row["kind"], row["step"], row["loss"], row["terms"]) for row in run_of(study).read_metrics()]


def wait_for(condition, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    yield
    end_all()


@pytest.fixture
def long_run(tiny_run: list[str]) -> list[str]:
    return [*tiny_run, "train.budget.steps=4000", "execution.checkpoint_every=1000000", "execution.silence_timeout=5"]


def start_and_meet(words: list[str], folder: Path, study: Path, world_size: int = 2) -> list[Rank]:
    """Ranks that are past their first steps."""
    rows = len(list(study.glob("runs/*"))) and len(run_of(study).read_metrics())
    ranks = start_ranks(words, folder, world_size, command="execute")
    wait_for(lambda: list(study.glob("runs/*/metrics.jsonl")) and len(run_of(study).read_metrics()) > rows + 2)
    return ranks


# --- the same science ----------------------------------------------------------------------


def test_two_processes_train_as_one_does_up_to_rounding_and_zero_as_they_do(tiny_run: list[str], tmp_path: Path):
    """norm_batch=4 over two processes of 2 crops: the batch norms span them."""
    losses = {}
    words = [*tiny_run, STEPS, "train.norm_batch=4"]
    for name, world_size, more in (
        ("one", 1, ""),
        ("two", 2, ""),
        ("zero2", 2, "deepspeed=zero2"),
        ("zero3", 2, "deepspeed=zero3"),
        ("two bf16", 2, "train.precision=bf16"),
        ("zero3 bf16", 2, "train.precision=bf16 deepspeed=zero3"),
    ):
        study = tmp_path / name.replace(" ", "-")
        run_ranks([*words, f"study={study}", *more.split()], tmp_path, world_size)
        losses[name] = [row[2] for row in rows_of(study)]
        started = run_of(study).read_events()[0]
        assert started["world_size"] == world_size
        assert started["micro_batch"] == 4 // world_size
        assert started["zero_stage"] == (int(more[-1]) if "zero" in more else None)
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-3)
    assert losses["zero2"] == pytest.approx(losses["two"], rel=1e-6)
    assert losses["zero3"] == pytest.approx(losses["two"], rel=1e-3)
    assert losses["zero3 bf16"] == pytest.approx(losses["two bf16"], rel=1e-2)
    for name in ("two", "zero3"):  # 16-bit products are another computation from the first step on
        assert losses[f"{name} bf16"][0] != pytest.approx(losses["two"][0], rel=1e-6)


def test_one_rank_that_is_asked_to_stop_in_a_validation_stops_all_and_the_next_ranks_do_it(
    tiny_run: list[str], tmp_path: Path
):
    asked = 1  # the one that writes no checkpoint
    words = [*tiny_run, STEPS, "execution.num_validations=2"]
    whole = run_ranks([*words, f"study={tmp_path / 'whole'}"], tmp_path, 2)
    row = '"kind": "train", "step": 4,'
    for attempt in range(4):  # the validation takes a tenth of a second, which a busy machine may miss
        study = tmp_path / f"broken-off-{attempt}"
        ranks = start_ranks([*words, f"study={study}"], tmp_path, 2, command="execute")
        wait_for(lambda study=study: any(row in path.read_text() for path in study.glob("runs/*/metrics.jsonl")))
        os.kill(ranks[asked].pid, signal.SIGTERM)
        assert [rank.wait(60) for rank in ranks] == [75, 75], "\n".join(rank.said for rank in ranks)
        checkpoint, state = load_newest(run_of(study).checkpoints)
        if state["validation_is_due"]:
            break
    assert (checkpoint.step, state["validation_is_due"]) == (4, True)
    assert run_ranks([*words, f"study={study}"], tmp_path, 2) == whole
    assert rows_of(study) == rows_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("seen", "error", "told"),
    [
        (["A100 GPU-1 of n1", "A100 GPU-1 of n1"], UserError, "ranks 0 and 1 have one GPU, A100 GPU-1 of n1: start as"),
        (["A100 GPU-1 of n1", ""], MeetingError, r"rank 1 on n1 sees no GPU and the other ranks do"),
        (["A100 GPU-1 of n1", "A100 GPU-2 of n1"], None, ""),
        (["", ""], None, ""),
    ],
)
def test_ranks_that_do_not_have_a_gpu_each_are_named_before_a_collective_meets_them(
    seen: list[str], error: type[Exception] | None, told: str
):
    class Two(Processes):
        def gather(self, value: T) -> list[T]:
            return [(gpu, "n1") for gpu in seen]  # type: ignore[misc]

    with nullcontext() if error is None else pytest.raises(error, match=told):
        _check_devices(Two(world_size=2), "auto")


def test_a_group_of_some_ranks_waits_as_long_as_that_of_all(monkeypatch: pytest.MonkeyPatch):
    made = []
    monkeypatch.setattr(distributed, "new_group", lambda *asked: made.append(asked) or len(made))
    assert Processes(rank=2, world_size=4, timeout=timedelta(hours=5)).subgroup(2) == 2
    assert made == [([0, 1], timedelta(hours=5)), ([2, 3], timedelta(hours=5))]


@pytest.mark.parametrize(
    ("error", "whatever_fails", "looks"),
    [
        (RuntimeError("[enforce fail at inline_container.cc] PytorchStreamWriter failed"), False, False),
        (RuntimeError("gloo: Connection closed by peer"), False, True),
        (RuntimeError("an error of autograd's"), True, True),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), True, False),
        (torch.OutOfMemoryError("CUDA out of memory"), True, False),
    ],
)
def test_a_lost_rank_is_looked_for_where_an_error_may_be_of_one(error: RuntimeError, whatever_fails: bool, looks: bool):
    looked = []

    class Looking:
        def mark(self) -> None:
            pass

        def find_lost(self, seconds: float) -> None:
            looked.append(seconds)

    processes = Processes(world_size=2, watch=Looking())  # type: ignore[arg-type]
    with pytest.raises(RuntimeError) as raised, processes.naming_the_lost(whatever_fails):
        raise error
    assert (raised.value is error, bool(looked)) == (True, looks)


def test_a_checkpoint_cut_into_parts_goes_on_as_it_was_written_and_no_other_way(tiny_run: list[str], tmp_path: Path):
    def words(name: str, steps: int, *more: str) -> list[str]:
        return [*tiny_run, f"study={tmp_path / name}", f"train.budget.steps={steps}", "deepspeed=zero2", *more]

    whole = run_ranks(words("whole", 8, "execution.checkpoint_every=4"), tmp_path, 2)
    run_ranks(words("cut", 8, "execution.checkpoint_every=4"), tmp_path, 2)
    run = run_of(tmp_path / "cut")
    for path in run.checkpoints.glob("step-00000008/*"):  # as if the second checkpoint had been damaged
        if path.is_file():
            path.unlink()
    for more, world_size in (((), 1), (("deepspeed=zero1",), 2), (("deepspeed=none",), 2)):
        ranks = start_ranks(words("cut", 8, *more), tmp_path, world_size)
        statuses = {rank.wait() for rank in ranks}
        assert 0 not in statuses
        assert "step-00000004 was written with deepspeed=zero2 by 2 processes; this is a run" in ranks[0].said
    assert run_ranks(words("cut", 8, "execution.checkpoint_every=4"), tmp_path, 2) == whole
    assert [event["event"] for event in run.read_events()].count("resumed") == 1


# --- nobody missing ------------------------------------------------------------------------


def test_a_rank_that_never_comes_is_named_in_time(tiny_run: list[str], tmp_path: Path):
    words = [*tiny_run, "execution.rendezvous_timeout=6"]
    ranks = start_ranks(words, tmp_path, 4, command="execute", ranks=[0, 2])
    assert [rank.wait(60) for rank in ranks] == [2, 2]
    for rank in ranks:
        assert "rank 1, 3 of 4 did not come to 127.0.0.1" in rank.said
        assert "Traceback" not in rank.said
    assert not list(tmp_path.glob("study/runs/*/metrics.jsonl"))


def test_an_address_that_does_not_resolve_or_answer_is_said_in_a_line(tiny_run: list[str], tmp_path: Path):
    words = [*tiny_run, "execution.rendezvous_timeout=5"]
    (nowhere,) = start_ranks(words, tmp_path, 2, command="execute", ranks=[1], host="no-such-node.invalid")
    (silent,) = start_ranks(words, tmp_path, 2, command="execute", ranks=[1], port=free_port())
    assert nowhere.wait(60) == 2
    assert "MASTER_ADDR = no-such-node.invalid does not resolve" in nowhere.said
    assert silent.wait(90) == 2
    assert "did not reach rank 0 at 127.0.0.1:" in silent.said
    assert "Traceback" not in nowhere.said + silent.said


def test_a_port_that_another_has_taken_is_no_fault_of_the_settings(monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        for name, value in zip(VARIABLES, ("0", "2", "0", "127.0.0.1", str(port)), strict=True):
            monkeypatch.setenv(name, value)
        with pytest.raises(MeetingError, match=f"cannot listen on 127.0.0.1:{port}") as raised:
            join(rendezvous_timeout=5, silence_timeout=5, step_timeout=5)
    assert classify(raised.value)[0] == "node failure", "it is tried again, at another port"


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("raises", r"on \S+ \(process \d+\) failed: the GPU is busy"),
        ("freezes", r"on \S+ \(process \d+\) has given no sign of life for \d+ s, last seen at joining"),
        ("freezes before its first sign", r"has come and given no sign of life in \d+ s"),
    ],
)
def test_a_rank_that_falls_out_between_the_meeting_and_the_group_is_named(tmp_path: Path, how: str, said: str):
    ranks = start_ranks([how], tmp_path, 2, command="fall out")
    assert ranks[0].wait(60) != 0
    assert re.search(f"rank 1 {said}", ranks[0].said), ranks[0].said


@pytest.mark.parametrize("norm_batch", [2, 4])
def test_ranks_that_all_live_and_wait_for_one_another_end_in_a_stated_time(
    tiny_run: list[str], tmp_path: Path, norm_batch: int
):
    """Rank 1 waits in the forward pass for statistics of rank 0 (4), or in the backward pass for its gradients (2)."""
    words = [*tiny_run, "train.budget.steps=4000", "execution.step_timeout=5", f"train.norm_batch={norm_batch}"]
    ranks = start_ranks(words, tmp_path, 2, command="hang at step 3")
    assert [rank.wait(60) for rank in ranks] == [76, 76], ranks[0].said
    assert "the ranks wait for one another without end" in ranks[0].said
    assert run_of(tmp_path / "study").state()[1]["failure"] == "node failure"


def test_a_rank_that_waits_for_one_that_does_not_come_hears_a_signal(tiny_run: list[str], tmp_path: Path):
    (rank,) = start_ranks(tiny_run, tmp_path, 2, command="execute", ranks=[1])
    wait_for(lambda: "run " in rank.said)
    time.sleep(2)
    os.kill(rank.pid, signal.SIGTERM)
    assert rank.wait(10) == 75, rank.said


def test_a_rank_that_is_interrupted_says_so_to_the_others(long_run: list[str], tmp_path: Path):
    ranks = start_and_meet(long_run, tmp_path, tmp_path / "study")
    os.kill(ranks[1].pid, signal.SIGINT)
    assert [rank.wait(60) for rank in ranks] == [76, 130], ranks[0].said
    assert "failed: preempted: interrupt" in ranks[0].said
    assert run_of(tmp_path / "study").state()[0] == "preempted"


def test_processes_with_different_settings_are_refused(tiny_run: list[str], tmp_path: Path):
    port = free_port()
    (first,) = start_ranks(tiny_run, tmp_path, 2, command="execute", ranks=[0], port=port)
    (second,) = start_ranks([*tiny_run, "seed=1"], tmp_path, 2, command="execute", ranks=[1], port=port)
    assert (first.wait(), second.wait()) == (2, 2)
    assert "were started with different settings" in first.said


def test_a_folder_with_another_run_is_refused_to_all_ranks_and_cleared_before_any_reads_it(
    tiny_run: list[str], tmp_path: Path
):
    run = RunDirectory(tmp_path / "mine")
    words = [*tiny_run, "train.budget.steps=3", "execution.metrics=[si_sdr]", f"run={run.path}"]
    ranks = start_ranks(words, tmp_path, 2, command="execute")
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].said
    records = run.metrics.read_bytes()
    ranks = start_ranks([*words, "seed=1"], tmp_path, 2, command="execute")
    assert [rank.wait(60) for rank in ranks] == [2, 2]
    assert ranks[0].said.count("error: ") == 1
    assert "mine holds another run (seed = 0 there and 1 here)" in ranks[0].said
    assert "Traceback" not in ranks[0].said + ranks[1].said
    assert run.metrics.read_bytes() == records
    ranks = start_ranks([*words, "seed=1", "force=true"], tmp_path, 2, command="execute")
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].said
    assert run.read_plan()["seed"] == 1
    assert [event["event"] for event in run.read_events()] == ["started", "checkpointed", "evaluating", "finished"]
    assert [row["step"] for row in run.read_metrics() if row["kind"] == "train"] == [1, 2, 3]


def test_a_batch_that_the_processes_cannot_share_is_refused_by_name(tiny_run: list[str], tmp_path: Path):
    ranks = start_ranks([*tiny_run, "execution.micro_batch=2"], tmp_path, 4, command="execute")
    assert {rank.wait() for rank in ranks} == {2}
    assert "2 micro-batches of 2 crops cannot be shared out to 4 processes" in ranks[0].said


# --- nobody waited for without end ---------------------------------------------------------


@pytest.mark.parametrize("harm", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_dies_or_freezes_is_named_and_ends_the_run(
    long_run: list[str], tmp_path: Path, lost: int, harm: signal.Signals
):
    ranks = start_and_meet(long_run, tmp_path, tmp_path / "study")
    started = time.monotonic()
    os.kill(ranks[lost].pid, harm)
    survivor = ranks[1 - lost]
    assert survivor.wait(60) == 76
    seconds = time.monotonic() - started
    ranks[lost].kill()
    assert seconds < 45
    assert f"rank {lost}" in survivor.said
    state, event = run_of(tmp_path / "study").state()
    assert (state, event["failure"]) == ("failed", "node failure")
    assert f"rank {lost}" in event["reason"]


def test_processes_part_though_the_groups_threads_are_still_busy(tmp_path: Path):
    ports = [str(free_port()) for _ in range(20)]
    ranks = start_ranks(ports, tmp_path, 2, command="meet and part")
    assert [rank.wait(60) for rank in ranks] == [0, 0], ranks[0].said


def test_the_shortest_silence_that_may_be_set_is_longer_than_a_suspension_between_two_signs(
    monkeypatch: pytest.MonkeyPatch,
):
    now = 0.0
    monkeypatch.setattr("scaling.own_time.time.monotonic", lambda: now)
    lived = OwnTime()
    for seconds in (1, 1, 3600, 1, 1):  # a sign, an hour's suspension on the way to the next
        now += seconds
        lived()
    assert lived() == 5
    with pytest.raises(UserError, match=r"execution.silence_timeout = 4.9: expected at least 5 seconds"):
        ExecutionConfig(silence_timeout=4.9)
    assert SECONDS_BETWEEN_SIGNS + 2 * OwnTime.LONGEST_PAUSE < 5


def test_a_run_that_is_suspended_whole_goes_on_when_it_is_resumed(long_run: list[str], tmp_path: Path):
    """As SLURM suspends jobs, for longer than silence, reading and a collective are borne."""
    ranks = start_and_meet([*long_run, "execution.step_timeout=5"], tmp_path, tmp_path / "study")
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for rank in ranks:
            os.kill(rank.pid, number)
        if number == signal.SIGSTOP:
            steps = len(rows_of(tmp_path / "study"))
            time.sleep(12)
    wait_for(lambda: len(rows_of(tmp_path / "study")) > steps + 5)
    os.kill(ranks[1].pid, signal.SIGTERM)
    assert [rank.wait() for rank in ranks] == [75, 75], ranks[0].said


@pytest.mark.parametrize("harm", [signal.SIGKILL, signal.SIGSTOP])
def test_a_loader_worker_that_dies_or_freezes_is_named_and_ends_the_run(
    long_run: list[str], tmp_path: Path, harm: signal.Signals
):
    words = [*long_run, "execution.num_workers=2", "execution.step_timeout=8"]
    ranks = start_and_meet(words, tmp_path, tmp_path / "study")
    children = psutil.Process(ranks[1].pid).children()
    worker = next(child for child in children if "resource_tracker" not in " ".join(child.cmdline()))
    os.kill(worker.pid, harm)
    statuses = [rank.wait(60) for rank in ranks]
    assert 0 not in statuses
    assert str(worker.pid) in ranks[1].said
    assert "rank 1" in ranks[0].said
    state, event = run_of(tmp_path / "study").state()
    assert (state, event["failure"]) == ("failed", "node failure")


def test_a_validation_whose_storage_hangs_ends_the_run_in_a_stated_time(
    tiny_run: list[str], tiny_index: ShardIndex, tmp_path: Path
):
    shards = tmp_path / "shards"
    shutil.copytree(tiny_index.root, shards)
    words = [*tiny_run, f"data.shards={shards}", "train.budget.steps=40", "execution.num_validations=1"]
    (rank,) = start_and_meet([*words, "execution.step_timeout=5"], tmp_path, tmp_path / "study", world_size=1)
    for tar in shards.glob("validation-*.tar"):
        tar.unlink()
        os.mkfifo(tar)  # whose opening waits
    assert rank.wait(60) == 76, rank.said
    state, event = run_of(tmp_path / "study").state()
    assert (state, event["failure"]) == ("failed", "node failure")
    assert "rank 0 has been reading one batch or clip for 5 s" in event["reason"]


def test_a_signal_to_one_rank_stops_all_with_a_checkpoint_and_the_run_goes_on_the_same(
    tiny_run: list[str], tmp_path: Path
):
    def words(name: str) -> list[str]:
        return [*tiny_run, f"study={tmp_path / name}", "train.budget.steps=60", "execution.checkpoint_every=1000"]

    whole = run_ranks(words("whole"), tmp_path, 2)
    for number in (signal.SIGUSR1, signal.SIGTERM):
        ranks = start_and_meet(words("stopped"), tmp_path, tmp_path / "stopped")
        os.kill(ranks[1].pid, number)
        assert [rank.wait() for rank in ranks] == [75, 75], ranks[0].said
        assert run_of(tmp_path / "stopped").state()[0] == "preempted"
    assert run_ranks(words("stopped"), tmp_path, 2) == whole
    assert rows_of(tmp_path / "stopped") == rows_of(tmp_path / "whole")
    kinds = [event["event"] for event in run_of(tmp_path / "stopped").read_events()]
    assert kinds.count("preempted") == 2
    assert kinds.count("resumed") == 2


def test_a_rank_that_fails_tells_the_others_why(tiny_run: list[str], tiny_index: ShardIndex, tmp_path: Path):
    """One of two ranks meets a shard that ends too early: the other says which and why, once on record."""
    shards = tmp_path / "shards"
    shutil.copytree(tiny_index.root, shards)
    port = free_port()
    words = [*tiny_run, f"data.shards={shards}", "train.budget.steps=4000"]
    (first,) = start_ranks([*tiny_run, "train.budget.steps=4000"], tmp_path, 2, command="execute", ranks=[0], port=port)
    (second,) = start_ranks(words, tmp_path, 2, command="execute", ranks=[1], port=port)
    wait_for(lambda: list(tmp_path.glob("study/runs/*/metrics.jsonl")))
    for tar in shards.glob("train-*.tar"):
        os.truncate(tar, 512)
    assert second.wait() != 0
    assert first.wait() == 76
    assert "rank 1" in first.said
    assert "failed: bad data" in first.said
    failures = [event for event in run_of(tmp_path / "study").read_events() if event["event"] == "failed"]
    assert [failure["failure"] for failure in failures] == ["bad data"]
    assert failures[0]["rank"] == 1


def test_ranks_that_wait_in_vain_before_the_run_has_begun_end_with_a_line(tiny_run: list[str], tmp_path: Path):
    run = RunDirectory(tmp_path / "mine")
    run.path.mkdir()
    os.mkfifo(run.plan)  # rank 0 reads the plan that the folder holds, and waits
    words = [*tiny_run, f"run={run.path}", "execution.step_timeout=5", "execution.silence_timeout=60"]
    ranks = start_ranks(words, tmp_path, 2, command="execute")
    assert [rank.wait(90) for rank in ranks] == [76, 76], "\n".join(rank.said for rank in ranks)
    for rank in ranks:
        assert "the ranks wait for one another without end" in rank.said
        assert "Traceback" not in rank.said
