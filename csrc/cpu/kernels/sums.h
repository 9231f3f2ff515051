// Sums over many terms, whose order depends on their number alone.
#pragma once
#include "../simd.h"

namespace fastmaml {
namespace FASTMAML_ISA {

// Runs `body(row, line)` over this member's share of the lines of a block's rows. Lines are written independently of
// each other, so that how they are shared changes no bit.
template <class F>
static inline void for_lines(const Call& c, int64_t lines, F body) {
    const Share s = share(c.n * lines, c);
    for (int64_t u = s.begin; u < s.end; ++u) body(u / lines, u % lines);
}

struct Sums {
    vec a, b;
};

// Two sums at once; add(i, a, b) adds a term to each. Four chains of at most 32 additions, then their sum.
template <class F>
static inline Sums sum_terms(int64_t n, F add) {
    Sums total = {vec{}, vec{}};
    if (n == 1) return add(0, total.a, total.b), total;  // vectors, as images of one pixel
    for (int64_t begin = 0; begin < n; begin += 128) {
        const int64_t end = n < begin + 128 ? n : begin + 128;
        vec a0{}, a1{}, a2{}, a3{}, b0{}, b1{}, b2{}, b3{};
        int64_t i = begin;
        for (; i + 4 <= end; i += 4) {
            add(i, a0, b0);
            add(i + 1, a1, b1);
            add(i + 2, a2, b2);
            add(i + 3, a3, b3);
        }
        if (i < end) add(i, a0, b0);
        if (i + 1 < end) add(i + 1, a1, b1);
        if (i + 2 < end) add(i + 2, a2, b2);
        total.a += (a0 + a1) + (a2 + a3);
        total.b += (b0 + b1) + (b2 + b3);
    }
    return total;
}

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
