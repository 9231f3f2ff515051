// Max pooling. What is kept of a window is the position of its maximum inside it: a byte for any usual kernel, and
// equal for equal windows, so that the reverse asks of each pixel's windows whether it was the one. That gathers, in
// the order of the windows; a scatter would have to write zeros first and could not be shared out by lines.
#include "windows.h"

namespace fastmaml {
namespace FASTMAML_ISA {

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
static inline void forward(const Call& c) {
    const Pool g(c);
    const bool whole = tiles_2x2(g);
    for_lines(c, g.rows.outputs, [&](int64_t row, int64_t oh) {
        const float* x = c.f(0) + row * c.stride(0);
        float* y = c.operands[1] ? c.f(1) + row * c.stride(1) : nullptr;
        Index* index = index_row<Index>(c, 2, row);
        const int64_t at = g.out(oh, 0);
        (whole ? line_max<2, false, Index> : line_max<0, false, Index>)(g, oh, x, nullptr, y ? y + at : y,
                                                                        index ? index + at : index);
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
