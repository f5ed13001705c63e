"""What the model's commands have in common: words and key=value settings in, a user's mistake out in one line."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def settings(
    words: Sequence[str], positional: Sequence[str], known: Mapping[str, Callable[[str], Any]]
) -> tuple[list[str], dict[str, Any]]:
    """(the positional words, the settings given as key=value); ValueError for whatever else a user typed.

    positional: what each word is called, all of them needed; one in brackets may be left out
    known: each setting and what makes its value of a text
    """
    values: dict[str, Any] = {}
    places: list[str] = []
    for word in words:
        key, equals, text = word.partition("=")
        if equals and key in known:
            try:
                values[key] = known[key](text)
            except ValueError:
                raise ValueError(
                    f"{word}: not understood; expected {key}={'NUMBER' if known[key] in (int, float) else 'TEXT'}"
                ) from None
        elif equals and key.isidentifier() and len(places) == len(positional):
            raise ValueError(f"{word}: no such setting; expected one of {', '.join(known) or 'none'}")
        else:
            places.append(word)
    needed = sum(not name.startswith("[") for name in positional)
    if not needed <= len(places) <= len(positional):
        raise ValueError(f"expected {' '.join(positional)}; got {' '.join(places) or 'nothing'}")
    return places, values


def run_main(main: Callable[[list[str]], int], usage: str) -> None:
    """Run a command on the words after its name and exit with its status.

    A user's mistake ends as one line on standard error and status 2; an interrupt as 130; a reader of the output that
    has seen enough (a pager, head) as 0. `scaling.command` ends its commands alike, and not by this function: some of
    them start without torch, which this package loads.
    """
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
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more
        status = 0
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)
