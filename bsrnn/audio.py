"""Audio files as they come and go: opened, checked, clipped, written whole."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import soundfile

from bsrnn.modelfile import whole_file

# Whole numbers, which end at full scale; any other subtype (float, double, compressed) keeps what lies beyond.
WHOLE_NUMBERS = {"PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "PCM_32", "ALAC_16", "ALAC_24", "ULAW", "ALAW"}

LENGTH_UNKNOWN = 0x7FFF0000  # bytes, from which on a WAV header means that its writer did not know the end
MOST_WAV_BYTES = 2**32 - 2**16  # of samples
LARGEST_HEADER = 4096  # bytes of a WAV file without samples, and then some
HIGHEST_RATE, MOST_CHANNELS = 768_000, 1_024  # Hz, beyond what is recorded; and what libsndfile takes


@runtime_checkable
class SampleFormat(Protocol):
    """What a file takes over from its source, under the names that a SoundFile has."""

    @property
    def samplerate(self) -> int: ...

    @property
    def channels(self) -> int: ...

    @property
    def subtype(self) -> str: ...


@dataclass
class Report:
    """What had to be done to the samples beside enhancing them, and what is wrong with their file."""

    num_clipped: int = 0
    peak: float = 0.0
    num_invalid: int = 0
    cut_short: str = ""

    def lines(self) -> list[str]:
        said = []
        if self.num_clipped:
            said.append(f"{self.num_clipped} samples beyond full scale were clipped (peak {self.peak:.2f})")
        if self.num_invalid:
            said.append(f"{self.num_invalid} NaN or infinite samples were replaced by silence")
        if self.cut_short:
            said.append(self.cut_short)
        return said


def clip(samples: np.ndarray, report: Report) -> np.ndarray:
    """Within full scale, what lay beyond counted."""
    beyond = np.abs(samples) > 1
    if beyond.any():
        report.num_clipped += int(beyond.sum())
        report.peak = max(report.peak, float(np.abs(samples).max()))
    return np.clip(samples, -1, 1)


def open_audio(source: Path) -> soundfile.SoundFile:
    if source.suffix.lower() == ".raw":
        raise ValueError(
            f"{source}: raw samples tell neither rate nor channels: pipe them in, with - for INPUT, < {source}, and "
            "rate=HZ channels=N"
        )
    try:
        reading = soundfile.SoundFile(source)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{source}: not readable as audio ({error.error_string})") from None
    check_header(str(source), reading.samplerate, reading.channels)
    if not reading.frames and reading.format in ("WAV", "WAVEX") and source.stat().st_size > LARGEST_HEADER:
        raise ValueError(
            f"{source}: its header declares no samples, as after an interrupted recording, but "
            f"{source.stat().st_size} bytes are there: pipe it in, with - for INPUT and < {source}"
        )
    return reading


def blocks_of(reading: soundfile.SoundFile, seconds: int) -> Iterator[np.ndarray]:
    """The samples of a file, (samples, channels) in 32 bits, in blocks; of formats too in which one cannot seek."""
    while len(block := reading.read(seconds * reading.samplerate, dtype="float32", always_2d=True)):
        yield block


def check_header(name: str, sample_rate: int, num_channels: int) -> None:
    """ValueError for a rate or a number of channels that no recording has."""
    if not 1 <= sample_rate <= HIGHEST_RATE:
        raise ValueError(
            f"{name}: its header declares {sample_rate} Hz; expected 1 to {HIGHEST_RATE}: export the file again"
        )
    if not 1 <= num_channels <= MOST_CHANNELS:
        raise ValueError(
            f"{name}: its header declares {num_channels} channels; expected 1 to {MOST_CHANNELS}: export the file again"
        )


def cut_short(reading: soundfile.SoundFile) -> str:
    """What a WAV file lacks of the samples that its header declares, which libsndfile ignores; empty if nothing."""
    found = re.search(r"^data : (\d+) \(should be (\d+)\)", reading.extra_info, re.MULTILINE)
    if found is None or int(found[1]) >= LENGTH_UNKNOWN:
        return ""
    return lacking(int(found[2]), int(found[1]))


def lacking(num_held: int, num_told: int) -> str:
    """How a recording is named that holds fewer bytes of samples than its header declares."""
    return f"cut short: it holds {num_held} of the {num_told} bytes of samples that its header declares"


def write_audio(
    target: Path,
    blocks: Iterable[np.ndarray],
    like: SampleFormat,
    report: Report,
    advance: Callable[[float], None] | None = None,
) -> None:
    """Write blocks to a file of the rate, channels and, if its format has that, the sample type of `like`.

    The file has its name once it is whole. ValueError if no format has that name.
    """
    ending = target.suffix.removeprefix(".").upper()
    name = {"AIF": "AIFF", "OGA": "OGG", "OPUS": "OGG"}.get(ending, ending)
    if name not in soundfile.available_formats():
        known = ", ".join(sorted(soundfile.available_formats())).lower()
        what = (
            f"no audio format is called {target.suffix}"
            if ending
            else "not an existing folder, and without a file extension"
        )
        hint = "" if ending else f", or {os.sep} for a folder to be made"
        raise ValueError(f"{target}: {what}; expected one of {known}{hint}")
    if target.exists() and not target.is_file():
        raise ValueError(f"{target} exists and is not a regular file: give another name")
    subtype = like.subtype if soundfile.check_format(name, like.subtype) else soundfile.default_subtype(name)
    if ending == "OPUS":
        subtype = "OPUS"
    if name == "WAV" and _exceeds_wav(like, subtype):
        name = "RF64"  # WAV with lengths of 64 bits
    with whole_file(target) as temporary:
        temporary.touch()  # what the system refuses it says better than a library
        try:
            with soundfile.SoundFile(temporary, "w", like.samplerate, like.channels, subtype, format=name) as writing:
                for block in blocks:
                    writing.write(clip(block, report) if subtype in WHOLE_NUMBERS else block)
                    if advance is not None:
                        advance(len(block) / like.samplerate)
        except soundfile.LibsndfileError as error:
            raise ValueError(
                f"{target}: {like.channels} channels at {like.samplerate} Hz cannot be read to the end, or cannot be "
                f"written as {ending} ({error.error_string}): take .wav, which holds up to {MOST_CHANNELS} channels"
            ) from None


def _exceeds_wav(like: SampleFormat, subtype: str) -> bool:
    """Whether the source is of 64-bit lengths, or the samples need them; of a pipe nothing is known."""
    width = {"PCM_16": 2, "PCM_24": 3, "PCM_32": 4, "FLOAT": 4, "DOUBLE": 8}.get(subtype, 1)
    num_bytes = getattr(like, "frames", 0) * like.channels * width
    return getattr(like, "format", "") == "RF64" or num_bytes > MOST_WAV_BYTES


def audio_files(folder: Path) -> tuple[list[Path], int]:
    """(the audio files below a folder by their names' endings, how many others there are)"""
    endings = {f".{name.lower()}" for name in soundfile.available_formats()} - {".raw"} | {".aif", ".oga", ".opus"}
    files = sorted(path for path in walked(folder) if path.is_file() and not path.name.startswith("."))
    audio = [path for path in files if path.suffix.lower() in endings]
    return audio, len(files) - len(audio)


def walked(folder: Path) -> Iterator[Path]:
    """The files of a tree, through links to folders too, each folder once."""
    seen: set[tuple[int, int]] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        yield from (Path(place, name) for name in names)
