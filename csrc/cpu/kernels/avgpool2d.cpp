// Average pooling, over windows and over the whole image. The reverse gathers, as in max pooling.
#include "pool.h"

namespace fastmaml {
namespace FASTMAML_ISA {
namespace {

struct Shares {  // 1 / how many elements the mean of a window is over
    const Pool& g;
    bool whole;  // the padding counts
    explicit Shares(const Call& c, const Pool& g) : g(g), whole(c.sizes[9] != 0) {}
    float of(int64_t oh, int64_t ow) const {
        const Span i = g.rows.taps(oh), j = g.cols.taps(ow);
        const int64_t n = whole ? g.rows.kernel * g.cols.kernel : (i.end - i.begin) * (j.end - j.begin);
        return 1.f / static_cast<float>(n);
    }
};

}  // namespace

void avgpool2d_fwd(const Call& c) {  // x, y
    const Pool g(c);
    const Shares shares(c, g);
    for_lines(c, g.rows.outputs, [&](int64_t row, int64_t oh) {
        const float* x = c.f(0) + row * c.stride(0);
        float* y = c.f(1) + row * c.stride(1) + g.out(oh, 0);
        const Span i = g.rows.taps(oh);
        for (int64_t ow = 0; ow < g.cols.outputs; ++ow, y += g.lanes) {
            const Span j = g.cols.taps(ow);
            const vec share = splat(shares.of(oh, ow));
            for (int64_t l = 0; l < g.lanes; l += VL) {
                vec sum = vec{};
                for (int64_t a = i.begin; a < i.end; ++a) {
                    const float* line = x + g.in(g.rows.start(oh) + a, g.cols.start(ow)) + l;
                    vec part = vec{};
                    for (int64_t b = j.begin; b < j.end; ++b) part += load(line + b * g.lanes);
                    sum += part;
                }
                store(y + l, sum * share);
            }
        }
    });
}

void avgpool2d_bwd(const Call& c) {  // dy, dx
    const Pool g(c);
    const Shares shares(c, g);
    for_lines(c, g.rows.size, [&](int64_t row, int64_t ih) {
        const float* dy = c.f(0) + row * c.stride(0);
        float* dx = c.f(1) + row * c.stride(1) + g.in(ih, 0);
        const Span i = Holders(g.rows).of(ih);
        Holders holders(g.cols);
        for (int64_t iw = 0; iw < g.cols.size; ++iw, dx += g.lanes) {
            const Span j = holders.of(iw);
            for (int64_t l = 0; l < g.lanes; l += VL) store(dx + l, vec{});
            for (int64_t oh = i.begin; oh < i.end; ++oh)
                for (int64_t ow = j.begin; ow < j.end; ++ow) {
                    const float* from = dy + g.out(oh, ow);
                    const vec share = splat(shares.of(oh, ow));
                    for (int64_t l = 0; l < g.lanes; l += VL) store(dx + l, fma(share, load(from + l), load(dx + l)));
                }
        }
    });
}

void global_avgpool2d_fwd(const Call& c) {  // x, y
    const int64_t lanes = pad_lane(c.sizes[0]), pixels = c.sizes[1] * c.sizes[2];
    const vec count = splat(static_cast<float>(pixels));
    for_lines(c, lanes / kLane, [&](int64_t row, int64_t lane) {
        for (int64_t l = lane * kLane; l < (lane + 1) * kLane; l += VL) {
            const float* x = c.f(0) + row * c.stride(0) + l;
            const vec sum = sum_terms(pixels, [&](int64_t p, vec& a, vec&) { a += load(x + p * lanes); }).a;
            store(c.f(1) + row * c.stride(1) + l, sum / count);
        }
    });
}

void global_avgpool2d_bwd(const Call& c) {  // dy, dx
    const int64_t lanes = pad_lane(c.sizes[0]), w = c.sizes[2];
    const vec count = splat(static_cast<float>(c.sizes[1] * w));
    for_lines(c, c.sizes[1], [&](int64_t row, int64_t ih) {
        const float* dy = c.f(0) + row * c.stride(0);
        float* dx = c.f(1) + row * c.stride(1) + ih * w * lanes;
        for (int64_t l = 0; l < lanes; l += VL) {
            const vec share = load(dy + l) / count;
            for (int64_t iw = 0; iw < w; ++iw) store(dx + iw * lanes + l, share);
        }
    });
}

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
