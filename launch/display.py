"""One live view of all runs of a sweep, read from their records."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from scaling.plan import RunPlan
from scaling.records import Record

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30.0
TAIL_BYTES = 4096


class RunsDisplay:
    """A context in which `show()` renews the view: a table on a terminal, plain lines in a log."""

    def __init__(self, plans: Sequence[RunPlan]) -> None:
        self.plans = plans
        self.console = Console(stderr=True)
        self.live = Live(console=self.console, refresh_per_second=4) if self.console.is_terminal else None
        self.last_states: dict[str, str] = {}
        self.last_lines = time.monotonic()

    def __enter__(self) -> RunsDisplay:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.show()
        if self.live is not None:
            self.live.stop()

    def show(self) -> None:
        rows = [_look(plan) for plan in self.plans]
        if self.live is not None:
            self.live.update(_table(rows))
            return
        due = time.monotonic() - self.last_lines >= SECONDS_BETWEEN_LINES
        for row in rows:
            changed = row["state"] != self.last_states.get(row["run"], "planned")
            if changed or (due and row["state"] in ("running", "evaluating")):
                self.last_states[row["run"]] = row["state"]
                details = ", ".join(f"{name} {row[name]}" for name in ("step", "loss", "left", "why") if row[name])
                log.info("%s: %s%s", row["run"], row["state"], f" ({details})" if details else "")
        if due:
            self.last_lines = time.monotonic()


def _look(plan: RunPlan) -> dict[str, str]:
    """How far a run is, in words."""
    directory = plan.directory
    state, event = directory.state()
    rows = _last_train_rows(directory.metrics)
    row = rows[-1] if rows else {}
    step = int(row.get("step", 0))
    left = ""
    speeds = [row["audio_seconds_per_second"] for row in rows if row.get("audio_seconds_per_second")]
    speed = len(speeds) / sum(1 / speed for speed in speeds) if speeds else None
    if state == "running" and speed:
        seconds = round((plan.steps - step) / plan.steps * plan.audio_seconds_seen / speed)
        left = f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
    return {
        "run": plan.run_id,
        "state": "evaluating" if event.get("event") == "evaluating" else state,
        "step": f"{step}/{plan.steps}" if step else "",
        "loss": f"{row['loss']:.4f}" if row.get("loss") is not None else "",
        "speed": f"{speed:.0f}" if speed else "",
        "left": left,
        "why": f"{event.get('failure')}: {event.get('reason')}" if state == "failed" else "",
    }


def _table(rows: Sequence[dict[str, str]]) -> Table:
    table = Table(box=None, pad_edge=False)
    headings = {"speed": "audio s/s", "left": "time left", "why": ""}
    for name in rows[0] if rows else ():
        is_number = name in ("step", "loss", "speed", "left")
        table.add_column(headings.get(name, name), justify="right" if is_number else "left", no_wrap=name == "run")
    styles = {"finished": "green", "failed": "red", "running": "bold", "evaluating": "bold"}
    for row in rows:
        table.add_row(*row.values(), style=styles.get(row["state"], "dim"))
    return table


def _last_train_rows(path: Path) -> list[Record]:
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
