"""What a user can choose about an analysis, as key=value on the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

SIZES = {
    "macs_per_second": "MACs per second",
    "num_params": "parameters",
    "num_params_non_decoder": "parameters outside the mask decoder",
}
DATA = {"audio_hours_seen": "hours of audio seen in training", "hours": "hours of distinct training audio"}

KEYS = {
    "study": "the study's folder, the one that holds plan.jsonl and runs/",
    "size": f"what N is in the laws: {', '.join(SIZES)} (default macs_per_second; the report compares all)",
    "data": f"what D is: {', '.join(DATA)}, or auto: whichever of the two the study varies (default)",
    "fewest_warmups": "runs of fewer steps than so many warm-ups are left out of fits (default 3)",
    "bootstraps": "samples behind an interval (default 1000)",
    "level": "of intervals (default 0.95)",
    "seed": "of the bootstraps (default 0)",
}


class UsageError(Exception):
    """A mistake in the command line."""


@dataclass(frozen=True)
class Settings:
    """See KEYS."""

    study: Path
    size: str = "macs_per_second"
    data: str = "auto"
    fewest_warmups: float = 3.0
    bootstraps: int = 1000
    level: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (("size", self.size, [*SIZES]), ("data", self.data, [*DATA, "auto"])):
            if value not in known:
                raise UsageError(f"{name}={value}: expected one of {', '.join(known)}")
        if not self.fewest_warmups >= 0:
            raise UsageError(f"fewest_warmups={self.fewest_warmups}: expected at least 0")
        if self.bootstraps < 100:
            raise UsageError(f"bootstraps={self.bootstraps}: expected at least 100, for an interval to mean something")
        if not 0.5 <= self.level < 1:
            raise UsageError(f"level={self.level}: expected from 0.5 to below 1")
        if self.seed < 0:
            raise UsageError(f"seed={self.seed}: expected at least 0")


def parsed(arguments: Sequence[str], keys: Mapping[str, str], required: Sequence[str], usage: str) -> dict[str, str]:
    """{key: value} of key=value arguments; UsageError names the right keys."""
    values = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in keys:
            raise UsageError(f"unknown argument {argument!r}; the keys are: {', '.join(keys)} ({usage})")
        values[key] = value
    missing = [key for key in required if not values.get(key)]
    if missing:
        raise UsageError(f"{missing[0]}= is missing: {keys[missing[0]]} ({usage})")
    return values


def settings_from(values: Mapping[str, str]) -> Settings:
    """Settings of the keys among `values`; UsageError for a value that is none."""
    kinds: dict[str, Callable[[str], Any]] = {
        "study": lambda text: Path(text).expanduser(),
        "fewest_warmups": float,
        "bootstraps": int,
        "level": float,
        "seed": int,
    }
    given = {}
    for field in fields(Settings):
        if field.name in values:
            kind = kinds.get(field.name, str)
            try:
                given[field.name] = kind(values[field.name])
            except ValueError:
                wanted = "a whole number" if kind is int else "a number"
                raise UsageError(f"{field.name}={values[field.name]}: expected {wanted}") from None
    return Settings(**given)
