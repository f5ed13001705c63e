"""Checkpoints that are whole or not there.

A checkpoint is a folder `step-00000050` with the state and a manifest of its files' sizes and
SHA-256. It is written under a temporary name, every file and folder is flushed to disk, and
the rename commits it: a crash at any point leaves the one before. Two are kept; the
older goes only after the newer is committed. Loading takes the newest that its manifest
confirms and passes over a damaged one with a warning.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scaling.errors import UserError
from scaling.records import sync_folder

log = logging.getLogger(__name__)

NUM_KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: the state of a run after `step` optimiser steps."""

    path: Path
    step: int

    @property
    def state(self) -> Path:
        return self.path / "state.pt"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    def damage(self) -> str | None:
        """What is wrong with the files by the manifest; None if nothing is."""
        try:
            files = json.loads(self.manifest.read_text())["files"]
            for name, expected in files.items():
                data = (self.path / name).read_bytes()
                if len(data) != expected["num_bytes"]:
                    return f"{name} has {len(data)} bytes, its manifest says {expected['num_bytes']}"
                if hashlib.sha256(data).hexdigest() != expected["sha256"]:
                    return f"{name} does not have the SHA-256 that its manifest says"
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"{type(error).__name__}: {error}"
        return None


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """The committed checkpoints, oldest first, valid or not."""
    found = [
        Checkpoint(path, int(path.name.removeprefix("step-")))
        for path in folder.glob("step-*")
        if path.name.removeprefix("step-").isdigit()
    ]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> Checkpoint:
    """Commit a checkpoint and let go of all but the newest two; UserError if the disk is full."""
    final = Checkpoint(folder / f"step-{step:08d}", step)
    temporary = Checkpoint(folder / f".writing-{step:08d}-{os.getpid()}", step)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".writing-*"):  # of a process that was killed; the run's lock makes us the only writer
            shutil.rmtree(stale)
        temporary.path.mkdir()
        with temporary.state.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        data = temporary.state.read_bytes()
        files = {temporary.state.name: {"num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
        with temporary.manifest.open("w") as text:
            json.dump({"step": step, "files": files}, text, indent=2)
            text.flush()
            os.fsync(text.fileno())
        sync_folder(temporary.path)
        if final.path.exists():  # a damaged one of the same step, passed over at load
            shutil.rmtree(final.path)
        os.rename(temporary.path, final.path)
        sync_folder(folder)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(temporary.path, ignore_errors=True)
        # torch.save tells of a full disk as a RuntimeError of its zip writer
        if isinstance(error, RuntimeError) or error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(folder).free
            raise UserError(
                f"checkpoint {final.path} could not be written ({error}; {free / 2**20:.0f} MiB free): "
                "free some space and run the same command again; the checkpoint before it is whole"
            ) from None
        raise
    for old in list_checkpoints(folder)[:-NUM_KEPT]:
        shutil.rmtree(old.path, ignore_errors=True)
    return final


def load_newest(folder: Path, device: torch.device | str = "cpu") -> tuple[Checkpoint, dict[str, Any]] | None:
    """The newest whole checkpoint and its state; None if there is none."""
    for checkpoint in reversed(list_checkpoints(folder)):
        damage = checkpoint.damage()
        if damage is None:
            return checkpoint, torch.load(checkpoint.state, map_location=device, weights_only=True)
        log.warning("checkpoint %s is damaged (%s): passed over for the one before", checkpoint.path, damage)
    return None
