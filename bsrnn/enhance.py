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
the input that are NaN or infinite count as silence, and are counted too. A WAV file that holds less
than its header declares is enhanced as far as it goes, and named; what follows its samples is left out.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
import soxr
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bsrnn.audio import (
    HIGHEST_RATE,
    MOST_CHANNELS,
    Report,
    audio_files,
    blocks_of,
    cut_short,
    open_audio,
    write_audio,
)
from bsrnn.command import run_main, settings
from bsrnn.folding import fold
from bsrnn.model import BSRNN
from bsrnn.modelfile import load_model
from bsrnn.pipes import PipeFormat, pipe_blocks, read_pipe_header, to_bytes
from bsrnn.streaming import Stream

BLOCK_SECONDS = 4
KEPT_STREAMS = 2  # of different numbers of channels: each holds the model's weights twice


class Recording:
    """In the place of a stream for a model that does not stream: keeps what it hears until the end."""

    def __init__(self, model: BSRNN) -> None:
        self._model = fold(model)
        self.reset()

    def reset(self) -> None:
        self._chunks: list[torch.Tensor] = []

    def process(self, chunk: torch.Tensor) -> torch.Tensor:
        self._chunks.append(chunk)
        return chunk[:, :0]

    @torch.inference_mode()
    def flush(self) -> torch.Tensor:
        signal = torch.cat(self._chunks, dim=1)  # (channel, sample), of which one at a time needs the least memory
        self.reset()
        return torch.cat([self._model(channel.unsqueeze(0)).waveform for channel in signal])


class Enhancer:
    """A model, folded and packed, for one signal after another."""

    def __init__(self, model: BSRNN) -> None:
        self.config = model.config
        self._stream: Callable[[int], Stream | Recording]
        if self.config.streams:
            self._stream = lru_cache(KEPT_STREAMS)(lambda num_channels: Stream(model, num_channels))
        else:
            recording = Recording(model)
            self._stream = lambda _: recording

    def stream(self, num_channels: int) -> Stream | Recording:
        """For a new signal, the one before being over; whatever that left is forgotten."""
        stream = self._stream(num_channels)
        stream.reset()
        return stream


def enhance_blocks(
    enhancer: Enhancer, blocks: Iterable[np.ndarray], sample_rate: int, num_channels: int, report: Report
) -> Iterator[np.ndarray]:
    """Enhance audio that comes in blocks (samples, channels), float32 of full scale ±1, of one sample rate.

    Yields blocks as they are ready, together exactly as many samples as came in.
    """
    model_rate = enhancer.config.sample_rate
    stream = enhancer.stream(num_channels)
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
        silence = np.zeros((enhancer.config.hop_length, num_channels), np.float32)
        yield finished(take(silence))  # what rounding the lengths of two resamplings may lack
    yield finished(stream.flush(), is_last=True)
    if num_out < num_in:
        yield np.zeros((num_in - num_out, num_channels), np.float32)


# --- files ---------------------------------------------------------------------------------


def enhance_file(
    enhancer: Enhancer, source: Path, target: Path, advance: Callable[[float], None] | None = None
) -> Report:
    """Enhance a file; `advance` is called with seconds of audio done. ValueError or OSError for what cannot be."""
    if target.exists() and target.samefile(source):
        raise ValueError(f"{target} is the input: give the output another name")
    with open_audio(source) as reading:
        report = Report(cut_short=cut_short(reading))
        blocks = blocks_of(reading, BLOCK_SECONDS)
        enhanced = enhance_blocks(enhancer, blocks, reading.samplerate, reading.channels, report)
        write_audio(target, enhanced, reading, report, advance)
    return report


def enhance_folder(enhancer: Enhancer, source: Path, target: Path) -> int:
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
                if (target / relative).resolve().is_relative_to(source.resolve()):
                    raise ValueError(f"{target / relative} would lie in the input {source}: give another output folder")
                _tell(enhance_file(enhancer, path, target / relative), str(relative))
            except (ValueError, OSError) as error:
                failures += 1
                print(f"error: {relative}: {' '.join(str(error).split())}", file=sys.stderr)
            progress.advance(task)
    others = f", {num_others} other files left out" if num_others else ""
    print(f"{len(files) - failures} of {len(files)} files enhanced to {target}{others}", file=sys.stderr)
    return 1 if failures else 0


def _enhance_single(enhancer: Enhancer, source: Path, target: str) -> int:
    path = Path(target, source.name) if _names_folder(target) else Path(target)
    with open_audio(source) as reading:
        seconds = reading.frames / reading.samplerate
    with _progress() as progress:
        task = progress.add_task(source.name, total=round(seconds, 1))
        report = enhance_file(enhancer, source, path, lambda done: progress.advance(task, done))
    _tell(report, source.name)
    return 0


def _names_folder(target: str) -> bool:
    """Whether it is a folder, or one to be made, which ends like one."""
    return target.endswith(os.sep) or Path(target).is_dir()


def _progress() -> Progress:
    """On standard error, and only where somebody looks at it."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)


def _tell(report: Report, name: str) -> None:
    for line in report.lines():
        print(f"{name}: {line}", file=sys.stderr)


# --- pipes ---------------------------------------------------------------------------------


def _enhance_from_pipe(enhancer: Enhancer, target: str, given: Mapping[str, int]) -> int:
    if target != "-" and _names_folder(target):
        raise ValueError(f"{target} is a folder: give a file for what comes from a pipe")
    pipe = open(sys.stdin.fileno(), "rb", closefd=False)  # noqa: SIM115
    form, start, num_bytes = read_pipe_header(pipe, enhancer.config.sample_rate, given)
    report = Report()
    blocks = pipe_blocks(pipe, form, start, num_bytes, report)
    enhanced = enhance_blocks(enhancer, blocks, form.samplerate, form.channels, report)
    if target == "-":
        _write_pipe(enhanced, form, report)
    else:
        path = Path(target)
        if path.exists() and os.path.samestat(path.stat(), os.fstat(sys.stdin.fileno())):
            raise ValueError(f"{path} is the input: give the output another name")
        write_audio(path, enhanced, form, report)
    _tell(report, "standard input")
    return 0


def _enhance_to_pipe(enhancer: Enhancer, source: Path) -> int:
    with open_audio(source) as reading:
        report = Report(cut_short=cut_short(reading))
        form = PipeFormat(reading.samplerate, reading.channels, reading.subtype in ("FLOAT", "DOUBLE"), is_wav=True)
        blocks = blocks_of(reading, BLOCK_SECONDS)
        _write_pipe(enhance_blocks(enhancer, blocks, form.samplerate, form.channels, report), form, report)
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
    enhancer = Enhancer(load_model(Path(checkpoint)))
    if source == "-":
        return _enhance_from_pipe(enhancer, target, of_samples)
    if Path(source).is_dir():
        if target == "-":
            raise ValueError(f"{source} is a folder: give a folder for the output")
        return enhance_folder(enhancer, Path(source), Path(target))
    return (
        _enhance_to_pipe(enhancer, Path(source)) if target == "-" else _enhance_single(enhancer, Path(source), target)
    )


if __name__ == "__main__":
    run_main(main, __doc__ or "")
