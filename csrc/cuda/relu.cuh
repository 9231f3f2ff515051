// Piecewise linear activations: slope 0 is ReLU, any other one leaky ReLU.
#pragma once
#include "call.cuh"

namespace fastmaml {
namespace cuda {

FM_DEVICE void relu_fwd(const Call& c) {  // x, y?, mask?
    const float slope = c.number(0);
    each_element(c, padded(c.size(0)), [&](int r, int j) {
        const float v = c.row(0, r)[j];
        if (c.has(1)) c.row(1, r)[j] = slope == 0.f ? (v <= 0.f ? 0.f : v) : v > 0.f ? v : v * slope;
        if (c.has(2)) c.mask_row(2, r)[j] = v > 0.f;
    });
}

FM_DEVICE void masked(const Call& c, int of, int with, int to) {  // v where the mask is set, slope v elsewhere
    const float slope = c.number(0);
    each_element(c, padded(c.size(0)), [&](int r, int j) {
        const float v = c.row(of, r)[j];
        c.row(to, r)[j] = c.mask_row(with, r)[j] ? v : slope == 0.f ? 0.f : v * slope;
    });
}

FM_DEVICE void relu_replay(const Call& c) { masked(c, 0, 1, 2); }
FM_DEVICE void relu_bwd(const Call& c) { masked(c, 1, 0, 2); }

}  // namespace cuda
}  // namespace fastmaml
