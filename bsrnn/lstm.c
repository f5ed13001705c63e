// An LSTM of one layer, forward and backward, on a CPU's threads. Called by bsrnn/lstm.py, which compiles this file.
//
// A library makes a matrix product of each step, stores the gates, and goes over them again and again. Here the
// product of a few rows makes the four gates of the same units, in registers, and their cells follow at once; and some
// rows go through all steps before the next ones begin, so that what a step needs is still in a near cache. The backward
// pass adds to the gradients of the weights while the gates' are near, instead of storing those for a product at the end.
//
// Rows (the batch) are independent and are shared out to threads, `parts` of them. Within a part sums are in a fixed
// order, so that the same parts give the same bits.
//
// A position is (step, row); x, y, cells, gates and dx are arrays over positions, steps or rows first. Gates are kept
// as (hidden / LANES, 4, LANES), torch's order of input, forget, cell, output within; `hidden` is a multiple of LANES,
// of which `units` are the model's and the others have weights of zero, hence cells and outputs of zero.

#include <string.h>

#define BOUND 87.0f  // the gradient of a gate beyond it is none, and e^87 has a reciprocal
#include "vectors.h"

#define BLOCK 48  // rows that go through all steps together
#define DEPTH 4   // steps whose gates' gradients go into those of the weights at once

#define PANEL (VECS * LANES)
#define CELL (4 * LANES)
#define EACH(n, count) _Pragma("GCC unroll 8") for (int n = 0; n < (count); n++)

typedef struct {
  int steps, rows, inputs, hidden, units, directions, rows_first, parts;
} Shape;

// weights: (4·units, inputs), (4·units, units), two biases (4·units)
typedef struct {
  const float *ih, *hh, *bias_ih, *bias_hh;
} Weights;

int lstm_lanes(void) { return LANES; }
int lstm_rows(void) { return ROWS; }  // the least that a thread gets

static long place(const Shape *s, int step, int row) {
  return s->rows_first ? (long)row * s->steps + step : (long)step * s->rows + row;
}
static long apart(const Shape *s) { return s->rows_first ? s->steps : 1; }  // places from a row to the next
static int padded(int n) { return (n + LANES - 1) / LANES * LANES; }
static long gates_of(const Shape *s) { return 4L * s->hidden; }
static long inner(const Shape *s) { return s->inputs + s->hidden; }

// Of the rows, in whole tiles, the first that is a part's; that of `part + 1` is its end.
static int first_row(const Shape *s, int part) {
  const long tiles = (s->rows + ROWS - 1) / ROWS;
  const long row = tiles * part / s->parts * ROWS;
  return row < s->rows ? row : s->rows;
}

// --- forward ---------------------------------------------------------------------------------------------------------

static long panels_size(const Shape *s) { return (inner(s) + 1) * gates_of(s); }
long lstm_forward_scratch(const Shape *s) { return s->directions * panels_size(s); }

// To a panel (inputs + hidden, 4, LANES) for every LANES units, and behind them the biases (hidden / LANES, 4, LANES).
static void pack_forward(const Shape *s, const Weights *w, float *panels) {
  const int I = s->inputs, U = s->units;
  memset(panels, 0, sizeof(float) * panels_size(s));
  float *bias = panels + inner(s) * gates_of(s);
  for (int u = 0; u < U; u++)
    for (int g = 0; g < 4; g++) {
      const long from = (long)g * U + u, column = g * LANES + u % LANES;
      float *to = panels + u / LANES * inner(s) * CELL + column;
      for (int i = 0; i < I; i++) to[(long)i * CELL] = w->ih[from * I + i];
      for (int i = 0; i < U; i++) to[(long)(I + i) * CELL] = w->hh[from * U + i];
      bias[u / LANES * CELL + column] = w->bias_ih[from] + w->bias_hh[from];
    }
}

typedef struct {
  const float *at;  // NULL for zeros
  long apart;       // from a row to the next
} From;
typedef struct {
  float *at;
  long apart;
} To;

// sums (rows, 4, LANES) of LANES units in one step, of VECS gates at once.
INLINE void sum_tile(const int rows, const Shape *s, From x, From h, const float *panel, const float *bias, float *sums) {
#define ADD(x, in)                                              \
  for (int i = 0; i < in; i++, w += CELL) {                     \
    vec wv[VECS];                                               \
    EACH(g, VECS) wv[g] = load(w + g * LANES);                  \
    EACH(r, rows) {                                             \
      const vec xv = splat(x.at[r * x.apart + i]);              \
      EACH(g, VECS) sum[r][g] += xv * wv[g];                    \
    }                                                           \
  }
  for (int first = 0; first < 4; first += VECS, panel += VECS * LANES, bias += VECS * LANES, sums += VECS * LANES) {
    const float *w = panel;
    vec sum[ROWS][VECS];
    EACH(r, rows) EACH(g, VECS) sum[r][g] = load(bias + g * LANES);
    ADD(x, s->inputs)
    if (h.at) ADD(h, s->units)
    EACH(r, rows) EACH(g, VECS) store(sums + r * CELL + g * LANES, sum[r][g]);
  }
#undef ADD
}

// From a tile's sums to cells and outputs; before: the cells of the step before. By itself, since its constants would
// take the registers of the sums.
static __attribute__((noinline)) void update_cells(int rows, const float *sums, From before, To cell, To y, To gates) {
  for (int r = 0; r < rows; r++, sums += CELL) {
    const vec in = sigmoid(load(sums)), forget = sigmoid(load(sums + LANES));
    const vec candidate = tanh_of(load(sums + 2 * LANES)), out = sigmoid(load(sums + 3 * LANES));
    vec c = in * candidate;
    if (before.at) c += forget * load(before.at + r * before.apart);
    store(cell.at + r * cell.apart, c);
    store(y.at + r * y.apart, out * tanh_of(c));
    if (gates.at) {
      float *p = gates.at + r * gates.apart;
      store(p, in), store(p + LANES, forget), store(p + 2 * LANES, candidate), store(p + 3 * LANES, out);
    }
  }
}

// x: (position, inputs). h0, c0: (direction, row, hidden), or NULL for zeros. y: (position, direction, hidden).
// gates: (position, direction, 4·hidden) and cells: as y, for the backward pass; or NULL and (direction, row, hidden),
// the last cells.
void lstm_forward(const Shape *s, const Weights *weights, const float *x, const float *h0, const float *c0, float *y,
                  float *cells, float *gates, float *scratch) {
  const int H = s->hidden, D = s->directions;
  for (int d = 0; d < D; d++) pack_forward(s, weights + d, scratch + d * panels_size(s));
#pragma omp parallel for schedule(static, 1) num_threads(s->parts)
  for (int part = 0; part < s->parts; part++)
    for (int d = 0; d < D; d++)
      for (int start = first_row(s, part), end = first_row(s, part + 1); start < end; start += BLOCK) {
        const int stop = start + BLOCK < end ? start + BLOCK : end;
        const float *panels = scratch + d * panels_size(s), *biases = panels + inner(s) * gates_of(s);
        for (int n = 0; n < s->steps; n++) {
          const int t = d ? s->steps - 1 - n : n, last = d ? t + 1 : t - 1;
          for (int j = 0; j < H; j += LANES) {
            const float *panel = panels + j / LANES * inner(s) * CELL, *bias = biases + 4 * j;
            for (int r = start, rows; r < stop; r += rows) {
              const long now = place(s, t, r), then = place(s, last, r), zero = ((long)d * s->rows + r) * H;
              const From in = {x + now * s->inputs, apart(s) * s->inputs};
              From h = {h0 ? h0 + zero : NULL, H}, before = {c0 ? c0 + zero + j : NULL, H};
              To cell = {cells + zero + j, H}, to_gates = {NULL, 0};
              const To out = {y + (now * D + d) * H + j, apart(s) * D * H};
              if (n) h = (From){y + (then * D + d) * H, apart(s) * D * H};
              if (gates) {
                cell = (To){cells + (now * D + d) * H + j, apart(s) * D * H};
                to_gates = (To){gates + ((now * D + d) * H + j) * 4, apart(s) * D * H * 4};
              }
              if (n) before = gates ? (From){cells + (then * D + d) * H + j, apart(s) * D * H} : (From){cell.at, H};
              rows = stop - r < ROWS ? stop - r : ROWS;
              float sums[ROWS * CELL];
#define CASE(R) case R: sum_tile(R, s, in, h, panel, bias, sums); break;
              switch (rows) {
                CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
              }
#undef CASE
              update_cells(rows, sums, before, cell, out, to_gates);
            }
          }
        }
      }
}

// --- backward --------------------------------------------------------------------------------------------------------

static long transposed_size(const Shape *s) { return gates_of(s) * (padded(s->inputs) + s->hidden); }
static long gradient_size(const Shape *s) { return (inner(s) + 1) * gates_of(s); }
long lstm_backward_scratch(const Shape *s) {
  return s->directions * (transposed_size(s) + s->parts * gradient_size(s)) + s->parts * DEPTH * BLOCK * gates_of(s);
}

// A weight (4·units, width) to panels (4·hidden, PANEL) of its columns, the last panel of what is left.
static float *pack_transposed(const Shape *s, const float *w, int width, float *to) {
  for (int column = 0, size; column < padded(width); column += size) {
    size = padded(width) - column < PANEL ? padded(width) - column : PANEL;
    const int there = width - column < size ? width - column : size;
    for (int j = 0; j < s->hidden; j += LANES)
      for (int g = 0; g < 4; g++)
        for (int u = j; u < j + LANES; u++, to += size) {
          memset(to, 0, sizeof(float) * size);
          if (u < s->units) memcpy(to, w + ((long)g * s->units + u) * width + column, sizeof(float) * there);
        }
  }
  return to;
}

// The sums of all parts (inputs + hidden + 1 bias, 4·hidden) to gradients of the weights.
static void unpack(const Shape *s, const float *sums, float *ih, float *hh, float *bias) {
  const int I = s->inputs, U = s->units;
#pragma omp parallel for schedule(static) num_threads(s->parts)
  for (int u = 0; u < U; u++)
    for (int g = 0; g < 4; g++) {
      const long to = (long)g * U + u, column = u / LANES * CELL + g * LANES + u % LANES;
      for (int i = 0; i <= inner(s); i++) {
        if (i >= I + U && i < inner(s)) continue;
        float sum = 0;
        for (int part = 0; part < s->parts; part++) sum += sums[part * gradient_size(s) + i * gates_of(s) + column];
        if (i < I)
          ih[to * I + i] = sum;
        else if (i < I + U)
          hh[to * U + i - I] = sum;
        else
          bias[to] = sum;
      }
    }
}

// y (rows, vecs · LANES) = x (rows, in) w (in, vecs · LANES), added to what is there or not
INLINE void tile(const int rows, const int vecs, int in, From x, const float *w, int adds, To y) {
  vec sum[ROWS][VECS];
  EACH(r, rows) EACH(v, vecs) sum[r][v] = adds ? load(y.at + r * y.apart + v * LANES) : splat(0);
  for (int i = 0; i < in; i++, w += vecs * LANES) {
    vec wv[VECS];
    EACH(v, vecs) wv[v] = load(w + v * LANES);
    EACH(r, rows) {
      const vec xv = splat(x.at[r * x.apart + i]);
      EACH(v, vecs) sum[r][v] += xv * wv[v];
    }
  }
  EACH(r, rows) EACH(v, vecs) store(y.at + r * y.apart + v * LANES, sum[r][v]);
}

static void product(int rows, int in, int out, From x, const float *w, int adds, To y) {
  for (int column = 0; column < out; column += PANEL, w += (long)in * PANEL)
    for (int r = 0, taken; r < rows; r += taken) {
      const From from = {x.at + r * x.apart, x.apart};
      const To to = {y.at + r * y.apart + column, y.apart};
      taken = rows - r >= ROWS ? ROWS : rows - r >= 2 ? 2 : 1;
#define CASES(V)                                                    \
  case V:                                                           \
    if (taken == ROWS) tile(ROWS, V, in, from, w, adds, to);        \
    else if (taken == 2) tile(2, V, in, from, w, adds, to);         \
    else tile(1, V, in, from, w, adds, to);                         \
    break;
      switch (out - column < PANEL ? (out - column) / LANES : VECS) {
        CASES(1) CASES(2)
#if VECS > 2
        CASES(3) CASES(4)
#endif
      }
#undef CASES
    }
}

// sums (count, PANEL) += the outer products of x (slot, row, count) and dg (slot, row, PANEL), over slots and rows;
// `slot` is how far x of a slot lies from that of the one before. These sums are added up by themselves first: in a sum
// of tens of thousands each would be rounded to the last place of the whole.
INLINE void outer_tile(const int count, int slots, long slot, int rows, From x, From dg, To sums) {
  vec sum[ROWS][VECS];
  EACH(i, count) EACH(v, VECS) sum[i][v] = splat(0);
  for (int k = 0; k < slots; k++, x.at += slot) {
    const float *xr = x.at;
    for (int r = 0; r < rows; r++, dg.at += dg.apart, xr += x.apart) {
      vec gv[VECS];
      EACH(v, VECS) gv[v] = load(dg.at + v * LANES);
      EACH(i, count) {
        const vec xv = splat(xr[i]);
        EACH(v, VECS) sum[i][v] += xv * gv[v];
      }
    }
  }
  EACH(i, count) EACH(v, VECS) {
    float *to = sums.at + i * sums.apart + v * LANES;
    store(to, load(to) + sum[i][v]);
  }
}

static void outer(int count, int slots, long slot, int rows, From x, From dg, float *sums, long gates) {
  for (int column = 0; column < gates; column += PANEL)
    for (int i = 0, taken; i < count; i += taken) {
      const From xi = {x.at + i, x.apart}, columns = {dg.at + column, dg.apart};
      const To to = {sums + i * gates + column, gates};
      taken = count - i >= ROWS ? ROWS : count - i >= 2 ? 2 : 1;
      if (taken == ROWS) outer_tile(ROWS, slots, slot, rows, xi, columns, to);
      else if (taken == 2) outer_tile(2, slots, slot, rows, xi, columns, to);
      else outer_tile(1, slots, slot, rows, xi, columns, to);
    }
}

// From the gradients of a step's outputs and cells to those of its gates and of the cells before; bias: their sums.
INLINE void gates_gradient(const Shape *s, int rows, const float *gates, From y, From dy, From before, float *dh,
                           float *dc, float *dg, float *bias) {
  const int H = s->hidden, D = s->directions;
  for (int j = 0; j < H; j += LANES) {
    vec sums[4];
    EACH(g, 4) sums[g] = splat(0);
    for (int r = 0; r < rows; r++) {
      const float *p = gates + r * apart(s) * D * 4 * H + 4 * j;
      const vec in = load(p), forget = load(p + LANES), candidate = load(p + 2 * LANES), out = load(p + 3 * LANES);
      const vec squashed = load(y.at + r * y.apart + j) * reciprocal(out);  // tanh of the cell
      const vec output = load(dy.at + r * dy.apart + j) + load(dh + (long)r * H + j);
      const vec cell = load(dc + (long)r * H + j) + output * out * (1.0f - squashed * squashed);
      vec then = {};
      if (before.at) then = load(before.at + r * before.apart + j);
      vec d[4];
      d[0] = cell * candidate * in * (1.0f - in);
      d[1] = cell * then * forget * (1.0f - forget);
      d[2] = cell * in * (1.0f - candidate * candidate);
      d[3] = output * squashed * out * (1.0f - out);
      store(dc + (long)r * H + j, cell * forget);
      EACH(g, 4) store(dg + (long)r * 4 * H + 4 * j + g * LANES, d[g]), sums[g] += d[g];
    }
    EACH(g, 4) store(bias + 4 * j + g * LANES, load(bias + 4 * j + g * LANES) + sums[g]);
  }
}

// The gates' gradients of the units beyond the model's to 0: an infinite one times a weight of zero makes them NaN, and
// they times weights of zero those of the model's units.
static void clear_filling(const Shape *s, int rows, float *dg) {
  const int filling = s->hidden - s->units;  // fewer than LANES
  for (int r = 0; filling && r < rows; r++)
    for (float *p = dg + (r + 1) * gates_of(s) - CELL, *end = p + CELL; p < end; p += LANES)
      memset(p + LANES - filling, 0, sizeof(float) * filling);
}

// x to gates: as lstm_forward had and made them. dy: as y. dh, dc: (direction, row, hidden), of the last outputs and
// cells before and of h0 and c0 after. dx: (position, padded inputs). gradients: of ih, hh and of either bias.
void lstm_backward(const Shape *s, const Weights *weights, const float *x, const float *h0, const float *c0,
                   const float *y, const float *cells, const float *gates, const float *dy, float *dh, float *dc,
                   float *dx, float *const *gradients, float *scratch) {
  const int H = s->hidden, I = s->inputs, D = s->directions, width = padded(I);
  const long G = gates_of(s), per_direction = s->parts * gradient_size(s);
  float *sums = scratch + D * transposed_size(s), *near = sums + D * per_direction;
  for (int d = 0; d < D; d++) {
    float *to = pack_transposed(s, weights[d].ih, I, scratch + d * transposed_size(s));
    pack_transposed(s, weights[d].hh, s->units, to);
  }
#pragma omp parallel for schedule(static, 1) num_threads(s->parts)
  for (int part = 0; part < s->parts; part++)
    for (int d = 0; d < D; d++) {
      const float *to_inputs = scratch + d * transposed_size(s), *to_hidden = to_inputs + G * width;
      float *sum = sums + d * per_direction + part * gradient_size(s), *all = near + part * DEPTH * BLOCK * G;
      memset(sum, 0, sizeof(float) * gradient_size(s));
      for (int start = first_row(s, part), end = first_row(s, part + 1); start < end; start += BLOCK) {
        const int rows = start + BLOCK < end ? BLOCK : end - start;
        const long zero = ((long)d * s->rows + start) * H, stride = apart(s) * D * H;
        const From first = {h0 ? h0 + zero : NULL, H};
        int slots = 0;
        for (int n = s->steps - 1; n >= 0; n--) {
          const int t = d ? s->steps - 1 - n : n, last = d ? t + 1 : t - 1, back = d ? 1 : -1;
          const long now = place(s, t, start), then = place(s, last, start);
          const From before = n ? (From){cells + (then * D + d) * H, stride} : (From){c0 ? c0 + zero : NULL, H};
          float *dg = all + (long)slots * rows * G;
          gates_gradient(s, rows, gates + (now * D + d) * G, (From){y + (now * D + d) * H, stride},
                         (From){dy + (now * D + d) * H, stride}, before, dh + zero, dc + zero, dg, sum + inner(s) * G);
          clear_filling(s, rows, dg);
          const To to_x = {dx + now * width, apart(s) * width};
          product(rows, G, width, (From){dg, G}, to_inputs, d, to_x);
          if (n || h0) product(rows, G, H, (From){dg, G}, to_hidden, 0, (To){dh + zero, H});
          if (++slots < DEPTH && n) continue;
          // A slot is a step earlier than the one before; the last of all steps has h0 for the outputs before it.
          const int earliest = back * (slots - 1), with_y = n ? slots : slots - 1;
          const long step = back * (s->rows_first ? 1L : s->rows);
          const From xs = {x + place(s, t - earliest, start) * I, apart(s) * I};
          const From hs = {y + (place(s, last - earliest, start) * D + d) * H, stride};
          outer(I, slots, step * I, rows, xs, (From){all, G}, sum, G);
          if (with_y) outer(s->units, with_y, step * D * H, rows, hs, (From){all, G}, sum + I * G, G);
          if (!n && h0) outer(s->units, 1, 0, rows, first, (From){dg, G}, sum + I * G, G);
          slots = 0;
        }
      }
    }
  for (int d = 0; d < D; d++)
    unpack(s, sums + d * per_direction, gradients[3 * d], gradients[3 * d + 1], gradients[3 * d + 2]);
}
