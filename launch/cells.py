"""From a sweep's cells to the configurations of their runs, thousands of them in seconds.

Hydra composes the files once for each combination of choices (`model=xt`). A cell's other values
are typed and checked one by one against that, as Hydra's overrides are, and put into a copy of the
dataclasses of the first cell that sets the same settings, which check themselves and each other again.
What an interpolation (`${...}`) in the files refers to, what is no plain value, or lies in a list, is composed anew, at
some ten milliseconds a cell.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from launch.config import StudyConfig
from scaling.cli import compose_config, is_group, set_value, to_object, with_values
from scaling.config import RunConfig
from scaling.grid import Cell

Choices = tuple[str, ...]
Config = TypeVar("Config")
RUN_PARTS = {field.name for field in fields(RunConfig)}
OF_A_LIST = re.compile(r"\.\d+(\.|$)|\[")  # groups.0.lr_scale, groups[0].lr_scale
LEAVES = (str, int, float, bool, type(None))


def split(cell: Cell) -> tuple[Choices, Cell]:
    """A cell's choices of groups, as Hydra takes them, and its other values."""
    choices = tuple(f"{axis}={value}" for axis, value in cell.items() if is_group(axis))
    return choices, {axis: value for axis, value in cell.items() if not is_group(axis)}


def without_axes(words: Sequence[str]) -> list[str]:
    """The words but for a sweep's axes, which may be long: parsing takes time with a list's length squared."""
    return [word for word in words if not word.startswith(("++sweep.axes", "++sweep.points", "++sweep.exclude"))]


@dataclass
class _Base:
    """What the cells of one combination of choices share."""

    composed: DictConfig
    # By the settings that cells give, of the first such cell: without values the files may make no sense, and another
    # cell's would stay in those that do not give them.
    runs: dict[frozenset[str], RunConfig]
    scratch: DictConfig  # values are typed by setting them here
    referred: set[str]  # settings that interpolations refer to
    typed: dict[str, Any]  # by key and value


class CellComposer:
    """Configurations of cells, each starting from the command line's overrides."""

    def __init__(self, words: Sequence[str], study: str) -> None:
        self.words, self.study = without_axes(words), study
        self.bases: dict[Choices, _Base] = {}

    def run(self, cell: Cell) -> RunConfig:
        """The configuration of a cell's run; UserError if there is no such run."""
        choices, values = split(cell)
        base = self.bases.get(choices)
        if base is None:
            base = self.bases[choices] = self._base(choices)
        if any(key.split(".")[0] not in RUN_PARTS or OF_A_LIST.search(key) for key in values) or any(
            _is_related(key, referred) for key in values for referred in base.referred
        ):
            return self._composed(base.composed, values)
        changes: dict[str, Any] = {}
        for key, value in values.items():
            typed = self._typed(base, key, value)
            if not isinstance(typed, LEAVES):
                return self._composed(base.composed, values)
            changes[key] = typed
        given = frozenset(values)
        if given not in base.runs:
            base.runs[given] = self._composed(base.composed, values)
        return _replaced(base.runs[given], changes)

    def _base(self, choices: Choices) -> _Base:
        composed = compose_config(StudyConfig, "study", [*self.words, *choices])
        referred = set(re.findall(r"\$\{([\w.]+)\}", json.dumps(OmegaConf.to_container(composed, resolve=False))))
        OmegaConf.update(composed, "study", self.study)
        OmegaConf.update(composed, "sweep", None)
        return _Base(composed, {}, with_values(composed, {}, StudyConfig), referred, {})

    def _composed(self, composed: DictConfig, values: Cell) -> RunConfig:
        config = to_object(StudyConfig, with_values(composed, values, StudyConfig), is_checked=True)
        return replace(RunConfig.part_of(config), study=self.study)

    def _typed(self, base: _Base, key: str, value: Any) -> Any:
        """A value as the setting's type has it; UserError if it cannot be that."""
        text = f"{key}={value!r}"
        if text not in base.typed:
            set_value(base.scratch, key, value, StudyConfig)
            base.typed[text] = OmegaConf.select(base.scratch, key)
        return base.typed[text]


def _replaced(config: Config, changes: Mapping[str, Any]) -> Config:
    """A copy of nested dataclasses with settings (dotted key -> value) changed, every changed one checked again."""
    here: dict[str, Any] = {key: value for key, value in changes.items() if "." not in key}
    below: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        first, _, rest = key.partition(".")
        if rest:
            below.setdefault(first, {})[rest] = value
    for name, changed in below.items():
        here[name] = _replaced(getattr(config, name), changed)
    return replace(config, **here)  # type: ignore[type-var]  # a dataclass, whichever


def _is_related(key: str, other: str) -> bool:
    """Whether one setting is the other, or a part of it."""
    return key == other or key.startswith(f"{other}.") or other.startswith(f"{key}.")
