"""Audio in a pipe: WAV whose end is not known, or raw samples; what begins like another format is refused."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from bsrnn.audio import LENGTH_UNKNOWN, Report, check_header, clip, lacking


@dataclass(frozen=True)
class PipeFormat:
    """What samples in a pipe look like: interleaved, 16-bit whole numbers or 32-bit floats, little-endian."""

    samplerate: int  # named as a SoundFile's
    channels: int
    is_float: bool = False
    is_wav: bool = False

    @property
    def subtype(self) -> str:
        return "FLOAT" if self.is_float else "PCM_16"

    @property
    def dtype(self) -> str:
        return "<f4" if self.is_float else "<i2"

    @property
    def header(self) -> bytes:
        """A WAV header for a stream whose end is not known, as other tools write it too: lengths of 2^32 - 1."""
        size = 4 if self.is_float else 2
        unknown, kind, frame = struct.pack("<I", 0xFFFFFFFF), 3 if self.is_float else 1, size * self.channels
        form = struct.pack("<HHIIHH", kind, self.channels, self.samplerate, self.samplerate * frame, frame, 8 * size)
        chunks = (b"RIFF", unknown, b"WAVEfmt ", struct.pack("<I", 16), form, b"data", unknown)
        return b"".join(chunks)


# How other formats than WAV begin: (where, what, its name).
OTHER_FORMATS = (
    (0, b"fLaC", "FLAC"),
    (0, b"OggS", "Ogg"),
    (0, b"RF64", "RF64"),
    (0, b"BW64", "BW64"),
    (0, b"RIFX", "RIFX"),
    (0, b"FORM", "AIFF"),
    (0, b"ID3", "MP3"),
    (0, b"caff", "CAF"),
    (0, b".snd", "AU"),
    (4, b"ftyp", "MP4"),
)


def read_pipe_header(
    pipe: io.BufferedIOBase, default_rate: int, given: Mapping[str, int]
) -> tuple[PipeFormat, bytes, int | None]:
    """(the format, the samples' bytes that were read on the way, how many bytes of samples there are if that is told).

    given: `rate` and `channels` as the user gave them, for raw samples alone
    ValueError for a format that a pipe cannot have, for a WAV header that is none, and for a WAV with `given`.
    """
    start = pipe.read(12)
    for place, magic, name in OTHER_FORMATS:
        if start[place:].startswith(magic):
            raise ValueError(
                f"standard input: begins like {name}; expected WAV or raw samples: "
                "give the file by its name, or decode it to WAV"
            )
    if not start.startswith(b"RIFF"):
        return PipeFormat(given.get("rate", default_rate), given.get("channels", 1)), start, None
    if start[8:] != b"WAVE":
        kind = start[8:].decode("latin-1")
        raise ValueError(f"standard input: RIFF of kind {kind!r}; expected WAVE: decode it to WAV")
    if given:
        raise ValueError("standard input: a WAV says its rate and channels itself: leave out rate and channels")
    found: PipeFormat | None = None
    while True:
        name, length = struct.unpack("<4sI", _exactly(pipe, 8))
        if name == b"data":
            if found is None:
                raise ValueError("standard input: a WAV file whose samples come before their format")
            return found, b"", length if 0 < length < LENGTH_UNKNOWN else None
        body = _exactly(pipe, length + length % 2)
        if name == b"fmt ":
            found = _wav_format(body)


def _wav_format(body: bytes) -> PipeFormat:
    """Of the body of a WAV file's `fmt ` chunk."""
    is_extensible = body[:2] == b"\xfe\xff"
    needed = 26 if is_extensible else 16  # bytes, up to the last that is read here
    if len(body) < needed:
        raise ValueError(
            f"standard input: a WAV file with {len(body)} bytes of format; expected at least {needed}: export it again"
        )
    kind, channels, rate, _, _, bits = struct.unpack("<HHIIHH", body[:16])
    if is_extensible:  # the kind is in its identifier
        kind = struct.unpack("<H", body[24:26])[0]
    if (kind, bits) not in ((1, 16), (3, 32)):
        raise ValueError(f"standard input: WAV of kind {kind} with {bits} bits; expected 16-bit PCM or 32-bit float")
    check_header("standard input", rate, channels)
    return PipeFormat(rate, channels, is_float=kind == 3, is_wav=True)


def _exactly(pipe: io.BufferedIOBase, length: int) -> bytes:
    data = pipe.read(length)
    if len(data) < length:
        raise ValueError("standard input: a WAV file that ends in its header")
    return data


def pipe_blocks(
    pipe: io.BufferedIOBase, form: PipeFormat, start: bytes, num_bytes: int | None, report: Report
) -> Iterator[np.ndarray]:
    """The samples of a pipe as they come, (samples, channels) float32, `num_bytes` of them or up to its end."""
    frame = np.dtype(form.dtype).itemsize * form.channels
    waiting, data, num_read = b"", start, len(start)
    while True:
        waiting += data
        whole = len(waiting) // frame * frame
        samples = np.frombuffer(waiting[:whole], form.dtype).reshape(-1, form.channels)
        waiting = waiting[whole:]
        yield samples.astype(np.float32) if form.is_float else samples.astype(np.float32) / 32768
        most = 1 << 16 if num_bytes is None else min(1 << 16, num_bytes - num_read)
        data = pipe.read1(most)  # what there is, without waiting for more
        if not data:
            break
        num_read += len(data)
    if num_bytes is not None and num_read < num_bytes:
        report.cut_short = lacking(num_read, num_bytes)


def to_bytes(samples: np.ndarray, form: PipeFormat, report: Report) -> bytes:
    if form.is_float:
        return samples.astype("<f4").tobytes()
    return np.clip(np.rint(clip(samples, report) * 32768), -32768, 32767).astype("<i2").tobytes()
