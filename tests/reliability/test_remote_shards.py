"""Shards in an object store: fetched once a machine, verified, bounded, ahead of use; no failure changes them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import s3fs

import scaling.remote
from scaling.config import DataConfig
from scaling.errors import UnreachableError, UserError
from scaling.locks import held_when_free
from scaling.remote import RemoteRoot
from scaling.shard_reader import DamagedClipError, ShardReader
from scaling.shards import ShardIndex
from scaling.stream import CropDataset, MicroBatchSampler, training_loader
from scaling.verify import Finding, check_shard
from tests.reliability.shards_under_test import write_shards

NUM_CLIPS, CROP = 48, 4_000


class Store:
    """The object store of `object_store.py`, in a process of its own."""

    def __init__(self, address: str) -> None:
        self.address = address

    def plan_faults(self, *faults: str | float) -> None:
        request = urllib.request.Request(f"{self.address}/-faults", json.dumps(faults).encode(), method="POST")
        urllib.request.urlopen(request).close()

    def downloads(self) -> Counter[str]:
        with urllib.request.urlopen(f"{self.address}/-log") as answer:
            return Counter(json.load(answer))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    script = Path(__file__).with_name("object_store.py")
    errors = (tmp_path_factory.mktemp("store") / "stderr").open("w")
    with (
        subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=errors, text=True) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        address = server.stdout.readline().strip()
        for name, value in (
            ("AWS_ENDPOINT_URL", address),
            ("AWS_ACCESS_KEY_ID", "test"),
            ("AWS_SECRET_ACCESS_KEY", "test"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
        ):
            patch.setenv(name, value)
        patch.setattr(scaling.remote, "FETCH_PAUSES", (0.1, 0.2, 0.4, 0.8))
        yield Store(address)
        server.terminate()


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    index = write_shards(tmp_path_factory.mktemp("local"), [6_000 + number for number in range(NUM_CLIPS)], 170_000)
    assert len(index.shards["train"]) >= 8
    return index


Upload = Callable[[], str]


@pytest.fixture(scope="module")
def upload(store: Store, local: ShardIndex) -> Upload:
    """Puts the shards into a bucket of their own; its URL."""
    count = iter(range(1_000))

    def put() -> str:
        bucket = f"bucket{next(count)}"
        filesystem = s3fs.S3FileSystem()
        filesystem.mkdir(bucket)
        filesystem.put(f"{local.root}/", f"{bucket}/noise/", recursive=True)
        return f"s3://{bucket}/noise"

    return put


def stream(
    index: ShardIndex, num_workers: int = 0, block_shards: int | None = None, epochs: int = 1, seed: int = 5
) -> list[bytes]:
    """The crops of an epoch or more; none may be replaced."""
    dataset = CropDataset(index.root, index.clips("train"), CROP, seed, block_shards)
    crops = []
    for batch in training_loader(dataset, MicroBatchSampler(0, 6 * epochs, 8, 8), num_workers):
        assert not batch.replaced
        crops += [noisy.tobytes() + clean.tobytes() for noisy, clean in zip(*map(_rows, batch[:2]), strict=True)]
    return crops


def _rows(part) -> list:
    return list(part.numpy())


def remote(url: str, cache: Path, gigabytes: float = 1.0) -> RemoteRoot:
    return DataConfig("noise", url, cache=str(cache), cache_gb=gigabytes).shard_root


READ_EPOCH = """
import hashlib, sys
import scaling.remote
from pathlib import Path
from scaling.config import DataConfig
from scaling.shards import ShardIndex
from tests.reliability.test_remote_shards import stream
url, cache, gigabytes, block_shards, seed = sys.argv[1:]
index = ShardIndex.load(DataConfig("noise", url, cache=cache, cache_gb=float(gigabytes)).shard_root)
print(hashlib.sha256(b"".join(stream(index, block_shards=int(block_shards) or None, seed=int(seed)))).hexdigest())
"""


def reading(
    url: str, cache: Path, gigabytes: float = 1.0, block_shards: int = 0, seed: int = 5
) -> subprocess.Popen[str]:
    """A process of its own that reads an epoch and prints its hash."""
    root = Path(__file__).parents[2]
    numbers = map(str, (gigabytes, block_shards, seed))
    words = [sys.executable, "-c", READ_EPOCH, url, str(cache), *numbers]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_of_a_machine_fetch_each_shard_once_and_see_the_same_samples(
    store: Store, upload: Upload, local: ShardIndex, tmp_path: Path, times, report
):
    url, before = upload(), store.downloads()
    processes = [reading(url, tmp_path / "cache") for _ in range(times(2, 8))]
    printed = [process.communicate(timeout=300) for process in processes]
    hashes = {out.strip() for out, _ in printed}
    assert len(hashes) == 1, printed
    fetched = store.downloads() - before
    assert fetched == Counter(shard.name for shard in local.shards["train"]), "one download a shard"
    index = ShardIndex.load(remote(url, tmp_path / "cache"))
    assert index.index_hash == local.index_hash
    assert stream(index, num_workers=2) == stream(local)
    assert store.downloads() - before == fetched, "workers and later processes find the shards there"
    report(
        "remote",
        f"{len(processes)} processes over {len(fetched)} shards in an S3 store, one cache: {sum(fetched.values())} "
        "downloads, and the samples of the local folder.",
    )


def test_slow_failing_and_cut_off_answers_change_no_sample(
    store: Store, upload: Upload, local: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times, report
):
    monkeypatch.setattr(scaling.remote, "PART_SECONDS", 1.0)
    expected, rng, before = stream(local), random.Random(1), store.downloads()
    counts: Counter[str] = Counter()
    for number in range(times(2, 20)):
        kinds: list[str | float] = ["500", "503", "cut", 0.3, 30]  # the last outlasts the time limit of a part
        faults = [*rng.sample(kinds, 4), "cut"]
        counts.update(f"answers after {fault} s" if isinstance(fault, int | float) else fault for fault in faults)
        store.plan_faults(*faults)
        assert stream(ShardIndex.load(remote(upload(), tmp_path / str(number)))) == expected
    again = sum((store.downloads() - before).values()) - times(2, 20) * len(local.shards["train"])
    assert again >= times(2, 20) * 2
    said = ", ".join(f"{count} × {kind}" for kind, count in sorted(counts.items()))
    report("remote faults", f"Injected by the server: {said}. {again} more downloads, 0 different samples.")


def test_a_killed_fetch_leaves_nothing_that_is_taken_for_a_shard(
    store: Store, upload: Upload, local: ShardIndex, tmp_path: Path, times, report
):
    url, cache, rng, unfinished = upload(), tmp_path / "cache", random.Random(2), 0
    kills = times(2, 20)
    for _ in range(kills):
        store.plan_faults(*[0.2] * 4)
        before = sum(store.downloads().values())
        process = reading(url, cache)
        while sum(store.downloads().values()) == before and process.poll() is None:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        process.communicate()
        unfinished += bool(list(cache.glob("*.tmp")))
        for path in cache.glob("*.tar"):  # whatever has its name is whole
            assert path.stat().st_size in {shard.num_bytes for shard in local.shards["train"]}
            assert _sha256(path) == path.stem
            if rng.random() < 0.7:
                path.unlink()  # so that the next process has something to fetch
    assert unfinished
    store.plan_faults()
    assert stream(ShardIndex.load(remote(url, cache))) == stream(local)
    assert not list(cache.glob("*.tmp")), "what killed fetches left is gone"
    report(
        "remote kills",
        f"{kills} SIGKILLs during fetches, {unfinished} of which left a part of a shard: 0 parts were taken for a "
        "shard, 0 were left behind by the next run.",
    )


def _size(folder: Path) -> int:
    total = 0
    for entry in list(os.scandir(folder)):
        with contextlib.suppress(FileNotFoundError):  # let go of meanwhile
            total += entry.stat().st_size
    return total


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


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


def test_damage_at_the_source_and_damage_in_the_cache_are_told_apart(upload: Upload, local: ShardIndex, tmp_path: Path):
    url, expected = upload(), stream(local)
    index = ShardIndex.load(remote(url, tmp_path / "cache"))
    assert stream(index) == expected
    name = index.shards["train"][2].name
    cached = index.root.fetch(name)
    content = bytearray(cached.read_bytes())
    for clip in index.clips("train"):
        if clip.shard == name:
            content[clip.noisy_offset + 5_000 : clip.noisy_offset + 9_000] = bytes(4_000)
    cached.write_bytes(content)
    assert stream(index) == expected, "this machine's copy is fetched anew"

    s3fs.S3FileSystem().pipe_file(f"{url}/{name}".removeprefix("s3://"), bytes(content))
    index = ShardIndex.load(remote(url, tmp_path / "another"))
    dataset = CropDataset(index.root, index.clips("train"), CROP, 5)
    replaced, others = {}, []
    for counters in MicroBatchSampler(0, 6, 8, 8):
        batch = dataset.__getitems__(counters)
        replaced |= {crop.t: crop.shard for crop in batch.replaced}
        others += [
            (t, noisy.tobytes() + clean.tobytes())
            for t, noisy, clean in zip(counters, *map(_rows, batch[:2]), strict=True)
        ]
    assert set(replaced.values()) == {name}
    assert all(crop == expected[t] for t, crop in others if t not in replaced)


def test_the_remedy_for_damage_at_the_source_makes_it_whole(local: ShardIndex, tmp_path: Path, command):
    source, cache = tmp_path / "source", tmp_path / "cache"
    shutil.copytree(local.root, source)
    clip = local.clips("train")[7]
    with (source / clip.shard).open("r+b") as file:
        os.pwrite(file.fileno(), b"\x55" * 100, clip.noisy_offset)
    words = ["data=vbd", f"data.shards=file://{source}", f"data.cache={cache}"]
    found = command("scaling.verify", *words)
    assert found.returncode == 1
    assert f"{clip.shard}: clip {clip.id}: noisy samples damaged" in found.stdout
    assert found.stdout.splitlines()[-1] == (
        f"1 of the shards at file://{source} are damaged: put there what python -m scaling.prepare makes of the same "
        f"source: what is damaged in {cache} is then fetched anew"
    )
    shutil.copytree(local.root, source, dirs_exist_ok=True)
    assert command("scaling.verify", *words).returncode == 0


def test_a_source_that_was_mended_is_believed_by_whoever_loads_its_index_after_that(
    store: Store, upload: Upload, local: ShardIndex, tmp_path: Path
):
    url, shard = upload(), local.shards["train"][2]
    clip = [clip for clip in local.clips("train") if clip.shard == shard.name][-1]
    filesystem, place = s3fs.S3FileSystem(), f"{url}/{shard.name}".removeprefix("s3://")
    whole = (local.root / shard.name).read_bytes()
    filesystem.pipe_file(place, whole[: clip.noisy_offset])

    def load() -> ShardIndex:
        return ShardIndex.load(remote(url, tmp_path / "cache"))

    def downloads() -> int:
        return store.downloads()[shard.name]

    for _ in range(2):  # damaged, it is looked for anew by every load of the index, and not by every read
        index, before = load(), downloads()
        for reader in (ShardReader(index.root), ShardReader(index.root)):
            with pytest.raises(DamagedClipError, match=r"s3://.*; put there what python -m scaling.prepare makes of"):
                reader.read_clip(clip)
        assert Finding(shard.name, clip.id, "noisy samples") in check_shard(index, "train", 2)
        assert downloads() == before + 2, "once, and again because of its SHA-256"
    filesystem.pipe_file(place, whole)
    index = load()
    assert check_shard(index, "train", 2) == []
    noisy, _ = ShardReader(index.root).read_clip(clip)
    assert noisy.tobytes() == ShardReader(local.root).read_clip(clip)[0].tobytes()
    assert not list((tmp_path / "cache").glob("*.damaged"))
    assert stream(index) == stream(local)


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
        with pytest.raises(OSError, match="is full of shards that are being fetched"):
            index.root.try_fetch(other)  # what is fetched ahead does not stand in the way of what is needed
    finally:
        frozen.kill()
        frozen.wait()
        store.plan_faults()
    monkeypatch.undo()
    assert index.root.fetch(other).exists(), "what a killed fetch held is free"


def test_a_source_that_does_not_answer_ends_the_run_in_one_line(
    local: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(scaling.remote, "FETCH_PAUSES", (0.05,))
    with pytest.raises(
        UnreachableError, match=r"http://127.0.0.1:9/noise/index.json cannot be read .* 2 attempts: look"
    ):
        ShardIndex.load(remote("http://127.0.0.1:9/noise", tmp_path / "cache"))
    with pytest.raises(UserError, match=r"data.shards = nowhere://noise/index.json cannot be opened"):
        ShardIndex.load(remote("nowhere://noise", tmp_path / "cache"))
    with pytest.raises(UserError, match="no shards at file:///nowhere"):
        ShardIndex.load(remote("file:///nowhere", tmp_path / "cache"))


def test_a_source_that_may_not_be_read_is_asked_once_and_says_so():
    asked = []

    def refuse() -> None:
        asked.append(1)
        raise PermissionError("Forbidden")

    with pytest.raises(UnreachableError, match=r"^u cannot be read \(PermissionError: Forbidden\), in 1 attempt: look"):
        scaling.remote._persist("u", refuse)
    assert asked == [1]


def test_files_and_a_plain_web_server_are_sources_too(local: ShardIndex, tmp_path: Path):
    expected = stream(local)
    assert stream(ShardIndex.load(remote(f"file://{local.root}", tmp_path / "files"))) == expected
    words = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(local.root)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        port = server.stdout.readline().split(" port ")[1].split()[0]
        assert stream(ShardIndex.load(remote(f"http://127.0.0.1:{port}/", tmp_path / "web"))) == expected
        server.terminate()


def test_a_run_trains_and_is_scored_from_an_object_store(
    store: Store, tiny_data: list[str], tiny_settings: tuple[str, ...], tmp_path: Path, command
):
    filesystem = s3fs.S3FileSystem()
    filesystem.mkdir("tiny")
    filesystem.put(tiny_data[1].partition("=")[2] + "/", "tiny/shards/", recursive=True)
    words = [
        *tiny_data,
        *tiny_settings,
        "train.budget.steps=3",
        "data.shards=s3://tiny/shards",
        "execution.num_workers=1",
    ]
    done = command("scaling.train", *words, f"data.cache={tmp_path / 'cache'}", f"study={tmp_path / 'study'}")
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "study" / "runs").iterdir()
    assert json.loads((run / "plan.json").read_text())["config"]["data"]["shards"] == "s3://tiny/shards"
    assert len((run / "scores.jsonl").read_text().splitlines()) == 4
    assert {path.suffix for path in (tmp_path / "cache").glob("*.tar")} == {".tar"}
