// Mean squared error. The target is the user's own array: its rows are not padded.
#pragma once
#include "cross_entropy.cuh"

namespace fastmaml {
namespace cuda {

FM_DEVICE double mse_scale(const Call& c) {
    return 1.0 / (c.size(1) == 1 ? 1.0 : c.size(1) == 2 ? c.number(1) : static_cast<double>(c.n) * c.size(0));
}

FM_DEVICE void mse_fwd(const Call& c) {  // z, target, (weight), loss?, correct?
    const double loss = sum_of_rows(c, [&](int r) -> double {
        double sum = 0;
        for (int j = 0; j < c.size(0); ++j) {
            const double d = static_cast<double>(c.row(0, r)[j]) - c.row(1, r)[j];
            sum += d * d;
        }
        return sum;
    });
    put_scalar(c, 3, loss * mse_scale(c));
    put_scalar(c, 4, 0.0);  // nothing is right or wrong here
}

FM_DEVICE void mse_bwd(const Call& c) {  // z, target, (weight), step_weight?, dz
    const float scale = static_cast<float>(2.0 * mse_scale(c) * c.scalar(3, 1.f));
    each_element(c, padded(c.size(0)), [&](int r, int j) {
        c.row(4, r)[j] = j < c.size(0) ? (c.row(0, r)[j] - c.row(1, r)[j]) * scale : 0.f;
    });
}

FM_DEVICE void mse_jvp(const Call& c) {  // z, target, (weight), zt, losst
    const double tangent = sum_of_rows(c, [&](int r) -> double {
        double sum = 0;
        for (int j = 0; j < c.size(0); ++j)
            sum += (static_cast<double>(c.row(0, r)[j]) - c.row(1, r)[j]) * c.row(3, r)[j];
        return sum;
    });
    put_scalar(c, 4, 2.0 * tangent * mse_scale(c));
}

FM_DEVICE void mse_bwd_jvp(const Call& c) {  // z, target, (weight), zt, dzt
    const float scale = static_cast<float>(2.0 * mse_scale(c));
    each_element(c, padded(c.size(0)),
                 [&](int r, int j) { c.row(4, r)[j] = j < c.size(0) ? c.row(3, r)[j] * scale : 0.f; });
}

}  // namespace cuda
}  // namespace fastmaml
