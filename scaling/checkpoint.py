"""Checkpoints that are whole or not there.

A checkpoint is a folder `step-00000050` with the state, in files of one or several ranks, and a
manifest of their sizes and SHA-256. It is written under a temporary name, every file and folder
is flushed to disk, the ranks vote that all of them succeeded, and the rename commits it: a crash
at any point leaves the one before. Two are kept; the older goes only after the newer is
committed. Loading takes the newest that its manifest confirms and passes over a damaged one
with a warning; a run that takes up an earlier one renames it `.damaged-00000050`. Where there are
checkpoints and none of them is whole the run is refused, and where the file system does not let it be
told, too: to begin anew would be to lose them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from scaling.errors import UnreachableError, UserError, first_line, refused_write
from scaling.processes import ALONE, Processes
from scaling.records import sync
from scaling.shard_reader import READ_PAUSES

log = logging.getLogger(__name__)

NUM_KEPT = 2

T = TypeVar("T")


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
        return json.loads(_patiently(Path.read_text, self.manifest))["layout"]

    def damage(self) -> str | None:
        """What is wrong with the files by the manifest; None if nothing is.

        UnreachableError where they cannot be read: that says nothing of what they hold.
        """
        try:
            text = _patiently(Path.read_text, self.manifest)
            content = json.loads(text)
            if text != _manifest_text(content):
                return "manifest.json does not have the SHA-256 that it says itself"
            files = content["files"]
            for name, expected in files.items():
                found = _patiently(_describe, self.path / name)
                if found["num_bytes"] != expected["num_bytes"]:
                    return f"{name} has {found['num_bytes']} bytes, its manifest says {expected['num_bytes']}"
                if found["sha256"] != expected["sha256"]:
                    return f"{name} does not have the SHA-256 that its manifest says"
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError) as error:
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


def _patiently(action: Callable[[Path], T], path: Path) -> T:
    """What an action on a path gives, tried again a few times; UnreachableError if it goes on failing.

    A path that is not there is no such failure: FileNotFoundError or NotADirectoryError at once.
    """
    for pause in (*READ_PAUSES, None):
        try:
            return action(path)
        except (FileNotFoundError, NotADirectoryError):
            raise
        except OSError as error:
            if pause is None:
                raise UnreachableError(
                    f"{path} cannot be reached ({error.strerror or error}), in {len(READ_PAUSES) + 1} attempts: look "
                    "to the file system, then run the same command again; move away a checkpoint that is lost for good"
                ) from None
            time.sleep(pause)
    raise AssertionError


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """The committed checkpoints, oldest first, valid or not; UnreachableError where the folder cannot be read."""
    try:
        names = _patiently(os.listdir, folder)
    except FileNotFoundError:
        return []
    steps = sorted(int(name[5:]) for name in names if name.startswith("step-") and name[5:].isdigit())
    return [_checkpoint(folder, step) for step in steps]


def _checkpoint(folder: Path, step: int) -> Checkpoint:
    return Checkpoint(folder / f"step-{step:08d}", step)


def save_checkpoint(
    folder: Path,
    step: int,
    write: Callable[[Path], None],
    processes: Processes = ALONE,
    layout: dict[str, int] | None = None,
) -> Checkpoint:
    """Commit a checkpoint and let go of all but the newest two; called by every rank.

    write: puts this rank's files into the folder that it is given

    UserError, on every rank, if a rank could not write: the disk is full, a quota is used up; UnreachableError where
    its file system does not answer.
    """
    final = _checkpoint(folder, step)
    temporary = Checkpoint(folder / f".writing-{step:08d}", step)

    def agree(error: FailedWrite | None) -> None:
        """Go on where no rank has failed; else it is an error on every rank, and nothing is left behind."""
        failed = {rank: each for rank, each in enumerate(processes.gather(error)) if each is not None}
        if failed:
            if processes.is_first:
                shutil.rmtree(temporary.path, ignore_errors=True)
            raise _refusal(final, failed, processes.world_size)

    agree(_attempt(_make_room, folder, temporary.path) if processes.is_first else None)
    error = _attempt(_write_part, write, temporary.path)
    if error is not None and layout is not None and processes.world_size > 1:
        # The ranks write their parts together: others may wait for this one in there, not at the vote. They may still
        # write, too: the next save clears it away.
        raise _refusal(final, {processes.rank: error}, processes.world_size)
    agree(error)
    agree(_attempt(_commit, temporary, final, layout) if processes.is_first else None)
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


def _write_part(write: Callable[[Path], None], folder: Path) -> None:
    """Write this rank's files and flush them, each rank its own: another node's data is not a node's to flush."""
    write(folder)
    for path in folder.rglob("*"):
        if path.is_file():
            sync(path)


def _commit(temporary: Checkpoint, final: Checkpoint, layout: dict[str, int] | None) -> None:
    """Write the manifest, and give the checkpoint its name once all of it is on the disk."""
    files = {
        str(path.relative_to(temporary.path)): _describe(path)
        for path in sorted(temporary.path.rglob("*"))
        if path.is_file()
    }
    temporary.manifest.write_text(_manifest_text({"step": final.step, "layout": layout, "files": files}))
    folders = [path for path in temporary.path.rglob("*") if path.is_dir()]
    for path in [temporary.manifest, *folders, temporary.path]:
        sync(path)
    replaced = final.path.with_name(f".writing-over-{final.step:08d}")
    if final.path.exists():  # of the same step: what it takes up now is more
        os.rename(final.path, replaced)
    os.rename(temporary.path, final.path)
    sync(final.path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


class FailedWrite(NamedTuple):
    """What the disk said to a rank's part of a save; errno is None where torch has kept it to itself."""

    what: str
    errno: int | None


def _attempt(action: Callable[..., None], *given: Any) -> FailedWrite | None:
    """Do something that writes; what stopped it, if the disk did."""
    try:
        action(*given)
    except (OSError, RuntimeError) as error:
        of_the_disk = _os_error_behind(error)
        if of_the_disk is not None:
            return FailedWrite(of_the_disk.strerror or str(of_the_disk), of_the_disk.errno)
        if not is_failed_write(error):
            raise
        return FailedWrite(first_line(error), None)
    return None


def _os_error_behind(error: BaseException | None) -> OSError | None:
    """The error of the operating system that an error is, or came of: torch's zip writer fails once more on its way."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__ if isinstance(error, RuntimeError) and is_failed_write(error) else None
    return error


def is_failed_write(error: Exception) -> bool:
    """Whether an error is how torch's zip writer tells that the disk took no more."""
    words = ("PytorchStreamWriter", "inline_container", "unexpected pos", "iostream error")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def _refusal(final: Checkpoint, failed: Mapping[int, FailedWrite], world_size: int) -> UserError:
    """The error of a save, by what stopped which ranks."""
    told = (error.what if world_size == 1 else f"rank {rank}: {error.what}" for rank, error in failed.items())
    return refused_write(
        f"checkpoint {final.path} could not be written ({'; '.join(told)}; {_free_space(final.path.parent)})",
        [error.errno for error in failed.values()],
        "the checkpoint before it is whole",
    )


def _free_space(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB free"
    except OSError as error:
        return f"free space unknown: {error.strerror}"


def _let_go(folder: Path, step: int) -> None:
    """Keep the newest two up to the committed step."""
    for checkpoint in [old for old in list_checkpoints(folder) if old.step <= step][:-NUM_KEPT]:
        shutil.rmtree(checkpoint.path, ignore_errors=True)


def newest_whole(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that its manifest confirms; None if there is none at all.

    UserError if there are some and none is whole; UnreachableError if one cannot be read.
    """
    newest, damaged = _look(folder)
    if newest is None and damaged:
        raise _none_is_whole(folder, damaged)
    return newest


def take_up(folder: Path, force: bool = False) -> Checkpoint | None:
    """As `newest_whole`, in the process that holds the run's lock: those that are passed over are set aside.

    force: begin anew where none is whole
    """
    newest, damaged = _look(folder)
    if newest is None and damaged and not force:
        raise _none_is_whole(folder, damaged)
    for checkpoint in damaged:
        _patiently(_set_aside, checkpoint.path)
    return newest


def _look(folder: Path) -> tuple[Checkpoint | None, dict[Checkpoint, str]]:
    """The newest whole checkpoint, and what is wrong with those that are newer."""
    damaged: dict[Checkpoint, str] = {}
    for checkpoint in reversed(list_checkpoints(folder)):
        damage = checkpoint.damage()
        if damage is None:
            return checkpoint, damaged
        log.warning("checkpoint %s is damaged (%s): passed over for the one before", checkpoint.path, damage)
        damaged[checkpoint] = damage
    return None, damaged


def _none_is_whole(folder: Path, damaged: dict[Checkpoint, str]) -> UserError:
    what = "; ".join(f"{checkpoint.path.name}: {damage}" for checkpoint, damage in damaged.items())
    return UserError(
        f"no checkpoint in {folder} is whole ({what}): put back a copy, or start the run again with "
        f"python -m scaling.train run={folder.parent} force=true"
    )


def _set_aside(path: Path) -> None:
    """Rename a damaged checkpoint, so that no save is hindered by it and a person can still look at it."""
    aside = path.with_name(path.name.replace("step-", ".damaged-"))
    if aside.exists():
        shutil.rmtree(aside)
    os.rename(path, aside)
    sync(path.parent)
    log.warning("%s is kept as %s", path, aside.name)


def load_newest(folder: Path) -> tuple[Checkpoint, dict[str, Any]] | None:
    """The newest whole checkpoint and what its `state.pt` holds; None if there is none. Raises as `newest_whole`."""
    checkpoint = newest_whole(folder)
    if checkpoint is None:
        return None
    return checkpoint, torch.load(checkpoint.state, map_location="cpu", weights_only=True)
