"""Runs on this machine: which GPUs they are given, and what ends them or is said of their end."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch import display, local
from launch.config import ClusterConfig
from launch.display import RunsDisplay
from launch.local import Interrupts, LocalJob, run_locally
from launch.task import RunTask
from scaling.cli import load_config
from scaling.config import RunConfig
from scaling.errors import UnreachableError, UserError
from scaling.plan import RunPlan, plan_run
from scaling.records import read_records
from scaling.shards import ShardIndex


@pytest.fixture(autouse=True)
def _tests_do_not_end_as_a_job_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.task.end_at_exit", lambda status: None)


@pytest.fixture
def plans(tiny_run: list[str], tiny_index: ShardIndex) -> list[RunPlan]:
    return [plan_run(load_config(RunConfig, "run", [*tiny_run, f"seed={seed}"]), tiny_index) for seed in range(4)]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, tuple[str, ...]]]:
    """(seed, slot, GPUs) of the runs that were started; none of them runs, and each is over at the next look."""
    calls = []

    class Over(LocalJob):
        def is_done(self) -> bool:
            return True

    def submit(plan: RunPlan, slot: int, threads: int, num_processes: int, gpus: list[str]) -> LocalJob:
        calls.append((plan.config.seed, slot, tuple(gpus)))
        return Over(plan, slot, None)

    monkeypatch.setattr(local, "_submit", submit)
    monkeypatch.setattr(local, "_record_silent_end", lambda job: None)
    monkeypatch.setattr(local, "SECONDS_BETWEEN_LOOKS", 0)
    return calls


def test_every_run_has_a_gpu_of_its_own(plans, started, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    run_locally(plans, plans, ClusterConfig("local"), lambda: None)
    assert started == [(0, 0, ("GPU-a",)), (1, 1, ("GPU-b",)), (2, 0, ("GPU-a",)), (3, 1, ("GPU-b",))]


def test_a_run_on_the_cpu_is_shown_no_gpu(tiny_run, tiny_index, started, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    plan = plan_run(load_config(RunConfig, "run", [*tiny_run, "execution.device=cpu"]), tiny_index)
    run_locally([plan], [plan], ClusterConfig("local"), lambda: None)
    assert started == [(0, 0, ())]


def test_a_run_that_an_earlier_sweep_started_keeps_its_gpu(plans, started, monkeypatch: pytest.MonkeyPatch):
    """The first run ended; the second, on the second GPU, lives and is taken up: the next ones go to the first."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    looks = iter([True, True, True, False])
    monkeypatch.setattr(local, "is_alive", lambda plan: plan is plans[1] and next(looks, False))
    plans[1].write().log_event("submitted", job="1", executor="local", log="", slot=1)
    run_locally(plans[1:], plans, ClusterConfig("local"), lambda: None)
    assert started == [(2, 0, ("GPU-a",)), (3, 0, ("GPU-a",))]


def test_more_processes_than_gpus_are_refused_before_any_run_starts(plans, started, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(UserError, match="has 2 processes, and this machine 1 GPUs, of which each needs one"):
        run_locally(plans, plans, ClusterConfig("local", processes_per_node=2), lambda: None)
    assert not started


@pytest.fixture
def asked() -> Iterator[None]:
    """The signals reach this process, even where the tests were started with nohup or in a shell's background."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    assert {number: signal.getsignal(number) for number in handlers} == handlers, "left as they were found"
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def deaf_run(plans) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the first run's lock and does not hear that it is to save and stop."""
    script = """
import signal, sys, time
from pathlib import Path
from scaling.locks import held_lock
signal.signal(signal.SIGTERM, signal.SIG_IGN)
with held_lock(Path(sys.argv[1]), ""):
    print("held", flush=True)
    time.sleep(600)
"""
    lock = plans[0].write().lock
    with subprocess.Popen([sys.executable, "-c", script, lock], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "held\n"
        yield run
        run.kill()


def test_a_run_that_has_not_saved_by_the_deadline_is_killed(plans, deaf_run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(local, "SECONDS_TO_SAVE", 0.5)
    with Interrupts() as interrupts:
        local._stop([LocalJob(plans[0], 0, None)], interrupts)
    deaf_run.wait(5)


def test_a_second_interrupt_kills_the_runs_on_whatever_line_it_comes(
    plans, deaf_run, asked, monkeypatch: pytest.MonkeyPatch
):
    class Pressed:
        """A terminal in which Ctrl-C is pressed the moment that it says what a second one does."""

        def write(self, text: str) -> None:
            if "a second interrupt" in text:
                signal.raise_signal(signal.SIGINT)

        def flush(self) -> None:
            pass

    monkeypatch.setattr(sys, "stderr", Pressed())
    begun = time.monotonic()
    with Interrupts() as interrupts:
        local._stop([LocalJob(plans[0], 0, None)], interrupts)
    deaf_run.wait(5)
    assert time.monotonic() - begun < local.SECONDS_TO_SAVE / 2


@pytest.mark.parametrize(
    ("again", "is_killed"), [(signal.SIGHUP, False), (signal.SIGTERM, True), (signal.SIGINT, True)]
)
def test_who_asks_again_ends_the_runs_and_a_terminal_that_goes_twice_does_not(
    plans, deaf_run, asked, monkeypatch: pytest.MonkeyPatch, again: signal.Signals, is_killed: bool
):
    monkeypatch.setattr(local, "SECONDS_TO_SAVE", 3.0)
    monkeypatch.setattr(local, "SECONDS_OF_ECHO", 0.2)
    begun = time.monotonic()
    with Interrupts() as interrupts:
        for _ in range(2):  # as timeout(1) sends its own
            os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.count == 1
        timer = threading.Timer(0.5, os.kill, (os.getpid(), again))
        timer.start()
        local._stop([LocalJob(plans[0], 0, None)], interrupts)
        timer.join()
    assert (time.monotonic() - begun < local.SECONDS_TO_SAVE) == is_killed
    deaf_run.wait(5)


def test_runs_whose_controllers_have_not_started_them_yet_are_not_left_to_begin(
    plans, asked, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    (tmp_path / "sitecustomize.py").write_text("import time\ntime.sleep(4)\n")  # a Python that is slow to begin
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.getcwd()}")
    plan = plans[0]
    plan.write()
    begun: list[LocalJob] = []
    submit = local._submit

    def submit_and_interrupt(*args: Any) -> LocalJob:
        begun.append(submit(*args))
        signal.raise_signal(signal.SIGINT)
        return begun[0]

    monkeypatch.setattr(local, "_submit", submit_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_locally([plan], [plan], ClusterConfig("local", max_parallel=1), lambda: None)
    assert begun[0].job is not None
    assert not local.is_alive(plan), "neither its controller nor the run"
    assert not plan.directory.read_metrics()


def test_a_number_that_a_process_of_another_study_has_now_names_no_job_of_this_one(plans, tmp_path: Path):
    def starts(jobs: Path) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "submitit.local._local", jobs])

    for jobs, is_own in ((plans[0].directory.jobs, True), (tmp_path / "another", False)):
        controller = starts(jobs)
        try:
            plans[0].write().log_event("submitted", job=str(controller.pid), executor="local")
            assert local.is_alive(plans[0]) == is_own
        finally:
            controller.kill()
            controller.wait()


def test_a_signal_before_a_run_has_begun_is_not_passed_over(plans, monkeypatch: pytest.MonkeyPatch):
    """While it loads what it needs; submitit's own handler only says that it has heard it."""
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    monkeypatch.setattr("scaling.run.execute", lambda plan, stop: 0)
    monkeypatch.setattr("launch.task.export_local_ranks", lambda port: os.kill(os.getpid(), signal.SIGTERM))
    try:
        assert RunTask(plans[0], port=1)() == 75
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not heard


def test_a_run_shows_its_processes_the_gpus_that_are_its_own(plans, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as submitit leaves it
    seen = []
    monkeypatch.setattr("scaling.run.execute", lambda plan, stop: seen.append(local.os.environ["CUDA_VISIBLE_DEVICES"]))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    RunTask(plans[0])()
    RunTask(plans[0], gpus=("GPU-a", "GPU-b"))()
    assert seen == ["", "GPU-a,GPU-b"]


def test_a_run_whose_gpus_torch_cannot_use_fails_on_record_and_does_not_train_on_the_cpu(
    plans, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("scaling.run.execute", lambda plan, stop: pytest.fail("it trains"))
    with pytest.raises(UnreachableError, match=r"torch sees no GPU on \S+, where the job has 1 a node: it is built"):
        RunTask(plans[0], gpus=("0",))()
    (failed,) = plans[0].directory.read_events()
    assert (failed["event"], failed["failure"]) == ("failed", "node failure")
    assert "check the driver and the container (--nv), install a torch build for that driver" in failed["reason"]
    assert "\n" not in failed["reason"]
    local._record_silent_end(LocalJob(plans[0], 0, None))
    assert len(plans[0].directory.read_events()) == 1, "the reason stays the last word"
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UnreachableError):
        RunTask(plans[1], gpus=("0", "1"))()
    assert not plans[1].directory.read_events(), "rank 0 says it"


def test_a_finished_run_on_a_gpu_puts_its_speed_on_record_unless_it_shared_the_gpu(
    plans, started, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr("launch.costs.model_of", lambda gpus: "A100")
    speeds = tmp_path / "throughput.jsonl"
    for plan in plans[:3]:
        for step in (1, 2, 3):
            plan.write().log_metrics("train", step, audio_seconds_per_second=10.0 * step)
        plan.directory.log_event("finished" if plan is not plans[2] else "preempted")
    run_locally(plans[:3], plans[:3], ClusterConfig("local", max_parallel=3, throughput=str(speeds)), lambda: None)
    assert not speeds.exists()
    run_locally(plans[:3], plans[:3], ClusterConfig("local", throughput=str(speeds)), lambda: None)
    rows = list(read_records(speeds))
    assert [row["source"] for row in rows] == [f"run {plan.run_id}" for plan in plans[:2]]
    assert {row["audio_seconds_per_second"] for row in rows} == {25.0}  # the first step warms up
    assert rows[0]["shape"] == {"executor": "local", "gpus_per_node": 1, "gpu": "A100"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    run_locally(plans[:2], plans[:2], ClusterConfig("local", throughput=str(speeds)), lambda: None)
    assert list(read_records(speeds)) == rows


@pytest.mark.parametrize("fault", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, ValueError])
def test_an_interrupt_stops_the_runs_and_a_fault_of_the_sweep_leaves_them(
    plans, started, asked, monkeypatch: pytest.MonkeyPatch, fault: signal.Signals | type[ValueError]
):
    stopped: list[LocalJob] = []
    monkeypatch.setattr(local, "_stop", lambda jobs, interrupts: stopped.extend(jobs))

    def show() -> None:
        if not isinstance(fault, signal.Signals):
            raise fault
        signal.raise_signal(fault)

    class Endless(LocalJob):
        def is_done(self) -> bool:
            return False

    monkeypatch.setattr(local, "_submit", lambda plan, slot, *_: Endless(plan, slot, None))
    is_stopped = isinstance(fault, signal.Signals)
    with pytest.raises(KeyboardInterrupt if is_stopped else ValueError):
        run_locally(plans[:1], plans[:1], ClusterConfig("local", max_parallel=1), show)
    assert [job.plan for job in stopped] == (plans[:1] if is_stopped else [])


def test_records_that_cannot_be_read_for_a_moment_are_told_once_and_end_no_sweep(
    plans, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def away(*_: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle", "metrics.jsonl")

    with RunsDisplay(plans) as view:
        monkeypatch.setattr(display, "look", away)
        view.show()
        view.show()
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "Stale file handle: 'metrics.jsonl'): looking again" in caplog.text
        monkeypatch.undo()
        view.show()
        monkeypatch.setattr(display, "look", away)
    assert len(caplog.records) == 2, "told again, and the end of a sweep is not in its way either"


@pytest.mark.parametrize(
    ("said", "returned", "state"),
    [(["preempted"], [75], "preempted"), ([], [75, 75], "preempted"), ([], [], "failed")],
)
def test_a_run_that_saved_and_stopped_is_not_taken_for_one_that_was_killed(
    plans, said: list[str], returned: list[int], state: str
):
    run = plans[0].write()
    run.log_event("submitted", job="1", executor="local", log="", slot=0)
    run.log_event("started", step=0)
    for event in said:
        run.log_event(event, reason="SIGTERM")
    local._record_silent_end(LocalJob(plans[0], 0, SimpleNamespace(results=lambda: returned)))  # type: ignore[arg-type]
    assert run.state()[0] == state
