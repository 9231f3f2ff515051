// Batch norm of a max pooling's choice (plan/pooling.py): of each window of x the element that gamma makes the largest.
// The gradient of x is that of batchnorm.cpp, with dy at the chosen pixels and zero at the others. Windows do not
// overlap.
#include "windows.h"

namespace fastmaml {
namespace FASTMAML_ISA {
namespace {

constexpr float kNothing[kLane] = {};

// An operand with one number per channel, at some channels
vec channel(const Call& c, int i, int64_t l, float absent = 0.f) {
    return c.operands[i] ? load(c.f(i) + l) : splat(absent);
}

// A row of pixels of an operand; absent ones read zeros
struct Line {
    const float* p = kNothing;
    int64_t pixel = 0;
    bool given = false;
    Line(const Call& c, int i, int64_t row, int64_t offset, int64_t lanes) {
        if (c.operands[i]) p = c.f(i) + row * c.stride(i) + offset, pixel = lanes, given = true;
    }
    vec at(int64_t i, int64_t l) const { return given ? load(p + i * pixel + l) : vec{}; }
    vec at(int64_t window, int64_t l, ivec chosen) const {  // of a pooled operand, at the pixels that were chosen
        return window < 0 ? vec{} : select(chosen, at(window, l), vec{});
    }
};

struct Correction {  // of the rows that made the statistics: 1 / N, or 0
    float share;
    Correction(const Call& c, int64_t row) : share(0.f) {
        const int64_t stat = c.sizes[10], rows = stat == -1 ? c.n_total : stat == -2 ? c.task->n_support : 0;
        if (c.row0 + row < rows) share = 1.f / static_cast<float>(rows * c.sizes[1] * c.sizes[2]);
    }
};

// body(pixel, window, chosen by its window) along a line of the image; window -1: the pixel is in none. kSide: the side
// of windows that tile, 0: any.
template <int kSide, class Index, class F>
void for_pixels(const Pool& g, int64_t ih, const Index* index, int64_t l, F body) {
    const int64_t side = kSide ? kSide : g.cols.kernel, stride = kSide ? kSide : g.cols.stride;
    const int64_t oh = ih / g.rows.stride, a = ih - oh * g.rows.stride;
    int64_t iw = 0;
    if (a < g.rows.kernel && oh < g.rows.outputs)
        for (int64_t ow = 0; ow < g.cols.outputs; ++ow) {
            const ivec which = load_index(index + g.out(oh, ow) + l);
#pragma GCC unroll 2
            for (int64_t b = 0; b < side; ++b) body(iw + b, ow, which == isplat(static_cast<int32_t>(a * side + b)));
            for (int64_t b = side; b < stride && iw + b < g.cols.size; ++b) body(iw + b, -1, ivec{});
            iw += stride;
        }
    for (; iw < g.cols.size; ++iw) body(iw, -1, ivec{});
}

// x, mean, rstd, gamma?, dy, index, s1, s2, dx: gamma rstd (dy - (s1 + xhat s2) / N)
template <int kSide, class Index>
void backward(const Call& c) {
    const Pool g(c);
    for_lines(c, g.rows.size, [&](int64_t row, int64_t ih) {
        const int64_t oh = ih / g.rows.stride;
        const Index* index = index_row<Index>(c, 5, row);
        const Line x(c, 0, row, g.in(ih, 0), g.lanes), dy(c, 4, row, g.out(oh, 0), g.lanes);
        const vec share = splat(Correction(c, row).share);
        float* dx = c.f(8) + row * c.stride(8) + g.in(ih, 0);
        for (int64_t l = 0; l < g.lanes; l += VL) {
            const vec mean = channel(c, 1, l), rstd = channel(c, 2, l), scale = rstd * channel(c, 3, l, 1.f);
            const vec e1 = channel(c, 6, l) * share, e2 = rstd * channel(c, 7, l) * share;
            for_pixels<kSide>(g, ih, index, l, [&](int64_t i, int64_t window, ivec mine) {
                const vec d = dy.at(window, l, mine);
                store(dx + i * g.lanes + l, scale * fma(mean - x.at(i, l), e2, d - e1));
            });
        }
    });
}

// x, mean, rstd, gamma?, dy?, index, s1?, s2?, xt?, meant?, rstdt?, gammat?, dyt?, s1t?, s2t?, dxt: the product rule
template <int kSide, class Index>
void backward_jvp(const Call& c) {
    const Pool g(c);
    for_lines(c, g.rows.size, [&](int64_t row, int64_t ih) {
        const int64_t oh = ih / g.rows.stride;
        const Index* index = index_row<Index>(c, 5, row);
        const Line x(c, 0, row, g.in(ih, 0), g.lanes), xt(c, 8, row, g.in(ih, 0), g.lanes);
        const Line dy(c, 4, row, g.out(oh, 0), g.lanes), dyt(c, 12, row, g.out(oh, 0), g.lanes);
        const vec share = splat(Correction(c, row).share);
        float* dxt = c.f(15) + row * c.stride(15) + g.in(ih, 0);
        for (int64_t l = 0; l < g.lanes; l += VL) {
            const vec mean = channel(c, 1, l), rstd = channel(c, 2, l), gamma = channel(c, 3, l, 1.f);
            const vec mean_t = channel(c, 9, l), rstd_t = channel(c, 10, l), scale = gamma * rstd;
            const vec scale_t = fma(channel(c, 11, l), rstd, gamma * rstd_t);
            const vec e1 = channel(c, 6, l) * share, e2 = channel(c, 7, l) * share;
            const vec e1t = channel(c, 13, l) * share, e2t = channel(c, 14, l) * share;
            for_pixels<kSide>(g, ih, index, l, [&](int64_t i, int64_t window, ivec mine) {
                const vec centred = x.at(i, l) - mean, xhat = centred * rstd;
                const vec xhat_t = fma(xt.at(i, l) - mean_t, rstd, centred * rstd_t);
                const vec inner = fma(-xhat, e2, dy.at(window, l, mine) - e1);
                const vec inner_t = fma(-xhat_t, e2, fma(-xhat, e2t, dyt.at(window, l, mine) - e1t));
                store(dxt + i * g.lanes + l, fma(scale_t, inner, scale * inner_t));
            });
        }
    });
}

// x, gamma?, y?, index?
template <class Index>
void choose_of_windows(const Call& c) {
    const Pool g(c);
    const bool whole = tiles_2x2(g);
    for_lines(c, g.rows.outputs, [&](int64_t row, int64_t oh) {
        const float* x = c.f(0) + row * c.stride(0);
        float* y = c.operands[2] ? c.f(2) + row * c.stride(2) : nullptr;
        Index* index = index_row<Index>(c, 3, row);
        const int64_t at = g.out(oh, 0);
        (whole ? line_max<2, true, Index> : line_max<0, true, Index>)(g, oh, x, c.f(1), y ? y + at : y,
                                                                      index ? index + at : index);
    });
}

}  // namespace

void batchnorm_maxpool2d_fwd(const Call& c) {
    c.sizes[9] ? choose_of_windows<int32_t>(c) : choose_of_windows<uint8_t>(c);
}
static inline bool tiles(const Call& c) {
    const Pool g(c);
    return tiles_2x2(g) && g.cols.stride == 2 && !c.sizes[9];
}

void batchnorm_maxpool2d_bwd_input(const Call& c) {
    if (tiles(c)) return backward<2, uint8_t>(c);
    c.sizes[9] ? backward<0, int32_t>(c) : backward<0, uint8_t>(c);
}
void batchnorm_maxpool2d_bwd_input_jvp(const Call& c) {
    if (tiles(c)) return backward_jvp<2, uint8_t>(c);
    c.sizes[9] ? backward_jvp<0, int32_t>(c) : backward_jvp<0, uint8_t>(c);
}

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
