"""How a command of the project ends: a mistake of the user's as one line, an interrupt, a reader that has gone."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from scaling.ending import end_after
from scaling.errors import UserError
from scaling.records import RecordError

GO_ON = "interrupted: run the same command again to go on"


def run_main(main: Callable[[list[str]], int], usage: str, interrupted: str = GO_ON) -> NoReturn:
    """Run a command on the words after its name and end with its status (`scaling.ending`).

    A user's mistake ends as one line on standard error and status 2; an interrupt as 130, with a line
    that says what it means; a reader of the output that has seen enough (a pager, head) as 0.
    """
    end_after(lambda: _status_of(main, usage, interrupted))


def _status_of(main: Callable[[list[str]], int], usage: str, interrupted: str) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    words = sys.argv[1:]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a table's arrows are not worth a traceback
    try:
        if {"-h", "--help"} & set(words):
            print(usage.strip())
            status = 0
        else:
            status = main(words)
        sys.stdout.flush()
    except (UserError, RecordError, PermissionError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        if interrupted:
            print(interrupted, file=sys.stderr)
        status = 130
    except SystemExit as end:  # what rich makes of a reader that has gone
        if not isinstance(end.__context__, BrokenPipeError):
            raise
        status = 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more
        status = 0
    return status
