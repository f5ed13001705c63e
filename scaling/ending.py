"""How a command or a job ends: at once, with its status, before Python's modules and C++'s objects are torn down.

A process group whose other end has gone first keeps threads, and these abort a process that is torn down; and NCCL's
waits, before it is gone, for a collective that no rank joins any more, up to twice `execution.step_timeout`. Tearing
torch's modules down takes a third of the time that loading them does, too, and nothing comes of it.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn


def end(status: int) -> NoReturn:
    """End this process as Python does, but for tearing anything down."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # who reads it may have gone
            stream.flush()
    os._exit(status)


def end_after(main: Callable[[], int | None]) -> NoReturn:
    """Do what this process is for, and `end` it with the status of that: what Python would make of how it comes out."""
    try:
        status = main() or 0
    except SystemExit as asked:
        if not isinstance(asked.code, int | None):
            print(asked.code, file=sys.stderr)
        status = asked.code or 0 if isinstance(asked.code, int | None) else 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)  # a process group's names the rank on every line
        status = 130 if isinstance(error, KeyboardInterrupt) else 1
    if _is_profiled():  # whose figures are written when Python ends by itself
        sys.exit(status)
    end(status)


def _is_profiled() -> bool:
    if sys.getprofile() is not None or sys.gettrace() is not None:
        return True
    monitoring = getattr(sys, "monitoring", None)  # from Python 3.12 on
    return monitoring is not None and monitoring.get_tool(monitoring.PROFILER_ID) is not None


def end_at_exit(status: int) -> None:
    """`end` this process when Python comes to its exit: for one whose last words another library has."""

    def end_now() -> None:
        atexit.unregister(end_now)  # `end` calls all the others
        end(status)

    atexit.register(end_now)  # the last to be registered is the first that is called
