// The products of weight expressions, of any size, either factor transposed: blocks of 64 x 64 of the result in the
// register tiles of linear_tiles.h. A right factor is brought into a padded piece where it is transposed or has no
// whole vectors; a left one never, for a transposed one is what the tiles of outer products read.
//
// As there, an element is a sum of chains of about kDepth products (of each pair of factors) whose order depends on the
// depth alone.
#pragma once
#include "packing.h"

namespace fastmaml {
namespace FASTMAML_ISA {

// An array of rows: one after another, or in panels as a packed weight with a row for each input (plan.h).
struct Matrix {
    float* begin;
    int64_t rows, cols;
    bool panels;

    float* at(int64_t row, int64_t col) const {
        return panels ? begin + col / kPanel * kPanel * rows + row * step(col) + col % kPanel
                      : begin + row * cols + col;
    }
    int64_t step(int64_t col) const { return panels ? packed_width(col / kPanel, cols) : cols; }  // to the next row
};

struct Factors {  // out [m, n] = sum of a b
    Matrix a[2], b[2];
    int pairs;
    int64_t m, n, k;
    bool a_turned, b_turned;  // lies as [k, m], as [n, k]

    Factors turned() const { return {{b[0], b[1]}, {a[0], a[1]}, pairs, n, m, k, !b_turned, !a_turned}; }  // of out^T
};

static constexpr int64_t kDeepest = kDepth + kDepth / 2;  // products of a chain, see `product`

// b[k..k + depth][col..col + cols] of a right factor, its rows padded to width
static inline void bring(const Matrix& b, bool turned, int64_t k, int64_t depth, int64_t col, int64_t cols,
                         int64_t width, float* piece) {
    if (turned) return transpose(b.at(col, k), b.step(k), cols, depth, piece, width, true);
    for (int64_t i = 0; i < depth; ++i)
        for (int64_t j = 0; j < width; j += VL) store(piece + i * width + j, load_part(b.at(k + i, col) + j, cols - j));
}

// y = rows [row, row + rows) of the columns [col, col + cols), padded to whole lanes: with zeros, or with what nobody
// reads (`loose`), so that rows may be read beyond their end, where that is the next row. Neither goes beyond a panel.
static void product_block(const Factors& f, int64_t row, int64_t rows, int64_t col, int64_t cols, float* y, int64_t ldy,
                          bool loose) {
    alignas(64) float pieces[2][kDeepest * kPanel];
    const int64_t width = pad_lane(cols), deepest = f.a[0].panels || f.b[0].panels ? kDepth : kDeepest;
    int64_t i = 0;
    do {
        const int64_t depth = f.k - i < deepest ? f.k - i : kDepth;
        Pair pairs[2] = {};
        Outer outers[2] = {};
        for (int p = 0; p < f.pairs; ++p) {
            const Matrix &a = f.a[p], &b = f.b[p];
            const bool inside = loose && b.at(i + depth - 1, col) + width <= b.begin + b.rows * b.cols;
            const bool whole = !f.b_turned && (b.panels || cols == width || inside);
            if (!whole) bring(b, f.b_turned, i, depth, col, cols, width, pieces[p]);
            const float* right = whole ? b.at(i, col) : pieces[p];
            const int64_t ldb = whole ? b.step(col) : width;
            if (f.a_turned)
                outers[p] = {a.at(i, row), a.step(row), right, ldb};
            else
                pairs[p] = {a.at(row, i), a.step(i), right, ldb};
        }
        if (!f.a_turned) columns(rows, width, pairs, f.pairs, depth, y, ldy, i ? y : nullptr, ldy, kLinear);
        for (int64_t v = 0; f.a_turned && v < width; v += kCols * VL) {
            const Epilogue e = {nullptr, i ? y + v : nullptr, nullptr, 1.f};
            outer_columns(width - v < kCols * VL ? width - v : kCols * VL, rows, outers, f.pairs, depth, y + v, ldy, e);
            for (Outer& outer : outers) outer.d += kCols * VL;
        }
        i += depth;
    } while (i < f.k);
}

// What is left up to `end`, at most up to the end of a panel
static inline int64_t in_panel(int64_t from, int64_t end) {
    const int64_t room = kPanel - from % kPanel;
    return end - from < room ? end - from : room;
}

// A share of the rows, or of the columns where there are more. `turned`: out takes the transpose, and is no packed one.
static void matrix_product(const Call& c, const Factors& f, const Matrix& out, bool turned) {
    alignas(64) float piece[kPanel * kPanel];
    Share rows = {0, f.m}, cols = {0, f.n};
    if (f.m >= f.n) {
        rows = share(f.m, c);
    } else {
        const Share lanes = share((f.n + kLane - 1) / kLane, c);
        cols = {lanes.begin * kLane, lanes.end * kLane < f.n ? lanes.end * kLane : f.n};
    }
    for (int64_t col = cols.begin; col < cols.end; col += in_panel(col, cols.end))
        for (int64_t row = rows.begin; row < rows.end; row += in_panel(row, rows.end)) {
            const int64_t high = in_panel(row, rows.end), wide = in_panel(col, cols.end);
            if (!turned && (out.panels || wide % kLane == 0)) {
                product_block(f, row, high, col, wide, out.at(row, col), out.step(col), false);
                continue;
            }
            product_block(f, row, high, col, wide, piece, kPanel, true);
            if (turned) transpose(piece, kPanel, high, wide, out.at(col, row), out.step(row), false);
            for (int64_t i = 0; !turned && i < high; ++i) copy_run(piece + i * kPanel, wide, out.at(row + i, col));
        }
}

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
