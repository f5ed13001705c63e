"""Why an attempt of a run ended, told from its exit status and its logs, and what follows from it.

An attempt leaves: the status of srun, what srun and SLURM said in the batch shell's log, and a
log of every rank. The rank that failed first counts, not those that its end took along.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from scaling.errors import NO_ANSWER
from scaling.records import Record
from scaling.statuses import LOST, PREEMPTED

STOPS = ("preempted", "time limit")
ABORTED = 128 + signal.SIGABRT
KILLED = {128 + number for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGBUS)}
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
    (
        "node failure",
        re.compile(
            r"DUE TO NODE FAILURE|Node failure on|Communication connection failure"
            # while the processes of a job were being started
            r"|Unable to (?:create step|confirm allocation)|Task launch for \S+ failed on node"
            r"|Application launch failed"
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


def report_line(error: Exception) -> str:
    """What a rank says last, for those that look at its log: it may have ended before it had a record to write to.

    To be written with its newline at once: other processes write to the log too.
    """
    from scaling.run import classify  # loads torch

    failure, reason = classify(error)
    return REPORT + json.dumps({"failure": failure, "reason": reason}) + "\n"


def classify_attempt(
    status: int, recorded: Sequence[Record], batch_log: str, rank_log: Callable[[int], str]
) -> Failure:
    """What ended an attempt whose srun ended with `status`, not 0.

    recorded: the "failed" and "preempted" events that the ranks wrote during the attempt
    batch_log: what the batch shell's log has of the attempt
    rank_log: the log of a rank, of the attempt
    """
    ended = TASK_ENDED.search(batch_log)
    rank = int(re.split("[,-]", ended["ranks"])[0]) if ended else 0
    where = f"rank {rank}" + (f" on {ended['node']}" if ended else "")
    log = rank_log(rank)
    # A rank that met an error knows best; that another is lost is known by all that are left.
    failed = [event for event in recorded if event.get("event") == "failed"]
    own = [event for event in failed if event["failure"] != "node failure" and not _is_broken(str(event["reason"]))]
    if own:
        rank = own[0].get("rank", 0)
        return Failure(str(own[0]["failure"]), f"rank {rank}: {own[0]['reason']}", _last_lines(rank_log(rank)))
    was_killed = ended is not None and "Killed" in ended["how"]
    was_stopped = not was_killed and len(recorded) > len(failed)
    for text in (batch_log, log):
        if (said := _first_said(text)) and not (said in STOPS and (was_stopped or status == PREEMPTED)):
            return Failure(said, _line_with(text, said), _last_lines(text))
    if was_stopped or status == PREEMPTED:
        return Failure(_first_said(batch_log) or "preempted", "the processes were told to stop, and saved")
    reports = list(_reports(log))
    # What rank 0 alone can say (a lock that is held, a checkpoint that cannot be read) ends the others without a word.
    for teller, text in ((where, log), ("rank 0", rank_log(0))):
        for report in [*_reports(text)][-1:]:
            if not _is_broken(report["reason"]):
                return Failure(report["failure"], f"{teller}: {report['reason']}", _last_lines(text))
    if failed:
        return Failure("node failure", str(failed[0].get("reason")), _last_lines(batch_log + log))
    if status in KILLED:
        name = signal.Signals(status - 128).name
        return Failure(
            "node failure", f"{where} was ended by {name} from outside, without recording a reason", _last_lines(log)
        )
    how = f"{where}: {ended['how']}" if ended else f"{where}: exit status {status}"
    # NCCL's own watch aborts a process whose peer has gone, if it notices first.
    is_left_alone = status == LOST or bool(reports) or (status == ABORTED and "ProcessGroupNCCL" in log)
    is_of_the_node = is_left_alone or _has_no_answer(log)
    return Failure("node failure" if is_of_the_node else "code error", how, _last_lines(log))


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


def _reports(log: str) -> Iterator[Record]:
    """What a rank reported; behind it may stand what another process wrote, and one that was killed cuts it off."""
    for line in log.splitlines():
        if REPORT in line:
            with contextlib.suppress(ValueError):
                yield json.JSONDecoder().raw_decode(line.partition(REPORT)[2])[0]


def _is_broken(reason: str) -> bool:
    """Whether an error says no more than that another process is gone."""
    return bool(re.search(r"Connection (?:closed|reset) by peer|Broken pipe|Connection refused", reason))


def _has_no_answer(log: str) -> bool:
    """Whether a rank ended because its file system did not answer, before it could report: while it was importing."""
    last = re.match(r"(?:\w+\.)*OSError: \[Errno (\d+)\]", log.strip().rpartition("\n")[2])
    return last is not None and int(last[1]) in NO_ANSWER


def _first_said(log: str) -> str | None:
    return next((kind for kind, pattern in SAID_BY_SLURM if pattern.search(log)), None)


def _line_with(log: str, kind: str) -> str:
    pattern = dict(SAID_BY_SLURM)[kind]
    return next(line.strip() for line in log.splitlines() if pattern.search(line))[-300:]


def _last_lines(log: str) -> str:
    return "\n".join(line[-300:] for line in log.strip().splitlines()[-LAST_LINES:])
