"""From a sweep's axes to its cells.

An axis is a configuration group (`model`) or a setting (`seed`, `data.hours`) with the values
it takes; the cells are the product of the axes, then any points named one by one, without
those that `exclude` matches.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

from scaling.errors import UserError

Cell = dict[str, Any]  # axis -> value: one point of the grid


@dataclass
class SweepConfig:
    """A grid of cells (conf/sweep). A dotted axis may also be written nested: {data: {hours: [1, 2]}}."""

    name: str
    axes: dict[str, Any] = field(default_factory=dict)  # axis -> list of values
    points: list[Any] = field(default_factory=list)  # cells beside the product, each axis -> value
    exclude: list[Any] = field(default_factory=list)  # drops the cells in which all of axis -> value hold
    # whether cells that differ in execution alone are runs of their own, as where speed is what is studied
    compares_execution: bool = False

    def __post_init__(self) -> None:
        for name, rules in (("points", self.points), ("exclude", self.exclude)):
            for rule in rules:
                if not isinstance(rule, dict):
                    raise UserError(f"sweep.{name} has {rule}: expected axis: value pairs, as [{{model: s, seed: 0}}]")
        for axis, values in flat_settings(self.axes).items():
            if not isinstance(values, list) or not values:
                raise UserError(
                    f"sweep.axes.{axis} = {values}: expected a list of at least one value, as sweep.axes.{axis}=[...]"
                )
        if not self.axes and not self.points:
            raise UserError(f"sweep {self.name} has neither axes nor points: give one of them")

    @property
    def axis_names(self) -> list[str]:
        return list(
            dict.fromkeys(
                [*flat_settings(self.axes), *(axis for point in self.points for axis in flat_settings(point))]
            )
        )

    def cells(self) -> list[Cell]:
        """Every cell once; UserError if none is left."""
        grid = self._grid()
        excluded = [flat_settings(rule) for rule in self.exclude]
        cells: dict[str, Cell] = {}  # by their text, which has the same number only once
        for cell in grid:
            if not any(rule.items() <= cell.items() for rule in excluded):
                cells.setdefault(repr(sorted(cell.items())), cell)
        if not cells:
            raise UserError(f"sweep {self.name}: sweep.exclude leaves no cell of {len(grid)}")
        return list(cells.values())

    def idle_rules(self) -> list[Cell]:
        """The rules of `exclude` that drop no cell: misspelt, or of values that the axes do not take."""
        grid = self._grid()
        rules = [flat_settings(rule) for rule in self.exclude]
        return [rule for rule in rules if not any(rule.items() <= cell.items() for cell in grid)]

    def _grid(self) -> list[Cell]:
        """The product of the axes, and the points."""
        axes = flat_settings(self.axes)
        product = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())] if axes else []
        return [*product, *(flat_settings(point) for point in self.points)]


def flat_settings(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of settings as dotted key → value."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= flat_settings(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
