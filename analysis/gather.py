"""A study folder → tidy frames.

1. `plan.jsonl` says which runs there should be: each is one row of `Study.runs`, whatever
   has become of it.
2. The events of each run say what has become of it: a run is finished when its last record
   of that kind says so, and by nothing else (no checkpoint, no log, no exit status).
3. Its metrics become rows of `Study.curves`, its scores rows of `Study.scores`, and what both
   come to, columns of `Study.runs`.
4. Folders below runs/ that the plan does not name are listed in `Study.unplanned` and not read.

Numbers are given as recorded whatever the state of the run, so that a rule about which runs
to exclude can be applied to the frame: filter on `state == "finished"` for results.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.quantities import Quantity, metrics_named
from scaling.records import Record, RecordError, RunDirectory, StudyDirectory

SEED_AXES = ("seed", "train.seed")
UTTERANCE = ("id", "speaker", "noise", "snr_db", "duration")
UNPROCESSED = "unprocessed_"

# Column of `runs` → where a row of the plan has it. All but the seed are needed by the table.
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
REQUIRED = ("run_id", "size", "num_params", "macs_per_second", "hours", "steps", "seed")


@dataclass(frozen=True)
class Study:
    """A study's records as frames.

    runs: one row a planned run, in the order of the plan.
        run_id, name, size, num_params, num_params_folded, num_params_non_decoder,
        macs_per_second, data, hours, num_clips, index_hash, steps, global_batch, crop_seconds,
        audio_hours_seen, train_macs, estimated_hours, seed: from the plan.
        axes.NAME: the value of each axis of the sweep (JSON text where it is not a scalar).
        state: planned, submitted, running, preempted, finished or failed; failure: its class if it failed;
        reason: why it is not finished, in words; log: where to read on; last_step.
        validation_step, validation_loss, unprocessed_validation_loss: the last validation on
        record; NaN where the loss was not finite.
        utterances: distinct test utterances on record. For each METRIC:
        METRIC, unprocessed_METRIC: mean over the utterances for which there is a value;
        METRIC_gain: mean of enhanced - unprocessed over the utterances that have both;
        METRIC_scored, METRIC_refused: how many have an enhanced value, and how many have not.
        noisiest_si_sdr_gain: the gain over the noisiest quarter (see `noisiest_quarter`).
    scores: one row a run, utterance and metric.
        run_id, id, speaker, noise, snr_db, duration, noisiest_quarter (bool), metric,
        enhanced, unprocessed, gain (NaN where refused), refused (the reason, else None).
    curves: one row a run, kind ("train", "validation") and step; every other number of the
        record is a column, nested ones dotted (terms.magnitude); NaN where there is none.
    provenance: one row a planned run that has been prepared, indexed by run_id; the entries of
        its recorded provenance as text, nested ones dotted.
    science: run_id → the flattened settings that decide its result, the seed left out.
    metrics: the metrics of the scores, those of the table first.
    axes: the names of the sweep's axes, the seed left out.
    unplanned: folders below runs/ that the plan does not name.
    """

    directory: StudyDirectory
    runs: pd.DataFrame
    scores: pd.DataFrame
    curves: pd.DataFrame
    provenance: pd.DataFrame
    science: dict[str, dict[str, str]]
    metrics: tuple[Quantity, ...]
    axes: tuple[str, ...]
    unplanned: tuple[str, ...]

    @property
    def finished(self) -> pd.DataFrame:
        """The rows of `runs` that may stand in a table."""
        return self.runs[self.runs["state"] == "finished"]

    @property
    def unfinished(self) -> pd.DataFrame:
        """Everything planned that a table must call missing."""
        return self.runs[self.runs["state"] != "finished"]


def gather(directory: Path | str) -> Study:
    """Read a study folder; RecordError if it is none, or if its plan lacks what a table needs."""
    study = StudyDirectory(Path(directory))
    if not study.path.is_dir():
        raise RecordError(f"no study at {study.path}: there is no such folder; name one that holds a plan.jsonl")
    plan = _checked_plan(study)
    run_ids = list(plan)
    axes = tuple(
        dict.fromkeys(axis for row in plan.values() for axis in row.get("axes") or {} if axis not in SEED_AXES)
    )

    rows: list[dict[str, Any]] = []
    curves: list[pd.DataFrame] = []
    scores: list[pd.DataFrame] = []
    provenance: dict[str, dict[str, str]] = {}
    for run_id, planned in plan.items():
        run = study.run(run_id)
        curve = curve_frame(run.read_metrics())
        score = score_frame(run.read_scores())
        rows.append({**_planned(planned, axes), **_outcome(run, curve, planned), **_validation(curve), **_means(score)})
        curves.append(curve)
        scores.append(score)
        if run.plan.exists():
            provenance[run_id] = flatten(run.read_plan().get("provenance") or {})

    runs = pd.DataFrame(rows)
    score = _stack(scores, run_ids)
    metrics = metrics_named(score["metric"].unique())
    for metric in metrics:
        for column in (metric.key, UNPROCESSED + metric.key, f"{metric.key}_gain"):
            runs[column] = runs[column].astype(float) if column in runs else np.nan
        for column in (f"{metric.key}_scored", f"{metric.key}_refused"):
            runs[column] = runs[column].fillna(0).astype(int) if column in runs else 0
    for column in ("id", "speaker", "noise", "metric"):
        score[column] = score[column].astype("category")
    return Study(
        directory=study,
        runs=runs,
        scores=score,
        curves=_stack(curves, run_ids),
        provenance=pd.DataFrame.from_dict(provenance, orient="index").rename_axis("run_id"),
        science={run_id: _without_seeds(flatten(row.get("science") or {})) for run_id, row in plan.items()},
        metrics=metrics,
        axes=axes,
        unplanned=tuple(sorted(path.name for path in _folders(study.runs) if path.name not in plan)),
    )


# --- one run -------------------------------------------------------------------------------


def curve_frame(records: Sequence[Record]) -> pd.DataFrame:
    """The metrics of one run: kind, step, and a column for every other number, nested ones dotted."""
    flat = [_numbers(record) for record in records]
    names = dict.fromkeys(name for row in flat for name in row if name not in ("kind", "step"))
    columns: dict[str, Any] = {
        "kind": [str(record["kind"]) for record in records],
        "step": np.array([record["step"] for record in records], dtype=np.int64),
    }
    columns |= {name: np.array([row.get(name) for row in flat], dtype=float) for name in ("loss", *names)}
    return pd.DataFrame(columns)


def score_frame(records: Sequence[Record]) -> pd.DataFrame:
    """The scores of one run: one row an utterance and metric.

    An utterance scored more than once counts once, with the row written last.
    """
    utterances = list({record.get("id"): record for record in records}.values())
    keys = dict.fromkeys(
        key.removeprefix(UNPROCESSED) for row in utterances for key in row if key.startswith(UNPROCESSED)
    )
    count = len(utterances)
    snr_db = _column(utterances, "snr_db")
    about: dict[str, Any] = {key: [row.get(key) for row in utterances] for key in ("id", "speaker", "noise")}
    about |= {"snr_db": snr_db, "duration": _column(utterances, "duration")}
    about["noisiest_quarter"] = noisiest_quarter(snr_db, _column(utterances, UNPROCESSED + "si_sdr"), about["id"])
    blocks = []
    for key in keys:
        enhanced, unprocessed = _column(utterances, key), _column(utterances, UNPROCESSED + key)
        reasons = [row.get("refused") or {} for row in utterances]
        measured = {
            "metric": [key] * count,
            "enhanced": enhanced,
            "unprocessed": unprocessed,
            "gain": enhanced - unprocessed,
            "refused": np.array([_reason(refused, key) for refused in reasons], dtype=object),
        }
        blocks.append(pd.DataFrame({**about, **measured}))
    if not blocks:
        names = [*UTTERANCE, "noisiest_quarter", "metric", "enhanced", "unprocessed", "gain", "refused"]
        return pd.DataFrame({name: [] for name in names})
    return pd.concat(blocks, ignore_index=True)


def noisiest_quarter(snr_db: np.ndarray, unprocessed_si_sdr: np.ndarray, ids: Sequence[Any]) -> np.ndarray:
    """Which utterances (U,) are the quarter with the lowest SNR, as a boolean array (U,).

    Where no SNR is known the SI-SDR of the unprocessed input stands in for it: for noise
    uncorrelated with the speech the two agree. Of equal SNRs the lower SI-SDR, then the id,
    comes first, so that a quarter is a quarter (rounded up) and the same one in every run.
    """
    count = len(snr_db)
    level = np.where(np.isnan(snr_db), unprocessed_si_sdr, snr_db)
    order = np.lexsort((np.array([str(id) for id in ids]), unprocessed_si_sdr, level))
    chosen = np.zeros(count, dtype=bool)
    chosen[order[: math.ceil(count / 4)]] = True
    return chosen


def flatten(nested: Any, prefix: str = "") -> dict[str, str]:
    """A nested record as {dotted.key: text}: a string as it is, null as "none", the rest as JSON."""
    if isinstance(nested, dict) and (nested or not prefix):
        flat: dict[str, str] = {}
        for key, value in nested.items():
            flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
        return flat
    text = "none" if nested is None else nested if isinstance(nested, str) else json.dumps(nested, sort_keys=True)
    return {prefix: text}


def _planned(planned: Record, axes: Sequence[str]) -> dict[str, Any]:
    row = {column: _at(planned, path) for column, path in PLAN_COLUMNS.items()}
    values = planned.get("axes") or {}
    return row | {f"axes.{axis}": _scalar(values.get(axis)) for axis in axes}


def _outcome(run: RunDirectory, curve: pd.DataFrame, planned: Record) -> dict[str, Any]:
    state, event = run.state()
    last_step = int(curve["step"].max()) if len(curve) else 0
    failure = event.get("failure") if state == "failed" else None
    said = event.get("reason")
    reason = {  # why there is no result yet
        "planned": "never submitted",
        "submitted": "waiting for its job to start",
        "preempted": "interrupted from outside" + (f": {said}" if said else ""),
        "running": f"{event.get('event')}, at step {last_step} of {planned['steps']} by its records",
        "finished": None,
        "failed": ": ".join(str(part) for part in (failure, said) if part) or "no reason on record",
    }[state]
    log = event.get("log")
    if log is None and state != "finished" and run.jobs.is_dir():
        log = str(run.jobs)
    return {"state": state, "failure": failure, "reason": reason, "log": log, "last_step": last_step}


def _validation(curve: pd.DataFrame) -> dict[str, Any]:
    validations = curve[curve["kind"] == "validation"]
    last: Any = validations.iloc[-1] if len(validations) else {}
    return {
        "validation_step": last.get("step", np.nan),
        "validation_loss": last.get("loss", np.nan),
        "unprocessed_validation_loss": last.get("unprocessed_loss", np.nan),
    }


def _means(score: pd.DataFrame) -> dict[str, Any]:
    means: dict[str, Any] = {"utterances": score["id"].nunique(), "noisiest_si_sdr_gain": np.nan}
    for key, rows in score.groupby("metric", sort=False):
        scored = int(rows["enhanced"].notna().sum())
        means |= {
            str(key): rows["enhanced"].mean(),
            f"{UNPROCESSED}{key}": rows["unprocessed"].mean(),
            f"{key}_gain": rows["gain"].mean(),
            f"{key}_scored": scored,
            f"{key}_refused": len(rows) - scored,
        }
        if key == "si_sdr":
            means["noisiest_si_sdr_gain"] = rows.loc[rows["noisiest_quarter"].astype(bool), "gain"].mean()
    return means


# --- the parts of records ------------------------------------------------------------------


def _checked_plan(study: StudyDirectory) -> dict[str, Record]:
    """run_id → its row, the last one written; RecordError names what a row lacks."""
    plan: dict[str, Record] = {}
    for number, row in enumerate(study.read_plan(), start=1):
        for column in REQUIRED:
            if _at(row, PLAN_COLUMNS[column]) is None:
                key = ".".join(PLAN_COLUMNS[column])
                raise RecordError(f"{study.plan}: row {number} has no {key}; plan the study again")
        plan[str(row["run_id"])] = row
    if not plan:
        raise RecordError(f"{study.plan} holds no planned run; plan the study again with python -m launch.sweep")
    return plan


def _at(record: Record, path: Sequence[str]) -> Any:
    value: Any = record
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _scalar(value: Any) -> Any:
    return json.dumps(value, sort_keys=True) if isinstance(value, (dict, list)) else value


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def _column(rows: Sequence[Record], key: str) -> np.ndarray:
    return np.array([_number(row.get(key)) for row in rows], dtype=float)


def _numbers(record: Record, prefix: str = "") -> dict[str, float]:
    """The numbers of a metrics record, nested ones dotted; null is NaN, text is left out."""
    flat: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            flat |= _numbers(value, f"{prefix}{key}.")
        elif value is None or isinstance(value, (int, float)):
            flat[prefix + key] = _number(value)
    return flat


def _reason(refused: Record, key: str) -> str | None:
    reason = refused.get(key, refused.get(UNPROCESSED + key))
    return None if reason is None else str(reason)


def _without_seeds(settings: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in settings.items() if key.rpartition(".")[2] != "seed"}


def _folders(path: Path) -> list[Path]:
    return [entry for entry in path.iterdir() if entry.is_dir()] if path.is_dir() else []


def _stack(frames: Sequence[pd.DataFrame], run_ids: Sequence[str]) -> pd.DataFrame:
    """One frame of many, its first column the run each row is of (empty frames only give columns)."""
    full = [frame for frame in frames if len(frame)]
    stacked = pd.concat(full, ignore_index=True) if full else frames[0].copy()
    codes = np.repeat(np.arange(len(frames)), [len(frame) for frame in frames])
    stacked.insert(0, "run_id", pd.Series(pd.Categorical.from_codes(codes, categories=pd.Index(run_ids))))
    return stacked
