"""Words of the commands that look after a study: key=value, a few flags, and names of runs.

The model's commands have a parser of their own in `bsrnn.command`: their package loads torch, and these do without it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from scaling.errors import UserError


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
            values[key] = os.path.expanduser(value) if key == "study" else value
        elif rest and not equals and not word.startswith("-"):
            others.append(word)
        else:
            what = "no such setting" if equals and key not in keys else "not understood"
            known = ", ".join([*(f"{name}=... ({meaning})" for name, meaning in keys.items()), *flags])
            raise UserError(f"{word}: {what}; expected one of {known}")
    return values | ({rest: " ".join(others)} if others else {})
