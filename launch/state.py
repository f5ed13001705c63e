"""How every run of a study is: from its records, and on SLURM from one look at the queue.

What the records cannot know is what happened to a job that never got to say a word; what the
queue cannot know is what came of a run whose job is long gone. Accounting (sacct) is not asked:
not every site has it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.failures import classify_silence, read_tail
from launch.queue import QueuedJob
from scaling.locks import is_locked
from scaling.records import Record, RunDirectory, newest_event, state_of

TAIL_BYTES = 4096

# In the order in which a table counts them.
STATES = (
    "planned",  # never submitted
    "queued",  # waits for its first attempt
    "requeued",  # waits for another
    "starting",  # its job runs, its training has not begun yet
    "running",
    "evaluating",
    "ending",  # its job is being ended
    "preempted",  # interrupted from outside: the same sweep command goes on
    "cancelled",  # likewise, by a user
    "lost",  # its job is gone without a word: likewise
    "failed",
    "finished",
)

# What SLURM says of a job that is over, where the run's own records do not.
JOB_ENDINGS = {
    "TIMEOUT": ("failed", "time limit"),
    "DEADLINE": ("failed", "time limit"),
    "OUT_OF_MEMORY": ("failed", "out of memory"),
    "NODE_FAIL": ("failed", "node failure"),
    "BOOT_FAIL": ("failed", "node failure"),
    "CANCELLED": ("cancelled", ""),
    "REVOKED": ("cancelled", ""),
    "PREEMPTED": ("preempted", ""),
}


@dataclass(frozen=True)
class RunState:
    """One run at one moment."""

    run_id: str
    state: str  # one of STATES
    why: str = ""  # where that wants a reason
    step: int = 0
    loss: float | None = None
    speed: float | None = None  # audio-seconds per second
    seconds_left: float | None = None  # of training, while it trains
    job: str = ""
    nodes: str = ""
    last_event: str = ""
    last_time: float | None = None  # seconds since 1970


def look(
    directory: RunDirectory,
    steps: int,
    audio_seconds: float,
    queue: Mapping[str, QueuedJob] | None = None,
) -> RunState:
    """How a run is.

    steps, audio_seconds: of its whole training, for the time left
    queue: SLURM's jobs by id; None where SLURM was not asked
    """
    lines = directory.event_lines()
    if not lines:
        return RunState(directory.run_id, "planned")
    state, event = state_of(lines)
    submitted = newest_event(lines, "submitted")
    job = (queue or {}).get(str(submitted.get("job")))
    why = ": ".join(str(event[key]) for key in ("failure", "reason") if event.get(key))
    if state == "running":
        state = {"launched": "starting", "evaluating": "evaluating"}.get(event["event"], "running")
    if state == "submitted":
        state = "queued" if submitted.get("executor") == "slurm" else "starting"
    if state == "finished":
        why = ""
    elif submitted.get("executor") == "slurm" and queue is not None:
        state, why = _on_slurm(state, event, why, submitted, job, lines)
    elif submitted.get("executor") != "slurm" and state in ("running", "evaluating") and not is_locked(directory):
        state, why = "lost", "no process on this machine is running it"
    rows = last_train_rows(directory.metrics) if state not in ("planned", "queued") else []
    row = rows[-1] if rows else {}
    step = int(row.get("step", 0))
    speeds = [row["audio_seconds_per_second"] for row in rows if row.get("audio_seconds_per_second")]
    speed = len(speeds) / sum(1 / speed for speed in speeds) if speeds else None
    last = _last_event(lines)
    return RunState(
        directory.run_id,
        state,
        why,
        step,
        row.get("loss"),
        speed,
        (steps - step) / steps * audio_seconds / speed if state == "running" and speed else None,
        str(submitted.get("job", "")),
        job.nodes if job is not None and job.nodes else str(newest_event(lines, "launched").get("nodes") or ""),
        last.get("event", ""),
        last.get("time"),
    )


def _on_slurm(
    state: str, event: Record, why: str, submitted: Record, job: QueuedJob | None, lines: list[bytes]
) -> tuple[str, str]:
    """State and reason of a run that was submitted to SLURM and has not finished."""
    if job is not None and job.is_live:
        if job.state == "PENDING":
            launched = newest_event(lines, "launched").get("time", 0) > submitted.get("time", 0)
            waits = "waits" if job.reason == "None" else f"waits for {job.reason}"
            waits += f", after {why}" if why and launched else ""
            return ("requeued" if launched else "queued"), waits
        if job.state == "COMPLETING":
            return "ending", why
        return (state, "") if state in ("running", "evaluating") else ("starting", "")
    if state == "failed":
        return state, why
    if event.get("reason") == "its job was cancelled":
        return "cancelled", ""
    ending = JOB_ENDINGS.get(job.state) if job is not None else None
    if ending is not None:
        return ending[0], ": ".join(part for part in (ending[1], f"SLURM says {job.state if job else ''}") if part)
    launched = newest_event(lines, "launched").get("time", 0) > submitted.get("time", 0)
    if not launched and not Path(str(submitted.get("log", ""))).exists():
        return "cancelled", "its job left the queue before it began"  # SLURM forgets such an element at once
    silence = classify_silence(read_tail(Path(str(submitted.get("log", "")))))
    if silence is not None:
        if silence.reason == "its job was cancelled":
            return "cancelled", ""
        return "preempted" if silence.kind == "preempted" else "failed", f"{silence.kind}: {silence.reason}"
    return "lost", f"job {submitted.get('job')} is gone without recording a reason; its log is {submitted.get('log')}"


def last_train_rows(path: Path) -> list[Record]:
    """The newest rows of training metrics, from the end of the file: it is read twice a second."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return []
    try:
        size = os.fstat(descriptor).st_size
        tail = os.pread(descriptor, TAIL_BYTES, max(0, size - TAIL_BYTES))
    finally:
        os.close(descriptor)
    rows: list[Any] = []
    for line in tail.splitlines():
        with contextlib.suppress(ValueError):  # the first line is cut, the last may be torn
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and row.get("kind") == "train"]


def _last_event(lines: list[bytes]) -> Record:
    for line in reversed(lines):
        if line:
            with contextlib.suppress(ValueError):
                return dict(json.loads(line))
    return {}
