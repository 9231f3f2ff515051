// Updates and sums over whole arrays, and the moves of rows: everything that is one pass over memory.
#include "../simd.h"

namespace fastmaml {
namespace FASTMAML_ISA {

template <class F>
static inline void each(const Call& c, F f) {  // f(offset) for each vector of a padded array of sizes[0] floats
    const Share s = share(pad_lane(c.sizes[0]) / kLane, c);
    for (int64_t i = s.begin * kLane; i < s.end * kLane; i += VL) f(i);
}

static inline void store_scalar(float* out,
                                float value) {  // the lane's other floats take part in sums: they must be zero
    for (int64_t i = 1; i < kLane; ++i) out[i] = 0.f;
    *out = value;
}

void sgd_fwd(const Call& c) {
    const float *theta = c.f(0), *g = c.f(1), *rate = c.f(2);
    float* next = c.f(3);
    if (c.sizes[1])
        return each(c, [=](int64_t i) { store(next + i, fma(-load(rate + i), load(g + i), load(theta + i))); });
    const vec r = splat(-*rate);
    each(c, [=](int64_t i) { store(next + i, fma(r, load(g + i), load(theta + i))); });
}

void sgd_bwd(const Call& c) {
    const float *bar = c.f(0), *rate = c.f(1);
    float* u = c.f(2);
    if (c.sizes[1]) return each(c, [=](int64_t i) { store(u + i, -load(rate + i) * load(bar + i)); });
    const vec r = splat(-*rate);
    each(c, [=](int64_t i) { store(u + i, r * load(bar + i)); });
}

// base + sign <x, y>: short float chains, summed in double. One chain, whatever the team.
static inline double add_dot(double base, double sign, const float* x, const float* y, int64_t n) {
    for (int64_t i = 0; i < n; i += 32 * VL) {
        vec sum = vec{};
        for (int64_t j = i; j < n && j < i + 32 * VL; j += VL) sum = fma(load(x + j), load(y + j), sum);
        double part = 0;
        for (int l = 0; l < VL; ++l) part += sum[l];
        base += sign * part;
    }
    return base;
}

void dot_fwd(const Call& c) {
    if (c.part) return;
    const float* acc = c.f(2);
    store_scalar(c.f(3), static_cast<float>(add_dot(acc ? *acc : 0.0, 1.0, c.f(0), c.f(1), pad_lane(c.sizes[0]))));
}

void sgd_bwd_rate(const Call& c) {
    const float *bar = c.f(0), *g = c.f(1), *acc = c.f(2);
    float* out = c.f(3);
    if (c.sizes[1])
        return each(c, [=](int64_t i) {
            const vec p = load(bar + i) * load(g + i);
            store(out + i, acc ? load(acc + i) - p : -p);
        });
    if (c.part) return;
    const int64_t n = pad_lane(c.sizes[0]) * (c.sizes[2] ? c.task->n_support : 1);  // padded rows lie together
    store_scalar(out, static_cast<float>(add_dot(acc ? *acc : 0.0, -1.0, bar, g, n)));
}

void clip_value_fwd(const Call& c) {
    const float* g = c.f(0);
    float* out = c.f(1);
    const vec high = splat(c.numbers[0]), low = -high;
    each(c, [=](int64_t i) {
        const vec x = load(g + i);
        store(out + i, select(x > high, high, select(x < low, low, x)));  // NaN stays
    });
}

void clip_value_bwd(const Call& c) {
    const float *g = c.f(0), *dc = c.f(1);
    float* dg = c.f(2);
    const vec high = splat(c.numbers[0]);
    each(c, [=](int64_t i) {
        const vec x = load(g + i);
        store(dg + i, select((x <= high) & (x >= -high), load(dc + i), vec{}));
    });
}

void ratio_fwd(const Call& c) {
    if (c.part == 0) store_scalar(c.f(2), *c.f(1) == 0.f ? 0.f : *c.f(0) / *c.f(1));
}

void clip_norm_fwd(const Call& c) {
    if (c.part) return;
    const double most = c.numbers[0], norm = __builtin_sqrt(static_cast<double>(*c.f(0))), scale = most / (norm + 1e-6);
    store_scalar(c.f(1), static_cast<float>(scale > 1.0 ? 1.0 : scale));
    if (c.f(2))
        store_scalar(c.f(2), scale > 1.0 || norm == 0.0 ? 0.f : static_cast<float>(-scale / ((norm + 1e-6) * norm)));
}

static inline float factor(const Call& c, const float* scale) { return c.numbers[0] * (scale ? *scale : 1.f); }

void axpy_fwd(const Call& c) {
    const float *acc = c.f(0), *x = c.f(1);
    float* out = c.f(3);
    if (c.sizes[1]) {
        if (c.part == 0) store_scalar(out, *acc + factor(c, c.f(2)) * *x);
        return;
    }
    const vec s = splat(factor(c, c.f(2)));
    each(c, [=](int64_t i) { store(out + i, fma(s, load(x + i), load(acc + i))); });
}

void scale_fwd(const Call& c) {
    const float* x = c.f(0);
    float* out = c.f(2);
    if (c.sizes[1]) {
        if (c.part == 0) store_scalar(out, factor(c, c.f(1)) * *x);
        return;
    }
    const vec s = splat(factor(c, c.f(1)));
    each(c, [=](int64_t i) { store(out + i, s * load(x + i)); });
}

void add_fwd(const Call& c) {
    const float *x = c.f(0), *y = c.f(1);
    float* z = c.f(2);
    each(c, [=](int64_t i) { store(z + i, (x ? load(x + i) : vec{}) + (y ? load(y + i) : vec{})); });
}

void zero_fwd(const Call& c) {
    float* out = c.f(0);
    each(c, [=](int64_t i) { store(out + i, vec{}); });
}

void copy_fwd(const Call& c) {
    const float* x = c.f(0);
    float* y = c.f(1);
    each(c, [=](int64_t i) { store(y + i, load(x + i)); });
}

// ---------------------------------------------------------------------------------------------------- rows
template <class F>
static inline void each_row(const Call& c, F f) {  // f(row, column) for each vector of padded rows of sizes[0] floats
    const Share s = share(pad_lane(c.sizes[0]) / kLane, c);
    for (int64_t r = 0; r < c.n; ++r)
        for (int64_t i = s.begin * kLane; i < s.end * kLane; i += VL) f(r, i);
}

void copy_rows_fwd(const Call& c) {
    const float* x = c.f(0);
    float* y = c.f(1);
    const int64_t ldx = c.stride(0), ldy = c.stride(1), width = c.sizes[0];
    if (!c.sizes[1] && !c.sizes[2])
        return each_row(c, [=](int64_t r, int64_t i) { store(y + r * ldy + i, load(x + r * ldx + i)); });
    if (c.part) return;
    const int64_t written = c.sizes[2] ? width : pad_lane(width);
    for (int64_t r = 0; r < c.n; ++r) {
        for (int64_t i = 0; i < width; ++i) y[r * ldy + i] = x[r * ldx + i];
        for (int64_t i = width; i < written; ++i) y[r * ldy + i] = 0.f;
    }
}

void add_rows_fwd(const Call& c) {
    const float *x = c.f(0), *y = c.f(1);
    float* z = c.f(2);
    const int64_t ldx = c.stride(0), ldy = c.stride(1), ldz = c.stride(2);
    each_row(c, [=](int64_t r, int64_t i) { store(z + r * ldz + i, load(x + r * ldx + i) + load(y + r * ldy + i)); });
}

void axpy_rows_fwd(const Call& c) {
    const float *acc = c.f(0), *x = c.f(1);
    float* out = c.f(3);
    const vec s = splat(factor(c, c.f(2)));
    const int64_t lda = c.stride(0), ldx = c.stride(1), ldo = c.stride(3);
    each_row(c, [=](int64_t r, int64_t i) {
        store(out + r * ldo + i, fma(s, load(x + r * ldx + i), load(acc + r * lda + i)));
    });
}

void scale_rows_fwd(const Call& c) {
    const float* x = c.f(0);
    float* out = c.f(2);
    const vec s = splat(factor(c, c.f(1)));
    const int64_t ldx = c.stride(0), ldo = c.stride(2);
    each_row(c, [=](int64_t r, int64_t i) { store(out + r * ldo + i, s * load(x + r * ldx + i)); });
}

void sgd_rows_fwd(const Call& c) {
    const float *theta = c.f(0), *g = c.f(1);
    float* next = c.f(3);
    const vec r = splat(-*c.f(2));
    const int64_t ldt = c.stride(0), ldg = c.stride(1), ldn = c.stride(3);
    each_row(c, [=](int64_t i, int64_t j) {
        store(next + i * ldn + j, fma(r, load(g + i * ldg + j), load(theta + i * ldt + j)));
    });
}

void sgd_rows_bwd(const Call& c) {
    const float* bar = c.f(0);
    float* u = c.f(2);
    const vec r = splat(-*c.f(1));
    const int64_t ldb = c.stride(0), ldu = c.stride(2);
    each_row(c, [=](int64_t i, int64_t j) { store(u + i * ldu + j, r * load(bar + i * ldb + j)); });
}

void zero_rows_fwd(const Call& c) {
    float* out = c.f(0);
    const int64_t ld = c.stride(0);
    each_row(c, [=](int64_t r, int64_t i) { store(out + r * ld + i, vec{}); });
}

static void move_rows(const Call& c, const float* x, int64_t ldx, float* y, int64_t ldy, int64_t n) {
    const int64_t width = c.sizes[0];
    for (int64_t r = 0; r < n; ++r) {
        for (int64_t i = 0; i < width; ++i) y[r * ldy + i] = x ? x[r * ldx + i] : 0.f;
        for (int64_t i = width; i < pad_lane(width); ++i) y[r * ldy + i] = 0.f;
    }
}

void join_rows_fwd(const Call& c) {
    if (c.part) return;
    const int64_t ns = c.task->n_support, ld = c.stride(2);
    move_rows(c, c.f(0), c.stride(0), c.f(2), ld, ns);
    move_rows(c, c.f(1), c.stride(1), c.f(2) + ns * ld, ld, c.task->n_query);
}

void support_rows_fwd(const Call& c) {
    if (c.part) return;
    move_rows(c, c.f(0), c.stride(0), c.f(1), c.stride(1), c.task->n_support);
}

void query_rows_fwd(const Call& c) {
    if (c.part) return;
    const int64_t ld = c.stride(0);
    move_rows(c, c.f(0) + c.task->n_support * ld, ld, c.f(1), c.stride(1), c.task->n_query);
}

void query_rows_bwd(const Call& c) {
    if (c.part) return;
    const int64_t ns = c.task->n_support, ld = c.stride(1);
    move_rows(c, nullptr, 0, c.f(1), ld, ns);
    move_rows(c, c.f(0), c.stride(0), c.f(1) + ns * ld, ld, c.task->n_query);
}

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
