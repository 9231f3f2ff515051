// The walk over a Plan as it lies in memory (flat.h): one kernel for every Plan, with device functions of run-time
// shapes. It runs what has not been compiled for its Plan alone, and is what that is tested against.
#pragma once
#include "walk.cuh"

namespace fastmaml {
namespace cuda {

// Each is compiled by itself: in one piece they take ptxas a minute.
template <void (*F)(const Call&)>
FM_NOINLINE void apart(const Call& c) {
    F(c);
}

FM_DEVICE void dispatch(const Call& c) {
    switch (c.in->kernel) {
#define FASTMAML_CASE(name) \
    case kId_##name:        \
        return apart<name>(c);
        FASTMAML_CUDA_ROWS(FASTMAML_CASE)
        FASTMAML_CUDA_BLOCKS(FASTMAML_CASE)
#undef FASTMAML_CASE
    }
}

struct Tables : Walk<Tables> {
    const FlatPlan& p;
    Place* places;  // of this thread's warp

    FM_DEVICE Tables(const Block& b, const Launch& l, int block, char* memory)
        : Walk(b, l, block, memory_of(*reinterpret_cast<const FlatPlan*>(l.plan), l, block, memory)),
          p(*reinterpret_cast<const FlatPlan*>(l.plan)),
          places(reinterpret_cast<Place*>(reinterpret_cast<char*>(s) + sizeof(Fixed)) +
                 b.thread / kWarp * kMaxOperands) {}

    template <class T>
    FM_DEVICE const T* table(int32_t at) const {
        return reinterpret_cast<const T*>(l.plan + at);
    }
    FM_DEVICE const FlatPlan& head() const { return p; }
    FM_DEVICE int half() const { return l.half; }
    FM_DEVICE const Task& task() const { return s->task; }
    FM_DEVICE char* base(int32_t i) const { return s->bases[i]; }

    FM_DEVICE void begin(int64_t t) {
        b.sync();
        if (b.thread == 0) {
            s->task = Task{t, 0, 0, 0};
            if (t >= 0) {
                s->task.n_support = l.support_rows[t + 1] - l.support_rows[t];
                s->task.n_query = l.query_rows[t + 1] - l.query_rows[t];
                s->task.ways = l.ways ? l.ways[t] : 0;
            }
            s->bases[kMetaBase] = l.meta;
            s->bases[kArenaBase] = l.arenas + block * p.arena_bytes;
            s->bases[shared_base(p.n_task_buffers)] = shared;
            s->bases[sums_base(p.n_task_buffers)] = reinterpret_cast<char*>(l.sums + t * p.sums_floats);
        }
        for (int i = b.thread; i < p.n_task_buffers; i += b.threads) {
            const TaskBuffer& buffer = table<TaskBuffer>(p.task_buffers)[i];
            const int64_t at = buffer.rows == Rows::kSupport ? l.support_rows[t < 0 ? 0 : t]
                               : buffer.rows == Rows::kQuery ? l.query_rows[t < 0 ? 0 : t]
                                                             : t;
            char* const from = static_cast<char*>(l.pointers[i]);  // null: this half does not use it
            s->bases[kFirstTaskBase + i] = from ? from + at * buffer.stride : nullptr;
        }
        b.sync();
    }

    FM_DEVICE const Place* places_of(const Instruction* in, int step) {
        const int i = b.thread % kWarp;
        if (i < kMaxOperands) {
            const Operand& o = table<Operand>(p.operands)[in->operands + (i < in->n_operands ? i : 0)];
            places[i] = {i < in->n_operands ? address(o, step) : nullptr, o.row_stride};
        }
        b.warp_sync();
        return places;
    }

    FM_NOINLINE void run_phase(const FlatPhase& phase) {
        for (int step = phase.start; phase.stride > 0 ? step < phase.stop : step > phase.stop; step += phase.stride)
            for (int g = phase.groups.begin; g < phase.groups.end; ++g) {
                const FlatGroup& group = table<FlatGroup>(p.groups)[g];
                Interval interval = open(group.rows);
                for (int i = group.instructions.begin; i < group.instructions.end; ++i) {
                    const Instruction* in = table<Instruction>(p.instructions) + i;
                    call(interval, in, places_of(in, step), dispatch);
                }
                close(interval);
            }
    }

    FM_DEVICE void phases(Part part) {
        for (int i = 0; i < p.n_phases; ++i) {
            const FlatPhase& phase = table<FlatPhase>(p.phases)[i];
            if (runs(phase, part, l.half, p.halves)) run_phase(phase);
        }
    }

    // f(number, entry) of the one to which a chunk belongs: the last that does not begin behind it
    template <class T, class F>
    FM_DEVICE void find(const T* entries, int n, int chunk, F f) {
        int i = 0;
        while (i + 1 < n && entries[i + 1].first_chunk <= chunk) ++i;
        f(i, entries[i]);
    }
    template <class F>
    FM_DEVICE void input(int chunk, F f) {
        find(table<FlatPort>(p.inputs), p.n_inputs, chunk, f);
    }
    template <class F>
    FM_DEVICE void output(int chunk, F f) {
        find(table<FlatPort>(p.outputs), p.n_outputs, chunk, f);
    }
    template <class F>
    FM_DEVICE void reduction(int chunk, F f) {
        find(table<FlatReduction>(p.reductions), p.n_reductions, chunk, f);
    }
    template <class F>
    FM_DEVICE void each_reduction(F f) {
        for (int i = 0; i < p.n_reductions; ++i) f(table<FlatReduction>(p.reductions)[i]);
    }
    template <class F>
    FM_DEVICE void each_checked(F f) {
        for (int i = 0; i < p.n_checked; ++i) f(table<Scalars>(p.checked)[i]);
    }
};

}  // namespace cuda
}  // namespace fastmaml
