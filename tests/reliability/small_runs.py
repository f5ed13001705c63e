"""Runs that are killed and broken by the hundred: a small model, many short steps, checkpoints often."""

from __future__ import annotations

import hashlib
from pathlib import Path

from scaling.checkpoint import load_newest
from scaling.records import RunDirectory

SMALL_RUN = (
    "model.num_channels=4",
    "model.num_layers=1",
    "train.crop_seconds=0.25",
    "execution.checkpoint_every=3",
    "execution.num_validations=2",
    "execution.metrics=[si_sdr]",
    "execution.silence_timeout=5",
)


def run_of(study: Path) -> RunDirectory:
    (path,) = (study / "runs").iterdir()
    return RunDirectory(path)


def num_rows(study: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in study.glob("runs/*/metrics.jsonl"))


def loss_log(run: RunDirectory) -> list[tuple]:
    return [(r["kind"], r["step"], r["loss"], r["terms"], r.get("gradient_norm")) for r in run.read_metrics()]


def weights_hash(run: RunDirectory) -> str:
    loaded = load_newest(run.checkpoints)
    assert loaded is not None, f"{run.path} has no whole checkpoint"
    digest = hashlib.sha256()
    for name, tensor in sorted(loaded[1]["model"].items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
