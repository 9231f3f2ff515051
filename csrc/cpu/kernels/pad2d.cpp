// Zeros around an image. A negative pad crops, so the reverse is the same kernel with the signs turned.
#include "sums.h"

namespace fastmaml {
namespace FASTMAML_ISA {

static inline void zero(float* p, int64_t floats) {
    for (int64_t l = 0; l < floats; l += VL) store(p + l, vec{});
}

void pad2d_fwd(const Call& c) {  // x, y; sizes {c, h, w, top, bottom, left, right}
    const int64_t *s = c.sizes, lanes = pad_lane(s[0]), h = s[1], w = s[2], top = s[3], left = s[5];
    const int64_t rows = h + top + s[4], cols = w + left + s[6];
    const int64_t begin = left < 0 ? 0 : left < cols ? left : cols;  // the columns of y that come from x
    const int64_t end = left + w > cols ? cols : left + w < begin ? begin : left + w;
    for_lines(c, rows, [&](int64_t row, int64_t oh) {
        float* y = c.f(1) + row * c.stride(1) + oh * cols * lanes;
        const int64_t ih = oh - top;
        if (ih < 0 || ih >= h) return zero(y, cols * lanes);
        const float* x = c.f(0) + row * c.stride(0) + ih * w * lanes;
        zero(y, begin * lanes);
        for (int64_t l = begin * lanes; l < end * lanes; l += VL) store(y + l, load(x + l - left * lanes));
        zero(y + end * lanes, (cols - end) * lanes);
    });
}

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
