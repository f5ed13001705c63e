"""Cells: runs that differ in nothing but the seed, and what they come to over their seeds."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from analysis.quantities import round_hours


def cell_numbers(runs: pd.DataFrame, axes: Sequence[str]) -> pd.Series:
    """Which cell each run is of: size, hours of data (as a budget), steps and every axis of the sweep are its own."""
    budgets = runs.assign(hours=runs["hours"].map(round_hours))
    key = ["size", "num_params", "macs_per_second", "hours", "steps", *(f"axes.{axis}" for axis in axes)]
    return budgets.groupby(key, sort=False, dropna=False).ngroup()


def over_seeds(runs: pd.DataFrame, quantities: Sequence[str]) -> pd.DataFrame:
    """A row a cell: QUANTITY_mean, QUANTITY_std (NaN below two seeds) and QUANTITY_n (seeds with a value)."""
    values = runs.groupby("cell", sort=False)[list(quantities)].agg(["mean", "std", "count"])
    return values.set_axis([f"{quantity}_{what}" for quantity in quantities for what in ("mean", "std", "n")], axis=1)
