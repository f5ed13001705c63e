"""Preparing: a VBD folder as users have it becomes shards, whole or not at all."""

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
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from scaling.convert import quantize
from scaling.corpus.vbd import find_utterances
from scaling.errors import UserError
from scaling.prepare import prepare_shards
from scaling.shards import ShardIndex, ShardReader

TRAIN = ["p228_001", "p228_002", "p226_001", "p287_005", "p230_003", "p230_004", "p236_002", "p236_010"]
TEST = ["p232_001", "p257_001", "p257_002"]
SETS = {"trainset_28spk": TRAIN, "testset": TEST}
REPOSITORY = Path(__file__).parents[2]


def voice(num_samples: int, sample_rate: int, seed: int) -> NDArray[np.float64]:
    """A few harmonics of a gliding pitch under a syllable-like envelope, in [-0.5, 0.5]."""
    time = np.arange(num_samples) / sample_rate
    phase = 2 * np.pi * (100 + 15 * seed) * (time + 0.1 * time**2)
    harmonics = np.sum([np.sin(k * phase) / k for k in range(1, 12)], axis=0)
    return np.asarray(0.25 * harmonics * np.sin(2 * np.pi * 2 * time) ** 2)


def make_corpus(root: Path, sample_rate: int = 48_000, logs: str | None = "logfiles", repeats: int = 1) -> Path:
    """A small VBD folder of real wavs; `repeats` multiplies the training utterances."""
    lines: dict[str, list[str]] = {}
    for name, ids in SETS.items():
        ids = ids + [f"p239_{number:03d}" for number in range((repeats - 1) * len(ids))] if name != "testset" else ids
        for kind in ("clean", "noisy"):
            (root / f"{kind}_{name}_wav").mkdir(parents=True)
        for number, utterance_id in enumerate(ids):
            num_samples = sample_rate // 2 + 1009 * (number % 11)
            clean = voice(num_samples, sample_rate, seed=number)
            noisy = clean + 0.1 * np.random.default_rng(number).standard_normal(num_samples)
            for kind, samples in (("clean", clean), ("noisy", noisy)):
                soundfile.write(root / f"{kind}_{name}_wav" / f"{utterance_id}.wav", samples, sample_rate, "PCM_16")
            lines.setdefault(name, []).insert(0, f"{utterance_id} bus {2.5 * number:g}")
    write_logs(root, logs, lines)
    return root


def write_logs(root: Path, place: str | None, lines: dict[str, list[str]]) -> None:
    texts = {f"log_{name}.txt": "\n".join(entries) + "\n" for name, entries in lines.items()}
    if place == "zip":
        with zipfile.ZipFile(root / "logfiles.zip", "w") as archive:
            for name, text in texts.items():
                archive.writestr(f"logfiles/{name}", text)
    elif place is not None:
        for name, text in texts.items():
            (root / place).mkdir(exist_ok=True)
            (root / place / name).write_text(text)


def zip_sets(root: Path, inside: str = "", keep_folders: bool = False) -> None:
    """Put each wav folder into a zip of its name, at `inside`, with what macOS adds to zips."""
    for folder in sorted(root.glob("*_wav")):
        with zipfile.ZipFile(f"{folder}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(folder.iterdir(), reverse=True):
                archive.write(path, f"{inside}{folder.name}/{path.name}")
                archive.writestr(f"__MACOSX/{folder.name}/._{path.name}", b"Mac OS X resource fork")
        if not keep_folders:
            shutil.rmtree(folder)


def prepare(source: Path, target: Path, num_workers: int = 1, shard_bytes: int = 100_000) -> ShardIndex:
    return prepare_shards(source, target, "vbd", num_workers, show_progress=False, shard_bytes=shard_bytes)


def files(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir()}


def refusal(source: Path, target: Path) -> str:
    """The one line with which a preparation is refused; it must leave no shards and nothing half-written."""
    with pytest.raises(UserError) as refused:
        prepare(source, target)
    assert "\n" not in str(refused.value)
    assert [path.name for path in target.parent.glob(f"*{target.name}*") if path.suffix != ".lock"] == []
    return str(refused.value)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return make_corpus(tmp_path / "vbd")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "prepared" / "shards"


# --- layouts -------------------------------------------------------------------------------


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
    "no root": (shutil.rmtree, "is no folder: name the folder that holds"),
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
    assert len(index.shard_paths("train")) > 3
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


def test_rounding_is_to_the_nearest_and_counts_only_what_is_cut() -> None:
    samples = np.array([-1.5, -1, -0.6 / 32768, 0.4 / 32768, 32767.4 / 32768, 1.0])
    quantized, num_clipped = quantize(samples)
    assert quantized.tolist() == [-32768, -32768, -1, 0, 32767, 32767]
    assert num_clipped == 2


# --- twice, interrupted, and at once -------------------------------------------------------


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
