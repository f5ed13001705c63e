"""Worker processes that end with whoever started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import connection


def spawned_pool(num_workers: int) -> ProcessPoolExecutor:
    """A pool of `num_workers` processes; spawned, not forked, because the caller may have threads."""
    return ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), _end_with_parent)


def _end_with_parent() -> None:
    """In a worker: leave interrupts to the parent, and do not outlive it where it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
