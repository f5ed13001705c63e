"""A checkpoint is whole or not there."""

from __future__ import annotations

import errno
import io
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from scaling.checkpoint import list_checkpoints, load_newest, newest_whole, save_checkpoint, take_up
from scaling.errors import UnreachableError, UserError
from scaling.run import classify


def save(folder: Path, step: int, size: int = 1000) -> None:
    state = {"step": step, "weights": torch.full((size,), float(step))}
    save_checkpoint(folder, step, lambda part: torch.save(state, part / "state.pt"))


def test_the_newest_two_are_kept_and_the_newest_is_loaded(tmp_path: Path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path)] == [2, 3]
    checkpoint, loaded = load_newest(tmp_path)
    assert checkpoint.step == loaded["step"] == 3
    assert loaded["weights"].eq(3).all()
    assert load_newest(tmp_path / "empty") is None


@pytest.mark.parametrize("name", ["state.pt", "manifest.json"])
def test_a_flipped_byte_anywhere_is_found_and_the_one_before_is_taken(tmp_path: Path, name: str, caplog):
    for step in (1, 2):
        save(tmp_path, step)
    path = list_checkpoints(tmp_path)[-1].path / name
    whole = path.read_bytes()
    for position in random.Random(0).sample(range(len(whole)), 20):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        with caplog.at_level(logging.WARNING):
            checkpoint, _ = load_newest(tmp_path)
        assert checkpoint.step == 1
        assert "step-00000002 is damaged" in caplog.text
    path.write_bytes(whole[: len(whole) // 2])
    assert load_newest(tmp_path)[0].step == 1
    path.unlink()
    assert load_newest(tmp_path)[0].step == 1


def steps(folder: Path) -> list[int]:
    return [checkpoint.step for checkpoint in list_checkpoints(folder)]


@pytest.fixture
def unreadable(tmp_path: Path) -> Path:
    """Checkpoints 50 and 60 whose every read is an input or output error: it is what this file of Linux's answers."""
    for step in (50, 60):
        save(tmp_path, step)
        state = tmp_path / f"step-{step:08d}" / "state.pt"
        state.rename(state.with_name("kept"))
        state.symlink_to("/proc/self/mem")
    return tmp_path


def give_back(folder: Path) -> None:
    for checkpoint in list_checkpoints(folder):
        (checkpoint.path / "kept").replace(checkpoint.state)


def test_a_disk_that_cannot_be_read_ends_the_run_and_costs_no_checkpoint(unreadable: Path):
    with pytest.raises(
        UnreachableError, match=r"state.pt cannot be reached \(Input/output error\), in 4 attempts"
    ) as raised:
        take_up(unreadable, force=True)
    assert classify(raised.value)[0] == "node failure", "it would not be queued again"
    give_back(unreadable)
    assert take_up(unreadable).step == 60


def test_a_read_that_fails_for_a_moment_is_tried_again(unreadable: Path, caplog: pytest.LogCaptureFixture):
    mending = threading.Timer(0.3, give_back, [unreadable])
    mending.start()
    assert newest_whole(unreadable).step == 60
    mending.join()
    assert not caplog.records


def test_where_no_checkpoint_is_whole_nothing_begins_anew_unless_forced_and_nothing_is_deleted(tmp_path: Path):
    for step in (15, 20):
        save(tmp_path, step)
        (tmp_path / f"step-{step:08d}" / "state.pt").write_bytes(b"damaged")
    for look in (newest_whole, take_up):
        with pytest.raises(
            UserError, match=r"no checkpoint in .* is whole \(step-00000020: state.pt has 7 b.* force=true"
        ):
            look(tmp_path)
    assert steps(tmp_path) == [15, 20]
    assert take_up(tmp_path, force=True) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == [".damaged-00000015", ".damaged-00000020"]
    assert (tmp_path / ".damaged-00000020" / "state.pt").read_bytes() == b"damaged"


def test_a_damaged_later_checkpoint_is_set_aside_and_does_not_push_out_those_that_are_written_after_it(tmp_path: Path):
    for step in (5, 20):
        save(tmp_path, step)
    (tmp_path / "step-00000020" / "state.pt").write_bytes(b"damaged")
    assert take_up(tmp_path).step == 5
    for step in (10, 15, 20):
        save(tmp_path, step)
        assert load_newest(tmp_path)[0].step == step
    assert steps(tmp_path) == [15, 20]
    assert (tmp_path / ".damaged-00000020" / "state.pt").read_bytes() == b"damaged"


def test_a_checkpoint_of_the_same_step_takes_the_place_of_the_one_before_it(tmp_path: Path):
    for weight in (1.0, 2.0):
        save_checkpoint(tmp_path, 5, lambda part, weight=weight: torch.save({"weight": weight}, part / "state.pt"))
    assert load_newest(tmp_path)[1] == {"weight": 2.0}
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


@pytest.mark.parametrize(
    ("error", "kind"), [(errno.EIO, "node failure"), (errno.ESTALE, "node failure"), (errno.ENOSPC, "bad config")]
)
def test_a_save_that_fails_is_classed_by_what_the_disk_says(tmp_path: Path, error: int, kind: str):
    """torch's zip writer meets the error in its own code, and ends in another of its own."""
    save(tmp_path, 1)

    class Broken(io.FileIO):
        def write(self, data) -> int:
            raise OSError(error, os.strerror(error))

    def write(part: Path) -> None:
        with Broken(part / "state.pt", "w") as file:
            torch.save({"weights": torch.ones(100_000)}, file)

    with pytest.raises(
        UserError, match=f"could not be written \\({os.strerror(error)}; .*the checkpoint before it is whole"
    ) as raised:
        save_checkpoint(tmp_path, 2, write)
    assert classify(raised.value)[0] == kind
    assert ("free some space" in str(raised.value)) == (error == errno.ENOSPC)
    assert newest_whole(tmp_path).step == 1


def test_kills_during_saves_never_cost_more_than_the_save_itself(tmp_path: Path):
    """A process that does nothing but save is killed at random moments; what it had committed is there."""
    program = (
        "import sys, torch; from pathlib import Path; from scaling.checkpoint import save_checkpoint, load_newest\n"
        "folder = Path(sys.argv[1]); loaded = load_newest(folder); step = loaded[0].step if loaded else 0\n"
        "while True:\n"
        "    step += 1\n"
        "    state = {'step': step, 'weights': torch.full((200_000,), float(step))}\n"
        "    save_checkpoint(folder, step, lambda part: torch.save(state, part / 'state.pt'))\n"
        "    print(step, flush=True)\n"
    )
    rng = random.Random(0)
    last = 0
    for _ in range(6):
        process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline()  # it has loaded what was there, and committed once
        time.sleep(rng.uniform(0.0, 0.15))
        os.kill(process.pid, signal.SIGKILL)
        committed = [int(line) for line in process.communicate()[0].split()]
        checkpoint, loaded = load_newest(tmp_path)
        assert checkpoint.step >= max(committed, default=last + 1)
        assert loaded["weights"].eq(checkpoint.step).all()
        assert checkpoint.step > last
        last = checkpoint.step
    save(tmp_path, last + 1)
    assert not list(tmp_path.glob(".writing-*")), "the killed saves' remains were not cleared away"


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode and os.environ.get("CI") != "true":
        pytest.skip(f"this machine does not let root mount a tmpfs: {mounted.stderr.decode().strip()}")
    try:
        save(disk, 1)
        with pytest.raises(
            UserError, match=r"step-00000002 could not be written \(.*; .* MiB free\): .* free some space"
        ):
            save(disk, 2, 2_000_000)
        assert load_newest(disk)[0].step == 1
        assert [path.name for path in disk.iterdir()] == ["step-00000001"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
