"""Where a study's numbers come from, and what a reader of its table must know.

Numbers of one table should come from one commit, one set of package versions, one version of each metric and one
data index. Where they don't, the table still stands, and the report says so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.exclusions import stopped_early
from analysis.gather import UNPROCESSED, Study
from analysis.quantities import VALIDATION_LOSS
from analysis.scaling_table import ScalingTable

# Entries of provenance that differ from run to run by nature.
PASSING = ("time", "date", "created", "started", "pid", "job_id", "run_id", "argv", "command")
LATER = ("hardware.", "metrics.")  # on record from a run's start, or its scores, on
FIRST = ("commit", "dirty", "diff", "index_hash")
LONGEST_VALUE = 64
MOST_VALUES = 4


@dataclass(frozen=True)
class Entry:
    """One fact of provenance: its key, and how many runs have which value."""

    key: str
    values: dict[str, int]

    @property
    def is_mixed(self) -> bool:
        return len(self.values) > 1

    def __str__(self) -> str:
        if not self.is_mixed:
            return next(iter(self.values), "")
        shown = [
            f"{value} ({count} run{'s' * (count != 1)})" for value, count in list(self.values.items())[:MOST_VALUES]
        ]
        more = len(self.values) - len(shown)
        return ", ".join(shown) + (f" and {more} other values" if more else "")


def provenance(study: Study) -> list[Entry]:
    """The data indexes of the plan and the recorded provenance of its runs, commits first."""
    indexes = [
        Entry(f"data index of {name}", _counted(runs["index_hash"]))
        for name, runs in study.runs.groupby(study.runs["data"].fillna("the data"))
        if runs["index_hash"].notna().any()
    ]
    recorded = study.provenance
    keys = [key for key in recorded.columns if key.rpartition(".")[2] not in PASSING]
    order = {name: rank for rank, name in enumerate(FIRST)}
    keys.sort(key=lambda key: next((rank for name, rank in order.items() if name in key.lower()), len(order)))
    # A run that has none yet is no mixture.
    found = {key: recorded[key].dropna() if key.startswith(LATER) else recorded[key] for key in keys}
    return [Entry(key, _counted(values)) for key, values in found.items()] + indexes


def trained(study: Study) -> pd.DataFrame:
    """The settings that decide results, as text: those that all runs share, a row a group, then each that differs."""
    settings = pd.DataFrame.from_dict(study.settings, orient="index").drop(columns="data.index_hash", errors="ignore")
    shared: dict[str, list[str]] = {}
    differing = []
    for key in settings:
        entry = Entry(str(key), _counted(settings[key]))
        if entry.is_mixed:
            differing.append({"Setting": key, "Value": str(entry), "": "differs"})
        else:
            group, _, name = entry.key.rpartition(".")
            shared.setdefault(group or name, []).append(f"{name} {entry}" if group else str(entry))
    rows = [{"Setting": group, "Value": ", ".join(values), "": ""} for group, values in shared.items()]
    return pd.DataFrame([*rows, *differing], columns=["Setting", "Value", ""])


def remarks(study: Study, table: ScalingTable) -> list[str]:
    """Sentences on what the table rests on, and where that is less than a reader would think."""
    said = []
    if study.unplanned:
        said.append(
            f"{_count(len(study.unplanned), 'folder')} below runs/ that the plan does not name "
            f"(not in any table): {', '.join(study.unplanned)}"
        )
    mixed = [entry.key for entry in provenance(study) if entry.is_mixed]
    if mixed:
        said.append(f"Provenance is mixed in {', '.join(mixed)} (see Provenance).")
    without = sorted(set(study.finished["run_id"]) - set(study.provenance.index))
    if without:
        said.append(f"No provenance on record: {', '.join(without)}.")
    said += _mixed_settings(study, table) + _training(study) + _records(study) + _refusals(study)
    return said + _replaced_crops(study) + _test_sets(study, table)


def _training(study: Study) -> list[str]:
    """Of finished runs that were not trained as planned, or on more than the training set."""
    finished, said = study.finished, []
    if told := stopped_early(finished):
        shares = (finished["steps_taken"] / finished["steps"])[finished["stopped_early"]]
        said.append(
            f"{told}, after {shares.min():.0%} to {shares.max():.0%} of their planned steps. Their validation loss is "
            "the best on record, hours seen and compute are of all steps taken; sizes are compared at the planned "
            "budget, and laws of hours seen or compute, minima at equal compute and advice are not made of them."
        )
    if count := int(finished["train_on_validation"].sum()):
        said.append(
            f"{count} of {len(finished)} runs trained on the speakers of validation too (data.train_on_validation, as "
            "data=vbd28 has it): their loss on these shows how well training data is fitted, and chooses no setting, "
            f"no size at equal compute and no advice{_kept_by_loss(study)}."
        )
    return said


def _records(study: Study) -> list[str]:
    """Of finished runs that lack a record."""
    said = []
    for _, run in study.finished.iterrows():
        if pd.isna(run["validation_step"]):
            said.append(f"{run['run_id']} finished without a validation on record.")
        elif run["last_validation_step"] != run["steps_taken"]:
            said.append(
                f"{run['run_id']} finished, but its last validation is at step {int(run['last_validation_step'])} "
                f"of {int(run['steps_taken'])}."
            )
        elif pd.isna(run["validation_loss"]):
            said.append(f"{run['run_id']} finished with a last validation loss that is not finite.")
        if not run["utterances"]:
            said.append(f"{run['run_id']} finished without scores on record.")
    return said


def _replaced_crops(study: Study) -> list[str]:
    if not len(study.replaced):
        return []
    runs = _count(study.replaced["run_id"].nunique(), "run")
    clips = _count(study.replaced["id"].nunique(), "clip")
    return [
        f"{_count(len(study.replaced), 'training crop')} of {runs} replaced, because {clips} of the shards "
        f"{'is' if clips.startswith('1 ') else 'are'} damaged (table replaced_crops)."
    ]


def _test_sets(study: Study, table: ScalingTable) -> list[str]:
    """Of finished runs that were not measured on the same utterances."""
    finished, said = study.finished, []
    counts = finished.loc[finished["utterances"] > 0, "utterances"]
    if counts.nunique() > 1:
        said.append(
            f"Finished runs were scored on {counts.min()} to {counts.max()} utterances, not on the same test set."
        )
    for key in (VALIDATION_LOSS.key, *(metric.key for metric in study.metrics)):
        values = finished[UNPROCESSED + key].dropna()
        if len(values) and np.isnan(table.unprocessed[f"{key}_mean"]):
            said.append(
                f"The unprocessed {key} differs between finished runs ({values.min():.4g} to {values.max():.4g}): "
                "their inputs, or how they measure it, do not compare; the table and the figures show none."
            )
    return said


def _kept_by_loss(study: Study) -> str:
    patient = [
        run_id
        for run_id in study.finished.loc[study.finished["train_on_validation"], "run_id"]
        if study.settings[run_id].get("train.early_stopping.patience", "none") != "none"
    ]
    return f"; yet it chose the weights of {len(patient)} of them (train.early_stopping)" if patient else ""


def _mixed_settings(study: Study, table: ScalingTable) -> list[str]:
    """Rows whose runs differ in settings beyond the seed, which no axis of the plan shows."""
    said = []
    for _, cell in table.cells.iterrows():
        settings = [study.science[run_id] for run_id in f"{cell['run_ids']} {cell['unfinished_run_ids']}".split()]
        keys = sorted({key for flat in settings for key in flat})
        differing = [key for key in keys if len({flat.get(key) for flat in settings}) > 1]
        if differing:
            said.append(f"Row {cell['label']} pools runs that differ in more than the seed: {', '.join(differing)}.")
    return said


def _refusals(study: Study) -> list[str]:
    refusals = study.refusals[study.refusals["run_id"].isin(study.finished["run_id"])]
    said = []
    where = "every run on the same corpus" if study.runs["index_hash"].nunique() > 1 else "every run"
    for metric, rows in refusals[~refusals["metric"].str.startswith(UNPROCESSED)].groupby("metric", sort=False):
        reasons = rows["reason"].value_counts()
        told = "; ".join(f"{reason} ({count})" for reason, count in list(reasons.items())[:MOST_VALUES])
        more = f" and {len(reasons) - MOST_VALUES} other reasons" if len(reasons) > MOST_VALUES else ""
        runs = _count(rows["run_id"].nunique(), "run")
        finished = study.finished
        few = finished.loc[finished[f"{metric}_scored"] < finished[f"{metric}_refused"], "run_id"]
        without = (
            f" {', '.join(few)} scored fewer than half: no mean of it, and nothing left out for it." if len(few) else ""
        )
        said.append(
            f"{metric} refused {_count(len(rows), 'utterance')} in {runs}, left out of its means in {where}: "
            f"{told}{more}.{without}"
        )
    return said


def _counted(values: pd.Series) -> dict[str, int]:
    """Value → runs that have it, the most frequent first; a run that lacks it has "not recorded"."""
    counts = values.fillna("not recorded").map(_short).value_counts()
    return {str(value): int(count) for value, count in counts.items()}


def _short(value: str) -> str:
    """A long value (a diff, a list of packages) by its beginning and a digest of the whole."""
    text = " ".join(str(value).split())
    if len(text) <= LONGEST_VALUE:
        return text
    return f"{text[: LONGEST_VALUE - 20]}… (sha256 {hashlib.sha256(str(value).encode()).hexdigest()[:8]})"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def provenance_frame(entries: Sequence[Entry]) -> pd.DataFrame:
    """Provenance as a table of text."""
    rows = [{"What": entry.key, "Value": str(entry), "": "mixed" if entry.is_mixed else ""} for entry in entries]
    return pd.DataFrame(rows, columns=["What", "Value", ""])
