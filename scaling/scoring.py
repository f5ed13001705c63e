"""Scoring: of each utterance the metrics, enhanced and unprocessed, as one row of scores.jsonl.

Utterances come one by one from whatever makes them (a model on the test set, wav files) and are scored by processes
meanwhile. What a row holds: `scaling.evaluate`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bsrnn import BSRNN
from scaling.device import set_arithmetic
from scaling.errors import UnreachableError
from scaling.metrics import METRICS, Waveform, score, versions
from scaling.own_time import OwnTime
from scaling.plan import RunPlan
from scaling.pool import kill, spawned_pool
from scaling.progress import ProgressDisplay
from scaling.records import Record, read_records, to_json, versions_of, write_records, write_whole
from scaling.shard_reader import ShardReader
from scaling.shards import Clip, ShardIndex
from scaling.stream import to_float

BACKLOG = 8  # scorings a process that may wait
LONGEST_SCORING = 600.0  # seconds in which some scoring of those that wait is done; each takes about a second

# Utterance → metric → (value or None, reason of its refusal or None).
KnownScores = dict[str, dict[str, tuple[float | None, str | None]]]


@dataclass(frozen=True)
class Utterance:
    """A test utterance on its way to its scores; waveforms are float32 of (num_samples,), full scale ±1."""

    record: Record  # id, speaker, noise, snr_db, duration
    noisy: Waveform
    clean: Waveform
    enhanced: Waveform


def score_utterances(
    utterances: Iterable[Utterance], num_utterances: int, processes: int, metrics: Sequence[str], known: KnownScores
) -> list[Record]:
    """One row an utterance, in order, in `processes` processes. Scores overlap with whatever makes the utterances.

    known: unprocessed scores that need not be taken again

    UnreachableError where the processes give no result for LONGEST_SCORING seconds.
    """
    pool = spawned_pool(processes)
    try:
        with ProgressDisplay("scoring", num_utterances) as progress:
            pending: list[tuple[Record, Future, Future]] = []
            unfinished: set[Future] = set()
            for utterance in utterances:
                missing = [name for name in metrics if name not in known.get(utterance.record["id"], {})]
                enhanced = pool.submit(score, utterance.enhanced, utterance.clean, metrics)
                unprocessed = pool.submit(score, utterance.noisy, utterance.clean, missing)
                pending.append((utterance.record, enhanced, unprocessed))
                unfinished |= {enhanced, unprocessed}
                while len(unfinished) > BACKLOG * processes:  # each holds its waveforms
                    unfinished = _some_done(unfinished)
                progress.show(sum(future.done() for _, future, _ in pending))
            rows = []
            for record, enhanced, unprocessed in pending:
                while not (enhanced.done() and unprocessed.done()):
                    unfinished = _some_done(unfinished)
                rows.append(_row(record, metrics, enhanced, unprocessed, known))
                progress.show(max(progress.done, len(rows)))
    except BaseException:
        kill(pool)  # what waits is not scored
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return rows


def _some_done(scorings: set[Future]) -> set[Future]:
    """Wait until one more scoring is done; those that are not."""
    now = OwnTime()
    since = now()
    while True:
        done, left = wait(scorings, OwnTime.LONGEST_PAUSE, return_when=FIRST_COMPLETED)
        if done:
            return left
        if now() - since > LONGEST_SCORING:
            raise UnreachableError(
                f"the processes of the metrics have given no result for {LONGEST_SCORING:g} s: they are frozen or "
                "hang; run the same command again"
            )


def _row(record: Record, metrics: Sequence[str], enhanced: Future, unprocessed: Future, known: KnownScores) -> Record:
    values, refused = enhanced.result()
    values_unprocessed, refused_unprocessed = unprocessed.result()
    for name, (value, reason) in known.get(record["id"], {}).items():
        if name in metrics:
            values_unprocessed[name] = value
            refused_unprocessed |= {name: reason} if reason else {}
    refused |= {f"unprocessed_{name}": refused_unprocessed[name] for name in metrics if name in refused_unprocessed}
    return (
        record | values | {f"unprocessed_{name}": values_unprocessed[name] for name in metrics} | {"refused": refused}
    )


# --- a model on the test set ---------------------------------------------------------------


def evaluate_run(
    plan: RunPlan, index: ShardIndex, model: BSRNN, processes: int, metrics: Sequence[str]
) -> list[Record]:
    """Score a model on the test set; a plan with `train.test` takes a few utterances spread over it."""
    clips = sorted(index.clips("test"), key=lambda clip: clip.id)
    if plan.config.train.test:
        clips = clips[:: max(1, len(clips) // 8)][:8]
    set_arithmetic("fp32")  # scores are of 32 bits whatever the training's precision was
    cache = index.folder / f"unprocessed-{index.index_hash[:8]}.jsonl"
    known = _read_unprocessed(cache)
    rows = score_utterances(enhance_clips(model, index, clips), len(clips), processes, metrics, known)
    if any(name not in known.get(clip.id, {}) for clip in clips for name in metrics):
        _remember_unprocessed(cache, known, rows, metrics)
    return rows


def enhance_clips(model: BSRNN, index: ShardIndex, clips: Iterable[Clip]) -> Iterator[Utterance]:
    """Whole clips, one after another, through a model in evaluation mode."""
    reader = ShardReader(index.root)
    device = next(model.parameters()).device
    model.eval()
    with torch.inference_mode():
        for clip in clips:
            noisy, clean = reader.read_clip(clip)
            enhanced = model(to_float(torch.from_numpy(noisy), device).unsqueeze(0)).waveform[0].float().cpu().numpy()
            yield Utterance(
                record={
                    "id": clip.id,
                    "speaker": clip.speaker,
                    "noise": clip.noise,
                    "snr_db": clip.snr_db,
                    "duration": clip.duration,
                },
                noisy=to_float(torch.from_numpy(noisy)).numpy(),
                clean=to_float(torch.from_numpy(clean)).numpy(),
                enhanced=enhanced,
            )


# The unprocessed scores belong to the data: taken once, they serve every run on it.


def _read_unprocessed(cache: Path) -> KnownScores:
    """Those whose metric still has the version that gave them."""
    known: KnownScores = {}
    for row in read_records(cache):
        for name, version in row.get("versions", {}).items():
            if name in METRICS and METRICS[name].version == version and f"unprocessed_{name}" in row:
                reason = row["refused"].get(f"unprocessed_{name}")
                known.setdefault(row["id"], {})[name] = row[f"unprocessed_{name}"], reason
    return known


def _remember_unprocessed(cache: Path, known: KnownScores, rows: list[Record], metrics: Sequence[str]) -> None:
    for row in rows:
        scores = {name: (row[f"unprocessed_{name}"], row["refused"].get(f"unprocessed_{name}")) for name in metrics}
        known.setdefault(row["id"], {}).update(scores)
    records = []
    for utterance, scores in known.items():
        values = {f"unprocessed_{name}": value for name, (value, _) in scores.items()}
        refused = {f"unprocessed_{name}": reason for name, (_, reason) in scores.items() if reason}
        records.append({"id": utterance, "versions": versions(list(scores)), **values, "refused": refused})
    with contextlib.suppress(OSError):  # shards that this user may only read: taken again next time
        write_records(cache, records)


# --- on record -----------------------------------------------------------------------------


def write_scores(target: Path, rows: list[Record], metrics: Sequence[str], add: bool = False) -> None:
    """The rows, and beside them the version of each metric; `add`: what the file has of other metrics stays."""
    beside = versions_of(target)
    taken = versions(metrics)
    known = {row["id"]: row for row in read_records(target)} if add and beside.exists() else {}
    if known.keys() == {row["id"] for row in rows}:
        before: dict[str, str] = json.loads(beside.read_text(encoding="utf-8"))
        others = {f"{prefix}{name}" for name in before.keys() - taken.keys() for prefix in ("", "unprocessed_")}
        rows = [_with_columns(row, known[row["id"]], others) for row in rows]
        taken = before | taken
    write_records(target, rows)
    write_whole(beside, to_json(taken) + "\n")


def _with_columns(row: Record, known: Record, columns: set[str]) -> Record:
    """A row of scores with some of those that were known before, and the reasons of their refusals."""
    before = {name: value for name, value in known.items() if name in columns}
    refused = {name: reason for name, reason in known["refused"].items() if name in columns}
    return row | before | {"refused": row["refused"] | refused}


def summary(rows: list[Record], metrics: Sequence[str]) -> dict[str, float | int | None]:
    """Means over the utterances that each metric accepts, and how many it refused."""
    means: dict[str, float | int | None] = {}
    for name in metrics:
        for column in (f"unprocessed_{name}", name):
            values = [row[column] for row in rows if row[column] is not None]
            means[column] = round(float(np.mean(values)), 4) if values else None
            if len(values) < len(rows):
                means[f"{column}_refused"] = len(rows) - len(values)
    return means
