// What the text of a half (source.cpp) is made of: its struct Half derives from Straight<Half> and has the Plan as
// constants, call after call. Everything of a phase is inlined, so that shapes, strides and addresses fold into the
// code: what the walk looks up in memory is in registers here, or gone.
#pragma once
#define FASTMAML_STRAIGHT
#include "walk.cuh"

namespace fastmaml {
namespace cuda {

constexpr int64_t kRead = -1;  // kSupport, kQuery: rows of every task, or that tasks differ

template <class P>
struct Straight : Walk<P> {
    using Walk<P>::l;
    Task here = {0, 0, 0, 0};
    int64_t support_row = 0, query_row = 0;

    FM_DEVICE Straight(const Block& b, const Launch& l, int block, char* memory)
        : Walk<P>(b, l, block, memory_of(P::head(), l, block, memory)) {}
    FM_DEVICE const Task& task() const { return here; }

    FM_DEVICE void begin(int64_t t) {
        here = Task{t, 0, 0, 0};
        support_row = query_row = 0;
        if (t < 0) return;
        support_row = P::kSupport == kRead ? l.support_rows[t] : t * P::kSupport;
        query_row = P::kQuery == kRead ? l.query_rows[t] : t * P::kQuery;
        here.n_support = P::kSupport == kRead ? l.support_rows[t + 1] - support_row : P::kSupport;
        here.n_query = P::kQuery == kRead ? l.query_rows[t + 1] - query_row : P::kQuery;
        here.ways = P::kWays ? l.ways[t] : 0;
    }

    FM_DEVICE char* base(int32_t i) const {
        const FlatPlan& p = P::head();
        if (i == kMetaBase) return in_global(l.meta);
        if (i == kArenaBase) return in_global(l.arenas) + this->block * p.arena_bytes;
        if (i == shared_base(p.n_task_buffers)) return this->shared;
        if (i == sums_base(p.n_task_buffers)) return in_global(l.sums + here.index * p.sums_floats);
        const TaskBuffer buffer = P::task_buffer(i - kFirstTaskBase);
        const int64_t at = buffer.rows == Rows::kSupport ? support_row
                           : buffer.rows == Rows::kQuery ? query_row
                                                         : here.index;
        return in_global(l.pointers[i - kFirstTaskBase]) + at * buffer.stride;
    }

    // A phase is compiled by itself: in one piece a compiler takes more than twice as long for twice as many calls. Of
    // one that has a single step, the step is a constant too.
    template <void (P::*F)(int), int kStart, int kStop, int kStride>
    FM_NOINLINE static void apart(Block b, const Launch& l, int block, char* memory, int64_t t, int step) {
        b.threads = P::kRanks * P::kThreads;
        b.ranks = P::kRanks;
        P w(b, l, block, memory);
        w.begin(t);
        (w.*F)(kStart + kStride == kStop ? kStart : step);
    }
    template <void (P::*F)(int), int kStart, int kStop, int kStride>
    FM_DEVICE void phase() {
        FM_LOOP
        for (int step = kStart; kStride > 0 ? step < kStop : step > kStop; step += kStride)
            apart<F, kStart, kStop, kStride>(this->b, l, this->block, reinterpret_cast<char*>(this->s), here.index,
                                             step);
    }

    template <int I, int N>
    FM_DEVICE Place place(const Operand (&operands)[N], int step) {
        if constexpr (I < N) {
            if (operands[I].base == kNoBase) return {nullptr, 0};
            char* const at = this->address(operands[I], step);
            assume(at != nullptr);  // a half has all that it uses
            return {at, operands[I].row_stride};
        }
        return {nullptr, 0};
    }

    template <void (*F)(const Call&), int N>
    FM_DEVICE void call(Interval& g, int step, const Instruction& in, const Operand (&o)[N]) {
        static_assert(kMaxOperands == 16, "each is written out: a loop over them is unrolled too late to be folded");
        const Place places[kMaxOperands] = {
            place<0>(o, step),  place<1>(o, step),  place<2>(o, step),  place<3>(o, step),
            place<4>(o, step),  place<5>(o, step),  place<6>(o, step),  place<7>(o, step),
            place<8>(o, step),  place<9>(o, step),  place<10>(o, step), place<11>(o, step),
            place<12>(o, step), place<13>(o, step), place<14>(o, step), place<15>(o, step)};
        Walk<P>::call(g, &in, places, F);
    }
};

}  // namespace cuda
}  // namespace fastmaml
