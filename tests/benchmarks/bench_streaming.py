"""Streaming on one CPU thread: every size against onnxruntime, and how far from the floor.

The floor of a frame counts what no arrangement of the work can avoid on this machine, measured here: its
multiply-accumulates at the rate of sums in registers, or its weights' way from memory to the core,
whichever takes longer in each part. The recurrence over bands uses its matrix once a band and direction, one after
the other, so for a single stream those bytes pass 31 times a frame.
"""

from __future__ import annotations

import torch

from bsrnn import BSRNN, BSRNNConfig
from bsrnn.counting import count_macs, count_parameters
from bsrnn.folding import fold
from bsrnn.kernel import FrameKernel
from bsrnn.rtf import SIZES, measure
from tests.benchmarks.machine import bytes_per_second, fastest, macs_per_second, vector_bits
from tests.benchmarks.page import PERFORMANCE, measured_on, write_block
from tests.bsrnn.frame_step import enhance_frame

COMMAND = "python -m pytest tests/benchmarks/bench_streaming.py -o python_files='bench_*.py'"


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
        row = measure(config, seconds=min(0.5, 1e9 / count_macs(config).total))
        kernel = FrameKernel(fold(BSRNN(config)), 1)
        states, spectrum = kernel.initial_states(), torch.randn(1, config.num_bins, dtype=torch.complex64)
        frames = max(1, int(1e9 / count_macs(config).total))
        step = fastest(lambda k=kernel, x=spectrum, s=states: enhance_frame(k, x, s), frames)
        floor = floor_seconds(config, mac_rate)
        ratios[name] = row.rtf / row.rtf_onnxruntime
        lines.append(
            f"| {name} | {row.rtf:.4f} | {row.rtf_onnxruntime:.4f} | {ratios[name]:.2f} | {1e3 * step:.3f} | "
            f"{1e3 * floor:.3f} | {step / floor:.1f} |"
        )
    lines += [
        "",
        f"`{COMMAND}`; {measured_on('torch', 'onnxruntime')}; one thread, CPU time, {mac_rate / 1e9:.0f} G MACs/s in "
        f"registers of {vector_bits()} bits. RTF: the whole stream, FFT and overlap-add included in both; step: the "
        "network alone.",
    ]
    write_block(PERFORMANCE, f"streaming, {vector_bits()} bits", "\n".join(lines))
    for name in ("xxt", "xt", "t"):
        assert ratios[name] < 0.8, f"{name}: {ratios[name]:.2f} of onnxruntime's real-time factor"
