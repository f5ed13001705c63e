"""How far a long job is: a bar with the time left on a terminal, plain lines in a log."""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0


class ProgressDisplay:
    """A context in which `show(done)` says how much of `total` is done; None counts nothing and shows nothing."""

    def __init__(self, description: str, total: int, done: int = 0, shown: bool = True) -> None:
        self.description, self.total = description, total
        self.first, self.started, self.last_line = done, time.monotonic(), 0.0
        self.done = done
        self.bar: Progress | None = None
        self.shown = shown
        console = Console(stderr=True)
        if shown and console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self.bar = Progress(
                TextColumn("{task.description}", markup=False),
                *columns,
                TextColumn("{task.fields[note]}"),
                console=console,
            )
            self.task = self.bar.add_task(description, total=total, completed=done, note="")

    def __enter__(self) -> ProgressDisplay:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.bar is not None:
            with suppress(OSError):  # a terminal that has gone is no reason to end otherwise than was to be
                self.bar.stop()

    def advance(self, note: str = "") -> None:
        """One more is done."""
        self.show(self.done + 1, note)

    def show_of(self, done: int, total: int) -> None:
        """`done` of a total that is only known now are done."""
        self.total = total
        if self.bar is not None:
            self.bar.update(self.task, total=total)
        self.show(done)

    def show(self, done: int, note: str = "") -> None:
        """`done` of the total are done; `note` is shown behind."""
        self.done = done
        if self.bar is not None:
            self.bar.update(self.task, completed=done, note=note)
        elif self.shown:
            now = time.monotonic()
            if now - self.last_line >= SECONDS_BETWEEN_LINES or done >= self.total:
                self.last_line = now
                log.info(
                    "%s: %d of %d, %s left%s", self.description, done, self.total, self._left(now), note and ", " + note
                )

    def _left(self, now: float) -> str:
        done = self.done - self.first
        if done <= 0:
            return "unknown time"
        seconds = round((now - self.started) / done * (self.total - self.done))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
