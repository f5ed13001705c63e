"""Preparing: a VBD folder as users have it becomes shards, whole or not at all."""

import logging
import os
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile

from scaling.cli import load_config
from scaling.config import RunConfig
from scaling.corpus.vbd import find_utterances
from scaling.errors import UserError
from scaling.prepare import open_shards
from scaling.shard_reader import ShardReader
from scaling.shards import ShardIndex
from tests.scaling.vbd_folder import TEST, TRAIN, files, make_corpus, prepare, voice, zip_sets


def refusal(source: Path, target: Path) -> str:
    """The one line with which a preparation is refused; it must leave no shards and nothing half-written."""
    with pytest.raises(UserError) as refused:
        prepare(source, target)
    assert "\n" not in str(refused.value)
    assert [path.name for path in target.parent.glob(f"*{target.name}*") if path.suffix != ".lock"] == []
    return str(refused.value)


# --- layouts -------------------------------------------------------------------------------


def test_sources_that_are_newer_than_their_shards_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of the same names and sizes, as a corpus is whose noise was mixed anew."""
    source = make_corpus(tmp_path / "vbd")
    made = prepare(source, tmp_path / "shards")
    assert prepare(source, tmp_path / "shards").index_hash == made.index_hash
    assert "newer" not in caplog.text
    noisy = sorted(source.rglob("noisy_testset_wav/*.wav"))[0]
    later = (tmp_path / "shards" / "index.json").stat().st_mtime + 5
    os.utime(noisy, (later, later))
    assert prepare(source, tmp_path / "shards").index_hash == made.index_hash
    assert (
        f"source files are newer than the shards at {tmp_path / 'shards'}, of the same names and sizes" in caplog.text
    )
    assert f"first {noisy}: if what they hold has changed, delete the shards" in caplog.text


def test_linked_folders_of_a_set_belong_to_it(tmp_path: Path) -> None:
    source = make_corpus(tmp_path / "vbd")
    expected = prepare(source, tmp_path / "expected shards")
    for kind in ("clean", "noisy"):
        part = source / f"{kind}_trainset_28spk_wav"
        part.rename(tmp_path / kind)
        part.mkdir()
        (part / "more").symlink_to(tmp_path / kind)
    assert prepare(source, tmp_path / "linked shards").index_hash == expected.index_hash


@pytest.mark.parametrize("place", ["logfiles", ".", "zip"])
@pytest.mark.parametrize("inside", [None, "", "VBD/downloads/"])
def test_folders_and_zips_and_any_place_of_the_logs_make_the_same_shards(
    tmp_path: Path, target: Path, inside: str | None, place: str
) -> None:
    expected = prepare(make_corpus(tmp_path / "expected"), tmp_path / "expected shards")
    source = make_corpus(tmp_path / "vbd", logs=place)
    if inside is not None:
        zip_sets(source, inside)
    index = prepare(source, target)
    assert index.index_hash == expected.index_hash
    assert files(target) == files(tmp_path / "expected shards")


def test_splits_are_by_speaker_and_carry_the_logs_facts(corpus: Path, target: Path) -> None:
    index = prepare(corpus, target)
    ids = {split: sorted(clip.id for clip in index.clips(split)) for split in ("train", "validation", "test")}
    assert ids["validation"] == ["p226_001", "p287_005"]
    assert ids["test"] == sorted(TEST)
    assert ids["train"] == sorted(set(TRAIN) - set(ids["validation"]))
    clips = {clip.id: clip for split in ids for clip in index.clips(split)}
    assert (clips["p228_002"].speaker, clips["p228_002"].noise, clips["p228_002"].snr_db) == ("p228", "bus", 2.5)
    assert isinstance(clips["p228_001"].snr_db, float)
    assert clips["p230_003"].num_samples == round((24_000 + 4 * 1009) / 3)


def test_utterances_come_in_one_order_and_pickle_small_enough_to_send(corpus: Path) -> None:
    utterances = find_utterances(corpus)
    key = [(("train", "validation", "test").index(u.split), u.id) for u in utterances]
    assert key == sorted(key)
    assert len(key) == len(TRAIN + TEST)


def test_16_khz_samples_pass_through_unchanged(tmp_path: Path, target: Path) -> None:
    source = make_corpus(tmp_path / "vbd", sample_rate=16_000)
    index = prepare(source, target)
    reader = ShardReader(target)
    for clip in index.clips("test"):
        for kind, samples in zip(("noisy", "clean"), reader.read_clip(clip), strict=True):
            expected, _ = soundfile.read(source / f"{kind}_testset_wav" / f"{clip.id}.wav", dtype="int16")
            np.testing.assert_array_equal(samples, expected)


def test_48_khz_keeps_what_16_khz_can_hold_and_drops_the_rest(corpus: Path, target: Path) -> None:
    time48, time16 = np.arange(48_000) / 48_000, np.arange(16_000) / 16_000
    for kind in ("clean", "noisy"):
        tones = 0.4 * np.sin(2 * np.pi * 1000 * time48) + 0.4 * np.sin(2 * np.pi * 10_000 * time48)
        soundfile.write(corpus / f"{kind}_testset_wav" / "p232_001.wav", tones, 48_000, "PCM_16")
    clip = next(clip for clip in prepare(corpus, target).clips("test") if clip.id == "p232_001")
    assert clip.num_samples == 16_000
    noisy, clean = ShardReader(target).read_clip(clip)
    expected = 32768 * 0.4 * np.sin(2 * np.pi * 1000 * time16)
    middle = slice(1000, -1000)
    assert np.abs(clean - expected)[middle].max() < 2  # of 32768: rounding in the source and in the shard
    np.testing.assert_array_equal(noisy, clean)


@pytest.mark.parametrize("subtype", ["PCM_24", "FLOAT"])
def test_other_sample_formats_and_chunks_before_the_samples_are_read(corpus: Path, target: Path, subtype: str) -> None:
    samples = voice(48_000, 48_000, seed=3)
    for kind in ("clean", "noisy"):
        path = corpus / f"{kind}_testset_wav" / "p232_001.wav"
        soundfile.write(path, samples, 48_000, subtype, format="WAVEX")
        content = path.read_bytes()
        path.write_bytes(content[:12] + b"LIST\x05\x00\x00\x00notes\x00" + content[12:])
    clip = next(clip for clip in prepare(corpus, target).clips("test") if clip.id == "p232_001")
    assert clip.num_samples == 16_000
    assert np.abs(ShardReader(target).read_clip(clip)[1] / 32768).max() == pytest.approx(
        np.abs(samples).max(), rel=0.05
    )


def test_a_folder_is_preferred_to_its_zip(corpus: Path, target: Path) -> None:
    zip_sets(corpus, keep_folders=True)
    assert all(source.member is None for u in find_utterances(corpus) for source in (u.clean, u.noisy))
    shutil.rmtree(corpus / "clean_testset_wav")
    (corpus / "clean_testset_wav").mkdir()  # an unzip that failed left nothing in it
    assert {u.clean.member is None for u in find_utterances(corpus) if u.split == "test"} == {False}


# --- logs and downloads --------------------------------------------------------------------


def test_without_logs_noise_and_snr_are_unknown_with_one_warning(
    tmp_path: Path, target: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = prepare(make_corpus(tmp_path / "vbd", logs=None), target)
    assert {(clip.noise, clip.snr_db) for clip in index.clips("train") + index.clips("test")} == {(None, None)}
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "log_trainset_28spk.txt and no log_testset.txt" in warnings[0]


def test_an_utterance_that_its_log_lacks_is_counted(
    corpus: Path, target: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (corpus / "logfiles" / "log_testset.txt").write_text("p232_001 bus 17.5\n\np257_001 cafe 2.5\n")
    clips = {clip.id: clip for clip in prepare(corpus, target).clips("test")}
    assert (clips["p257_001"].noise, clips["p257_001"].snr_db) == ("cafe", 2.5)
    assert (clips["p257_002"].noise, clips["p257_002"].snr_db) == (None, None)
    assert "log_testset.txt lacks 1 of 3 utterances, first p257_002" in caplog.text


@pytest.mark.parametrize("line", ["p257_001 cafe", "p257_001 cafe loud", "p257_001 cafe nan", "p257_001 cafe 5 dB"])
def test_a_log_line_that_cannot_be_read_is_named_by_file_and_number(corpus: Path, target: Path, line: str) -> None:
    log = corpus / "logfiles" / "log_testset.txt"
    log.write_text(f"p232_001 bus 17.5\n{line}\n")
    assert f"{log} line 2 is '{line}', expected UTTERANCE NOISE SNR" in refusal(corpus, target)


def test_a_download_with_another_md5_is_warned_of_and_used(
    corpus: Path, target: Path, caplog: pytest.LogCaptureFixture
) -> None:
    zip_sets(corpus)
    prepare(corpus, target)
    warned = [record.getMessage().split(" ")[0] for record in caplog.records if "MD5" in record.getMessage()]
    known = ("clean_testset_wav", "clean_trainset_28spk_wav", "noisy_testset_wav")  # no MD5 of the fourth is published
    assert warned == [str(corpus / f"{name}.zip") for name in known]


# --- mistakes ------------------------------------------------------------------------------


def rewrite(name: str, sample_rate: int = 48_000, shape: tuple[int, ...] = (24_000,)) -> Callable[[Path], object]:
    return lambda root: soundfile.write(root / name, np.full(shape, 0.1), sample_rate, "PCM_16")


def overwrite(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda root: (root / name).write_bytes(content)


def cut(name: str, num_bytes: int) -> Callable[[Path], object]:
    return lambda root: os.truncate(root / name, (root / name).stat().st_size - num_bytes)


def remove(*patterns: str) -> Callable[[Path], object]:
    def change(root: Path) -> None:
        for path in [path for pattern in patterns for path in root.glob(pattern)]:
            path.unlink()

    return change


def copy(name: str, folder: str) -> Callable[[Path], object]:
    def change(root: Path) -> None:
        (root / folder).mkdir()
        shutil.copy(root / name, root / folder)

    return change


def damage_zip(offset: int | None) -> Callable[[Path], object]:
    """Cut a zip in half, or change a byte of its first member's compressed samples."""

    def change(root: Path) -> None:
        zip_sets(root)
        path = root / "noisy_testset_wav.zip"
        content = bytearray(path.read_bytes())
        if offset is None:
            del content[len(content) // 2 :]
        else:
            content[offset] ^= 255
        path.write_bytes(content)

    return change


def not_a_number(root: Path) -> None:
    for kind in ("clean", "noisy"):
        soundfile.write(root / f"{kind}_testset_wav/p257_001.wav", np.array([0.1, np.nan] * 99), 16_000, "FLOAT")


WAV = "clean_testset_wav/p257_001.wav"
TWIN = "noisy_testset_wav/p257_001.wav"
MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no root": (shutil.rmtree, "is not a folder: name the folder that holds"),
    "missing set": (
        lambda root: shutil.rmtree(root / "noisy_testset_wav"),
        "lacks noisy_testset_wav (looked for a folder or a .zip of that name): download",
    ),
    "missing noisy": (remove(TWIN), f"lacks {TWIN}, whose twins are there"),
    "missing clean": (remove(WAV), f"lacks {WAV}, whose twins are there"),
    "no test set": (
        remove("*_testset_wav/*"),
        "has no utterances for the test split",
    ),
    "no validation speaker": (
        remove("*/p226*", "*/p287*"),
        "has no utterances for the validation split: expected wavs of speakers p226 and p287",
    ),
    "another name": (rewrite("clean_testset_wav/copy of.wav"), "copy of.wav is not named SPEAKER_NUMBER.wav"),
    "two of a name": (
        copy(WAV, "clean_testset_wav/a"),
        "have the same name: remove one",
    ),
    "rate": (rewrite(WAV, 44_100), f"{WAV} has 44100 Hz, expected 48000 or 16000 Hz: resample"),
    "unlike rates": (rewrite(WAV, 16_000), f"{WAV} has 16000 Hz and its noisy twin 48000 Hz: bring both to one rate"),
    "stereo": (rewrite(TWIN, 48_000, (24_000, 2)), f"{TWIN} has 2 channels, expected 1: make it"),
    "empty": (overwrite(WAV, b""), f"{WAV} is empty (0 bytes): copy it again"),
    "no samples": (rewrite(TWIN, 48_000, (0,)), f"{TWIN} holds no samples: copy it again"),
    "one sample": (rewrite(WAV, 48_000, (1,)), f"{WAV} has 1 samples, too short"),
    "cut off": (cut(TWIN, 10), f"{TWIN} is not a readable wav file (it is cut off: its header promises 50018"),
    "cut off in the header": (overwrite(WAV, b"RIFF\x24\x00\x00\x00WAVEfmt "), f"{WAV} is not a readable"),
    "text": (overwrite(TWIN, b"<html>404 Not Found</html>"), f"{TWIN} is not a readable wav file"),
    "length": (rewrite(TWIN, 48_000, (25_008,)), f"{WAV} has 25009 samples and its noisy twin 25008"),
    "not a number": (not_a_number, f"{WAV} holds samples that are not numbers"),
    "half a zip": (damage_zip(None), "noisy_testset_wav.zip is not a complete zip file"),
    "damaged member": (damage_zip(20_000), "noisy_testset_wav.zip:noisy_testset_wav/p257_002.wav is not a readable"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_with_its_remedy_and_leaves_nothing(corpus: Path, target: Path, mistake: str) -> None:
    change, message = MISTAKES[mistake]
    change(corpus)
    assert message in refusal(corpus, target)


def test_all_unusable_files_are_found_at_once(corpus: Path, target: Path) -> None:
    for number, utterance_id in enumerate(TRAIN[:5]):
        rewrite(f"noisy_trainset_28spk_wav/{utterance_id}.wav", 44_100 + number)(corpus)
    line = refusal(corpus, target)
    assert line.startswith("5 of 11 utterances cannot be used: ")
    assert line.count(" Hz, expected") == 3
    assert line.endswith("; and 2 more")


def test_shards_of_another_demo_corpus_are_refused_where_no_corpus_is_there_to_compare(
    tiny_data: list[str], tiny_index: ShardIndex, tmp_path: Path
) -> None:
    words = [f"data.root={tmp_path / 'nowhere'}", *tiny_data[1:]]
    assert open_shards(load_config(RunConfig, "run", words).data).index_hash == tiny_index.index_hash
    for other in ("data.demo.hours=0.08", "data.demo.seed=7", "data.demo.test_utterances=6"):
        with pytest.raises(UserError, match=r"holds shards of another corpus than data.demo.hours = "):
            open_shards(load_config(RunConfig, "run", [*words, other]).data)


@pytest.mark.parametrize("occupied", ["folder", "file"])
def test_a_target_with_other_things_in_it_is_refused_and_left_alone(
    corpus: Path, tmp_path: Path, occupied: str
) -> None:
    target = tmp_path / "thesis"
    if occupied == "folder":
        target.mkdir()
    path = target / "chapter1.txt" if occupied == "folder" else target
    path.write_text("draft")
    with pytest.raises(UserError, match=r"thesis is there but holds no shards: delete it or name another data.shards"):
        prepare(corpus, target)
    assert path.read_text() == "draft"


def test_an_empty_target_folder_is_used(corpus: Path, target: Path) -> None:
    target.mkdir(parents=True)
    assert prepare(corpus, target) == ShardIndex.load(target)


def test_no_workers_is_refused(corpus: Path, target: Path) -> None:
    with pytest.raises(UserError, match="0 workers cannot prepare shards"):
        prepare(corpus, target, num_workers=0)


# --- the same bytes ------------------------------------------------------------------------


def test_any_number_of_workers_makes_the_same_bytes(tmp_path: Path, target: Path) -> None:
    source = make_corpus(tmp_path / "vbd", repeats=20)  # so many that the workers run ahead of the writer
    made = [prepare(source, target.with_name(str(workers)), workers, 1_000_000).index_hash for workers in (1, 2, 3)]
    assert len(set(made)) == 1
    contents = [files(target.with_name(str(workers))) for workers in (1, 2, 3)]
    assert contents[0] == contents[1] == contents[2]
    assert not [name for name, content in contents[0].items() if str(tmp_path).encode() in content]


def test_shards_mix_speakers_and_hold_every_clip_once(tmp_path: Path, target: Path) -> None:
    index = prepare(make_corpus(tmp_path / "vbd", repeats=6), target, shard_bytes=400_000)
    clips = index.clips("train")
    assert len({clip.id for clip in clips}) == len(clips) == len(TRAIN) * 6 - 2
    assert len(index.shards["train"]) > 3
    order = [clip.speaker for clip in clips]
    changes = sum(first != second for first, second in pairwise(order))
    assert changes > len(set(order)) + 4  # sorted by speaker there would be one change fewer than speakers


def test_peaks_beyond_16_bits_are_clipped_counted_and_never_wrapped(
    corpus: Path, target: Path, caplog: pytest.LogCaptureFixture
) -> None:
    square = 0.9999 * np.sign(np.sin(2 * np.pi * 440 * np.arange(48_000) / 48_000 + 0.1))
    for kind in ("clean", "noisy"):
        soundfile.write(corpus / f"{kind}_testset_wav" / "p232_001.wav", square, 48_000, "PCM_16")
    clip = next(clip for clip in prepare(corpus, target).clips("test") if clip.id == "p232_001")
    _, clean = ShardReader(target).read_clip(clip)
    num_clipped = int(np.sum(clean == 32767) + np.sum(clean == -32768))
    assert num_clipped > 500
    assert "samples in 1 clips exceeded 16 bits and were clipped" in caplog.text
    assert np.abs(np.diff(np.sign(clean.astype(int)))).sum() == pytest.approx(
        2 * 880, abs=4
    )  # a wrap would add changes
