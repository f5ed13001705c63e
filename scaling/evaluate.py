"""Scores of a run on the test set: whole utterances, enhanced and unprocessed.

    python -m scaling.evaluate run=DIR [shards=DIR]
    python -m scaling.evaluate noisy=DIR clean=DIR enhanced=DIR scores=FILE

The first scores the trained model of a run's folder and writes its scores.jsonl. The second
scores wav files, of any system, with the same names in three folders (16 kHz, mono).
Other settings: processes=N (default: all cores), metrics=[pesq_wb,csig,dnsmos_ovrl,...] (default: the run's
own; of wav files pesq_wb, stoi, estoi, si_sdr). What a run has of other metrics stays in its scores.jsonl.

One row an utterance: id, speaker, noise, snr_db, duration in seconds; each of `metrics` of the
enhanced signal, the same of the unprocessed one under `unprocessed_...`; and `refused`, which
names each metric that is not defined for the utterance, with the reason. The metrics' versions
go into a file beside, `scores.versions.json`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import soundfile
import torch

from bsrnn import BSRNN
from scaling.checkpoint import load_newest
from scaling.cli import load_config
from scaling.command import run_main
from scaling.config import DEFAULT_METRICS, require_metrics
from scaling.cores import num_cores
from scaling.device import set_arithmetic, torch_device
from scaling.early_stopping import EarlyStopping
from scaling.errors import UserError
from scaling.metrics import METRICS, Waveform, score, versions
from scaling.plan import RunPlan, read_planned, require_writable
from scaling.pool import spawned_pool
from scaling.progress import ProgressDisplay
from scaling.records import Record, RunDirectory, read_records, to_json, write_records, write_whole
from scaling.shard_reader import ShardReader
from scaling.shards import SAMPLE_RATE, Clip, ShardIndex
from scaling.stream import to_float

BACKLOG = 8  # scorings a process that may wait

# Utterance → metric → (value or None, reason of its refusal or None).
KnownScores = dict[str, dict[str, tuple[float | None, str | None]]]


@dataclass
class EvaluateConfig:
    """What to score, and where: a run, or a folder of wav files (conf/evaluate.yaml)."""

    run: str | None = None  # a run's folder
    shards: str | None = None  # where its shards are now; null: where they were
    noisy: str | None = None  # or three folders of wav files under the same names: noisy,
    clean: str | None = None  # clean,
    enhanced: str | None = None  # and enhanced; the scores go to
    scores: str | None = None  # this file
    processes: int | None = None  # null: all cores
    metrics: list[str] | None = None  # null: the run's own; of wav files the default ones

    def __post_init__(self) -> None:
        if self.processes is not None and self.processes < 1:
            raise UserError(f"processes = {self.processes}: expected at least 1, or null for all cores")
        if self.metrics is not None:
            require_metrics("metrics", self.metrics)
        names = ("run", "noisy", "clean", "enhanced", "scores")
        given = [name for name in names if getattr(self, name) is not None]
        if given not in (["run"], list(names[1:])):
            raise UserError(
                f"evaluate was given {', '.join(given) or 'nothing to score'}: expected run=DIR alone, or all of "
                "noisy=DIR clean=DIR enhanced=DIR scores=FILE"
            )
        if self.scores is not None and (not self.scores.endswith(".jsonl") or Path(self.scores).is_dir()):
            raise UserError(f"scores = {self.scores}: expected a file to write, named like scores.jsonl")


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
                    _, unfinished = wait(unfinished, return_when=FIRST_COMPLETED)
                progress.show(sum(future.done() for _, future, _ in pending))
            rows = []
            for record, enhanced, unprocessed in pending:
                rows.append(_row(record, metrics, enhanced, unprocessed, known))
                progress.show(max(progress.done, len(rows)))
            return rows
    finally:
        pool.shutdown(cancel_futures=True)  # after an interrupt, what waits is not scored


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


# --- a run ---------------------------------------------------------------------------------


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


def load_model(directory: RunDirectory) -> tuple[RunPlan, BSRNN]:
    """A run's trained model, in evaluation mode; UserError if its training has not ended."""
    plan = read_planned(directory)
    loaded = load_newest(directory.checkpoints)
    step = loaded[0].step if loaded else 0
    patience = plan.config.train.early_stopping.patience
    stopping = EarlyStopping(patience) if patience is not None else None
    if loaded is not None and stopping is not None:
        stopping.load_state_dict(loaded[1]["early_stopping"])
    is_due = loaded is not None and loaded[1].get("validation_is_due", False)
    if loaded is None or is_due or (step < plan.steps and not (stopping is not None and stopping.is_over)):
        raise UserError(
            f"run {directory.path} has checkpoints of {step} of its {plan.steps} steps: "
            "finish its training with the command that planned it"
        )
    model = BSRNN(plan.config.model.architecture(plan.config.train.norm_batch))
    model.load_state_dict(loaded[1]["model"] if stopping is None else stopping.best_weights)
    return plan, model.eval()


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


# --- wav files -----------------------------------------------------------------------------


def read_wav_triples(noisy: Path, clean: Path, enhanced: Path) -> tuple[int, Iterator[Utterance]]:
    """(number, utterances) of wav files with the same names in three folders."""
    for name, folder in (("noisy", noisy), ("clean", clean), ("enhanced", enhanced)):
        if not folder.is_dir():
            raise UserError(f"{name}={folder}: no such folder; give the folder of the {name} wav files")
    held = {folder: _wav_names(folder) for folder in (noisy, clean, enhanced)}
    names = sorted(set().union(*held.values()))
    if not held[enhanced]:
        raise UserError(f"enhanced={enhanced}: holds no .wav files")
    for folder, own in held.items():  # one that is left out would be one that counts for nothing
        missing = [name for name in names if name not in own]
        if missing:
            twin = next(other for other, its in reversed(held.items()) if missing[0] in its)
            raise UserError(
                f"{folder / missing[0]}: no such file, the twin of {twin / missing[0]} "
                f"({len(missing)} missing in all): give the three folders the same file names"
            )

    def utterances() -> Iterator[Utterance]:
        for name in names:
            signals = [_read_wav(folder / name) for folder in (noisy, clean, enhanced)]
            if len({len(signal) for signal in signals}) > 1:
                lengths = ", ".join(str(len(signal)) for signal in signals)
                raise UserError(f"{enhanced / name}: noisy, clean, enhanced have {lengths} samples; expected the same")
            stem = Path(name).stem
            record = {"id": stem, "speaker": stem.split("_")[0], "noise": None, "snr_db": None}
            yield Utterance(record | {"duration": len(signals[0]) / SAMPLE_RATE}, *signals)

    return len(names), utterances()


def _wav_names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix.lower() == ".wav" and not path.name.startswith(".")}


def _read_wav(path: Path) -> Waveform:
    try:
        signal, sample_rate = soundfile.read(path, dtype="float32")
    except soundfile.LibsndfileError as error:
        raise UserError(f"{path}: not readable as audio ({error}); give 16 kHz mono wav files") from None
    if sample_rate != SAMPLE_RATE or signal.ndim != 1 or not len(signal):
        shape = "mono" if signal.ndim == 1 else f"{signal.shape[1]} channels"
        raise UserError(f"{path}: {sample_rate} Hz, {shape}, {len(signal)} samples; expected 16000 Hz, mono, not empty")
    return np.ascontiguousarray(signal)


# --- command -------------------------------------------------------------------------------


def main(words: list[str]) -> int:
    config = load_config(EvaluateConfig, "evaluate", words)
    processes = config.processes or num_cores()
    if config.run is not None:
        directory = RunDirectory(Path(config.run))
        plan, model = load_model(directory)
        data = plan.config.data
        index = ShardIndex.load(replace(data, shards=config.shards or data.shards).shard_root)
        plan.check_index(index)
        metrics = config.metrics or plan.config.execution.metrics
        require_writable(directory.path, "make it writable, or copy it and name the copy with run=DIR")  # before hours
        model = model.to(torch_device(plan.config.execution.device))  # as in the run
        rows = evaluate_run(plan, index, model, processes, metrics)
        target = directory.scores
    else:
        folders = (config.noisy, config.clean, config.enhanced)
        count, utterances = read_wav_triples(*(Path(str(folder)) for folder in folders))
        metrics = config.metrics or [*DEFAULT_METRICS]
        rows = score_utterances(utterances, count, processes, metrics, {})
        target = Path(str(config.scores))
    write_scores(target, rows, metrics, add=config.run is not None)
    print(json.dumps(summary(rows, metrics), indent=2))
    print(f"{len(rows)} utterances, one row each: {target}")
    return 0


def write_scores(target: Path, rows: list[Record], metrics: Sequence[str], add: bool = False) -> None:
    """The rows, and beside them the version of each metric; `add`: what the file has of other metrics stays."""
    beside = target.with_suffix(".versions.json")
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


if __name__ == "__main__":
    run_main(main, __doc__ or "")
