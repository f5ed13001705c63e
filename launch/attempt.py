"""What a job's batch shell asks before and after the processes of a run, on the run's first node.

    python -m launch.attempt begin SUBMISSION < NODES       prints shell exports, or nothing: don't run
    python -m launch.attempt end SUBMISSION STATUS < JOB    prints "requeue", or nothing
    python -m launch.attempt refused SUBMISSION < ANSWER    SLURM did not do that
    python -m launch.attempt meet SUBMISSION                of a preflight: prints where its processes meet

`begin` puts the attempt on record; refuses what is settled, was submitted again elsewhere, or has
failed too often without getting on; and names the address and a fresh port at which the processes meet.
`end` tells from srun's status and the logs what happened (launch.failures), puts it on record with
its evidence, and decides what follows. NODES is what sinfo says of the nodes, JOB what scontrol
says of the job, ANSWER what it said last: the shell asks SLURM, since a container may not know its commands.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from launch.failures import TREATMENT, Failure, classify_attempt, classify_silence, read_tail
from launch.queue import said
from launch.state import last_train_rows
from launch.submission import Settings, Submission
from launch.throughput import record_run
from scaling.errors import UserError
from scaling.locks import is_locked
from scaling.ports import free_port
from scaling.records import Record, RunDirectory, newest_event, to_json, write_whole

log = logging.getLogger("launch.attempt")

SECONDS_FOR_THE_LOCK = 60.0


def main(words: list[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    if words[0] == "meet":
        address, port = _meeting_place()
        print(f"export MASTER_ADDR={address} MASTER_PORT={port}")
        return 0
    attempt = Attempt(Submission(Path(words[1])), sys.stdin.read())
    if words[0] == "begin":
        for name, value in attempt.begin().items():
            print(f"export {name}={value}")
    elif words[0] == "refused":
        attempt.refused()
    elif attempt.end(int(words[2])):
        print("requeue")
    return 0


class Attempt:
    """One execution of one array element, by the environment of its batch shell."""

    def __init__(self, submission: Submission, answer: str) -> None:
        """answer: of SLURM, as the shell asked it for this command"""
        self.submission, self.settings, self.answer = submission, submission.settings, answer
        self._job_fields = dict(word.split("=", 1) for word in answer.split() if "=" in word)
        self.index = int(os.environ["SLURM_ARRAY_TASK_ID"])
        self.job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{self.index}"
        self.number = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self.row = submission.row(self.index)
        self.directory = submission.study.run(self.row["run_id"])

    # --- before ----------------------------------------------------------------------------

    def begin(self) -> dict[str, str]:
        """The environment of the processes; empty if there is nothing for them to do."""
        directory = self.directory
        if not directory.plan.exists():
            from scaling.provenance import provenance

            write_whole(directory.plan, to_json(self.row | {"provenance": provenance()}) + "\n")
        self.submission.record_element(directory, self.job.partition("_")[0], self.index)
        if directory.is_settled():
            log.info("run %s is settled: %s", directory.run_id, directory.state()[0])
            return {}
        newest = newest_event(directory.event_lines(), "submitted").get("job")
        if newest != self.job:
            log.info("run %s was submitted again as job %s: leaving it to that one", directory.run_id, newest)
            return {}
        self._record_silent_end()
        history = since_submitted(directory)
        step = committed_step(directory)
        fruitless = fruitless_attempts(history, step)
        if fruitless >= self.settings.max_fruitless_attempts:
            last = next((event for event in reversed(history) if event["event"] == "ended"), {})
            directory.log_event(
                "failed",
                failure=last.get("failure", "node failure"),
                reason=f"{fruitless} attempts without a new committed step (the last is {step}); of the last: "
                f"{last.get('reason', 'no word')}",
                log=str(self.submission.batch_log(self.index)),
            )
            return {}
        self._wait_for_the_lock()
        address, port = _meeting_place()
        environment = {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
        halvings = sum(map(_is_halving, history))
        if halvings:
            environment["LAUNCH_MICRO_BATCH"] = str(_halved(self.row, self.settings, halvings))
        directory.log_event(
            "launched",
            job=self.job,
            attempt=self.number,
            step=step,
            nodes=os.environ.get("SLURM_JOB_NODELIST"),
            processes=self.settings.num_processes,
            devices=self.settings.devices,
            log=str(self.submission.batch_log(self.index)),
            batch_log_bytes=_size(self.submission.batch_log(self.index)),
            meeting_at=f"{address}:{port}",
            micro_batch=int(environment["LAUNCH_MICRO_BATCH"]) if halvings else None,
        )
        return environment

    def _record_silent_end(self) -> None:
        """An attempt whose batch shell died with it cannot have said so itself."""
        launched = newest_event(self.directory.event_lines(), "launched", "ended")
        if launched.get("event") != "launched":
            return
        # A submission of its own, perhaps, with a log of its own.
        path = Path(launched.get("log", self.submission.batch_log(self.index)))
        failure = classify_silence(read_tail(path, launched.get("batch_log_bytes", 0)))
        nodes = _nodes_of(str(launched.get("nodes")))
        bad = [line for line in self.answer.splitlines() if re.search(r"down|not.?resp|fail|\*", line, re.IGNORECASE)]
        lost = [line for line in bad if line.split()[0] in nodes]
        if lost:
            failure = Failure("node failure", f"of its nodes {launched.get('nodes')} SLURM says: {'; '.join(lost)}")
        failure = failure or Failure("preempted", "SLURM queued the job again; its processes recorded no reason")
        self._record_end(launched, None, failure, _last_sign(self.directory, launched["time"]))

    def _wait_for_the_lock(self) -> None:
        """A process of an attempt that SLURM gave up may live on for a moment on this machine."""
        deadline = time.monotonic() + SECONDS_FOR_THE_LOCK
        with suppress(UserError):  # without locks on this file system: the run itself says so
            while time.monotonic() < deadline and is_locked(self.directory):
                time.sleep(0.5)

    # --- after -----------------------------------------------------------------------------

    def end(self, status: int) -> bool:
        """Put the attempt's end on record; whether the shell is to queue the job again."""
        directory = self.directory
        launched = newest_event(directory.event_lines(), "launched")
        if directory.state()[0] == "finished":
            self._record_end(launched, status, None)
            record_run(Path(self.settings.throughput), directory, self.row, self.settings.shape)
            return False
        recorded = [
            event
            for event in directory.read_events()
            if event.get("event") in ("failed", "preempted") and event.get("time", 0) >= launched.get("time", 0)
        ]
        batch_log = read_tail(self.submission.batch_log(self.index), launched.get("batch_log_bytes", 0))
        failure = classify_attempt(status, recorded, batch_log, self._rank_log)
        is_going, restarts = self._scheduler_view()
        if failure.kind == "preempted" and is_going and self._seconds_left() < 0:
            failure = Failure("time limit", "the processes were told to stop before the time limit, and saved")
        self._record_end(launched, status, failure)
        if failure.kind == "diverged":
            return False
        is_over = not is_going and restarts == self.number
        # By SLURM, at its time limit or for another job (PreemptMode=CANCEL): then it can still be queued again.
        is_cut_off = failure.kind == "time limit" or "DUE TO PREEMPTION" in batch_log
        if is_over and not is_cut_off:
            directory.log_event("preempted", failure="preempted", reason="its job was cancelled", job=self.job)
            return False
        return self._treat(failure, is_going or is_over)

    def refused(self) -> None:
        """Put on record that SLURM did not queue the job again, after `end` had it that it would."""
        last = newest_event(self.directory.event_lines(), "ended")
        self.directory.log_event(
            "failed",
            failure=last.get("failure", "node failure"),
            reason=f"{last.get('reason', 'no word')}; SLURM did not queue its job again: {said(self.answer)}",
            log=str(self.submission.batch_log(self.index)),
        )

    def _treat(self, failure: Failure, is_going: bool) -> bool:
        """What follows from a failure; `is_going` unless SLURM has the job in the queue again by itself."""
        directory, treatment = self.directory, TREATMENT.get(failure.kind, "stop")
        why: Record = {"failure": failure.kind, "reason": failure.reason}
        if treatment == "halve" and is_going:
            halvings = 1 + sum(map(_is_halving, since_submitted(directory)))
            micro_batch = _halved(self.row, self.settings, halvings)
            if micro_batch is None:
                why["reason"] += "; its micro-batch is the smallest there can be"
            else:
                why |= {"treatment": "halve", "micro_batch": micro_batch}
                directory.log_event("requeued", job=self.job, **why)
                return True
        elif treatment != "stop" or not is_going:
            directory.log_event("requeued", job=self.job, by="this job" if is_going else "SLURM", **why)
            return is_going
        directory.log_event(
            "failed", **why, last_lines=failure.last_lines, log=str(self.submission.batch_log(self.index))
        )
        return False

    def _record_end(
        self, launched: Record, status: int | None, failure: Failure | None, over: float | None = None
    ) -> None:
        """over: when the attempt ended, where that is not now"""
        over = time.time() if over is None else over
        seconds = over - launched.get("time", over)
        details: Record = {"failure": failure.kind, "reason": failure.reason} if failure else {}
        if failure and failure.last_lines:
            details["last_lines"] = failure.last_lines
        if status is not None and status > 128:
            details["signal"] = status - 128
        self.directory.log_event(
            "ended",
            job=launched.get("job", self.job),
            attempt=launched.get("attempt"),
            exit_status=status,
            seconds=seconds,
            device_hours=seconds * launched.get("devices", self.settings.devices) / 3600,  # of its own submission
            **details,
        )

    def _rank_log(self, rank: int) -> str:
        return read_tail(self.submission.rank_log(self.index, self.number, rank))

    def _scheduler_view(self) -> tuple[bool, int]:
        """(whether SLURM lets the job go on, how often it has queued it again), by scontrol's words."""
        fields = self._job_fields
        return fields.get("JobState", "RUNNING") == "RUNNING", int(fields.get("Restarts", self.number))

    def _seconds_left(self) -> float:
        """Until SLURM's signal before the time limit was due; below 0 if that is over."""
        try:
            end = time.mktime(time.strptime(self._job_fields["EndTime"], "%Y-%m-%dT%H:%M:%S"))
        except (KeyError, ValueError):
            return 0.0
        signal_seconds = float(self.settings.shape.get("signal_seconds", 0))
        return end - time.time() - signal_seconds - 60  # the signal may come up to 60 s early


# --- reading a run's events ----------------------------------------------------------------


def since_submitted(directory: RunDirectory) -> list[Record]:
    """The events from the newest submission on: submitting again gives a run another chance."""
    events = directory.read_events()
    starts = [number for number, event in enumerate(events) if event.get("event") == "submitted"]
    return events[starts[-1] :] if starts else events


def committed_step(directory: RunDirectory) -> int:
    """The step of the newest checkpoint on record."""
    return int(newest_event(directory.event_lines(), "checkpointed").get("step", 0))


def fruitless_attempts(history: list[Record], step: int) -> int:
    """How many attempts in a row began at the step that is committed now."""
    count = 0
    for event in reversed(history):
        if event.get("event") == "launched":
            if event.get("step") != step:
                break
            count += 1
        elif _is_halving(event):
            break  # an attempt of another kind
    return count


def _is_halving(event: Record) -> bool:
    """Whether a run was queued again with half the micro-batch."""
    return event.get("event") == "requeued" and event.get("treatment") == "halve"


def _nodes_of(nodes: str) -> set[str]:
    """The names in a list as SLURM writes it, n[1-2]; none where SLURM cannot be asked, as in a container."""
    try:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return set()
    return set(done.stdout.split())


def _last_sign(directory: RunDirectory, launched: float) -> float:
    """When an attempt launched then was last heard of: its job may have waited for a day since."""
    event = newest_event(directory.event_lines(), "launched", "started", "resumed", "checkpointed", "evaluating")
    rows = last_train_rows(directory.metrics)
    return max([launched, event.get("time", launched), *(row.get("time", launched) for row in rows)])


def _halved(row: Record, settings: Settings, halvings: int) -> int | None:
    """The micro-batch after so many halvings; None if the run cannot be executed with it."""
    from scaling.plan import from_record  # loads torch, so only where memory ran out

    config = from_record(row, Path(row["config"]["study"])).config
    whole = config.execution.micro_batch or config.train.global_batch // settings.num_processes
    micro_batch, rest = divmod(whole, 2**halvings)
    try:
        replace(config, execution=replace(config.execution, micro_batch=micro_batch)).micro_batches(
            settings.num_processes
        )
    except UserError as error:
        log.warning("no smaller micro-batch: %s", error)
        return None
    return None if rest else micro_batch


def _meeting_place() -> tuple[str, int]:
    """Address of this node, as the others reach it, and a port that is free now (another one in every attempt)."""
    address = os.environ.get("MASTER_ADDR") or os.environ.get("LAUNCH_NODE_ADDRESS") or socket.gethostname()
    return address, free_port()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
