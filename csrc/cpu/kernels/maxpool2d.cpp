// Max pooling. What is kept of a window is the position of its maximum inside it: a byte for any usual kernel, and
// equal for equal windows, so that the reverse asks of each pixel's windows whether it was the one. That gathers, in
// the order of the windows; a scatter would have to write zeros first and could not be shared out by lines.
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

template <int kSide, class Index>
static inline void window_max(const Pool& g, int64_t oh, int64_t ow, const float* x, float* y, Index* index) {
    const Span i = g.rows.taps(oh), j = g.cols.taps(ow);
    const int64_t first = g.in(g.rows.start(oh) + i.begin, g.cols.start(ow) + j.begin);
    for (int64_t l = 0; l < g.lanes; l += VL) {
        vec best = load(x + first + l);
        ivec which = isplat(static_cast<int32_t>(i.begin * g.cols.kernel + j.begin));
        for_taps<kSide>(g, oh, ow, [&](int64_t at, int32_t tap) {
            const vec v = load(x + at + l);
            const ivec take = (v > best) | (v != v);  // as torch: the first maximum, and any NaN
            best = select(take, v, best);
            which = choose(take, isplat(tap), which);
        });
        if (y) store(y + l, best);
        if (index) store_index(index + l, which);
    }
}

template <int kSide, class Index>
static inline void window_replay(const Pool& g, int64_t oh, int64_t ow, const float* x, const Index* index, float* y) {
    for (int64_t l = 0; l < g.lanes; l += VL) {
        const ivec which = load_index(index + l);
        vec v = vec{};
        for_taps<kSide>(g, oh, ow,
                        [&](int64_t at, int32_t tap) { v = select(which == isplat(tap), load(x + at + l), v); });
        store(y + l, v);
    }
}

template <class Index>
static inline Index* index_row(const Call& c, int i, int64_t row) {
    return c.operands[i] ? reinterpret_cast<Index*>(c.mask(i) + row * c.row_stride[i]) : nullptr;
}

template <class Index>
static inline void forward(const Call& c) {
    const Pool g(c);
    const bool whole = tiles_2x2(g);
    for_lines(c, g.rows.outputs, [&](int64_t row, int64_t oh) {
        const float* x = c.f(0) + row * c.stride(0);
        float* y = c.operands[1] ? c.f(1) + row * c.stride(1) : nullptr;
        Index* index = index_row<Index>(c, 2, row);
        for (int64_t ow = 0; ow < g.cols.outputs; ++ow) {
            const int64_t at = g.out(oh, ow);
            (whole ? window_max<2, Index> : window_max<0, Index>)(g, oh, ow, x, y ? y + at : y,
                                                                  index ? index + at : index);
        }
    });
}

template <class Index>
static inline void replay(const Call& c) {
    const Pool g(c);
    const bool whole = tiles_2x2(g);
    for_lines(c, g.rows.outputs, [&](int64_t row, int64_t oh) {
        const float* x = c.f(0) + row * c.stride(0);
        const Index* index = index_row<Index>(c, 1, row);
        float* y = c.f(2) + row * c.stride(2);
        for (int64_t ow = 0; ow < g.cols.outputs; ++ow) {
            const int64_t at = g.out(oh, ow);
            (whole ? window_replay<2, Index> : window_replay<0, Index>)(g, oh, ow, x, index + at, y + at);
        }
    });
}

template <class Index>
static inline void backward(const Call& c) {
    const Pool g(c);
    for_lines(c, g.rows.size, [&](int64_t row, int64_t ih) {
        const float* dy = c.f(0) + row * c.stride(0);
        const Index* index = index_row<Index>(c, 1, row);
        float* dx = c.f(2) + row * c.stride(2) + g.in(ih, 0);
        const Span i = Holders(g.rows).of(ih);
        Holders holders(g.cols);
        for (int64_t iw = 0; iw < g.cols.size; ++iw, dx += g.lanes) {
            const Span j = holders.of(iw);
            for (int64_t l = 0; l < g.lanes; l += VL) {
                vec sum = vec{};
                for (int64_t oh = i.begin; oh < i.end; ++oh)
                    for (int64_t ow = j.begin; ow < j.end; ++ow) {
                        const int64_t at = g.out(oh, ow) + l;
                        const int64_t tap = (ih - g.rows.start(oh)) * g.cols.kernel + iw - g.cols.start(ow);
                        const ivec mine = load_index(index + at) == isplat(static_cast<int32_t>(tap));
                        sum += select(mine, load(dy + at), vec{});
                    }
                store(dx + l, sum);
            }
        }
    });
}

void maxpool2d_fwd(const Call& c) { c.sizes[9] ? forward<int32_t>(c) : forward<uint8_t>(c); }    // x, y?, index?
void maxpool2d_replay(const Call& c) { c.sizes[9] ? replay<int32_t>(c) : replay<uint8_t>(c); }   // x, index, y
void maxpool2d_bwd(const Call& c) { c.sizes[9] ? backward<int32_t>(c) : backward<uint8_t>(c); }  // dy, index, dx

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
