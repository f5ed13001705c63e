"""The cache of shards on a machine: its bound, room in it for those who share it, and what holds on to it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import scaling.remote
from scaling.errors import UnreachableError, UserError
from scaling.locks import held_when_free
from scaling.remote import RemoteRoot
from scaling.shards import ShardIndex
from scaling.stream import CropDataset, MicroBatchSampler
from tests.reliability.shards_in_store import CROP, Store, Upload, reading, remote, stream


def _size(folder: Path) -> int:
    total = 0
    for entry in list(os.scandir(folder)):
        with contextlib.suppress(FileNotFoundError):  # let go of meanwhile
            total += entry.stat().st_size
    return total


def test_the_cache_keeps_its_bound_and_the_next_block_is_there_before_its_use(
    upload: Upload, local: ShardIndex, tmp_path: Path
):
    largest = max(shard.num_bytes for shard in local.shards["train"])
    bound = 5 * largest
    own = [tmp_path / "cache" / name for name in ("corpus.tar", "notes.tmp")]  # of whoever named the folder
    own[0].parent.mkdir()
    for path in own:
        path.write_bytes(b"")
    index = ShardIndex.load(remote(upload(), tmp_path / "cache", bound / 1e9))
    dataset = CropDataset(index.root, index.clips("train"), CROP, 5, block_shards=2)
    expected = iter(stream(local, block_shards=2, epochs=3))
    seen, most = set(), 0
    for counters in MicroBatchSampler(0, 18, 8, 8):
        for t in counters:
            noisy, clean = dataset[t]
            assert noisy.numpy().tobytes() + clean.numpy().tobytes() == next(expected)
            most = max(most, _size(tmp_path / "cache"))
            block = dataset.order.block(t)
            if block not in seen:
                seen.add(block)
                coming = {index.root.promised[shard][1] for shard in dataset.order.upcoming(*block)}
                for _ in range(600):
                    here = {path.stem for path in (tmp_path / "cache").glob("*.tar")}
                    if coming <= here:
                        break
                    time.sleep(0.05)
                assert coming <= here, "the next block is not fetched while this one is used"
    assert len(seen) > 9
    assert most <= bound
    assert all(path.exists() for path in own), "the cache lets go of its own files only"
    with pytest.raises(UserError, match=r"data.cache_gb = .* does not hold the .* mixes all of them: raise it, or set"):
        CropDataset(index.root, index.clips("train"), CROP, 5)
    with pytest.raises(UserError, match=r"data.cache_gb = 1e-05 does not hold shard train-0000\d.tar"):
        ShardIndex.load(remote(index.root.url, tmp_path / "small", 1e-5))


def test_a_shard_whose_fetch_ends_while_room_is_made_counts_under_its_new_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    older, newer, own = ("0" * 64, "1" * 64, "2" * 64)
    (tmp_path / f"{older}.tar").write_bytes(b"x" * 100)
    fetched = tmp_path / f".{newer}.host.1.tmp"
    fetched.write_bytes(b"x" * 100)
    listed = Path.iterdir

    def end_fetch_when_listed(folder: Path) -> Iterator[Path]:
        names = list(listed(folder))
        if fetched.exists():
            fetched.rename(tmp_path / f"{newer}.tar")
        return iter(names)

    link = tmp_path / f"{'3' * 64}.tar"  # as where a cache of links was cleared
    link.symlink_to("nowhere")
    os.utime(link, (0, 0), follow_symlinks=False)
    monkeypatch.setattr(Path, "iterdir", end_fetch_when_listed)
    temporary = tmp_path / f".{own}.host.2.tmp"
    with held_when_free(tmp_path / f"{newer}.lock"), held_when_free(tmp_path / f"{own}.lock"):
        assert not RemoteRoot("s3://nowhere", tmp_path, 200)._make_room(temporary, 100)
    assert sorted(path.name for path in tmp_path.glob("*.t[am][rp]")) == [temporary.name, f"{newer}.tar"]


def test_runs_that_share_a_cache_of_two_blocks_wait_for_one_another(
    store: Store, upload: Upload, local: ShardIndex, tmp_path: Path
):
    largest = max(shard.num_bytes for shard in local.shards["train"])
    url, cache = upload(), tmp_path / "cache"
    store.plan_faults(*[1.5] * 12)
    processes = [reading(url, cache, 2 * largest / 1e9, block_shards=1, seed=seed) for seed in range(4)]
    most = 0
    while any(process.poll() is None for process in processes):
        most = max(most, _size(cache) if cache.exists() else 0)
        time.sleep(0.02)
    printed = [process.communicate() for process in processes]
    expected = [hashlib.sha256(b"".join(stream(local, block_shards=1, seed=seed))).hexdigest() for seed in range(4)]
    assert [out.strip() for out, _ in printed] == expected, printed
    assert any("waiting for room" in errors for _, errors in printed), "nobody had to wait"
    assert most <= 2 * largest


FETCH_ONE = """
import sys
from scaling.config import DataConfig
from scaling.shards import ShardIndex
url, cache, shard = sys.argv[1:]
ShardIndex.load(DataConfig("noise", url, cache=cache, cache_gb=1.0).shard_root).root.fetch(shard)
"""


def test_room_that_a_frozen_fetch_holds_is_not_waited_for_without_end(
    store: Store, upload: Upload, local: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    url, cache = upload(), tmp_path / "cache"
    largest = max(shard.num_bytes for shard in local.shards["train"])
    index = ShardIndex.load(remote(url, cache, largest / 1e9))
    first, other = (shard.name for shard in local.shards["train"][:2])
    store.plan_faults(60)
    frozen = subprocess.Popen([sys.executable, "-c", FETCH_ONE, url, str(cache), first], cwd=Path(__file__).parents[2])
    try:
        while not list(cache.glob(".*.tmp")):
            time.sleep(0.02)
        os.kill(frozen.pid, signal.SIGSTOP)
        monkeypatch.setattr(scaling.remote, "PART_SECONDS", 0.2)
        with pytest.raises(UnreachableError, match=r"of which none has come on for 2.5 s: raise data.cache_gb = 0.000"):
            index.root.fetch(other)
        with pytest.raises(
            UnreachableError, match=r"\.lock has been held by another process for 2.5 s, and nothing has"
        ):
            index.root.fetch(first)
        with pytest.raises(OSError, match="is full of shards that are being fetched"):
            index.root.try_fetch(other)  # what is fetched ahead does not stand in the way of what is needed
    finally:
        frozen.kill()
        frozen.wait()
        store.plan_faults()
    monkeypatch.undo()
    assert index.root.fetch(other).exists(), "what a killed fetch held is free"


READ_ON_FAULTY_DISK = """
import itertools, shutil, sys
from pathlib import Path
from scaling.errors import UserError
from scaling.shard_reader import ShardReader
from scaling.shards import ShardIndex
from scaling.verify import check_shard
from tests.reliability.disk_faults import FaultyDisk
from tests.reliability.shards_in_store import remote
url, cache, error = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
disk = FaultyDisk()
for at in itertools.count(1):
    for read in (
        lambda index: ShardReader(index.root).read_clip(index.clips("train")[0]),
        lambda index: check_shard(index, "train", 0),
    ):
        shutil.rmtree(cache, ignore_errors=True)
        index = ShardIndex.load(remote(url, cache))
        disk.arm(cache, at, error, all_after=True)
        try:
            read(index)
        except UserError as told:
            print(f"{type(told).__name__}: {told}")
        failed = disk.found()["fails"]
        disk.arm(cache, 0, 0)
    if not failed:
        break
"""


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_cache_whose_disk_takes_no_more_is_told_by_its_own_settings(
    local: ShardIndex, tmp_path: Path, faulty_disk: Path, number: int
):
    cache = tmp_path / "cache"
    done = subprocess.run(
        [sys.executable, "-c", READ_ON_FAULTY_DISK, f"file://{local.root}", str(cache), str(number)],
        env=os.environ | {"LD_PRELOAD": str(faulty_disk)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) >= 2 * 5, "a folder, a lock, a temporary file, its bytes, its flush, its name"
    assert set(lines) == {
        f"UserError: data.cache = {cache} cannot be written ({os.strerror(number)}): make its disk writable and free "
        "some space, lower data.cache_gb = 1, or name another folder with data.cache=DIR"
    }
