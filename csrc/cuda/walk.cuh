// Walks a Plan: one launch runs one half of a meta-iteration for all tasks.
//
// The work goes in stages: packing of what the caller gives, phases before the tasks, tasks, sums over tasks, phases
// behind them, delivery. Blocks take the pieces of a stage by a counter, and go on when all pieces of it are done. A
// block waits only for pieces that running blocks have taken, so that any number of blocks, running at once or not,
// comes to an end. Which block does what changes no bit: a task is one block's work, and the sums over tasks are made
// element by element in batch order.
#pragma once
#include "activations.cuh"
#include "batchnorm.cuh"
#include "cross_entropy.cuh"
#include "expression.cuh"
#include "factored_linear.cuh"
#include "flat.h"
#include "layernorm.cuh"
#include "linear.cuh"
#include "mse.cuh"
#include "relu.cuh"
#include "update.cuh"

namespace fastmaml {
namespace cuda {

// Row kernels (call.cuh), and those that need the whole block.
// clang-format off
#define FASTMAML_CUDA_SMOOTH(K, name) K(name##_fwd) K(name##_jvp) K(name##_bwd) K(name##_bwd_jvp)
#define FASTMAML_CUDA_ROWS(K) \
    K(linear_fwd) K(linear_jvp) K(linear_bwd_input) K(linear_bwd_input_jvp) K(linear_bwd_input_both) K(factored_linear_jvp) \
    K(batchnorm_fwd) K(batchnorm_jvp) K(batchnorm_bwd_input) K(batchnorm_bwd_input_jvp) \
    K(layernorm_fwd) K(layernorm_jvp) K(layernorm_bwd_input) K(layernorm_bwd_input_jvp) K(relu_fwd) K(relu_replay) K(relu_bwd) \
    FASTMAML_CUDA_SMOOTH(K, tanh) FASTMAML_CUDA_SMOOTH(K, sigmoid) FASTMAML_CUDA_SMOOTH(K, exp) FASTMAML_CUDA_SMOOTH(K, elu) \
    FASTMAML_CUDA_SMOOTH(K, gelu) FASTMAML_CUDA_SMOOTH(K, silu) FASTMAML_CUDA_SMOOTH(K, softplus) \
    K(cross_entropy_bwd) K(cross_entropy_bwd_jvp) K(mse_bwd) K(mse_bwd_jvp) \
    K(copy_rows_fwd) K(add_rows_fwd) K(axpy_rows_fwd) K(scale_rows_fwd) K(sgd_rows_fwd) K(sgd_rows_bwd) K(zero_rows_fwd)
#define FASTMAML_CUDA_BLOCKS(K) \
    K(linear_bwd_weight) K(linear_bwd_weight_jvp) K(row_sum_bwd) K(gram_fwd) K(factored_linear_fwd) K(factored_linear_bwd) \
    K(batchnorm_stats_fwd) K(batchnorm_running_fwd) K(batchnorm_stats_jvp) K(batchnorm_bwd_stats) K(batchnorm_bwd_stats_jvp) \
    K(layernorm_bwd_weight) K(layernorm_bwd_weight_jvp) K(cross_entropy_fwd) K(cross_entropy_jvp) K(mse_fwd) K(mse_jvp) \
    K(sgd_fwd) K(sgd_bwd) K(sgd_bwd_rate) K(dot_fwd) K(ratio_fwd) K(clip_norm_fwd) K(clip_value_fwd) K(clip_value_bwd) \
    K(axpy_fwd) K(scale_fwd) K(add_fwd) K(zero_fwd) K(copy_fwd) \
    K(join_rows_fwd) K(support_rows_fwd) K(query_rows_fwd) K(query_rows_bwd) K(add_expr_fwd) K(mul_expr_fwd) K(mul_expr_jvp) K(sum_expr) \
    K(matmul_fwd) K(transpose_fwd) K(slice_fwd) K(slice_bwd) K(pack_fwd) K(unpack_fwd)
// clang-format on

FM_DEVICE bool is_row_kernel(int kernel) {
    switch (kernel) {
#define FASTMAML_CASE(name) case kId_##name:
        FASTMAML_CUDA_ROWS(FASTMAML_CASE)
#undef FASTMAML_CASE
        return true;
        default:
            return false;
    }
}

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

FM_DEVICE Call prepare(const Block& b, const Instruction* in, const Place* places, const Task* task, double* partials,
                       int n) {
    const int warps = b.threads / kWarp, warp = b.thread / kWarp;
    const int begin = n * warp / warps, end = n * (warp + 1) / warps;
    if (is_row_kernel(in->kernel) && n >= warps)
        return {b, in, places, task, partials, n, true, begin, end, b.thread % kWarp, kWarp, begin, end};
    return {b, in, places, task, partials, n, false, begin, end, b.thread, b.threads, 0, n};
}

struct Walk {
    Block b;
    const Launch& l;
    int block;
    Fixed* s;
    Place* places;  // of this thread's warp
    char* shared_arena;
    const FlatPlan& p;

    FM_DEVICE Walk(const Block& b, const Launch& l, int block, char* shared)
        : b(b),
          l(l),
          block(block),
          s(reinterpret_cast<Fixed*>(shared)),
          places(reinterpret_cast<Place*>(shared + sizeof(Fixed)) + b.thread / kWarp * kMaxOperands),
          shared_arena(shared + sizeof(Fixed) + b.threads / kWarp * kMaxOperands * sizeof(Place)),
          p(*reinterpret_cast<const FlatPlan*>(l.plan)) {
        shared_arena += (64 - reinterpret_cast<uintptr_t>(shared_arena) % 64) % 64;
    }

    template <class T>
    FM_DEVICE const T* table(int32_t at) const {
        return reinterpret_cast<const T*>(l.plan + at);
    }

    // ------------------------------------------------------------------------------------------------ addresses
    FM_DEVICE char* address(const Operand& o, int64_t step) const {
        const int64_t slot = step + o.shift;
        if (o.base == kNoBase) return nullptr;
        if (o.first_base != kNoBase && slot == 0) return s->bases[o.first_base] + o.first_offset;
        return s->bases[o.base] + (o.offset + slot * o.step_stride);
    }

    FM_DEVICE void begin(int64_t t) const {  // task t, or what is outside of the tasks (-1)
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
            s->bases[kFirstTaskBase + p.n_task_buffers] = shared_arena;
            s->bases[kFirstTaskBase + p.n_task_buffers + 1] = reinterpret_cast<char*>(l.sums + t * p.sums_floats);
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

    // ------------------------------------------------------------------------------------------------ instructions
    FM_DEVICE int extent(Rows rows) const {
        const int64_t support = s->task.n_support, query = s->task.n_query;
        return static_cast<int>(rows == Rows::kNone      ? 1
                                : rows == Rows::kSupport ? support
                                : rows == Rows::kQuery   ? query
                                                         : support + query);
    }

    FM_DEVICE Call prepare_call(const Instruction* in, int step, int n) const {
        const int i = b.thread % kWarp;
        if (i < kMaxOperands) {
            const Operand& o = table<Operand>(p.operands)[in->operands + (i < in->n_operands ? i : 0)];
            places[i] = {i < in->n_operands ? address(o, step) : nullptr, o.row_stride};
        }
        b.warp_sync();
        return prepare(b, in, places, &s->task, s->partials, n);
    }

    // A barrier of the block stands before and behind whatever is not "by warp", and behind every group.
    FM_NOINLINE void run_phase(const FlatPhase& phase) const {
        for (int step = phase.start; phase.stride > 0 ? step < phase.stop : step > phase.stop; step += phase.stride)
            for (int g = phase.groups.begin; g < phase.groups.end; ++g) {
                const FlatGroup& group = table<FlatGroup>(p.groups)[g];
                const int n = extent(group.rows);
                bool met = true;
                for (int i = group.instructions.begin; i < group.instructions.end; ++i) {
                    const Call c = prepare_call(table<Instruction>(p.instructions) + i, step, n);
                    if (!c.by_warp && !met) b.sync();
                    dispatch(c);
                    met = !c.by_warp;
                    met ? b.sync() : b.warp_sync();
                }
                if (!met) b.sync();
            }
    }

    // ------------------------------------------------------------------------------------------------ stages
    // f(piece) for each of `count` pieces, by whichever block; behind it all of them are done.
    template <class F>
    FM_NOINLINE void stage(Stage which, int count, F f) const {
        if (count == 0) return;
        int *taken = l.counters + 2 * which, *done = taken + 1;
        for (;;) {
            b.sync();
            if (b.thread == 0) s->ticket = take(taken);
            b.sync();
            const int piece = s->ticket;
            if (piece >= count) break;
            f(piece);
            b.sync();
            if (b.thread == 0) add(done, 1);
        }
        if (b.thread == 0)
            while (read(done) < count) b.pause();
        b.sync();
    }

    FM_DEVICE void run_outside(bool after) const {
        begin(-1);
        for (int i = 0; i < p.n_phases; ++i) {
            const FlatPhase& phase = table<FlatPhase>(p.phases)[i];
            if (phase.scope == Scope::kMeta && phase.half == l.half && (phase.after != 0) == after) run_phase(phase);
        }
    }

    // f(slot's offset in the meta arena, slot's offset in the caller's array, port, first element, last) of a chunk
    template <class F>
    FM_DEVICE void at_chunk(const FlatPort* ports, int n, int chunk, F f) const {
        int i = 0;
        while (i + 1 < n && ports[i + 1].first_chunk <= chunk) ++i;
        const FlatPort& port = ports[i];
        const int slot = (chunk - port.first_chunk) / port.chunks_of_slot,
                  part = (chunk - port.first_chunk) % port.chunks_of_slot;
        float* packed = reinterpret_cast<float*>(l.meta + port.port.offset + slot * port.port.step_stride);
        f(i, port.port, packed, slot * port.port.rows * port.port.cols, part * kChunk);
    }

    FM_DEVICE void pack(int chunk) const {
        at_chunk(table<FlatPort>(p.inputs), p.n_inputs, chunk,
                 [&](int i, const Port& port, float* to, int64_t skip, int first) {
                     const float* from = static_cast<const float*>(l.pointers[p.n_task_buffers + i]) + skip;
                     const int rows = static_cast<int>(port.rows), cols = static_cast<int>(port.cols),
                               plain = rows * cols;
                     const bool packed = port.layout == Layout::kPacked;
                     const int floats = packed ? static_cast<int>(packed_floats(cols, rows)) : padded(plain);
                     for (int k = first + b.thread; k < floats && k < first + kChunk; k += b.threads) {
                         const int source = packed ? plain_index(k, cols, rows) : k < plain ? k : -1;
                         to[k] = source < 0 ? 0.f : from[source];
                     }
                 });
    }

    FM_DEVICE void deliver(int chunk) const {
        at_chunk(table<FlatPort>(p.outputs), p.n_outputs, chunk,
                 [&](int i, const Port& port, float* from, int64_t skip, int first) {
                     float* to = static_cast<float*>(l.pointers[p.n_task_buffers + p.n_inputs + i]);
                     if (to == nullptr) return;
                     const int rows = static_cast<int>(port.rows), cols = static_cast<int>(port.cols),
                               plain = rows * cols;
                     for (int k = first + b.thread; k < plain && k < first + kChunk; k += b.threads) {
                         const float v = from[port.layout == Layout::kPacked ? packed_index(k, cols, rows) : k];
                         to[skip + k] = l.add_to_outputs ? to[skip + k] + v : v;
                     }
                 });
    }

    FM_DEVICE bool losses_finite(int t) const {  // of one thread
        if (l.half != 0) return l.finite[t];     // the forward half has said
        for (int i = 0; i < p.n_checked; ++i) {
            const Scalars& scalars = table<Scalars>(p.checked)[i];
            for (int64_t k = scalars.begin; k < scalars.end; ++k)
                if (!isfinite(*reinterpret_cast<const float*>(address(scalars.at, k)))) return false;
        }
        return true;
    }

    FM_DEVICE void run_task(int t) const {
        begin(t);
        const bool sums = l.half == p.halves - 1;
        for (int i = 0; i < p.n_phases; ++i) {
            const FlatPhase& phase = table<FlatPhase>(p.phases)[i];
            if (phase.half == l.half && phase.scope != Scope::kMeta && (sums || !phase.after)) run_phase(phase);
        }
        bool bad = b.thread == 0 && !losses_finite(t);
        for (int i = 0; sums && i < p.n_reductions; ++i) {
            const FlatReduction& r = table<FlatReduction>(p.reductions)[i];
            const float* from = reinterpret_cast<const float*>(address(r.source, 0));
            float* to = l.sums + t * p.sums_floats + r.offset;
            for (int k = b.thread; k < r.count; k += b.threads) {
                const float v = from[k];
                bad = bad || !isfinite(v);
                if (r.copied) to[k] = v;
            }
        }
        bad = b.any(bad);
        if (b.thread == 0) l.finite[t] = !bad;
    }

    // Elements of the sum over the finite tasks, in batch order, of weight * source
    FM_DEVICE void sum(int chunk) const {
        const FlatReduction* r = table<FlatReduction>(p.reductions);
        while (r + 1 < table<FlatReduction>(p.reductions) + p.n_reductions && r[1].first_chunk <= chunk) ++r;
        float* target = reinterpret_cast<float*>(l.meta + r->target);
        const int first = (chunk - r->first_chunk) * kChunk;
        for (int k = first + b.thread; k < r->count && k < first + kChunk; k += b.threads) {
            double total = 0;
            FM_UNROLL
            for (int64_t t = 0; t < l.tasks; ++t) {
                const double weight = l.task_weights ? l.task_weights[t] : l.uniform_weight;
                const float v = l.sums[t * p.sums_floats + r->offset + k];
                total += l.finite[t] ? static_cast<float>(weight) * v : 0.f;
            }
            target[k] = static_cast<float>(total);
        }
    }

    FM_DEVICE bool all_finite() const {
        bool bad = false;
        for (int64_t t = b.thread; t < l.tasks; t += b.threads) bad = bad || !l.finite[t];
        return !b.any(bad);
    }

    FM_DEVICE void run() const {
        const int bit = 1 << l.half;
        stage(kPack, l.half == 0 ? p.input_chunks : 0, [&](int i) { pack(i); });
        stage(kPrologue, (p.prologue & bit) != 0, [&](int) { run_outside(false); });
        stage(kTasks, static_cast<int>(l.tasks), [&](int t) { run_task(t); });
        if (l.half == p.halves - 1) {
            stage(kSum, p.sum_chunks, [&](int i) { sum(i); });
            stage(kEpilogue, (p.epilogue & bit) != 0, [&](int) { run_outside(true); });
            if (!l.strict || all_finite()) stage(kDeliver, p.output_chunks, [&](int i) { deliver(i); });
        }
        b.sync();
        if (b.thread == 0 &&
            take(l.counters + 2 * kStages) == l.blocks - 1)  // the last block: ready for the next launch
            for (int i = 0; i < kCounters; ++i) l.counters[i] = 0;
    }
};

}  // namespace cuda
}  // namespace fastmaml
