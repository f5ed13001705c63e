"""A wav file of a corpus, be it a file in a folder or a member of a zip.

A `WavSource` says where the file is and opens itself there; it pickles, so that another
process can do the reading. The header is read without the samples: a corpus of 25,000
files is checked before any of them is decoded. A file that is cut off is found here, since
its header promises more than it holds (libsndfile would return the part in silence).
"""

from __future__ import annotations

import functools
import io
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import numpy as np
import soundfile
from numpy.typing import NDArray

from scaling.errors import UserError

WAVE_FORMATS = {1: "PCM", 3: "float", 0xFFFE: "extensible"}
UNREADABLE = (OSError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True, slots=True)
class WavHeader:
    """What a wav file says of itself; a frame is one sample of every channel."""

    sample_rate: int
    num_channels: int
    num_frames: int


@dataclass(frozen=True, slots=True)
class WavSource:
    """A wav file at `path`, or the member `member` of the zip at `path`."""

    path: Path
    member: str | None
    num_bytes: int

    @property
    def name(self) -> str:
        """Where the file is, for messages."""
        return str(self.path) if self.member is None else f"{self.path}:{self.member}"

    def open(self) -> IO[bytes]:
        """The file's bytes, as a stream."""
        if self.member is None:
            return self.path.open("rb")
        return open_zip(self.path).open(self.member)

    def read_header(self) -> WavHeader:
        """The header; UserError for a file that is empty, cut off or no wav."""
        if self.num_bytes == 0:
            raise UserError(f"{self.name} is empty (0 bytes): copy it again from the source")
        try:
            with self.open() as file:
                return self._parse_header(file)
        except UNREADABLE as error:
            raise self._unreadable(str(error)) from None

    def read_samples(self) -> NDArray[np.float64]:
        """All samples of a mono file, [num_frames] in [-1, 1); UserError where they cannot be decoded."""
        try:
            with self.open() as file:
                content = file.read()
            samples, _ = soundfile.read(io.BytesIO(content), dtype="float64")
        except UNREADABLE as error:  # soundfile.LibsndfileError is a RuntimeError
            raise self._unreadable(str(error)) from None
        return cast(NDArray[np.float64], samples)

    def _parse_header(self, file: IO[bytes]) -> WavHeader:
        """Walk the RIFF chunks up to the samples."""
        riff, _, wave = struct.unpack("<4sI4s", _read(file, 12))
        if (riff, wave) != (b"RIFF", b"WAVE"):
            raise self._unreadable("it does not start as a RIFF wav does")
        sample_format: tuple[int, int, int] | None = None
        while True:
            chunk, size = struct.unpack("<4sI", _read(file, 8))
            if chunk == b"data":
                break
            if chunk == b"fmt ":
                tag, num_channels, sample_rate, _, frame_bytes = struct.unpack("<HHIIH", _read(file, 14))
                if tag not in WAVE_FORMATS or not num_channels or not sample_rate or not frame_bytes:
                    raise self._unreadable(f"its samples are of format {tag}, expected PCM or float")
                sample_format = (sample_rate, num_channels, frame_bytes)
                size -= 14
            file.seek(size + size % 2, io.SEEK_CUR)  # chunks start at even places
        if sample_format is None:
            raise self._unreadable("its samples come before their format")
        held = self.num_bytes - file.tell()
        if size > held:
            raise self._unreadable(f"it is cut off: its header promises {size} bytes of samples, it holds {held}")
        sample_rate, num_channels, frame_bytes = sample_format
        if size < frame_bytes:
            raise UserError(f"{self.name} holds no samples: copy it again from the source, or remove it with its twin")
        return WavHeader(sample_rate, num_channels, size // frame_bytes)

    def _unreadable(self, reason: str) -> UserError:
        reason = reason.splitlines()[0] if reason else "reading failed"
        return UserError(f"{self.name} is not a readable wav file ({reason}): copy it again from the source")


@functools.lru_cache(maxsize=8)
def open_zip(path: Path) -> zipfile.ZipFile:
    """The archive at a path, opened once a process; UserError for one that is damaged."""
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{path} is not a complete zip file ({error}): download it again") from None


def close_zips() -> None:
    """Forget the archives opened so far, so that a changed one is read anew."""
    open_zip.cache_clear()


def _read(file: IO[bytes], num_bytes: int) -> bytes:
    content = file.read(num_bytes)
    if len(content) < num_bytes:
        raise EOFError("it ends within its header")
    return content
