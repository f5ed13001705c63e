"""The real-time factor of streaming: seconds of one thread's CPU time for a second of audio, frame by frame.

    python -m bsrnn.rtf [SIZE ...] [seconds=S]

SIZE is a name of the table (xxt to xl; default: all seven) or WIDTHxDEPTH. Audio comes hop by hop (16 ms), as from a
microphone, through bsrnn/streaming.py: once with this project's step, which is the compiled kernel (bsrnn/kernel.py)
or, where that is not to be had, torch, and once with the exported step in onnxruntime in its place, everything else
the same. Which step it was stands in the row, with why if it was torch. The two take turns, and the median of the turns
counts. A turn is S seconds of audio (default 1), or of CPU time where a size needs more than that: all seven take
less than a minute. Below 1 a size keeps up with one stream on one such core. Weights are random: speed does not
depend on them.

`python -m scaling.rtf study=DIR` measures the architectures of a study in this way, for its scaling table.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bsrnn.command import run_main, settings
from bsrnn.folding import fold
from bsrnn.kernel import FrameKernel
from bsrnn.model import BSRNN, BlockState, BSRNNConfig
from bsrnn.onnx import Session, export
from bsrnn.processor import processor_name
from bsrnn.streaming import Stream

SIZES = {"xxt": (16, 2), "xt": (16, 6), "t": (32, 6), "s": (64, 6), "m": (128, 6), "l": (256, 6), "xl": (256, 12)}
TURNS = 5


@dataclass(frozen=True)
class RealTimeFactor:
    """Of an architecture, and on what it was measured."""

    rtf: float  # this project's streaming
    step: str  # what enhanced its frames: kernel, or torch and why the kernel could not
    rtf_onnxruntime: float | None  # the same with the step in onnxruntime; None where that cannot be exported
    threads: int
    cpu: str
    torch: str
    onnxruntime: str


class OnnxStep:
    """The exported step in a stream: the states stay with its session."""

    def __init__(self, model: BSRNN) -> None:
        self._session = Session(export(model))

    def initial_states(self) -> list[BlockState]:
        return []

    def step(self, spectrum: Tensor, states: list[BlockState]) -> Tensor:
        frame = torch.view_as_real(spectrum.contiguous()).numpy()
        return torch.view_as_complex(torch.from_numpy(self._session.step(frame)))


def measure(config: BSRNNConfig, seconds: float) -> RealTimeFactor:
    """Both real-time factors, over `seconds` of audio each turn, or of CPU time if those are sooner over.

    ValueError for an architecture that does not stream.
    """
    import onnxruntime

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = BSRNN(config).eval()
    hop = 0.1 * torch.randn(1, config.hop_length)
    obstacle = FrameKernel.obstacle(fold(model))
    streams = [Stream(model, use_kernel=obstacle is None)]
    with contextlib.suppress(ValueError):  # norms that follow the signal are not exported
        streams.append(Stream(model, step=OnnxStep(model)))
    for stream in streams:
        for _ in range(4):
            stream.process(hop)
    slowest = max(_seconds_per_call(lambda stream=stream: stream.process(hop), 1) for stream in streams)  # type: ignore[misc]
    num_hops = max(3, round(seconds * min(config.frames_per_second, 1 / slowest)))
    turns: list[list[float]] = [[] for _ in streams]
    for _ in range(TURNS):
        for stream, times in zip(streams, turns, strict=True):
            times.append(_seconds_per_call(lambda stream=stream: stream.process(hop), num_hops))  # type: ignore[misc]
    ours, *onnx = (statistics.median(times) * config.frames_per_second for times in turns)
    return RealTimeFactor(
        rtf=ours,
        step="kernel" if obstacle is None else f"torch: {' '.join(obstacle.split())}",
        rtf_onnxruntime=onnx[0] if onnx else None,
        threads=1,
        cpu=processor_name(),
        torch=str(torch.__version__),
        onnxruntime=onnxruntime.__version__,
    )


def _seconds_per_call(call: Callable[[], object], num_calls: int) -> float:
    """Of the process's CPU time, so that what else the machine does counts as little as can be."""
    start = time.process_time()
    for _ in range(num_calls):
        call()
    return (time.process_time() - start) / num_calls


def _config_of(size: str) -> BSRNNConfig:
    if size in SIZES:
        return BSRNNConfig(*SIZES[size])
    width, times, depth = size.partition("x")
    if not (times and width.isdigit() and depth.isdigit() and int(width) <= 1024 and int(depth) <= 100):
        raise ValueError(
            f"{size}: no such size; expected one of {', '.join(SIZES)}, or WIDTHxDEPTH, such as 8x6, up to 1024x100"
        )
    return BSRNNConfig(int(width), int(depth))


def table_heading() -> str:
    said = f"one stream, hop by hop; seconds of one thread of {processor_name()} per second of audio"
    return f"{said}\n{'size':>8}  {'this project':>12}  {'onnxruntime':>12}  ratio  step"


def table_line(size: str, found: RealTimeFactor) -> str:
    onnx = found.rtf_onnxruntime
    against = f"{'–':>12}  {'–':>5}" if onnx is None else f"{onnx:>12.4f}  {found.rtf / onnx:5.2f}"
    return f"{size:>8}  {found.rtf:>12.4f}  {against}  {found.step}"


def main(words: list[str]) -> int:
    sizes = [word for word in words if "=" not in word]
    _, given = settings([word for word in words if "=" in word], [], {"seconds": float})
    seconds = given.get("seconds", 1.0)
    if not 0 < seconds <= 3600:
        raise ValueError(f"seconds = {seconds}: expected more than 0, at most 3600")
    configs = {size: _config_of(size) for size in sizes or SIZES}
    print(table_heading())
    for size, config in configs.items():
        print(table_line(size, measure(config, seconds)), flush=True)
    return 0


if __name__ == "__main__":
    run_main(main, __doc__ or "")
