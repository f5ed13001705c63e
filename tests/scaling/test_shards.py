"""Shards: what is written is read back, by the index and by stock tools, and damage is found."""

import io
import json
import multiprocessing
import os
import pickle
import shutil
import tarfile
import tempfile
import wave
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from scaling.errors import UserError
from scaling.shard_reader import DamagedClipError, ShardReader
from scaling.shard_writer import ShardWriter
from scaling.shards import SAMPLE_RATE, Clip, ShardIndex

Recording = NDArray[np.int16]


def recordings(num_samples: int, seed: int) -> tuple[Recording, Recording]:
    """A noisy and a clean recording: a gliding tone of speech's pitch, with and without noise."""
    rng = np.random.default_rng(seed)
    time = np.arange(num_samples) / SAMPLE_RATE
    clean = 8000 * np.sin(2 * np.pi * (120 + 40 * time) * time) * np.hanning(num_samples + 2)[1:-1]
    return (clean + rng.normal(0, 800, num_samples)).astype(np.int16), clean.astype(np.int16)


def write(root: Path, shard_bytes: int = 100_000) -> dict[str, tuple[Recording, Recording]]:
    """Twelve training clips and three of validation; what was written, by id."""
    written = {}
    with ShardWriter(root, "tones", "a source", shard_bytes) as writer:
        for split, count in (("train", 12), ("validation", 3)):
            for number in range(count):
                clip_id, speaker = f"p{number % 4}_{split}{number:03d}", f"p{number % 4}"
                pair = recordings(6000 + 517 * number, seed=number)
                noise, snr_db = (None, None) if number == 5 else ("bus", 2.5 * number)
                writer.add(split, clip_id, speaker, noise, snr_db, *pair)
                written[clip_id] = pair
        writer.commit()
    return written


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "shards")
    return tmp_path / "shards"


def files(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir()}


# --- what is written is read back ----------------------------------------------------------


def test_every_clip_comes_back_whole_and_verified(tmp_path: Path) -> None:
    written = write(tmp_path)
    index, reader = ShardIndex.load(tmp_path), ShardReader(tmp_path)
    clips = index.clips("train") + index.clips("validation")
    assert [clip.id for clip in clips] == list(written)
    assert len({clip.shard for clip in clips}) > 4  # the small shards of this test do split
    for clip in clips:
        noisy, clean = reader.read_clip(clip)
        assert noisy.dtype == clean.dtype == np.int16
        np.testing.assert_array_equal(noisy, written[clip.id][0])
        np.testing.assert_array_equal(clean, written[clip.id][1])
    assert index.hours("validation") == pytest.approx((3 * 6000 + 3 * 517) / 16000 / 3600, rel=1e-12)
    assert (clips[5].noise, clips[5].snr_db, clips[7].noise, clips[7].snr_db) == (None, None, "bus", 17.5)


def test_a_crop_is_the_slice_of_the_whole(root: Path) -> None:
    index, reader = ShardIndex.load(root), ShardReader(root)
    rng = np.random.default_rng(1)
    for clip in index.clips("train"):
        whole = reader.read_clip(clip)
        for _ in range(20):
            start, stop = np.sort(rng.integers(0, clip.num_samples + 1, 2)).tolist()
            for crop, samples in zip(reader.read_crop(clip, start, stop - start), whole, strict=True):
                np.testing.assert_array_equal(crop, samples[start:stop])
                crop[:] = 0  # a crop is the caller's own, writable


pcm = st.lists(st.integers(-32768, 32767), min_size=1, max_size=300)
names = st.one_of(st.none(), st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20))
snrs = st.one_of(st.none(), st.floats(-60, 60))
clip_ids = st.from_regex(r"[A-Za-z0-9_-]{1,80}", fullmatch=True)
clip_lists = st.lists(st.tuples(clip_ids, names, snrs, pcm), min_size=1, max_size=8, unique_by=lambda clip: clip[0])


@settings(max_examples=25, deadline=None)
@given(splits=st.dictionaries(st.sampled_from(["train", "validation", "test"]), clip_lists, min_size=1), data=st.data())
def test_anything_that_can_be_written_is_read_back_equal(splits: dict[str, list[Any]], data: st.DataObject) -> None:
    shard_bytes = data.draw(st.integers(1, 20_000))
    with tempfile.TemporaryDirectory() as folder:
        with ShardWriter(Path(folder), "any", "source", shard_bytes) as writer:
            for split, clips in splits.items():
                for clip_id, noise, snr_db, samples in clips:
                    noisy = np.array(samples, dtype=np.int16)
                    writer.add(split, clip_id, "s", noise, snr_db, noisy, noisy[::-1])
            committed = writer.commit()
        index, reader = ShardIndex.load(Path(folder)), ShardReader(Path(folder))
        assert index == committed
        assert set(index.rows) == set(splits)
        for split, clips in splits.items():
            rows = index.clips(split)
            assert [(row.id, row.noise, row.snr_db) for row in rows] == [clip[:3] for clip in clips]
            assert index.num_samples(split) == sum(len(clip[3]) for clip in clips)
            for row, (_, _, _, samples) in zip(rows, clips, strict=True):
                noisy, clean = reader.read_clip(row)
                assert noisy.tolist() == samples
                assert clean.tolist() == samples[::-1]
                start = data.draw(st.integers(0, len(samples)))
                assert reader.read_crop(row, start, len(samples) - start)[0].tolist() == samples[start:]


def test_stock_webdataset_reads_the_same_samples(root: Path) -> None:
    index, reader = ShardIndex.load(root), ShardReader(root)
    paths = sorted(map(str, root.glob("train-*.tar")))
    assert len(paths) > 3
    samples = {sample["__key__"]: sample for sample in webdataset.WebDataset(paths, shardshuffle=False)}
    clips = index.clips("train")
    assert list(samples) == [clip.id for clip in clips]
    for clip in clips:
        for name, expected in zip(("noisy.wav", "clean.wav"), reader.read_clip(clip), strict=True):
            with wave.open(io.BytesIO(samples[clip.id][name])) as wav:
                assert wav.getparams()[:4] == (1, 2, 16000, clip.num_samples)
                np.testing.assert_array_equal(np.frombuffer(wav.readframes(clip.num_samples), "<i2"), expected)
        assert json.loads(samples[clip.id]["json"]) == {
            "speaker": clip.speaker,
            "noise": clip.noise,
            "snr_db": clip.snr_db,
            "duration": clip.num_samples / 16000,
            "num_samples": clip.num_samples,
        }


def test_the_index_and_the_tars_agree_on_every_offset(root: Path) -> None:
    index = ShardIndex.load(root)
    for path in sorted(root.glob("train-*.tar")):
        clips = {clip.id: clip for clip in index.clips("train") if clip.shard == path.name}
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        kinds = ("noisy.wav", "clean.wav", "json")
        assert [member.name for member in members] == [f"{clip}.{kind}" for clip in clips for kind in kinds]
        for member in members:
            clip_id, kind = member.name.split(".", 1)
            offsets = {"noisy.wav": clips[clip_id].noisy_offset, "clean.wav": clips[clip_id].clean_offset}
            assert offsets.get(kind, member.offset_data + 44) == member.offset_data + 44
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")


# --- names and bytes -----------------------------------------------------------------------


def test_the_same_clips_make_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "here")
    write(tmp_path / "another" / "place")
    assert files(tmp_path / "here") == files(tmp_path / "another" / "place")
    assert not [name for name, content in files(tmp_path / "here").items() if str(tmp_path).encode() in content]


def test_one_changed_sample_changes_the_index_hash(tmp_path: Path) -> None:
    hashes = set()
    for change in (0, 1):
        noisy, clean = recordings(5000, seed=0)
        clean[2500] += change
        with ShardWriter(tmp_path / str(change), "tones", "a source") as writer:
            writer.add("train", "p1_001", "p1", "bus", 5.0, noisy, clean)
            hashes.add(writer.commit().index_hash)
    assert len(hashes) == 2


def test_without_commit_there_is_no_index_and_no_unfinished_shard(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "tones", "a source") as writer:
        writer.add("train", "p1_001", "p1", "bus", 5.0, *recordings(5000, seed=0))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r"index.json is missing"):
        ShardIndex.load(tmp_path)


@pytest.mark.parametrize("clip_id", ["p1.001", "p1/001", "", "p1 001", "p" * 81])
def test_an_id_that_webdataset_would_misread_is_refused(tmp_path: Path, clip_id: str) -> None:
    with ShardWriter(tmp_path, "tones", "a source") as writer, pytest.raises(ValueError, match="clip id"):
        writer.add("train", clip_id, "p1", None, None, *recordings(100, seed=0))


def test_the_writer_refuses_what_would_contradict_itself(tmp_path: Path) -> None:
    noisy, clean = recordings(100, seed=0)
    with ShardWriter(tmp_path, "tones", "a source") as writer:
        writer.add("train", "p1_001", "p1", None, None, noisy, clean)
        with pytest.raises(ValueError, match="already"):
            writer.add("train", "p1_001", "p1", None, None, noisy, clean)
        with pytest.raises(ValueError, match="100 noisy and 99 clean"):
            writer.add("train", "p1_002", "p1", None, None, noisy, clean[1:])
        with pytest.raises(ValueError, match="0 noisy and 0 clean"):
            writer.add("train", "p1_002", "p1", None, None, noisy[:0], clean[:0])
        writer.add("test", "p1_001", "p1", None, None, noisy, clean)
        with pytest.raises(ValueError, match="train is finished"):
            writer.add("train", "p1_003", "p1", None, None, noisy, clean)


# --- damage --------------------------------------------------------------------------------


def edit_index(root: Path, **changes: object) -> None:
    index = json.loads((root / "index.json").read_text())
    (root / "index.json").write_text(json.dumps(index | changes))


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "index.json is missing": lambda root: (root / "index.json").unlink(),
    "index.json is damaged": lambda root: os.truncate(root / "index.json", 200),
    "index.json is damaged (KeyError: 'splits')": lambda root: (root / "index.json").write_text('{"format": 2}'),
    "its format is 1, expected 2": lambda root: edit_index(root, format=1),
    "train.jsonl is missing": lambda root: (root / "train.jsonl").unlink(),
    "validation.jsonl has SHA-256": lambda root: flip(root / "validation.jsonl", 30),
    "shard train-00001.tar is missing": lambda root: (root / "train-00001.tar").unlink(),
    "shard train-00002.tar has 1024 bytes, expected": lambda root: os.truncate(root / "train-00002.tar", 1024),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_folder_is_refused_with_the_remedy(root: Path, message: str) -> None:
    DAMAGES[message](root)
    with pytest.raises(UserError) as refused:
        ShardIndex.load(root).check_sizes()
    line = str(refused.value)
    assert message in line
    assert f"delete {root} and run python -m scaling.prepare again" in line
    assert "\n" not in line


def test_a_folder_that_is_not_there_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no shards at .*nowhere: make them with python -m scaling.prepare"):
        ShardIndex.load(tmp_path / "nowhere")


def test_shards_are_brought_behind_a_url_as_preparing_for_one_says(
    tiny_data: list[str], tiny_index: ShardIndex, tmp_path: Path, command
) -> None:
    url = f"file://{tmp_path / 'far'}"
    words = [word for word in tiny_data if not word.startswith("data.shards=")]
    words += [f"data.shards={url}", f"data.cache={tmp_path / 'cache'}"]
    refused = command("scaling.prepare", *words)
    assert refused.returncode == 2
    assert refused.stderr.startswith(
        f"error: no shards at {url}: make them with python -m scaling.prepare in a folder and copy all its files there"
    )
    shutil.copytree(tiny_index.root, tmp_path / "far")
    found = command("scaling.prepare", *words)
    assert found.returncode == 0, found.stderr
    assert f"shards at {url}, index hash {tiny_index.index_hash}" in found.stdout


def test_an_unknown_split_is_answered_with_the_known_ones(root: Path) -> None:
    with pytest.raises(UserError, match="no split 'dev': name one of train, validation"):
        ShardIndex.load(root).clips("dev")


@pytest.mark.parametrize("kind", ["noisy", "clean"])
@pytest.mark.parametrize("place", [0, 4001, -1])
def test_a_flipped_byte_of_sound_is_found_and_named(root: Path, kind: str, place: int) -> None:
    index = ShardIndex.load(root)
    clip = index.clips("train")[4]
    offset = clip.noisy_offset if kind == "noisy" else clip.clean_offset
    flip(root / clip.shard, offset + place % (2 * clip.num_samples))
    reader = ShardReader(root)
    with pytest.raises(
        DamagedClipError, match=f"clip {clip.id} in .*{clip.shard}: its {kind} samples have CRC-32"
    ) as found:
        reader.read_clip(clip)
    assert (found.value.clip_id, found.value.shard) == (clip.id, clip.shard)
    for other in index.clips("train"):
        if other.id != clip.id:
            reader.read_clip(other)


def test_a_shard_cut_off_under_an_open_reader_is_found_at_the_read(root: Path) -> None:
    clip = ShardIndex.load(root).clips("train")[-1]
    assert clip.num_samples > 8192, "two blocks, of which the first stays whole"
    reader = ShardReader(root)
    reader.read_clip(clip)
    os.truncate(root / clip.shard, clip.clean_offset + 2 * clip.num_samples - 6)
    with pytest.raises(DamagedClipError, match="6 bytes too early"):
        reader.read_crop(clip, clip.num_samples - 100, 100)
    reader.read_crop(clip, 0, 100)


def test_a_shard_that_went_away_is_named(root: Path) -> None:
    clip = ShardIndex.load(root).clips("train")[0]
    (root / clip.shard).unlink()
    with pytest.raises(DamagedClipError, match=f"{clip.shard}: its shard is missing"):
        ShardReader(root).read_crop(clip, 0, 10)


@pytest.mark.parametrize(("start", "num_samples"), [(-1, 10), (5990, 11), (0, 6001), (10, -1)])
def test_a_crop_outside_its_clip_is_refused(root: Path, start: int, num_samples: int) -> None:
    clip = ShardIndex.load(root).clips("train")[0]
    assert clip.num_samples == 6000
    with pytest.raises(ValueError, match=r"reaches outside|negative"):
        ShardReader(root).read_crop(clip, start, num_samples)


def test_the_error_for_a_damaged_clip_crosses_processes() -> None:
    error = DamagedClipError("clip a in b: gone", "a", "b")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.clip_id, copy.shard) == ("clip a in b: gone", "a", "b")
    assert str(DamagedClipError("Caught in a loader worker")) == "Caught in a loader worker"  # as torch raises it again


# --- many processes ------------------------------------------------------------------------

READER: ShardReader | None = None


def read_all(reader: ShardReader | None, clips: list[Clip]) -> int:
    """How many of the clips verify; reads with the reader inherited by fork where none is given."""
    reader = reader or READER
    assert reader is not None
    return sum(len(reader.read_clip(clip)[0]) == clip.num_samples for _ in range(20) for clip in clips)


def test_a_reader_works_in_forked_processes_and_threads_at_once(root: Path) -> None:
    global READER
    READER, clips = ShardReader(root), ShardIndex.load(root).clips("train")
    READER.read_clip(clips[0])  # so that the forks inherit one open shard and open the others themselves
    with ProcessPoolExecutor(3, multiprocessing.get_context("fork")) as pool:
        assert [task.result() for task in [pool.submit(read_all, None, clips) for _ in range(3)]] == [240] * 3
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda _: read_all(READER, clips), range(4))) == [240] * 4
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    READER.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors - len({clip.shard for clip in clips})


def test_a_pickled_reader_opens_the_shards_for_itself(root: Path) -> None:
    reader, clips = ShardReader(root), ShardIndex.load(root).clips("train")
    reader.read_clip(clips[0])
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(read_all, reader, clips).result() == 240
    copy = pickle.loads(pickle.dumps(reader))
    reader.close()  # closes nothing of the copy's
    assert read_all(copy, clips) == 240
