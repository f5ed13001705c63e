"""Streaming on one CPU thread: every size against onnxruntime, and how far from the floor.

The floor of a frame counts what no arrangement of the work can avoid on this machine, measured here: its
multiply-accumulates at the rate of a large matrix product, or its weights' way from memory to the core,
whichever takes longer in each part. The recurrence over bands uses its matrix once a band and direction, one after
the other, so for a single stream those bytes pass 31 times a frame.
"""

from __future__ import annotations

import ctypes
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bsrnn import BSRNN, BSRNNConfig
from bsrnn.counting import count_macs, count_parameters
from bsrnn.folding import fold
from bsrnn.kernel import FrameKernel
from bsrnn.rtf import SIZES, measure
from tests.benchmarks.page import PERFORMANCE, measured_on, write_block

COMMAND = "python -m pytest tests/benchmarks/bench_streaming.py -o python_files='bench_*.py'"

# Reads memory in blocks of 4 KiB, forwards and then backwards, so that what fits a cache is read from it.
READING = """
typedef float vec __attribute__((vector_size(64)));
volatile float sink;
void read_to_and_fro(const float *p, long n, int times) {
  vec s[8] = {};
  for (int t = 0; t < times; t++)
    for (long b = 0; b < n / 1024; b++) {
      const vec *q = (const vec *)__builtin_assume_aligned(p + 1024 * (t % 2 ? n / 1024 - 1 - b : b), 4);
      for (int i = 0; i < 64; i += 8)
        for (int v = 0; v < 8; v++) {
          vec x;
          __builtin_memcpy(&x, q + i + v, sizeof x);
          s[v] += x;
        }
    }
  for (int v = 0; v < 8; v++) sink = s[v][0] + s[v][7] + s[v][15];
  sink = (s[0] + s[1] + s[2] + s[3] + s[4] + s[5] + s[6] + s[7])[3];
}
"""


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


def reader(folder: Path) -> ctypes.CDLL:
    """READING, compiled."""
    source, library = folder / "reading.c", folder / "reading.so"
    source.write_text(READING)
    subprocess.run(["cc", "-O3", "-march=native", "-shared", "-fPIC", source, "-o", library], check=True)
    return ctypes.CDLL(str(library))


def bytes_per_second(num_bytes: int, library: ctypes.CDLL) -> float:
    """Of reading so many bytes again and again, to and fro."""
    memory = np.ones(num_bytes // 4 // 1024 * 1024, np.float32)
    times = max(2, 100_000_000 // memory.nbytes)
    read = fastest(lambda: library.read_to_and_fro(ctypes.c_void_p(memory.ctypes.data), memory.size, times), 1)
    return times * memory.nbytes / read


def floor_seconds(config: BSRNNConfig, mac_rate: float, library: ctypes.CDLL) -> float:
    """Of one frame of one stream: recurrences over bands by their bytes or MACs, the rest likewise."""
    hidden, steps = 2 * config.num_channels, 2 * config.num_bands * config.num_layers
    matrix = 4 * hidden * hidden  # of one direction's recurrence
    recurrence = max(steps * matrix / mac_rate, steps * 4 * matrix / bytes_per_second(4 * matrix, library))
    macs = count_macs(config).total / config.frames_per_second - steps * matrix
    weights = 4 * count_parameters(config).folded
    return recurrence + max(macs / mac_rate, weights / bytes_per_second(weights, library))


@torch.inference_mode()
def test_streaming_against_onnxruntime(tmp_path: Path):
    torch.set_num_threads(1)
    library = reader(tmp_path)
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
        step = fastest(lambda k=kernel, x=spectrum, s=states: k.step(x, s), max(1, int(1e9 / count_macs(config).total)))
        floor = floor_seconds(config, mac_rate, library)
        ratios[name] = row.rtf / row.rtf_onnxruntime
        lines.append(
            f"| {name} | {row.rtf:.4f} | {row.rtf_onnxruntime:.4f} | {ratios[name]:.2f} | {1e3 * step:.3f} | "
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
