"""Worker processes that end with whoever started them."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import connection
from multiprocessing.context import SpawnContext, SpawnProcess
from types import ModuleType

from scaling.stopping import ignore_stop_signals


def spawned_pool(num_workers: int) -> ProcessPoolExecutor:
    """A pool of `num_workers` processes, for functions of importable modules.

    Spawned, not forked, because the caller may have threads.
    """
    return ProcessPoolExecutor(num_workers, _Context(), _end_with_parent)


def kill(pool: ProcessPoolExecutor) -> None:
    """End a pool's processes at once, whatever they are at; `shutdown` waits for a frozen one for ever."""
    for process in list((pool._processes or {}).values()):
        process.kill()


class _Process(SpawnProcess):
    """A spawned process that does not run the caller's script once more.

    That would start over with whatever the script does where nothing guards it, and load its imports where
    something does.
    """

    def start(self) -> None:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            super().start()
        finally:
            sys.modules["__main__"] = main

    def terminate(self) -> None:
        """At once: the pool ends so what is left of it when a worker was killed, and workers ignore what asks them."""
        self.kill()


class _Context(SpawnContext):
    Process = _Process


def _end_with_parent() -> None:
    """In a worker: leave signals to the parent, and do not outlive it where it is killed."""
    ignore_stop_signals()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
