// Cross entropy. Rows are short, so one thread of a team does everything; e^z is vectorised, sums over a row and over
// rows are in double.
#include <math.h>

#include "../simd.h"

namespace fastmaml {
namespace FASTMAML_ISA {
namespace {

struct Loss {  // what a call's rows have in common; operands z, label, weight? lead in every kernel
    const Call& c;
    const float* weight;
    int64_t ways;
    double share, target, scale;  // q_j = share w_j, and target w_j on top at the label
    double share_sum;             // sum of share w_j over the classes

    explicit Loss(const Call& call) : c(call), weight(c.f(2)) {
        ways = c.task->ways > 0 && c.task->ways < c.sizes[0] ? c.task->ways : c.sizes[0];
        share = static_cast<double>(c.numbers[0]) / static_cast<double>(ways);
        target = 1.0 - c.numbers[0];
        share_sum = 0;
        if (share != 0)
            for (int64_t j = 0; j < ways; ++j) share_sum += share * weight_of(j);
        scale = 1.0 / (c.sizes[1] == 1 ? 1.0 : c.sizes[1] == 2 ? c.numbers[1] : label_weights());
    }
    double weight_of(int64_t j) const { return weight ? weight[j] : 1.0; }
    int64_t label(int64_t row) const {  // rows before the block's are negative
        return *reinterpret_cast<const int64_t*>(static_cast<const char*>(c.operands[1]) + row * c.row_stride[1]);
    }
    bool valid(int64_t y) const { return y >= 0 && y < ways; }
    double label_weights() const {  // of the whole extent, whatever block this is
        if (!weight) return static_cast<double>(c.n_total);
        double sum = 0;
        for (int64_t i = -c.row0; i < c.n_total - c.row0; ++i)
            if (valid(label(i))) sum += weight[label(i)];
        return sum;
    }
    double q_sum(int64_t y) const { return share_sum + target * weight_of(y); }
};

struct Row {  // softmax of one row: p_j = e^(z_j - max) / sum
    float max;
    double sum, label_exp, dot;  // dot: sum of e^(z_j - max) zt_j
    int64_t argmax;
};

}  // namespace

static inline int64_t lanes_at(int64_t j, int64_t width) { return width - j < VL ? width - j : VL; }

static inline Row row_of(const float* z, const float* zt, int64_t y, int64_t ways) {
    Row r = {z[0], 0, 0, 0, 0};
    for (int64_t j = 1; j < ways; ++j)
        if (z[j] > r.max) r.max = z[j], r.argmax = j;
    for (int64_t j = 0; j < ways; j += VL) {  // rows are padded to whole vectors
        const vec e = vexp(load(z + j) - splat(r.max));
        const int64_t lanes = lanes_at(j, ways);
        for (int64_t l = 0; l < lanes; ++l) {
            r.sum += e[l];
            if (zt) r.dot += static_cast<double>(e[l]) * zt[j + l];
        }
        if (y >= j && y < j + lanes) r.label_exp = e[y - j];
    }
    return r;
}

// out = f(e^(z_j - max), j) for the task's classes, zero for the others and the padding
template <class F>
static inline void write_row(const Call& c, const Row& r, const float* z, float* out, int64_t ways, F f) {
    ivec lane = ivec{};
    for (int l = 0; l < VL; ++l) lane[l] = l;
    for (int64_t j = 0; j < pad_lane(c.sizes[0]); j += VL) {
        vec v = vec{};
        if (j < ways)
            v = select(lane < isplat(static_cast<int32_t>(lanes_at(j, ways))), f(vexp(load(z + j) - splat(r.max)), j),
                       v);
        store(out + j, v);
    }
}

static void fill_nan(const Call& c, float* out, int64_t ways) {
    for (int64_t j = 0; j < pad_lane(c.sizes[0]); ++j) out[j] = j < ways ? __builtin_nanf("") : 0.f;
}

static void add_scalar(const Call& c, int i, double value) {
    if (c.operands[i]) *c.f(i) = static_cast<float>(c.first ? value : *c.f(i) + value);
}

void cross_entropy_fwd(const Call& c) {  // z, label, weight?, loss?, correct?
    if (c.part) return;
    const Loss k(c);
    double loss = 0;
    int64_t correct = 0;
    for (int64_t i = 0; i < c.n; ++i) {
        const float* z = c.f(0) + i * c.stride(0);
        const int64_t y = k.label(i);
        if (!k.valid(y)) {
            loss = __builtin_nan("");
            continue;
        }
        const Row r = row_of(z, nullptr, y, k.ways);
        const double shift = r.max + log(r.sum);  // -log p_j = shift - z_j
        loss += k.target * k.weight_of(y) * (shift - z[y]);
        if (k.share != 0)
            for (int64_t j = 0; j < k.ways; ++j) loss += k.share * k.weight_of(j) * (shift - z[j]);
        correct += r.argmax == y;
    }
    add_scalar(c, 3, loss * k.scale);
    add_scalar(c, 4, static_cast<double>(correct));
}

void cross_entropy_bwd(const Call& c) {  // z, label, weight?, step_weight?, dz
    if (c.part) return;
    const Loss k(c);
    const double scale = k.scale * (c.operands[3] ? *c.f(3) : 1.0);
    const vec share = splat(static_cast<float>(k.share * scale));
    for (int64_t i = 0; i < c.n; ++i) {
        const float* z = c.f(0) + i * c.stride(0);
        float* dz = c.f(4) + i * c.stride(4);
        const int64_t y = k.label(i);
        if (!k.valid(y)) {
            fill_nan(c, dz, k.ways);
            continue;
        }
        const Row r = row_of(z, nullptr, y, k.ways);
        const vec factor = splat(static_cast<float>(k.q_sum(y) * scale / r.sum));
        const float* w = k.weight;
        write_row(c, r, z, dz, k.ways,
                  [=](vec e, int64_t j) { return fma(factor, e, -(w ? share * load(w + j) : share)); });
        // p - 1 of a confident row is a small difference: from the sums, in double
        const double q =
            k.share * k.weight_of(y) + k.target * k.weight_of(y);  // rounded as q_sum is: one class gives zero
        dz[y] = static_cast<float>((k.q_sum(y) * r.label_exp - q * r.sum) / r.sum * scale);
    }
}

void cross_entropy_jvp(const Call& c) {  // z, label, weight?, zt, losst
    if (c.part) return;
    const Loss k(c);
    double loss_t = 0;
    for (int64_t i = 0; i < c.n; ++i) {
        const float *z = c.f(0) + i * c.stride(0), *zt = c.f(3) + i * c.stride(3);
        const int64_t y = k.label(i);
        if (!k.valid(y)) {
            loss_t = __builtin_nan("");
            continue;
        }
        const Row r = row_of(z, zt, y, k.ways);
        const double mean = r.dot / r.sum;  // <dz, zt> = sum of q_j (<p, zt> - zt_j)
        loss_t += k.target * k.weight_of(y) * (mean - zt[y]);
        if (k.share != 0)
            for (int64_t j = 0; j < k.ways; ++j) loss_t += k.share * k.weight_of(j) * (mean - zt[j]);
    }
    add_scalar(c, 4, loss_t * k.scale);
}

void cross_entropy_bwd_jvp(const Call& c) {  // z, label, weight?, zt, dzt
    if (c.part) return;
    const Loss k(c);
    for (int64_t i = 0; i < c.n; ++i) {
        const float *z = c.f(0) + i * c.stride(0), *zt = c.f(3) + i * c.stride(3);
        float* dzt = c.f(4) + i * c.stride(4);
        const int64_t y = k.label(i);
        if (!k.valid(y)) {
            fill_nan(c, dzt, k.ways);
            continue;
        }
        const Row r = row_of(z, zt, y, k.ways);
        const vec factor = splat(static_cast<float>(k.q_sum(y) * k.scale / r.sum));
        const vec mean = splat(static_cast<float>(r.dot / r.sum));
        write_row(c, r, z, dzt, k.ways, [=](vec e, int64_t j) { return factor * e * (load(zt + j) - mean); });
    }
}

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
