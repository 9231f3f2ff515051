// linear with few outputs: the weight lies as the model has it, [out][in] with padded rows (plan.h), and the vectors
// run over the inputs. A head of one output then costs a sixteenth of what it would in a panel, and nothing is
// transposed.
#pragma once
#include "linear_tiles.h"

namespace fastmaml {
namespace FASTMAML_ISA {

// Four elements of y: of the rows from r on (`Rows`), or of the outputs from o on; where fewer are `left`, the last one
// again. Two chains each.
template <bool Rows>
static inline quad four_dots(const Pair* pairs, int n_pairs, int64_t in, int64_t r, int64_t o, int64_t left) {
    constexpr int kX = Rows ? 4 : 1, kW = Rows ? 1 : 4;  // rows of x and of w: there is one of either
    vec acc[4][2] = {};
    for (int p = 0; p < n_pairs; ++p) {
        const float *x[kX], *w[kW];
#pragma GCC unroll 4
        for (int i = 0; i < kX; ++i) x[i] = pairs[p].x + (r + (i < left ? i : left - 1)) * pairs[p].ldx;
#pragma GCC unroll 4
        for (int i = 0; i < kW; ++i) w[i] = pairs[p].w + (o + (Rows ? 0 : i < left ? i : left - 1)) * pairs[p].ldw;
        int64_t k = 0;
        for (; k + 2 * VL <= in; k += 2 * VL)
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                const float *xi = x[Rows ? i : 0], *wi = w[Rows ? 0 : i];
                acc[i][0] = fma(load(xi + k), load(wi + k), acc[i][0]);
                acc[i][1] = fma(load(xi + k + VL), load(wi + k + VL), acc[i][1]);
            }
#pragma GCC unroll 2
        for (int chain = 0; chain < 2; ++chain, k += VL) {
            if (k >= in) break;
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i)
                acc[i][chain] = fma(load_part(x[Rows ? i : 0] + k, in - k), load(w[Rows ? 0 : i] + k), acc[i][chain]);
        }
    }
    return sum_lanes(acc[0][0] + acc[0][1], acc[1][0] + acc[1][1], acc[2][0] + acc[2][1], acc[3][0] + acc[3][1]);
}

// y = act(b + sum over pairs of x w^T); the rows of x may be unpadded
static void narrow_forward(const Call& c, const Pair* pairs, int n_pairs, const float* b, float* y, int64_t ldy,
                           const Activation& act) {
    const int64_t in = c.sizes[0], out = c.sizes[1], n = c.n;
    if (c.part != 0) return;  // one vector of outputs: nothing to share
    const quad zero = {};
    if (out == 1) {
        const float bias = b ? *b : 0.f;
        for (int64_t r = 0; r < n; r += 4) {
            const quad sums = four_dots<true>(pairs, n_pairs, in, r, 0, n - r) + bias;
            float* row = y + r * ldy;
            store_lane(row, __builtin_shuffle(sums, zero, iquad{0, 4, 4, 4}), zero);
            if (r + 1 < n) store_lane(row + ldy, __builtin_shuffle(sums, zero, iquad{1, 4, 4, 4}), zero);
            if (r + 2 < n) store_lane(row + 2 * ldy, __builtin_shuffle(sums, zero, iquad{2, 4, 4, 4}), zero);
            if (r + 3 < n) store_lane(row + 3 * ldy, __builtin_shuffle(sums, zero, iquad{3, 4, 4, 4}), zero);
        }
    } else {
        quad bias[2] = {}, kept[2] = {};  // of outputs beyond the last, zero
        for (int64_t o = 0; o < out; ++o) bias[o / 4][o % 4] = b ? b[o] : 0.f, kept[o / 4][o % 4] = 1.f;
        for (int64_t r = 0; r < n; ++r) {
            quad sums[2] = {};
            for (int64_t o = 0; o < out; o += 4) {
                const quad four = four_dots<false>(pairs, n_pairs, in, r, o, out - o) + bias[o / 4];
                sums[o / 4] = (quad)((iquad)four & (kept[o / 4] > zero));
            }
            store_lane(y + r * ldy, sums[0], sums[1]);
        }
    }
    if (act.gate == Gate::kNone) return;
    for (int64_t r = 0; r < n; ++r)
        for (int64_t o = 0; o < kLane; o += VL) store(y + r * ldy + o, act(load(y + r * ldy + o), r, o));
}

// dx = act(sum over pairs of dy w), a share of the inputs; x of a pair is dy
template <int O, int P, Gate G>
static inline void narrow_input_of(const Pair* pairs, int64_t begin, int64_t end, int64_t n, float* dx, int64_t ldx,
                                   const Activation act) {  // a copy: no store can change it
    const float* dy[P];
    int64_t ldd[P];
    for (int p = 0; p < P; ++p) dy[p] = pairs[p].x, ldd[p] = pairs[p].ldx;
    for (int64_t k = begin; k < end; k += VL) {
        vec w[P][O];
        for (int p = 0; p < P; ++p)
            for (int o = 0; o < O; ++o) w[p][o] = load(pairs[p].w + o * pairs[p].ldw + k);
        for (int64_t r = 0; r < n; ++r) {
            vec acc{};
            for (int p = 0; p < P; ++p)
                for (int o = 0; o < O; ++o) acc = fma(splat(dy[p][r * ldd[p] + o]), w[p][o], acc);
            store(dx + r * ldx + k, act.apply<G>(acc, r, k));
        }
    }
}

template <int O>
static void narrow_input(const Call& c, const Pair* pairs, int n_pairs, float* dx, int64_t ldx, const Activation& act) {
    if constexpr (O > 1)
        if (c.sizes[1] < O) return narrow_input<O - 1>(c, pairs, n_pairs, dx, ldx, act);
    const Share s = share(pad_lane(c.sizes[0]) / kLane, c);
    const int64_t begin = s.begin * kLane, end = s.end * kLane;
    with_gate(act.gate, [&](auto gate) {
        if (n_pairs == 1)
            narrow_input_of<O, 1, gate()>(pairs, begin, end, c.n, dx, ldx, act);
        else
            narrow_input_of<O, 2, gate()>(pairs, begin, end, c.n, dx, ldx, act);
    });
}

// V vectors of inputs of dw (or its epilogue) over n rows of the batch; `left`: inputs from here on, of which only the
// last vector may have too few
template <int O, int V>
static inline void narrow_outer_tile(const Outer* terms, int n_terms, int64_t n, int64_t left, float* dw, int64_t ldw,
                                     const Epilogue& e) {
    vec acc[O][V];
    for (int o = 0; o < O; ++o)
        for (int v = 0; v < V; ++v) acc[o][v] = e.from ? load(e.from + o * ldw + v * VL) : vec{};
    for (int t = 0; t < n_terms; ++t) {
        const float *row = terms[t].x, *d = terms[t].d;
        for (int64_t i = 0; i < n; ++i, row += terms[t].ldx, d += terms[t].ldd) {
            vec x[V];
            for (int v = 0; v < V - 1; ++v) x[v] = load(row + v * VL);
            x[V - 1] = load_part(row + (V - 1) * VL, left - (V - 1) * VL);
            for (int o = 0; o < O; ++o)
                for (int v = 0; v < V; ++v) acc[o][v] = fma(splat(d[o]), x[v], acc[o][v]);
        }
    }
    for (int o = 0; o < O; ++o)
        for (int v = 0; v < V; ++v) {
            const int64_t at = o * ldw + v * VL;
            const vec sum = e.plus ? load(e.plus + at) + acc[o][v] : acc[o][v];
            store(dw + at, e.base ? fma(splat(e.scale), sum, load(e.base + at)) : sum);
        }
}

static constexpr int narrow_vectors(int64_t out) { return out <= 2 ? 4 : out <= 4 ? 2 : 1; }

template <int O = kNarrow, int V = narrow_vectors(O)>
static void narrow_outer(int64_t out, int64_t vectors, const Outer* terms, int n_terms, int64_t n, int64_t left,
                         float* dw, int64_t ldw, const Epilogue& e) {
    if constexpr (O > 1)
        if (out < O) return narrow_outer<O - 1>(out, vectors, terms, n_terms, n, left, dw, ldw, e);
    if constexpr (V > 1)
        if (vectors < V) return narrow_outer<O, V - 1>(out, vectors, terms, n_terms, n, left, dw, ldw, e);
    narrow_outer_tile<O, V>(terms, n_terms, n, left, dw, ldw, e);
}

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
