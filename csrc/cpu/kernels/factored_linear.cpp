// Factored first layers (plan/rewrite.py): y = x W_0 + (x x_s^T) D with the Gram matrix x x_s^T in double.
#include "doubles.h"

namespace fastmaml {
namespace FASTMAML_ISA {

static int64_t rows_of_extent(const Call& c, int64_t extent) {  // as enum class Rows
    return extent == 1 ? c.task->n_support : extent == 2 ? c.task->n_query : c.task->n_support + c.task->n_query;
}

// The Gram matrix is large where images share a mean, and D mostly cancels it: it is made, kept and multiplied in
// double. It is small.
template <int R>
static inline void dots(const float* x, const float* xs, int64_t lds, int64_t in, double* out) {
    dvec acc[R];
    for (int r = 0; r < R; ++r) acc[r] = dvec{};
    int64_t i = 0;
    for (; i + DL <= in; i += DL) {
        const dvec a = load_double(x + i);
        for (int r = 0; r < R; ++r) acc[r] += a * load_double(xs + r * lds + i);
    }
    for (int r = 0; r < R; ++r) {
        double sum = 0;
        for (int l = 0; l < DL; ++l) sum += acc[r][l];
        for (int64_t j = i; j < in; ++j) sum += static_cast<double>(x[j]) * xs[r * lds + j];
        out[r] = sum;
    }
}

static double* gram_row(const Call& c, int operand, int64_t r) {
    return reinterpret_cast<double*>(static_cast<char*>(c.operands[operand]) + r * c.row_stride[operand]);
}

void gram_fwd(const Call& c) {
    const int64_t in = c.sizes[0], ns = c.task->n_support, ldx = c.stride(0), lds = c.stride(1);
    const Share s = share(rows_of_extent(c, c.sizes[1]), c);
    for (int64_t r = s.begin; r < s.end; ++r) {
        const float *x = c.f(0) + r * ldx, *xs = c.f(1);
        double* g = gram_row(c, 2, r);
        int64_t m = 0;
        for (; m + 5 <= ns; m += 5) dots<5>(x, xs + m * lds, lds, in, g + m);
        for (; m < ns; ++m) dots<1>(x, xs + m * lds, lds, in, g + m);
    }
}

void factored_linear_fwd(const Call& c) {
    const int64_t n = rows_of_extent(c, c.sizes[1]), ns = c.task->n_support, ldd = c.stride(2);
    const Share s = share(pad_lane(c.sizes[0]) / kLane, c);
    for (int64_t r = 0; r < n; ++r) {
        const float* a = c.f(0) + r * c.stride(0);
        const double* g = gram_row(c, 1, r);
        float* y = c.f(4) + r * c.stride(4);
        for (int64_t o = s.begin * kLane; o < s.end * kLane; o += DL) {
            dvec acc = load_double(a + o);
            if (c.f(3)) acc += load_double(c.f(3) + o);
            for (int64_t m = 0; m < ns; ++m) acc += g[m] * load_double(c.f(2) + m * ldd + o);
            store_float(y + o, acc);
        }
    }
}

void factored_linear_jvp(const Call& c) {
    const float *d = c.f(0), *bt = c.f(1);
    float* yt = c.f(2);
    const Share s = share(pad_lane(c.sizes[0]) / kLane, c);
    for (int64_t r = 0; r < c.n; ++r)
        for (int64_t j = s.begin * kLane; j < s.end * kLane; j += VL)
            store(yt + r * c.stride(2) + j, (d ? load(d + r * c.stride(0) + j) : vec{}) + load(bt + j));
}

void factored_linear_bwd(const Call& c) {
    const int64_t n = rows_of_extent(c, c.sizes[1]), ns = c.task->n_support, ldy = c.stride(1), ldd = c.stride(2);
    const Share s = share(pad_lane(c.sizes[0]) / kLane, c);
    for (int64_t m = 0; m < ns; ++m)
        for (int64_t o = s.begin * kLane; o < s.end * kLane; o += DL) {
            dvec acc = dvec{};
            for (int64_t r = 0; r < n; ++r) acc += gram_row(c, 0, r)[m] * load_double(c.f(1) + r * ldy + o);
            store_float(c.f(2) + m * ldd + o, acc);
        }
}

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
