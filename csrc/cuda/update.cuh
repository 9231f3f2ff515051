// Updates and sums over whole arrays, and the moves of rows: everything that is one pass over memory.
#pragma once
#include "call.cuh"

namespace fastmaml {
namespace cuda {

FM_DEVICE void sgd_fwd(const Call& c) {
    const float *theta = c.f(0), *g = c.f(1), *rate = c.f(2);
    const int step = c.size(1) ? 1 : 0;
    each(c, padded(c.size(0)), [&](int i) { c.f(3)[i] = fmaf(-rate[i * step], g[i], theta[i]); });
}

FM_DEVICE void sgd_bwd(const Call& c) {
    const float *bar = c.f(0), *rate = c.f(1);
    const int step = c.size(1) ? 1 : 0;
    each(c, padded(c.size(0)), [&](int i) { c.f(2)[i] = -rate[i * step] * bar[i]; });
}

FM_DEVICE void sgd_bwd_rate(const Call& c) {
    const float *bar = c.f(0), *g = c.f(1), *acc = c.f(2);
    float* out = c.f(3);
    const int n =
        padded(c.size(0)) * (c.size(2) ? static_cast<int>(c.task->n_support) : 1);  // padded rows lie together
    if (c.size(1)) return each(c, n, [&](int i) { out[i] = acc ? acc[i] - bar[i] * g[i] : -(bar[i] * g[i]); });
    const double before = acc ? *acc : 0.0;
    const double sum = sum_all(c, n, [&](int i) { return static_cast<double>(bar[i]) * g[i]; });
    if (c.b.thread == 0) store_scalar(out, before - sum);
}

FM_DEVICE void dot_fwd(const Call& c) {
    const float *x = c.f(0), *y = c.f(1), *acc = c.f(2);
    const double sum = sum_all(c, padded(c.size(0)), [&](int i) { return static_cast<double>(x[i]) * y[i]; });
    if (c.b.thread == 0) store_scalar(c.f(3), (acc ? *acc : 0.0) + sum);
}

FM_DEVICE void ratio_fwd(const Call& c) {
    if (c.b.thread == 0) store_scalar(c.f(2), *c.f(1) == 0.f ? 0.f : *c.f(0) / *c.f(1));
}

FM_DEVICE void clip_norm_fwd(const Call& c) {
    if (c.b.thread) return;
    const double most = c.number(0), norm = sqrt(static_cast<double>(*c.f(0))), scale = most / (norm + 1e-6);
    store_scalar(c.f(1), scale > 1.0 ? 1.0 : scale);
    if (c.f(2)) store_scalar(c.f(2), scale > 1.0 || norm == 0.0 ? 0.0 : -scale / ((norm + 1e-6) * norm));
}

FM_DEVICE void clip_value_fwd(const Call& c) {
    const float *g = c.f(0), high = c.number(0);
    each(c, padded(c.size(0)), [&](int i) {
        c.f(1)[i] = g[i] > high ? high : g[i] < -high ? -high : g[i];  // a NaN stays one
    });
}

FM_DEVICE void clip_value_bwd(const Call& c) {
    const float *g = c.f(0), *dc = c.f(1), high = c.number(0);
    each(c, padded(c.size(0)), [&](int i) { c.f(2)[i] = g[i] <= high && g[i] >= -high ? dc[i] : 0.f; });
}

FM_DEVICE float signed_scale(const Call& c, int scale) { return c.number(0) * c.scalar(scale, 1.f); }

FM_DEVICE void axpy_fwd(const Call& c) {
    const float s = signed_scale(c, 2), *acc = c.f(0), *x = c.f(1);
    if (!c.size(1)) return each(c, padded(c.size(0)), [&](int i) { c.f(3)[i] = fmaf(s, x[i], acc[i]); });
    if (c.b.thread == 0) store_scalar(c.f(3), *acc + s * *x);
}

FM_DEVICE void scale_fwd(const Call& c) {
    const float s = signed_scale(c, 1), *x = c.f(0);
    if (!c.size(1)) return each(c, padded(c.size(0)), [&](int i) { c.f(2)[i] = s * x[i]; });
    if (c.b.thread == 0) store_scalar(c.f(2), s * *x);
}

FM_DEVICE void add_fwd(const Call& c) {
    const float *x = c.f(0), *y = c.f(1);
    each(c, padded(c.size(0)), [&](int i) { c.f(2)[i] = (x ? x[i] : 0.f) + (y ? y[i] : 0.f); });
}

FM_DEVICE void zero_fwd(const Call& c) {
    each(c, padded(c.size(0)), [&](int i) { c.f(0)[i] = 0.f; });
}

FM_DEVICE void copy_fwd(const Call& c) {
    each(c, padded(c.size(0)), [&](int i) { c.f(1)[i] = c.f(0)[i]; });
}

// ---------------------------------------------------------------------------------------------------- rows
FM_DEVICE void copy_rows_fwd(const Call& c) {
    const int width = c.size(0);
    each_element(c, c.size(2) ? width : padded(width),
                 [&](int r, int j) { c.row(1, r)[j] = j < width ? c.row(0, r)[j] : 0.f; });
}

FM_DEVICE void add_rows_fwd(const Call& c) {
    each_element(c, padded(c.size(0)), [&](int r, int j) { c.row(2, r)[j] = c.row(0, r)[j] + c.row(1, r)[j]; });
}

FM_DEVICE void axpy_rows_fwd(const Call& c) {
    const float s = signed_scale(c, 2);
    each_element(c, padded(c.size(0)), [&](int r, int j) { c.row(3, r)[j] = fmaf(s, c.row(1, r)[j], c.row(0, r)[j]); });
}

FM_DEVICE void scale_rows_fwd(const Call& c) {
    const float s = signed_scale(c, 1);
    each_element(c, padded(c.size(0)), [&](int r, int j) { c.row(2, r)[j] = s * c.row(0, r)[j]; });
}

FM_DEVICE void sgd_rows_fwd(const Call& c) {
    const float rate = *c.f(2);
    each_element(c, padded(c.size(0)),
                 [&](int r, int j) { c.row(3, r)[j] = fmaf(-rate, c.row(1, r)[j], c.row(0, r)[j]); });
}

FM_DEVICE void sgd_rows_bwd(const Call& c) {
    const float rate = *c.f(1);
    each_element(c, padded(c.size(0)), [&](int r, int j) { c.row(2, r)[j] = -rate * c.row(0, r)[j]; });
}

FM_DEVICE void zero_rows_fwd(const Call& c) {
    each_element(c, padded(c.size(0)), [&](int r, int j) { c.row(0, r)[j] = 0.f; });
}

// n rows of operand `from` (-1: zeros), from row `from0` on, to those of `to` from `to0` on
FM_DEVICE void move_rows(const Call& c, int from, int64_t from0, int to, int64_t to0, int64_t n) {
    const int width = c.size(0), columns = padded(width);
    each(c, static_cast<int>(n) * columns, [&](int i) {
        const int r = i / columns, j = i % columns;
        c.row(to, static_cast<int>(to0) + r)[j] =
            from >= 0 && j < width ? c.row(from, static_cast<int>(from0) + r)[j] : 0.f;
    });
}

FM_DEVICE void join_rows_fwd(const Call& c) {
    move_rows(c, 0, 0, 2, 0, c.task->n_support);
    move_rows(c, 1, 0, 2, c.task->n_support, c.task->n_query);
}

FM_DEVICE void support_rows_fwd(const Call& c) { move_rows(c, 0, 0, 1, 0, c.task->n_support); }

FM_DEVICE void query_rows_fwd(const Call& c) { move_rows(c, 0, c.task->n_support, 1, 0, c.task->n_query); }

FM_DEVICE void query_rows_bwd(const Call& c) {
    move_rows(c, -1, 0, 1, 0, c.task->n_support);
    move_rows(c, 0, 0, 1, c.task->n_support, c.task->n_query);
}

}  // namespace cuda
}  // namespace fastmaml
