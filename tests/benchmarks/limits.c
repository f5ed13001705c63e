// What a core can do at most, in vectors as wide as the kernels': called by tests/benchmarks/machine.py. Reads go in blocks
// of 4 KiB, forwards and then backwards, so that what fits a cache is read from it.

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
