// Layer norm and group norm of vectors: a warp has a row to itself, and its lanes share the sums over a group of
// channels. Statistics are computed anew by each mode: nothing of them crosses from one to another.
#pragma once
#include "batchnorm.cuh"

namespace fastmaml {
namespace cuda {

struct Set {  // the channels of one group in one row, and their statistics, which all lanes of the warp know
    const Call& c;
    int row, begin, end;
    float mean, rstd;

    FM_DEVICE Set(const Call& c, int row, int group) : c(c), row(row), mean(0.f), rstd(1.f) {
        const int members = c.size(0) / c.size(3);
        begin = group * members, end = begin + members;
        mean = expectation([&](int j) { return x(j); });
        mean += expectation([&](int j) { return x(j) - mean; });  // what rounding left in the first sum
        rstd = 1.f / sqrtf(expectation([&](int j) { return (x(j) - mean) * (x(j) - mean); }) + c.number(0));
    }
    FM_DEVICE float x(int j) const { return c.row(0, row)[j]; }
    FM_DEVICE float xhat(int j) const { return (x(j) - mean) * rstd; }
    FM_DEVICE float at(int i, int j) const { return row_at(c, i, row, j); }
    template <class F>
    FM_DEVICE float expectation(F term) const {
        float sum = 0.f;
        for (int j = begin + c.lane(); j < end; j += kWarp) sum += term(j);
        return c.b.warp_sum(sum) / (end - begin);
    }
};

// E[h] and E[h xhat]: what takes h to h - E[h] - xhat E[h xhat]
struct Projection {
    float mean, along;
    template <class H>
    FM_DEVICE Projection(const Set& s, H h)
        : mean(s.expectation(h)), along(s.expectation([&](int j) { return h(j) * s.xhat(j); })) {}
    FM_DEVICE float of(float h, float xhat) const { return fmaf(-xhat, along, h - mean); }
};

// f(set) gives a function of the channel, which makes operand `out`
template <class F>
FM_DEVICE void each_set(const Call& c, int out, F f) {
    each_row(c, [&](int r) {
        for (int g = 0; g < c.size(3); ++g) {
            const Set s(c, r, g);
            const auto value = f(s);
            for (int j = s.begin + c.lane(); j < s.end; j += kWarp) c.row(out, r)[j] = value(j);
        }
        for (int j = c.size(0) + c.lane(); j < padded(c.size(0)); j += kWarp) c.row(out, r)[j] = 0.f;
    });
}

FM_DEVICE void layernorm_fwd(const Call& c) {  // x, gamma?, beta?, y
    each_set(c, 3, [&](const Set& s) {
        return [&](int j) { return fmaf(s.xhat(j), vector_at(c, 1, j, 1.f), vector_at(c, 2, j)); };
    });
}

FM_DEVICE void layernorm_jvp(const Call& c) {  // x, gamma?, xt?, gammat?, betat?, yt
    each_set(c, 5, [&](const Set& s) {
        const Projection tangent(s, [&](int j) { return s.at(2, j); });
        return [&c, &s, tangent](int j) {
            const float xhat = s.xhat(j), xhat_t = s.rstd * tangent.of(s.at(2, j), xhat);
            return fmaf(vector_at(c, 1, j, 1.f), xhat_t, fmaf(vector_at(c, 3, j), xhat, vector_at(c, 4, j)));
        };
    });
}

FM_DEVICE void layernorm_bwd_input(const Call& c) {  // x, gamma?, dy, dx
    each_set(c, 3, [&](const Set& s) {
        const Projection p(s, [&](int j) { return s.at(2, j) * vector_at(c, 1, j, 1.f); });
        return [&c, &s, p](int j) { return s.rstd * p.of(s.at(2, j) * vector_at(c, 1, j, 1.f), s.xhat(j)); };
    });
}

// x, gamma?, dy?, xt?, gammat?, dyt?, dxt: the product rule on layernorm_bwd_input, with E[h xhat]'s tangent as
// E[ht xhat] + E[h xhatt], and rstdt = -rstd^2 E[xt xhat]
FM_DEVICE void layernorm_bwd_input_jvp(const Call& c) {
    each_set(c, 6, [&](const Set& s) {
        const auto h = [&c, &s](int j) { return s.at(2, j) * vector_at(c, 1, j, 1.f); };
        const auto ht = [&c, &s](int j) {
            return fmaf(s.at(5, j), vector_at(c, 1, j, 1.f), s.at(2, j) * vector_at(c, 4, j));
        };
        const Projection of_h(s, h), of_ht(s, ht), of_xt(s, [&](int j) { return s.at(3, j); });
        const float moved = s.expectation([&](int j) { return h(j) * s.rstd * of_xt.of(s.at(3, j), s.xhat(j)); });
        const float rstd_t = -(s.rstd * s.rstd) * of_xt.along;
        return [&s, h, ht, of_h, of_ht, of_xt, moved, rstd_t](int j) {
            const float xhat = s.xhat(j), xhat_t = s.rstd * of_xt.of(s.at(3, j), xhat);
            const float inner_t = ht(j) - of_ht.mean - fmaf(xhat, of_ht.along + moved, xhat_t * of_h.along);
            return fmaf(s.rstd, inner_t, rstd_t * of_h.of(h(j), xhat));
        };
    });
}

// dgamma, dbeta: every warp makes the statistics of all rows, and sums columns of its own. f(set, channel, a, b) adds
// the terms of a row.
template <class F>
FM_DEVICE void sum_channels(const Call& c, int dgamma, F f) {
    for (int g = 0; g < c.size(3); ++g) {
        const int members = c.size(0) / c.size(3), first = g * members;
        for (int j0 = 0; j0 < members; j0 += c.b.threads) {
            const int j = first + j0 + c.b.thread;
            float a = 0.f, b = 0.f;
            for (int r = 0; r < c.n;) {
                float chain_a = 0.f, chain_b = 0.f;
                for (const int stop = r + kWarp; r < c.n && r < stop; ++r) {
                    const Set s(c, r, g);
                    f(s, j < first + members ? j : first, chain_a, chain_b);
                }
                a += chain_a, b += chain_b;
            }
            if (j < first + members && c.has(dgamma)) c.f(dgamma)[j] = a;
            if (j < first + members && c.has(dgamma + 1)) c.f(dgamma + 1)[j] = b;
        }
    }
    for (int j = c.size(0) + c.b.thread; j < padded(c.size(0)); j += c.b.threads) {
        if (c.has(dgamma)) c.f(dgamma)[j] = 0.f;
        if (c.has(dgamma + 1)) c.f(dgamma + 1)[j] = 0.f;
    }
}

FM_DEVICE void layernorm_bwd_weight(const Call& c) {  // x, dy, dgamma?, dbeta?
    sum_channels(c, 2, [&](const Set& s, int j, float& a, float& b) {
        a = fmaf(s.at(1, j), s.xhat(j), a);
        b += s.at(1, j);
    });
}

FM_DEVICE void layernorm_bwd_weight_jvp(const Call& c) {  // x, dy?, xt?, dyt?, dgammat?, dbetat?
    sum_channels(c, 4, [&](const Set& s, int j, float& a, float& b) {
        const Projection tangent(s, [&](int i) { return s.at(2, i); });
        const float xhat = s.xhat(j), xhat_t = s.rstd * tangent.of(s.at(2, j), xhat);
        a = fmaf(s.at(3, j), xhat, fmaf(s.at(1, j), xhat_t, a));
        b += s.at(3, j);
    });
}

}  // namespace cuda
}  // namespace fastmaml
