"""Words of the commands that look after a study: key=value, a few flags, and names of runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence

from scaling.errors import UserError
from scaling.records import RecordError


def parsed(words: Sequence[str], keys: Mapping[str, str], flags: Sequence[str] = (), rest: str = "") -> dict[str, str]:
    """{key: value} of the words; UserError names the right ones.

    keys: what there is → what it means
    flags: words that stand alone, {flag: ""} in the result
    rest: key of the words that are neither, joined by spaces; empty if there may be none
    """
    values: dict[str, str] = {}
    others = []
    for word in words:
        key, equals, value = word.partition("=")
        if word in flags:
            values[word] = ""
        elif equals and key in keys and value:
            values[key] = value
        elif rest and not equals and not word.startswith("-"):
            others.append(word)
        else:
            known = ", ".join([*(f"{key}=... ({what})" for key, what in keys.items()), *flags])
            raise UserError(f"{word}: not understood; what can be said: {known}")
    return values | ({rest: " ".join(others)} if others else {})


def run_command(main: Callable[[list[str]], int], usage: str) -> None:
    """Run a command on the words after its name and exit with its status; a user's mistake is one line and status 2."""
    words = sys.argv[1:]
    if {"-h", "--help"} & set(words):
        print(usage.strip())
        sys.exit(0)
    try:
        status = main(words)
    except (UserError, RecordError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # the reader, a pager or head, has seen enough
        status = 0
    sys.exit(status)
