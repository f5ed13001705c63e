"""A small corpus in VoiceBank+DEMAND's place: spoken by espeak-ng, noises synthesised, VBD's own layout.

    ROOT/clean_trainset_28spk_wav/p226_001.wav     48 kHz, 16-bit, mono
    ROOT/noisy_trainset_28spk_wav/p226_001.wav     its noisy twin
    ROOT/clean_testset_wav/, noisy_testset_wav/    the same for speakers p232 and p257
    ROOT/log_trainset_28spk.txt, log_testset.txt   lines "p226_001 metro 5": utterance, noise, SNR in dB
    ROOT/demo.json                                 written last: the corpus is whole, and of this config

An utterance passes these steps, all of them functions of (config.seed, its name):

 1. `plan_corpus` gives it a speaker, a length (2 to 6 s), a noise and an SNR;
 2. its speaker says a sentence of about that length (`espeak`, `sentences`), at a level of its own,
    with a pause before and after, in a room of its own, with the faint noise of a recording;
 3. a noise of its kind is made (`noises`) and added at the SNR: the ratio of the mean power of the
    clean file to that of the noise, over the whole utterance;
 4. clean and noisy are resampled from 22.05 to 48 kHz and written as 16 bits. If one would clip,
    both are made softer.

Train (26 speakers), validation (p226 and p287, which the field holds out of the train set) and test share
no speaker, no noise, no background voice and no sentence. Both sexes speak in each.
What it is not: real. No study's claim can rest on it.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

from scaling.corpus import espeak
from scaling.corpus.espeak import Voice
from scaling.corpus.noises import NOISES
from scaling.corpus.sentences import draw_text
from scaling.corpus.sounds import coloured, in_room
from scaling.corpus.vbd import VALIDATION_SPEAKERS
from scaling.errors import UserError
from scaling.locks import held_when_free
from scaling.pool import spawned_pool
from scaling.records import write_whole

VERSION = 1
"""Of the corpus a config stands for: raised whenever the same config would give other files."""

SAMPLE_RATE = 48000  # Hz
MARKER = "demo.json"
UNFINISHED = ".demo_unfinished.json"  # the marker's content, until the corpus is whole
LOCK = ".demo.lock"

MEAN_SECONDS, SHORTEST_SECONDS, LONGEST_SECONDS = 4.0, 2.0, 6.0
TICK_SECONDS = 0.02  # lengths are multiples of it: 441 samples at 22.05 kHz, 960 at 48 kHz
SNRS_DB = {"train": (0.0, 5.0, 10.0, 15.0), "validation": (0.0, 5.0, 10.0, 15.0), "test": (2.5, 7.5, 12.5, 17.5)}
# What makes espeak's dry voice a recording. Without them PESQ of the unprocessed test set is 1.4, far below real data.
PRESENCE_DB = 4.0  # what a close microphone hears above 4 kHz
ROOM_SECONDS, DIRECT_DB = (0.25, 0.5), 9.0  # how long a speaker's room rings, and by how much the voice is above it
RECORDING_NOISE_DB = -43.0  # relative to the speech
RECORDING_NOISE_SPECTRUM = ((50.0, 0.0), (200.0, 0.0), (2000.0, -12.0), (10000.0, -24.0))  # (Hz, dB)
VALIDATION_SHARE = 1.5  # of a validation speaker, where a train speaker has 1
MIN_HOURS, MAX_HOURS = 0.04, 1000.0

# Speakers by VBD's names, in voices of ours. p287, a man in VBD, is a woman here: one of each sex a split.
TEST_SPEAKERS = ("p232", "p257")
WOMEN = {
    "p228": Voice("en-gb-x-rp", "f1", 45, 160),
    "p230": Voice("en-us", "f3", 50, 170),
    "p231": Voice("en-gb-scotland", "f4", 45, 165),
    "p233": Voice("en-us", "Annie", 60, 160),
    "p236": Voice("en-gb-x-gbcwmd", "aunty", 55, 155),
    "p239": Voice("en-us", "belinda", 50, 175),
    "p244": Voice("en-gb-x-rp", "linda", 45, 165),
    "p250": Voice("en-us-nyc", "grandma", 50, 155),
    "p257": Voice("en-gb-x-rp", "f2", 45, 165),
    "p267": Voice("en-029", "shelby", 55, 165),
    "p268": Voice("en-us", "Andrea", 48, 155),
    "p269": Voice("en-us-nyc", "f1", 68, 178),
    "p276": Voice("en-gb-x-gbclan", "f3", 70, 160),
    "p277": Voice("en-us", "f4", 62, 175),
    "p282": Voice("en-029", "linda", 64, 172),
    "p287": Voice("en-us", "f5", 50, 168),
}
MEN = {
    "p226": Voice("en-gb-x-rp", "m2", 48, 165),
    "p227": Voice("en-us", "m1", 56, 160),
    "p232": Voice("en-us", "m6", 52, 168),
    "p243": Voice("en-gb-x-rp", "m5", 42, 155),
    "p254": Voice("en-us", "m7", 58, 172),
    "p256": Voice("en-029", "m4", 50, 165),
    "p258": Voice("en-us-nyc", "m8", 55, 160),
    "p259": Voice("en-gb-x-gbclan", "Alex", 50, 170),
    "p270": Voice("en-us", "m3", 55, 163),
    "p273": Voice("en-gb-x-gbcwmd", "Michael", 52, 158),
    "p274": Voice("en-us", "Nguyen", 38, 175),
    "p278": Voice("en-gb-x-rp", "marcelo", 60, 165),
    "p279": Voice("en-us", "grandpa", 45, 150),
    "p286": Voice("en-gb-scotland", "quincy", 58, 168),
}
VOICES = dict(sorted({**WOMEN, **MEN}.items()))


@dataclass
class DemoConfig:
    """Which demo corpus: its size and its seed. UserError for values that give none."""

    hours: float = 0.4  # of audio in the 28-speaker train set, validation speakers included
    test_utterances: int = 40
    seed: int = 0

    def __post_init__(self) -> None:
        if not MIN_HOURS <= self.hours <= MAX_HOURS:  # refuses NaN too
            raise UserError(
                f"demo corpus: hours={self.hours}, expected {MIN_HOURS:g} (each of the 28 speakers "
                f"has something to say) to {MAX_HOURS:g}"
            )
        if self.test_utterances < 2:
            raise UserError(
                f"demo corpus: test_utterances={self.test_utterances}, expected 2 or more (one a test speaker)"
            )
        if self.seed < 0:
            raise UserError(f"demo corpus: seed={self.seed}, expected 0 or more")


@dataclass(frozen=True)
class PlannedUtterance:
    """What an utterance of the corpus will be."""

    split: str  # "train", "validation" or "test"
    speaker: str
    number: int  # from 1, among the speaker's
    seconds: float
    noise: str
    snr_db: float

    @property
    def name(self) -> str:
        return f"{self.speaker}_{self.number:03d}"

    @property
    def num_bytes(self) -> int:
        """The size of its clean wav file, and of its noisy one."""
        return 44 + 2 * round(self.seconds * SAMPLE_RATE)

    def clean(self, root: Path) -> Path:
        return root / f"clean_{self._set}_wav" / f"{self.name}.wav"

    def noisy(self, root: Path) -> Path:
        return root / f"noisy_{self._set}_wav" / f"{self.name}.wav"

    def log(self, root: Path) -> Path:
        return root / f"log_{self._set}.txt"

    @property
    def _set(self) -> str:
        return "testset" if self.split == "test" else "trainset_28spk"


# --- the plan --------------------------------------------------------------------------------


def plan_corpus(config: DemoConfig) -> list[PlannedUtterance]:
    """Every utterance of the corpus, by split and name; a function of the config alone.

    A speaker's lengths are spread evenly over 2 to 6 s, so the hours come out as asked to within
    an utterance; every noise meets every SNR equally often, to within one.
    """
    train_speakers = [speaker for speaker in VOICES if speaker not in VALIDATION_SPEAKERS + TEST_SPEAKERS]
    shares = dict.fromkeys(train_speakers, 1.0) | dict.fromkeys(VALIDATION_SPEAKERS, VALIDATION_SHARE)
    counts = _apportion(round(config.hours * 3600 / MEAN_SECONDS), shares)
    counts |= _apportion(config.test_utterances, dict.fromkeys(TEST_SPEAKERS, 1.0))
    speakers = {"train": tuple(train_speakers), "validation": VALIDATION_SPEAKERS, "test": TEST_SPEAKERS}
    plan = []
    for index, (split, its_speakers) in enumerate(speakers.items()):
        rng = np.random.default_rng([config.seed, index])
        conditions = _balanced_conditions(rng, split)
        for speaker in its_speakers:
            count = counts[speaker]
            spread = (rng.permutation(count) + 0.5) / count
            for number, fraction in enumerate(spread, start=1):
                seconds = SHORTEST_SECONDS + (LONGEST_SECONDS - SHORTEST_SECONDS) * fraction
                seconds = round(round(seconds / TICK_SECONDS) * TICK_SECONDS, 2)
                noise, snr_db = next(conditions)
                plan.append(PlannedUtterance(split, speaker, number, seconds, noise, snr_db))
    return plan


def _apportion(total: int, shares: dict[str, float]) -> dict[str, int]:
    """Whole numbers that sum to the total and are nearest to the shares (largest remainders)."""
    quota = {key: total * share / sum(shares.values()) for key, share in shares.items()}
    counts = {key: int(value) for key, value in quota.items()}
    by_remainder = sorted(quota, key=lambda key: counts[key] - quota[key])
    for key in by_remainder[: total - sum(counts.values())]:
        counts[key] += 1
    return counts


def _balanced_conditions(rng: np.random.Generator, split: str) -> Iterator[tuple[str, float]]:
    """(noise, SNR) without end: all pairs in random order, then all again in another."""
    pairs = [(noise, snr_db) for noise in NOISES[split] for snr_db in SNRS_DB[split]]
    while True:
        for index in rng.permutation(len(pairs)):
            yield pairs[index]


# --- an utterance ----------------------------------------------------------------------------


def make_utterance(utterance: PlannedUtterance, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(clean, noisy), each int16 (num_samples,) at 48 kHz; a function of its arguments alone."""
    rng = np.random.default_rng([seed, int(utterance.speaker[1:]), utterance.number])
    num_samples = round(utterance.seconds * espeak.SAMPLE_RATE)
    clean = _recorded(rng, _speech_within(rng, utterance, num_samples), num_samples, utterance.speaker, seed)
    noise = NOISES[utterance.split][utterance.noise](rng, num_samples, espeak.SAMPLE_RATE)

    both = np.stack([clean, noise], axis=1)  # (num_samples, 2)
    both = soxr.resample(both, espeak.SAMPLE_RATE, SAMPLE_RATE)[: round(utterance.seconds * SAMPLE_RATE)]
    clean, noise = (both / np.sqrt(np.mean(both**2, axis=0))).T
    level_db = rng.uniform(-32, -24)  # dB of full scale, mean power of the clean file
    clean *= 10 ** (level_db / 20)
    noisy = clean + noise * 10 ** ((level_db - utterance.snr_db) / 20)
    scale = min(1.0, 0.99 / max(np.abs(clean).max(), np.abs(noisy).max()))
    return np.round(scale * clean * 32767).astype(np.int16), np.round(scale * noisy * 32767).astype(np.int16)


def _speech_within(rng: np.random.Generator, utterance: PlannedUtterance, num_samples: int) -> np.ndarray:
    """A sentence in the speaker's voice that leaves 0.25 to 1 s of the samples for pauses at both ends."""
    shortest, longest = num_samples - espeak.SAMPLE_RATE, num_samples - espeak.SAMPLE_RATE // 4
    voice = VOICES[utterance.speaker]
    num_words = 3.2 * (utterance.seconds - 0.5)
    for _ in range(100):
        rate = voice.words_per_minute + int(rng.integers(-12, 13))
        text = draw_text(rng, utterance.split, max(3, round(num_words)))
        speech = espeak.speak(dataclasses.replace(voice, words_per_minute=rate), text)
        loud = np.flatnonzero(np.abs(speech) > 1e-3)
        speech = speech[loud[0] : loud[-1] + 1]
        if shortest <= len(speech) <= longest:
            return speech
        num_words += -0.5 if len(speech) > longest else 0.5
    raise RuntimeError(f"no sentence of {utterance.seconds} s found for {voice}, {utterance.name}")


def _recorded(rng: np.random.Generator, speech: np.ndarray, num_samples: int, speaker: str, seed: int) -> np.ndarray:
    """The speech between two pauses, in the speaker's room, through a close microphone: (num_samples,), unit power."""
    clean = np.zeros(num_samples)
    first = int((num_samples - len(speech)) * rng.uniform(0.3, 0.7))
    clean[first : first + len(speech)] = speech
    frequencies = np.fft.rfftfreq(num_samples, 1 / espeak.SAMPLE_RATE)
    gain_db = np.interp(np.log(np.maximum(frequencies, 1.0)), np.log([1500, 4000]), [0.0, PRESENCE_DB])
    clean = np.fft.irfft(np.fft.rfft(clean) * 10 ** (gain_db / 20), num_samples)
    room = np.random.default_rng([seed, int(speaker[1:])])
    clean = in_room(room, clean, espeak.SAMPLE_RATE, room.uniform(*ROOM_SECONDS), DIRECT_DB)
    floor = coloured(rng, num_samples, espeak.SAMPLE_RATE, RECORDING_NOISE_SPECTRUM)
    return clean + 10 ** (RECORDING_NOISE_DB / 20) * floor


def _write_utterance(root: Path, utterance: PlannedUtterance, seed: int) -> None:
    clean, noisy = make_utterance(utterance, seed)
    for path, sound in ((utterance.clean(root), clean), (utterance.noisy(root), noisy)):
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        soundfile.write(temporary, sound, SAMPLE_RATE, subtype="PCM_16", format="WAV")
        os.replace(temporary, path)


def _is_written(root: Path, utterance: PlannedUtterance) -> bool:
    paths = (utterance.clean(root), utterance.noisy(root))
    return all(path.exists() and path.stat().st_size == utterance.num_bytes for path in paths)


# --- the corpus ------------------------------------------------------------------------------


def make_demo_corpus(
    root: Path, config: DemoConfig, num_workers: int, progress: Callable[[int, int], None] | None = None
) -> None:
    """Make the corpus in `root`, or return at once if it is there already.

    The files are the same, byte for byte, whatever the number of workers. A generation that was
    killed goes on with the utterances it had not written. Two calls on one root take turns.
    `progress(done, total)`, in utterances, is called from this process as they are written.

    UserError: root holds something else (a corpus of another config or version, real VBD data, a file),
    there is too little disk, it cannot be written, or espeak-ng is not installed.
    """
    description = {"version": VERSION, "config": dataclasses.asdict(config)}
    try:
        if not _is_finished(root, description):
            espeak.library_and_data()
            root.mkdir(parents=True, exist_ok=True)
            with held_when_free(root / LOCK):
                if not _is_finished(root, description):  # another process may have finished it meanwhile
                    _generate(root, config, description, num_workers, progress)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(f"demo corpus: the disk of {root} is full: free some and run it again") from None
        if error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise UserError(f"demo corpus: {root} cannot be written ({error.strerror}): name another folder") from None
        raise


def _is_finished(root: Path, description: dict[str, object]) -> bool:
    """Whether root holds this corpus, whole; UserError if it holds anything else."""
    for marker in (root / MARKER, root / UNFINISHED):
        if not marker.exists():
            continue
        try:
            found = json.loads(marker.read_text(encoding="utf-8"))
        except json.JSONDecodeError:
            raise UserError(f"demo corpus: {marker} is not JSON: delete {root} and run it again") from None
        if found != description:
            raise UserError(
                f"demo corpus: {root} holds the corpus of {json.dumps(found)}, "
                f"asked for is {json.dumps(description)}: name another folder or delete this one"
            )
        return marker.name == MARKER
    if root.is_dir():
        others = sorted(path.name for path in root.iterdir() if path.name != LOCK and not path.name.endswith(".tmp"))
        if others:
            raise UserError(
                f"demo corpus: {root} holds {others[0]} but no {MARKER}, so it is something else: name an empty folder"
            )
    return False


def _generate(
    root: Path,
    config: DemoConfig,
    description: dict[str, object],
    num_workers: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    plan = plan_corpus(config)
    missing = [utterance for utterance in plan if not _is_written(root, utterance)]
    need = sum(2 * utterance.num_bytes for utterance in missing)
    free = shutil.disk_usage(root).free
    if need * 1.05 > free:  # file systems take a little more than the files' bytes
        raise UserError(
            f"demo corpus: {config.hours:g} h need {need / 1e6:.0f} MB more in {root}, "
            f"which has {free / 1e6:.0f} MB free: free some, or lower the hours"
        )
    write_whole(root / UNFINISHED, json.dumps(description) + "\n")
    for folder in {path.parent for utterance in plan for path in (utterance.clean(root), utterance.noisy(root))}:
        folder.mkdir(exist_ok=True)
        for torn in folder.glob(".*.tmp"):
            torn.unlink()
    done = len(plan) - len(missing)
    if progress:
        progress(done, len(plan))
    for _ in _written(root, missing, config.seed, num_workers):
        done += 1
        if progress:
            progress(done, len(plan))
    logs: dict[Path, list[str]] = {}
    for utterance in sorted(plan, key=lambda utterance: utterance.name):
        line = f"{utterance.name} {utterance.noise} {utterance.snr_db:g}\n"
        logs.setdefault(utterance.log(root), []).append(line)
    for path, lines in logs.items():
        write_whole(path, "".join(lines))
    os.replace(root / UNFINISHED, root / MARKER)


def _written(root: Path, utterances: list[PlannedUtterance], seed: int, num_workers: int) -> Iterator[None]:
    """Write the utterances, yielding once after each."""
    if num_workers <= 1:
        for utterance in utterances:
            _write_utterance(root, utterance, seed)
            yield
        return
    with spawned_pool(num_workers) as pool:
        futures = [pool.submit(_write_utterance, root, utterance, seed) for utterance in utterances]
        try:
            for future in as_completed(futures):
                future.result()
                yield
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
