// Batch norm over rows of vectors. Statistics: a thread has a column to itself. An absent operand counts as zero.
#pragma once
#include "call.cuh"

namespace fastmaml {
namespace cuda {

FM_DEVICE int stat_rows(const Call& c) {  // how many rows make the statistics
    return c.size(1) == -1 ? c.n : c.size(1) == -2 ? static_cast<int>(c.task->n_support) : c.size(1);
}

FM_DEVICE float vector_at(const Call& c, int i, int j, float absent = 0.f) { return c.has(i) ? c.f(i)[j] : absent; }
FM_DEVICE float row_at(const Call& c, int i, int r, int j) { return c.has(i) ? c.row(i, r)[j] : 0.f; }

struct Centre {  // operands x, mean, rstd lead in every kernel; xhatt = (xt - meant) rstd + (x - mean) rstdt
    const Call& c;
    int j;
    float mean, rstd;
    FM_DEVICE Centre(const Call& c, int j) : c(c), j(j), mean(c.f(1)[j]), rstd(c.f(2)[j]) {}
    FM_DEVICE float of(int r) const { return c.row(0, r)[j] - mean; }
    FM_DEVICE float tangent(int r, float centred, int xt) const {  // operands xt, meant, rstdt
        return fmaf(row_at(c, xt, r, j) - vector_at(c, xt + 1, j), rstd, centred * vector_at(c, xt + 2, j));
    }
};

FM_DEVICE float rstd_of(const Call& c, int j, float var) {
    return j < c.size(0) ? 1.f / sqrtf(var + c.number(0)) : 0.f;
}

FM_DEVICE void batchnorm_stats_fwd(const Call& c) {  // x, mean, rstd
    const int n = stat_rows(c);
    each(c, padded(c.size(0)), [&](int j) {
        const float rough = sum_terms(n, [&](int r, float sum) { return sum + c.row(0, r)[j]; }) / n;
        const float rest = sum_terms(n, [&](int r, float sum) { return sum + (c.row(0, r)[j] - rough); }) / n;
        const float mean = rough + rest;  // rest: what rounding left in the first sum
        const float m2 = sum_terms(n, [&](int r, float sum) {
            const float d = c.row(0, r)[j] - mean;
            return fmaf(d, d, sum);
        });
        c.f(1)[j] = mean;
        c.f(2)[j] = rstd_of(c, j, m2 / n);
    });
}

FM_DEVICE void batchnorm_running_fwd(const Call& c) {  // running_mean, running_var, mean, rstd
    each(c, padded(c.size(0)), [&](int j) {
        c.f(2)[j] = c.f(0)[j];
        c.f(3)[j] = rstd_of(c, j, c.f(1)[j]);
    });
}

FM_DEVICE void batchnorm_stats_jvp(const Call& c) {  // x, mean, rstd, xt, meant, rstdt
    const int n = stat_rows(c);
    each(c, padded(c.size(0)), [&](int j) {
        const Centre k(c, j);
        const float along = sum_terms(n, [&](int r, float sum) { return fmaf(k.of(r), c.row(3, r)[j], sum); });
        c.f(4)[j] = sum_terms(n, [&](int r, float sum) { return sum + c.row(3, r)[j]; }) / n;
        c.f(5)[j] = -(k.rstd * k.rstd * k.rstd) * (along / n);
    });
}

FM_DEVICE void batchnorm_fwd(const Call& c) {  // x, mean, rstd, gamma?, beta?, y
    const Gate act(c, 6);
    each_element(c, padded(c.size(0)), [&](int r, int j) {
        const Centre k(c, j);
        c.row(5, r)[j] = act(fmaf(k.of(r), k.rstd * vector_at(c, 3, j, 1.f), vector_at(c, 4, j)), r, j);
    });
}

FM_DEVICE void batchnorm_jvp(const Call& c) {  // x, mean, rstd, gamma?, xt?, meant?, rstdt?, gammat?, betat?, yt
    const Gate act(c, 10);
    each_element(c, padded(c.size(0)), [&](int r, int j) {
        const Centre k(c, j);
        const float centred = k.of(r), xhat_t = k.tangent(r, centred, 4);
        const float other = fmaf(centred, k.rstd * vector_at(c, 7, j), vector_at(c, 8, j));
        c.row(9, r)[j] = act(fmaf(vector_at(c, 3, j, 1.f), xhat_t, other), r, j);
    });
}

FM_DEVICE void batchnorm_bwd_stats(const Call& c) {  // x, mean, rstd, dy, s1, s2
    each(c, padded(c.size(0)), [&](int j) {
        const Centre k(c, j);
        const float s1 = sum_terms(c.n, [&](int r, float sum) { return sum + c.row(3, r)[j]; });
        const float s2 = sum_terms(c.n, [&](int r, float sum) { return fmaf(k.of(r), c.row(3, r)[j], sum); });
        if (c.has(4)) c.f(4)[j] = s1;
        if (c.has(5)) c.f(5)[j] = s2 * k.rstd;
    });
}

FM_DEVICE void batchnorm_bwd_stats_jvp(const Call& c) {  // x, mean, rstd, dy?, xt?, meant?, rstdt?, dyt?, s1t?, s2t?
    each(c, padded(c.size(0)), [&](int j) {
        const Centre k(c, j);
        const float s1t = sum_terms(c.n, [&](int r, float sum) { return sum + row_at(c, 7, r, j); });
        const float s2t = sum_terms(c.n, [&](int r, float sum) {
            const float centred = k.of(r);
            return fmaf(row_at(c, 3, r, j), k.tangent(r, centred, 4), fmaf(centred * k.rstd, row_at(c, 7, r, j), sum));
        });
        if (c.has(8)) c.f(8)[j] = s1t;
        if (c.has(9)) c.f(9)[j] = s2t;
    });
}

FM_DEVICE void batchnorm_bwd_input(const Call& c) {  // x, mean, rstd, gamma?, dy, s1, s2, dx
    const Gate act(c, 8);
    const int n = stat_rows(c);
    each_element(c, padded(c.size(0)), [&](int r, int j) {
        const Centre k(c, j);
        const float scale = k.rstd * vector_at(c, 3, j, 1.f), dy = c.row(4, r)[j];
        const float e1 = vector_at(c, 5, j) / n, e2 = k.rstd * vector_at(c, 6, j) / n;
        c.row(7, r)[j] = act(r < n ? scale * fmaf(-k.of(r), e2, dy - e1) : scale * dy, r, j);
    });
}

// x, mean, rstd, gamma?, dy?, s1?, s2?, xt?, meant?, rstdt?, gammat?, dyt?, s1t?, s2t?, dxt: the product rule on
// batchnorm_bwd_input
FM_DEVICE void batchnorm_bwd_input_jvp(const Call& c) {
    const Gate act(c, 15);
    const int n = stat_rows(c);
    each_element(c, padded(c.size(0)), [&](int r, int j) {
        const Centre k(c, j);
        const float gamma = vector_at(c, 3, j, 1.f), scale = gamma * k.rstd;
        const float scale_t = fmaf(vector_at(c, 10, j), k.rstd, gamma * vector_at(c, 9, j));
        const float dy = row_at(c, 4, r, j), dyt = row_at(c, 11, r, j), centred = k.of(r), xhat = centred * k.rstd;
        float inner = dy, inner_t = dyt;
        if (r < n) {
            const float e1 = vector_at(c, 5, j) / n, e2 = vector_at(c, 6, j) / n;
            const float e1t = vector_at(c, 12, j) / n, e2t = vector_at(c, 13, j) / n;
            inner = fmaf(-xhat, e2, dy - e1);
            inner_t = fmaf(-k.tangent(r, centred, 7), e2, fmaf(-xhat, e2t, dyt - e1t));
        }
        c.row(14, r)[j] = act(fmaf(scale_t, inner, scale * inner_t), r, j);
    });
}

}  // namespace cuda
}  // namespace fastmaml
