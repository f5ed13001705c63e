"""A clock for limits on silence and waiting, which a suspension hardly moves."""

from __future__ import annotations

import threading
import time


class OwnTime:
    """Seconds that this process has lived through: while it is stopped, as SLURM suspends jobs, hardly any pass.

    To be asked about every LONGEST_PAUSE seconds, which is the most that counts between two answers.
    """

    LONGEST_PAUSE = 1.0

    def __init__(self) -> None:
        self._seconds, self._before, self._lock = 0.0, time.monotonic(), threading.Lock()

    def __call__(self) -> float:
        with self._lock:
            now = time.monotonic()
            self._seconds += min(now - self._before, self.LONGEST_PAUSE)
            self._before = now
            return self._seconds
