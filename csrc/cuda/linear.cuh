// linear in all modes, on packed weights (plan.h): [in][outputs of a panel], so that neighbouring threads read
// neighbouring outputs. A thread makes one output of up to kTile rows, which share what it reads of the weight. Heads
// of few outputs lie the other way round, [out][in]: there the lanes of a warp share the sum over the inputs.
#pragma once
#include "call.cuh"

namespace fastmaml {
namespace cuda {

constexpr int kTile = 4, kChain = 64;  // rows of a thread; terms that are added without a break

struct Factor {  // x [n, in] and a packed weight, or nothing
    const Place* x;
    const float* w;
    FM_DEVICE const float* row(int r) const { return reinterpret_cast<const float*>(x->at + r * x->row_stride); }
};

FM_DEVICE Factor factor(const Call& c, int x, int w) {
    const bool there = c.has(x) && c.has(w);
    return {c.operands + x, there ? c.f(w) : nullptr};
}

struct Column {  // of a packed weight that is not narrow: the elements of one output
    int offset, step;
    FM_DEVICE Column(int o, int in, int out)
        : offset(o / static_cast<int>(kPanel) * static_cast<int>(kPanel) * in + o % static_cast<int>(kPanel)),
          step(static_cast<int>(packed_width(o / kPanel, out))) {}
};

// acc[i] += sum over k of x[rows i][k] w[k]
template <int R>
FM_DEVICE void add_dots(const Factor& p, int row, const Column& column, int in, float* acc) {
    const float* w = p.w + column.offset;
    const float* x[R];
    for (int i = 0; i < R; ++i) x[i] = p.row(row + i);
    for (int k0 = 0; k0 < in; k0 += kChain) {
        const int stop = in - k0 < kChain ? in : k0 + kChain;
        float chain[R] = {};
        FM_UNROLL
        for (int k = k0; k < stop; ++k) {
            const float v = w[k * column.step];
            for (int i = 0; i < R; ++i) chain[i] = fmaf(x[i][k], v, chain[i]);
        }
        for (int i = 0; i < R; ++i) acc[i] += chain[i];
    }
}

template <int R>
FM_DEVICE void forward_tile(const Call& c, const Factor& p, const Factor& q, const float* bias, int y, const Gate& act,
                            int row, int o) {
    const int in = c.size(0), out = c.size(1);
    const Column column(o, in, out);
    float acc[R];
    for (int i = 0; i < R; ++i) acc[i] = bias ? bias[o] : 0.f;
    if (p.w) add_dots<R>(p, row, column, in, acc);
    if (q.w) add_dots<R>(q, row, column, in, acc);
    for (int i = 0; i < R; ++i) c.row(y, row + i)[o] = act(acc[i], row + i, o);
}

// f(first row, column, how many rows: a constant) over tiles of rows
template <class F>
FM_DEVICE void each_tile(const Call& c, int columns, F f) {
    const int rows = c.last - c.first, tiles = (rows + kTile - 1) / kTile;
    FM_ROLLED
    for (int i = c.mine; i < tiles * columns; i += c.gang) {
        const int row = i / columns * kTile;
        f(c.first + row, i % columns, rows - row < kTile ? rows - row : kTile);
    }
}

// y = act(b + x1 w1^T + x2 w2^T)
FM_DEVICE void forward(const Call& c, const Factor& p, const Factor& q, int b, int y, int mask) {
    const int in = c.size(0), out = c.size(1);
    const Gate act(c, mask);
    const float* bias = c.f(b);
    if (!is_narrow(out))
        return each_tile(c, padded(out), [&](int row, int o, int rows) {
            if (rows == kTile) return forward_tile<kTile>(c, p, q, bias, y, act, row, o);
            for (int i = 0; i < rows; ++i) forward_tile<1>(c, p, q, bias, y, act, row + i, o);
        });
    const int ldw = padded(in), lane = c.lane();
    each_row(c, [&](int r) {
        for (int o = 0; o < out; ++o) {
            float sum = 0.f;
            for (int k = lane; p.w && k < in; k += kWarp) sum = fmaf(p.row(r)[k], p.w[o * ldw + k], sum);
            for (int k = lane; q.w && k < in; k += kWarp) sum = fmaf(q.row(r)[k], q.w[o * ldw + k], sum);
            sum = c.b.warp_sum(sum);
            if (lane == 0) c.row(y, r)[o] = act(bias ? sum + bias[o] : sum, r, o);
        }
        if (lane >= out && lane < kLane) c.row(y, r)[lane] = act(0.f, r, lane);
    });
}

FM_DEVICE void linear_fwd(const Call& c) { forward(c, factor(c, 0, 1), {c.operands, nullptr}, 2, 3, 4); }
FM_DEVICE void linear_jvp(const Call& c) { forward(c, factor(c, 2, 1), factor(c, 0, 3), 4, 5, 6); }

struct alignas(16) Four {
    float v[4];
};

// acc[i] += sum over o of dy[rows i][o] w[o][k]. The outputs of an input lie together, those of the next thread's input
// a whole row further, in the same bank: so each thread begins at another place and goes round.
template <int R>
FM_DEVICE void add_columns(const Factor& p, int row, int k, int in, int out, float* acc) {
    for (int o = 0; o < out; o += static_cast<int>(kPanel)) {
        const int width = static_cast<int>(packed_width(o / kPanel, out)), fours = width / 4;
        const Four* w = reinterpret_cast<const Four*>(p.w + o * in + k * width);
        float chain[R] = {};
        FM_ROLLED
        for (int j = 0, at = k % fours; j < fours; ++j, at = at + 1 == fours ? 0 : at + 1) {
            const Four v = w[at];
            for (int i = 0; i < R; ++i) {
                const Four d = reinterpret_cast<const Four*>(p.row(row + i) + o)[at];
                for (int e = 0; e < 4; ++e) chain[i] = fmaf(d.v[e], v.v[e], chain[i]);
            }
        }
        for (int i = 0; i < R; ++i) acc[i] += chain[i];
    }
}

FM_DEVICE float narrow_column(const Factor& p, int row, int k, int ldw, int out) {
    float sum = 0.f;
    for (int o = 0; o < out; ++o) sum = fmaf(p.row(row)[o], p.w[o * ldw + k], sum);
    return sum;
}

template <int R>
FM_DEVICE void backward_tile(const Call& c, const Factor& p, const Factor& q, int dx, const Gate& act, int row, int k) {
    const int in = c.size(0), out = c.size(1), ldw = padded(in);
    float acc[R] = {};
    for (int i = 0; is_narrow(out) && i < R; ++i) {
        if (p.w) acc[i] = narrow_column(p, row + i, k, ldw, out);
        if (q.w) acc[i] += narrow_column(q, row + i, k, ldw, out);
    }
    if (p.w && !is_narrow(out) && k < in) add_columns<R>(p, row, k, in, out, acc);
    if (q.w && !is_narrow(out) && k < in) add_columns<R>(q, row, k, in, out, acc);
    for (int i = 0; i < R; ++i) c.row(dx, row + i)[k] = act(acc[i], row + i, k);
}

// dx = act(d1 w1 + d2 w2)
FM_DEVICE void backward_input(const Call& c, const Factor& p, const Factor& q, int dx, int mask) {
    const Gate act(c, mask);
    each_tile(c, padded(c.size(0)), [&](int row, int k, int rows) {
        if (rows == kTile) return backward_tile<kTile>(c, p, q, dx, act, row, k);
        for (int i = 0; i < rows; ++i) backward_tile<1>(c, p, q, dx, act, row + i, k);
    });
}

FM_DEVICE void linear_bwd_input(const Call& c) { backward_input(c, factor(c, 0, 1), {c.operands, nullptr}, 2, 3); }
FM_DEVICE void linear_bwd_input_jvp(const Call& c) { backward_input(c, factor(c, 2, 1), factor(c, 0, 3), 4, 5); }
FM_DEVICE void linear_bwd_input_both(const Call& c) {
    backward_input(c, factor(c, 0, 1), {c.operands, nullptr}, 4, 6);
    backward_input(c, factor(c, 2, 1), factor(c, 0, 3), 5, 6);
}

// ---------------------------------------------------------------------------------------------------- sums over rows
struct Outer {  // x^T d, or nothing
    const Place *x, *d;
    bool there;
    FM_DEVICE const float* x_row(int r) const { return reinterpret_cast<const float*>(x->at + r * x->row_stride); }
    FM_DEVICE const float* d_row(int r) const { return reinterpret_cast<const float*>(d->at + r * d->row_stride); }
};

FM_DEVICE Outer outer(const Call& c, int x, int d) { return {c.operands + x, c.operands + d, c.has(x) && c.has(d)}; }

template <int K>
FM_DEVICE void add_outer(const Outer& t, int rows, int k, int o, float* acc) {  // inputs k to k + K
    for (int r = 0; r < rows;) {
        const int stop = rows - r > kChain ? r + kChain : rows;
        float chain[K] = {};
        FM_UNROLL
        for (; r < stop; ++r) {
            const float d = t.d_row(r)[o];
            const float* x = t.x_row(r) + k;
            for (int i = 0; i < K; ++i) chain[i] = fmaf(x[i], d, chain[i]);
        }
        for (int i = 0; i < K; ++i) acc[i] += chain[i];
    }
}

struct Epilogue {  // out = base + scale sum, or the sum
    const float* base;
    float scale;
    FM_DEVICE float operator()(float sum, int i) const { return base ? fmaf(scale, sum, base[i]) : sum; }
};

FM_DEVICE Epilogue epilogue(const Call& c, int number, int base) {
    return {c.f(base), c.number(number) * c.scalar(base + 1, 1.f)};
}

template <int K>
FM_DEVICE void outer_tile(const Call& c, const Outer& p, const Outer& q, float* dw, const Epilogue& e, int k, int o,
                          int at, int step) {
    float acc[K] = {};
    if (p.there) add_outer<K>(p, c.n, k, o, acc);
    if (q.there) add_outer<K>(q, c.n, k, o, acc);
    for (int i = 0; i < K; ++i) dw[at + i * step] = e(acc[i], at + i * step);
}

FM_DEVICE void backward_weight(const Call& c, const Outer& p, const Outer& q, float* dw, const Epilogue& e) {
    const int in = c.size(0), out = c.size(1), tiles = (in + kTile - 1) / kTile;
    if (is_narrow(out)) {
        const int ldw = padded(in);
        return each(c, out * ldw, [&](int i) {
            if (i % ldw < in)
                outer_tile<1>(c, p, q, dw, e, i % ldw, i / ldw, i, 1);
            else
                dw[i] = e(0.f, i);
        });
    }
    each(c, tiles * padded(out), [&](int i) {
        const int k = i / padded(out) * kTile, o = i % padded(out);
        const Column column(o, in, out);
        if (k + kTile <= in)
            return outer_tile<kTile>(c, p, q, dw, e, k, o, column.offset + k * column.step, column.step);
        for (int j = k; j < in; ++j) outer_tile<1>(c, p, q, dw, e, j, o, column.offset + j * column.step, column.step);
    });
}

FM_DEVICE void backward_bias(const Call& c, int d, float* db, const Epilogue& e) {
    each(c, padded(c.size(1)),
         [&](int o) { db[o] = e(sum_terms(c.n, [&](int r, float sum) { return sum + c.row(d, r)[o]; }), o); });
}

FM_DEVICE void linear_bwd_weight(const Call& c) {
    if (c.has(2)) backward_weight(c, outer(c, 0, 1), {c.operands, c.operands, false}, c.f(2), epilogue(c, 0, 4));
    if (c.has(3)) backward_bias(c, 1, c.f(3), epilogue(c, 1, 6));
}

FM_DEVICE void linear_bwd_weight_jvp(const Call& c) {
    if (c.has(4)) backward_weight(c, outer(c, 0, 3), outer(c, 2, 1), c.f(4), epilogue(c, 0, 6));
    if (c.has(5)) backward_bias(c, 3, c.f(5), epilogue(c, 1, 8));
}

FM_DEVICE void row_sum_bwd(const Call& c) { backward_bias(c, 0, c.f(1), {nullptr, 1.f}); }

}  // namespace cuda
}  // namespace fastmaml
