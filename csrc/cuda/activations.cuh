// Smooth activations: each gives f, f' and f'' of a number; what a mode does not read, the compiler leaves out.
// Differences of nearly equal numbers are avoided: 1 - tanh^2, 1 - sigmoid and 1 - 2 sigmoid are written through e^-|x|
// and its expm1, 1 + erf through erfc.
#pragma once
#include "call.cuh"

namespace fastmaml {
namespace cuda {

struct Jet {
    float f, d1, d2;
};

FM_DEVICE Jet logistic(float x) {
    const float e = expf(-fabsf(x)), em1 = expm1f(-fabsf(x)), inverse = 1.f / (1.f + e), d1 = e * inverse * inverse;
    return {x < 0.f ? e * inverse : inverse, d1, -d1 * copysignf(em1 * inverse, x)};
}

struct Tanh {
    FM_DEVICE explicit Tanh(const Call&) {}
    FM_DEVICE Jet operator()(float x) const {
        const float e = expf(-2.f * fabsf(x)), em1 = expm1f(-2.f * fabsf(x)), inverse = 1.f / (2.f + em1);
        const float y = copysignf(em1 * inverse, x), d1 = 4.f * e * inverse * inverse;
        return {y, d1, -2.f * y * d1};
    }
};

struct Sigmoid {
    FM_DEVICE explicit Sigmoid(const Call&) {}
    FM_DEVICE Jet operator()(float x) const { return logistic(x); }
};

struct Exp {
    FM_DEVICE explicit Exp(const Call&) {}
    FM_DEVICE Jet operator()(float x) const {
        const float y = expf(x);
        return {y, y, y};
    }
};

struct Elu {
    float alpha;
    FM_DEVICE explicit Elu(const Call& c) : alpha(c.number(0)) {}
    FM_DEVICE Jet operator()(float x) const {
        if (x > 0.f) return {x, 1.f, 0.f};
        const float slope = alpha * expf(x);
        return {alpha * expm1f(x), slope, slope};
    }
};

struct Gelu {
    FM_DEVICE explicit Gelu(const Call&) {}
    FM_DEVICE Jet operator()(float x) const {
        const float cdf = 0.5f * erfcf(-0.70710678f * x), pdf = 0.39894228f * expf(-0.5f * x * x);
        return {x * cdf, fmaf(x, pdf, cdf), fmaf(-x, x, 2.f) * pdf};
    }
};

struct GeluTanh {  // (1 + tanh u) / 2 = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
    FM_DEVICE explicit GeluTanh(const Call&) {}
    FM_DEVICE Jet operator()(float x) const {
        const float a = 1.59576912f, b = 0.0713548163f;           // 2 sqrt(2 / pi), and that times 0.044715
        const float z = x < -30.f ? -30.f : x > 30.f ? 30.f : x;  // beyond, sigmoid' is zero: what it meets is finite
        const float g1 = fmaf(3.f * b, z * z, a), g2 = 6.f * b * z;
        const Jet s = logistic(z * fmaf(b, z * z, a));
        const float s1 = s.d1 * g1, s2 = fmaf(s.d2 * g1, g1, s.d1 * g2);
        return {x * s.f, fmaf(z, s1, s.f), fmaf(z, s2, s1 + s1)};
    }
};

struct Silu {
    FM_DEVICE explicit Silu(const Call&) {}
    FM_DEVICE Jet operator()(float x) const {
        const Jet s = logistic(x);
        return {x * s.f, fmaf(x, s.d1, s.f), fmaf(x, s.d2, s.d1 + s.d1)};
    }
};

struct Softplus {
    float beta, threshold;
    FM_DEVICE explicit Softplus(const Call& c) : beta(c.number(0)), threshold(c.number(1)) {}
    FM_DEVICE Jet operator()(float x) const {
        const float g = beta * x;
        if (g > threshold) return {x, 1.f, 0.f};
        const Jet s = logistic(g);
        const float above = g < 0.f ? 0.f : g;  // a NaN stays
        return {(above + log1pf(expf(-fabsf(g)))) / beta, s.f, beta * s.d1};
    }
};

// out = f(row, column); zero in the padding, where f(0) may be anything
template <class F>
FM_DEVICE void map(const Call& c, int to, F f) {
    const int width = c.size(0);
    each_element(c, padded(width), [&](int r, int j) { c.row(to, r)[j] = j < width ? f(r, j) : 0.f; });
}

template <class A>
FM_DEVICE void smooth_fwd(const Call& c) {  // x, y
    const A a(c);
    map(c, 1, [&](int r, int j) { return a(c.row(0, r)[j]).f; });
}

template <class A>
FM_DEVICE void smooth_jvp(const Call& c) {  // x, v, f'(x) v: both jvp and bwd
    const A a(c);
    map(c, 2, [&](int r, int j) { return a(c.row(0, r)[j]).d1 * c.row(1, r)[j]; });
}

template <class A>
FM_DEVICE void smooth_bwd_jvp(const Call& c) {  // x, xt?, dy?, dyt?, dxt
    const A a(c);
    map(c, 4, [&](int r, int j) {
        const Jet k = a(c.row(0, r)[j]);
        const float bent = c.has(1) && c.has(2) ? k.d2 * c.row(1, r)[j] * c.row(2, r)[j] : 0.f;
        return c.has(3) ? fmaf(k.d1, c.row(3, r)[j], bent) : bent;
    });
}

#define FASTMAML_SMOOTH(name, A)                                   \
    FM_DEVICE void name##_fwd(const Call& c) { smooth_fwd<A>(c); } \
    FM_DEVICE void name##_jvp(const Call& c) { smooth_jvp<A>(c); } \
    FM_DEVICE void name##_bwd(const Call& c) { smooth_jvp<A>(c); } \
    FM_DEVICE void name##_bwd_jvp(const Call& c) { smooth_bwd_jvp<A>(c); }
FASTMAML_SMOOTH(tanh, Tanh)
FASTMAML_SMOOTH(sigmoid, Sigmoid)
FASTMAML_SMOOTH(exp, Exp)
FASTMAML_SMOOTH(elu, Elu)
FASTMAML_SMOOTH(silu, Silu)
FASTMAML_SMOOTH(softplus, Softplus)
#undef FASTMAML_SMOOTH

FM_DEVICE void gelu_fwd(const Call& c) { c.size(1) ? smooth_fwd<GeluTanh>(c) : smooth_fwd<Gelu>(c); }
FM_DEVICE void gelu_jvp(const Call& c) { c.size(1) ? smooth_jvp<GeluTanh>(c) : smooth_jvp<Gelu>(c); }
FM_DEVICE void gelu_bwd(const Call& c) { gelu_jvp(c); }
FM_DEVICE void gelu_bwd_jvp(const Call& c) { c.size(1) ? smooth_bwd_jvp<GeluTanh>(c) : smooth_bwd_jvp<Gelu>(c); }

}  // namespace cuda
}  // namespace fastmaml
