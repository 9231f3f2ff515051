// Smooth activations: each is a functor that gives f, f' and f'' of a vector; what a mode does not read, the compiler
// leaves out.
//
// Differences of nearly equal numbers are avoided: 1 - tanh^2, 1 - sigmoid, 1 - 2 sigmoid and 1 + erf are written
// through e^-|x| and its expm1.
#include "../simd.h"

namespace fastmaml {
namespace FASTMAML_ISA {
namespace {

struct Jet {
    vec f, d1, d2;
};

struct Exps {
    vec e, em1;
};

}  // namespace

static inline vec vabs(vec x) { return (vec)((ivec)x & isplat(0x7fffffff)); }
static inline vec with_sign(vec x, vec v) {  // |v| with the sign of x
    return (vec)(((ivec)x & ~isplat(0x7fffffff)) | ((ivec)v & isplat(0x7fffffff)));
}
static inline vec vmax(vec a, vec b) { return select(a < b, b, a); }  // a NaN in a stays
static inline vec vmin(vec a, vec b) { return select(a > b, b, a); }

// e^x and e^x - 1 for x <= 0, both to float accuracy: x = n ln2 + r as in vexp, expm1(x) = 2^n expm1(r) + (2^n - 1).
static inline Exps vexps(vec x) {
    const vec c = vmax(x, splat(-87.f));
    vec n = fma(c, splat(1.44269504088896341f), splat(12582912.f)) - splat(12582912.f);
    vec r = fma(n, splat(-0.693359375f), c);
    r = fma(n, splat(2.12194440e-4f), r);
    vec p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    const vec q = fma(p, r * r, r);
    const vec scale = (vec)((__builtin_convertvector(n, ivec) + isplat(127)) << 23);
    const vec e = fma(scale, q, scale);
    return {select(x < splat(-87.f), vec{}, e), fma(scale, q, scale - splat(1.f))};
}

// log(1 + u) for 0 <= u <= 1: 2 atanh(u / (2 + u)), relative error of the series 4e-9.
static inline vec vlog1p(vec u) {
    const vec z = u / (u + splat(2.f)), w = z * z;
    vec p = splat(0.28178334f);
    p = fma(p, w, splat(0.27960602f));
    p = fma(p, w, splat(0.40024909f));
    p = fma(p, w, splat(0.66666317f));
    return fma(p * w, z, z + z);
}

// The distribution function of the standard normal, given pdf = e^(-x^2 / 2) (without 1 / sqrt(2 pi)): its tail is pdf
// times a polynomial in 1 / (1 + 0.34 |x|), relative error 3e-8 up to |x| = 14, where pdf has become zero.
static inline vec normal_cdf(vec x, vec pdf) {
    const vec t = splat(1.f) / fma(splat(0.34f), vabs(x), splat(1.f));
    vec p = splat(-0.026120491f);
    p = fma(p, t, splat(0.13949957f));
    p = fma(p, t, splat(-0.2731329f));
    p = fma(p, t, splat(0.20218281f));
    p = fma(p, t, splat(-0.04471854f));
    p = fma(p, t, splat(0.115359195f));
    p = fma(p, t, splat(0.11519765f));
    p = fma(p, t, splat(0.1361122f));
    p = fma(p, t, splat(0.1356205f));
    const vec tail = p * t * pdf;
    return select(x < vec{}, tail, splat(1.f) - tail);
}

static inline Jet logistic(vec x) {
    const Exps k = vexps(-vabs(x));
    const vec inverse = splat(1.f) / (k.e + splat(1.f)), d1 = k.e * inverse * inverse;
    return {select(x < vec{}, k.e * inverse, inverse), d1, -d1 * with_sign(x, k.em1 * inverse)};
}

namespace {

struct Tanh {
    explicit Tanh(const Call&) {}
    Jet operator()(vec x) const {
        const Exps k = vexps(splat(-2.f) * vabs(x));
        const vec inverse = splat(1.f) / (k.em1 + splat(2.f));
        const vec y = with_sign(x, k.em1 * inverse), d1 = splat(4.f) * k.e * inverse * inverse;
        return {y, d1, splat(-2.f) * y * d1};
    }
};

struct Sigmoid {
    explicit Sigmoid(const Call&) {}
    Jet operator()(vec x) const { return logistic(x); }
};

struct Exp {
    explicit Exp(const Call&) {}
    Jet operator()(vec x) const {
        const vec y = vexp(x);
        return {y, y, y};
    }
};

struct Elu {
    vec alpha;
    explicit Elu(const Call& c) : alpha(splat(c.numbers[0])) {}
    Jet operator()(vec x) const {
        const Exps k = vexps(vmin(x, vec{}));
        const ivec above = x > vec{};
        const vec slope = alpha * k.e;
        return {select(above, x, alpha * k.em1), select(above, splat(1.f), slope), select(above, vec{}, slope)};
    }
};

struct Gelu {
    explicit Gelu(const Call&) {}
    Jet operator()(vec x) const {
        const vec bell = vexp(splat(-0.5f) * x * x), cdf = normal_cdf(x, bell), pdf = bell * splat(0.39894228f);
        return {x * cdf, fma(x, pdf, cdf), fma(-x, x, splat(2.f)) * pdf};
    }
};

struct GeluTanh {  // (1 + tanh u) / 2 = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
    explicit GeluTanh(const Call&) {}
    Jet operator()(vec x) const {
        const vec a = splat(1.59576912f), b = splat(0.0713548163f);  // 2 sqrt(2 / pi), and that times 0.044715
        const vec z =
            vmax(vmin(x, splat(30.f)), splat(-30.f));  // beyond, sigmoid' is zero: what it meets must be finite
        const vec z2 = z * z, g1 = fma(splat(3.f) * b, z2, a), g2 = splat(6.f) * b * z;
        const Jet s = logistic(z * fma(b, z2, a));
        const vec s1 = s.d1 * g1, s2 = fma(s.d2 * g1, g1, s.d1 * g2);
        return {x * s.f, fma(z, s1, s.f), fma(z, s2, s1 + s1)};
    }
};

struct Silu {
    explicit Silu(const Call&) {}
    Jet operator()(vec x) const {
        const Jet s = logistic(x);
        return {x * s.f, fma(x, s.d1, s.f), fma(x, s.d2, s.d1 + s.d1)};
    }
};

struct Softplus {
    vec beta, inverse_beta, threshold;
    explicit Softplus(const Call& c)
        : beta(splat(c.numbers[0])), inverse_beta(splat(1.f / c.numbers[0])), threshold(splat(c.numbers[1])) {}
    Jet operator()(vec x) const {
        const vec g = beta * x;
        const Jet s = logistic(g);
        const vec y = (vmax(g, vec{}) + vlog1p(vexps(-vabs(g)).e)) * inverse_beta;
        const ivec linear = g > threshold;
        return {select(linear, x, y), select(linear, splat(1.f), s.f), select(linear, vec{}, beta * s.d1)};
    }
};

struct In {
    const float* p;
    int64_t stride;
    In(const Call& c, int i) : p(c.f(i)), stride(c.stride(i)) {}
    vec operator()(int64_t row, int64_t col) const { return load(p + row * stride + col); }
};

}  // namespace

// out = f(row, column); zero in the padding, where f(0) may be anything.
template <class F>
static inline void map(const Call& c, int to, F f) {
    const int64_t width = c.sizes[0], stride = c.stride(to);
    const Area mine = share_rows(pad_lane(width), c);
    const int64_t begin = mine.cols.begin, end = mine.cols.end, whole = width / VL * VL,
                  full = whole < end ? whole : end;
    float* out = c.f(to) + mine.rows.begin * stride;
    ivec lane = ivec{};
    for (int l = 0; l < VL; ++l) lane[l] = l;
    for (int64_t i = mine.rows.begin; i < mine.rows.end; ++i, out += stride) {
        int64_t j = begin;
        for (; j < full; j += VL) store(out + j, f(i, j));
        for (; j < end; j += VL) store(out + j, j >= width ? vec{} : select(lane < isplat(width - j), f(i, j), vec{}));
    }
}

template <class A>
static void forward(const Call& c) {  // x, y
    const A a(c);
    const In x(c, 0);
    map(c, 1, [=](int64_t i, int64_t j) { return a(x(i, j)).f; });
}

template <class A>
static void times_slope(const Call& c) {  // x, v, f'(x) v: both jvp and bwd
    const A a(c);
    const In x(c, 0), v(c, 1);
    map(c, 2, [=](int64_t i, int64_t j) { return a(x(i, j)).d1 * v(i, j); });
}

template <class A>
static void second(const Call& c) {  // x, xt?, dy?, dyt?, dxt
    const A a(c);
    const In x(c, 0), xt(c, 1), dy(c, 2), dyt(c, 3);
    const bool curved = xt.p && dy.p;
    if (curved && dyt.p)
        map(c, 4, [=](int64_t i, int64_t j) {
            const Jet k = a(x(i, j));
            return fma(k.d1, dyt(i, j), k.d2 * xt(i, j) * dy(i, j));
        });
    else if (curved)
        map(c, 4, [=](int64_t i, int64_t j) { return a(x(i, j)).d2 * xt(i, j) * dy(i, j); });
    else if (dyt.p)
        map(c, 4, [=](int64_t i, int64_t j) { return a(x(i, j)).d1 * dyt(i, j); });
    else
        map(c, 4, [=](int64_t, int64_t) { return vec{}; });
}

#define FASTMAML_SMOOTH(name, A)                          \
    void name##_fwd(const Call& c) { forward<A>(c); }     \
    void name##_jvp(const Call& c) { times_slope<A>(c); } \
    void name##_bwd(const Call& c) { times_slope<A>(c); } \
    void name##_bwd_jvp(const Call& c) { second<A>(c); }
FASTMAML_SMOOTH(tanh, Tanh)
FASTMAML_SMOOTH(sigmoid, Sigmoid)
FASTMAML_SMOOTH(exp, Exp)
FASTMAML_SMOOTH(elu, Elu)
FASTMAML_SMOOTH(silu, Silu)
FASTMAML_SMOOTH(softplus, Softplus)
#undef FASTMAML_SMOOTH

void gelu_fwd(const Call& c) { c.sizes[1] ? forward<GeluTanh>(c) : forward<Gelu>(c); }
void gelu_jvp(const Call& c) { c.sizes[1] ? times_slope<GeluTanh>(c) : times_slope<Gelu>(c); }
void gelu_bwd(const Call& c) { gelu_jvp(c); }
void gelu_bwd_jvp(const Call& c) { c.sizes[1] ? second<GeluTanh>(c) : second<Gelu>(c); }

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
