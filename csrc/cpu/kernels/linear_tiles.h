// The register tiles of linear: products over packed panels (csrc/include/fastmaml/plan.h), outer products in the same
// layout, and the transpose that bwd_input needs.
//
// Every output element is a sum of short chains of FMAs (kDepth products each: a single chain over 784 inputs loses
// half a digit against a blocked one) in a fixed order, whatever the tile, the block of rows or the team: bits do not
// depend on them.
#pragma once
#include "gate.h"

namespace fastmaml {
namespace FASTMAML_ISA {

static constexpr int kCols = VL == 16 ? 4 : 2;  // vectors of a register tile: 6 x 4 zmm, or 6 x 2 ymm/xmm
static constexpr int kRows = 6;                 // its rows; narrow tiles are taller, to keep enough FMAs under way
static constexpr int rows_of(int vectors, bool half = false) {
    return vectors == 1 ? 12 : VL == 16 && vectors == 2 ? 12 : VL == 16 && vectors == 3 ? (half ? 10 : 8) : kRows;
}

// The last vector of a tile of `Half` has at most VL / 2 columns that are no padding. Two rows share one register
// there: its lower half is of the first, its upper half of the second.
static inline bool is_half(int64_t cols) { return VL == 16 && (cols - 1) % VL < VL / 2; }  // the last vector of so many
// Columns that a tile is told of: without padding where it is at most a vector, else with it.
static inline int64_t without_padding(int64_t cols, int64_t left) { return VL == 16 && left < cols ? left : cols; }
#if defined(__AVX512F__)
static inline vec twice(const float* p) { return (vec)_mm512_broadcast_f32x8(_mm256_loadu_ps(p)); }
static inline vec halves(vec low, vec high) { return (vec)_mm512_mask_blend_ps(0xff00, (__m512)low, (__m512)high); }
static inline vec half_of(vec both, int row) {  // and zeros
    return (vec)(row % 2 ? _mm512_zextps256_ps512(_mm512_extractf32x8_ps((__m512)both, 1))
                         : _mm512_zextps256_ps512(_mm512_castps512_ps256((__m512)both)));
}
#else  // never asked for
static inline vec twice(const float* p) { return load(p); }
static inline vec halves(vec low, vec) { return low; }
static inline vec half_of(vec both, int) { return both; }
#endif

static constexpr int64_t kDepth = 64;  // products in one chain; 64 x 64 weights are also what stays in L1 for all rows
static constexpr int kMaxPairs = 16;   // of one sum, each over the same depth

struct Pair {  // one product x w of a sum of products; w is [k][ldw]
    const float* x;
    int64_t ldx;
    const float* w;
    int64_t ldw;
};

// The sums of a tile of R x C vectors. All loops over them are unrolled by order: left to itself, GCC 12 takes all of
// acc through the stack.
template <int R, int C, bool Half>
struct Tile {
    static constexpr int kWhole = C - Half, kShared = Half ? (R + 1) / 2 : 1;
    vec acc[R][kWhole], pairs[kShared];

    __attribute__((always_inline)) void clear() {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
            for (int c = 0; c < kWhole; ++c) acc[r][c] = vec{};
#pragma GCC unroll 16
        for (int p = 0; p < kShared; ++p) pairs[p] = vec{};
    }

    __attribute__((always_inline)) void begin(const float* from, int64_t ld) {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r, from += ld) {
#pragma GCC unroll 16
            for (int c = 0; c < kWhole; ++c) acc[r][c] = load(from + c * VL);
            if (Half)
                pairs[r / 2] = r % 2 ? halves(pairs[r / 2], twice(from + kWhole * VL)) : twice(from + kWhole * VL);
        }
    }

    // += x w, x [R] from one row to the next ldx, w [C vectors]. In this order, in which no more than two rows are
    // held.
    __attribute__((always_inline)) void add(const float* x, int64_t ldx, const float* w) {
        vec b[C], before{};
#pragma GCC unroll 16
        for (int c = 0; c < C; ++c) b[c] = c < kWhole ? load(w + c * VL) : twice(w + c * VL);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const vec a = splat(x[r * ldx]);
#pragma GCC unroll 16
            for (int c = 0; c < kWhole; ++c) acc[r][c] = fma(a, b[c], acc[r][c]);
            if (Half && (r % 2 || r == R - 1))
                pairs[r / 2] = fma(r % 2 ? halves(before, a) : a, b[C - 1], pairs[r / 2]);
            before = a;
        }
    }

    __attribute__((always_inline)) vec at(int r, int c) const {
        return c < kWhole ? acc[r][c] : half_of(pairs[r / 2], r);
    }
};

static constexpr float kZeros[4 * 16] = {};  // a row for those without one

template <Gate G, bool Flat, int R, int C, bool Half>
__attribute__((always_inline)) static inline void store_tile(const Tile<R, C, Half>& t, float* y, int64_t ldy,
                                                             const float* init, int64_t ld_init, Activation act) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r, y += ldy, init += ld_init, act = act.at(1, 0))
#pragma GCC unroll 16
        for (int c = 0; c < C; ++c) store(y + c * VL, act.apply<G, Flat>(load(init + c * VL) + t.at(r, c), 0, c * VL));
}

// y[R][C vectors] = act(init + sum over pairs of x w), in registers: from row `row` of the x, column `col` of the w on.
// init: one row for all (ld_init 0), a row each, or null for zero.
template <int R, int C, bool Half>
static inline void tile(const Pair* pairs, int n_pairs, int64_t k, int64_t row, int64_t col, float* y, int64_t ldy,
                        const float* init, int64_t ld_init, const Activation& act) {
    Tile<R, C, Half> t;
    t.clear();
    for (int p = 0; p < n_pairs; ++p) {
        const int64_t ldx = pairs[p].ldx, ldw = pairs[p].ldw;
        const float *x = pairs[p].x + row * ldx, *w = pairs[p].w + col;
        for (int64_t i = 0; i < k; ++i, w += ldw) t.add(x + i, ldx, w);
    }
    if (!init) init = kZeros, ld_init = 0;
    const bool flat = act.slope == 0.f;  // asked here, and not by with_gate: its closure would take acc through memory
    if (act.gate == Gate::kNone)
        store_tile<Gate::kNone, true>(t, y, ldy, init, ld_init, act);
    else if (act.gate == Gate::kMake)
        flat ? store_tile<Gate::kMake, true>(t, y, ldy, init, ld_init, act)
             : store_tile<Gate::kMake, false>(t, y, ldy, init, ld_init, act);
    else
        flat ? store_tile<Gate::kApply, true>(t, y, ldy, init, ld_init, act)
             : store_tile<Gate::kApply, false>(t, y, ldy, init, ld_init, act);
}

template <int R, int C, bool Half>
static inline void tile_rows(int64_t rows, const Pair* p, int np, int64_t k, int64_t row, int64_t col, float* y,
                             int64_t ldy, const float* init, int64_t ldi, const Activation& act) {
    if (rows >= R) return tile<R, C, Half>(p, np, k, row, col, y, ldy, init, ldi, act);
    if constexpr (R > 1) tile_rows<R - 1, C, Half>(rows, p, np, k, row, col, y, ldy, init, ldi, act);
}

// All rows of a column of tiles: full tiles, then what is left in one smaller tile.
template <int C, bool Half>
static void column(int64_t n, const Pair* pairs, int n_pairs, int64_t k, int64_t col, float* y, int64_t ldy,
                   const float* init, int64_t ld_init, const Activation& act) {
    constexpr int R = rows_of(C, Half);
    for (int64_t r = 0; r < n;) {
        const int64_t left = n - r, rows = left >= R ? (left < 2 * R && left > R ? (left + 1) / 2 : R)
                                                     : left;  // 10 = 5 + 5, not 8 + 2
        tile_rows<R, C, Half>(rows, pairs, n_pairs, k, r, col, y + r * ldy, ldy, init ? init + r * ld_init : nullptr,
                              ld_init, act.at(r, 0));
        r += rows;
    }
}

template <int C>
static inline void column(bool half, int64_t n, const Pair* pairs, int n_pairs, int64_t k, int64_t col, float* y,
                          int64_t ldy, const float* init, int64_t ld_init, const Activation& act) {
    if constexpr (VL == 16 && C > 1)
        if (half) return column<C, true>(n, pairs, n_pairs, k, col, y, ldy, init, ld_init, act);
    column<C, false>(n, pairs, n_pairs, k, col, y, ldy, init, ld_init, act);
}

// y[n][cols] = act(init + sum of pairs), each over k products, for columns that lie together in w. All rows are padded
// to whole vectors, those of w with zeros. For k = 0, too: then y is init.
static inline void columns(int64_t n, int64_t cols, const Pair* pairs, int n_pairs, int64_t k, float* y, int64_t ldy,
                           const float* init, int64_t ld_init, const Activation& act) {
    const int64_t padded = (cols + VL - 1) / VL * VL;
    for (int64_t c = 0; c < padded; c += kCols * VL) {
        const bool end = padded - c <= kCols * VL, half = end && is_half(cols);
        const int vectors = static_cast<int>((end ? padded - c : kCols * VL) / VL);
        const float* from = init ? init + c : nullptr;
        const Activation here = act.at(0, c);
        switch (vectors) {
            case 1:
                column<1>(half, n, pairs, n_pairs, k, c, y + c, ldy, from, ld_init, here);
                break;
            case 2:
                column<2>(half, n, pairs, n_pairs, k, c, y + c, ldy, from, ld_init, here);
                break;
#if defined(__AVX512F__)
            case 3:
                column<3>(half, n, pairs, n_pairs, k, c, y + c, ldy, from, ld_init, here);
                break;
            default:
                column<4>(half, n, pairs, n_pairs, k, c, y + c, ldy, from, ld_init, here);
                break;
#endif
        }
    }
}

// The same over any depth, in chains of about kDepth: a column of tiles at a time.
static inline void product(int64_t n, int64_t cols, const Pair* pairs, int n_pairs, int64_t k, float* y, int64_t ldy,
                           const float* init, int64_t ld_init, const Activation& act) {
    const int64_t padded = pad_lane(cols);
    for (int64_t c = 0; c < padded; c += kCols * VL) {
        const int64_t width = without_padding(padded - c < kCols * VL ? padded - c : kCols * VL, cols - c);
        const float* from = init ? init + c : nullptr;
        int64_t ld_from = ld_init, i = 0;
        do {
            const int64_t depth = k - i < kDepth + kDepth / 2 ? k - i : kDepth;
            Pair here[2];
            for (int p = 0; p < n_pairs; ++p)
                here[p] = {pairs[p].x + i, pairs[p].ldx, pairs[p].w + i * pairs[p].ldw + c, pairs[p].ldw};
            columns(n, width, here, n_pairs, depth, y + c, ldy, from, ld_from, i + depth < k ? kLinear : act.at(0, c));
            from = y + c, ld_from = ldy;
            i += depth;
        } while (i < k);
    }
}

// ---------------------------------------------------------------------------------------------------- transpose
// Up to 16 x 16, columns in fours: dst[j][i] = src[i][j] for j < cols, zero for i >= rows
#if defined(__AVX512F__)
// to[4]: of four rows in each lane, lane by lane
static inline void transpose_lanes(const __m512 (&a)[4], __m512 (&to)[4]) {
    const __m512d lo0 = _mm512_castps_pd(_mm512_unpacklo_ps(a[0], a[1])),
                  lo1 = _mm512_castps_pd(_mm512_unpacklo_ps(a[2], a[3]));
    const __m512d hi0 = _mm512_castps_pd(_mm512_unpackhi_ps(a[0], a[1])),
                  hi1 = _mm512_castps_pd(_mm512_unpackhi_ps(a[2], a[3]));
    to[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(lo0, lo1));
    to[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(lo0, lo1));
    to[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(hi0, hi1));
    to[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(hi0, hi1));
}

static inline void transpose_tile(const float* src, int64_t lds, int64_t rows, int64_t cols, float* dst, int64_t ldd) {
    int64_t j = 0;
    for (; j + 8 <= cols; j += 8) {  // eight columns of two rows in a register
        __m512 a[2][4], b[2][4];
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h)
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                const int row = 8 * h + i;
                const float* at = src + row * lds + j;
                a[h][i] = row < rows ? _mm512_zextps256_ps512(_mm256_loadu_ps(at)) : _mm512_setzero_ps();
                if (row + 4 < rows) a[h][i] = _mm512_insertf32x8(a[h][i], _mm256_loadu_ps(at + 4 * lds), 1);
            }
        transpose_lanes(a[0], b[0]);
        transpose_lanes(a[1], b[1]);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            _mm512_storeu_ps(dst + (j + i) * ldd, _mm512_shuffle_f32x4(b[0][i], b[1][i], 0x88));
            _mm512_storeu_ps(dst + (j + i + 4) * ldd, _mm512_shuffle_f32x4(b[0][i], b[1][i], 0xdd));
        }
    }
    for (; j < cols; j += 4) {
        __m512 a[4], b[4];
        for (int i = 0; i < 4; ++i) {  // lane l of a[i]: columns j.. of row 4l + i, so that only lanes are transposed
            const float* at = src + i * lds + j;
            a[i] = i < rows ? _mm512_zextps128_ps512(_mm_loadu_ps(at)) : _mm512_setzero_ps();
            if (4 + i < rows) a[i] = _mm512_mask_broadcast_f32x4(a[i], 0x00f0, _mm_loadu_ps(at + 4 * lds));
            if (8 + i < rows) a[i] = _mm512_mask_broadcast_f32x4(a[i], 0x0f00, _mm_loadu_ps(at + 8 * lds));
            if (12 + i < rows) a[i] = _mm512_mask_broadcast_f32x4(a[i], 0xf000, _mm_loadu_ps(at + 12 * lds));
        }
        transpose_lanes(a, b);
        for (int i = 0; i < 4; ++i) _mm512_storeu_ps(dst + (j + i) * ldd, b[i]);
    }
}
#else
static inline void transpose_tile(const float* src, int64_t lds, int64_t rows, int64_t cols, float* dst, int64_t ldd) {
    typedef float quad __attribute__((vector_size(16)));
    typedef float uquad __attribute__((vector_size(16), aligned(4), may_alias));
    typedef int32_t iquad __attribute__((vector_size(16)));
    for (int64_t i = 0; i < 16; i += 4)
        for (int64_t j = 0; j < cols; j += 4) {
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
static inline void transpose_piece(const float* w, int64_t width, int64_t inputs, int64_t cols, int64_t outs,
                                   float* piece) {
    if (outs < 4) {  // a head of one or two outputs: not worth a tile
        for (int64_t j = 0; j < outs; ++j)
            for (int64_t i = 0; i < cols; ++i) piece[j * cols + i] = i < inputs ? w[i * width + j] : 0.f;
        return;
    }
    for (int64_t i = 0; i < cols; i += 16)
        for (int64_t j = 0; j < outs; j += 16)
            transpose_tile(w + i * width + j, width, inputs - i, outs - j < 16 ? outs - j : 16, piece + j * cols + i,
                           cols);
}

// ---------------------------------------------------------------------------------------------------- outer products
struct Outer {  // dw += x^T d, over n rows of `lines` lines
    const float* x;
    int64_t ldx;
    const float* d;
    int64_t ldd;
    int64_t lines = 1, x_line = 0, d_line = 0;  // from one line to the next
};
static constexpr int kMaxOuter = 16;  // terms of one sum

struct Epilogue {       // what is stored: acc, or base + scale acc
    const float* from;  // the chain goes on from the block before, or null
    const float* plus;  // sums of the rows before, added to this chain at its end, or null
    const float* base;
    float scale;
};

template <int R, int C, bool Half>
static inline void outer_tile(const Outer* terms, int n_terms, int64_t n, int64_t k, float* dw, int64_t ldw,
                              const Epilogue& e) {
    Tile<R, C, Half> sums;
    e.from ? sums.begin(e.from, ldw) : sums.clear();
    for (int t = 0; t < n_terms; ++t) {
        for (int64_t line = 0; line < terms[t].lines; ++line) {
            const float *x = terms[t].x + k + line * terms[t].x_line, *d = terms[t].d + line * terms[t].d_line;
            for (int64_t i = 0; i < n; ++i, x += terms[t].ldx, d += terms[t].ldd) sums.add(x, 1, d);
        }
    }
    const vec scale = splat(e.scale);
    const float *plus = e.plus, *base = e.base;
    if (!plus && !base) {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r, dw += ldw)
#pragma GCC unroll 16
            for (int c = 0; c < C; ++c) store(dw + c * VL, sums.at(r, c));
    } else if (!plus) {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r, dw += ldw, base += ldw)
#pragma GCC unroll 16
            for (int c = 0; c < C; ++c) store(dw + c * VL, fma(scale, sums.at(r, c), load(base + c * VL)));
    } else {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r, dw += ldw, plus += ldw, base += base ? ldw : 0)
#pragma GCC unroll 16
            for (int c = 0; c < C; ++c) {
                const vec sum = load(plus + c * VL) + sums.at(r, c);
                store(dw + c * VL, base ? fma(scale, sum, load(base + c * VL)) : sum);
            }
    }
}

template <int R, int C, bool Half>
static inline void outer_rows(int64_t rows, const Outer* t, int nt, int64_t n, int64_t k, float* dw, int64_t ldw,
                              const Epilogue& e) {
    if (rows >= R) return outer_tile<R, C, Half>(t, nt, n, k, dw, ldw, e);
    if constexpr (R > 1) outer_rows<R - 1, C, Half>(rows, t, nt, n, k, dw, ldw, e);
}

// The rows [0, inputs) of one column of tiles of dw.
template <int C, bool Half>
static void outer_column(int64_t inputs, const Outer* terms, int n_terms, int64_t n, float* dw, int64_t ldw,
                         const Epilogue& e) {
    constexpr int R = rows_of(C, Half);
    for (int64_t k = 0; k < inputs; k += R) {
        const Epilogue at = {e.from ? e.from + k * ldw : nullptr, e.plus ? e.plus + k * ldw : nullptr,
                             e.base ? e.base + k * ldw : nullptr, e.scale};
        outer_rows<R, C, Half>(inputs - k < R ? inputs - k : R, terms, n_terms, n, k, dw + k * ldw, ldw, at);
    }
}

template <int C>
static inline void outer_column(bool half, int64_t inputs, const Outer* terms, int n_terms, int64_t n, float* dw,
                                int64_t ldw, const Epilogue& e) {
    if constexpr (VL == 16 && C > 1)
        if (half) return outer_column<C, true>(inputs, terms, n_terms, n, dw, ldw, e);
    outer_column<C, false>(inputs, terms, n_terms, n, dw, ldw, e);
}

// One column of tiles of dw over up to kDeep rows of the batch, dispatched by its width: `cols` columns, whose rows are
// padded with zeros.
static inline void outer_columns(int64_t cols, int64_t inputs, const Outer* terms, int n_terms, int64_t n, float* dw,
                                 int64_t ldw, const Epilogue& e) {
    const bool half = is_half(cols);
    switch ((cols + VL - 1) / VL) {
        case 1:
            return outer_column<1>(half, inputs, terms, n_terms, n, dw, ldw, e);
#if defined(__AVX512F__)
        case 3:
            return outer_column<3>(half, inputs, terms, n_terms, n, dw, ldw, e);
        case 4:
            return outer_column<4>(half, inputs, terms, n_terms, n, dw, ldw, e);
#endif
        default:
            return outer_column<2>(half, inputs, terms, n_terms, n, dw, ldw, e);
    }
}

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
