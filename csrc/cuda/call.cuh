// One call of a device function: the kernels of csrc/include/fastmaml/kernels.h, with the same operands, sizes and
// formulas, by the threads of a block.
//
// A row kernel works row by row. Where there are rows enough (prepare, walk.cuh), each warp takes rows of its own, the
// same ones in every call of a group, so that between two row kernels there is no barrier but the warp's ("by warp");
// else all threads share all rows. Any other kernel stands between two barriers of the block. How many threads there
// are changes no bit: an element is made by one thread, or by the lanes of a warp, in an order that its sizes give.
#pragma once
#include "block.cuh"
#include "flat.h"

namespace fastmaml {
namespace cuda {

struct Call {
    Block b;
    const Instruction* in;
    const Place* operands;
    const Task* task;
    double* partials;  // kPartials, of the block
    int n;             // rows
    bool by_warp;
    int begin, end;   // rows of this thread's warp
    int mine, gang;   // this thread among those that share `first` to `last`
    int first, last;  // rows of the gang: its warp's, or all

    FM_DEVICE float* f(int i) const { return reinterpret_cast<float*>(operands[i].at); }
    FM_DEVICE uint8_t* mask(int i) const { return reinterpret_cast<uint8_t*>(operands[i].at); }
    FM_DEVICE int64_t stride(int i) const { return operands[i].row_stride / 4; }
    FM_DEVICE float* row(int i, int r) const {
        return reinterpret_cast<float*>(operands[i].at + r * operands[i].row_stride);
    }
    FM_DEVICE uint8_t* mask_row(int i, int r) const { return mask(i) + r * operands[i].row_stride; }
    FM_DEVICE int64_t label(int i, int r) const {
        return *reinterpret_cast<const int64_t*>(operands[i].at + r * operands[i].row_stride);
    }
    FM_DEVICE bool has(int i) const { return operands[i].at != nullptr; }
    FM_DEVICE int size(int i) const { return static_cast<int>(in->sizes[i]); }
    FM_DEVICE float number(int i) const { return in->numbers[i]; }
    FM_DEVICE int lane() const { return b.thread % kWarp; }
    FM_DEVICE float scalar(int i, float absent) const { return has(i) ? *f(i) : absent; }
};

FM_DEVICE int padded(int n) {
    return (n + static_cast<int>(kLane) - 1) / static_cast<int>(kLane) * static_cast<int>(kLane);
}

// f(row, column) once for each, by whichever thread
template <class F>
FM_DEVICE void each_element(const Call& c, int columns, F f) {
    const int count = (c.last - c.first) * columns;
    FM_ROLLED
    for (int i = c.mine; i < count; i += c.gang) f(c.first + i / columns, i % columns);
}

// f(row) by all lanes of a warp
template <class F>
FM_DEVICE void each_row(const Call& c, F f) {
    FM_ROLLED
    for (int r = c.begin; r < c.end; ++r) f(r);
}

// f(i) for i < count, shared out to the block: of what is no row kernel
template <class F>
FM_DEVICE void each(const Call& c, int count, F f) {
    FM_ROLLED
    for (int i = c.b.thread; i < count; i += c.b.threads) f(i);
}

// The sum of term(i) over i < count, at the block's thread 0: kPartials sums in double, and then theirs.
template <class F>
FM_DEVICE double sum_all(const Call& c, int count, F term) {
    for (int p = c.b.thread; p < kPartials; p += c.b.threads) {
        double sum = 0;
        for (int i = p; i < count; i += kPartials) sum += term(i);
        c.partials[p] = sum;
    }
    c.b.sync();
    double total = 0;
    if (c.b.thread < kWarp) {
        for (int p = c.b.thread; p < kPartials; p += kWarp) total += c.partials[p];
        total = c.b.warp_sum(total);
    }
    return total;
}

FM_DEVICE void store_scalar(float* out, double value) {  // the lane's other floats take part in sums: they are zero
    for (int i = 1; i < kLane; ++i) out[i] = 0.f;
    *out = static_cast<float>(value);
}

// The sum over i < count, of which no chain is longer than 32; add(i, chain) gives the chain with term i
template <class F>
FM_DEVICE float sum_terms(int count, F add) {
    float total = 0.f;
    for (int i = 0; i < count;) {
        const int stop = count - i > kWarp ? i + kWarp : count;
        float chain = 0.f;
        FM_UNROLL
        for (; i < stop; ++i) chain = add(i, chain);
        total += chain;
    }
    return total;
}

// The piecewise linear activation that a kernel applies to what it makes: "act" in kernels.h. Operand `mask`.
struct Gate {
    int kind;  // 0 none, 1 make, 2 apply
    float slope;
    uint8_t* mask;
    int64_t stride;
    FM_DEVICE Gate(const Call& c, int at)
        : kind(static_cast<int>(c.number(0))),
          slope(c.number(1)),
          mask(c.mask(at)),
          stride(c.operands[at].row_stride) {}
    FM_DEVICE float low(float v) const { return slope == 0.f ? 0.f : v * slope; }
    FM_DEVICE float operator()(float v, int row, int column) const {
        if (kind == 0) return v;
        if (kind == 2) return mask[row * stride + column] ? v : low(v);
        if (mask) mask[row * stride + column] = v > 0.f;
        return slope == 0.f ? (v <= 0.f ? 0.f : v) : v > 0.f ? v : low(v);  // a NaN stays one
    }
};

}  // namespace cuda
}  // namespace fastmaml
