"""Who holds a lock, and what becomes of a run that cannot have it."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from scaling.errors import UnreachableError, UserError
from scaling.locks import HeldLockError, held_if_free, held_lock, held_when_free, is_held
from scaling.run import classify

HOLDER = "import sys; from pathlib import Path; from scaling.locks import held_lock\n"
HOLDER += "with held_lock(Path(sys.argv[1]), 'it is taken'): print('held', flush=True); sys.stdin.read()\n"


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds tmp_path/lock."""
    words = [sys.executable, "-c", HOLDER, str(tmp_path / "lock")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_lock_that_lingers_is_no_fault_of_the_settings_and_is_free_when_its_holder_ends(
    holder: subprocess.Popen[str], tmp_path: Path
):
    lock = tmp_path / "lock"
    assert is_held(lock)
    with pytest.raises(HeldLockError, match=f"it is taken by process {holder.pid}: wait for it") as raised:
        held_lock(lock, "it is taken").__enter__()
    assert classify(raised.value)[0] == "node failure", "a run that is queued again would have failed for good"
    holder.kill()
    holder.wait()
    assert not is_held(lock)
    with held_lock(lock, "it is taken"):
        pass


def test_a_lock_that_is_waited_for_comes_when_its_holder_ends_and_one_that_is_not_is_left(
    holder: subprocess.Popen[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    lock = tmp_path / "lock"
    with held_if_free(lock) as is_ours:
        assert not is_ours
    ender = threading.Timer(0.5, holder.kill)
    ender.start()
    with caplog.at_level("INFO"), held_when_free(lock, "waiting for its holder"):
        assert holder.wait() != 0, "the lock came while another process held it"
        assert caplog.messages == ["waiting for its holder"]
    with held_if_free(lock) as is_ours:
        assert is_ours
        assert is_held(lock)


def test_a_lock_is_waited_for_as_long_as_its_holder_comes_on(holder: subprocess.Popen[str], tmp_path: Path):
    looks = iter([*range(8), *[8] * 1000])
    begun = time.monotonic()
    with pytest.raises(
        UnreachableError, match=r"lock has been held by another process for 0.5 s, and nothing has come"
    ):
        held_when_free(tmp_path / "lock", patience=0.5, progress=lambda: next(looks)).__enter__()
    assert time.monotonic() - begun > 1.1


def test_a_suspension_is_no_waiting_for_a_lock(
    holder: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monotonic, looks = time.monotonic, []

    def look() -> None:
        looks.append(None)

    monkeypatch.setattr("scaling.own_time.time.monotonic", lambda: monotonic() + 3600 * (len(looks) > 3))
    begun = monotonic()
    with pytest.raises(UnreachableError, match="for 3 s"):
        held_when_free(tmp_path / "lock", patience=3, progress=look).__enter__()
    assert monotonic() - begun > 1.5


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks_is_named_with_what_to_do(
    error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(error, os.strerror(error))

    (tmp_path / "lock").touch()
    monkeypatch.setattr(fcntl, "flock", no_locks)
    takers = (lambda lock: held_lock(lock, ""), held_when_free, held_if_free)
    for look in (*(lambda lock, take=take: take(lock).__enter__() for take in takers), is_held):
        with pytest.raises(UserError, match=r"lock: its file system keeps no file locks .* or take another folder"):
            look(tmp_path / "lock")


def test_a_file_system_that_has_no_lock_to_give_for_a_moment_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    answers = [errno.ENOLCK, errno.ENOLCK]
    flock = fcntl.flock

    def short_of_locks(descriptor: int, operation: int) -> None:
        if answers:
            raise OSError(answers.pop(), "No locks available")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", short_of_locks)
    with held_when_free(tmp_path / "lock"):
        assert not answers
