"""A run from start to end in one process: train, evaluate, and put on record how it ended.

This is what a job executes, on a laptop and on a cluster, and `python -m scaling.train` too.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from scaling.allocator import keep_freed_memory
from scaling.errors import UserError
from scaling.evaluate import evaluate_run, summary
from scaling.metrics import versions
from scaling.plan import RunPlan
from scaling.provenance import hardware
from scaling.records import RunDirectory, write_records
from scaling.shards import ShardIndex
from scaling.trainer import DivergedError, Trainer

log = logging.getLogger(__name__)


def execute(plan: RunPlan) -> int:
    """Bring a planned run to its end from wherever it stands; the exit status.

    0: finished, now or before; 1: diverged. Whatever else ends it is put on record and raised.
    UserError if several processes were started for it, or another process is executing it.
    """
    directory = plan.directory
    if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise UserError(
            f"{processes} processes were started for one run (WORLD_SIZE); this version takes one: start one"
        )
    directory.path.mkdir(parents=True, exist_ok=True)
    with held_lock(directory.lock, f"run {directory.path} is being trained"):
        if plan.config.train.test:  # a quick check starts anew every time
            directory.clear()
        plan.write()
        if directory.state()[0] == "finished":
            log.info("run %s is finished already: %s", directory.run_id, directory.path)
            return 0
        try:
            _train_and_evaluate(plan, directory)
        except DivergedError as error:
            directory.log_event("failed", failure="diverged", reason=str(error))
            log.error("run %s diverged: %s", directory.run_id, error)
            return 1
        except UserError as error:
            directory.log_event("failed", failure="bad input", reason=str(error))
            raise
        except KeyboardInterrupt:
            directory.log_event("preempted", reason="interrupt")
            raise
        except Exception as error:
            directory.log_event("failed", failure="code error", reason=f"{type(error).__name__}: {error}")
            raise
    return 0


def _train_and_evaluate(plan: RunPlan, directory: RunDirectory) -> None:
    execution = plan.config.execution
    keep_freed_memory()
    torch.set_num_threads(execution.threads or len(os.sched_getaffinity(0)))
    index = ShardIndex.load(plan.config.shard_root)
    trainer = Trainer(plan, directory, index)
    directory.log_event("resumed" if trainer.step else "started", step=trainer.step, hardware=hardware())
    model = trainer.fit()
    directory.log_event("evaluating", step=trainer.step, metrics=versions())
    rows = evaluate_run(plan, index, model, execution.scoring_processes or torch.get_num_threads())
    write_records(directory.scores, rows)
    log.info("test set: %s", json.dumps(summary(rows)))
    directory.log_event("finished", step=trainer.step, num_utterances=len(rows))


@contextmanager
def held_lock(lock: Path, taken: str) -> Iterator[None]:
    """Hold a lock file for this process; UserError saying what is `taken` if another process holds it."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 64, 0).decode(errors="replace").strip() or "unknown"
            raise UserError(f"{taken} by process {holder}: wait for it, or stop it first") from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def is_locked(directory: RunDirectory) -> bool:
    """Whether a process of this machine is executing the run."""
    try:
        descriptor = os.open(directory.lock, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
