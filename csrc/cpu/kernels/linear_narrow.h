// linear with few outputs: the weight lies as the model has it, [out][in] with padded rows (plan.h), and the vectors
// run over the inputs. A head of one output then costs a sixteenth of what it would in a panel, and nothing is
// transposed.
#pragma once
#include "linear_tiles.h"

namespace fastmaml {
namespace FASTMAML_ISA {

// y = act(b + sum over pairs of x w^T); the rows of x may be unpadded
static void narrow_forward(const Call& c, const Pair* pairs, int n_pairs, const float* b, float* y, int64_t ldy,
                           const Activation& act) {
    const int64_t in = c.sizes[0], out = c.sizes[1];
    if (c.part != 0) return;  // one vector of outputs: nothing to share
    for (int64_t r = 0; r < c.n; ++r) {
        float* row = y + r * ldy;
        for (int64_t o = 0; o < kLane; o += VL) store(row + o, vec{});
        for (int64_t o = 0; o < out; ++o) {
            vec acc[2] = {vec{}, vec{}};  // two chains
            for (int p = 0; p < n_pairs; ++p) {
                const float *x = pairs[p].x + r * pairs[p].ldx, *w = pairs[p].w + o * pairs[p].ldw;
                int64_t k = 0;
                for (; k + 2 * VL <= in; k += 2 * VL) {
                    acc[0] = fma(load(x + k), load(w + k), acc[0]);
                    acc[1] = fma(load(x + k + VL), load(w + k + VL), acc[1]);
                }
                for (int i = 0; k < in; k += VL, ++i) acc[i] = fma(load_part(x + k, in - k), load(w + k), acc[i]);
            }
            row[o] = (b ? b[o] : 0.f) + sum_lanes(acc[0] + acc[1]);
        }
        if (act.gate != Gate::kNone)
            for (int64_t o = 0; o < kLane; o += VL) store(row + o, act(load(row + o), r, o));
    }
}

// dx = act(sum over pairs of dy w), a share of the inputs; x of a pair is dy
template <int O>
static void narrow_input(const Call& c, const Pair* pairs, int n_pairs, float* dx, int64_t ldx, const Activation& act) {
    const int64_t out = c.sizes[1];
    if constexpr (O > 1)
        if (out < O) return narrow_input<O - 1>(c, pairs, n_pairs, dx, ldx, act);
    const Share s = share(pad_lane(c.sizes[0]) / kLane, c);
    for (int64_t k = s.begin * kLane; k < s.end * kLane; k += VL) {
        vec w[2][O];
        for (int p = 0; p < n_pairs; ++p)
            for (int o = 0; o < O; ++o) w[p][o] = load(pairs[p].w + o * pairs[p].ldw + k);
        for (int64_t r = 0; r < c.n; ++r) {
            vec acc{};
            for (int p = 0; p < n_pairs; ++p) {
                const float* d = pairs[p].x + r * pairs[p].ldx;
                for (int o = 0; o < O; ++o) acc = fma(splat(d[o]), w[p][o], acc);
            }
            store(dx + r * ldx + k, act(acc, r, k));
        }
    }
}

// One vector of inputs of dw (or its epilogue) over n rows of the batch; `left`: inputs from here on
template <int O>
static void narrow_outer(int64_t out, const Outer* terms, int n_terms, int64_t n, int64_t left, float* dw, int64_t ldw,
                         const Epilogue& e) {
    if constexpr (O > 1)
        if (out < O) return narrow_outer<O - 1>(out, terms, n_terms, n, left, dw, ldw, e);
    vec acc[O];
    for (int o = 0; o < O; ++o) acc[o] = e.from ? load(e.from + o * ldw) : vec{};
    for (int t = 0; t < n_terms; ++t)
        for (int64_t i = 0; i < n; ++i) {
            const vec x = load_part(terms[t].x + i * terms[t].ldx, left);
            const float* d = terms[t].d + i * terms[t].ldd;
            for (int o = 0; o < O; ++o) acc[o] = fma(splat(d[o]), x, acc[o]);
        }
    for (int o = 0; o < O; ++o) {
        const vec sum = e.plus ? load(e.plus + o * ldw) + acc[o] : acc[o];
        store(dw + o * ldw, e.base ? fma(splat(e.scale), sum, load(e.base + o * ldw)) : sum);
    }
}

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
