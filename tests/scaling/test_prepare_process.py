"""Preparing as a process: a disk that fills up, a kill, two at once, a second time, and what is shown meanwhile."""

import fcntl
import io
import logging
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from scaling.errors import UserError
from scaling.prepare import prepare_shards
from scaling.shards import ShardIndex
from tests.scaling.vbd_folder import TRAIN, files, make_corpus, prepare

REPOSITORY = Path(__file__).parents[2]


def command(
    source: Path, target: Path, num_workers: int = 1, prelude: str = "", show_progress: bool = False
) -> list[str]:
    """A preparation in a process of its own, which logs to stderr and ends with 2 for a UserError."""
    script = f"""
import logging, sys
from pathlib import Path
from scaling.errors import UserError
from scaling.prepare import prepare_shards
if __name__ == "__main__":
    {prelude or "pass"}
    logging.basicConfig(level=logging.INFO)
    try:
        prepare_shards(Path({str(source)!r}), Path({str(target)!r}), "vbd", {num_workers}, {show_progress}, 100_000)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
"""
    path = target.parent.parent / f"prepare_{num_workers}{show_progress}.py"
    path.write_text(f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n{script}")
    return [sys.executable, str(path)]


# --- disks ---------------------------------------------------------------------------------


def test_too_small_a_disk_is_refused_before_anything_is_read_or_written(corpus: Path, target: Path) -> None:
    """Wavs of 4 GB that are all hole take no room here, but would need more than any disk has free."""
    num_bytes = 2**32 - 4096
    header = io.BytesIO()
    soundfile.write(header, np.zeros(8), 16_000, "PCM_16", format="WAV")
    content = header.getvalue()[:40] + (num_bytes - 44).to_bytes(4, "little")
    for kind in ("clean", "noisy"):
        folder = corpus / f"{kind}_testset_wav"
        (folder / "p232_100.wav").write_bytes(content)
        os.truncate(folder / "p232_100.wav", num_bytes)
        for number in range(shutil.disk_usage(corpus).free // (2 * num_bytes) + 1):
            os.link(folder / "p232_100.wav", folder / f"p232_{101 + number}.wav")
    memory = "import resource; resource.setrlimit(resource.RLIMIT_AS, (3 * 2**30, 3 * 2**30))"  # reading one would fail
    run = subprocess.run(command(corpus, target, prelude=memory), cwd=REPOSITORY, capture_output=True, text=True)
    assert run.returncode == 2, run.stderr
    assert f"shards at {target} need " in run.stderr
    assert "MB free: make room or set data.shards to a folder on another disk" in run.stderr
    assert [path.name for path in target.parent.iterdir()] == [".shards.lock"]


def test_a_disk_that_fails_midway_leaves_nothing(corpus: Path, target: Path) -> None:
    """The limit on a file's size stands in for a full disk: the kernel refuses the write either way."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))"
    run = subprocess.run(command(corpus, target, prelude=limit), cwd=REPOSITORY, capture_output=True, text=True)
    assert run.returncode == 2, run.stderr
    assert f"shards cannot be made at {target} ([Errno 27] File too large" in run.stderr
    assert not target.exists()
    assert list(target.parent.glob(".*.tmp")) == []
    prepare(corpus, target)


# --- twice, interrupted, and at once -------------------------------------------------------


def test_preparing_twice_does_nothing_the_second_time(corpus: Path, target: Path) -> None:
    first = prepare(corpus, target)
    before = {path: path.stat() for path in [target, *target.iterdir()]}
    shutil.copytree(corpus, corpus.with_name("copy"))  # other times, other place: the same source
    again = [prepare(corpus, target), prepare(corpus.with_name("copy"), target, num_workers=2)]
    assert again == [first, first]
    after = {path: path.stat() for path in [target, *target.iterdir()]}
    assert {path: (s.st_ino, s.st_mtime_ns) for path, s in after.items()} == {
        path: (s.st_ino, s.st_mtime_ns) for path, s in before.items()
    }


def test_shards_of_another_source_are_refused_and_left_alone(tmp_path: Path, corpus: Path, target: Path) -> None:
    prepare(corpus, target)
    before = files(target)
    other = make_corpus(tmp_path / "other", repeats=2)
    with pytest.raises(UserError) as refused:
        prepare(other, target)
    assert f"{target} holds shards of another source (vbd" in str(refused.value)
    assert f"than {other} (vbd" in str(refused.value)
    with pytest.raises(UserError, match="holds shards of another source"):
        prepare_shards(corpus, target, "demo", 1, False)
    assert files(target) == before


def test_damaged_shards_are_refused_and_not_quietly_made_again(corpus: Path, target: Path) -> None:
    prepare(corpus, target)
    (target / "test-00000.tar").unlink()
    with pytest.raises(
        UserError, match=r"shard test-00000.tar is missing; delete .* and run python -m scaling.prepare"
    ):
        prepare(corpus, target)


def children(pid: int) -> list[int]:
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition: Callable[[], object], what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.002)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_killed_preparation_leaves_no_shards_and_the_next_one_starts_clean(
    tmp_path: Path, target: Path, num_workers: int
) -> None:
    source = make_corpus(tmp_path / "vbd", repeats=20)
    victim = subprocess.Popen(command(source, target, num_workers))
    wait_for(lambda: list(target.parent.glob(".shards.*.tmp/train-00001.tar")), "a finished shard")
    workers = children(victim.pid)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    assert len(workers) >= num_workers if num_workers > 1 else not workers
    assert not target.exists()
    assert len(list(target.parent.glob(".shards.*.tmp"))) == 1
    wait_for(lambda: not any(alive(pid) for pid in workers), "the workers of a killed preparation to end")
    with pytest.raises(UserError, match="no shards at"):
        ShardIndex.load(target)
    index = prepare(source, target, shard_bytes=10_000_000)
    assert len(index.clips("train")) == len(TRAIN) * 20 - 2
    assert sorted(path.name for path in target.parent.iterdir()) == [".shards.lock", "shards"]


def test_of_two_at_once_one_works_and_the_other_finds_it_done(corpus: Path, target: Path) -> None:
    target.parent.mkdir()
    with (target.parent / ".shards.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        logs = [target.parent.parent / f"{number}.log" for number in range(2)]
        both = [subprocess.Popen(command(corpus, target), stderr=log.open("w")) for log in logs]
        wait_for(lambda: all("waiting for it" in log.read_text() for log in logs), "both to wait for the lock")
        assert list(target.parent.iterdir()) == [target.parent / ".shards.lock"]
    assert [process.wait(120) for process in both] == [0, 0]
    assert sorted("made in" in log.read_text() for log in logs) == [False, True]
    assert len(ShardIndex.load(target).clips("train")) == len(TRAIN) - 2


# --- progress ------------------------------------------------------------------------------


def test_progress_is_lines_in_a_log(corpus: Path, target: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        prepare_shards(corpus, target, "vbd", 1, show_progress=True)
    lines = [record.getMessage() for record in caplog.records if "resampling to shards" in record.getMessage()]
    assert lines[-1] == "resampling to shards: 11 of 11, 0:00:00 left"
    assert 2 <= len(lines) <= 5, "a line every ten seconds, and the last"


def test_progress_is_a_bar_on_a_terminal(corpus: Path, target: Path) -> None:
    controller, terminal = pty.openpty()
    target.parent.mkdir()
    process = subprocess.Popen(
        command(corpus, target, show_progress=True), stderr=terminal, env=os.environ | {"TERM": "xterm"}
    )
    os.close(terminal)
    shown = b""
    while True:
        try:
            shown += os.read(controller, 4096)
        except OSError:  # the other end is closed
            break
    os.close(controller)
    assert process.wait(120) == 0
    assert b"11/11" in shown
    assert b" left\r\n" not in shown
