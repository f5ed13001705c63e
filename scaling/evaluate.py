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

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import soundfile

from bsrnn import BSRNN
from scaling.checkpoint import load_newest
from scaling.cli import load_config
from scaling.command import run_main
from scaling.config import DEFAULT_METRICS, require_metrics
from scaling.cores import num_cores
from scaling.device import torch_device
from scaling.early_stopping import EarlyStopping
from scaling.errors import UserError
from scaling.metrics import Waveform
from scaling.plan import RunPlan, read_planned, require_writable
from scaling.records import RunDirectory
from scaling.scoring import Utterance, evaluate_run, score_utterances, summary, write_scores
from scaling.shards import SAMPLE_RATE, ShardIndex


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


# --- a run ---------------------------------------------------------------------------------


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
        target = Path(str(config.scores))
        require_writable(target.parent, "name another file with scores=FILE")  # before hours
        rows = score_utterances(utterances, count, processes, metrics, {})
    write_scores(target, rows, metrics, add=config.run is not None)
    print(json.dumps(summary(rows, metrics), indent=2))
    print(f"{len(rows)} utterances, one row each: {target}")
    return 0


if __name__ == "__main__":
    run_main(main, __doc__ or "")
