"""Forward and backward of every size against a loop over bands, in one run: on one CPU thread, and on a GPU if any.

The loop (tests/bsrnn/band_by_band.py) is the same model with the same weights, written from the equations
with torch's own layers, one module for each band. On a CPU the model runs with torch's LSTM too, and freed memory stays
in the process, as in training. The floor is three times the forward's multiply-accumulates at the measured rate of
sums in registers: the backward pass has two products for each of the forward's.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from bsrnn import BSRNN, BSRNNConfig
from bsrnn.convert import from_reference
from bsrnn.counting import count_macs
from bsrnn.lstm import keep_out_of_graphs
from bsrnn.rtf import SIZES
from scaling.allocator import keep_freed_memory
from scaling.device import set_arithmetic
from tests.benchmarks.machine import macs_per_second, vector_bits
from tests.benchmarks.page import PERFORMANCE, measured_on, write_block
from tests.bsrnn.band_by_band import BandByBand
from tests.bsrnn.library_lstm import by_library

COMMAND = "python -m pytest tests/benchmarks/bench_training.py -o python_files='bench_*.py'"
CROPS = {"xxt": 8, "xt": 8, "t": 8, "s": 8, "m": 2, "l": 1, "xl": 1}  # on the CPU
SECONDS = {"l": 0.25, "xl": 0.25}  # of a crop; 1 for the others


def pass_through(network: Callable[[Tensor], tuple[Tensor, Tensor]], module: nn.Module, noisy: Tensor) -> Tensor:
    """Forward, a loss of both outputs, backward; gradients start from none."""
    module.zero_grad(set_to_none=True)
    waveform, spectrum = network(noisy)
    loss = waveform.square().mean() + torch.view_as_real(spectrum).square().mean()
    loss.backward()
    return loss.detach()


def pair_of(name: str) -> tuple[BSRNN, BandByBand]:
    """The same weights in both."""
    torch.manual_seed(0)
    loop = BandByBand(*SIZES[name])
    return from_reference(loop.state_dict()).train(), loop.train()


def test_a_pass_on_one_cpu_thread():
    torch.set_num_threads(1)
    keep_freed_memory()
    mac_rate = macs_per_second()
    lines = [
        "| size | crops | ours (s) | with torch's LSTM (s) | loop (s) | loop / ours | floor (s) | ours / floor |",
        "| --- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for name, crops in CROPS.items():
        ours, loop = pair_of(name)
        config = BSRNNConfig(*SIZES[name])
        num_hops = math.ceil(SECONDS.get(name, 1) * config.frames_per_second)  # whole ones, which neither pads
        noisy = 0.1 * torch.randn(crops, num_hops * config.hop_length)
        contenders = [(ours, nullcontext), (ours, by_library), (loop, nullcontext)]
        losses, times = [], [[], [], []]  # type: ignore[var-annotated]
        for index, (network, context) in enumerate(contenders):
            with context():
                losses.append(pass_through(network, network, noisy))
            torch.testing.assert_close(losses[index], losses[0], rtol=1e-3, atol=1e-6)  # the same model
        for _ in range(3):
            for (network, context), taken in zip(contenders, times, strict=True):
                start = time.process_time()
                with context():
                    pass_through(network, network, noisy)
                taken.append(time.process_time() - start)
        mine, with_torch, theirs = (statistics.median(taken) for taken in times)
        frames = crops * (num_hops + 1)
        floor = 3 * frames / config.frames_per_second * count_macs(config).total / mac_rate
        lines.append(
            f"| {name} | {crops} x {SECONDS.get(name, 1)} s | {mine:.2f} | {with_torch:.2f} | {theirs:.2f} | "
            f"{theirs / mine:.2f} | {floor:.2f} | {mine / floor:.1f} |"
        )
        if name in ("xxt", "xt", "t"):
            assert with_torch > 1.1 * mine, f"{name}: {mine:.2f} s, with torch's LSTM {with_torch:.2f} s"
        del ours, loop, contenders
    lines += [
        "",
        f"`{COMMAND}`; {measured_on('torch')}; one thread, CPU time, {mac_rate / 1e9:.0f} G MACs/s in registers of "
        f"{vector_bits()} bits.",
    ]
    write_block(PERFORMANCE, f"training, {vector_bits()} bits", "\n".join(lines))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_pass_on_a_gpu():
    """32-bit, bfloat16, compiled and as a CUDA graph; wall time, the device waited for."""
    lines = [
        "| size | loop fp32 (ms) | fp32 | bf16 | fp32 compiled | bf16 compiled | fp32 CUDA graph | loop / best |",
        "| --- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    keep_out_of_graphs()
    for name in SIZES:
        torch.compiler.reset()  # it compiles a function for so many models, and no more
        set_arithmetic("fp32")
        ours, loop = (model.cuda() for model in pair_of(name))
        noisy = 0.1 * torch.randn(16, 32_000).cuda()  # the GPU's generator is no more itself once a capture has failed
        taken = [_gpu_milliseconds(lambda m=loop, x=noisy: pass_through(m, m, x))]
        for compiled in (False, True):
            network = torch.compile(ours) if compiled else ours
            for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):

                def step(network=network, dtype=dtype, ours=ours, noisy=noisy) -> Tensor:
                    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                        return pass_through(network, ours, noisy)

                set_arithmetic(precision)
                taken.append(_gpu_milliseconds(step))
        set_arithmetic("fp32")
        try:
            taken.append(_gpu_milliseconds(_as_graph(ours, noisy)))
        except RuntimeError as error:  # what a graph cannot hold is a finding, and the other figures stand
            print(f"{name}: no CUDA graph: {error}")
            taken.append(math.nan)
        cells = " | ".join(f"{milliseconds:.1f}" for milliseconds in taken)
        lines.append(f"| {name} | {cells} | {taken[0] / min(t for t in taken[1:] if t == t):.1f} |")
    lines += ["", f"`{COMMAND}`; {torch.cuda.get_device_name()}, {measured_on('torch')}; 16 crops of 2 s."]
    write_block(PERFORMANCE, "training on a GPU", "\n".join(lines))


def _gpu_milliseconds(step: Callable[[], object], num_steps: int = 10) -> float:
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(num_steps):
        step()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start) / num_steps


def _as_graph(model: BSRNN, noisy: Tensor) -> Callable[[], object]:
    """Forward and backward captured once and replayed: no launch is paid for again."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            pass_through(model, model, noisy)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    model.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        pass_through(model, model, noisy)
    return graph.replay
