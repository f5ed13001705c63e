"""One live view of all runs of a sweep, read from their records."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

from launch.state import look
from scaling.plan import RunPlan

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30.0


class RunsDisplay:
    """A context in which `show()` renews the view: a table on a terminal, plain lines in a log."""

    def __init__(self, plans: Sequence[RunPlan]) -> None:
        self.plans = plans
        self.console = Console(stderr=True, markup=False, emoji=False)
        self.live = Live(console=self.console, refresh_per_second=4) if self.console.is_terminal else None
        self.last_states: dict[str, str] = {}
        self.last_lines = time.monotonic()
        self.trouble = ""

    def __enter__(self) -> RunsDisplay:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.show()
        if self.live is not None:
            self.live.stop()

    def show(self) -> None:
        try:
            rows = [_look(plan) for plan in self.plans]
        except OSError as error:  # a file system that is away for a moment: the runs may not even have noticed
            if str(error) != self.trouble:
                log.warning("the runs' records could not be read (%s): looking again", error)
            self.trouble = str(error)
            return
        self.trouble = ""
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
    run = look(plan.directory, plan.steps, plan.audio_seconds_seen)
    left = ""
    if run.seconds_left is not None:
        seconds = round(run.seconds_left)
        left = f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
    return {
        "run": run.run_id,
        "state": run.state,
        "step": f"{run.step}/{plan.steps}" if run.step else "",
        "loss": f"{run.loss:.4f}" if run.loss is not None else "",
        "speed": f"{run.speed:.0f}" if run.speed else "",
        "left": left,
        "why": run.why if run.state == "failed" else "",
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
