// linear in all modes, on packed weights: panels of 64 outputs, each [in][width], so that the vectors run over outputs,
// a panel is one stream of memory, and the weight gradient is an outer product in the same layout. bwd_input transposes
// 64 x 64 pieces of the panel on the way, but where somebody has packed the weight's transpose for all tasks. Heads of
// few outputs lie the other way round: linear_narrow.h.
#include "linear_narrow.h"

namespace fastmaml {
namespace FASTMAML_ISA {

// y = act(b + x1 w1^T + x2 w2^T), a share of the output columns
static void forward(const Call& c, const float* x1, int64_t ld1, const float* w1, const float* x2, int64_t ld2,
                    const float* w2, const float* b, float* y, int64_t ldy, const Activation& act) {
    const int64_t in = c.sizes[0], out = c.sizes[1];
    if (is_narrow(out)) {
        const int64_t ldw = pad_lane(in);
        const Pair pairs[2] = {{w1 ? x1 : x2, w1 ? ld1 : ld2, w1 ? w1 : w2, ldw}, {x2, ld2, w2, ldw}};
        return narrow_forward(c, pairs, (w1 != nullptr) + (w2 != nullptr), b, y, ldy, act);
    }
    const Share s = share(pad_lane(out) / kLane, c);
    for (int64_t o = s.begin * kLane; o < s.end * kLane;) {
        const int64_t panel = o / kPanel, width = packed_width(panel, out);
        int64_t stop = panel * kPanel + width;
        if (stop > s.end * kLane) stop = s.end * kLane;
        const int64_t at = panel * kPanel * in + o % kPanel;
        Pair pairs[2] = {};
        int np = 0;
        if (w1) pairs[np++] = {x1, ld1, w1 + at, width};
        if (w2) pairs[np++] = {x2, ld2, w2 + at, width};
        product(c.n, (stop < out ? stop : out) - o, pairs, np, in, y + o, ldy, b ? b + o : nullptr, 0, act.at(0, o));
        o = stop;
    }
}

void linear_fwd(const Call& c) {
    forward(c, c.f(0), c.stride(0), c.f(1), nullptr, 0, nullptr, c.f(2), c.f(3), c.stride(3), activation_of(c, 4));
}

void linear_jvp(const Call& c) {
    const float *x = c.f(0), *w = c.f(1), *xt = c.f(2), *wt = c.f(3);
    forward(c, xt, c.stride(2), xt ? w : nullptr, x, c.stride(0), wt, c.f(4), c.f(5), c.stride(5), activation_of(c, 6));
}

// ---------------------------------------------------------------------------------------------------- bwd_input
// The outputs [o, o + outs) of the inputs [k, k + cols) of a weight, the other way round: transposed into `piece`, or
// where somebody has done it for all tasks
struct Turned {
    const float* w;
    int64_t ldw;
};

static inline Turned turn(const Call& c, const float* w, int64_t k, int64_t cols, int64_t o, int64_t outs,
                          float* piece) {
    const int64_t in = c.sizes[0], width = packed_width(o / kPanel, c.sizes[1]);
    transpose_piece(w + o * in + k * width, width, in - k, cols, outs, piece);
    return {piece, cols};
}

static inline Turned turned_at(const Call& c, const float* turned, int64_t k, int64_t o) {
    const int64_t panel = k / kPanel, width = packed_width(panel, c.sizes[0]);
    return {turned + panel * kPanel * c.sizes[1] + o * width + k % kPanel, width};
}

// dx = act(dy w) and dxt = act(dyt w + dy wt), either of which may be unwanted (null): a share of the input columns, 64
// of them and 64 outputs at a time
static void backward_input(const Call& c, const float* dy, int64_t ldy, const float* w, const float* dyt, int64_t ldyt,
                           const float* wt, float* dx, int64_t ldx, float* dxt, int64_t ldxt, const Activation& act,
                           const float* turned) {
    const int64_t out = c.sizes[1];
    if (is_narrow(out)) {
        const int64_t ldw = pad_lane(c.sizes[0]);
        const Pair primal = {dy, ldy, w, ldw}, two[2] = {{dyt, ldyt, w, ldw}, {dy, ldy, wt, ldw}};
        if (dx) narrow_input<kNarrow>(c, &primal, 1, dx, ldx, act);
        if (dxt) narrow_input<kNarrow>(c, dyt ? two : two + 1, (dyt != nullptr) + (wt != nullptr), dxt, ldxt, act);
        return;
    }
    const Share s = share(pad_lane(c.sizes[0]) / kLane, c);
    alignas(64) float pieces[2][kPanel * kPanel];
    for (int64_t k = s.begin * kLane, stop; k < s.end * kLane; k = stop) {
        stop = (k / kPanel + 1) * kPanel < s.end * kLane ? (k / kPanel + 1) * kPanel : s.end * kLane;
        const int64_t cols = stop - k, real = (stop < c.sizes[0] ? stop : c.sizes[0]) - k;
        for (int64_t o = 0; o < out; o += kPanel) {
            const int64_t outs = out - o < kPanel ? out - o : kPanel;
            const Activation done = o + outs == out ? act.at(0, k) : kLinear;
            Turned right{};
            if (dx || (dxt && dyt))
                right = turned ? turned_at(c, turned, k, o) : turn(c, w, k, cols, o, outs, pieces[0]);
            if (dx) {
                const Pair primal = {dy + o, ldy, right.w, right.ldw};
                product(c.n, real, &primal, 1, outs, dx + k, ldx, o ? dx + k : nullptr, ldx, done);
            }
            Pair pairs[2] = {};
            int n = 0;
            if (dxt && dyt) pairs[n++] = {dyt + o, ldyt, right.w, right.ldw};
            if (dxt && wt) pairs[n++] = {dy + o, ldy, turn(c, wt, k, cols, o, outs, pieces[1]).w, cols};
            if (dxt) product(c.n, real, pairs, n, outs, dxt + k, ldxt, o ? dxt + k : nullptr, ldxt, done);
        }
    }
}

void linear_bwd_input(const Call& c) {
    backward_input(c, c.f(0), c.stride(0), c.f(1), nullptr, 0, nullptr, c.f(2), c.stride(2), nullptr, 0,
                   activation_of(c, 3), c.f(4));
}

void linear_bwd_input_jvp(const Call& c) {
    backward_input(c, c.f(0), c.stride(0), c.f(1), c.f(2), c.stride(2), c.f(3), nullptr, 0, c.f(4), c.stride(4),
                   activation_of(c, 5), c.f(6));
}

void linear_bwd_input_both(const Call& c) {
    backward_input(c, c.f(0), c.stride(0), c.f(1), c.f(2), c.stride(2), c.f(3), c.f(4), c.stride(4), c.f(5),
                   c.stride(5), activation_of(c, 6), c.f(7));
}

// ---------------------------------------------------------------------------------------------------- bwd_weight
// Rows of dy that stay in L1 while all of dw is walked. They are copied together first: rows 1 KB apart would share a
// quarter of its sets. Sums over more rows are made of such pieces, and are not added to anything in place (an epilogue
// whose base is the result itself): cpu/fusion.py knows the number.
static constexpr int64_t kDeep = 96;

// The same for few outputs, a few vectors of inputs at a time
static void narrow_weight(const Call& c, const Outer* terms, int n_terms, float* dw, const float* base, float scale) {
    const int64_t in = c.sizes[0], out = c.sizes[1], ldw = pad_lane(in);
    const Share s = share(ldw / kLane, c);
    for (int64_t k = s.begin * kLane, vectors; k < s.end * kLane; k += vectors * VL) {
        vectors = (s.end * kLane - k) / VL;
        if (vectors > narrow_vectors(out)) vectors = narrow_vectors(out);
        while (vectors > 1 && k + (vectors - 1) * VL > in) --vectors;  // all but the last are whole
        int64_t r = 0;
        do {
            const bool deep = n_terms == 1 && c.n >= kDeep / 2;
            const int64_t rows = deep && c.n - r > kDeep ? kDeep : c.n - r;
            const bool fused = base && c.last && r + rows == c.n;
            Outer here[2];
            for (int t = 0; t < n_terms; ++t)
                here[t] = {terms[t].x + r * terms[t].ldx + k, terms[t].ldx, terms[t].d + r * terms[t].ldd,
                           terms[t].ldd};
            const Epilogue e = {c.first || deep ? nullptr : dw + k, deep && (r > 0 || !c.first) ? dw + k : nullptr,
                                fused ? base + k : nullptr, fused ? scale : 1.f};
            narrow_outer(out, vectors, here, n_terms, rows, in - k, dw + k, ldw, e);
            r += rows;
        } while (r < c.n);
    }
}

// dw (or its epilogue), a share of the input rows of the packed weight
static void backward_weight(const Call& c, const Outer* terms, int n_terms, float* dw, const float* base, float scale) {
    const int64_t in = c.sizes[0], out = c.sizes[1];
    if (is_narrow(out)) return narrow_weight(c, terms, n_terms, dw, base, scale);
    const Share s = share(in, c);
    alignas(64) float together[kDeep * kPanel];
    for (int64_t panel = 0; panel * kPanel < out; ++panel) {
        const int64_t width = packed_width(panel, out);
        for (int64_t o = 0; o < width; o += kCols * VL) {
            const int64_t at = panel * kPanel * in + s.begin * width + o;
            const int64_t cols = width - o < kCols * VL ? width - o : kCols * VL, left = out - panel * kPanel - o;
            int64_t r = 0;
            do {  // once even for no rows: the sum is zero then
                const bool deep = n_terms == 1 && c.n >= kDeep / 2;
                const int64_t rows = deep && c.n - r > kDeep ? kDeep : c.n - r;
                const bool fused = base && c.last && r + rows == c.n;
                Outer here[2];
                for (int t = 0; t < n_terms; ++t)
                    here[t] = {terms[t].x + r * terms[t].ldx + s.begin, terms[t].ldx,
                               terms[t].d + r * terms[t].ldd + panel * kPanel + o, terms[t].ldd};
                if (deep) {
                    for (int64_t i = 0; i < rows; ++i)
                        for (int64_t v = 0; v < cols; v += VL)
                            store(together + i * cols + v, load(here[0].d + i * here[0].ldd + v));
                    here[0].d = together, here[0].ldd = cols;
                }
                const bool sum = deep && (r > 0 || !c.first);
                const Epilogue e = {c.first || deep ? nullptr : dw + at, sum ? dw + at : nullptr,
                                    fused ? base + at : nullptr, fused ? scale : 1.f};
                outer_columns(without_padding(cols, left), s.end - s.begin, here, n_terms, rows, dw + at, width, e);
                r += rows;
            } while (r < c.n);
        }
    }
}

// V vectors of db, or of base + scale db
template <int V>
static inline void bias_tile(int64_t n, bool first, const float* d, int64_t ldd, float* db, const float* base,
                             float scale) {
    vec acc[V], chain[V];
    for (int v = 0; v < V; ++v) acc[v] = first ? vec{} : load(db + v * VL);
    for (int64_t i = 0; i < n;) {
        const int64_t stop = n - i > kDeep ? i + kDeep : n;
        for (int v = 0; v < V; ++v) chain[v] = i == 0 ? acc[v] : vec{};
        for (; i < stop; ++i)
            for (int v = 0; v < V; ++v) chain[v] += load(d + i * ldd + v * VL);
        for (int v = 0; v < V; ++v) acc[v] = stop <= kDeep ? chain[v] : acc[v] + chain[v];
    }
    for (int v = 0; v < V; ++v) store(db + v * VL, base ? fma(splat(scale), acc[v], load(base + v * VL)) : acc[v]);
}

static void backward_bias(const Call& c, const float* d, int64_t ldd, float* db, const float* base, float scale) {
    const Share s = share(pad_lane(c.sizes[1]) / kLane, c);
    const float* from = c.last ? base : nullptr;
    const auto tile = [&](auto vectors, int64_t o) {
        bias_tile<vectors()>(c.n, c.first, d + o, ldd, db + o, from ? from + o : nullptr, scale);
    };
    for (int64_t o = s.begin * kLane, left; o < s.end * kLane; o += 4 * VL) {
        left = (s.end * kLane - o) / VL;
        if (left >= 4)
            tile(std::integral_constant<int, 4>(), o);
        else if (left == 3)
            tile(std::integral_constant<int, 3>(), o);
        else if (left == 2)
            tile(std::integral_constant<int, 2>(), o);
        else
            tile(std::integral_constant<int, 1>(), o);
    }
}

static float signed_scale(const Call& c, int number, int scale) {
    return c.numbers[number] * (c.f(scale) ? *c.f(scale) : 1.f);
}

void linear_bwd_weight(const Call& c) {
    const Outer term = {c.f(0), c.stride(0), c.f(1), c.stride(1)};
    if (c.f(2)) backward_weight(c, &term, 1, c.f(2), c.f(4), signed_scale(c, 0, 5));
    if (c.f(3)) backward_bias(c, c.f(1), c.stride(1), c.f(3), c.f(6), signed_scale(c, 1, 7));
}

void linear_bwd_weight_jvp(const Call& c) {
    const float *x = c.f(0), *dy = c.f(1), *xt = c.f(2), *dyt = c.f(3);
    Outer terms[2];
    int n = 0;
    if (dyt) terms[n++] = {x, c.stride(0), dyt, c.stride(3)};
    if (xt && dy) terms[n++] = {xt, c.stride(2), dy, c.stride(1)};
    if (c.f(4)) backward_weight(c, terms, n, c.f(4), c.f(6), signed_scale(c, 0, 7));
    if (c.f(5)) backward_bias(c, dyt, c.stride(3), c.f(5), c.f(8), signed_scale(c, 1, 9));
}

void row_sum_bwd(const Call& c) { backward_bias(c, c.f(0), c.stride(0), c.f(1), nullptr, 1.f); }

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
