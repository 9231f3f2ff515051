// Mean squared error. The target is the user's own array: its rows are not padded, so nothing here reads past the last
// output.
#include "../simd.h"

namespace fastmaml {
namespace FASTMAML_ISA {

static double scale_of(const Call& c) {
    return 1.0 / (c.sizes[1] == 1 ? 1.0 : c.sizes[1] == 2 ? c.numbers[1] : static_cast<double>(c.n_total * c.sizes[0]));
}

static void add_loss(const Call& c, int i, double value) {
    if (c.operands[i]) *c.f(i) = static_cast<float>(c.first ? value : *c.f(i) + value);
}

// out = f(column, outputs left) for the vectors of every row; what is loaded in part is zero in the padding
template <class F>
static inline void each_row(const Call& c, int out, F f) {
    const int64_t n = c.n, width = c.sizes[0], ld = c.stride(out);
    float* row = c.f(out);
    for (int64_t i = 0; i < n; ++i, row += ld)
        for (int64_t j = 0; j < pad_lane(width); j += VL) store(row + j, f(i, j, width - j));
}

void mse_fwd(const Call& c) {  // z, target, (weight), loss?, correct?
    if (c.part) return;
    double loss = 0;
    const float *z = c.f(0), *target = c.f(1);
    for (int64_t i = 0; i < c.n; ++i, z += c.stride(0), target += c.stride(1))
        for (int64_t j = 0; j < c.sizes[0]; ++j) {
            const double d = z[j] - target[j];
            loss += d * d;
        }
    add_loss(c, 3, loss * scale_of(c));
    add_loss(c, 4, 0.0);  // nothing is right or wrong here
}

void mse_bwd(const Call& c) {  // z, target, (weight), step_weight?, dz
    if (c.part) return;
    const float scale = static_cast<float>(2.0 * scale_of(c) * (c.operands[3] ? *c.f(3) : 1.f));
    const float *z = c.f(0), *target = c.f(1);
    const int64_t ldz = c.stride(0), ldt = c.stride(1);
    const vec by = splat(scale);
    each_row(c, 4, [=](int64_t i, int64_t j, int64_t left) {
        return (load_part(z + i * ldz + j, left) - load_part(target + i * ldt + j, left)) * by;
    });
}

void mse_jvp(const Call& c) {  // z, target, (weight), zt, losst
    if (c.part) return;
    double loss_t = 0;
    for (int64_t i = 0; i < c.n; ++i) {
        const float *z = c.f(0) + i * c.stride(0), *target = c.f(1) + i * c.stride(1), *zt = c.f(3) + i * c.stride(3);
        for (int64_t j = 0; j < c.sizes[0]; ++j) loss_t += static_cast<double>(z[j] - target[j]) * zt[j];
    }
    add_loss(c, 4, 2.0 * loss_t * scale_of(c));
}

void mse_bwd_jvp(const Call& c) {  // z, target, (weight), zt, dzt
    if (c.part) return;
    const float* zt = c.f(3);
    const int64_t ld = c.stride(3);
    const vec by = splat(static_cast<float>(2.0 * scale_of(c)));
    each_row(c, 4, [=](int64_t i, int64_t j, int64_t left) { return load_part(zt + i * ld + j, left) * by; });
}

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
