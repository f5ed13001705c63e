"""Runs as tests find and compare them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from scaling.checkpoint import load_newest
from scaling.records import RunDirectory


def only_run(study: Path) -> RunDirectory:
    (path,) = (study / "runs").iterdir()
    return RunDirectory(path)


def result_of(directory: RunDirectory) -> tuple[list, str]:
    """Losses and gradient norms of every step, and the hash of the final weights, to the last bit."""
    losses = [(r["kind"], r["step"], r["loss"], r.get("gradient_norm")) for r in directory.read_metrics()]
    _, state = load_newest(directory.checkpoints)
    digest = hashlib.sha256()
    for name, tensor in sorted(state["model"].items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return losses, digest.hexdigest()
