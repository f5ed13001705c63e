"""Lock files: one process at a time trains a run, one sweep at a time works on a study.

The kernel lets go of a lock when the last process that holds it ends, however it ends. The file
names the process, for messages.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from scaling.errors import UserError
from scaling.records import RunDirectory

LOOKS, SECONDS_BETWEEN_LOOKS = 5, 0.05


@contextmanager
def held_lock(lock: Path, taken: str) -> Iterator[int]:
    """Hold a lock file for this process; UserError saying what is `taken` if another process holds it.

    Yields the descriptor that holds it: a child process that inherits it holds the lock too.
    """
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)  # less the umask
    try:
        try:
            _take(descriptor)
        except BlockingIOError:
            holder = os.pread(descriptor, 64, 0).decode(errors="replace").strip() or "unknown"
            raise UserError(f"{taken} by process {holder}: wait for it, or stop it first") from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def _take(descriptor: int) -> None:
    """Who only looks (`is_held`) has the lock for a moment too: BlockingIOError if it is taken for longer."""
    for _ in range(LOOKS):
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(SECONDS_BETWEEN_LOOKS)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_locked(directory: RunDirectory) -> bool:
    """Whether a process of this machine is executing the run."""
    return is_held(directory.lock)


def is_held(lock: Path) -> bool:
    """Whether a process holds a lock file."""
    try:
        descriptor = os.open(lock, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def holder(lock: Path) -> psutil.Process | None:
    """The process of this machine that holds a lock file.

    Over a shared file system a lock may be held on another machine; the number in it is somebody else's here.
    """
    with suppress(OSError, ValueError, psutil.Error):
        process = psutil.Process(int(lock.read_text()))
        if is_held(lock) and any(Path(file.path) == lock.resolve() for file in process.open_files()):
            return process
    return None
