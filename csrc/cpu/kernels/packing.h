// Transposes of plain arrays, 16 x 16 at a time, and with them the way between a plain weight and a packed one
// (plan.h).
#pragma once
#include "linear_tiles.h"

namespace fastmaml {
namespace FASTMAML_ISA {

// n floats, of any number
static inline void copy_run(const float* from, int64_t n, float* to) {
    for (int64_t i = 0; i < n; i += VL) store_part(to + i, load_part(from + i, n - i), n - i);
}

static inline void add_run(const float* from, int64_t n, float* to) {
    for (int64_t i = 0; i < n; i += VL)
        store_part(to + i, load_part(to + i, n - i) + load_part(from + i, n - i), n - i);
}

static inline void clear_run(float* to, int64_t n) {
    for (int64_t i = 0; i < n; i += VL) store_part(to + i, vec{}, n - i);
}

// to[j][i] = from[i][j] for i < rows, j < cols. Nothing else is read, or written; but rows of `to` that are `padded` to
// whole lanes get zeros there.
static void transpose(const float* from, int64_t ldf, int64_t rows, int64_t cols, float* to, int64_t ldt, bool padded) {
    constexpr int64_t n = 16;
    alignas(64) float tile[n * n];
    for (int64_t i = 0; i < rows; i += n) {
        const int64_t high = rows - i < n ? rows - i : n, written = padded ? n : high;
        for (int64_t j = 0, wide; j < cols; j += wide) {
            wide = cols - j < n ? cols - j : n;
            const float* src = from + i * ldf + j;
            float* dst = to + j * ldt + i;
            if (wide < 4) {
                for (int64_t c = 0; c < wide; ++c)
                    for (int64_t r = 0; r < written; ++r) dst[c * ldt + r] = r < high ? src[r * ldf + c] : 0.f;
                continue;
            }
            wide -= wide % 4;
            if (written == n) {
                transpose_tile(src, ldf, high, wide, dst, ldt);
                continue;
            }
            transpose_tile(src, ldf, high, wide, tile, n);
            for (int64_t c = 0; c < wide; ++c) copy_run(tile + c * n, high, dst + c * ldt);
        }
    }
}

// Calls body(o, width, k, n) for pieces of up to kPanel outputs and n <= 16 inputs of a weight [out, in]; a share of
// the inputs.
template <class F>
static inline void each_piece(const Call& c, int64_t in, int64_t out, F body) {
    const Share s = share((in + kLane - 1) / kLane, c);
    for (int64_t o = 0; o < out; o += kPanel)
        for (int64_t b = s.begin; b < s.end; ++b) {
            const int64_t k = b * kLane, n = in - k < kLane ? in - k : kLane;
            body(o, packed_width(o / kPanel, out), k, n);
        }
}

// Where the rows of n inputs from k on lie in a packed weight: the taps of a channel are far from each other.
static inline void packed_rows(int64_t k, int64_t n, int64_t in, int64_t taps, int64_t (&row)[kLane]) {
    if (taps <= 1) {
        for (int64_t i = 0; i < n; ++i) row[i] = k + i;
        return;
    }
    const int64_t channels = in / taps;
    int64_t channel = k / taps, tap = k % taps;
    for (int64_t i = 0; i < n; ++i) {
        row[i] = tap * channels + channel;
        if (++tap == taps) tap = 0, ++channel;
    }
}

static void pack(const Call& c, const float* w, int64_t in, int64_t out, int64_t taps, float* packed) {
    if (is_narrow(out, taps)) {  // the same way round, with padded rows
        const Share s = share(out, c);
        for (int64_t o = s.begin; o < s.end; ++o) {
            copy_run(w + o * in, in, packed + o * pad_lane(in));
            clear_run(packed + o * pad_lane(in) + in, pad_lane(in) - in);
        }
        return;
    }
    each_piece(c, in, out, [&](int64_t o, int64_t width, int64_t k, int64_t n) {
        alignas(64) float piece[kLane * kPanel];
        const int64_t outs = out - o < kPanel ? out - o : kPanel;
        transpose(w + o * in + k, in, outs, n, piece, width, true);
        int64_t row[kLane];
        packed_rows(k, n, in, taps, row);
        for (int64_t i = 0; i < n; ++i) copy_run(piece + i * width, width, packed + o * in + row[i] * width);
    });
}

// `add`: w += packed
static void unpack(const Call& c, const float* packed, int64_t in, int64_t out, int64_t taps, float* w, bool add) {
    if (is_narrow(out, taps)) {
        const Share s = share(out, c);
        for (int64_t o = s.begin; o < s.end; ++o)
            add ? add_run(packed + o * pad_lane(in), in, w + o * in)
                : copy_run(packed + o * pad_lane(in), in, w + o * in);
        return;
    }
    each_piece(c, in, out, [&](int64_t o, int64_t width, int64_t k, int64_t n) {
        alignas(64) float piece[kLane * kPanel];
        int64_t row[kLane];
        packed_rows(k, n, in, taps, row);
        for (int64_t i = 0; i < n; ++i) copy_run(packed + o * in + row[i] * width, width, piece + i * width);
        const int64_t outs = out - o < kPanel ? out - o : kPanel;
        if (!add) return transpose(piece, width, n, outs, w + o * in + k, in, false);
        alignas(64) float rows[kPanel * kLane];
        transpose(piece, width, n, outs, rows, kLane, true);
        for (int64_t r = 0; r < outs; ++r) add_run(rows + r * kLane, n, w + (o + r) * in + k);
    });
}

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
