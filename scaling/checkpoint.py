"""Checkpoints that are whole or not there.

A checkpoint is a folder `step-00000050` with the state, in files of one or several ranks, and a
manifest of their sizes and SHA-256. It is written under a temporary name, every file and folder
is flushed to disk, the ranks vote that all of them succeeded, and the rename commits it: a crash
at any point leaves the one before. Two are kept; the older goes only after the newer is
committed. Loading takes the newest that its manifest confirms and passes over a damaged one
with a warning; the next to be committed takes the place of those that were passed over.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from scaling.errors import UserError
from scaling.processes import ALONE, Processes
from scaling.records import sync

log = logging.getLogger(__name__)

NUM_KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: the state of a run after `step` optimiser steps."""

    path: Path
    step: int

    @property
    def state(self) -> Path:
        """Holds the whole model under "model", however the rest is cut into parts."""
        return self.path / "state.pt"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def layout(self) -> dict[str, int] | None:
        """How the state is cut into parts, by the manifest; None: it is whole."""
        return json.loads(self.manifest.read_text())["layout"]

    def damage(self) -> str | None:
        """What is wrong with the files by the manifest; None if nothing is."""
        try:
            text = self.manifest.read_text()
            content = json.loads(text)
            if text != _manifest_text(content):
                return "manifest.json does not have the SHA-256 that it says itself"
            files = content["files"]
            for name, expected in files.items():
                found = _describe(self.path / name)
                if found["num_bytes"] != expected["num_bytes"]:
                    return f"{name} has {found['num_bytes']} bytes, its manifest says {expected['num_bytes']}"
                if found["sha256"] != expected["sha256"]:
                    return f"{name} does not have the SHA-256 that its manifest says"
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"{type(error).__name__}: {error}"
        return None


def _manifest_text(content: dict[str, Any]) -> str:
    """The manifest as it is written, with the SHA-256 of all else that it holds."""
    content = {key: value for key, value in content.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps(content | {"sha256": digest}, indent=2, sort_keys=True) + "\n"


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return {"num_bytes": file.tell(), "sha256": digest.hexdigest()}


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """The committed checkpoints, oldest first, valid or not."""
    found = [
        Checkpoint(path, int(path.name.removeprefix("step-")))
        for path in folder.glob("step-*")
        if path.name.removeprefix("step-").isdigit()
    ]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def save_checkpoint(
    folder: Path,
    step: int,
    write: Callable[[Path], None],
    processes: Processes = ALONE,
    layout: dict[str, int] | None = None,
) -> Checkpoint:
    """Commit a checkpoint and let go of all but the newest two; called by every rank.

    write: puts this rank's files into the folder that it is given

    UserError, on every rank, if a rank could not write: disk full, quota, input or output error.
    """
    final = Checkpoint(folder / f"step-{step:08d}", step)
    temporary = Checkpoint(folder / f".writing-{step:08d}", step)

    def write_part() -> None:
        write(temporary.path)
        # Each rank from its own node: on a network's file system another node's data is not its to flush.
        for path in temporary.path.rglob("*"):
            if path.is_file():
                sync(path)

    def commit() -> None:
        files = {
            str(path.relative_to(temporary.path)): _describe(path)
            for path in sorted(temporary.path.rglob("*"))
            if path.is_file()
        }
        with temporary.manifest.open("w") as text:
            text.write(_manifest_text({"step": step, "layout": layout, "files": files}))
            text.flush()
            os.fsync(text.fileno())
        for path in [*(path for path in temporary.path.rglob("*") if path.is_dir()), temporary.path]:
            sync(path)
        if final.path.exists():  # a damaged one of the same step, passed over at load
            shutil.rmtree(final.path)
        os.rename(temporary.path, final.path)
        sync(folder)

    by_first = processes.is_first
    for action in (
        partial(_make_room, folder, temporary.path) if by_first else None,
        write_part,
        commit if by_first else None,
    ):
        error = _attempt(action)
        is_alone = error is not None and layout is not None and action is write_part and processes.world_size > 1
        if is_alone:
            # The ranks write their parts together: others may wait for this one in there, not at the vote.
            errors: list[str | None] = [None] * processes.world_size
            errors[processes.rank] = error
        else:
            errors = processes.gather(error)
        if any(errors):
            if by_first and not is_alone:  # others may still write there: the next save clears it away
                shutil.rmtree(temporary.path, ignore_errors=True)
            alone = processes.world_size == 1
            what = "; ".join(error if alone else f"rank {rank}: {error}" for rank, error in enumerate(errors) if error)
            raise UserError(
                f"checkpoint {final.path} could not be written ({what}; {_free_space(folder)}): "
                "make the disk writable and free some space, and run the same command again; "
                "the checkpoint before it is whole"
            )
    if processes.is_first:
        _let_go(folder, step)
    return final


def _make_room(folder: Path, temporary: Path) -> None:
    if not folder.exists():
        folder.mkdir(parents=True)
        sync(folder.parent)
    for stale in folder.glob(".writing-*"):  # of processes that were killed; the run's lock makes us the only writers
        shutil.rmtree(stale)
    temporary.mkdir()


def _attempt(action: Callable[[], None] | None) -> str | None:
    """Run the action, if there is one; what stopped it, if the disk did."""
    if action is None:
        return None
    try:
        action()
    except OSError as error:
        return f"{error.strerror or error}"
    except RuntimeError as error:
        if not is_failed_write(error):
            raise
        return str(error).splitlines()[0]
    return None


def is_failed_write(error: Exception) -> bool:
    """Whether an error is how torch's zip writer tells that the disk took no more."""
    words = ("PytorchStreamWriter", "inline_container", "unexpected pos", "iostream error")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def _free_space(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB free"
    except OSError as error:
        return f"free space unknown: {error.strerror}"


def _let_go(folder: Path, step: int) -> None:
    """Keep the newest two up to the committed step: later ones were damaged when the run took up an earlier one."""
    checkpoints = list_checkpoints(folder)
    kept = [checkpoint for checkpoint in checkpoints if checkpoint.step <= step][-NUM_KEPT:]
    for checkpoint in checkpoints:
        if checkpoint not in kept:
            shutil.rmtree(checkpoint.path, ignore_errors=True)


def newest_whole(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that its manifest confirms; None if there is none."""
    for checkpoint in reversed(list_checkpoints(folder)):
        damage = checkpoint.damage()
        if damage is None:
            return checkpoint
        log.warning("checkpoint %s is damaged (%s): passed over for the one before", checkpoint.path, damage)
    return None


def load_newest(folder: Path, device: torch.device | str = "cpu") -> tuple[Checkpoint, dict[str, Any]] | None:
    """The newest whole checkpoint and what its `state.pt` holds; None if there is none."""
    checkpoint = newest_whole(folder)
    if checkpoint is None:
        return None
    return checkpoint, torch.load(checkpoint.state, map_location=device, weights_only=True)
