"""Where a study's files are, and how its records are written and read.

Every fact a table needs passes through here as a line of JSON that a person can open:

    STUDY/plan.jsonl                   one row a planned run: the whole of its plan
    STUDY/runs/RUN_ID/plan.json        the same row, with provenance (commit, versions)
    STUDY/runs/RUN_ID/metrics.jsonl    training steps and validations
    STUDY/runs/RUN_ID/events.jsonl     submitted, started (on what hardware), checkpointed, ..., finished or failed
    STUDY/runs/RUN_ID/scores.jsonl     one row a test utterance; scores.versions.json: the versions of its metrics
    STUDY/runs/RUN_ID/quarantine/      one row a crop whose clip was damaged, a file a process
    STUDY/rtf.jsonl                    one row an architecture: its real-time factor, all of one machine
    STUDY/report/                      what the analysis makes of them

Lines are appended whole, in one write, so a crash can tear only the last one; a torn line
costs that line alone. This module uses the standard library only: the analysis reads
records on a laptop without torch, and SLURM jobs write them before torch is loaded.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Loads = Callable[[str], Any]  # JSON → what it says

# The kinds of event a run can meet, in the order in which they usually come, and what a run is after it;
# None: what it was before.
EVENTS = {
    "submitted": "submitted",
    "launched": "running",  # an attempt of a job begins: where, with how many processes
    "started": "running",
    "resumed": "running",
    "checkpointed": "running",
    "evaluating": "running",
    "preempted": "preempted",
    "ended": None,  # an attempt of a job is over: exit status, time, last lines
    "requeued": "submitted",
    "finished": "finished",
    "failed": "failed",
}
OF_JOBS = ("submitted", "launched", "ended", "requeued")  # what a job puts on record around the training

# What makes a run fail, each to be treated in its own way.
FAILURES = (
    "out of memory",  # of the host or the GPU: fewer crops at once
    "time limit",  # of the job, without a checkpoint gained
    "preempted",  # by the scheduler, over and over, without a checkpoint gained
    "node failure",  # a process killed or frozen, a node gone: to be tried again
    "diverged",  # a loss that is not finite: a result of the science, not to be tried again
    "bad data",  # shards that are damaged or are not the planned ones
    "bad config",  # settings that cannot be executed here
    "code error",  # an exception that nobody foresaw
)

# What each row of rtf.jsonl holds at least (scaling/rtf.py writes more): the plan's `science.model`, the factor, what
# enhanced the frames, and the machine.
RTF_FIELDS = {"model": dict, "rtf": float, "step": str, "cpu": str}


class RecordError(Exception):
    """A study or run directory that is missing or does not hold what its place promises."""


# --- lines of JSON -------------------------------------------------------------------------


def to_json(record: Record) -> str:
    """One line of strict JSON; a number that is not finite becomes null (JSON has no NaN)."""
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(record), ensure_ascii=False, allow_nan=False)


def append_record(path: Path, record: Record) -> None:
    """Append one record as a whole line, in a single write.

    If a crash has torn the last line, the new record starts on a line of its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    line = to_json(record) + "\n"
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)  # less the umask
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = "\n" + line
        written = os.write(descriptor, line.encode())
        if written < len(line.encode()):  # the disk is full: to be told, not passed over
            os.write(descriptor, line.encode()[written:])
    finally:
        os.close(descriptor)


def read_records(path: Path, loads: Loads = json.loads) -> Iterator[Record]:
    """The records of a file in the order written; none if there is no such file.

    A line that is not a JSON object (torn by a crash) is passed over.
    loads: for files by the thousand, a faster decoder, whose error is a JSONDecodeError
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return
    yield from _parse(text, loads)


def read_appended(path: Path, since: int) -> tuple[list[Record], int]:
    """The records of the whole lines from byte `since` on, and the byte behind them, to go on from."""
    with path.open("rb") as file:
        file.seek(since)
        content = file.read()
    whole = content[: content.rfind(b"\n") + 1]
    return list(_parse(whole.decode(errors="replace"), json.loads)), since + len(whole)


def _parse(text: str, loads: Loads) -> Iterator[Record]:
    lines = [line for line in text.split("\n") if line]
    try:  # as one array: a quarter faster, and most files are whole
        records = loads(f"[{','.join(lines)}]")
    except json.JSONDecodeError:
        records = []
        for line in lines:
            with contextlib.suppress(json.JSONDecodeError):
                records.append(loads(line))
    yield from (record for record in records if isinstance(record, dict))


def newest_event(lines: Sequence[bytes], *kinds: str) -> Record:
    """The last event of one of the kinds, or an empty record; only that line is parsed, since studies are large."""
    marks = tuple(f'{{"event": "{kind}",'.encode() for kind in kinds)
    for line in reversed(lines):
        if line.startswith(marks):
            try:
                return dict(json.loads(line))
            except ValueError:  # torn by a crash
                continue
    return {}


def state_of(lines: Sequence[bytes]) -> tuple[str, Record]:
    """What has become of a run by the lines of its events: see `RunDirectory.state`."""
    event = newest_event(lines, "finished")  # whatever comes after
    event = event or newest_event(lines, *(kind for kind, state in EVENTS.items() if state))
    return (EVENTS[event["event"]] or "", event) if event else ("planned", {})


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old content or the new, never a part.

    What is no text (a folder's name in another encoding) is written as JSON would escape it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Bring a file's content, or a folder's entries (what was created and renamed in it), to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write a file of records as a whole (see `write_whole`)."""
    write_whole(path, "".join(to_json(record) + "\n" for record in records))


def versions_of(scores: Path) -> Path:
    """Where the versions of the metrics that gave a file of scores stand, beside it."""
    return scores.with_suffix(".versions.json")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return value


# --- directories ---------------------------------------------------------------------------


@dataclass(frozen=True)
class RunDirectory:
    """The files of one run."""

    path: Path

    @property
    def run_id(self) -> str:
        return self.path.name

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def scores(self) -> Path:
        return self.path / "scores.jsonl"

    @property
    def versions(self) -> Path:
        return versions_of(self.scores)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def quarantine(self) -> Path:
        """Which crops were replaced because their clips were damaged: a file a process."""
        return self.path / "quarantine"

    @property
    def model(self) -> Path:
        """The trained model under the name by which bsrnn's commands find it in a run's folder."""
        return self.path / "model.pt"

    @property
    def jobs(self) -> Path:
        """Logs and pickles of the jobs that ran this run."""
        return self.path / "jobs"

    @property
    def lock(self) -> Path:
        """Held by the process that trains the run, for as long as it lives."""
        return self.path / "lock"

    def clear(self, keep_jobs: bool = False) -> None:
        """Remove the run, but for the lock that the caller holds; what else somebody keeps in the folder stays.

        keep_jobs: leave what is of its jobs, one of which may be the caller's: their files, and their events
        """
        of_jobs = [event for event in self.read_events() if keep_jobs and event.get("event") in OF_JOBS]
        for folder in (self.checkpoints, self.tensorboard, self.quarantine, *(() if keep_jobs else (self.jobs,))):
            shutil.rmtree(folder, ignore_errors=not folder.exists())
        for file in (self.metrics, self.scores, self.versions, self.model, self.plan):
            file.unlink(missing_ok=True)
        if of_jobs:
            write_records(self.events, of_jobs)
        else:
            self.events.unlink(missing_ok=True)

    def held(self) -> list[str]:
        """The names of what training would write over or add to, where the folder has it."""
        own = (self.checkpoints, self.metrics, self.scores, self.model)
        return [path.name for path in own if path.exists()]

    def read_plan(self) -> Record:
        """The run's plan; RecordError if there is none."""
        try:
            plan = json.loads(self.plan.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RecordError(f"no run at {self.path}: it has no plan.json; name a folder below STUDY/runs") from None
        except json.JSONDecodeError as error:
            raise RecordError(f"{self.plan} is not JSON ({error}); delete the run's folder and run it again") from None
        if not isinstance(plan, dict):
            raise RecordError(f"{self.plan} holds no object; delete the run's folder and run it again")
        return plan

    def log_event(self, event: str, **details: Any) -> None:
        """Append an event, with the time (seconds since 1970) and process it comes from."""
        if event not in EVENTS:
            raise ValueError(f"event {event!r} is none of {', '.join(EVENTS)}")
        if details.get("failure", FAILURES[0]) not in FAILURES:
            raise ValueError(f"failure {details['failure']!r} is none of {', '.join(FAILURES)}")
        append_record(self.events, {"event": event, "time": time.time(), "pid": os.getpid(), **details})

    def log_metrics(self, kind: str, step: int, **values: Any) -> None:
        """Append a row of metrics of a kind ("train" or "validation") at an optimiser step."""
        append_record(self.metrics, {"kind": kind, "step": step, "time": time.time(), **values})

    def read_events(self) -> list[Record]:
        return list(read_records(self.events))

    def read_metrics(self, loads: Loads = json.loads) -> list[Record]:
        """The run's metrics, one row a (kind, step), in order of step; RecordError for a step that is no whole number.

        A run that was killed repeats the steps since its last checkpoint; the row written
        last is the one that belongs to the weights the run went on with.
        """
        last: dict[tuple[str, int], Record] = {}
        for number, row in enumerate(read_records(self.metrics, loads), start=1):
            if "kind" in row and "step" in row:
                if not isinstance(row["step"], int) or not isinstance(row["kind"], str):
                    raise RecordError(
                        f"{self.metrics}: row {number} has kind {row['kind']!r} and step {row['step']!r}, not a word "
                        "and a whole number; correct or delete the row"
                    )
                last[row["kind"], row["step"]] = row
        return [last[key] for key in sorted(last, key=lambda key: (key[1], key[0]))]

    def read_scores(self, loads: Loads = json.loads) -> list[Record]:
        return list(read_records(self.scores, loads))

    def read_quarantine(self) -> list[Record]:
        """The run's replaced crops, one row each, in order; a run that was killed repeats rows."""
        rows: dict[int, Record] = {}
        for path in self.quarantine.glob("rank-*.jsonl"):
            rows |= {row["t"]: row for row in read_records(path) if "t" in row and "id" in row}
        return [rows[t] for t in sorted(rows)]

    def state(self) -> tuple[str, Record]:
        """What has become of the run by its own records: a state and the event that shows it.

        One of "planned" (nothing has happened), "submitted", "running", "preempted" (interrupted
        from outside; it goes on when it is executed again), "finished", "failed".
        """
        return state_of(self.event_lines())

    def is_settled(self) -> bool:
        """Whether executing the run again would change nothing: it finished, or diverged."""
        state, event = self.state()
        return state == "finished" or (state == "failed" and event.get("failure") == "diverged")

    def event_lines(self) -> list[bytes]:
        """The lines of the events' file, for `newest_event`; none if there is no such file."""
        try:
            return self.events.read_bytes().split(b"\n")
        except (FileNotFoundError, NotADirectoryError):
            return []


@dataclass(frozen=True)
class StudyDirectory:
    """The files of one study."""

    path: Path

    @property
    def plan(self) -> Path:
        return self.path / "plan.jsonl"

    @property
    def runs(self) -> Path:
        return self.path / "runs"

    @property
    def report(self) -> Path:
        return self.path / "report"

    @property
    def rtf(self) -> Path:
        return self.path / "rtf.jsonl"

    @property
    def lock(self) -> Path:
        """Held by the sweep that works on the study."""
        return self.path / "lock"

    def run(self, run_id: str) -> RunDirectory:
        return RunDirectory(self.runs / run_id)

    @property
    def _missing(self) -> RecordError:
        return RecordError(f"no study at {self.path}: it has no plan.jsonl; make one with python -m launch.sweep")

    def read_plan(self) -> list[Record]:
        """The planned runs; RecordError if the study has no plan, or for a line of it that is none.

        It is written whole, so that no crash tears a line; passing over one would lose a run.
        """
        try:
            lines = self.plan.read_bytes().split(b"\n")
        except (FileNotFoundError, NotADirectoryError):
            raise self._missing from None
        rows = []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise RecordError(f"{self.plan}: line {number} is not a JSON object; plan the study again")
            rows.append(row)
        return rows

    def read_run_ids(self) -> list[str]:
        """The ids of the planned runs, the rest of the plan unread: it is large; RecordError if there is none."""
        try:
            plan = self.plan.read_bytes()
        except FileNotFoundError:
            raise self._missing from None
        return [run_id.decode() for run_id in re.findall(rb'^\{"run_id": "([^"]+)"', plan, re.MULTILINE)]

    def read_rtf(self) -> list[Record]:
        """The real-time factors of the study's architectures, none if they were not measured.

        RecordError for a row without its fields, and for rows of several machines, which do not compare.
        """
        again = "measure again with python -m scaling.rtf, which writes the file anew"
        rows = list(read_records(self.rtf))
        for number, row in enumerate(rows, start=1):
            for name, kind in RTF_FIELDS.items():
                if not isinstance(row.get(name), kind):
                    raise RecordError(
                        f"{self.rtf}: row {number} has {name} {row.get(name)!r}, no {kind.__name__}; {again}"
                    )
        cpus = dict.fromkeys(row["cpu"] for row in rows)
        if len(cpus) > 1:
            raise RecordError(f"{self.rtf} has rows of {len(cpus)} machines, {', '.join(cpus)}; {again}")
        return rows
