// Cross entropy. Rows are short: a thread makes one. Sums over a row and over rows are in double.
#pragma once
#include "call.cuh"

namespace fastmaml {
namespace cuda {

struct Target {  // what a call's rows have in common; operands z, label, weight? lead in every kernel
    const Call& c;
    const float* weight;
    int ways;
    double share, target, scale, share_sum;  // q_j = share w_j, and target w_j on top at the label; sum of share w_j

    FM_DEVICE explicit Target(const Call& call) : c(call), weight(c.f(2)) {
        const int64_t mine = c.task->ways;
        ways = mine > 0 && mine < c.size(0) ? static_cast<int>(mine) : c.size(0);
        share = static_cast<double>(c.number(0)) / ways;
        target = 1.0 - c.number(0);
        share_sum = 0;
        for (int j = 0; share != 0 && j < ways; ++j) share_sum += share * weight_of(j);
        scale = 1.0 / (c.size(1) == 1 ? 1.0 : c.size(1) == 2 ? c.number(1) : label_weights());
    }
    FM_DEVICE double weight_of(int64_t j) const { return weight ? weight[j] : 1.0; }
    FM_DEVICE bool valid(int64_t y) const { return y >= 0 && y < ways; }
    FM_DEVICE double label_weights() const {
        if (!weight) return c.n;
        double sum = 0;
        for (int r = 0; r < c.n; ++r)
            if (valid(c.label(1, r))) sum += weight[c.label(1, r)];
        return sum;
    }
    FM_DEVICE double q_sum(int64_t y) const { return share_sum + target * weight_of(y); }
};

struct Softmax {  // of one row: p_j = e^(z_j - max) / sum
    const float* z;
    float max;
    double sum, dot;  // dot: sum of e^(z_j - max) zt_j
    int argmax;

    FM_DEVICE Softmax(const float* z, const float* zt, int ways) : z(z), max(z[0]), sum(0), dot(0), argmax(0) {
        for (int j = 1; j < ways; ++j)
            if (z[j] > max) max = z[j], argmax = j;
        for (int j = 0; j < ways; ++j) {
            const double e = at(j);
            sum += e;
            if (zt) dot += e * zt[j];
        }
    }
    FM_DEVICE float at(int64_t j) const { return expf(z[j] - max); }
};

// The sum of term(row) in double, by warp 0: to thread 0
template <class F>
FM_DEVICE double sum_of_rows(const Call& c, F term) {
    double sum = 0;
    for (int r = c.b.thread; c.b.thread < kWarp && r < c.n; r += kWarp) sum += term(r);
    return c.b.thread < kWarp ? c.b.warp_sum(sum) : sum;
}

FM_DEVICE void put_scalar(const Call& c, int i, double value) {
    if (c.has(i) && c.b.thread == 0) *c.f(i) = static_cast<float>(value);
}

FM_DEVICE void cross_entropy_fwd(const Call& c) {  // z, label, weight?, loss?, correct?
    const Target k(c);
    const double loss = sum_of_rows(c, [&](int r) -> double {
        const int64_t y = c.label(1, r);
        if (!k.valid(y)) return nan("");
        const float* z = c.row(0, r);
        const Softmax p(z, nullptr, k.ways);
        const double shift = p.max + log(p.sum);  // -log p_j = shift - z_j
        double term = k.target * k.weight_of(y) * (shift - z[y]);
        for (int j = 0; k.share != 0 && j < k.ways; ++j) term += k.share * k.weight_of(j) * (shift - z[j]);
        return term;
    });
    const double right = sum_of_rows(
        c, [&](int r) -> double { return c.has(4) && Softmax(c.row(0, r), nullptr, k.ways).argmax == c.label(1, r); });
    put_scalar(c, 3, loss * k.scale);
    put_scalar(c, 4, right);
}

// out[j] = f(softmax, j) for the task's classes, zero for the others and the padding
template <class F>
FM_DEVICE void each_gradient(const Call& c, const Target& k, int zt, int out, F f) {
    each_element(c, 1, [&](int r, int) {
        const int64_t y = c.label(1, r);
        float* to = c.row(out, r);
        const Softmax p(c.row(0, r), zt < 0 ? nullptr : c.row(zt, r), k.ways);
        for (int j = 0; j < padded(c.size(0)); ++j) to[j] = j >= k.ways ? 0.f : k.valid(y) ? f(p, r, j, y) : nanf("");
    });
}

FM_DEVICE void cross_entropy_bwd(const Call& c) {  // z, label, weight?, step_weight?, dz
    const Target k(c);
    const double scale = k.scale * c.scalar(3, 1.f);
    each_gradient(c, k, -1, 4, [&](const Softmax& p, int, int j, int64_t y) -> float {
        const double q = k.share * k.weight_of(j) + (j == y ? k.target * k.weight_of(y) : 0.0);
        return static_cast<float>((k.q_sum(y) * p.at(j) - q * p.sum) / p.sum * scale);
    });
}

FM_DEVICE void cross_entropy_jvp(const Call& c) {  // z, label, weight?, zt, losst
    const Target k(c);
    const double tangent = sum_of_rows(c, [&](int r) -> double {
        const int64_t y = c.label(1, r);
        if (!k.valid(y)) return nan("");
        const float* zt = c.row(3, r);
        const Softmax p(c.row(0, r), zt, k.ways);
        const double mean = p.dot / p.sum;  // <dz, zt> = sum of q_j (<p, zt> - zt_j)
        double term = k.target * k.weight_of(y) * (mean - zt[y]);
        for (int j = 0; k.share != 0 && j < k.ways; ++j) term += k.share * k.weight_of(j) * (mean - zt[j]);
        return term;
    });
    put_scalar(c, 4, tangent * k.scale);
}

FM_DEVICE void cross_entropy_bwd_jvp(const Call& c) {  // z, label, weight?, zt, dzt
    const Target k(c);
    each_gradient(c, k, 3, 4, [&](const Softmax& p, int r, int j, int64_t y) -> float {
        return static_cast<float>(k.q_sum(y) * k.scale / p.sum * p.at(j) * (c.row(3, r)[j] - p.dot / p.sum));
    });
}

}  // namespace cuda
}  // namespace fastmaml
