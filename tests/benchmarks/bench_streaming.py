"""Streaming on one CPU thread: every size against onnxruntime, and how far from the floor.

The floor of a frame counts what no arrangement of the work can avoid on this machine, measured here: its
multiply-accumulates at the rate of a large matrix product, or its weights' way from memory to the core,
whichever takes longer in each part. The recurrence over bands uses its matrix once a band and direction, one after
the other, so for a single stream those bytes pass 31 times a frame.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from bsrnn import BSRNN, BSRNNConfig
from bsrnn.counting import count_macs, count_parameters
from bsrnn.folding import fold
from bsrnn.kernel import FrameKernel
from bsrnn.rtf import SIZES, measure
from tests.benchmarks.page import PERFORMANCE, measured_on, write_block

COMMAND = "python -m pytest tests/benchmarks/bench_streaming.py -o python_files='bench_*.py'"


def fastest(call: Callable[[], object], num_calls: int, turns: int = 5) -> float:
    """Seconds of CPU time of a call, in the fastest of several turns."""
    times = []
    for _ in range(turns):
        start = time.process_time()
        for _ in range(num_calls):
            call()
        times.append((time.process_time() - start) / num_calls)
    return min(times)


def macs_per_second() -> float:
    """Of a matrix product that fits the caches, in 32 bits."""
    a, b = torch.randn(512, 512), torch.randn(512, 512)
    return 512**3 / fastest(lambda: torch.mm(a, b), 10)


def bytes_per_second(num_bytes: int) -> float:
    """Of reading a matrix of a size again and again, by a product of a vector and it."""
    matrix = np.ones((num_bytes // 4 // 256, 256), np.float32)
    vector = np.ones(len(matrix), np.float32)
    return matrix.nbytes / fastest(lambda: vector @ matrix, max(3, 50_000_000 // num_bytes))


def floor_seconds(config: BSRNNConfig, mac_rate: float) -> float:
    """Of one frame of one stream: recurrences over bands by their bytes or MACs, the rest likewise."""
    hidden, steps = 2 * config.num_channels, 2 * config.num_bands * config.num_layers
    matrix = 4 * hidden * hidden  # of one direction's recurrence
    recurrence = max(steps * matrix / mac_rate, steps * 4 * matrix / bytes_per_second(4 * matrix))
    macs = count_macs(config).total / config.frames_per_second - steps * matrix
    weights = 4 * count_parameters(config).folded
    return recurrence + max(macs / mac_rate, weights / bytes_per_second(weights))


@torch.inference_mode()
def test_streaming_against_onnxruntime():
    torch.set_num_threads(1)
    mac_rate = macs_per_second()
    lines = [
        "| size | RTF | RTF with onnxruntime's step | ratio | step (ms) | floor (ms) | step / floor |",
        "| --- | --: | --: | --: | --: | --: | --: |",
    ]
    ratios = {}
    for name, (channels, layers) in SIZES.items():
        config = BSRNNConfig(channels, layers)
        row = measure(config, seconds=min(1.0, 1e9 / count_macs(config).total))
        kernel = FrameKernel(fold(BSRNN(config)), 1)
        states, spectrum = kernel.initial_states(), torch.randn(1, config.num_bins, dtype=torch.complex64)
        step = fastest(lambda k=kernel, x=spectrum, s=states: k.step(x, s), max(1, int(1e9 / count_macs(config).total)))
        floor = floor_seconds(config, mac_rate)
        ratios[name] = row.rtf_torch / row.rtf_onnxruntime
        lines.append(
            f"| {name} | {row.rtf_torch:.4f} | {row.rtf_onnxruntime:.4f} | {ratios[name]:.2f} | {1e3 * step:.3f} | "
            f"{1e3 * floor:.3f} | {step / floor:.1f} |"
        )
    lines += [
        "",
        f"`{COMMAND}`; {measured_on('torch', 'onnxruntime')}; one thread, CPU time, {mac_rate / 1e9:.0f} G MACs/s in a "
        "large product. RTF: the whole stream, FFT and overlap-add included in both; step: the network alone.",
    ]
    write_block(PERFORMANCE, "streaming", "\n".join(lines))
    for name in ("xxt", "xt", "t"):
        assert ratios[name] < 0.8, f"{name}: {ratios[name]:.2f} of onnxruntime's real-time factor"
