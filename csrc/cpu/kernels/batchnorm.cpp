// Batch norm over rows. Columns are independent of each other: the constants of a vector of columns stay in registers
// while its rows go by. An absent operand reads zeros, which costs a load and saves a
// thousand variants of the second derivative.
#include <math.h>

#include "gate.h"
#include "sums.h"

namespace fastmaml {
namespace FASTMAML_ISA {
namespace {

constexpr float kZeros[kLane] = {};

struct RowsIn {  // VL columns of an operand with rows
    const float* p;
    int64_t stride;
    RowsIn(const Call& c, int i, int64_t col) : p(kZeros), stride(0) {
        if (c.operands[i]) p = c.f(i) + col, stride = c.stride(i);
    }
    vec operator[](int64_t row) const { return load(p + row * stride); }
};

template <Gate G>
struct RowsOut {  // operand i, through the activation whose mask is the next operand
    float* p;
    int64_t stride;
    Activation act;
    RowsOut(const Call& c, int i, int64_t col)
        : p(c.f(i) + col), stride(c.stride(i)), act(activation_of(c, i + 1).at(0, col)) {}
    void set(int64_t row, vec v) const { store(p + row * stride, act.apply<G>(v, row, 0)); }
};

struct Columns {  // x - mean, xhat and xhat's tangent of one vector of columns; operands x, mean, rstd lead in every
                  // kernel
    RowsIn x;
    vec mean, rstd;
    Columns(const Call& c, int64_t col) : x(c, 0, col), mean(load(c.f(1) + col)), rstd(load(c.f(2) + col)) {}
    vec centred(int64_t row) const { return x[row] - mean; }
};

struct Tangent {  // xhatt = (xt - meant) rstd + (x - mean) rstdt
    RowsIn xt;
    vec mean_t, rstd_t;
    vec operator()(const Columns& k, vec centred, int64_t row) const {
        return fma(xt[row] - mean_t, k.rstd, centred * rstd_t);
    }
};

}  // namespace

static inline vec vector_at(const Call& c, int i, int64_t col, float absent = 0.f) {
    return c.operands[i] ? load(c.f(i) + col) : splat(absent);
}

static inline Tangent tangent_at(const Call& c, int xt, int64_t col) {  // operands xt, meant, rstdt
    return {RowsIn(c, xt, col), vector_at(c, xt + 1, col), vector_at(c, xt + 2, col)};
}

// body(operand `out` at a column, column, rows): of what is written row by row
template <class F>
static inline void for_area(const Call& c, int out, F body) {
    const Area mine = share_rows(pad_lane(c.sizes[0]), c);
    with_gate(activation_of(c, out + 1).gate, [&](auto gate) {
        for (int64_t col = mine.cols.begin; col < mine.cols.end; col += VL)
            body(RowsOut<decltype(gate)::value>(c, out, col), col, mine.rows);
    });
}

template <class F>
static inline void for_columns(const Call& c, F body) {
    const Share s = share(pad_lane(c.sizes[0]) / kLane, c);
    for (int64_t col = s.begin * kLane; col < s.end * kLane; col += VL) body(col);
}

// How many rows make the statistics, and how many of them lie in this block. (Of an image each pixel is a row.)
static inline int64_t stat_rows(const Call& c) {
    const int64_t pixels = c.sizes[2] ? c.sizes[2] : 1;
    return c.sizes[1] == -1 ? c.n_total : c.sizes[1] == -2 ? c.task->n_support * pixels : c.sizes[1];
}
static inline int64_t stat_rows_here(const Call& c) {
    const int64_t left = stat_rows(c) - c.row0;
    return left < 0 ? 0 : left < c.n ? left : c.n;
}

// The two sums of a kernel over the n rows of a block, part(column, begin, end), in two stages (Call::stage): pieces of
// many rows, shared out as convolutions share their lines, so that a member reads what it wrote; then, column by
// column, finish(column, pieces). The pieces depend on n alone.
constexpr int64_t kPieces = 8, kPieceRows = 32, kPieceColumns = 1024;
static_assert(kPieces * kPieceColumns * 2 * sizeof(float) <= kSharedBytes, "shared");

template <class Part>
struct Pieces {
    const Call& c;
    const Part& part;
    int64_t n, col, count;
    int64_t begin(int64_t i) const { return n * i / count; }
    Sums at(int64_t i) const {
        if (count == 1) return part(col, 0, n);
        const float* p = c.shared + i * 2 * kPieceColumns + col;
        return {load(p), load(p + kPieceColumns)};
    }
    Sums sum() const {
        Sums total = at(0);
        for (int64_t i = 1; i < count; ++i) {
            const Sums s = at(i);
            total.a += s.a, total.b += s.b;
        }
        return total;
    }
};

template <class Part, class Finish>
static inline void in_pieces(const Call& c, int64_t n, Part part, Finish finish) {
    const int64_t columns = pad_lane(c.sizes[0]);
    Pieces<Part> pieces{c, part, n, 0, n < kPieces * kPieceRows || columns > kPieceColumns ? 1 : kPieces};
    if (c.stage == 1) return for_columns(c, [&](int64_t col) { pieces.col = col, finish(col, pieces); });
    if (pieces.count == 1) return;
    const Share mine = share(pieces.count, c);
    for (int64_t i = mine.begin; i < mine.end; ++i)
        for (int64_t col = 0; col < columns; col += VL) {
            const Sums s = part(col, pieces.begin(i), pieces.begin(i + 1));
            float* p = c.shared + i * 2 * kPieceColumns + col;
            store(p, s.a), store(p + kPieceColumns, s.b);
        }
}

static inline void add_to(const Call& c, int i, int64_t col, vec v) {  // a reduction's output
    if (!c.operands[i]) return;
    float* p = c.f(i) + col;
    store(p, c.first ? v : load(p) + v);
}

// 1 / sqrt(var + eps); zero in the padding, so that nothing there can become infinite.
static inline vec rstd_of(const Call& c, int64_t col, vec var) {
    vec r = vec{};
    for (int l = 0; l < VL; ++l)
        if (col + l < c.sizes[0]) r[l] = 1.f / sqrtf(var[l] + c.numbers[0]);
    return r;
}

// Mean and M2 of some rows
static inline Sums moments(const RowsIn& x, int64_t begin, int64_t end) {
    const vec rows = splat(static_cast<float>(end - begin));
    const vec centre = sum_terms(end - begin, [&](int64_t i, vec& a, vec&) { a += x[begin + i]; }).a / rows;
    const Sums s = sum_terms(end - begin, [&](int64_t i, vec& a, vec& b) {
        const vec d = x[begin + i] - centre;
        a += d;
        b = fma(d, d, b);
    });
    const vec shift = s.a / rows, m2 = fma(-s.a, shift, s.b);  // shift: what rounding left in centre
    return {centre + shift, select(m2 < vec{}, vec{}, m2)};
}

void batchnorm_stats_fwd(const Call& c) {
    const int64_t n = stat_rows_here(c), total = stat_rows(c);
    const auto part = [&](int64_t col, int64_t begin, int64_t end) { return moments(RowsIn(c, 0, col), begin, end); };
    in_pieces(c, n, part, [&](int64_t col, const auto& pieces) {
        float *mean_out = c.f(1) + col, *rstd_out = c.f(2) + col;  // between blocks: mean and M2 of the rows so far
        vec mean = c.first ? vec{} : load(mean_out), m2 = c.first ? vec{} : load(rstd_out);
        for (int64_t i = 0; n > 0 && i < pieces.count; ++i) {  // Chan et al. 1979
            const Sums piece = pieces.at(i);
            const float before = static_cast<float>(c.row0 + pieces.begin(i)),
                        rows = static_cast<float>(pieces.begin(i + 1) - pieces.begin(i)),
                        weight = rows / (before + rows);
            const vec delta = piece.a - mean;
            mean += delta * splat(weight);
            m2 += fma(delta * delta, splat(before * weight), piece.b);
        }
        store(mean_out, mean);
        store(rstd_out, c.last ? rstd_of(c, col, m2 / splat(static_cast<float>(total))) : m2);
    });
}

void batchnorm_running_fwd(const Call& c) {
    for_columns(c, [&](int64_t col) {
        store(c.f(2) + col, load(c.f(0) + col));
        store(c.f(3) + col, rstd_of(c, col, load(c.f(1) + col)));
    });
}

void batchnorm_stats_jvp(const Call& c) {  // x, mean, rstd, xt, meant, rstdt
    const int64_t n = stat_rows_here(c);
    const vec total = splat(static_cast<float>(stat_rows(c)));
    const auto part = [&](int64_t col, int64_t begin, int64_t end) {
        const Columns k(c, col);
        const RowsIn xt(c, 3, col);
        return sum_terms(end - begin, [&](int64_t i, vec& a, vec& b) {
            const vec t = xt[begin + i];
            a += t;
            b = fma(k.centred(begin + i), t, b);
        });
    };
    in_pieces(c, n, part, [&](int64_t col, const auto& pieces) {
        const Sums s = pieces.sum();
        const vec rstd = load(c.f(2) + col);
        add_to(c, 4, col, s.a);
        add_to(c, 5, col, s.b);
        if (!c.last) return;
        float *mean_t = c.f(4) + col, *rstd_t = c.f(5) + col;
        store(mean_t, load(mean_t) / total);
        store(rstd_t, -(rstd * rstd * rstd) * (load(rstd_t) / total));
    });
}

void batchnorm_fwd(const Call& c) {  // x, mean, rstd, gamma?, beta?, y
    for_area(c, 5, [&](const auto& y, int64_t col, Share rows) {
        const Columns k(c, col);
        const vec scale = k.rstd * vector_at(c, 3, col, 1.f), beta = vector_at(c, 4, col);
        for (int64_t i = rows.begin; i < rows.end; ++i) y.set(i, fma(k.centred(i), scale, beta));
    });
}

void batchnorm_jvp(const Call& c) {  // x, mean, rstd, gamma?, xt?, meant?, rstdt?, gammat?, betat?, yt
    for_area(c, 9, [&](const auto& yt, int64_t col, Share rows) {
        const Columns k(c, col);
        const Tangent tangent = tangent_at(c, 4, col);
        const vec gamma = vector_at(c, 3, col, 1.f), xhat_scale = k.rstd * vector_at(c, 7, col),
                  beta_t = vector_at(c, 8, col);
        for (int64_t i = rows.begin; i < rows.end; ++i) {
            const vec centred = k.centred(i);
            yt.set(i, fma(gamma, tangent(k, centred, i), fma(centred, xhat_scale, beta_t)));
        }
    });
}

void batchnorm_bwd_stats(const Call& c) {  // x, mean, rstd, dy, s1, s2
    const auto part = [&](int64_t col, int64_t begin, int64_t end) {
        const Columns k(c, col);
        const RowsIn dy(c, 3, col);
        return sum_terms(end - begin, [&](int64_t i, vec& a, vec& b) {
            const vec d = dy[begin + i];
            a += d;
            b = fma(k.centred(begin + i), d, b);
        });
    };
    in_pieces(c, c.n, part, [&](int64_t col, const auto& pieces) {
        const Sums s = pieces.sum();
        add_to(c, 4, col, s.a);
        add_to(c, 5, col, s.b * load(c.f(2) + col));
    });
}

void batchnorm_bwd_stats_jvp(const Call& c) {  // x, mean, rstd, dy?, xt?, meant?, rstdt?, dyt?, s1t?, s2t?
    const auto part = [&](int64_t col, int64_t begin, int64_t end) {
        const Columns k(c, col);
        const Tangent tangent = tangent_at(c, 4, col);
        const RowsIn dy(c, 3, col), dyt(c, 7, col);
        return sum_terms(end - begin, [&](int64_t i, vec& a, vec& b) {
            const int64_t row = begin + i;
            const vec centred = k.centred(row), d = dyt[row];
            a += d;
            b = fma(dy[row], tangent(k, centred, row), fma(centred * k.rstd, d, b));
        });
    };
    in_pieces(c, c.n, part, [&](int64_t col, const auto& pieces) {
        const Sums s = pieces.sum();
        add_to(c, 8, col, s.a);
        add_to(c, 9, col, s.b);
    });
}

void batchnorm_bwd_input(const Call& c) {  // x, mean, rstd, gamma?, dy, s1, s2, dx
    const int64_t n = stat_rows_here(c);
    const vec total = splat(n ? static_cast<float>(stat_rows(c)) : 1.f);
    for_area(c, 7, [&](const auto& dx, int64_t col, Share rows) {
        const Columns k(c, col);
        const RowsIn dy(c, 4, col);
        const vec scale = k.rstd * vector_at(c, 3, col, 1.f);
        const vec e1 = vector_at(c, 5, col) / total, e2 = k.rstd * vector_at(c, 6, col) / total;
        for (int64_t i = rows.begin; i < n && i < rows.end; ++i) dx.set(i, scale * fma(-k.centred(i), e2, dy[i] - e1));
        for (int64_t i = rows.begin < n ? n : rows.begin; i < rows.end; ++i) dx.set(i, scale * dy[i]);
    });
}

// x, mean, rstd, gamma?, dy?, s1?, s2?, xt?, meant?, rstdt?, gammat?, dyt?, s1t?, s2t?, dxt: the product rule on
// batchnorm_bwd_input
void batchnorm_bwd_input_jvp(const Call& c) {
    const int64_t n = stat_rows_here(c);
    const vec total = splat(n ? static_cast<float>(stat_rows(c)) : 1.f);
    for_area(c, 14, [&](const auto& dxt, int64_t col, Share rows) {
        const Columns k(c, col);
        const Tangent tangent = tangent_at(c, 7, col);
        const RowsIn dy(c, 4, col), dyt(c, 11, col);
        const vec gamma = vector_at(c, 3, col, 1.f), scale = gamma * k.rstd;
        const vec scale_t = fma(vector_at(c, 10, col), k.rstd, gamma * tangent.rstd_t);
        const vec e1 = vector_at(c, 5, col) / total, e2 = vector_at(c, 6, col) / total;
        const vec e1t = vector_at(c, 12, col) / total, e2t = vector_at(c, 13, col) / total;
        for (int64_t i = rows.begin; i < n && i < rows.end; ++i) {
            const vec centred = k.centred(i), xhat = centred * k.rstd;
            const vec inner = fma(-xhat, e2, dy[i] - e1);
            const vec inner_t = fma(-tangent(k, centred, i), e2, fma(-xhat, e2t, dyt[i] - e1t));
            dxt.set(i, fma(scale_t, inner, scale * inner_t));
        }
        for (int64_t i = rows.begin < n ? n : rows.begin; i < rows.end; ++i)
            dxt.set(i, fma(scale_t, dy[i], scale * dyt[i]));
    });
}

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
