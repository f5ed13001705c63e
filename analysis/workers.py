"""How many cores there are to work on, and worker processes on them that read a large study's records."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import SpawnContext, SpawnProcess
from types import ModuleType


def num_cores() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pool() -> ProcessPoolExecutor:
    """As many processes as this one has cores, for functions of importable modules."""
    return ProcessPoolExecutor(num_cores(), _Context())


class _Process(SpawnProcess):
    """A spawned process that does not run the caller's script once more, as it would to find the script's names.

    `scaling.pool` has one too; of that room this one imports the records alone.
    """

    def start(self) -> None:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            super().start()
        finally:
            sys.modules["__main__"] = main


class _Context(SpawnContext):
    Process = _Process
