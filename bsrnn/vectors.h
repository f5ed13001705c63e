// Vectors of LANES floats, as many as one register of the processor holds (a compiler keeps wider ones in memory), and
// the exponential that gates are made of: of what lies beyond BOUND either way, e^BOUND and e^-BOUND.
#pragma once

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
// Of a product, sums of ROWS rows over VECS vectors of outputs are what the registers hold beside their factors.
#define ROWS 6
#if defined(__AVX512F__) || defined(__aarch64__)  // 32 registers, else 16
#define VECS 4
#else
#define VECS 2
#endif

#define INLINE static inline __attribute__((always_inline))
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE vec splat(float x) { return x - (vec){}; }
INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec v) { *(vec *)p = v; }

#if defined(__AVX__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__)
// What is no number stays so: these give their second argument then.
INLINE vec bounded(vec x) { return _mm512_max_ps(splat(-BOUND), _mm512_min_ps(splat(BOUND), x)); }
INLINE vec nearest(vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vec times_power(vec p, vec n) { return _mm512_scalef_ps(p, n); }
// Of what is neither 0 nor infinite, within a unit in the last place: a division takes as long as three of these.
INLINE vec reciprocal(vec x) {
  const vec guess = _mm512_rcp14_ps(x);
  return guess + guess * (1.0f - x * guess);
}
#else
#if defined(__AVX__)
INLINE vec bounded(vec x) { return _mm256_max_ps(splat(-BOUND), _mm256_min_ps(splat(BOUND), x)); }
#else
INLINE vec choose(ivec condition, vec yes, vec no) { return (vec)((condition & (ivec)yes) | (~condition & (ivec)no)); }
INLINE vec bounded(vec x) {
  x = choose(x > BOUND, splat(BOUND), x);
  return choose(x < -BOUND, splat(-BOUND), x);
}
#endif
INLINE vec nearest(vec x) {
  const vec magic = splat(12582912.0f);  // 1.5 · 2^23: adding it rounds to a whole number
  return (x + magic) - magic;
}
INLINE vec times_power(vec p, vec n) { return p * (vec)((__builtin_convertvector(n, ivec) + 127) << 23); }
INLINE vec reciprocal(vec x) { return 1.0f / x; }
#endif

// exp by 2^n · e^r, |r| <= ln 2 / 2, its polynomial after Cephes (expf); within 2 units in the last place.
INLINE vec exp_of(vec x) {
  x = bounded(x);
  const vec n = nearest(x * splat(1.44269504f));
  const vec r = (x - n * splat(0.693359375f)) + n * splat(2.12194440e-4f);
  vec p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * r * r + r + 1.0f;
  return times_power(p, n);
}

INLINE vec sigmoid(vec x) { return reciprocal(1.0f + exp_of(-x)); }
INLINE vec tanh_of(vec x) { return 2.0f * reciprocal(1.0f + exp_of(-2.0f * x)) - 1.0f; }
