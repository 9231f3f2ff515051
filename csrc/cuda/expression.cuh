// Weight expressions: small plain arrays of up to four axes. A thread makes one element at a time.
#pragma once
#include "call.cuh"

namespace fastmaml {
namespace cuda {

struct Index {  // into an array of shape sizes[0..3]
    int at[4];
    FM_DEVICE Index(const Call& c, int i) {
        for (int a = 3; a >= 0; --a) at[a] = i % c.size(a), i /= c.size(a);
    }
    // Where it falls in a contiguous array with extent 1 on the axes whose bit is set
    FM_DEVICE int in(const Call& c, int broadcast) const {
        int offset = 0;
        for (int a = 0; a < 4; ++a)
            if (!(broadcast >> a & 1)) offset = offset * c.size(a) + at[a];
        return offset;
    }
};

FM_DEVICE int elements(const Call& c, int broadcast) {
    int n = 1;
    for (int a = 0; a < 4; ++a) n *= broadcast >> a & 1 ? 1 : c.size(a);
    return n;
}

// out[i] = f(i) for i < count, zero in the padding
template <class F>
FM_DEVICE void fill(const Call& c, int out, int count, F f) {
    each(c, padded(count), [&](int i) { c.f(out)[i] = i < count ? f(i) : 0.f; });
}

FM_DEVICE void add_expr_fwd(const Call& c) {  // x?, y?, z
    fill(c, 2, elements(c, 0), [&](int i) {
        const Index k(c, i);
        return (c.has(0) ? c.f(0)[k.in(c, c.size(4))] : 0.f) + (c.has(1) ? c.f(1)[k.in(c, c.size(5))] : 0.f);
    });
}

FM_DEVICE void mul_expr_fwd(const Call& c) {  // x, y, z
    fill(c, 2, elements(c, 0), [&](int i) {
        const Index k(c, i);
        return c.f(0)[k.in(c, c.size(4))] * c.f(1)[k.in(c, c.size(5))];
    });
}

FM_DEVICE void mul_expr_jvp(const Call& c) {  // x, y, xt?, yt?, zt
    fill(c, 4, elements(c, 0), [&](int i) {
        const Index k(c, i);
        const int x = k.in(c, c.size(4)), y = k.in(c, c.size(5));
        return (c.has(2) ? c.f(2)[x] * c.f(1)[y] : 0.f) + (c.has(3) ? c.f(0)[x] * c.f(3)[y] : 0.f);
    });
}

// a, b?, c?, d?, out: out = sum over the broadcast axes (bits of sizes[4]) of a b + c d; b, d broadcast by sizes[5]
FM_DEVICE void sum_expr(const Call& c) {
    const int kept = c.size(4), summed = 15 & ~kept;
    fill(c, 4, elements(c, kept), [&](int i) {
        Index k(c, 0);
        for (int a = 3; a >= 0; --a)
            if (!(kept >> a & 1)) k.at[a] = i % c.size(a), i /= c.size(a);
        return sum_terms(elements(c, summed), [&](int rest, float sum) {
            for (int a = 3; a >= 0; --a)
                if (kept >> a & 1) k.at[a] = rest % c.size(a), rest /= c.size(a);
            const int whole = k.in(c, 0), other = k.in(c, c.size(5));
            if (c.has(0)) sum += c.f(0)[whole] * (c.has(1) ? c.f(1)[other] : 1.f);
            if (c.has(2)) sum += c.f(2)[whole] * (c.has(3) ? c.f(3)[other] : 1.f);
            return sum;
        });
    });
}

FM_DEVICE void matmul_fwd(const Call& c) {  // a, b, c?, d?, out; sizes {m, n, k, transpose bits a=1 b=2}
    const int m = c.size(0), n = c.size(1), k = c.size(2), bits = c.size(3);
    const int am = bits & 1 ? 1 : k, ak = bits & 1 ? m : 1, bk = bits & 2 ? 1 : n, bn = bits & 2 ? k : 1;
    fill(c, 4, m * n, [&](int i) {
        float sum = 0.f;
        for (int t = 0; t < 4; t += 2) {
            const float *a = c.f(t) + i / n * am, *b = c.f(t + 1) + i % n * bn;
            if (c.has(t) && c.has(t + 1))
                sum += sum_terms(k, [&](int q, float chain) { return fmaf(a[q * ak], b[q * bk], chain); });
        }
        return sum;
    });
}

FM_DEVICE void transpose_fwd(const Call& c) {  // x, y; sizes {rows, cols} of x
    const int rows = c.size(0), cols = c.size(1);
    fill(c, 1, rows * cols, [&](int i) { return c.f(0)[i % rows * cols + i / rows]; });
}

FM_DEVICE void slice_fwd(const Call& c) {  // x, y; sizes {outer, whole, start, length, inner}
    const int run = c.size(3) * c.size(4), whole = c.size(1) * c.size(4), start = c.size(2) * c.size(4);
    fill(c, 1, c.size(0) * run, [&](int i) { return c.f(0)[i / run * whole + start + i % run]; });
}

FM_DEVICE void slice_bwd(const Call& c) {  // dy, dx
    const int run = c.size(3) * c.size(4), whole = c.size(1) * c.size(4), start = c.size(2) * c.size(4);
    fill(c, 1, c.size(0) * whole, [&](int i) {
        const int at = i % whole - start;
        return at >= 0 && at < run ? c.f(0)[i / whole * run + at] : 0.f;
    });
}

// Which element of a plain [out, in] matrix lies at place i of the packed one; -1: padding
FM_DEVICE int plain_index(int i, int in, int out) {
    if (is_narrow(out)) return i % padded(in) < in ? i / padded(in) * in + i % padded(in) : -1;
    const int panel = i / (static_cast<int>(kPanel) * in), width = static_cast<int>(packed_width(panel, out));
    const int rest = i - panel * static_cast<int>(kPanel) * in, o = panel * static_cast<int>(kPanel) + rest % width;
    return o < out ? o * in + rest / width : -1;
}

FM_DEVICE int packed_index(int i, int in, int out) {  // and the other way round
    return static_cast<int>(packed_offset(i / in, in, out) + i % in * packed_stride(i / in, out));
}

FM_DEVICE void pack_fwd(const Call& c) {  // plain [out, in], packed; sizes {in, out, 0}
    const int in = c.size(0), out = c.size(1);
    each(c, static_cast<int>(packed_floats(in, out)), [&](int i) {
        const int from = plain_index(i, in, out);
        c.f(1)[i] = from < 0 ? 0.f : c.f(0)[from];
    });
}

FM_DEVICE void unpack_fwd(const Call& c) {  // packed, plain
    const int in = c.size(0), out = c.size(1);
    fill(c, 1, in * out, [&](int i) { return c.f(0)[packed_index(i, in, out)]; });
}

}  // namespace cuda
}  // namespace fastmaml
