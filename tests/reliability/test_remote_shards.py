"""Shards in an object store: fetched once a machine, verified, ahead of use; no failure changes them."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import s3fs

import scaling.remote
from scaling.errors import UnreachableError, UserError
from scaling.shard_reader import DamagedClipError, ShardReader
from scaling.shards import ShardIndex
from scaling.stream import CropDataset, MicroBatchSampler
from scaling.verify import Finding, check_shard
from tests.reliability.shards_in_store import CROP, Store, Upload, reading, remote, rows, stream


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


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


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
            for t, noisy, clean in zip(counters, *map(rows, batch[:2]), strict=True)
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


def test_a_rotten_copy_in_the_cache_is_fetched_anew_before_verify_blames_the_source(
    local: ShardIndex, tmp_path: Path, command
):
    words = ["data=vbd", f"data.shards=file://{local.root}", f"data.cache={tmp_path / 'cache'}"]
    first = command("scaling.verify", *words)
    assert first.returncode == 0, first.stderr
    shard = local.shards["train"][2]
    copy = tmp_path / "cache" / f"{shard.sha256}.tar"
    content = copy.read_bytes()
    copy.write_bytes(content[:5_000] + bytes([content[5_000] ^ 1]) + content[5_001:])
    again = command("scaling.verify", *words)
    assert (again.returncode, again.stdout) == (0, first.stdout)
    assert copy.read_bytes() == content


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
