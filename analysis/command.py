"""How a command of the analysis ends: an interrupt, a reader that has gone. Mistakes are answered by the commands."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable


def run_main(main: Callable[[], int], interrupted: str) -> None:
    """Run a command and exit with its status: an interrupt is 130, with a line that says what it means.

    A reader of the output that has seen enough (a pager, head) is 0.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a table's arrows are not worth a traceback
    try:
        status = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        status = 130
    except PermissionError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more
        status = 0
    sys.exit(status)
