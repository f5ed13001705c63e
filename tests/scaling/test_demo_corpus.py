"""The demo corpus: real speech, VBD's layout, the SNRs it says, the same files every time."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile
import soxr
from pystoi import stoi

import scaling
from scaling.corpus import demo, espeak, noises, sentences
from scaling.corpus.demo import DemoConfig, make_demo_corpus, plan_corpus
from scaling.errors import UserError

TINY = DemoConfig(hours=0.04, test_utterances=20)
REPOSITORY = Path(scaling.__file__).parents[1]
FOLDERS = ("clean_trainset_28spk_wav", "noisy_trainset_28spk_wav", "clean_testset_wav", "noisy_testset_wav")
SETS = ("trainset_28spk", "testset")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny corpus, made by one process."""
    root = tmp_path_factory.mktemp("corpus") / "demo"
    make_demo_corpus(root, TINY, num_workers=1)
    return root


@pytest.fixture(scope="module")
def resumed_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny corpus, made by two workers whose parent is killed on the way, and completed by a second call."""
    root = tmp_path_factory.mktemp("resumed") / "demo"
    code = "import sys; from pathlib import Path; from scaling.corpus.demo import *\n"
    code += f"make_demo_corpus(Path(sys.argv[1]), DemoConfig({TINY.hours}, {TINY.test_utterances}), 2)"
    process = subprocess.Popen([sys.executable, "-c", code, str(root)], cwd=REPOSITORY)
    deadline = time.monotonic() + 180
    while len(list(root.glob("noisy_*/p*.wav"))) < 5:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=60)
    alive = [worker for worker in alive if worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE]
    assert len(workers) >= 2
    assert not alive, "workers outlive their parent"
    assert not (root / "demo.json").exists()
    assert not list(root.glob("log*"))
    assert len(list(root.glob("noisy_*/p*.wav"))) < len(plan_corpus(TINY))
    (root / "noisy_testset_wav" / ".p232_001.wav.1.tmp").write_bytes(b"RIFF")  # as a kill while writing leaves it

    steps: list[tuple[int, int]] = []
    make_demo_corpus(root, TINY, num_workers=2, progress=lambda done, total: steps.append((done, total)))
    assert steps[0][0] >= 1, "what was written before the kill was made again"
    assert steps[-1] == (len(plan_corpus(TINY)),) * 2
    return root


def read_log(root: Path, name: str) -> dict[str, tuple[str, float]]:
    lines = [line.split(" ") for line in (root / f"log_{name}.txt").read_text().splitlines()]
    return {utterance: (noise, float(snr_db)) for utterance, noise, snr_db in lines}


def read_pair(root: Path, name: str, utterance: str) -> tuple[np.ndarray, np.ndarray]:
    clean, _ = soundfile.read(root / f"clean_{name}_wav" / f"{utterance}.wav")
    noisy, _ = soundfile.read(root / f"noisy_{name}_wav" / f"{utterance}.wav")
    return clean, noisy


def median_pitch_hz(sound: np.ndarray, sample_rate: int) -> float:
    """By autocorrelation, over the frames that are loud and periodic."""
    size, found = sample_rate // 20, []
    frames = sound[: len(sound) // size * size].reshape(-1, size)
    for frame in frames[np.mean(frames**2, axis=1) > 0.3 * np.mean(sound**2)]:
        correlation = np.correlate(frame, frame, "full")[size - 1 :]
        shortest, longest = sample_rate // 350, sample_rate // 65
        lag = shortest + int(np.argmax(correlation[shortest:longest]))
        if correlation[lag] > 0.5 * correlation[0]:
            found.append(sample_rate / lag)
    assert len(found) >= 5, "nothing voiced"
    return float(np.median(found))


# --- the files ---------------------------------------------------------------------------------


def test_the_layout_is_vbds(corpus: Path) -> None:
    expected = {*FOLDERS, "log_trainset_28spk.txt", "log_testset.txt", "demo.json"}
    assert {path.name for path in corpus.iterdir() if not path.name.startswith(".")} == expected
    for name in SETS:
        clean, noisy = (
            {path.name for path in (corpus / f"{kind}_{name}_wav").iterdir()} for kind in ("clean", "noisy")
        )
        assert clean == noisy == {f"{utterance}.wav" for utterance in read_log(corpus, name)}
    for folder in FOLDERS:
        for path in (corpus / folder).iterdir():
            info = soundfile.info(path)
            assert (info.samplerate, info.channels, info.subtype, info.format) == (48000, 1, "PCM_16", "WAV")
            assert 2 <= info.duration <= 6
    speakers = {path.name[:4] for path in (corpus / FOLDERS[0]).iterdir()}
    vbd = "226 227 228 230 231 233 236 239 243 244 250 254 256 258"
    vbd += " 259 267 268 269 270 273 274 276 277 278 279 282 286 287"
    assert speakers == {f"p{number}" for number in vbd.split()}
    assert {path.name[:4] for path in (corpus / FOLDERS[2]).iterdir()} == {"p232", "p257"}
    assert (corpus / FOLDERS[0] / "p226_001.wav").exists()


def test_the_snr_of_every_file_is_the_one_in_the_log(corpus: Path) -> None:
    for name, allowed in zip(SETS, ({0, 5, 10, 15}, {2.5, 7.5, 12.5, 17.5}), strict=True):
        log = read_log(corpus, name)
        assert {snr_db for _, snr_db in log.values()} == allowed
        for utterance, (_, snr_db) in log.items():
            clean, noisy = read_pair(corpus, name, utterance)
            assert 10 * np.log10(np.sum(clean**2) / np.sum((noisy - clean) ** 2)) == pytest.approx(snr_db, abs=0.1)
            assert np.abs(noisy).max() < 1


def test_the_clean_files_are_speech(corpus: Path) -> None:
    """Level as of a recording, syllables and pauses, and a voice that is periodic and has formants, not a tone."""
    for path in sorted((corpus / FOLDERS[0]).glob("*_001.wav")):
        sound, sample_rate = soundfile.read(path)
        assert -33 < 10 * np.log10(np.mean(sound**2)) < -23
        frames = sound[: len(sound) // 960 * 960].reshape(-1, 960)
        level_db = 10 * np.log10(np.mean(frames**2, axis=1))
        assert np.percentile(level_db, 95) - level_db[:4].mean() > 25, f"{path.name}: no pause before the speech"
        loud = level_db > np.percentile(level_db, 95) - 20
        assert np.count_nonzero(np.diff(loud.astype(int)) == 1) >= 2, f"{path.name}: no syllables"
        power = np.abs(np.fft.rfft(sound)) ** 2
        frequencies = np.fft.rfftfreq(len(sound), 1 / sample_rate)
        for low, high, least_db in ((80, 1000, -6), (1000, 4000, -25), (4000, 8000, -35)):
            share = power[(frequencies >= low) & (frequencies < high)].sum() / power.sum()
            assert 10 * np.log10(share) > least_db, f"{path.name}: {low} to {high} Hz"
        median_pitch_hz(sound, sample_rate)


def test_both_sexes_speak_in_every_split(corpus: Path) -> None:
    for speaker in demo.VOICES:
        name = "testset" if speaker in demo.TEST_SPEAKERS else "trainset_28spk"
        pitch_hz = median_pitch_hz(*soundfile.read(corpus / f"clean_{name}_wav" / f"{speaker}_001.wav"))
        assert (pitch_hz > 150) == (speaker in demo.WOMEN), f"{speaker}: {pitch_hz:.0f} Hz"
    train = set(demo.VOICES) - set(demo.VALIDATION_SPEAKERS) - set(demo.TEST_SPEAKERS)
    for split in (train, demo.VALIDATION_SPEAKERS, demo.TEST_SPEAKERS):
        assert set(split) & set(demo.WOMEN)
        assert set(split) & set(demo.MEN)


def test_unprocessed_intelligibility_is_near_that_of_vbd(corpus: Path) -> None:
    """VBD's test set has STOI 0.921."""
    scores = []
    for utterance in read_log(corpus, "testset"):
        pair = [soxr.resample(sound, 48000, 16000) for sound in read_pair(corpus, "testset", utterance)]
        scores.append(stoi(*pair, 16000))
    assert 0.87 < np.mean(scores) < 0.95


def test_files_are_the_same_whatever_the_workers_and_kills(corpus: Path, resumed_corpus: Path) -> None:
    files = sorted(path.relative_to(corpus) for path in corpus.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(resumed_corpus) for path in resumed_corpus.rglob("*") if path.is_file())
    for file in files:
        assert (corpus / file).read_bytes() == (resumed_corpus / file).read_bytes(), file


def test_another_seed_gives_other_files() -> None:
    first = plan_corpus(TINY)[0]
    assert not np.array_equal(demo.make_utterance(first, 0)[0][:96000], demo.make_utterance(first, 1)[0][:96000])


# --- the plan ----------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TINY, DemoConfig(), DemoConfig(hours=2.0, seed=3)])
def test_hours_and_conditions_come_out_as_asked(config: DemoConfig) -> None:
    plan = plan_corpus(config)
    in_train_set = [utterance for utterance in plan if utterance.split != "test"]
    assert sum(utterance.seconds for utterance in in_train_set) / 3600 == pytest.approx(config.hours, abs=0.003)
    assert len(plan) - len(in_train_set) == config.test_utterances
    assert len({utterance.name for utterance in plan}) == len(plan)
    for split in noises.NOISES:
        counts = Counter((utterance.noise, utterance.snr_db) for utterance in plan if utterance.split == split)
        pairs = [(noise, snr_db) for noise in noises.NOISES[split] for snr_db in demo.SNRS_DB[split]]
        assert max(counts.values()) - min(counts[pair] for pair in pairs) <= 1


def test_splits_share_no_speaker_noise_voice_or_sentence() -> None:
    seen: dict[str, set[object]] = {}
    for split in ("train", "validation", "test"):
        utterances = [utterance for utterance in plan_corpus(DemoConfig()) if utterance.split == split]
        of_split: set[object] = {utterance.speaker for utterance in utterances}
        of_split |= {demo.VOICES[utterance.speaker] for utterance in utterances}
        of_split |= {utterance.noise for utterance in utterances}
        of_split |= set(sentences.SUBJECTS[split]) | set(noises.CROWDS[split])
        for other, things in seen.items():
            assert not of_split & things, f"{split} and {other}"
        seen[split] = of_split
    people = [(voice.accent, voice.variant, voice.pitch) for voice in demo.VOICES.values()]
    people += [(voice.accent, voice.variant, voice.pitch) for crowd in noises.CROWDS.values() for voice in crowd]
    assert len(set(people)) == len(people)


def test_every_sentence_names_a_subject_of_its_split() -> None:
    rng = np.random.default_rng(0)
    for split, subjects in sentences.SUBJECTS.items():
        others = {word for other, words in sentences.SUBJECTS.items() if other != split for word in words}
        texts = [sentences.draw_text(rng, split, int(rng.integers(3, 20))) for _ in range(300)]
        for text in texts:
            words = set(text.lower().strip(".?").replace(",", "").split())
            assert words & set(subjects)
            assert not words & others
        assert len(set(texts)) > 290


# --- speech and noise --------------------------------------------------------------------------


def test_speech_depends_on_voice_and_text_alone() -> None:
    voice, text = demo.VOICES["p257"], "The penguin measured my umbrella."
    here = espeak.speak(voice, text)
    espeak.speak(demo.VOICES["p232"], "Something else was said in between.")
    assert np.array_equal(espeak.speak(voice, text), here)
    code = (
        f"import sys; from scaling.corpus.espeak import *; sys.stdout.buffer.write(speak({voice}, {text!r}).tobytes())"
    )
    there = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, check=True).stdout
    assert there == here.tobytes()
    assert here.dtype == np.float32
    assert 1.0 < len(here) / espeak.SAMPLE_RATE < 4.0
    assert 0.05 < np.abs(here).max() < 1.0


def test_no_voice_clips_inside_espeak() -> None:
    rng = np.random.default_rng(1)
    for voice in demo.VOICES.values():
        assert np.abs(espeak.speak(voice, sentences.draw_text(rng, "train", 16))).max() < 0.99, voice


def test_speech_works_from_a_path_longer_than_espeaks_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library_path, data_path = espeak.library_and_data()
    long_path = tmp_path / ("x" * 100) / ("y" * 100) / "espeak-ng-data"
    shutil.copytree(data_path, long_path)
    expected = espeak.speak(demo.VOICES["p226"], "Hello there.")
    monkeypatch.setattr(espeak, "library_and_data", lambda: (library_path, long_path))
    assert np.array_equal(espeak.speak(demo.VOICES["p226"], "Hello there."), expected)


def test_every_noise_is_of_unit_power_drawn_anew_and_a_function_of_the_draw() -> None:
    for table in noises.NOISES.values():
        for name, noise in table.items():
            first, again, other = (noise(np.random.default_rng(seed), 22050, 22050) for seed in (1, 1, 2))
            assert (first.shape, first.dtype) == ((22050,), np.float32), name
            assert np.mean(first.astype(float) ** 2) == pytest.approx(1, abs=1e-3), name
            assert np.array_equal(first, again), name
            assert abs(np.mean(first * other)) < 0.5, name


# --- mistakes ----------------------------------------------------------------------------------


def test_a_finished_corpus_is_left_alone(corpus: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    start = time.monotonic()
    make_demo_corpus(corpus, TINY, num_workers=2, progress=lambda done, total: pytest.fail("it was made again"))
    assert time.monotonic() - start < 0.5
    assert {path: path.stat().st_mtime_ns for path in corpus.rglob("*")} == before


def test_the_corpus_of_another_config_is_refused_naming_both(corpus: Path) -> None:
    with pytest.raises(UserError, match=r'holds the corpus of .*"seed": 0.*asked for is .*"seed": 7'):
        make_demo_corpus(corpus, DemoConfig(hours=0.04, test_utterances=20, seed=7), num_workers=1)


def test_a_folder_with_something_else_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "clean_testset_wav").mkdir()
    with pytest.raises(UserError, match=r"holds clean_testset_wav but no demo\.json"):
        make_demo_corpus(tmp_path, TINY, num_workers=1)
    assert os.listdir(tmp_path) == ["clean_testset_wav"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="name another folder"):
        make_demo_corpus(tmp_path / "file", TINY, num_workers=1)


def test_too_little_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(UserError, match=r"0\.04 h need \d+ MB more in .*, which has 1 MB free"):
        make_demo_corpus(tmp_path / "demo", TINY, num_workers=1)
    assert not [path for path in (tmp_path / "demo").iterdir() if not path.name.startswith(".")]


def test_a_missing_espeak_is_answered_with_the_pip_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(UserError, match="pip install espeakng-loader"):
        make_demo_corpus(tmp_path, TINY, num_workers=1)


@pytest.mark.parametrize("setting", [{"hours": 0.0}, {"hours": float("nan")}, {"test_utterances": 1}, {"seed": -1}])
def test_an_impossible_config_is_refused_by_name(setting: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(setting))):
        DemoConfig(**setting)  # type: ignore[arg-type]
