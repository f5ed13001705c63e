"""A study folder → tidy frames.

1. `plan.jsonl` says which runs there should be: each is one row of `Study.runs`, whatever
   has become of it.
2. The events of each run say what has become of it: a run is finished when its last record
   of that kind says so, and by nothing else (no checkpoint, no log, no exit status).
3. Its metrics become rows of `Study.curves`, its scores rows of `Study.scores`, and what both
   come to, columns of `Study.runs` (`analysis.reading` has one run). Large studies are read by several
   processes, and their curves are kept in fewer points.
4. Folders below runs/ that the plan does not name are listed in `Study.unplanned` and not read.

Numbers are given as recorded whatever the state of the run, so that a rule about which runs
to exclude can be applied to the frame: filter on `state == "finished"` for results.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.quantities import NOISIEST_GAIN, Quantity, metrics_named
from analysis.reading import (
    KINDS,
    REPLACED,
    UNPROCESSED,
    UTTERANCE,
    RunRecords,
    execution_settings,
    flatten,
    read_run,
)
from analysis.workers import pool
from scaling.records import Record, RecordError, StudyDirectory

SEED_AXES = ("seed", "train.seed")
MOST_CURVE_ROWS = 2_000_000  # of all runs together; beyond, each run keeps its share of points
RUNS_A_TASK = 200  # for each of several processes, where a study has more than one task's

# Column of `runs` → where a row of the plan has it; a plan of an earlier version may lack OPTIONAL ones.
PLAN_COLUMNS = {
    "run_id": ("run_id",),
    "name": ("name",),
    "size": ("size", "name"),
    "num_params": ("size", "num_params"),
    "num_params_folded": ("size", "num_params_folded"),
    "num_params_non_decoder": ("size", "num_params_non_decoder"),
    "macs_per_second": ("size", "macs_per_second"),
    "data": ("data", "name"),
    "hours": ("data", "hours"),
    "num_clips": ("data", "num_clips"),
    "index_hash": ("data", "index_hash"),
    "steps": ("steps",),
    "global_batch": ("global_batch",),
    "crop_seconds": ("crop_seconds",),
    "audio_hours_seen": ("audio_hours_seen",),
    "train_macs": ("train_macs",),
    "estimated_hours": ("estimated_hours",),
    "seed": ("seed",),
}
NUMBERS = tuple(name for name in PLAN_COLUMNS if name not in ("run_id", "name", "size", "data", "index_hash"))
SCIENCE_OF_DATA = ("hours", "order_seed", "train_on_validation", "block_shards")
OPTIONAL = {"name", "num_params_folded", "num_params_non_decoder", "data", "num_clips", "index_hash"}
OPTIONAL |= {"train_macs", "estimated_hours"}
REQUIRED = tuple(name for name in PLAN_COLUMNS if name not in OPTIONAL)


@dataclass(frozen=True)
class Study:
    """A study's records as frames.

    runs: one row a planned run, in the order of the plan.
        run_id, name, size, num_params, num_params_folded, num_params_non_decoder,
        macs_per_second, data, hours, num_clips, index_hash, steps, global_batch, crop_seconds,
        audio_hours_seen, train_macs, estimated_hours (of the whole job's time), seed: from the plan.
        axes.NAME: the value of each axis of the sweep (JSON text where it is not a scalar).
        train_on_validation: whether it trained on the speakers of validation too, whose loss then is of training.
        state: planned, submitted, running, preempted, finished or failed; failure: its class if it failed;
        reason: why it is not finished, in words; log: where to read on; last_step.
        steps_taken, hours_seen, macs_spent: of a finished run, what its training came to; below the planned steps,
        audio_hours_seen and train_macs where train.early_stopping ended it (stopped_early). NaN of others.
        validation_step, validation_loss, unprocessed_validation_loss: the last validation on
        record, or the best of a run that keeps its best weights (train.early_stopping); NaN where it was not finite.
        last_validation_step: of the last one on record, kept or not.
        utterances: distinct test utterances on record. For each METRIC:
        METRIC, unprocessed_METRIC: mean over the utterances for which there is a value and that no finished run
        refused; METRIC_gain: mean of enhanced - unprocessed over those that have both; NaN of a run with fewer than
        half of its utterances scored, which counts in no other's means.
        METRIC_scored, METRIC_refused: how many have an enhanced value, and how many have not.
        noisiest_si_sdr_gain: the gain over the noisiest quarter (see `noisiest_quarter`).
        training_hours: of compute, hours times processes, over all sessions, evaluation left out, a killed session
        as far as its records reach;
        attempts: jobs of a cluster that executed it; device_hours: what those took in all, of GPUs, or of cores
        where they had none (loading, validation, scoring and what was cut off included); NaN where it was no job;
        world_size, nodes: processes and nodes of the last session, NaN where not on record;
        audio_seconds_per_second, step_seconds, communication_seconds: medians over training, on as many processes
        as the last session's.
        replaced_crops: training crops up to last_step whose clips were damaged.
    scores: one row a run and utterance.
        run_id, id, speaker, noise, snr_db, duration, noisiest_quarter (bool); for each metric
        METRIC and unprocessed_METRIC in single precision; NaN where refused, in this run or any other that counts.
    refusals: run_id, id, metric ("unprocessed_..." for the input's) and reason of every score that is missing.
    replaced: run_id, t (which crop of the run), id (its clip), shard, what (was wrong) and by (which clip came instead)
        of every training crop that was replaced.
    curves: one row a run, kind ("train", "validation") and step; every other number of the
        record is a column, nested ones dotted (terms.magnitude); NaN where there is none. In a study of more than
        MOST_CURVE_ROWS training rows are means over stretches of steps, under the last step of each.
    provenance: one row a planned run that has been prepared, indexed by run_id; the entries of
        its recorded provenance as text, nested ones dotted; hardware.PART: of its last session; metrics.NAME: the
        version of each metric that it has scores of.
    science: run_id → the flattened settings that decide its result, the seed left out; those that came with a later
        version are missing where they stand at their default.
    settings: run_id → the same with these.
    execution: run_id → the flattened settings of how it is executed, which change no result.
    metrics: the metrics of the scores, those of the table first.
    axes: the names of the sweep's axes, the seed left out.
    unplanned: folders below runs/ that the plan does not name.
    """

    directory: StudyDirectory
    runs: pd.DataFrame
    scores: pd.DataFrame
    refusals: pd.DataFrame
    replaced: pd.DataFrame
    curves: pd.DataFrame
    provenance: pd.DataFrame
    science: dict[str, dict[str, str]]
    settings: dict[str, dict[str, str]]
    execution: dict[str, dict[str, str]]
    metrics: tuple[Quantity, ...]
    axes: tuple[str, ...]
    unplanned: tuple[str, ...]

    @property
    def finished(self) -> pd.DataFrame:
        """The rows of `runs` that may stand in a table."""
        return self.runs[self.runs["state"] == "finished"]


def gather(directory: Path | str) -> Study:
    """Read a study folder; RecordError if it is none, or if its plan lacks what a table needs."""
    study = StudyDirectory(Path(directory))
    if not study.path.is_dir():
        raise RecordError(f"no study at {study.path}: no such folder; name one that holds a plan.jsonl")
    plan = _checked_plan(study)
    run_ids = list(plan)
    axes = tuple(
        dict.fromkeys(axis for row in plan.values() for axis in row.get("axes") or {} if axis not in SEED_AXES)
    )

    read = _read_all(study, plan)
    runs = pd.DataFrame(
        [{**_planned(planned, axes), **one.outcome} for planned, one in zip(plan.values(), read, strict=True)]
    )
    science = {run_id: _without_seeds(flatten(row.get("science") or {})) for run_id, row in plan.items()}
    share = runs["steps_taken"] / runs["steps"]
    runs = runs.assign(
        train_on_validation=[flat.get("data.train_on_validation") == "true" for flat in science.values()],
        stopped_early=share < 1,
        hours_seen=runs["audio_hours_seen"] * share,
        macs_spent=runs["train_macs"].astype(float) * share,
    )
    scores = _stacked_scores(read, run_ids)
    about = {"run_id", *UTTERANCE, "noisiest_quarter"}
    metrics = metrics_named(name for name in scores.columns if name not in about and not name.startswith(UNPROCESSED))
    for metric in metrics:
        for column in (metric.key, UNPROCESSED + metric.key, f"{metric.key}_gain"):
            runs[column] = runs[column].astype(float) if column in runs else np.nan
        for column in (f"{metric.key}_scored", f"{metric.key}_refused"):
            runs[column] = runs[column].fillna(0).astype(int) if column in runs else 0
    replaced = _replaced(read, runs)
    runs["replaced_crops"] = replaced.groupby("run_id").size().reindex(run_ids, fill_value=0).to_numpy()
    told = [(run_id, *refusal) for run_id, one in zip(run_ids, read, strict=True) for refusal in one.refusals]
    refusals = pd.DataFrame(told, columns=["run_id", "id", "metric", "reason"])
    for metric in metrics:
        of_metric = refusals[refusals["metric"] == metric.key]
        if len(of_metric):
            runs, scores = _of_the_same_utterances(runs, scores, of_metric, metric.key)
    provenance = {
        run_id: one.provenance for run_id, one in zip(run_ids, read, strict=True) if one.provenance is not None
    }
    return Study(
        directory=study,
        runs=runs,
        scores=scores,
        refusals=refusals,
        replaced=replaced,
        curves=_stacked_curves(read, run_ids),
        provenance=pd.DataFrame.from_dict(provenance, orient="index").rename_axis("run_id"),
        science=science,
        settings={run_id: _settings(row) | science[run_id] for run_id, row in plan.items()},
        execution={  # a plan that was made anew may ask for another execution than a run has had
            run_id: execution_settings(row) if one.execution is None else one.execution
            for (run_id, row), one in zip(plan.items(), read, strict=True)
        },
        metrics=metrics,
        axes=axes,
        unplanned=tuple(sorted(path.name for path in _folders(study.runs) if path.name not in plan)),
    )


# --- many runs -----------------------------------------------------------------------------


def _read_all(study: StudyDirectory, plan: dict[str, Record]) -> list[RunRecords]:
    """Every planned run's records, in the plan's order."""
    tasks = [(run_id, int(row["steps"])) for run_id, row in plan.items()]
    points = max(50, MOST_CURVE_ROWS // len(tasks))
    read = functools.partial(_read_some, study.path, points)
    if len(tasks) <= RUNS_A_TASK:
        return read(tasks)
    chunks = [tasks[first : first + RUNS_A_TASK] for first in range(0, len(tasks), RUNS_A_TASK)]
    with pool() as workers:
        return [one for chunk in workers.map(read, chunks) for one in chunk]


def _read_some(path: Path, points: int, tasks: Sequence[tuple[str, int]]) -> list[RunRecords]:
    study = StudyDirectory(path)
    read = [read_run(study.run(run_id), steps, points) for run_id, steps in tasks]
    # Most runs are scored on the same utterances: kept, and sent between processes, once a task.
    known: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    return [replace(one, about=known.setdefault(one.about, one.about)) for one in read]


def _run_column(counts: Sequence[int], run_ids: Sequence[str]) -> pd.Series:
    codes = np.repeat(np.arange(len(counts)), counts)
    return pd.Series(pd.Categorical.from_codes(codes, categories=pd.Index(run_ids)))


def _joined(columns: Sequence[dict[str, np.ndarray]], name: str, counts: Sequence[int], dtype: Any) -> np.ndarray:
    """One column of all runs; NaN for a run that lacks it."""
    joined = np.full(sum(counts), np.nan, dtype=dtype)
    first = 0
    for of_run, count in zip(columns, counts, strict=True):
        if name in of_run:
            joined[first : first + count] = of_run[name]
        first += count
    return joined


def _stacked_curves(read: Sequence[RunRecords], run_ids: Sequence[str]) -> pd.DataFrame:
    curves = [one.curve for one in read]
    counts = [len(curve["step"]) for curve in curves]
    kinds = np.concatenate([curve["kind"] for curve in curves])
    columns: dict[str, Any] = {
        "run_id": _run_column(counts, run_ids),
        "kind": pd.Categorical.from_codes(kinds, categories=pd.Index(KINDS)),
        "step": np.concatenate([curve["step"] for curve in curves]),
    }
    names = dict.fromkeys(name for curve in curves for name in curve if name not in columns)
    columns |= {name: _joined(curves, name, counts, np.float64) for name in names}
    return pd.DataFrame(columns)


def _replaced(read: Sequence[RunRecords], runs: pd.DataFrame) -> pd.DataFrame:
    """The replaced crops of all runs; crops are read ahead, and those of steps that were never made do not count."""
    crops = runs["last_step"] * runs["global_batch"].astype(float).fillna(np.inf)
    rows = [
        (run_id, *crop)
        for run_id, count, one in zip(runs["run_id"], crops, read, strict=True)
        for crop in one.replaced
        if crop[0] < count
    ]
    return pd.DataFrame(rows, columns=["run_id", *REPLACED])


def _stacked_scores(read: Sequence[RunRecords], run_ids: Sequence[str]) -> pd.DataFrame:
    scores = [one.scores for one in read]
    counts = [len(score["noisiest_quarter"]) for score in scores]
    columns: dict[str, Any] = {"run_id": _run_column(counts, run_ids)}
    for place, name in enumerate(UTTERANCE):
        if name in ("snr_db", "duration"):
            parts = [np.array(one.about[place], dtype=np.float32) for one in read]
            columns[name] = np.concatenate(parts)
            continue
        seen: dict[tuple[Any, ...], np.ndarray] = {}  # most runs are scored on the same utterances
        codes: dict[Any, int] = {}
        for one in read:
            texts = one.about[place]
            if texts not in seen:
                known = [-1 if text is None else codes.setdefault(text, len(codes)) for text in texts]
                seen[texts] = np.array(known, dtype=np.int32)
        stacked = np.concatenate([seen[one.about[place]] for one in read])
        columns[name] = pd.Categorical.from_codes(stacked, categories=pd.Index(list(codes), dtype=object))
    columns["noisiest_quarter"] = np.concatenate([score["noisiest_quarter"] for score in scores])
    names = dict.fromkeys(name for score in scores for name in score if name not in columns)
    columns |= {name: _joined(scores, name, counts, np.float32) for name in names}
    return pd.DataFrame(columns)


def _of_the_same_utterances(
    runs: pd.DataFrame, scores: pd.DataFrame, refusals: pd.DataFrame, key: str
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Runs and scores with a metric's values, and their means, of the utterances alone that no finished run refused.

    Those of one corpus: another may have utterances of the same ids. Over a run's own, a model whose worst output is
    refused would be averaged over the easier rest. A run with fewer than half of its utterances scored keeps no value,
    and takes none from the others.
    """
    is_few = runs[f"{key}_scored"] < runs[f"{key}_refused"]
    counted = runs.loc[(runs["state"] == "finished") & ~is_few, "run_id"]
    told = refusals[refusals["run_id"].isin(counted)]
    corpora = dict(zip(runs["run_id"], runs["index_hash"].astype(str), strict=True))
    of_corpora = scores["run_id"].map(corpora)
    refused = pd.Series(False, index=scores.index)
    for corpus, ids in told.groupby(told["run_id"].map(corpora))["id"]:
        refused |= (of_corpora == corpus) & scores["id"].isin(ids)
    dropped = refused | scores["run_id"].isin(runs.loc[is_few, "run_id"])
    if not dropped.any():
        return runs, scores
    scores = scores.assign(
        **{key: scores[key].mask(dropped), UNPROCESSED + key: scores[UNPROCESSED + key].mask(refused)}
    )
    enhanced, unprocessed = scores[key].astype(float), scores[UNPROCESSED + key].astype(float)
    values = {key: enhanced, UNPROCESSED + key: unprocessed, f"{key}_gain": enhanced - unprocessed}
    if key == "si_sdr":
        values[NOISIEST_GAIN.key] = (enhanced - unprocessed).where(scores["noisiest_quarter"])
    of_runs = scores["run_id"].astype(str)
    return runs.assign(**{name: runs["run_id"].map(of.groupby(of_runs).mean()) for name, of in values.items()}), scores


# --- the parts of records ------------------------------------------------------------------


def _checked_plan(study: StudyDirectory) -> dict[str, Record]:
    """run_id → its row, the last one written; RecordError names what a row lacks, and what is no number."""
    plan: dict[str, Record] = {}
    for number, row in enumerate(study.read_plan(), start=1):
        for column in REQUIRED:
            if _at(row, PLAN_COLUMNS[column]) is None:
                key = ".".join(PLAN_COLUMNS[column])
                raise RecordError(f"{study.plan}: row {number} has no {key}; plan the study again")
        for column in NUMBERS:
            value = _at(row, PLAN_COLUMNS[column])
            if value is not None and not _is_number(value):
                key = ".".join(PLAN_COLUMNS[column])
                raise RecordError(f"{study.plan}: row {number} has {key} {value!r}, not a number; plan the study again")
        if not isinstance(row.get("axes") or {}, dict):
            raise RecordError(
                f"{study.plan}: row {number} has axes {row['axes']!r}, not an object; plan the study again"
            )
        plan[str(row["run_id"])] = row
    if not plan:
        raise RecordError(f"{study.plan} holds no planned run; plan the study again with python -m launch.sweep")
    return plan


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _planned(planned: Record, axes: Sequence[str]) -> dict[str, Any]:
    row = {column: _at(planned, path) for column, path in PLAN_COLUMNS.items()}
    values = planned.get("axes") or {}
    return row | {f"axes.{axis}": _scalar(values.get(axis)) for axis in axes}


def _at(record: Record, path: Sequence[str]) -> Any:
    value: Any = record
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _scalar(value: Any) -> Any:
    return json.dumps(value, sort_keys=True) if isinstance(value, (dict, list)) else value


def _settings(planned: Record) -> dict[str, str]:
    """The flattened settings of a plan's configuration that decide its result, but for labels and the budget."""

    def of(group: str, keep: Callable[[str], bool]) -> dict[str, Any]:
        values = _at(planned, ("config", group))
        return {name: value for name, value in values.items() if keep(name)} if isinstance(values, dict) else {}

    groups = {
        "model": of("model", lambda name: name != "name"),
        "data": of("data", lambda name: name in SCIENCE_OF_DATA),
        "train": of("train", lambda name: name != "budget"),
    }
    return _without_seeds(flatten({group: values for group, values in groups.items() if values}))


def _without_seeds(settings: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in settings.items() if key.rpartition(".")[2] != "seed"}


def _folders(path: Path) -> list[Path]:
    return [entry for entry in path.iterdir() if entry.is_dir()] if path.is_dir() else []
