// Weight expressions: small plain arrays of up to four axes, evaluated once per meta-iteration or once per step. Simple
// loops; part 0 does all.
#include "../simd.h"

namespace fastmaml {
namespace FASTMAML_ISA {

struct Strides {
    int64_t at[4];
};

// Strides of a contiguous operand of the full shape z, with extent 1 on the axes whose bit is set.
static Strides strides_of(const int64_t* z, int64_t broadcast) {
    Strides s;
    int64_t step = 1;
    for (int a = 3; a >= 0; --a) {
        const bool one = broadcast >> a & 1;
        s.at[a] = one ? 0 : step;
        step *= one ? 1 : z[a];
    }
    return s;
}

template <class F>
static inline void each_index(const int64_t* z, F f) {
    for (int64_t i = 0; i < z[0]; ++i)
        for (int64_t j = 0; j < z[1]; ++j)
            for (int64_t k = 0; k < z[2]; ++k)
                for (int64_t l = 0; l < z[3]; ++l) f(i, j, k, l);
}

static inline int64_t at(const Strides& s, int64_t i, int64_t j, int64_t k, int64_t l) {
    return i * s.at[0] + j * s.at[1] + k * s.at[2] + l * s.at[3];
}

static int64_t count(const int64_t* z, int64_t broadcast) {
    int64_t n = 1;
    for (int a = 0; a < 4; ++a) n *= broadcast >> a & 1 ? 1 : z[a];
    return n;
}

static void clear_padding(float* out, int64_t n) {
    for (int64_t i = n; i < pad_lane(n); ++i) out[i] = 0.f;
}

void add_expr_fwd(const Call& c) {
    if (c.part) return;
    const Strides sx = strides_of(c.sizes, c.sizes[4]), sy = strides_of(c.sizes, c.sizes[5]),
                  sz = strides_of(c.sizes, 0);
    const float *x = c.f(0), *y = c.f(1);
    float* z = c.f(2);
    each_index(c.sizes, [&](int64_t i, int64_t j, int64_t k, int64_t l) {
        z[at(sz, i, j, k, l)] = (x ? x[at(sx, i, j, k, l)] : 0.f) + (y ? y[at(sy, i, j, k, l)] : 0.f);
    });
    clear_padding(z, count(c.sizes, 0));
}

static void multiply(const Call& c, const float* x, const float* y, const float* xt, const float* yt, float* z) {
    const Strides sx = strides_of(c.sizes, c.sizes[4]), sy = strides_of(c.sizes, c.sizes[5]),
                  sz = strides_of(c.sizes, 0);
    each_index(c.sizes, [&](int64_t i, int64_t j, int64_t k, int64_t l) {
        const int64_t ax = at(sx, i, j, k, l), ay = at(sy, i, j, k, l);
        z[at(sz, i, j, k, l)] = (xt ? xt[ax] * y[ay] : 0.f) + (yt ? x[ax] * yt[ay] : 0.f);
    });
    clear_padding(z, count(c.sizes, 0));
}

void mul_expr_fwd(const Call& c) {
    if (!c.part) multiply(c, c.f(0), c.f(1), c.f(0), nullptr, c.f(2));
}

void mul_expr_jvp(const Call& c) {
    if (!c.part) multiply(c, c.f(0), c.f(1), c.f(2), c.f(3), c.f(4));
}

void sum_expr(const Call& c) {
    if (c.part) return;
    const Strides full = strides_of(c.sizes, 0), so = strides_of(c.sizes, c.sizes[4]),
                  sb = strides_of(c.sizes, c.sizes[5]);
    const float *a = c.f(0), *b = c.f(1), *d = c.f(2), *e = c.f(3);
    float* out = c.f(4);
    const int64_t n = count(c.sizes, c.sizes[4]);
    for (int64_t i = 0; i < pad_lane(n); ++i) out[i] = 0.f;
    each_index(c.sizes, [&](int64_t i, int64_t j, int64_t k, int64_t l) {
        const int64_t f = at(full, i, j, k, l), o = at(sb, i, j, k, l);
        out[at(so, i, j, k, l)] += (a ? a[f] * (b ? b[o] : 1.f) : 0.f) + (d ? d[f] * (e ? e[o] : 1.f) : 0.f);
    });
}

// y += v x
static void add_row(float v, const float* x, float* y, int64_t n) {
    int64_t j = 0;
    for (; j + VL <= n; j += VL) store(y + j, fma(splat(v), load(x + j), load(y + j)));
    for (; j < n; ++j) y[j] += v * x[j];
}

static float dot(const float* x, const float* y, int64_t n) {
    vec lanes{};
    int64_t j = 0;
    for (; j + VL <= n; j += VL) lanes = fma(load(x + j), load(y + j), lanes);
    float total = sum_lanes(lanes);
    for (; j < n; ++j) total += x[j] * y[j];
    return total;
}

// Whichever way the operands lie, the inner loop walks what is contiguous; with both transposed nothing is.
static void add_product(const Call& c, const float* a, const float* b, float* out) {
    const int64_t m = c.sizes[0], n = c.sizes[1], k = c.sizes[2], bits = c.sizes[3];
    const int64_t am = bits & 1 ? 1 : k, ak = bits & 1 ? m : 1;
    for (int64_t i = 0; i < m; ++i) {
        float* row = out + i * n;
        if (bits & 2)
            for (int64_t j = 0; j < n; ++j) {
                if (ak == 1) row[j] += dot(a + i * am, b + j * k, k);
                for (int64_t q = 0; ak != 1 && q < k; ++q) row[j] += a[i * am + q * ak] * b[j * k + q];
            }
        else
            for (int64_t q = 0; q < k; ++q) add_row(a[i * am + q * ak], b + q * n, row, n);
    }
}

void matmul_fwd(const Call& c) {
    if (c.part) return;
    float* out = c.f(4);
    for (int64_t i = 0; i < pad_lane(c.sizes[0] * c.sizes[1]); ++i) out[i] = 0.f;
    if (c.f(0) && c.f(1)) add_product(c, c.f(0), c.f(1), out);
    if (c.f(2) && c.f(3)) add_product(c, c.f(2), c.f(3), out);
}

void transpose_fwd(const Call& c) {
    if (c.part) return;
    const int64_t rows = c.sizes[0], cols = c.sizes[1];
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < cols; ++j) c.f(1)[j * rows + i] = c.f(0)[i * cols + j];
    clear_padding(c.f(1), rows * cols);
}

void slice_fwd(const Call& c) {
    if (c.part) return;
    const int64_t outer = c.sizes[0], whole = c.sizes[1], start = c.sizes[2], length = c.sizes[3], inner = c.sizes[4];
    for (int64_t o = 0; o < outer; ++o)
        for (int64_t i = 0; i < length * inner; ++i)
            c.f(1)[o * length * inner + i] = c.f(0)[(o * whole + start) * inner + i];
    clear_padding(c.f(1), outer * length * inner);
}

void slice_bwd(const Call& c) {
    if (c.part) return;
    const int64_t outer = c.sizes[0], whole = c.sizes[1], start = c.sizes[2], length = c.sizes[3], inner = c.sizes[4];
    for (int64_t i = 0; i < pad_lane(outer * whole * inner); ++i) c.f(1)[i] = 0.f;
    for (int64_t o = 0; o < outer; ++o)
        for (int64_t i = 0; i < length * inner; ++i)
            c.f(1)[(o * whole + start) * inner + i] = c.f(0)[o * length * inner + i];
}

// Plain [out, in] <-> packed, a share of the panels' input rows.
void pack_fwd(const Call& c) {
    const int64_t in = c.sizes[0], out = c.sizes[1], taps = c.sizes[2];
    const float* w = c.f(0);
    float* p = c.f(1);
    const Share s = share(in, c);
    const bool narrow = is_narrow(out, taps);
    for (int64_t o = 0; narrow && o < out; ++o) {
        float* row = p + packed_offset(o, in, out);
        for (int64_t k = s.begin; k < s.end; ++k) row[k] = w[o * in + k];
        if (c.part == 0) clear_padding(row, in);
    }
    for (int64_t o = 0; !narrow && o < out; o += kPanel) {
        const int64_t width = packed_width(o / kPanel, out);
        float* panel = p + o * in;
        for (int64_t k = s.begin; k < s.end; ++k) {
            const float* from = w + o * in + packed_input(k, in, taps);
            for (int64_t j = 0; j < width; ++j) panel[k * width + j] = o + j < out ? from[j * in] : 0.f;
        }
    }
}

void unpack_fwd(const Call& c) {
    const int64_t in = c.sizes[0], out = c.sizes[1], taps = c.sizes[2];
    const float* p = c.f(0);
    float* w = c.f(1);
    const Share s = share(out, c);
    for (int64_t o = s.begin; o < s.end; ++o) {
        const float* from = p + packed_offset(o, in, out, taps);
        const int64_t stride = packed_stride(o, out, taps);
        for (int64_t k = 0; k < in; ++k) w[o * in + packed_input(k, in, taps)] = from[k * stride];
    }
    if (c.part == 0) clear_padding(w, in * out);
}

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
