"""A scaling study from one command.

    python -m launch.sweep +sweep=sizes                         sizes on the demo corpus, on this machine
    python -m launch.sweep +sweep=sizes dry_run=true            print the table of runs and stop
    python -m launch.sweep +sweep=grid data=vbd train=fastenhancer cluster=slurm

Composes the cells of conf/sweep/NAME.yaml, plans and prints them, executes those that are not
finished, and on this machine waits for them and writes the report. The same command again
executes nothing that is finished and goes on with what was cut off. A failed run is tried
again; one that diverged is a result and is not. On this machine Ctrl-C, or launch.cancel, ends the runs once they have
saved, within two minutes; a second one ends them at once.

Exit status: 0 all runs finished (or were submitted), 1 a run failed, 2 a mistake in the input, 75 SLURM's queue took
no more jobs: run it again when some have ended, 130 interrupted.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType

from rich.console import Console

from launch.arrays import Submitted, submit_to_slurm
from launch.config import StudyConfig
from launch.costs import Costs
from launch.display import RunsDisplay
from launch.local import last_log, run_locally
from launch.planning import load_study, plan_study, plan_table, why_none_can_start, write_plan
from launch.queue import QueuedJob, read_queue
from launch.slurm import require_slurm
from launch.submission import last_job, reconcile, require_own
from scaling.cli import CONFIG_FOLDER
from scaling.command import run_main
from scaling.errors import UserError
from scaling.locks import HeldLockError, held_lock
from scaling.plan import RunPlan, require_writable
from scaling.records import RecordError, StudyDirectory

SECONDS_TO_WAIT = 120.0  # for another sweep's submission to SLURM


def main(words: list[str]) -> int:
    words = [_spelt_for_hydra(word) for word in words]
    if not any(word.startswith("+sweep=") for word in words):
        sweeps = sorted(path.stem for path in (CONFIG_FOLDER / "sweep").glob("*.yaml"))
        raise UserError(f"no sweep named: give +sweep=NAME, one of {', '.join(sweeps)} (the files of conf/sweep)")
    config = load_study(words)
    study = StudyDirectory(Path(config.study))
    gc.disable()  # plans are no garbage: looking for some among thousands of them takes a quarter of the time
    try:
        plans = plan_study(config, words)
    finally:
        gc.freeze()
        gc.enable()
    console = Console(width=None if sys.stdout.isatty() else 160, markup=False, emoji=False)
    console.print(plan_table(plans, config.cluster))
    if config.dry_run:
        return 0
    if told := why_none_can_start(plans):
        raise UserError(told)
    if config.cluster.executor == "slurm":
        require_slurm()
    require_writable(study.path, "name another folder with study=DIR")
    with _lock_of(study, config) as lock:
        return _execute(study, plans, config, lock)


@contextmanager
def _lock_of(study: StudyDirectory, config: StudyConfig) -> Iterator[int]:
    """One sweep at a time; a submission is over in moments, so another waits for it."""
    deadline = time.monotonic() + (SECONDS_TO_WAIT if config.cluster.executor == "slurm" else 0)
    with ExitStack() as stack:
        while True:
            try:
                lock = stack.enter_context(held_lock(study.lock, f"study {study.path} is being swept"))
                break
            except HeldLockError:
                if time.monotonic() > deadline:
                    raise
        yield lock


def _execute(study: StudyDirectory, plans: Sequence[RunPlan], config: StudyConfig, lock: int) -> int:
    """Write the plan, bring what is not settled to its end (or submit it), report."""
    _tell_other_runs(study, plans)
    for plan in plans:
        if plan.config.train.test and plan.directory.is_settled():  # a quick check starts anew every time
            plan.directory.clear()
    settled = [plan.directory.is_settled() for plan in plans]
    todo = [plan for plan, is_settled in zip(plans, settled, strict=True) if not is_settled]
    _tell_other_execution([plan for plan, is_settled in zip(plans, settled, strict=True) if is_settled])
    print(f"{len(plans) - len(todo)} of {len(plans)} runs are complete (finished or diverged), {len(todo)} to run")
    if todo and config.cluster.executor == "slurm":
        return _submit(study, plans, todo, config, lock)
    Costs(config.cluster).require_within(todo, config.launch.max_gpu_hours)
    write_plan(study, plans)
    if todo:
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
                signal.signal(number, _interrupt)
        with RunsDisplay(todo) as display:
            assert config.sweep is not None
            # Where speed is what is studied, runs side by side would slow one another.
            cluster = replace(config.cluster, max_parallel=1) if config.sweep.compares_execution else config.cluster
            run_locally(todo, plans, cluster, display.show)
    is_reported = _report(study)
    return max(_tell_failures(plans), 0 if is_reported else 1)


def _spelt_for_hydra(word: str) -> str:
    """Hydra wants a plus before what the configuration does not name yet; a new axis should not need one."""
    if word.startswith(("sweep.", "cluster.sizes", "cluster.additional_parameters")):
        return f"++{word}"
    return f"+{word}" if word.startswith("sweep=") else word


def _submit(
    study: StudyDirectory, plans: Sequence[RunPlan], todo: Sequence[RunPlan], config: StudyConfig, lock: int
) -> int:
    require_own(study)
    queue = read_queue()
    reconcile(study, queue)
    missing = [plan for plan in todo if not _is_live(plan, queue)]
    Costs(config.cluster).require_within(missing, config.launch.max_gpu_hours)
    if missing or not _is_on_record(study, plans):
        write_plan(study, plans)
    done = submit_to_slurm(study, missing, config.cluster, lock) if missing else Submitted()
    left_out = len(missing)
    for submission in done.arrays:
        count = len(submission.run_ids())
        left_out -= count
        print(f"submitted {count} run{'s' if count > 1 else ''} as job array {submission.job}_[0-{count - 1}]")
    if len(missing) < len(todo):
        print(f"{len(todo) - len(missing)} runs are already queued or running")
    print(f"status:   python -m launch.status study={study.path}   (--watch refreshes it)")
    print(f"logs:     python -m launch.logs RUN study={study.path}")
    print(f"to stop:  python -m launch.cancel study={study.path}")
    print("the same command again resubmits lost runs (none twice) and, once all are done, writes the report")
    if done.full:
        print(f"{left_out} of {len(plans)} runs are not queued: {done.full}", file=sys.stderr)
        return os.EX_TEMPFAIL
    return 0


def _is_on_record(study: StudyDirectory, plans: Sequence[RunPlan]) -> bool:
    return study.plan.exists() and study.read_run_ids() == [plan.run_id for plan in plans]


def _is_live(plan: RunPlan, queue: Mapping[str, QueuedJob]) -> bool:
    job = queue.get(last_job(plan.directory) or "")
    return job is not None and job.is_live


def _tell_other_runs(study: StudyDirectory, plans: Sequence[RunPlan]) -> None:
    others = {path.name for path in study.runs.glob("*")} - {plan.run_id for plan in plans}
    if others:
        print(
            f"{study.path} holds {len(others)} runs of earlier plans that this sweep does not name: they stay, but its "
            "table is of this plan alone; widen the axes to have both, or give another study=DIR"
        )


def _tell_other_execution(complete: Sequence[RunPlan]) -> None:
    """Of runs that are not executed again, though the command line now asks for another execution than they had."""
    count, told = 0, list[str]()
    for plan in complete:
        with suppress(RecordError, KeyError, TypeError):  # of another version; what is damaged the report tells
            there = plan.directory.read_plan()["config"]["execution"]
            here = vars(plan.config.execution)  # what is null is left to whoever executes the run
            changed = [key for key in here if here[key] is not None and here[key] != there.get(key, here[key])]
            count += bool(changed)
            told += [f"execution.{key} = {there[key]} and not {here[key]}" for key in changed]
    if told:
        runs = f"{count} complete run{'s' * (count > 1)}"
        print(f"of {runs} {'; '.join(dict.fromkeys(told))}: they stay so; to have them anew, give another study=DIR")


def _report(study: StudyDirectory) -> bool:
    """In a process of its own: the analysis imports nothing of this room, nor this room of it."""
    sys.stdout.flush()
    done = subprocess.run([sys.executable, "-m", "analysis.report", f"study={study.path}"], check=False)
    return done.returncode == 0


def _tell_failures(plans: Sequence[RunPlan]) -> int:
    failed = 0
    for plan in plans:
        state, event = plan.directory.state()
        if state != "finished":
            failed += 1
            reason = f"{event.get('failure')}: {event.get('reason')}" if state == "failed" else f"it is {state}"
            print(f"run {plan.run_id} did not finish, {reason}; log: {last_log(plan)}", file=sys.stderr)
    return 1 if failed else 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    run_main(main, __doc__ or "")
