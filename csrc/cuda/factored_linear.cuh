// Factored first layers (plan/rewrite.py): y = x W_0 + (x x_s^T) D. The Gram matrix is large where images share a mean,
// and D mostly cancels it: it is made, kept and multiplied in double. It is small.
#pragma once
#include "call.cuh"

namespace fastmaml {
namespace cuda {

FM_DEVICE int rows_of_extent(const Call& c, int extent) {  // as enum class Rows
    const int64_t s = c.task->n_support, q = c.task->n_query;
    return static_cast<int>(extent == 1 ? s : extent == 2 ? q : s + q);
}

FM_DEVICE double* gram_row(const Call& c, int i, int r) {
    return reinterpret_cast<double*>(c.operands[i].at + r * c.operands[i].row_stride);
}

FM_DEVICE void gram_fwd(const Call& c) {  // x, xs, g; sizes {in, extent}: an element by the lanes of a warp
    const int in = c.size(0), ns = static_cast<int>(c.task->n_support), lane = c.lane();
    const int count = rows_of_extent(c, c.size(1)) * ns;
    for (int i = c.b.thread / kWarp; i < count; i += c.b.threads / kWarp) {
        double sum = 0;
        for (int k = lane; k < in; k += kWarp) sum += static_cast<double>(c.row(0, i / ns)[k]) * c.row(1, i % ns)[k];
        sum = c.b.warp_sum(sum);
        if (lane == 0) gram_row(c, 2, i / ns)[i % ns] = sum;
    }
}

FM_DEVICE void factored_linear_fwd(const Call& c) {  // a, g, d, b?, y
    const int columns = padded(c.size(0)), ns = static_cast<int>(c.task->n_support);
    each(c, rows_of_extent(c, c.size(1)) * columns, [&](int i) {
        const int r = i / columns, o = i % columns;
        double acc = static_cast<double>(c.row(0, r)[o]) + (c.has(3) ? c.f(3)[o] : 0.f);
        for (int m = 0; m < ns; ++m) acc += gram_row(c, 1, r)[m] * c.row(2, m)[o];
        c.row(4, r)[o] = static_cast<float>(acc);
    });
}

FM_DEVICE void factored_linear_jvp(const Call& c) {  // d?, bt, yt
    each_element(c, padded(c.size(0)),
                 [&](int r, int j) { c.row(2, r)[j] = (c.has(0) ? c.row(0, r)[j] : 0.f) + c.f(1)[j]; });
}

FM_DEVICE void factored_linear_bwd(const Call& c) {  // g, dy, dd
    const int columns = padded(c.size(0)), n = rows_of_extent(c, c.size(1));
    each(c, static_cast<int>(c.task->n_support) * columns, [&](int i) {
        const int m = i / columns, o = i % columns;
        double acc = 0;
        for (int r = 0; r < n; ++r) acc += gram_row(c, 0, r)[m] * c.row(1, r)[o];
        c.row(2, m)[o] = static_cast<float>(acc);
    });
}

}  // namespace cuda
}  // namespace fastmaml
