// Windows over an image [h][w][channels padded to kLane]: which taps of a window lie inside, which windows hold a
// pixel.
#pragma once
#include "sums.h"

namespace fastmaml {
namespace FASTMAML_ISA {

struct Span {
    int64_t begin, end;
};

struct Axis {
    int64_t size, kernel, stride, pad, outputs;
    Axis(int64_t size, int64_t kernel, int64_t stride, int64_t pad)
        : size(size), kernel(kernel), stride(stride), pad(pad), outputs((size + 2 * pad - kernel) / stride + 1) {}
    int64_t start(int64_t o) const { return o * stride - pad; }  // of the window of output o
    Span taps(int64_t o) const {                                 // of that window that lie in the image
        const int64_t s = start(o);
        return {s < 0 ? -s : 0, size - s < kernel ? size - s : kernel};
    }
};

// The windows that hold a position, for positions in ascending order: no division per pixel.
struct Holders {
    const Axis& axis;
    Span windows = {0, 0};
    explicit Holders(const Axis& axis) : axis(axis) {}
    Span of(int64_t position) {
        while (windows.begin < axis.outputs && axis.start(windows.begin) + axis.kernel <= position) ++windows.begin;
        while (windows.end < axis.outputs && axis.start(windows.end) <= position) ++windows.end;
        return windows;
    }
};

struct Pool {  // sizes {c, h, w, kh, kw, sh, sw, ph, pw, ...}
    Axis rows, cols;
    int64_t lanes;  // floats of a pixel
    explicit Pool(const Call& c)
        : rows(c.sizes[1], c.sizes[3], c.sizes[5], c.sizes[7]),
          cols(c.sizes[2], c.sizes[4], c.sizes[6], c.sizes[8]),
          lanes(pad_lane(c.sizes[0])) {}
    int64_t in(int64_t i, int64_t j) const { return (i * cols.size + j) * lanes; }
    int64_t out(int64_t i, int64_t j) const { return (i * cols.outputs + j) * lanes; }
};

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
