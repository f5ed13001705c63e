"""What makes runs of one study be of different families, or of different settings, though no axis of the plan says so.

Models that differ in more than width and depth are no sizes of one another; runs on other shards have another
validation set, and runs that trained on the speakers of validation another loss. No law goes through two families and
no line joins them. Any other setting that decides results and differs between runs of one cell, as in a folder into
which two studies were merged, is an axis that the plan does not name: such runs are no seeds of each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from analysis.cells import cell_numbers
from analysis.gather import Study
from analysis.quantities import MISSING

WIDTH_AND_DEPTH = ("model.num_channels", "model.num_layers")
TRAINED_ON = "data.train_on_validation"
CORPUS = "data.index_hash"
OF_CELLS = ("data.hours", "steps")  # a cell has them of its own, to three digits


def tells_families(setting: str) -> bool:
    """Whether runs that differ in a setting are of different families."""
    return setting in (TRAINED_ON, CORPUS) or (setting.startswith("model.") and setting not in WIDTH_AND_DEPTH)


def with_families(runs: pd.DataFrame, study: Study) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """(runs with a column axes.SETTING for each setting that differs and no axis shows, the axes with these).

    Those are the settings that tell families apart, and those that differ between runs of one cell.
    """
    return with_settings(runs, study, study.science, cell_numbers(runs, study.axes))


def with_settings(
    runs: pd.DataFrame, study: Study, settings: Mapping[str, Mapping[str, str]], alike: pd.Series
) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """The same as `with_families`, of these settings of each run, where `alike` groups runs instead of cells.

    settings: run_id → flattened settings; alike: the group of each run, in which no axis tells runs apart.
    """
    flats = [settings[run_id] for run_id in runs["run_id"]]
    found: dict[str, list[str]] = {}
    for key in sorted({key for flat in flats for key in flat if key not in (*study.axes, *OF_CELLS)}):
        values = [flat.get(key) for flat in flats]
        if len(set(values)) > 1 and (tells_families(key) or _differ_within(values, alike)):
            # Settings that came with a later version are not in the science of runs that have their default.
            at_default = [run_id for run_id, value in zip(runs["run_id"], values, strict=True) if value is None]
            said = (study.settings[run_id].get(key) for run_id in at_default)
            default = next((text for text in said if text is not None), MISSING)
            found[key] = [default if value is None else value for value in values]
    if CORPUS in found:
        found[CORPUS] = [
            f"{name} {index_hash[:8]}" if isinstance(name, str) else index_hash
            for name, index_hash in zip(runs["data"], found[CORPUS], strict=True)
        ]
    return runs.assign(**{f"axes.{key}": values for key, values in found.items()}), (*study.axes, *found)


def _differ_within(values: Sequence[str | None], groups: pd.Series) -> bool:
    within = pd.Series(np.array(values, dtype=object), index=groups.index).groupby(groups)
    return bool((within.nunique(dropna=False) > 1).any())


def family_names(cells: pd.DataFrame, settings: Sequence[str]) -> pd.Series:
    """A name for each cell's family: the sizes in it, or what it is of these settings where a size is in several."""
    if not settings:
        return pd.Series("", index=cells.index)
    family = cells.groupby([f"axes.{setting}" for setting in settings], sort=False, dropna=False).ngroup()
    if has_shared_sizes(cells.assign(family=family)):
        values = cells[[f"axes.{setting}" for setting in settings]].astype(str).to_numpy()
        named = [
            ", ".join(f"{setting}={value}" for setting, value in zip(settings, row, strict=True)) for row in values
        ]
        return pd.Series(named, index=cells.index)
    return family.map(cells.groupby(family)["size"].agg(lambda sizes: ", ".join(dict.fromkeys(sizes))))


def has_shared_sizes(cells: pd.DataFrame) -> bool:
    """Whether a size is in several families, so that its name does not tell its cells apart."""
    return bool((cells.groupby("size")["family"].nunique() > 1).any())


def unprocessed_mean(runs: pd.DataFrame, column: str) -> float:
    """What the unprocessed input comes to over these runs; NaN where they have another input, or measure it otherwise.

    It is scored anew in every run, with one result: a mean over the runs, and no spread. Values that lie further apart
    than one in a thousand are of other shards, or of another loss, front end or version of a metric.
    """
    values = runs[column].astype(float)
    return float(values.mean()) if values.max() - values.min() <= 1e-3 * values.abs().max() else np.nan
