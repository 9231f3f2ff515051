// Weight expressions: plain arrays of up to four axes, evaluated once per meta-iteration or once per step. Neighbouring
// axes are merged (axes.h), products run in the register tiles of the layers (matrix_product.h). A team shares what is
// written.
#include "axes.h"
#include "matrix_product.h"

namespace fastmaml {
namespace FASTMAML_ISA {

static constexpr int64_t kChain = 64;  // terms of a sum that are added up on their own
static constexpr int64_t kNoAxes = 15;
static constexpr float kZero = 0.f;

static void clear_padding(const Call& c, float* out, int64_t n) {
    if (c.part == 0) clear_run(out + n, pad_lane(n) - n);
}

static int64_t count(const int64_t* z, int64_t broadcast) {
    int64_t n = 1;
    for (int a = 0; a < 4; ++a) n *= broadcast >> a & 1 ? 1 : z[a];
    return n;
}

void add_expr_fwd(const Call& c) {
    const float *x = c.f(0) ? c.f(0) : &kZero, *y = c.f(1) ? c.f(1) : &kZero;
    float* z = c.f(2);
    const Axes axes(c.sizes, c.f(0) ? c.sizes[4] : kNoAxes, c.f(1) ? c.sizes[5] : kNoAxes);
    const bool x_moves = axes.axis[0].x, y_moves = axes.axis[0].y;
    each_run(c, axes, [=](int64_t at_x, int64_t at_y, int64_t at, int64_t n) {
        for (int64_t j = 0; j < n; j += VL)
            store_part(z + at + j, load_run(x + at_x, x_moves, j, n) + load_run(y + at_y, y_moves, j, n), n - j);
    });
    clear_padding(c, z, count(c.sizes, 0));
}

struct Term {
    const float *x, *y;  // y null: 1
};

// A term more of a sum of products, of elements j.. of a run
static inline vec add_product(vec sum, const Term& f, int64_t at_x, bool x_moves, int64_t at_y, bool y_moves, int64_t j,
                              int64_t n) {
    const vec x = load_run(f.x + at_x, x_moves, j, n);
    return f.y ? fma(x, load_run(f.y + at_y, y_moves, j, n), sum) : sum + x;
}

// z = sum of x y
static void multiply(const Call& c, const Axes& axes, const Term* term, int terms, float* z) {
    const bool x_moves = axes.axis[0].x, y_moves = axes.axis[0].y;
    each_run(c, axes, [=](int64_t at_x, int64_t at_y, int64_t at, int64_t n) {
        for (int64_t j = 0; j < n; j += VL) {
            vec sum{};
            for (int t = 0; t < terms; ++t) sum = add_product(sum, term[t], at_x, x_moves, at_y, y_moves, j, n);
            store_part(z + at + j, sum, n - j);
        }
    });
}

static void multiply(const Call& c, const Term* term, int terms, float* z) {
    multiply(c, Axes(c.sizes, c.sizes[4], c.sizes[5]), term, terms, z);
    clear_padding(c, z, count(c.sizes, 0));
}

void mul_expr_fwd(const Call& c) {
    const Term term = {c.f(0), c.f(1)};
    multiply(c, &term, 1, c.f(2));
}

void mul_expr_jvp(const Call& c) {
    Term found[2];
    int terms = 0;
    if (c.f(2)) found[terms++] = {c.f(2), c.f(1)};
    if (c.f(3)) found[terms++] = {c.f(0), c.f(3)};
    multiply(c, found, terms, c.f(4));
}

// The axes of a sum. x of a walk: in the whole array; y: in the other factor.
struct SumAxes {
    Axis inner;
    bool inner_summed;
    Walk kept, summed;  // without the inner one; the first summed one is `chain`
    Axis chain = {1, 0, 0};

    explicit SumAxes(const int64_t* sizes) {
        const Axes axes(sizes, sizes[4], sizes[5]);
        int64_t step = 1;
        for (int i = 0; i < 4; ++i) {
            const Axis& a = axes.axis[i];
            const Axis in_whole = {a.extent, step, a.y};
            const bool sums = a.extent != 1 && !a.x;
            if (i == 0)
                inner = in_whole, inner_summed = sums;
            else if (!sums)
                kept.along(in_whole);
            else if (chain.extent == 1)
                chain = in_whole;
            else
                summed.along(in_whole);
            step *= a.extent;
        }
    }
};

// Elements j.. of the inner run, summed over the other axes, from these offsets on
static inline vec sum_of_runs(SumAxes& s, const Term* term, int terms, int64_t whole, int64_t other, int64_t j,
                              int64_t n) {
    const bool moves = s.inner.y;
    vec total{};
    s.summed.go(0);
    for (int64_t u = 0; u < s.summed.count; ++u, s.summed.next()) {
        const int64_t x = whole + s.summed.x, y = other + s.summed.y;
        for (int64_t i = 0; i < s.chain.extent; i += kChain) {
            const int64_t end = s.chain.extent - i < kChain ? s.chain.extent : i + kChain;
            vec chain{};
            for (int64_t q = i; q < end; ++q)
                for (int t = 0; t < terms; ++t)
                    chain = add_product(chain, term[t], x + q * s.chain.x, true, y + q * s.chain.y, moves, j, n);
            total += chain;
        }
    }
    return total;
}

// The inner run and all other summed axes, to one number
static inline float sum_of_all(SumAxes& s, const Term* term, int terms, int64_t whole, int64_t other) {
    const int64_t n = s.inner.extent;
    vec total{};
    for (int64_t i = 0; i < n; i += kChain * VL) {
        const int64_t end = n - i < kChain * VL ? n : i + kChain * VL;
        vec chain{};
        for (int64_t j = i; j < end; j += VL) chain += sum_of_runs(s, term, terms, whole, other, j, n);
        total += chain;
    }
    return sum_lanes(total);
}

void sum_expr(const Call& c) {
    Term found[2];
    int terms = 0;
    if (c.f(0)) found[terms++] = {c.f(0), c.f(1)};
    if (c.f(2)) found[terms++] = {c.f(2), c.f(3)};
    float* out = c.f(4);
    const int64_t numbers = count(c.sizes, c.sizes[4]);
    clear_padding(c, out, numbers);
    if (numbers == count(c.sizes, 0)) return multiply(c, Axes(c.sizes, 0, c.sizes[5]), found, terms, out);
    SumAxes s(c.sizes);
    const int64_t n = s.inner_summed ? 1 : s.inner.extent, vectors = (n + VL - 1) / VL;
    const Share mine = share(s.kept.count * vectors, c);
    int64_t run = mine.begin / vectors, v = mine.begin % vectors;
    s.kept.go(run);
    for (int64_t u = mine.begin; u < mine.end; ++u) {
        if (s.inner_summed)
            out[run] = sum_of_all(s, found, terms, s.kept.x, s.kept.y);
        else
            store_part(out + run * n + v * VL, sum_of_runs(s, found, terms, s.kept.x, s.kept.y, v * VL, n), n - v * VL);
        if (++v == vectors) v = 0, ++run, s.kept.next();
    }
}

// The vectors run over the columns of the result; over its rows where it is packed, or has few columns.
void matmul_fwd(const Call& c) {
    const int64_t m = c.sizes[0], n = c.sizes[1], k = c.sizes[2], bits = c.sizes[3];
    const bool packed = c.sizes[4] != 0, packed_out = packed && !(bits & 2), packed_a = packed && !packed_out;
    Factors f = {{}, {}, 0, m, n, k, (bits & 1) != packed_a, (bits & 2) != 2 * packed};
    for (int i = 0; i < 4; i += 2) {
        if (!c.f(i) || !c.f(i + 1)) continue;
        f.a[f.pairs] = f.a_turned ? Matrix{c.f(i), k, m, packed_a} : Matrix{c.f(i), m, k, packed_a};
        f.b[f.pairs++] = f.b_turned ? Matrix{c.f(i + 1), n, k, packed} : Matrix{c.f(i + 1), k, n, packed};
    }
    if (packed_out) return matrix_product(c, f.turned(), {c.f(4), n, m, true}, false);
    if (n == 1)
        matrix_product(c, f.turned(), {c.f(4), 1, m, false}, false);
    else if (n < kLane && m > n)
        matrix_product(c, f.turned(), {c.f(4), m, n, false}, true);
    else
        matrix_product(c, f, {c.f(4), m, n, false}, false);
    clear_padding(c, c.f(4), m * n);
}

void transpose_fwd(const Call& c) {
    const int64_t rows = c.sizes[0], cols = c.sizes[1];
    const Share s = share(cols, c);
    transpose(c.f(0) + s.begin, cols, rows, s.end - s.begin, c.f(1) + s.begin * rows, rows, false);
    clear_padding(c, c.f(1), rows * cols);
}

void slice_fwd(const Call& c) {
    const int64_t outer = c.sizes[0], whole = c.sizes[1], start = c.sizes[2], length = c.sizes[3], inner = c.sizes[4];
    const Share s = share(outer, c);
    for (int64_t o = s.begin; o < s.end; ++o)
        copy_run(c.f(0) + (o * whole + start) * inner, length * inner, c.f(1) + o * length * inner);
    clear_padding(c, c.f(1), outer * length * inner);
}

void slice_bwd(const Call& c) {
    const int64_t outer = c.sizes[0], whole = c.sizes[1], start = c.sizes[2], length = c.sizes[3], inner = c.sizes[4];
    const Share s = share(outer, c);
    for (int64_t o = s.begin; o < s.end; ++o) {
        float* to = c.f(1) + o * whole * inner;
        clear_run(to, start * inner);
        copy_run(c.f(0) + o * length * inner, length * inner, to + start * inner);
        clear_run(to + (start + length) * inner, (whole - start - length) * inner);
    }
    clear_padding(c, c.f(1), outer * whole * inner);
}

void pack_fwd(const Call& c) { pack(c, c.f(0), c.sizes[0], c.sizes[1], c.sizes[2], c.f(1)); }

void unpack_fwd(const Call& c) {
    const int64_t in = c.sizes[0], out = c.sizes[1];
    unpack(c, c.f(0), in, out, c.sizes[2], c.f(1), c.sizes[3] == 2);
    if (c.sizes[3] == 0) clear_padding(c, c.f(1), in * out);
}

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
