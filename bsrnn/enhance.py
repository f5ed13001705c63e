"""Enhance audio: a file, a folder, or a pipe.

    python -m bsrnn.enhance CHECKPOINT INPUT OUTPUT [threads=N]
    ... | python -m bsrnn.enhance CHECKPOINT - - [rate=HZ channels=N] | ...

CHECKPOINT is a run's directory, its model.pt, or what `python -m bsrnn.convert` wrote.
INPUT is an audio file, or a folder, whose tree of audio files OUTPUT then mirrors; other files are left out.
Of a file, OUTPUT may also be a folder, one to be made if it ends in /.
Any sample rate and number of channels: each channel is resampled to the model's rate, enhanced by itself, and
resampled back, so that the output has the input's rate, channels and length. What lies above half the
model's rate (8 kHz at 16 kHz) is lost. OUTPUT keeps the input's format and bit depth, unless its name says
another format. An input is never overwritten; any other file of OUTPUT's name is replaced, once the new one is whole.

`-` is standard input or output: WAV if it begins like a WAV file (16-bit or 32-bit float PCM), else raw 16-bit
little-endian PCM at `rate` (default: the model's) with `channels` (default 1), interleaved. What begins like another
format, FLAC for one, is refused. Standard output is of the same kind as standard input, WAV if that is a file; it
follows the input by at most one STFT window (32 ms) and, where rates differ, what two resamplers hold back (at 48 kHz
together at most 147 ms).

A model that is not causal, or whose norm is over the whole recording, hears each recording to its end before it
gives anything back, and holds it in memory.

Samples beyond full scale are clipped where the output's format holds whole numbers, and counted; samples of
the input that are no numbers (NaN, infinite) count as silence, and are counted too. A WAV file that holds less
than its header tells of is enhanced as far as it goes, and named; what follows its samples is left out.
"""

from __future__ import annotations

import io
import os
import re
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bsrnn.command import run_main, settings
from bsrnn.folding import fold
from bsrnn.model import BSRNN
from bsrnn.modelfile import load_model, whole_file
from bsrnn.streaming import Stream

BLOCK_SECONDS = 4
# Whole numbers, which end at full scale; any other subtype (float, double, compressed) keeps what lies beyond.
WHOLE_NUMBERS = {"PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "PCM_32", "ALAC_16", "ALAC_24", "ULAW", "ALAW"}

LENGTH_UNKNOWN = 0x7FFF0000  # bytes, from which on a WAV header means that its writer did not know the end
HIGHEST_RATE, MOST_CHANNELS = 768_000, 1_024  # Hz, beyond what is recorded; and what libsndfile takes


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
            said.append(f"{self.num_invalid} samples that are no numbers counted as silence")
        if self.cut_short:
            said.append(self.cut_short)
        return said


class Recording:
    """In the place of a stream for a model that does not stream: keeps what it hears until the end."""

    def __init__(self, model: BSRNN) -> None:
        self._model = fold(model)
        self._chunks: list[torch.Tensor] = []

    def process(self, chunk: torch.Tensor) -> torch.Tensor:
        self._chunks.append(chunk)
        return chunk[:, :0]

    @torch.inference_mode()
    def flush(self) -> torch.Tensor:
        signal = torch.cat(self._chunks, dim=1)  # (channel, sample), of which one at a time needs the least memory
        return torch.cat([self._model(channel.unsqueeze(0)).waveform for channel in signal])


def enhance_blocks(
    model: BSRNN, blocks: Iterable[np.ndarray], sample_rate: int, num_channels: int, report: Report
) -> Iterator[np.ndarray]:
    """Enhance audio that comes in blocks (samples, channels), float32 of full scale ±1, of one sample rate.

    Yields blocks as they are ready, together exactly as many samples as came in.
    """
    model_rate = model.config.sample_rate
    stream = Stream(model, num_channels) if model.config.streams else Recording(model)
    is_resampled = sample_rate != model_rate
    down = soxr.ResampleStream(sample_rate, model_rate, num_channels, "float32", "VHQ") if is_resampled else None
    up = soxr.ResampleStream(model_rate, sample_rate, num_channels, "float32", "VHQ") if is_resampled else None
    num_in = num_out = 0

    def finished(enhanced: torch.Tensor, is_last: bool = False) -> np.ndarray:
        nonlocal num_out
        samples = np.ascontiguousarray(enhanced.T.numpy())
        if up is not None:
            samples = up.resample_chunk(samples, last=is_last)
        samples = samples[: num_in - num_out]  # of the padding of the end
        num_out += len(samples)
        return samples

    def take(samples: np.ndarray) -> torch.Tensor:
        return stream.process(torch.from_numpy(np.ascontiguousarray(samples.T)))

    for block in blocks:
        is_invalid = ~np.isfinite(block)
        if is_invalid.any():
            report.num_invalid += int(is_invalid.sum())
            block = np.where(is_invalid, np.float32(0), block)
        num_in += len(block)
        yield finished(take(down.resample_chunk(block) if down is not None else block))
    if not num_in:
        return
    if down is not None:
        yield finished(take(down.resample_chunk(np.zeros((0, num_channels), np.float32), last=True)))
        silence = np.zeros((model.config.hop_length, num_channels), np.float32)
        yield finished(take(silence))  # what rounding the lengths of two resamplings may lack
    yield finished(stream.flush(), is_last=True)
    if num_out < num_in:
        yield np.zeros((num_in - num_out, num_channels), np.float32)


def clip(samples: np.ndarray, report: Report) -> np.ndarray:
    """Within full scale, what lay beyond counted."""
    beyond = np.abs(samples) > 1
    if beyond.any():
        report.num_clipped += int(beyond.sum())
        report.peak = max(report.peak, float(np.abs(samples).max()))
    return np.clip(samples, -1, 1)


# --- files ---------------------------------------------------------------------------------


def enhance_file(model: BSRNN, source: Path, target: Path, advance: Callable[[float], None] | None = None) -> Report:
    """Enhance a file; `advance` is called with seconds of audio done. ValueError or OSError for what cannot be."""
    if target.exists() and target.samefile(source):
        raise ValueError(f"{target} is the input: give the output another name")
    with _open_audio(source) as reading:
        report = Report(cut_short=_cut_short(reading))
        blocks = reading.blocks(BLOCK_SECONDS * reading.samplerate, dtype="float32", always_2d=True)
        enhanced = enhance_blocks(model, blocks, reading.samplerate, reading.channels, report)
        write_whole(target, enhanced, reading, report, advance)
    return report


def _open_audio(source: Path) -> soundfile.SoundFile:
    if source.suffix.lower() == ".raw":
        raise ValueError(
            f"{source}: raw samples tell neither rate nor channels: pipe them in, with - for INPUT, < {source}, and "
            "rate=HZ channels=N"
        )
    try:
        reading = soundfile.SoundFile(source)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{source}: not readable as audio ({error.error_string})") from None
    _check_header(str(source), reading.samplerate, reading.channels)
    return reading


def _check_header(name: str, sample_rate: int, num_channels: int) -> None:
    """ValueError for a rate or a number of channels that no recording has."""
    if not 1 <= sample_rate <= HIGHEST_RATE:
        raise ValueError(f"{name}: its header tells of {sample_rate} Hz; expected 1 to {HIGHEST_RATE}: write it anew")
    if not 1 <= num_channels <= MOST_CHANNELS:
        raise ValueError(
            f"{name}: its header tells of {num_channels} channels; expected 1 to {MOST_CHANNELS}: write it anew"
        )


def _cut_short(reading: soundfile.SoundFile) -> str:
    """What a WAV file lacks of the samples that its header tells of, which libsndfile reads over; empty if nothing."""
    found = re.search(r"^data : (\d+) \(should be (\d+)\)", reading.extra_info, re.MULTILINE)
    if found is None or int(found[1]) >= LENGTH_UNKNOWN:
        return ""
    return _lacking(int(found[2]), int(found[1]))


def _lacking(num_held: int, num_told: int) -> str:
    return f"cut short: it holds {num_held} of the {num_told} bytes of samples that its header tells of"


def write_whole(
    target: Path,
    blocks: Iterable[np.ndarray],
    like: soundfile.SoundFile | PipeFormat,
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
        what = f"no audio format is called {target.suffix}" if ending else "no such folder, and no ending of a file"
        hint = "" if ending else f", or {os.sep} for a folder to be made"
        raise ValueError(f"{target}: {what}; expected one of {known}{hint}")
    if target.exists() and not target.is_file():
        raise ValueError(f"{target} is no file that could be replaced: give another name")
    subtype = like.subtype if soundfile.check_format(name, like.subtype) else soundfile.default_subtype(name)
    if ending == "OPUS":
        subtype = "OPUS"
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


def audio_files(folder: Path) -> tuple[list[Path], int]:
    """(the audio files below a folder by their names' endings, how many others there are)"""
    endings = {f".{name.lower()}" for name in soundfile.available_formats()} - {".raw"} | {".aif", ".oga", ".opus"}
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    audio = [path for path in files if path.suffix.lower() in endings]
    return audio, len(files) - len(audio)


def enhance_folder(model: BSRNN, source: Path, target: Path) -> int:
    """Enhance a tree of files; the exit status: 1 if there were files that could not be enhanced, which are named."""
    if target.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{target} lies in the input {source}: give the output a folder of its own")
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file, {source} a folder: give a folder for the output")
    files, num_others = audio_files(source)
    if not files:
        raise ValueError(f"{source}: holds no audio files")
    failures = 0
    with _progress() as progress:
        task = progress.add_task(source.name, total=len(files))
        for path in files:
            relative = path.relative_to(source)
            try:
                _tell(enhance_file(model, path, target / relative), str(relative))
            except (ValueError, OSError) as error:
                failures += 1
                print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            progress.advance(task)
    others = f", {num_others} other files left out" if num_others else ""
    print(f"{len(files) - failures} of {len(files)} files enhanced to {target}{others}", file=sys.stderr)
    return 1 if failures else 0


def _enhance_single(model: BSRNN, source: Path, target: str) -> int:
    path = Path(target, source.name) if _names_folder(target) else Path(target)
    with _open_audio(source) as reading:
        seconds = reading.frames / reading.samplerate
    with _progress() as progress:
        task = progress.add_task(source.name, total=round(seconds, 1))
        report = enhance_file(model, source, path, lambda done: progress.advance(task, done))
    _tell(report, source.name)
    return 0


def _names_folder(target: str) -> bool:
    """Whether it is a folder, or one to be made, which ends like one."""
    return target.endswith(os.sep) or Path(target).is_dir()


def _progress() -> Progress:
    """On standard error, and only where somebody looks at it."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)


def _tell(report: Report, name: str) -> None:
    for line in report.lines():
        print(f"{name}: {line}", file=sys.stderr)


# --- pipes ---------------------------------------------------------------------------------


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
            f"standard input: a WAV file whose format has {len(body)} bytes; expected at least {needed}: write it anew"
        )
    kind, channels, rate, _, _, bits = struct.unpack("<HHIIHH", body[:16])
    if is_extensible:  # the kind is in its identifier
        kind = struct.unpack("<H", body[24:26])[0]
    if (kind, bits) not in ((1, 16), (3, 32)):
        raise ValueError(f"standard input: WAV of kind {kind} with {bits} bits; expected 16-bit PCM or 32-bit float")
    _check_header("standard input", rate, channels)
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
        report.cut_short = _lacking(num_read, num_bytes)


def to_bytes(samples: np.ndarray, form: PipeFormat, report: Report) -> bytes:
    if form.is_float:
        return samples.astype("<f4").tobytes()
    return np.clip(np.rint(clip(samples, report) * 32768), -32768, 32767).astype("<i2").tobytes()


def _enhance_from_pipe(model: BSRNN, target: str, given: Mapping[str, int]) -> int:
    if target != "-" and _names_folder(target):
        raise ValueError(f"{target} is a folder: give a file for what comes from a pipe")
    pipe = open(sys.stdin.fileno(), "rb", closefd=False)  # noqa: SIM115
    form, start, num_bytes = read_pipe_header(pipe, model.config.sample_rate, given)
    report = Report()
    blocks = pipe_blocks(pipe, form, start, num_bytes, report)
    enhanced = enhance_blocks(model, blocks, form.samplerate, form.channels, report)
    if target == "-":
        _write_pipe(enhanced, form, report)
    else:
        path = Path(target)
        if path.exists() and os.path.samestat(path.stat(), os.fstat(sys.stdin.fileno())):
            raise ValueError(f"{path} is the input: give the output another name")
        write_whole(path, enhanced, form, report)
    _tell(report, "standard input")
    return 0


def _enhance_to_pipe(model: BSRNN, source: Path) -> int:
    with _open_audio(source) as reading:
        report = Report(cut_short=_cut_short(reading))
        form = PipeFormat(reading.samplerate, reading.channels, reading.subtype in ("FLOAT", "DOUBLE"), is_wav=True)
        blocks = reading.blocks(BLOCK_SECONDS * reading.samplerate, dtype="float32", always_2d=True)
        _write_pipe(enhance_blocks(model, blocks, form.samplerate, form.channels, report), form, report)
    _tell(report, source.name)
    return 0


def _write_pipe(blocks: Iterable[np.ndarray], form: PipeFormat, report: Report) -> None:
    if form.is_wav:
        sys.stdout.buffer.write(form.header)
    for block in blocks:
        sys.stdout.buffer.write(to_bytes(block, form, report))
        sys.stdout.buffer.flush()


# --- command -------------------------------------------------------------------------------


def main(words: list[str]) -> int:
    known = {"threads": int, "rate": int, "channels": int}
    (checkpoint, source, target), given = settings(words, ["CHECKPOINT", "INPUT", "OUTPUT"], known)
    most = {"rate": HIGHEST_RATE, "channels": MOST_CHANNELS}
    for name, value in given.items():
        if not 1 <= value <= most.get(name, value):
            expected = f"from 1 to {most[name]}" if name in most else "at least 1"
            raise ValueError(f"{name} = {value}: expected {expected}")
    of_samples: dict[str, int] = {name: value for name, value in given.items() if name in most}
    if source != "-" and of_samples:
        raise ValueError("rate and channels describe raw samples from a pipe: leave them out for files")
    if "threads" in given:
        torch.set_num_threads(given["threads"])
    if source != "-" and not Path(source).exists():
        raise FileNotFoundError(f"{source}: no such file or folder")
    model = load_model(Path(checkpoint))
    if source == "-":
        return _enhance_from_pipe(model, target, of_samples)
    if Path(source).is_dir():
        if target == "-":
            raise ValueError(f"{source} is a folder: give a folder for the output")
        return enhance_folder(model, Path(source), Path(target))
    return _enhance_to_pipe(model, Path(source)) if target == "-" else _enhance_single(model, Path(source), target)


if __name__ == "__main__":
    run_main(main, __doc__ or "")
