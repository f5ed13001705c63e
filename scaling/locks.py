"""Lock files: one process at a time trains a run, sweeps a study, or makes a corpus, its shards or a copy of one.

The kernel lets go of a lock when the last process that holds it ends, however it ends. The file stays, since removing
it would race; that of a run or a study names the process, for messages.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from scaling.errors import UnreachableError, UserError
from scaling.own_time import OwnTime
from scaling.records import RunDirectory

log = logging.getLogger(__name__)

LOOKS, SECONDS_BETWEEN_LOOKS = 5, 0.05
PAUSE = 0.1  # seconds between two attempts at a lock that another process holds
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # of a file system that keeps none


class HeldLockError(UserError):
    """Another process holds a lock: of an attempt that a scheduler gave up, it may yet let go."""


@contextmanager
def held_lock(lock: Path, taken: str) -> Iterator[int]:
    """Hold a lock file for this process; HeldLockError saying what is `taken` if another process holds it.

    UserError where the file system keeps no locks. Yields the descriptor that holds it: a child process that inherits
    it holds the lock too.
    """
    with _opened(lock) as descriptor:
        if not _takes_in_the_end(descriptor, lock):
            holder = os.pread(descriptor, 64, 0).decode(errors="replace").strip() or "unknown"
            raise HeldLockError(f"{taken} by process {holder}: wait for it, or stop it first")
        with suppress(OSError):  # as of a full disk: the number is for messages
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield descriptor


@contextmanager
def held_when_free(
    lock: Path, waiting: str = "", patience: float = math.inf, progress: Callable[[], object] = lambda: None
) -> Iterator[None]:
    """Hold a lock file, waiting for as long as another process holds it, which is logged as `waiting`.

    patience: seconds to wait while `progress`, what there is to see of the holder's work, stays the same; those for
        which this process is stopped do not count

    UserError where the file system keeps no locks; UnreachableError after that.
    """
    with _opened(lock) as descriptor:
        now = OwnTime()
        seen, since = progress(), now()
        while not _takes(descriptor, lock):
            if waiting:
                log.info("%s", waiting)
                waiting = ""
            time.sleep(PAUSE)
            lived = now()
            if (now_seen := progress()) != seen:
                seen, since = now_seen, lived
            elif lived - since > patience:
                raise UnreachableError(
                    f"{lock} has been held by another process for {patience:g} s, and nothing has come of it: end that "
                    "process, which is frozen or hangs, and run the same command again"
                )
        yield


@contextmanager
def held_if_free(lock: Path) -> Iterator[bool]:
    """Hold a lock file unless another process does: yields whether it is held here.

    UserError where the file system keeps no locks.
    """
    with _opened(lock) as descriptor:
        yield _takes(descriptor, lock)


@contextmanager
def _opened(lock: Path) -> Iterator[int]:
    """The descriptor of a lock file, made if it is not there."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)  # less the umask
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _takes(descriptor: int, lock: Path) -> bool:
    """Take a lock unless another process holds it; UserError where there are no locks."""
    looks_left = LOOKS
    while True:
        looks_left -= 1
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            if error.errno == errno.ENOLCK and looks_left:  # as where a server has no memory for one at the moment
                time.sleep(SECONDS_BETWEEN_LOOKS)
                continue
            raise UserError(
                f"{lock}: its file system keeps no file locks ({error.strerror}), without which two processes may "
                "write the same files: mount it with them (Lustre: -o flock; NFS: lockd), or take another folder"
            ) from None


def _takes_in_the_end(descriptor: int, lock: Path) -> bool:
    """Take a lock unless another process holds it at every look: who asks `is_held` has it for a moment too."""
    for looks_left in reversed(range(LOOKS)):
        if _takes(descriptor, lock):
            return True
        if looks_left:
            time.sleep(SECONDS_BETWEEN_LOOKS)
    return False


def is_locked(directory: RunDirectory) -> bool:
    """Whether a process of this machine is executing the run."""
    return is_held(directory.lock)


def is_held(lock: Path) -> bool:
    """Whether a process holds a lock file; UserError where the file system keeps no locks."""
    try:
        descriptor = os.open(lock, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        return not _takes(descriptor, lock)
    finally:
        os.close(descriptor)


def holder(lock: Path) -> psutil.Process | None:
    """The process of this machine that holds a lock file.

    Over a shared file system a lock may be held on another machine; the number in it is somebody else's here.
    """
    with suppress(OSError, ValueError, psutil.Error):
        process = psutil.Process(int(lock.read_text()))
        if is_held(lock) and any(Path(file.path) == lock.resolve() for file in process.open_files()):
            return process
    return None
