// What the max poolings share: positions in windows, and the walk over the taps of one.
#pragma once
#include "pool.h"

namespace fastmaml {
namespace FASTMAML_ISA {

static inline ivec choose(ivec m, ivec a, ivec b) { return (a & m) | (b & ~m); }

static inline ivec load_index(const uint8_t* p) { return -load_mask(p); }
static inline ivec load_index(const int32_t* p) {
    ivec v;
    memcpy(&v, p, sizeof v);
    return v;
}
static inline void store_index(int32_t* p, ivec v) { memcpy(p, &v, sizeof v); }
static inline void store_index(uint8_t* p, ivec v) {
#if defined(__AVX512F__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)v));
#elif defined(__AVX2__)
    const __m256i w = (__m256i)v;
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
#else
    for (int i = 0; i < VL; ++i) p[i] = static_cast<uint8_t>(v[i]);
#endif
}

// body(offset in the image, position in the window) for the taps of output (oh, ow) inside the image. kSide: the side
// of a window known to be whole, which unrolls; 0: any.
template <int kSide, class F>
static inline void for_taps(const Pool& g, int64_t oh, int64_t ow, F body) {
    if (kSide) {
        const int64_t corner = g.in(g.rows.start(oh), g.cols.start(ow));
#pragma GCC unroll 4
        for (int t = 0; t < kSide * kSide; ++t) body(corner + g.in(t / kSide, t % kSide), t);
        return;
    }
    const Span i = g.rows.taps(oh), j = g.cols.taps(ow);
    for (int64_t a = i.begin; a < i.end; ++a)
        for (int64_t b = j.begin; b < j.end; ++b)
            body(g.in(g.rows.start(oh) + a, g.cols.start(ow) + b), static_cast<int32_t>(a * g.cols.kernel + b));
}

static inline bool tiles_2x2(const Pool& g) {  // windows of 2 x 2 that are all whole
    return g.rows.kernel == 2 && g.cols.kernel == 2 && !g.rows.pad && !g.cols.pad;
}

// The first maximum of each window of a line of outputs, and any NaN, as torch. kSigned: of x times the sign of gamma,
// where gamma is given.
template <int kSide, bool kSigned, class Index>
static inline void line_max(const Pool& g, int64_t oh, const float* x, const float* gamma, float* y, Index* index) {
    const Span rows = g.rows.taps(oh);
    const vec zero = vec{}, up = splat(1.f);
    for (int64_t l = 0; l < g.lanes; l += VL) {
        const vec scale = kSigned && gamma ? load(gamma + l) : up;
        const vec sign = select(scale > zero, up, select(scale < zero, -up, zero));
        for (int64_t ow = 0; ow < g.cols.outputs; ++ow) {
            const int64_t i = rows.begin, j = g.cols.taps(ow).begin;
            vec best = load(x + g.in(g.rows.start(oh) + i, g.cols.start(ow) + j) + l), signed_best = best * sign;
            ivec which = isplat(static_cast<int32_t>(i * g.cols.kernel + j));
            for_taps<kSide>(g, oh, ow, [&](int64_t at, int32_t tap) {
                const vec v = load(x + at + l), signed_v = kSigned ? v * sign : v;
                const ivec take = (signed_v > (kSigned ? signed_best : best)) | (v != v);
                best = select(take, v, best);
                if (kSigned) signed_best = select(take, signed_v, signed_best);
                which = choose(take, isplat(tap), which);
            });
            const int64_t at = ow * g.lanes + l;
            if (y) store(y + at, best);
            if (index) store_index(index + at, which);
        }
    }
}

template <class Index>
static inline Index* index_row(const Call& c, int i, int64_t row) {
    return c.operands[i] ? reinterpret_cast<Index*>(c.mask(i) + row * c.row_stride[i]) : nullptr;
}

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
