"""A signal that asks a run to stop only leaves word; the run stops where it can.

SLURM and other supervisors say with a signal that time is up. A handler that saved there and
then could meet the run inside a collective, which no other rank would join. So while a
run trains, the handler sets a flag, and the ranks agree on it at a step's end; a validation
is broken off at the next utterance and done when the run goes on. Elsewhere
(scoring the test set, in one process) the handler stops the work at once.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)  # the last: a terminal has gone


class StoppedError(BaseException):
    """The run was asked to stop from outside, and has; not an error, hence no Exception.

    by_all: whether all ranks have agreed on it and stop together
    """

    def __init__(self, reason: str, by_all: bool = False) -> None:
        super().__init__(reason)
        self.by_all = by_all


class StopFlag:
    """A context in which the stop signals are heard. `signal` names the first that came, if one has."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self._is_deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopFlag:
        if threading.current_thread() is threading.main_thread():  # handlers can be set nowhere else
            # nohup lets it ignore the end of its terminal; what else is ignored was to wait for these handlers.
            outlives = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            heard = [number for number in STOP_SIGNALS if not (outlives and number == signal.SIGHUP)]
            self._before = {number: signal.signal(number, self._hear) for number in heard}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """A context in which a signal is only noted: whoever opened it asks `signal` and stops by itself."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number).name
        if not self._is_deferred:
            raise StoppedError(self.signal)


def ignore_stop_signals() -> None:
    """In a worker process: a signal to the whole job is for the run's main process to answer."""
    for number in (*STOP_SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def end_with_parent() -> None:
    """In a forked worker process: the kernel kills it when its parent ends, even where it is frozen.

    It holds the parent's open files, and with them the run's lock, and would keep it from being gone on with.
    """
    if not sys.platform.startswith("linux"):
        return
    pr_set_pdeathsig = 1  # linux/prctl.h
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:  # it has ended already
        os._exit(1)
