"""Why an attempt of a run ended, told from its exit status and its logs, and what follows from it.

An attempt leaves: the status of srun, what srun and SLURM said in the batch shell's log, and a
log of every rank. The rank that failed first counts, not those that its end took along.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from scaling.records import Record

PREEMPTED_STATUS = 75  # scaling.run.PREEMPTED, which is not imported because it loads torch
LAST_LINES = 12
TAIL_BYTES = 16384

# What is done about a failure: queue the run again, again with half the micro-batch, or nothing.
TREATMENT = {
    "out of memory": "halve",
    "time limit": "requeue",
    "preempted": "requeue",
    "node failure": "requeue",
    "diverged": "stop",
    "bad data": "stop",
    "bad config": "stop",
    "code error": "stop",
}

# The last line of a rank's log whose run ended with an exception, followed by JSON.
REPORT = "this rank failed: "

# In SLURM's words, on standard error of the batch shell or a rank.
SAID_BY_SLURM = (
    ("out of memory", re.compile(r"oom.?kill event|Out Of Memory|exceeded (?:job )?memory limit", re.IGNORECASE)),
    ("time limit", re.compile(r"DUE TO TIME LIMIT")),
    ("preempted", re.compile(r"DUE TO (?:PREEMPTION|JOB REQUEUE)")),
    ("node failure", re.compile(r"DUE TO NODE FAILURE|Node failure on|Communication connection failure")),
)
# In the words of torch and Python.
SAID_BY_A_RANK = (
    ("out of memory", re.compile(r"OutOfMemoryError|CUDA out of memory|can't allocate memory|MemoryError|bad_alloc")),
    (
        "node failure",
        re.compile(
            r"Connection (?:reset|closed|refused)|Broken pipe|Timed out waiting|DistNetworkError|DistStoreError"
            r"|ProcessGroup.*[Tt]imeout|NCCL.*(?:system|remote|unhandled)|CUDA error: (?:uncorrectable|unspecified)"
        ),
    ),
)
TASK_ENDED = re.compile(r"srun: error: (?P<node>\S+): tasks? (?P<ranks>[\d,-]+): (?P<how>.+)")


@dataclass(frozen=True)
class Failure:
    """A class of scaling.records, and the evidence in words."""

    kind: str
    reason: str
    last_lines: str = ""


def classify_exception(error: BaseException) -> Failure:
    """Of an exception that ends a rank."""
    text = f"{type(error).__name__}: {error}"
    for kind, pattern in SAID_BY_A_RANK:
        if pattern.search(text):
            return Failure(kind, text)
    return Failure("bad config" if type(error).__name__ == "UserError" else "code error", text)


def report_line(error: BaseException) -> str:
    failure = classify_exception(error)
    return REPORT + json.dumps({"failure": failure.kind, "reason": failure.reason})


def classify_attempt(status: int, recorded: Record, batch_log: str, rank_log: Callable[[int], str]) -> Failure:
    """What ended an attempt whose srun ended with `status`, not 0.

    recorded: the "failed" event that rank 0 wrote during the attempt, or an empty record
    batch_log: what the batch shell's log has of the attempt
    rank_log: the log of a rank, of the attempt
    """
    if recorded.get("failure") == "diverged":
        return Failure("diverged", str(recorded.get("reason")))
    if status == PREEMPTED_STATUS:
        return Failure(_first_said(batch_log) or "preempted", "the processes were told to stop, and saved")
    if said := _first_said(batch_log):
        return Failure(said, _line_with(batch_log, said), _last_lines(batch_log))
    ended = TASK_ENDED.search(batch_log)
    rank = int(re.split("[,-]", ended["ranks"])[0]) if ended else 0
    where = f"rank {rank}" + (f" on {ended['node']}" if ended else "")
    log = rank_log(rank)
    lines = _last_lines(log)
    if said := _first_said(log):
        return Failure(said, f"{where}: {_line_with(log, said)}", lines)
    if rank == 0 and recorded:
        return Failure(str(recorded.get("failure")), str(recorded.get("reason")), lines)
    reports = [line.partition(REPORT)[2] for line in log.splitlines() if REPORT in line]
    if reports:
        report = json.loads(reports[-1])
        return Failure(report["failure"], f"{where}: {report['reason']}", lines)
    if status - 128 in (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGBUS):
        name = signal.Signals(status - 128).name
        return Failure("node failure", f"{where} was ended by {name} from outside, without a word", lines)
    for kind, pattern in SAID_BY_A_RANK:
        if pattern.search(log):
            return Failure(kind, f"{where}: {lines.splitlines()[-1] if lines else ''}", lines)
    how = f"{where}: {ended['how']}" if ended else f"{where}: exit status {status}"
    return Failure("code error", how, lines)


def classify_silence(log: str) -> Failure | None:
    """What SLURM said, if it did, of a job that is gone without having recorded its end."""
    said = _first_said(log)
    if said:
        return Failure(said, _line_with(log, said), _last_lines(log))
    if "CANCELLED AT" in log:
        return Failure("preempted", "its job was cancelled", _last_lines(log))
    return None


def read_tail(path: Path, since: int = 0) -> str:
    """The end of a log, from byte `since` on at the earliest; empty if there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(since, size - TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _first_said(log: str) -> str | None:
    return next((kind for kind, pattern in SAID_BY_SLURM if pattern.search(log)), None)


def _line_with(log: str, kind: str) -> str:
    pattern = dict(SAID_BY_SLURM)[kind]
    return next(line.strip() for line in log.splitlines() if pattern.search(line))[-300:]


def _last_lines(log: str) -> str:
    return "\n".join(line[-300:] for line in log.strip().splitlines()[-LAST_LINES:])
