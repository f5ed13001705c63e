"""Runs on this machine: submitit's local executor, as many at once as the machine carries.

Every run is a process of its own with its share of the cores, or a GPU of its own. The
processes outlive a sweep that is killed; the sweep's next call finds them by their runs'
locks and waits for them.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import psutil
import submitit

from launch.config import ClusterConfig
from launch.costs import Costs
from launch.task import RunTask
from launch.throughput import record_run
from scaling.cores import num_cores
from scaling.errors import UserError
from scaling.gpus import visible_gpus
from scaling.locks import holder, is_locked
from scaling.plan import RunPlan
from scaling.ports import free_port
from scaling.records import newest_event
from scaling.statuses import PREEMPTED

log = logging.getLogger(__name__)

NO_TIME_LIMIT_MINUTES = 366 * 24 * 60
SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_TO_SAVE = 120.0  # as cluster.signal_seconds on SLURM: for a step or a validation under way, and the checkpoint
SECONDS_TO_DIE = 8.0
SECONDS_OF_ECHO = 1.0


@dataclass
class LocalJob:
    plan: RunPlan
    slot: int
    job: submitit.Job | None  # None: started by an earlier sweep, known by its lock alone

    def is_done(self) -> bool:
        return self.job.done() if self.job is not None else not is_alive(self.plan)

    @property
    def log(self) -> Path | None:
        return last_log(self.plan)


class Interrupts:
    """A context in which Ctrl-C, and what else asks this process to end, only leaves word: breaks in nowhere.

    A second one could else meet `_stop` on a line after which nobody would kill the runs any more.
    """

    def __init__(self) -> None:
        self.count = 0  # without echoes: a terminal that goes, and timeout(1), send theirs twice
        self._last = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has the last
                self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        is_soon = now - self._last < SECONDS_OF_ECHO
        is_echo = self.count > 0 and (number == signal.SIGHUP or (number == signal.SIGTERM and is_soon))
        self._last = now
        self.count += not is_echo


def is_alive(plan: RunPlan) -> bool:
    """Whether a process of this machine executes the run, or has been started to."""
    return is_locked(plan.directory) or _controller(plan) is not None


def _controller(plan: RunPlan) -> psutil.Process | None:
    """Submitit's process that starts those of a run on this machine and waits for them; the job is named by it."""
    submitted = newest_event(plan.directory.event_lines(), "submitted")
    if submitted.get("executor") == "local":
        with contextlib.suppress(psutil.Error, ValueError):
            process = psutil.Process(int(submitted["job"]))
            # Numbers come again, and what has this one now may be of another study: submitit is told the jobs' folder.
            return process if str(plan.directory.jobs.absolute()) in process.cmdline() else None
    return None


def last_log(plan: RunPlan) -> Path | None:
    """Where the run's newest job writes."""
    logs = [event.get("log") for event in plan.directory.read_events() if event.get("event") == "submitted"]
    return Path(logs[-1]) if logs and logs[-1] else None


def run_locally(
    todo: Sequence[RunPlan], planned: Sequence[RunPlan], cluster: ClusterConfig, show: Callable[[], None]
) -> None:
    """Bring all of `todo` to their end, in the order given; one that fails leaves the others running.

    planned: the runs of the whole sweep; how many run at once and with how many threads follows from them and
        not from those that are left, so a run that goes on later computes as it did before
    show: called every half second, to show how far the runs are
    An interrupt ends the runs too, once they have saved (a second one at once), and is KeyboardInterrupt then; they go
    on from there at the next call. What else ends the caller leaves them running, and the next call finds them.
    """
    takes_gpu = {plan.run_id: plan.config.execution.device != "cpu" for plan in planned}
    gpus = visible_gpus() if any(takes_gpu.values()) else []
    sizes = {plan.run_id: cluster.for_run(plan.config.model.name, plan.axes).num_processes for plan in planned}
    most = max(sizes.values(), default=1)
    for run_id, size in sizes.items():
        if gpus and takes_gpu[run_id] and size > len(gpus):
            raise UserError(
                f"run {run_id} has {size} processes, and this machine {len(gpus)} GPUs, of which each needs one: take "
                "fewer processes, or execution.device=cpu for all runs"
            )
    num_slots = cluster.max_parallel or max(1, (len(gpus) or min(len(planned) * most, num_cores())) // most)
    # Of runs that have their GPUs to themselves; others may be slower.
    costs = Costs(cluster) if gpus and num_slots * most <= len(gpus) else None
    threads = max(1, num_cores() // (min(num_slots, len(planned)) * most))  # of each process, in all runs the same
    adopted = [plan for plan in todo if is_alive(plan)]
    waiting = deque(plan for plan in todo if plan not in adopted)
    running: list[LocalJob] = []
    for plan in adopted:
        running.append(LocalJob(plan, _slot_of(plan, {job.slot for job in running}), None))
    with Interrupts() as interrupts:
        while (waiting or running) and not interrupts.count:
            while waiting and len(running) < num_slots and not interrupts.count:
                slot = next(slot for slot in range(num_slots) if slot not in {job.slot for job in running})
                plan = waiting.popleft()
                size = sizes[plan.run_id]
                has_gpus = gpus and takes_gpu[plan.run_id]
                own = [gpus[(slot * most + rank) % len(gpus)] for rank in range(size)] if has_gpus else []
                running.append(_submit(plan, slot, threads, size, own))
            time.sleep(SECONDS_BETWEEN_LOOKS)
            for job in [job for job in running if job.is_done()]:
                running.remove(job)
                _record_silent_end(job)
                if costs is not None:
                    _record_speed(job.plan, costs)
            show()
        if interrupts.count:
            _stop(running, interrupts)
    if interrupts.count:
        raise KeyboardInterrupt


def _slot_of(plan: RunPlan, taken: set[int]) -> int:
    """The slot in which an earlier sweep started a run, and with it the run's GPUs; another if that is taken."""
    said = newest_event(plan.directory.event_lines(), "submitted").get("slot")
    if isinstance(said, int) and said not in taken:
        return said
    return next(slot for slot in itertools.count() if slot not in taken)


def _submit(plan: RunPlan, slot: int, threads: int, num_processes: int, gpus: Sequence[str]) -> LocalJob:
    """Start a run's processes, each with so many threads, and with the GPUs that are theirs."""
    executor = submitit.LocalExecutor(folder=plan.directory.jobs)
    # Submitit knows GPUs by number alone: it is to hide them all, and RunTask shows the run its own again.
    executor.update_parameters(timeout_min=NO_TIME_LIMIT_MINUTES, tasks_per_node=num_processes, gpus_per_node=0)
    # Read by the OpenMP runtime when the job starts: cores are shared out, not fought for.
    os.environ["OMP_NUM_THREADS"] = str(plan.config.execution.threads or threads)
    # The job's processes inherit that an interrupt is ignored: Ctrl-C in a terminal reaches them all, and would end
    # them before they have saved. This process tells them to (see `_stop`).
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        port = free_port("127.0.0.1") if num_processes > 1 else None
        job = executor.submit(RunTask(plan, threads, port=port, gpus=tuple(gpus)))
    finally:
        signal.signal(signal.SIGINT, handler)
    plan.directory.log_event("submitted", job=job.job_id, executor="local", log=str(job.paths.stderr), slot=slot)
    return LocalJob(plan, slot, job)


def _stop(jobs: Sequence[LocalJob], interrupts: Interrupts) -> None:
    """Tell runs to save and stop; kill those that have not in two minutes, or when asked again meanwhile."""
    num_asked = interrupts.count
    deadline = time.monotonic() + SECONDS_TO_SAVE
    told: set[psutil.Process] = set()
    while True:
        controllers: set[psutil.Process] = set()
        processes: set[psutil.Process] = set()
        for plan in (job.plan for job in jobs):
            if (controller := _controller(plan)) is not None:
                controllers.add(controller)
            processes |= (own := _processes(plan, controller))
            for process in own - told if is_locked(plan.directory) else own:  # one that loads may not have heard
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.terminate()
        alive = [process for process in controllers | processes | told if _has_not_ended(process)]
        if alive and not told:
            _tell_that_they_stop(len(jobs))
        told |= processes
        if not alive or time.monotonic() > deadline or interrupts.count > num_asked:
            break
        psutil.wait_procs(alive, timeout=SECONDS_BETWEEN_LOOKS)
    for process in [*controllers, *alive]:  # first what could start others
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=SECONDS_TO_DIE)


def _processes(plan: RunPlan, controller: psutil.Process | None) -> set[psutil.Process]:
    """What executes a run, or, before there is any of that, what is about to start it."""
    if controller is None:
        process = holder(plan.directory.lock)
        return set() if process is None else {process}
    with contextlib.suppress(psutil.Error):
        return set(controller.children()) or {controller}
    return set()


def _has_not_ended(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE  # a container may have nobody to reap
    return False


def _tell_that_they_stop(num_runs: int) -> None:
    count = f"{num_runs} run{'s' * (num_runs != 1)}"
    with contextlib.suppress(OSError):  # the terminal may have gone
        print(f"told {count} to save and stop; a second interrupt stops them at once", file=sys.stderr, flush=True)


def _record_silent_end(job: LocalJob) -> None:
    """A process that was killed cannot say so itself."""
    directory = job.plan.directory
    if directory.state()[0] in ("finished", "failed", "preempted") or is_locked(directory):
        return
    if _stopped_before_it_began(job):
        directory.log_event("preempted", reason="it was told to stop before it had begun")
        return
    last_line = _last_line(job.log) if job.log is not None else ""
    directory.log_event(
        "failed",
        failure="node failure",
        reason="its process ended without recording a reason: killed from outside, or out of memory"
        + (f"; its log ends: {last_line}" if last_line else ""),
        **({"log": str(job.log)} if job.log is not None else {}),
    )


def _record_speed(plan: RunPlan, costs: Costs) -> None:
    """Put on record how fast a run on GPUs went, once it has finished."""
    shape = costs.filed_as(plan)
    if shape is None or plan.directory.state()[0] != "finished":
        return
    path = Path(costs.cluster.throughput)
    try:
        record_run(path, plan.directory, plan.to_record(), shape)
    except OSError as error:  # which is in no run's way
        log.warning("%s: the speed of run %s could not be put on record (%s)", path, plan.run_id, error)


def _stopped_before_it_began(job: LocalJob) -> bool:
    with contextlib.suppress(Exception):  # what submitit raises for a job without results
        return job.job is not None and PREEMPTED in job.job.results()
    return False


def _last_line(path: Path) -> str:
    try:
        lines = path.read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1][-300:] if lines else ""
