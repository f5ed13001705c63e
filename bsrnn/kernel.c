// A folded BSRNN on one thread: an STFT frame from spectrum to enhanced spectrum (bsrnn_step), and a stream's frames
// from spectra to finished samples (bsrnn_hops).
//
// Called by bsrnn/kernel.py, which compiles this file, lays the weights out and fills them up with zeros to what it
// needs: channels in multiples of WIDTH. A frame is some hundreds of small dependent products (31 bands x 2 directions x
// layers), where a library spends most of its time on being called; here each is a loop over registers.
//
// Every matrix product is y = init + x W with W stored as (in, out), so that vectors run along the outputs.
// Gates stand in torch's order: input, forget, cell, output.

#include <math.h>
#include <string.h>

#define BOUND 28.0f  // e^-28 is nothing beside 1, and e^28 cubed is still a number
#include "fourier.h"
#include "vectors.h"

#define WIDTH 16          // channels are a multiple of it, and so are the outputs of a product
#define PANEL (VECS * LANES)
#define APART (8 / VECS)  // of a single row: so many sums of an output that none waits for itself
#define LINE 16           // floats of a cache line
#define NEAR (40 << 10)   // bytes: of a first-level cache
#define AHEAD 4096        // floats: how far ahead weights are called for that come from afar
#define AHEAD_PACKED 768  // words: the same, of packed weights

int bsrnn_lanes(void) { return LANES; }
int bsrnn_panel(void) { return PANEL; }

typedef unsigned uvec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

// `rows` x `vecs` outputs held in registers over the whole inner sum. `w` is one panel: (in, vecs · LANES).
// Of weights that will be needed later, from `next` on, one line an input is called for meanwhile, unless it is null.
INLINE void block(const int rows, const int vecs, const float *next, int in, const float *x, long xs, const float *w,
                  const float *init, long is, float *y, long ys) {
  vec sum[ROWS][VECS];
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
    for (int v = 0; v < vecs; v++) sum[r][v] = load(init + r * is + v * LANES);
  for (int i = 0; i < in; i++, w += vecs * LANES) {
    vec wv[VECS];
#pragma GCC unroll 8
    for (int v = 0; v < vecs; v++) wv[v] = load(w + v * LANES);
    if (next) __builtin_prefetch(next + (long)i * vecs * LANES, 0, 2);  // to the second-level cache
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
      const vec xv = splat(x[r * xs + i]);
#pragma GCC unroll 8
      for (int v = 0; v < vecs; v++) sum[r][v] += xv * wv[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
    for (int v = 0; v < vecs; v++) store(y + r * ys + v * LANES, sum[r][v]);
}

// The same for a single row, whose sums over every APART-th input go side by side so that none waits for another.
INLINE void single(const int ahead, int in, const float *x, const float *w, const float *init, float *y) {
  vec sum[APART][VECS];
#pragma GCC unroll 4
  for (int v = 0; v < VECS; v++) {
    sum[0][v] = load(init + v * LANES);
#pragma GCC unroll 4
    for (int a = 1; a < APART; a++) sum[a][v] = splat(0);
  }
  for (; in >= APART; in -= APART, x += APART, w += APART * PANEL)
#pragma GCC unroll 4
    for (int a = 0; a < APART; a++) {
      const vec xv = splat(x[a]);
#pragma GCC unroll 4
      for (int v = 0; v < VECS; v++) {
        sum[a][v] += xv * load(w + a * PANEL + v * LANES);
        if (ahead && v * LANES % LINE == 0) __builtin_prefetch(w + a * PANEL + v * LANES + ahead);
      }
    }
  for (; in > 0; in--, x++, w += PANEL)
#pragma GCC unroll 4
    for (int v = 0; v < VECS; v++) sum[0][v] += splat(x[0]) * load(w + v * LANES);
#pragma GCC unroll 4
  for (int v = 0; v < VECS; v++) {
    vec total = sum[0][v];
#pragma GCC unroll 4
    for (int a = 1; a < APART; a++) total += sum[a][v];
    store(y + v * LANES, total);
  }
}

// y[r] = init[r] + x[r] W over `rows` rows; strides xs, is, ys between rows (is = 0: one bias for all). y may be init.
// W lies in panels of PANEL outputs, the last of what is left. A panel serves all rows while it is near; each of the
// first blocks of rows calls for a line of every input's in the next panel, if they are whole lines.
static void product(int rows, int in, int out, const float *x, long xs, const float *w, const float *init, long is,
                    float *y, long ys) {
  for (int j = 0; j < out; w += (long)in * PANEL, j += PANEL, init += PANEL, y += PANEL) {
    int r = 0;
#define BLOCKS(R, V) \
  for (; r + R <= rows; r += R) block(R, V, NULL, in, x + r * xs, xs, w, init + r * is, is, y + r * ys, ys);
    switch (out - j < PANEL ? (out - j) / LANES : VECS) {
#if VECS > 2
      case 1: BLOCKS(ROWS, 1) BLOCKS(1, 1) break;
      case 2: BLOCKS(ROWS, 2) BLOCKS(1, 2) break;
      case 3: BLOCKS(ROWS, 3) BLOCKS(1, 3) break;
#endif
      case VECS:
        for (const float *next = w + (long)in * PANEL; r + ROWS <= rows && r < PANEL / LINE * ROWS;
             r += ROWS, next += LINE)
          block(ROWS, VECS, next, in, x + r * xs, xs, w, init + r * is, is, y + r * ys, ys);
        BLOCKS(ROWS, VECS)
        BLOCKS(2, VECS)
        for (; r < rows; r++) single(rows == 1 ? AHEAD : 0, in, x + r * xs, w, init + r * is, y + r * ys);
    }
#undef BLOCKS
  }
}

// gates[r] += h[r] W for a matrix that every step of a recurrence uses, and that may be larger than a cache. Every
// other step goes through it backwards, so that it begins with what the step before has left in the cache.
static void recur(int rows, int in, int out, const float *h, long hs, const float *w, float *gates, long gs,
                  int backwards) {
  const int panels = out / PANEL;
  for (int n = 0; n < panels; n++) {
    const int p = backwards ? panels - 1 - n : n;
    const float *panel = w + (long)p * in * PANEL;
    float *g = gates + p * PANEL;
    int r = 0;
    for (; r + ROWS <= rows; r += ROWS)
      block(ROWS, VECS, NULL, in, h + r * hs, hs, panel, g + r * gs, gs, g + r * gs, gs);
    for (; r + 2 <= rows; r += 2) block(2, VECS, NULL, in, h + r * hs, hs, panel, g + r * gs, gs, g + r * gs, gs);
    for (; r < rows; r++) single(0, in, h + r * hs, panel, g + r * gs, g + r * gs);
  }
}

// The weights of one input to 4 vectors of outputs from their packed form, as whole numbers. Of 4 vectors of weights of
// 24 bits, 3 lie in the upper bytes of 3 vectors of words, and the bytes of the other in the lowest bytes: vector v of
// the words holds the v-th byte. Those lowest bytes stay where they are, since whoever packed them has rounded the upper
// 24 bits to what is nearest with them.
INLINE void unpack(const unsigned *packed, vec *w) {
  uvec last = {};
#pragma GCC unroll 3
  for (int v = 0; v < 3; v++) {
    const uvec words = *(const uvec *)(packed + v * LANES);
    last |= (words & 255) << (24 - 8 * v);
    w[v] = __builtin_convertvector((ivec)words, vec);
    if (v * LANES % LINE == 0) __builtin_prefetch(packed + v * LANES + AHEAD_PACKED);
  }
  w[3] = __builtin_convertvector((ivec)last, vec);
}

// `recur` for a packed matrix, `in` being even: three quarters of the bytes, for one that does not stay in a cache. Each
// output has a scale, which makes weights of whole numbers.
static void recur_packed(int rows, int in, int out, const float *h, long hs, const unsigned *packed,
                         const float *scale, float *gates, long gs, int backwards) {
  const int panel = 4 * LANES, panels = out / panel, words = 3 * LANES;  // of an input
  for (int n = 0; n < panels; n++) {
    const int p = backwards ? panels - 1 - n : n;
    for (int r = 0; r < rows; r++) {
      const unsigned *q = packed + (long)p * in * words;
      const float *x = h + r * hs;
      float *g = gates + r * gs + p * panel;
      vec even[4] = {}, odd[4] = {};
      for (int i = 0; i < in; i += 2, q += 2 * words) {
        const vec first = splat(x[i]), second = splat(x[i + 1]);
        vec w[4];
        unpack(q, w);
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) even[v] += first * w[v];
        unpack(q + words, w);
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) odd[v] += second * w[v];
      }
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++)
        store(g + v * LANES, load(g + v * LANES) + load(scale + p * panel + v * LANES) * (even[v] + odd[v]));
    }
  }
}

// The gates' nonlinearities and the cell's update: gates (4H) and cell (H) of one row to its output (H).
// With a = e^-input, b = e^-2·candidate, d = e^-forget: c / (1 + d) + (1 - b) / ((1 + a)(1 + b)) over one
// denominator, since a division takes as long as an exponential. The exponents' bound keeps that finite.
// The last exponential waits for the cell, and in a loop of its own many units wait at once; `gates` keeps what it needs.
INLINE void cell_update(int hidden, float *gates, float *cell, float *output) {
  for (int j = 0; j < hidden; j += LANES) {
    const vec a = 1.0f + exp_of(-load(gates + j)), d = 1.0f + exp_of(-load(gates + hidden + j));
    const vec b = exp_of(-2.0f * load(gates + 2 * hidden + j)), e = 1.0f + exp_of(-load(gates + 3 * hidden + j));
    const vec ab = a * (1.0f + b);
    store(cell + j, (load(cell + j) * ab + (1.0f - b) * d) * reciprocal(ab * d));
    store(gates + j, e);
  }
  for (int j = 0; j < hidden; j += LANES) {
    const vec f = exp_of(-2.0f * load(cell + j));
    store(output + j, (1.0f - f) * reciprocal(load(gates + j) * (1.0f + f)));
  }
}

typedef struct {
  int streams, bins, bands, channels, layers;
  int packed;             // whether the recurrences over bands have packed matrices
  const int *widths;      // (bands), in bins
  const float **weights;  // in the order in which they are used
  float *work;            // _scratch_floats() of bsrnn/kernel.py
  float exponent;         // of the magnitude's compression
  float floor;            // below which the magnitude is not compressed further
  int size, hop;          // of a window, in samples
  const float *window;    // (size)
  const float *roots;     // (size, 2), of bsrnn/fourier.h
  float *hop_work;        // _hop_floats() of bsrnn/kernel.py
} Step;

static int padded(int n) { return (n + WIDTH - 1) / WIDTH * WIDTH; }

// spectrum, enhanced: (streams, bins, 2), not compressed; they may be the same. hidden, cell: one (streams · bands, 2C) a layer, renewed.
void bsrnn_step(const Step *s, const float *spectrum, float *const *hidden, float *const *cell, float *enhanced) {
  const int B = s->streams, F = s->bins, K = s->bands, C = s->channels, H = 2 * C, rows = B * K;
  const float **w = s->weights;
  float *compressed = s->work;                // (B, F, 2)
  float *x = compressed + (long)B * 2 * F;    // (B·K, C)
  float *gates = x + (long)rows * C;          // (B·K, 8H / 2 directions)
  float *both = gates + (long)rows * 8 * H;   // (B·K, 2H) outputs of the two directions
  float *band_cell = both + (long)rows * 2 * H;  // (2 directions, B, H)
  float *decoded = band_cell + 2L * B * H;   // (B, 8C), then what a band's head makes

  for (int i = 0; i < B * F; i++) {
    const float re = spectrum[2 * i], im = spectrum[2 * i + 1];
    const float magnitude = fmaxf(sqrtf(re * re + im * im), s->floor);
    const float gain = powf(magnitude, s->exponent - 1.0f);
    compressed[2 * i] = re * gain;
    compressed[2 * i + 1] = im * gain;
  }

  for (int k = 0, bin = 0; k < K; bin += s->widths[k++], w += 2)
    product(B, 2 * s->widths[k], C, compressed + 2 * bin, 2 * F, w[0], w[1], 0, x + (long)k * C, (long)K * C);

  for (int layer = 0; layer < s->layers; layer++, w += 11) {
    // Over time: all bands at once.
    product(rows, C, 4 * H, x, C, w[0], w[2], 0, gates, 4 * H);
    product(rows, H, 4 * H, hidden[layer], H, w[1], gates, 4 * H, gates, 4 * H);
    for (int r = 0; r < rows; r++)
      cell_update(H, gates + (long)r * 4 * H, cell[layer] + (long)r * H, hidden[layer] + (long)r * H);
    product(rows, H, C, hidden[layer], H, w[3], w[4], 0, both, C);
    for (long i = 0; i < (long)rows * C; i++) x[i] += both[i];

    // Over bands: the inputs' part of all bands at once, then one direction after the other, band by band.
    product(rows, C, 8 * H, x, C, w[5], w[6], 0, gates, 8 * H);
    // Side by side, neither direction waits for its own last step; but only if both matrices stay near.
    const int together = 2 * sizeof(float) * H * 4 * H <= NEAR;
    for (int n = 0; n < 2 * K; n++) {
      const int direction = together ? n % 2 : n / K, i = together ? n / 2 : n % K;
      const int k = direction ? K - 1 - i : i, before = direction ? k + 1 : k - 1;
      const long start = (long)direction * H * 4 * H, apart = (long)K * 2 * H;
      const float *h = both + (long)before * 2 * H + direction * H;
      float *g = gates + (long)k * 8 * H + direction * 4 * H, *c = band_cell + (long)direction * B * H;
      if (i == 0)
        memset(c, 0, sizeof(float) * B * H);
      else if (s->packed)
        recur_packed(B, H, 4 * H, h, apart, (const unsigned *)w[7] + start / 4 * 3, w[8] + direction * 4 * H, g,
                     4 * apart, i % 2);
      else
        recur(B, H, 4 * H, h, apart, w[7] + start, g, 4 * apart, i % 2);
      for (int b = 0; b < B; b++)
        cell_update(H, g + (long)b * K * 8 * H, c + (long)b * H, both + ((long)b * K + k) * 2 * H + direction * H);
    }
    product(rows, 2 * H, C, both, 2 * H, w[9], w[10], 0, gates, C);
    for (long i = 0; i < (long)rows * C; i++) x[i] += gates[i];
  }

  float *head = decoded + (long)B * 8 * C;  // (B, 2 heads, value and gate, padded 2·width)
  for (int k = 0, bin = 0; k < K; bin += s->widths[k++], w += 4) {
    const int features = 2 * s->widths[k], P = padded(features);
    product(B, C, 8 * C, x + (long)k * C, (long)K * C, w[0], w[1], 0, decoded, 8 * C);
    for (long i = 0; i < (long)B * 8 * C; i += LANES) store(decoded + i, tanh_of(load(decoded + i)));
    for (int h = 0; h < 2; h++)
      product(B, 4 * C, 2 * P, decoded + h * 4 * C, 8 * C, w[2] + (long)h * 4 * C * 2 * P, w[3] + h * 2 * P, 0,
              head + h * 2 * P, 4 * P);
    for (int b = 0; b < B; b++) {
      float *mask = head + (long)b * 4 * P, *residual = mask + 2 * P;
      for (int j = 0; j < P; j += LANES) {
        store(mask + j, load(mask + j) * sigmoid(load(mask + P + j)));
        store(residual + j, load(residual + j) * sigmoid(load(residual + P + j)));
      }
      const float *in = compressed + ((long)b * F + bin) * 2;
      float *out = enhanced + ((long)b * F + bin) * 2;
      for (int j = 0; j < features; j += 2) {
        out[j] = in[j] * mask[j] - in[j + 1] * mask[j + 1] + residual[j];
        out[j + 1] = in[j] * mask[j + 1] + in[j + 1] * mask[j] + residual[j + 1];
      }
    }
  }

  for (int i = 0; i < B * F; i++) {
    const float re = enhanced[2 * i], im = enhanced[2 * i + 1];
    const float gain = powf(sqrtf(re * re + im * im), 1.0f / s->exponent - 1.0f);
    enhanced[2 * i] = re * gain;
    enhanced[2 * i + 1] = im * gain;
  }
}

// Spectra (streams, frames, bins, 2) of windowed frames, a hop apart, to finished (streams, frames · hop): enhanced
// samples that no later frame reaches. overlap: (streams, size - hop) of the frames before, envelope: (size - hop) of
// their squared windows; both renewed.
void bsrnn_hops(const Step *s, int frames, const float *spectra, float *const *hidden, float *const *cell,
                float *overlap, float *envelope, float *finished) {
  const int B = s->streams, N = s->size, hop = s->hop, rest = N - hop;
  const long F = 2L * s->bins;
  float *spectrum = s->hop_work, *squares = spectrum + B * F, *frame = squares + N, *scratch = frame + N;
  for (int t = 0; t < frames; t++, finished += hop) {
    for (int b = 0; b < B; b++) memcpy(spectrum + b * F, spectra + ((long)b * frames + t) * F, sizeof(float) * F);
    bsrnn_step(s, spectrum, hidden, cell, spectrum);
    for (int i = 0; i < N; i++) squares[i] = s->window[i] * s->window[i] + (i < rest ? envelope[i] : 0);
    memcpy(envelope, squares + hop, sizeof(float) * rest);
    for (int b = 0; b < B; b++) {
      float *over = overlap + (long)b * rest, *out = finished + (long)b * frames * hop;
      inverse(N, s->roots, spectrum + b * F, frame, scratch);
      for (int i = 0; i < N; i++) frame[i] = frame[i] * s->window[i] / N + (i < rest ? over[i] : 0);
      for (int i = 0; i < hop; i++) out[i] = frame[i] / squares[i];
      memcpy(over, frame + hop, sizeof(float) * rest);
    }
  }
}
