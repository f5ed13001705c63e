"""What one thread of this machine can do at most, measured: multiply-accumulates in registers, bytes from caches."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bsrnn import kernel
from bsrnn.compiled import library

SOURCE = Path(__file__).with_name("limits.c")


def fastest(call: Callable[[], object], num_calls: int, turns: int = 5) -> float:
    """Seconds of CPU time of a call, in the fastest of several turns."""
    times = []
    for _ in range(turns):
        start = time.process_time()
        for _ in range(num_calls):
            call()
        times.append((time.process_time() - start) / num_calls)
    return min(times)


def _limits() -> ctypes.CDLL:
    loaded = library(SOURCE, f"-I{kernel.SOURCE.parent}")
    loaded.multiply.restype, loaded.multiply.argtypes = ctypes.c_long, (ctypes.c_long,)
    loaded.read_to_and_fro.restype, loaded.read_to_and_fro.argtypes = None, (ctypes.c_void_p, *(ctypes.c_long,) * 2)
    return loaded


def vector_bits() -> int:
    """Of the vectors that the compiled kernels have on this processor."""
    return 32 * _limits().lanes()


def macs_per_second() -> float:
    """Of sums that stay in registers, in 32 bits."""
    times = 3_000_000
    return _limits().multiply(times) / fastest(lambda: _limits().multiply(times), 1)


def bytes_per_second(num_bytes: int) -> float:
    """Of reading so many bytes again and again, to and fro."""
    memory = np.ones(-(-num_bytes // 4096) * 1024, np.float32)
    times = max(2, 100_000_000 // memory.nbytes)
    return times * memory.nbytes / fastest(lambda: _limits().read_to_and_fro(memory.ctypes.data, memory.size, times), 1)
