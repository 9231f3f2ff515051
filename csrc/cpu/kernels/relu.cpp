// Piecewise linear activations: slope 0 is ReLU, any other one leaky ReLU.
#include "../simd.h"

namespace fastmaml {
namespace FASTMAML_ISA {

// body(row, column); rows without gaps, as the pixels of images, are one long one
template <class F>
static inline void for_rows(const Call& c, bool dense, F body) {
    const int64_t columns = pad_lane(c.sizes[0]);
    const Area mine = share_rows(columns, c);
    if (dense && mine.cols.begin == 0 && mine.cols.end == columns) {
        for (int64_t j = mine.rows.begin * columns; j < mine.rows.end * columns; j += VL) body(0, j);
        return;
    }
    for (int64_t i = mine.rows.begin; i < mine.rows.end; ++i)
        for (int64_t j = mine.cols.begin; j < mine.cols.end; j += VL) body(i, j);
}

void relu_fwd(const Call& c) {  // x, y?, mask?
    const float *x = c.f(0), slope = c.numbers[0];
    float* y = c.f(1);
    uint8_t* mask = c.mask(2);
    const int64_t sx = c.stride(0), sy = c.stride(1), sm = c.row_stride[2];
    const int64_t columns = pad_lane(c.sizes[0]);
    const bool dense = sx == columns && (!y || sy == columns) && (!mask || sm == columns);
    for_rows(c, dense, [=](int64_t i, int64_t j) {
        const vec v = load(x + i * sx + j);
        // zero times -infinity is no number, so ReLU selects; asked this way round, a NaN passes
        if (y)
            store(y + i * sy + j, slope == 0.f ? select(v <= vec{}, vec{}, v) : select(v > vec{}, v, v * splat(slope)));
        if (mask) store_mask(mask + i * sm + j, v > vec{});
    });
}

static inline void masked(const Call& c, int of, int with, int to) {  // v where the mask is set, slope v elsewhere
    const float *v = c.f(of), slope = c.numbers[0];
    const uint8_t* mask = c.mask(with);
    float* out = c.f(to);
    const int64_t sv = c.stride(of), sm = c.row_stride[with], so = c.stride(to);
    const int64_t columns = pad_lane(c.sizes[0]);
    for_rows(c, sv == columns && sm == columns && so == columns, [=](int64_t i, int64_t j) {
        const vec value = load(v + i * sv + j);
        const vec low = slope == 0.f ? vec{} : value * splat(slope);
        store(out + i * so + j, select(load_mask(mask + i * sm + j), value, low));
    });
}

void relu_replay(const Call& c) { masked(c, 0, 1, 2); }  // x, mask, y
void relu_bwd(const Call& c) { masked(c, 1, 0, 2); }     // mask, dy, dx

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
