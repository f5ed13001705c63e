"""Runs in a table, and one live view of all runs of a sweep, read from their records."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.table import Table

from launch.state import RunState, look

if TYPE_CHECKING:  # it loads torch, which launch.status shows its table without
    from scaling.plan import RunPlan

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30.0
STYLES = {"finished": "green", "failed": "red", "lost": "red", "running": "bold", "evaluating": "bold"}
COLUMNS_HERE = ("run", "state", "step", "loss", "audio s/s", "left", "")  # of runs on this machine


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
            looks = [(plan, look(plan.directory, plan.steps, plan.audio_seconds_seen)) for plan in self.plans]
        except OSError as error:  # a file system that is away for a moment: the runs may not even have noticed
            if str(error) != self.trouble:
                log.warning("the runs' records could not be read (%s): looking again", error)
            self.trouble = str(error)
            return
        self.trouble = ""
        rows = [in_words(run, plan.steps) for plan, run in looks]
        if self.live is not None:
            self.live.update(runs_table(rows, COLUMNS_HERE))
            return
        due = time.monotonic() - self.last_lines >= SECONDS_BETWEEN_LINES
        for row in rows:
            changed = row["state"] != self.last_states.get(row["run"], "planned")
            if changed or (due and row["state"] in ("running", "evaluating")):
                self.last_states[row["run"]] = row["state"]
                details = [f"{name} {row[name]}" for name in ("step", "loss", "left") if row[name]]
                details += [row[""]] if row[""] else []
                log.info("%s: %s%s", row["run"], row["state"], f" ({', '.join(details)})" if details else "")
        if due:
            self.last_lines = time.monotonic()


def in_words(run: RunState, steps: int) -> dict[str, str]:
    """How a run of so many steps is, by the columns of `runs_table`."""
    return {
        "run": run.run_id,
        "state": run.state,
        "step": f"{run.step}/{steps}" if run.step else "",
        "loss": f"{run.loss:.4f}" if run.loss is not None else "",
        "audio s/s": f"{run.speed:.0f}" if run.speed else "",
        "left": duration(run.seconds_left) if run.seconds_left is not None else "",
        "job": run.job,
        "nodes": run.nodes,
        "last event": f"{run.last_event}, {duration(time.time() - run.last_time)} ago" if run.last_time else "",
        "": " ".join(run.why.split())[:160],
    }


def runs_table(rows: Sequence[dict[str, str]], columns: Sequence[str], title: str | None = None) -> Table:
    """A line a run, of those columns of `in_words`."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in columns:
        is_number = name in ("step", "loss", "audio s/s", "left")
        table.add_column(name, justify="right" if is_number else "left", no_wrap=name not in ("", "last event"))
    for row in rows:
        style = STYLES.get(row["state"], "dim" if row["state"] in ("planned", "queued") else "")
        table.add_row(*(row[name] for name in columns), style=style)
    return table


def duration(seconds: float) -> str:
    seconds = max(0, round(seconds))
    if seconds < 120:
        return f"{seconds} s"
    days, hours, minutes = seconds // 86400, seconds // 3600 % 24, seconds // 60 % 60
    return f"{days} d {hours} h" if days else f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
