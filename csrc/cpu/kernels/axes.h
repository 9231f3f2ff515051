// Arrays of up to four axes with a second operand that is broadcast on some of them: neighbouring axes on which nothing
// changes become one, so that what is left to loop over is short and its innermost run long.
#pragma once
#include "../simd.h"

namespace fastmaml {
namespace FASTMAML_ISA {

struct Axis {
    int64_t extent, x, y;  // floats from one element of either operand to the next; 0: it is broadcast
};

// Innermost first, those that are left over have extent 1. Of contiguous operands of the shape z[4], with extent 1 on
// the axes whose bit is set.
struct Axes {
    Axis axis[4];
    Axes(const int64_t* z, int64_t broadcast_x, int64_t broadcast_y) {
        int64_t x = 1, y = 1;
        int n = 0;
        for (Axis& a : axis) a = {1, 0, 0};
        for (int i = 3; i >= 0; --i) {
            if (z[i] == 1) continue;
            const Axis a = {z[i], broadcast_x >> i & 1 ? 0 : x, broadcast_y >> i & 1 ? 0 : y};
            if (n && !axis[n - 1].x == !a.x && !axis[n - 1].y == !a.y)
                axis[n - 1].extent *= a.extent;
            else
                axis[n++] = a;
            if (a.x) x *= a.extent;
            if (a.y) y *= a.extent;
        }
    }
};

struct Walk {  // through all elements of some axes, the first one fastest; x and y: where it stands
    Axis axis[4];
    int64_t index[4];
    int axes = 0;
    int64_t count = 1, x = 0, y = 0;

    void along(const Axis& a) {
        if (a.extent == 1) return;
        axis[axes] = a, index[axes++] = 0;
        count *= a.extent;
    }
    void go(int64_t to) {
        x = y = 0;
        for (int i = 0; i < axes; ++i) {
            index[i] = to % axis[i].extent, to /= axis[i].extent;
            x += index[i] * axis[i].x, y += index[i] * axis[i].y;
        }
    }
    void next() {
        for (int i = 0; i < axes; ++i) {
            x += axis[i].x, y += axis[i].y;
            if (++index[i] < axis[i].extent) return;
            x -= index[i] * axis[i].x, y -= index[i] * axis[i].y;
            index[i] = 0;
        }
    }
};

// f(x, y, z, n): runs of n elements of z, from these offsets on. A share of the runs, or of a single one.
template <class F>
static inline void each_run(const Call& c, const Axes& axes, F f) {
    const Axis& inner = axes.axis[0];
    Walk walk;
    for (int i = 1; i < 4; ++i) walk.along(axes.axis[i]);
    if (walk.count == 1) {
        const Share s = share((inner.extent + kLane - 1) / kLane, c);
        const int64_t begin = s.begin * kLane, end = s.end * kLane < inner.extent ? s.end * kLane : inner.extent;
        if (begin < end) f(inner.x * begin, inner.y * begin, begin, end - begin);
        return;
    }
    const Share s = share(walk.count, c);
    walk.go(s.begin);
    for (int64_t u = s.begin; u < s.end; ++u, walk.next()) f(walk.x, walk.y, u * inner.extent, inner.extent);
}

// Up to a vector of what an operand has from element j of a run on
static inline vec load_run(const float* p, bool moves, int64_t j, int64_t n) {
    return moves ? load_part(p + j, n - j) : splat(*p);
}

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
