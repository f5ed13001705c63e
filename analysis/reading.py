"""One run's files → its numbers, as arrays: what `analysis.gather` stacks into frames.

A run that was killed and went on is one run: its metrics count once a step, its utterances once
an id, and its hours of compute are those of all its sessions together.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from scaling.records import Record, RunDirectory, read_records

UNPROCESSED = "unprocessed_"
UTTERANCE = ("id", "speaker", "noise", "snr_db", "duration")
REPLACED = ("t", "id", "shard", "what", "by")
TRAINED = ("evaluating", "finished", "failed", "preempted")  # a session's own events after its training

Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class RunRecords:
    """What one run has on record.

    outcome: state, failure, reason, log, last_step, steps_taken, the validation, hours and speed of training,
        world_size, nodes, and the means of the scores (see `gather.Study.runs`).
    curve: kind (0 train, 1 validation), step, and every other number of the metrics, (R,) each.
    about: (id, speaker, noise, snr_db, duration) of each utterance, as tuples of equal length.
    scores: METRIC and unprocessed_METRIC, noisiest_quarter, (U,) each.
    refusals: (id, metric, reason) of every score that is missing.
    replaced: (t, id, shard, what, by) of every crop whose clip was damaged.
    provenance: as text, nested entries dotted, with hardware and the versions of the scores' metrics; None if the run
        has not been prepared.
    execution: the flattened settings that it was begun with; None likewise.
    """

    outcome: dict[str, Any]
    curve: Columns
    about: tuple[tuple[Any, ...], ...]
    scores: Columns
    refusals: list[tuple[str, str, str]]
    replaced: list[tuple[Any, ...]]
    provenance: dict[str, str] | None
    execution: dict[str, str] | None


def read_run(run: RunDirectory, steps: int, curve_points: int | None) -> RunRecords:
    """A run's records; RecordError if its plan is damaged.

    steps: as planned; curve_points: most rows of training metrics to keep, None for all
    """
    events = run.read_events()
    curve = _curve(run.read_metrics(orjson.loads))
    about, scores, refusals = _scores(run.read_scores(orjson.loads))
    provenance, execution = None, None
    is_best_kept = False
    if run.plan.exists():
        plan = run.read_plan()
        execution = execution_settings(plan)
        is_best_kept = _stops_early(plan)
        provenance = flatten(plan.get("provenance") or {}) | _resumed_by(events, plan.get("provenance") or {})
        if hardware := _hardware(events):
            provenance |= flatten({"hardware": hardware})
        provenance |= _metric_versions(run, events, scores)
    outcome = {**_outcome(run, curve, steps), **_validation(curve, is_best_kept)}
    outcome |= {**_execution(run, events, curve), **_means(scores)}
    # Means are of double precision; what is kept of each utterance has the seven digits of single.
    single = {name: values if values.dtype == bool else values.astype(np.float32) for name, values in scores.items()}
    replaced = [tuple(row.get(key) for key in REPLACED) for row in run.read_quarantine()]
    curve = _thinned(curve, curve_points)
    return RunRecords(outcome, curve, about, single, refusals, replaced, provenance, execution)


def execution_settings(plan: Record) -> dict[str, str]:
    """The flattened settings of how a run is executed, of its plan or its row of the study's; {} if there are none."""
    config = plan.get("config")
    values = config.get("execution") if isinstance(config, dict) else None
    return flatten({"execution": values}) if isinstance(values, dict) else {}


def _resumed_by(events: Sequence[Record], planned: Record) -> dict[str, str]:
    """Of a run that went on under other code than it was planned with, all that it was trained by, in order."""
    changed = {}
    for key in ("commit", "uncommitted_diff_sha256"):
        values = [planned.get(key), *(event[key] for event in events if key in event)]
        known = list(dict.fromkeys("none" if value is None else str(value) for value in values))
        if len(known) > 1:
            changed[key] = ", then ".join(known)
    return changed


# --- metrics -------------------------------------------------------------------------------

KINDS = ("train", "validation")


def _curve(records: Sequence[Record]) -> Columns:
    known = [record for record in records if record["kind"] in KINDS]
    columns: Columns = {
        "kind": np.array([KINDS.index(record["kind"]) for record in known], dtype=np.int8),
        "step": np.array([record["step"] for record in known], dtype=np.int64),
        "loss": np.full(len(known), np.nan),
    }
    return columns | _numbers(known, skip=("kind", "step"))


def _by_key(records: Sequence[Record]) -> dict[str, Sequence[Any]]:
    """The values of each key that the records have, in their order; None where one lacks it."""
    kinds = dict.fromkeys(map(tuple, records))
    keys = tuple(dict.fromkeys(key for kind in kinds for key in kind))
    if len(kinds) == 1 and len(keys) > 1:  # as most files are: all columns in one pass
        return dict(zip(keys, zip(*map(itemgetter(*keys), records), strict=True), strict=True))
    return {key: [record.get(key) for record in records] for key in keys}


def _numbers(records: Sequence[Record], prefix: str = "", skip: Sequence[str] = ()) -> Columns:
    """Every number of the records as a column, nested ones dotted; NaN for null or none, text left out."""
    columns: Columns = {}
    for key, values in _by_key(records).items():
        if key in skip:
            continue
        sample = next((value for value in values if value is not None), math.nan)
        if isinstance(sample, dict):
            nested = [value if isinstance(value, dict) else {} for value in values]
            columns |= _numbers(nested, f"{prefix}{key}.")
        elif isinstance(sample, (int, float)):
            columns[prefix + key] = _floats(values)
    return columns


def _floats(values: Sequence[Any]) -> NDArray[np.float64]:
    try:
        return np.array(values, dtype=float)  # None becomes NaN
    except (TypeError, ValueError):
        return np.array([value if isinstance(value, (int, float)) else math.nan for value in values], dtype=float)


def _thinned(curve: Columns, points: int | None) -> Columns:
    """Every validation, and means over stretches of the training rows, so that few are left; steps are the last's."""
    train = np.flatnonzero(curve["kind"] == 0)
    if points is None or len(train) <= points:
        return curve
    edges = np.linspace(0, len(train), points + 1).astype(int)
    counts = np.diff(edges)
    others = np.flatnonzero(curve["kind"] != 0)
    thin: Columns = {}
    for name, values in curve.items():
        means = values[train[edges[1:] - 1]]
        if name not in ("kind", "step"):
            means = np.add.reduceat(values[train], edges[:-1]) / counts
        thin[name] = np.concatenate([means, values[others]])
    order = np.lexsort((thin["kind"], thin["step"]))
    return {name: values[order] for name, values in thin.items()}


# --- what became of it ---------------------------------------------------------------------


def _outcome(run: RunDirectory, curve: Columns, steps: int) -> dict[str, Any]:
    state, event = run.state()
    last_step = int(curve["step"].max()) if len(curve["step"]) else 0
    failure = event.get("failure") if state == "failed" else None
    said = event.get("reason")
    reason = {  # why there is no result yet
        "planned": "never submitted",
        "submitted": "waiting for its job to start",
        "preempted": "interrupted from outside" + (f": {said}" if said else ""),
        "running": f"{event.get('event')}, at step {last_step} of {steps} by its records",
        "finished": None,
        "failed": ": ".join(str(part) for part in (failure, said) if part) or "no reason on record",
    }[state]
    log = event.get("log")
    if log is None and state != "finished" and run.jobs.is_dir():
        log = str(run.jobs)
    taken = event.get("step", steps) if state == "finished" else np.nan
    outcome = {"state": state, "failure": failure, "reason": reason, "log": log, "last_step": last_step}
    return outcome | {"steps_taken": taken if isinstance(taken, (int, float)) else steps}


def _stops_early(plan: Record) -> bool:
    """Whether the weights of the best validation are the trained model, and not the last ones."""
    science = plan.get("science")
    train = science.get("train") if isinstance(science, dict) else None
    stopping = train.get("early_stopping") if isinstance(train, dict) else None
    return isinstance(stopping, dict) and stopping.get("patience") is not None


def _validation(curve: Columns, is_best_kept: bool) -> dict[str, Any]:
    """Of the trained model: the last, or of a run that keeps its best weights the best."""
    rows = np.flatnonzero(curve["kind"] == 1)
    if not len(rows):
        names = ("validation_step", "validation_loss", "unprocessed_validation_loss", "last_validation_step")
        return dict.fromkeys(names, np.nan)
    unprocessed = curve.get("unprocessed_loss", np.full(len(curve["step"]), np.nan))
    losses = curve["loss"][rows]
    row = rows[int(np.nanargmin(losses))] if is_best_kept and np.isfinite(losses).any() else rows[-1]
    return {
        "validation_step": float(curve["step"][row]),
        "validation_loss": float(curve["loss"][row]),
        "unprocessed_validation_loss": float(unprocessed[row]),
        "last_validation_step": float(curve["step"][rows[-1]]),
    }


def _hardware(events: Sequence[Record]) -> Record:
    """Of the last session on record; {} if none says."""
    said = [event.get("hardware") for event in events if event.get("event") in ("started", "resumed")]
    found = [hardware for hardware in said if isinstance(hardware, dict)]
    # The host differs from job to job by nature; what it is made of should not.
    return {key: value for key, value in found[-1].items() if key != "host"} if found else {}


def _execution(run: RunDirectory, events: Sequence[Record], curve: Columns) -> dict[str, Any]:
    """Hours and speed of training: hours are those of processes, so twice the time for two.

    Speed is of the sessions on as many processes as the last had, which are on record beside it.
    """
    sessions = _sessions(run, events)
    nodes = [session.nodes for session in sessions if session.nodes is not None]
    train = curve["kind"] == 0
    alike = list(itertools.takewhile(lambda each: each.size == sessions[-1].size, reversed(sessions)))
    if len(alike) < len(sessions) and "time" in curve:
        train &= ~(curve["time"] < alike[-1].began)

    def median(name: str) -> float:
        values = curve[name][train] if name in curve else np.empty(0)
        # The first rows hold the warming up of caches and compilers, the very first is of that step alone.
        values = values[max(min(1, len(values) - 1), len(values) // 10) :]
        values = values[np.isfinite(values)]
        return float(np.median(values)) if len(values) else np.nan

    ends = [event for event in events if event.get("event") == "ended"]
    return {
        "training_hours": sum(each.seconds * each.size for each in sessions) / 3600 if sessions else np.nan,
        "attempts": len(ends) or np.nan,
        "device_hours": _floats([end.get("device_hours") for end in ends]).sum() if ends else np.nan,
        "world_size": sessions[-1].size if sessions else np.nan,
        "nodes": nodes[-1] if nodes else np.nan,
        "audio_seconds_per_second": median("audio_seconds_per_second"),
        "step_seconds": median("step_seconds"),
        "communication_seconds": median("communication_seconds"),
    }


@dataclass(frozen=True)
class _Session:
    """One execution of a run: when it began, seconds of training, processes, and nodes where they are on record."""

    began: float
    seconds: float
    size: int
    nodes: int | None


def _sessions(run: RunDirectory, events: Sequence[Record]) -> list[_Session]:
    """A session trains until it evaluates or says that it ends; killed, or still running, as far as its records reach.

    What others put on record of the run (the next submission, an end that nobody saw) may come a day later.
    """
    timed = [event for event in events if isinstance(event.get("time"), (int, float))]
    starts = [number for number, event in enumerate(timed) if event.get("event") in ("started", "resumed")]
    sessions, rows = [], None
    for start, following in itertools.pairwise([*starts, len(timed)]):
        first = timed[start]
        own = [event for event in timed[start:following] if event.get("pid") == first.get("pid")]
        over = next((event["time"] for event in own if event.get("event") in TRAINED), None)
        if over is None:
            if rows is None:  # as written: of the steps that were made twice `read_metrics` has the later row alone
                rows = [row.get("time") for row in read_records(run.metrics, orjson.loads)]
            until = timed[following]["time"] if following < len(timed) else math.inf
            signs = [at for at in rows if isinstance(at, (int, float)) and first["time"] <= at < until]
            over = max([event["time"] for event in own] + signs)
        size, nodes = first.get("world_size"), first.get("nodes")
        sessions.append(
            _Session(
                first["time"],
                max(0.0, over - first["time"]),
                int(size) if isinstance(size, (int, float)) and size >= 1 else 1,
                int(nodes) if isinstance(nodes, (int, float)) else None,
            )
        )
    return sessions


# --- scores --------------------------------------------------------------------------------


def _scores(records: Sequence[Record]) -> tuple[tuple[tuple[Any, ...], ...], Columns, list[tuple[str, str, str]]]:
    """Scores of one run; an utterance scored more than once counts once, with the row written last."""
    rows = list({record.get("id"): record for record in records}.values())
    values = _by_key(rows)
    none = (None,) * len(rows)
    about = tuple(tuple(values.get(key, none)) for key in UTTERANCE)
    columns: Columns = {}
    refusals: list[tuple[str, str, str]] = []
    for key in [key.removeprefix(UNPROCESSED) for key in values if key.startswith(UNPROCESSED)]:
        columns[key] = _floats(values.get(key, none))
        columns[UNPROCESSED + key] = _floats(values[UNPROCESSED + key])
        for number in np.flatnonzero(np.isnan(columns[key])):
            refusals.append((str(about[0][number]), key, _reason(rows[number].get("refused") or {}, key)))
        for number in np.flatnonzero(np.isnan(columns[UNPROCESSED + key]) & ~np.isnan(columns[key])):
            refused = rows[number].get("refused") or {}
            refusals.append((str(about[0][number]), UNPROCESSED + key, _reason(refused, UNPROCESSED + key)))
    inputs = columns.get(UNPROCESSED + "si_sdr", np.full(len(rows), np.nan))
    columns["noisiest_quarter"] = noisiest_quarter(_floats(about[3]), inputs, about[0])
    return about, columns, refusals


def _metric_versions(run: RunDirectory, events: Sequence[Record], scores: Columns) -> dict[str, str]:
    """metrics.NAME → version of each metric that the run has scores of, by the file beside these or else its events."""
    names = _metrics(scores)
    if not names:
        return {}
    said = [event.get("metrics") for event in events if event.get("event") == "evaluating"]
    of_events = next((versions for versions in reversed(said) if isinstance(versions, dict)), {})
    known = next(read_records(run.versions, orjson.loads), of_events)
    return flatten({"metrics": {name: known.get(name, "not recorded") for name in names}})


def _metrics(scores: Columns) -> list[str]:
    return [name for name in scores if not name.startswith(UNPROCESSED) and name != "noisiest_quarter"]


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


def _means(scores: Columns) -> dict[str, Any]:
    means: dict[str, Any] = {"utterances": len(scores["noisiest_quarter"]), "noisiest_si_sdr_gain": np.nan}
    for key in _metrics(scores):
        enhanced, unprocessed = scores[key], scores[UNPROCESSED + key]
        gain = enhanced - unprocessed
        scored = int(np.isfinite(enhanced).sum())
        means |= {
            key: _mean(enhanced),
            UNPROCESSED + key: _mean(unprocessed),
            f"{key}_gain": _mean(gain),
            f"{key}_scored": scored,
            f"{key}_refused": len(enhanced) - scored,
        }
        if key == "si_sdr":
            means["noisiest_si_sdr_gain"] = _mean(gain[scores["noisiest_quarter"]])
    return means


def _mean(values: NDArray[np.float64]) -> float:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else np.nan


def _reason(refused: Record, key: str) -> str:
    reason = refused.get(key, refused.get(UNPROCESSED + key))
    return "no reason on record" if reason is None else str(reason)


# --- text ----------------------------------------------------------------------------------


def flatten(nested: Any, prefix: str = "") -> dict[str, str]:
    """A nested record as {dotted.key: text}: a string as it is, null as "none", the rest as JSON."""
    if isinstance(nested, dict) and (nested or not prefix):
        flat: dict[str, str] = {}
        for key, value in nested.items():
            flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
        return flat
    text = "none" if nested is None else nested if isinstance(nested, str) else json.dumps(nested, sort_keys=True)
    return {prefix: text}
