// linear in all modes, on packed weights: panels of 64 outputs, each [in][width], so that the vectors run over outputs,
// a panel is one stream of memory, and the weight gradient is an outer product in the same layout. bwd_input transposes
// 64 x 64 pieces of the panel on the way.
//
// Every output element is a sum of short chains of FMAs (kDepth products each: a single chain over 784 inputs loses
// half a digit against a blocked one) in a fixed order, whatever the tile, the block of rows or the team: bits do not
// depend on them.
#include "../simd.h"

namespace fastmaml {
namespace FASTMAML_ISA {

static constexpr int kCols = VL == 16 ? 4 : 2;  // vectors of a register tile: 6 x 4 zmm, or 6 x 2 ymm/xmm
static constexpr int kRows = 6;                 // its rows; narrow tiles are taller, to keep enough FMAs under way
static constexpr int rows_of(int vectors) {
    return vectors == 1 ? 12 : VL == 16 && vectors == 2 ? 12 : VL == 16 && vectors == 3 ? 8 : kRows;
}

static constexpr int64_t kDepth = 64;  // products in one chain; 64 x 64 weights are also what stays in L1 for all rows

struct Pair {  // one product x w of a sum of products; w is [k][ldw]
    const float* x;
    int64_t ldx;
    const float* w;
    int64_t ldw;
};

// y[R][C vectors] = init + sum over pairs of x w, in registers. init: one row for all (ld_init 0), a row each, or null
// for zero.
template <int R, int C>
static inline void tile(const Pair* pairs, int n_pairs, int64_t k, float* y, int64_t ldy, const float* init,
                        int64_t ld_init) {
    vec acc[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) acc[r][c] = vec{};
    for (int p = 0; p < n_pairs; ++p) {
        const float *x = pairs[p].x, *w = pairs[p].w;
        const int64_t ldx = pairs[p].ldx, ldw = pairs[p].ldw;
        for (int64_t i = 0; i < k; ++i, w += ldw) {
            vec b[C];
            for (int c = 0; c < C; ++c) b[c] = load(w + c * VL);
            for (int r = 0; r < R; ++r) {
                const vec a = splat(x[r * ldx + i]);
                for (int c = 0; c < C; ++c) acc[r][c] = fma(a, b[c], acc[r][c]);
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c)
            store(y + r * ldy + c * VL, init ? load(init + r * ld_init + c * VL) + acc[r][c] : acc[r][c]);
}

template <int R, int C>
static inline void tile_rows(int64_t rows, const Pair* p, int np, int64_t k, float* y, int64_t ldy, const float* init,
                             int64_t ldi) {
    if (rows >= R) return tile<R, C>(p, np, k, y, ldy, init, ldi);
    if constexpr (R > 1) tile_rows<R - 1, C>(rows, p, np, k, y, ldy, init, ldi);
}

// All rows of a column of tiles: full tiles, then what is left in one smaller tile.
template <int C>
static void column(int64_t n, const Pair* pairs, int n_pairs, int64_t k, float* y, int64_t ldy, const float* init,
                   int64_t ld_init) {
    constexpr int R = rows_of(C);
    for (int64_t r = 0; r < n;) {
        const int64_t left = n - r, rows = left >= R ? (left < 2 * R && left > R ? (left + 1) / 2 : R)
                                                     : left;  // 10 = 5 + 5, not 8 + 2
        Pair here[2];
        for (int p = 0; p < n_pairs; ++p)
            here[p] = {pairs[p].x + r * pairs[p].ldx, pairs[p].ldx, pairs[p].w, pairs[p].ldw};
        tile_rows<R, C>(rows, here, n_pairs, k, y + r * ldy, ldy, init ? init + r * ld_init : nullptr, ld_init);
        r += rows;
    }
}

// y[n][cols] = init + sum of pairs, for cols (a multiple of kLane) columns that lie together in w.
static void product(int64_t n, int64_t cols, const Pair* pairs, int n_pairs, int64_t k, float* y, int64_t ldy,
                    const float* init, int64_t ld_init) {
    for (int64_t c = 0; c < cols; c += kCols * VL) {
        const int vectors = static_cast<int>((cols - c < kCols * VL ? cols - c : kCols * VL) / VL);
        const float* from = init ? init + c : nullptr;
        int64_t ld_from = ld_init, i = 0;
        do {  // once even for k = 0: then y is init
            const int64_t depth = k - i < kDepth + kDepth / 2 ? k - i : kDepth;
            Pair here[2];
            for (int p = 0; p < n_pairs; ++p)
                here[p] = {pairs[p].x + i, pairs[p].ldx, pairs[p].w + i * pairs[p].ldw + c, pairs[p].ldw};
            switch (vectors) {
                case 1:
                    column<1>(n, here, n_pairs, depth, y + c, ldy, from, ld_from);
                    break;
                case 2:
                    column<2>(n, here, n_pairs, depth, y + c, ldy, from, ld_from);
                    break;
#if defined(__AVX512F__)
                case 3:
                    column<3>(n, here, n_pairs, depth, y + c, ldy, from, ld_from);
                    break;
                default:
                    column<4>(n, here, n_pairs, depth, y + c, ldy, from, ld_from);
                    break;
#endif
            }
            from = y + c, ld_from = ldy;
            i += depth;
        } while (i < k);
    }
}

// y = b + x1 w1^T + x2 w2^T, a share of the output columns
static void forward(const Call& c, const float* x1, int64_t ld1, const float* w1, const float* x2, int64_t ld2,
                    const float* w2, const float* b, float* y, int64_t ldy) {
    const int64_t in = c.sizes[0], out = c.sizes[1];
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
        product(c.n, stop - o, pairs, np, in, y + o, ldy, b ? b + o : nullptr, 0);
        o = stop;
    }
}

void linear_fwd(const Call& c) {
    forward(c, c.f(0), c.stride(0), c.f(1), nullptr, 0, nullptr, c.f(2), c.f(3), c.stride(3));
}

void linear_jvp(const Call& c) {
    const float *x = c.f(0), *w = c.f(1), *xt = c.f(2), *wt = c.f(3);
    forward(c, xt, c.stride(2), xt ? w : nullptr, x, c.stride(0), wt, c.f(4), c.f(5), c.stride(5));
}

// ---------------------------------------------------------------------------------------------------- bwd_input
#if defined(__AVX512F__)
static inline void transpose_tile(const float* src, int64_t lds, int64_t rows, float* dst, int64_t ldd) {
    __m512 a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = i < rows ? _mm512_loadu_ps(src + i * lds) : _mm512_setzero_ps();
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            const __m512d lo = _mm512_castps_pd(b[i + j]), hi = _mm512_castps_pd(b[i + j + 2]);
            a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(lo, hi));
            a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(lo, hi));
        }
    // a[4g + j] holds, in each 128-bit lane l, column 4l + j of rows 4g..4g+3
    for (int j = 0; j < 4; ++j) {
        const __m512 t0 = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x88), t1 = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xdd);
        const __m512 t2 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x88);
        const __m512 t3 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xdd);
        _mm512_storeu_ps(dst + (0 + j) * ldd, _mm512_shuffle_f32x4(t0, t2, 0x88));
        _mm512_storeu_ps(dst + (4 + j) * ldd, _mm512_shuffle_f32x4(t1, t3, 0x88));
        _mm512_storeu_ps(dst + (8 + j) * ldd, _mm512_shuffle_f32x4(t0, t2, 0xdd));
        _mm512_storeu_ps(dst + (12 + j) * ldd, _mm512_shuffle_f32x4(t1, t3, 0xdd));
    }
}
#else
// 16 x 16 as sixteen 4 x 4 pieces
static inline void transpose_tile(const float* src, int64_t lds, int64_t rows, float* dst, int64_t ldd) {
    typedef float quad __attribute__((vector_size(16)));
    typedef float uquad __attribute__((vector_size(16), aligned(4), may_alias));
    typedef int32_t iquad __attribute__((vector_size(16)));
    for (int64_t i = 0; i < 16; i += 4)
        for (int64_t j = 0; j < 16; j += 4) {
            quad r[4];
            for (int64_t q = 0; q < 4; ++q)
                r[q] = i + q < rows ? *reinterpret_cast<const uquad*>(src + (i + q) * lds + j) : quad{};
            const quad a = __builtin_shuffle(r[0], r[1], iquad{0, 4, 1, 5}),
                       b = __builtin_shuffle(r[0], r[1], iquad{2, 6, 3, 7});
            const quad c = __builtin_shuffle(r[2], r[3], iquad{0, 4, 1, 5}),
                       d = __builtin_shuffle(r[2], r[3], iquad{2, 6, 3, 7});
            *reinterpret_cast<uquad*>(dst + (j + 0) * ldd + i) = __builtin_shuffle(a, c, iquad{0, 1, 4, 5});
            *reinterpret_cast<uquad*>(dst + (j + 1) * ldd + i) = __builtin_shuffle(a, c, iquad{2, 3, 6, 7});
            *reinterpret_cast<uquad*>(dst + (j + 2) * ldd + i) = __builtin_shuffle(b, d, iquad{0, 1, 4, 5});
            *reinterpret_cast<uquad*>(dst + (j + 3) * ldd + i) = __builtin_shuffle(b, d, iquad{2, 3, 6, 7});
        }
}
#endif

// piece[o][k] = w[k][o] for `cols` inputs from k on and `outs` outputs of one panel; zero beyond the last input
static void transpose_piece(const float* w, int64_t width, int64_t inputs, int64_t cols, int64_t outs, float* piece) {
    if (outs < 4) {  // a head of one or two outputs: not worth a tile
        for (int64_t j = 0; j < outs; ++j)
            for (int64_t i = 0; i < cols; ++i) piece[j * cols + i] = i < inputs ? w[i * width + j] : 0.f;
        return;
    }
    for (int64_t i = 0; i < cols; i += 16)
        for (int64_t j = 0; j < outs; j += 16)
            transpose_tile(w + i * width + j, width, inputs - i, piece + j * cols + i, cols);
}

struct Target {  // out += d w; `begun` once it holds something
    const float* d;
    int64_t ldd;
    float* out;
    int64_t ldo;
    bool begun;
};

// One weight against up to two cotangents (dy and its tangent): a share of the input columns, 64 at a time, transposed
// once for both.
static void times_weight(const Call& c, const float* w, int64_t k, int64_t cols, Target** targets, int n) {
    const int64_t in = c.sizes[0], out = c.sizes[1];
    alignas(64) float piece[kPanel * kPanel];
    for (int64_t o = 0; o < out; o += kPanel) {
        const int64_t width = packed_width(o / kPanel, out), outs = out - o < kPanel ? out - o : kPanel;
        transpose_piece(w + o * in + k * width, width, in - k, cols, outs, piece);
        for (int t = 0; t < n; ++t) {
            Target& a = *targets[t];
            Pair pair = {a.d + o, a.ldd, piece, cols};
            product(c.n, cols, &pair, 1, outs, a.out + k, a.ldo, a.begun ? a.out + k : nullptr, a.ldo);
            a.begun = true;
        }
    }
}

// dx = dy w and dxt = dyt w + dy wt, either of which may be unwanted (null)
static void backward_input(const Call& c, const float* dy, int64_t ldy, const float* w, const float* dyt, int64_t ldyt,
                           const float* wt, float* dx, int64_t ldx, float* dxt, int64_t ldxt) {
    const Share s = share(pad_lane(c.sizes[0]) / kLane, c);
    for (int64_t k = s.begin * kLane; k < s.end * kLane; k += kPanel) {
        const int64_t cols = s.end * kLane - k < kPanel ? s.end * kLane - k : kPanel;
        Target primal = {dy, ldy, dx, ldx, false}, tangent = {dyt, ldyt, dxt, ldxt, false};
        Target* targets[2];
        int n = 0;
        if (dx) targets[n++] = &primal;
        if (dxt && dyt) targets[n++] = &tangent;
        if (n) times_weight(c, w, k, cols, targets, n);
        if (dxt && wt) {
            tangent.d = dy, tangent.ldd = ldy;
            targets[0] = &tangent;
            times_weight(c, wt, k, cols, targets, 1);
        }
    }
}

void linear_bwd_input(const Call& c) {
    backward_input(c, c.f(0), c.stride(0), c.f(1), nullptr, 0, nullptr, c.f(2), c.stride(2), nullptr, 0);
}

void linear_bwd_input_jvp(const Call& c) {
    backward_input(c, c.f(0), c.stride(0), c.f(1), c.f(2), c.stride(2), c.f(3), nullptr, 0, c.f(4), c.stride(4));
}

void linear_bwd_input_both(const Call& c) {
    backward_input(c, c.f(0), c.stride(0), c.f(1), c.f(2), c.stride(2), c.f(3), c.f(4), c.stride(4), c.f(5),
                   c.stride(5));
}

// ---------------------------------------------------------------------------------------------------- bwd_weight
struct Outer {  // dw += x^T d
    const float* x;
    int64_t ldx;
    const float* d;
    int64_t ldd;
};

struct Epilogue {       // what is stored: acc, or base + scale acc
    const float* from;  // the chain goes on from the block before, or null
    const float* plus;  // sums of the rows before, added to this chain at its end, or null
    const float* base;
    float scale;
};

template <int R, int C>
static inline void outer_tile(const Outer* terms, int n_terms, int64_t n, float* dw, int64_t ldw, const Epilogue& e) {
    vec acc[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) acc[r][c] = e.from ? load(e.from + r * ldw + c * VL) : vec{};
    for (int t = 0; t < n_terms; ++t) {
        const float *x = terms[t].x, *d = terms[t].d;
        for (int64_t i = 0; i < n; ++i, x += terms[t].ldx, d += terms[t].ldd) {
            vec b[C];
            for (int c = 0; c < C; ++c) b[c] = load(d + c * VL);
            for (int r = 0; r < R; ++r) {
                const vec a = splat(x[r]);
                for (int c = 0; c < C; ++c) acc[r][c] = fma(a, b[c], acc[r][c]);
            }
        }
    }
    const vec scale = splat(e.scale);
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) {
            const int64_t at = r * ldw + c * VL;
            const vec sum = e.plus ? load(e.plus + at) + acc[r][c] : acc[r][c];
            store(dw + at, e.base ? fma(scale, sum, load(e.base + at)) : sum);
        }
}

template <int R, int C>
static inline void outer_rows(int64_t rows, const Outer* t, int nt, int64_t n, float* dw, int64_t ldw,
                              const Epilogue& e) {
    if (rows >= R) return outer_tile<R, C>(t, nt, n, dw, ldw, e);
    if constexpr (R > 1) outer_rows<R - 1, C>(rows, t, nt, n, dw, ldw, e);
}

// The rows [0, inputs) of one column of tiles of dw.
template <int C>
static void outer_column(int64_t inputs, const Outer* terms, int n_terms, int64_t n, float* dw, int64_t ldw,
                         const Epilogue& e) {
    constexpr int R = rows_of(C);
    for (int64_t k = 0; k < inputs; k += R) {
        Outer here[2];
        for (int t = 0; t < n_terms; ++t) here[t] = {terms[t].x + k, terms[t].ldx, terms[t].d, terms[t].ldd};
        const Epilogue at = {e.from ? e.from + k * ldw : nullptr, e.plus ? e.plus + k * ldw : nullptr,
                             e.base ? e.base + k * ldw : nullptr, e.scale};
        outer_rows<R, C>(inputs - k < R ? inputs - k : R, here, n_terms, n, dw + k * ldw, ldw, at);
    }
}

// One column of tiles of dw over up to kDeep rows of the batch, dispatched by its width.
static void outer_columns(int64_t width, int64_t inputs, const Outer* terms, int n_terms, int64_t n, float* dw,
                          int64_t ldw, const Epilogue& e) {
    switch (width / VL) {
        case 1:
            return outer_column<1>(inputs, terms, n_terms, n, dw, ldw, e);
#if defined(__AVX512F__)
        case 3:
            return outer_column<3>(inputs, terms, n_terms, n, dw, ldw, e);
        case 4:
            return outer_column<4>(inputs, terms, n_terms, n, dw, ldw, e);
#endif
        default:
            return outer_column<2>(inputs, terms, n_terms, n, dw, ldw, e);
    }
}

// Rows of dy that stay in L1 while all of dw is walked. They are copied together first: rows 1 KB apart would share a
// quarter of its sets.
static constexpr int64_t kDeep = 96;

// dw (or its epilogue), a share of the input rows of the packed weight
static void backward_weight(const Call& c, const Outer* terms, int n_terms, float* dw, const float* base,
                            const float* scale) {
    const int64_t in = c.sizes[0], out = c.sizes[1];
    const Share s = share(in, c);
    alignas(64) float together[kDeep * kPanel];
    for (int64_t panel = 0; panel * kPanel < out; ++panel) {
        const int64_t width = packed_width(panel, out);
        for (int64_t o = 0; o < width; o += kCols * VL) {
            const int64_t at = panel * kPanel * in + s.begin * width + o;
            const int64_t cols = width - o < kCols * VL ? width - o : kCols * VL;
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
                                    fused ? base + at : nullptr, fused ? c.numbers[0] * (scale ? *scale : 1.f) : 1.f};
                outer_columns(cols, s.end - s.begin, here, n_terms, rows, dw + at, width, e);
                r += rows;
            } while (r < c.n);
        }
    }
}

static void backward_bias(const Call& c, const float* d, int64_t ldd, float* db) {
    const Share s = share(pad_lane(c.sizes[1]) / kLane, c);
    for (int64_t o = s.begin * kLane; o < s.end * kLane; o += VL) {
        vec acc = c.first ? vec{} : load(db + o);
        for (int64_t i = 0; i < c.n; ++i) acc += load(d + i * ldd + o);
        store(db + o, acc);
    }
}

void linear_bwd_weight(const Call& c) {
    const Outer term = {c.f(0), c.stride(0), c.f(1), c.stride(1)};
    if (c.f(2)) backward_weight(c, &term, 1, c.f(2), c.f(4), c.f(5));
    if (c.f(3)) backward_bias(c, c.f(1), c.stride(1), c.f(3));
}

void linear_bwd_weight_jvp(const Call& c) {
    const float *x = c.f(0), *dy = c.f(1), *xt = c.f(2), *dyt = c.f(3);
    Outer terms[2];
    int n = 0;
    if (dyt) terms[n++] = {x, c.stride(0), dyt, c.stride(3)};
    if (xt && dy) terms[n++] = {xt, c.stride(2), dy, c.stride(1)};
    if (c.f(4)) backward_weight(c, terms, n, c.f(4), c.f(6), c.f(7));
    if (c.f(5)) backward_bias(c, dyt, c.stride(3), c.f(5));
}

void row_sum_bwd(const Call& c) { backward_bias(c, c.f(0), c.stride(0), c.f(1)); }

// ---------------------------------------------------------------------------------------------------- factored first
// layers
static int64_t rows_of_extent(const Call& c, int64_t extent) {  // as enum class Rows
    return extent == 1 ? c.task->n_support : extent == 2 ? c.task->n_query : c.task->n_support + c.task->n_query;
}

// The Gram matrix is large where images share a mean, and D mostly cancels it: it is made, kept and multiplied in
// double. It is small.
typedef double dvec __attribute__((vector_size(4 * VL)));
typedef float hvec __attribute__((vector_size(2 * VL)));
typedef float uhvec __attribute__((vector_size(2 * VL), aligned(4), may_alias));
static constexpr int DL = VL / 2;
static inline dvec load_double(const float* p) {
    return __builtin_convertvector(hvec(*reinterpret_cast<const uhvec*>(p)), dvec);
}
static inline void store_float(float* p, dvec v) { *reinterpret_cast<uhvec*>(p) = __builtin_convertvector(v, hvec); }

template <int R>
static inline void dots(const float* x, const float* xs, int64_t lds, int64_t in, double* out) {
    dvec acc[R];
    for (int r = 0; r < R; ++r) acc[r] = dvec{};
    int64_t i = 0;
    for (; i + DL <= in; i += DL) {
        const dvec a = load_double(x + i);
        for (int r = 0; r < R; ++r) acc[r] += a * load_double(xs + r * lds + i);
    }
    for (int r = 0; r < R; ++r) {
        double sum = 0;
        for (int l = 0; l < DL; ++l) sum += acc[r][l];
        for (int64_t j = i; j < in; ++j) sum += static_cast<double>(x[j]) * xs[r * lds + j];
        out[r] = sum;
    }
}

static double* gram_row(const Call& c, int operand, int64_t r) {
    return reinterpret_cast<double*>(static_cast<char*>(c.operands[operand]) + r * c.row_stride[operand]);
}

void gram_fwd(const Call& c) {
    const int64_t in = c.sizes[0], ns = c.task->n_support, ldx = c.stride(0), lds = c.stride(1);
    const Share s = share(rows_of_extent(c, c.sizes[1]), c);
    for (int64_t r = s.begin; r < s.end; ++r) {
        const float *x = c.f(0) + r * ldx, *xs = c.f(1);
        double* g = gram_row(c, 2, r);
        int64_t m = 0;
        for (; m + 5 <= ns; m += 5) dots<5>(x, xs + m * lds, lds, in, g + m);
        for (; m < ns; ++m) dots<1>(x, xs + m * lds, lds, in, g + m);
    }
}

void factored_linear_fwd(const Call& c) {
    const int64_t n = rows_of_extent(c, c.sizes[1]), ns = c.task->n_support, ldd = c.stride(2);
    const Share s = share(pad_lane(c.sizes[0]) / kLane, c);
    for (int64_t r = 0; r < n; ++r) {
        const float* a = c.f(0) + r * c.stride(0);
        const double* g = gram_row(c, 1, r);
        float* y = c.f(4) + r * c.stride(4);
        for (int64_t o = s.begin * kLane; o < s.end * kLane; o += DL) {
            dvec acc = load_double(a + o);
            if (c.f(3)) acc += load_double(c.f(3) + o);
            for (int64_t m = 0; m < ns; ++m) acc += g[m] * load_double(c.f(2) + m * ldd + o);
            store_float(y + o, acc);
        }
    }
}

void factored_linear_jvp(const Call& c) {
    const float *d = c.f(0), *bt = c.f(1);
    float* yt = c.f(2);
    const Share s = share(pad_lane(c.sizes[0]) / kLane, c);
    for (int64_t r = 0; r < c.n; ++r)
        for (int64_t j = s.begin * kLane; j < s.end * kLane; j += VL)
            store(yt + r * c.stride(2) + j, (d ? load(d + r * c.stride(0) + j) : vec{}) + load(bt + j));
}

void factored_linear_bwd(const Call& c) {
    const int64_t n = rows_of_extent(c, c.sizes[1]), ns = c.task->n_support, ldy = c.stride(1), ldd = c.stride(2);
    const Share s = share(pad_lane(c.sizes[0]) / kLane, c);
    for (int64_t m = 0; m < ns; ++m)
        for (int64_t o = s.begin * kLane; o < s.end * kLane; o += DL) {
            dvec acc = dvec{};
            for (int64_t r = 0; r < n; ++r) acc += gram_row(c, 0, r)[m] * load_double(c.f(1) + r * ldy + o);
            store_float(c.f(2) + m * ldd + o, acc);
        }
}

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
