// The inverse discrete Fourier transform to a real frame of an even number N of samples, in 32 bits.
//
// Even samples are the real and odd ones the imaginary parts of N/2 complex numbers. These come of a Stockham transform:
// a factor of N/2 a pass, 4 as long as there is one, nothing to reorder. Real and imaginary parts lie apart, so that
// exchanging them turns a transform into its inverse. `roots` holds e^(-2πi j / N) for every j < N, cosine and sine in
// turn.
#pragma once

#include <string.h>

typedef struct {
  float *re, *im;
} Parts;

// The passes: `left` is the length still to be transformed, `done` the product of the factors before, and
// left · done = N/2. Of y, p counts the groups of `left`'s outputs, q what has been transformed.
static void by_four(int left, int done, const float *roots, Parts x, Parts y) {
  const int quarter = left / 4, apart = done * quarter, turn = 4 * done;  // of the roots' floats, a p
  for (int p = 0; p < quarter; p++) {
    const float *a = roots + turn * p, *b = roots + 2 * turn * p, *c = roots + 3 * turn * p;
    const float *xr = x.re + done * p, *xi = x.im + done * p;
    float *yr = y.re + 4 * done * p, *yi = y.im + 4 * done * p;
#pragma GCC ivdep
    for (int q = 0; q < done; q++) {
      const float sr = xr[q] + xr[q + 2 * apart], si = xi[q] + xi[q + 2 * apart];
      const float dr = xr[q] - xr[q + 2 * apart], di = xi[q] - xi[q + 2 * apart];
      const float tr = xr[q + apart] + xr[q + 3 * apart], ti = xi[q + apart] + xi[q + 3 * apart];
      const float er = xr[q + apart] - xr[q + 3 * apart], ei = xi[q + apart] - xi[q + 3 * apart];
      yr[q] = sr + tr, yi[q] = si + ti;
      yr[q + done] = (dr + ei) * a[0] - (di - er) * a[1], yi[q + done] = (dr + ei) * a[1] + (di - er) * a[0];
      yr[q + 2 * done] = (sr - tr) * b[0] - (si - ti) * b[1], yi[q + 2 * done] = (sr - tr) * b[1] + (si - ti) * b[0];
      yr[q + 3 * done] = (dr - ei) * c[0] - (di + er) * c[1], yi[q + 3 * done] = (dr - ei) * c[1] + (di + er) * c[0];
    }
  }
}

static void by_prime(int factor, int left, int done, const float *roots, Parts x, Parts y) {
  const int groups = left / factor, apart = done * groups, size = 2 * left * done;
  for (int p = 0; p < groups; p++)
    for (int k = 0; k < factor; k++) {
      float *yr = y.re + done * (factor * p + k), *yi = y.im + done * (factor * p + k);
      for (int q = 0; q < done; q++) yr[q] = yi[q] = 0;
      for (int j = 0; j < factor; j++) {
        // k · (p + groups · j) of `left` parts of a circle
        const float *root = roots + 2 * (2L * done * k * (p + groups * j) % size);
        const float *xr = x.re + done * p + j * apart, *xi = x.im + done * p + j * apart;
#pragma GCC ivdep
        for (int q = 0; q < done; q++) {
          yr[q] += xr[q] * root[0] - xi[q] * root[1];
          yi[q] += xr[q] * root[1] + xi[q] * root[0];
        }
      }
    }
}

// x in place; y is scratch memory of the same size.
static void transform(int size, const float *roots, Parts x, Parts y) {
  Parts from = x, to = y;
  for (int left = size, done = 1; left > 1;) {
    int factor = 4;
    if (left % 4)
      for (factor = 2; left % factor; factor++);
    if (factor == 4)
      by_four(left, done, roots, from, to);
    else
      by_prime(factor, left, done, roots, from, to);
    left /= factor, done *= factor;
    const Parts written = to;
    to = from, from = written;
  }
  if (from.re != x.re) {
    memcpy(x.re, from.re, sizeof(float) * size);
    memcpy(x.im, from.im, sizeof(float) * size);
  }
}

// N times the frame (N) of a spectrum (N / 2 + 1, 2), of whose first and last bins the imaginary parts do not count.
// scratch: 2 N floats.
static void inverse(int N, const float *roots, const float *spectrum, float *frame, float *scratch) {
  const int half = N / 2;
  const Parts z = {scratch, scratch + half}, other = {scratch + N, scratch + N + half};
  z.re[0] = spectrum[0] + spectrum[N], z.im[0] = spectrum[0] - spectrum[N];
  for (int k = 1; k < half; k++) {
    const float *a = spectrum + 2 * k, *b = spectrum + 2 * (half - k);
    const float er = a[0] + b[0], ei = a[1] - b[1], dr = a[0] - b[0], di = a[1] + b[1];
    const float c = roots[2 * k], s = -roots[2 * k + 1];
    z.re[k] = er - (dr * s + di * c);
    z.im[k] = ei + (dr * c - di * s);
  }
  transform(half, roots, (Parts){z.im, z.re}, (Parts){other.im, other.re});
  for (int j = 0; j < half; j++) frame[2 * j] = z.re[j], frame[2 * j + 1] = z.im[j];
}
