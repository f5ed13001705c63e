"""What one thread of this machine can do at most, measured: multiply-accumulates in registers, bytes from caches."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np

from bsrnn import compiled
from bsrnn.kernel import SOURCE

# Vectors as wide as the kernels'. Reads go in blocks of 4 KiB, forwards and then backwards, so that what fits a cache
# is read from it.
LIMITS = """
#define BOUND 28.0f
#include "vectors.h"
#define SUMS (ROWS * VECS)
#define BLOCK 1024
volatile float sink;

int lanes(void) { return LANES; }

long multiply(long times) {
  vec sum[SUMS];
  const vec a = splat(0.999f), b = splat(0.001f);
  for (int i = 0; i < SUMS; i++) sum[i] = splat(i);
  for (long t = 0; t < times; t++)
#pragma GCC unroll 32
    for (int i = 0; i < SUMS; i++) sum[i] = sum[i] * a + b;
  for (int i = 0; i < SUMS; i++) sink = sum[i][0];
  return times * SUMS * LANES;
}

void read_to_and_fro(const float *p, long n, long times) {
  vec sum[8] = {};
  for (long t = 0; t < times; t++)
    for (long b = 0; b < n / BLOCK; b++) {
      const float *q = p + BLOCK * (t % 2 ? n / BLOCK - 1 - b : b);
      for (int i = 0; i < BLOCK; i += 8 * LANES)
#pragma GCC unroll 8
        for (int v = 0; v < 8; v++) sum[v] += load(q + i + v * LANES);
    }
  for (int v = 0; v < 8; v++) sink = sum[v][0];
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


@lru_cache
def _limits() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "limits.c"), Path(folder, "limits.so")
        source.write_text(LIMITS)
        subprocess.run([*compiled._command(()), "-I", SOURCE.parent, source, "-o", library], check=True)
        loaded = ctypes.CDLL(str(library))
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
