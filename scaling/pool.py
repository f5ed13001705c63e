"""Worker processes that end with whoever started them."""

from __future__ import annotations

import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import connection

from scaling.stopping import ignore_stop_signals


def spawned_pool(num_workers: int) -> ProcessPoolExecutor:
    """A pool of `num_workers` processes; spawned, not forked, because the caller may have threads."""
    return ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), _end_with_parent)


def _end_with_parent() -> None:
    """In a worker: leave signals to the parent, and do not outlive it where it is killed."""
    ignore_stop_signals()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
