"""A run from start to end, in one process or many: train, evaluate, and put on record how it ended.

This is what every process of a job executes, on a laptop and on a cluster, and
`python -m scaling.train` too. Rank 0 holds the run's lock, writes its records, and scores the
test set when the others have gone.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress

import torch

from bsrnn import BSRNN
from bsrnn.modelfile import save_model
from scaling.allocator import keep_freed_memory
from scaling.checkpoint import is_failed_write, take_up
from scaling.config import RunConfig
from scaling.cores import num_cores
from scaling.device import set_arithmetic
from scaling.errors import (
    DISK_ERRORS,
    NO_ANSWER,
    BadDataError,
    MeetingError,
    UnreachableError,
    UserError,
    refused_write,
)
from scaling.liveness import LostRankError
from scaling.locks import HeldLockError, held_lock
from scaling.metrics import versions
from scaling.plan import RunPlan
from scaling.processes import Processes, join
from scaling.provenance import code, hardware
from scaling.records import RecordError, RunDirectory
from scaling.scoring import evaluate_run, summary, write_scores
from scaling.shards import ShardIndex
from scaling.statuses import LOST, PREEMPTED
from scaling.stopping import StopFlag, StoppedError
from scaling.trainer import DivergedError, Trainer

log = logging.getLogger(__name__)


def execute(plan: RunPlan, stop: StopFlag | None = None, force: bool = False) -> int:
    """Bring a planned run to its end from wherever it stands; the exit status.

    stop: hears the signals that ask the run to stop, if the caller has opened one already
    force: delete the run of other scientific settings that the folder may hold, and begin anew where it holds
        checkpoints of which none is whole

    0: finished, now or before; 1: diverged; 75 (PREEMPTED): a signal asked it to stop, and all ranks
    have saved; 76 (LOST): another process of the run is lost. Whatever else ends it is put
    on record and raised. UserError if the run's processes do not find together, if others
    are executing it, or if the folder holds another run.
    """
    execution = plan.config.execution
    with ExitStack() as stack:
        if stop is None:
            stop = stack.enter_context(StopFlag())
        try:
            processes = join(
                execution.rendezvous_timeout,
                execution.silence_timeout,
                execution.step_timeout,
                execution.device,
                needs_group=execution.zero_stage is not None,
            )
        except StoppedError:
            return PREEMPTED
        except LostRankError as error:
            log.error("run %s: %s", plan.run_id, error)
            return LOST
        try:
            return _execute(plan, processes, stop, stack, force)
        except LostRankError as error:  # before this run's records were known to be its own
            log.error("run %s: %s", plan.run_id, error)
            processes.tell_loss(str(error))
            return LOST
        except StoppedError as stopped:  # before that too, or asked once more while it was ending
            processes.tell_failure(f"preempted: {stopped}")
            return PREEMPTED
        except (OSError, RuntimeError) as error:
            if getattr(error, "errno", None) not in DISK_ERRORS + NO_ANSWER and not is_failed_write(error):
                raise
            raise _of_the_disk(error, plan.directory) from error
        finally:
            processes.leave(wait=False)


def _execute(plan: RunPlan, processes: Processes, stop: StopFlag, stack: ExitStack, force: bool) -> int:
    directory = plan.directory
    sciences = processes.gather(plan.science_hash)
    if len(set(sciences)) > 1:
        raise UserError(f"the processes of run {directory.path} were started with different settings: {sciences}")
    if not processes.from_first(lambda: _take_folder(plan, stack, force)):
        if processes.is_first:
            log.info("run %s is finished already: %s", directory.run_id, directory.path)
        processes.leave()
        return 0
    record_loss = _recorder_of_loss(directory, processes.rank)
    if processes.watch is not None:
        processes.watch.on_loss = record_loss
    try:
        with processes.naming_the_lost(whatever_fails=False):
            model, step = train(plan, directory, processes, stop)
        processes.leave()
        if processes.is_first:
            if stop.signal is not None:
                raise StoppedError(stop.signal)
            _evaluate(plan, directory, model, step)
    except StoppedError as stopped:
        _end_stopped(directory, processes, stopped)
        return PREEMPTED
    except DivergedError as error:
        if processes.is_first:
            _log_event(directory, "failed", failure="diverged", reason=str(error))
            log.error("run %s diverged: %s", directory.run_id, error)
        return 1
    except KeyboardInterrupt:
        with suppress(RecordError):
            if processes.is_first or directory.state()[0] != "preempted":
                _log_event(directory, "preempted", reason="interrupt")
        processes.tell_failure("preempted: interrupt")
        raise
    except LostRankError as error:
        record_loss(str(error))
        processes.tell_loss(str(error))
        return LOST
    except Exception as error:
        failure, reason = classify(error)
        where = {"rank": processes.rank, "host": socket.gethostname()}
        _log_event(directory, "failed", failure=failure, reason=reason, **where)
        processes.tell_failure(f"{failure}: {reason}")
        raise
    return 0


def _take_folder(plan: RunPlan, stack: ExitStack, force: bool) -> bool:
    """Take the run's folder, on rank 0, and put its plan there; whether there is anything left to do."""
    directory = plan.directory
    try:
        directory.path.mkdir(parents=True, exist_ok=True)
        stack.enter_context(held_lock(directory.lock, f"run {directory.path} is being trained"))
        try:
            plan.check_folder()
        except (UserError, RecordError):
            if not force:
                raise
            directory.clear()
        if not directory.plan.exists() and (foreign := directory.held()):
            raise UserError(
                f"{directory.path} holds {', '.join(foreign)} and no plan.json, so it is not a run's folder: name "
                "another"
            )
        if force:
            take_up(directory.checkpoints, force=True)
        if plan.config.train.test:  # a quick check starts anew every time
            directory.clear(keep_jobs=True)
        plan.write()
    except OSError as error:  # as a user's error it reaches the other ranks too
        raise _of_the_disk(error, directory) from error
    return directory.state()[0] != "finished"


def _end_stopped(directory: RunDirectory, processes: Processes, stopped: StoppedError) -> None:
    """Put on record that a run was asked to stop, and part from its other processes."""
    if processes.is_first or not (stopped.by_all or directory.state()[0] == "preempted"):
        _log_event(directory, "preempted", reason=str(stopped))
        log.warning("run %s stops for %s; the same command resumes from its checkpoint", directory.run_id, stopped)
    if not stopped.by_all:
        processes.tell_failure(f"preempted: {stopped}")
        return
    # A process that ends with its group's threads at work may be aborted by them. All have saved: one that is
    # lost by now is no loss.
    with suppress(LostRankError, RuntimeError):
        processes.leave()


def set_up(config: RunConfig) -> None:
    """Make this process compute as a run's: its threads, its arithmetic, and memory that is kept when it is freed."""
    keep_freed_memory()
    torch.set_num_threads(config.execution.threads or _cores_of_this_process())
    set_arithmetic(config.train.precision)


def train(plan: RunPlan, directory: RunDirectory, processes: Processes, stop: StopFlag) -> tuple[BSRNN, int]:
    """Train a run from its newest checkpoint to its end, on every rank: the trained model, and after how many steps.

    Raises what `Trainer.fit` does.
    """
    execution = plan.config.execution
    set_up(plan.config)
    index = ShardIndex.load(plan.config.shard_root)
    trainer = Trainer(plan, directory, index, processes, stop)
    hosts = processes.gather(socket.gethostname())
    if processes.is_first:
        directory.log_event(
            "resumed" if trainer.step else "started",
            step=trainer.step,
            **code(),
            hardware=hardware(execution.device) | {"lstm": trainer.engine.lstm()},
            world_size=processes.world_size,
            nodes=processes.world_size // int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            hosts=sorted(set(hosts)),
            micro_batch=trainer.engine.micro_batch,
            zero_stage=execution.zero_stage,
        )
    return trainer.fit(), trainer.step


def _evaluate(plan: RunPlan, directory: RunDirectory, model: BSRNN, step: int) -> None:
    execution = plan.config.execution
    index = ShardIndex.load(plan.config.shard_root)
    save_model(model, directory.model)  # what bsrnn's commands take
    directory.log_event("evaluating", step=step, metrics=versions(execution.metrics))
    processes = execution.scoring_processes or torch.get_num_threads()
    rows = evaluate_run(plan, index, model, processes, execution.metrics)
    write_scores(directory.scores, rows, execution.metrics)
    log.info("test set: %s", json.dumps(summary(rows, execution.metrics)))
    directory.log_event("finished", step=step, num_utterances=len(rows))


def _cores_of_this_process() -> int:
    """This process's share of the cores: with more threads than cores they wait for one another."""
    return max(1, num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def classify(error: Exception) -> tuple[str, str]:
    """The kind of failure (of `scaling.records.FAILURES`) that an exception shows, and its reason in a line."""
    text = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {text[0] if text else 'no message'}"
    if text and text[0].startswith("Caught ") and "in DataLoader worker process" in text[0]:
        reason = text[-1]  # of the traceback that torch makes of a worker's error
    if isinstance(error, UnreachableError | MeetingError | HeldLockError):
        return "node failure", str(error)
    if isinstance(error, BadDataError):
        return "bad data", str(error)
    if isinstance(error, UserError):
        return "bad config", str(error)
    if getattr(error, "errno", None) in DISK_ERRORS or is_failed_write(error):
        return "bad config", reason
    # ALLOC_FAILED: of cuBLAS, cuDNN and cuFFT; ALLOCATION_FAILED: of cuDNN from version 9 on
    out_of_memory = (
        "can't allocate memory",
        "out of memory",
        "Cannot allocate memory",
        "ALLOC_FAILED",
        "ALLOCATION_FAILED",
    )
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in str(error) for word in out_of_memory):
        return "out of memory", reason
    # A loader's worker that is killed may say so anywhere in the main process. A GPU that has failed, fallen off the
    # bus or been given to another process is of its node.
    of_the_node = (
        "DataLoader worker (pid",
        "uncorrectable ECC error",
        "busy or unavailable",
        "NCCL error",
        "GPU is lost",
    )
    has_no_answer = getattr(error, "errno", None) in NO_ANSWER
    is_worker_killed = isinstance(error, BrokenProcessPool)  # one of those that score
    if has_no_answer or is_worker_killed or any(word in str(error) for word in of_the_node):
        return "node failure", reason
    return "code error", reason


def _of_the_disk(error: Exception, directory: RunDirectory) -> UserError:
    what, why = getattr(error, "filename", None), getattr(error, "strerror", None)
    return refused_write(
        f"run {directory.path}: {what or 'a file'} could not be written ({why or error})",
        [getattr(error, "errno", None)],
        "it resumes from its newest checkpoint",
    )


def _log_event(directory: RunDirectory, event: str, **details: object) -> None:
    """Put on record how the run ends, where that can be: what it ends of may be the disk that the record is for."""
    try:
        directory.log_event(event, **details)
    except OSError as error:
        log.error("%s could not be put on record in %s (%s): %s", event, directory.events, error.strerror, details)


def _recorder_of_loss(directory: RunDirectory, rank: int) -> Callable[[str], None]:
    """Puts a lost rank on record, once; one of the ranks that live does, not all of them."""
    lock = threading.Lock()
    said: list[str] = []

    def record(lost: str) -> None:
        with lock:  # the watch and the main thread may both come to know
            if said:
                return
            said.append(lost)
            log.critical("%s; this rank %d ends too", lost, rank)
            if "failed: " in lost:  # the rank that failed has said so itself
                return
            if (rank == 0) == lost.startswith("rank 0"):  # rank 0 will, but for its own loss
                return
            time.sleep(0.5 * min(max(rank - 1, 0), 20))  # without rank 0 the first of the others
            if rank <= 1 or directory.state()[0] != "failed":
                _log_event(directory, "failed", failure="node failure", reason=lost)

    return record
