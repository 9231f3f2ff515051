// Runs a Plan: one launch runs one half of a meta-iteration for all tasks.
//
// The work goes in stages: packing of what the caller gives, phases before the tasks, tasks, sums over tasks, phases
// behind them, delivery. Blocks take the pieces of a stage by a counter, and go on when all pieces of it are done. A
// block waits only for pieces that running blocks have taken, so that any number of blocks, running at once or not,
// comes to an end. Which block does what changes no bit: a task is one block's work, and the sums over tasks are made
// element by element in batch order.
//
// What there is to do comes from P: Tables (tables.cuh) read it from memory as they go, straight-line source
// (straight.cuh) has it as constants. Both call the functions here in the same order.
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

// By warp where every warp has a tile of rows: with fewer a product reads its weight once for each row, which costs
// more than the barriers that are saved (docs/cuda.md); but not more than those of a cluster.
FM_DEVICE Call prepare(const Block& b, const Instruction* in, const Place* places, const Task* task, double* partials,
                       int n) {
    const int warps = b.threads / kWarp, warp = b.thread / kWarp;
    const int begin = n * warp / warps, end = n * (warp + 1) / warps;
    const int least = b.ranks > 1 ? warps : kTile * warps;
    const bool by_warp = is_row_kernel(in->kernel) && n >= least;
    return {b,
            in,
            places,
            task,
            partials,
            n,
            by_warp,
            begin,
            end,
            by_warp ? b.thread % kWarp : b.thread,
            by_warp ? kWarp : b.threads,
            by_warp ? begin : 0,
            by_warp ? end : n};
}

struct Interval {  // a group that is being run
    int n;         // its rows
    bool met;      // whether all threads have met behind its last instruction
};

// Where Fixed and what lies behind it begin. A block here may be a cluster, which has them in global memory.
FM_DEVICE char* memory_of(const FlatPlan& p, const Launch& l, int block, char* shared) {
    return p.ranks == 1 ? shared_memory(shared)
                        : in_global(l.arenas) + (block + 1) * p.arena_bytes - fixed_bytes(p.ranks * p.threads);
}

// P has, for the half that runs:
//   head(), half()                           the Plan's numbers, the half
//   begin(t), task(), base(i)                task t, or what is outside of the tasks (-1); bases of operands in it
//   phases(part)                             runs them: open, call and close their groups
//   input, output, reduction(chunk, f)       f(number, entry) of the one to which a chunk belongs
//   each_reduction(f), each_checked(f)       f(entry) of all
template <class P>
struct Walk {
    Block b;
    const Launch& l;
    int block;
    Fixed* s;
    char* shared;  // the arena in shared memory

    FM_DEVICE Walk(const Block& b, const Launch& l, int block, char* memory)
        : b(b), l(l), block(block), s(reinterpret_cast<Fixed*>(memory)), shared(memory + fixed_bytes(b.threads)) {}
    FM_DEVICE P& plan() { return static_cast<P&>(*this); }
    FM_DEVICE bool any(bool v) {  // of all threads, which meet here
        if (b.thread == 0) s->vote = 0;
        b.sync();
        if (v) s->vote = 1;
        b.sync();
        const bool found = s->vote != 0;
        b.sync();
        return found;
    }

    // ------------------------------------------------------------------------------------------------ addresses
    FM_DEVICE char* address(const Operand& o, int64_t step) {
        const int64_t slot = step + o.shift;
        if (o.base == kNoBase) return nullptr;
        if (o.first_base != kNoBase && slot == 0) return plan().base(o.first_base) + o.first_offset;
        return plan().base(o.base) + (o.offset + slot * o.step_stride);
    }

    // ------------------------------------------------------------------------------------------------ instructions
    FM_DEVICE int extent(Rows rows) {
        const int64_t support = plan().task().n_support, query = plan().task().n_query;
        return static_cast<int>(rows == Rows::kNone      ? 1
                                : rows == Rows::kSupport ? support
                                : rows == Rows::kQuery   ? query
                                                         : support + query);
    }

    // A barrier of the block stands before and behind whatever is not "by warp", and behind every group.
    FM_DEVICE Interval open(Rows rows) { return {extent(rows), true}; }
    template <class F>
    FM_DEVICE void call(Interval& g, const Instruction* in, const Place* places, F function) {
        const Call c = prepare(b, in, places, &plan().task(), s->partials, g.n);
        if (!c.by_warp && !g.met) b.sync();
        function(c);
        g.met = !c.by_warp;
        g.met ? b.sync() : b.warp_sync();
    }
    FM_DEVICE void close(const Interval& g) {
        if (!g.met) b.sync();
    }

    // ------------------------------------------------------------------------------------------------ stages
    // F for each of `count` pieces, by whichever block; behind it all of them are done.
    template <void (Walk::*F)(int)>
    FM_APART void stage(Stage which, int count) {
        if (count == 0) return;
        int *taken = l.counters + 2 * which, *done = taken + 1;
        for (;;) {
            b.sync();
            if (b.thread == 0) s->ticket = take(taken);
            b.sync();
            const int piece = s->ticket;
            if (piece >= count) break;
            (this->*F)(piece);
            b.sync();
            if (b.thread == 0) add(done, 1);
        }
        if (b.thread == 0) {
            while (peek(done) < count) b.pause();
            acquire();
        }
        b.sync();
    }

    template <Part part>
    FM_DEVICE void run_outside(int) {
        plan().begin(-1);
        plan().phases(part);
    }

    struct Slot {  // of a port: where it lies packed, and where in the caller's array; the first element of a chunk
        float* packed;
        int64_t skip;
        int first;
    };
    FM_DEVICE Slot slot(const FlatPort& port, int chunk) {
        const int slot = (chunk - port.first_chunk) / port.chunks_of_slot,
                  part = (chunk - port.first_chunk) % port.chunks_of_slot;
        return {reinterpret_cast<float*>(l.meta + port.port.offset + slot * port.port.step_stride),
                slot * port.port.rows * port.port.cols, part * plan().head().chunk};
    }

    // store(k, load(k)) for begin <= k < end, N loads together: an answer of L2 takes 250 cycles
    template <int N, class Load, class Store>
    FM_DEVICE void stream(int begin, int end, Load load, Store store) {
        FM_LOOP
        for (int k = begin + b.thread; k < end; k += N * b.threads) {
            float v[N];
            for (int i = 0; i < N; ++i) v[i] = k + i * b.threads < end ? load(k + i * b.threads) : 0.f;
            for (int i = 0; i < N; ++i)
                if (k + i * b.threads < end) store(k + i * b.threads, v[i]);
        }
    }
    FM_DEVICE int stop(int first, int end) {  // of a chunk
        const int chunk = plan().head().chunk;
        return end - first < chunk ? end : first + chunk;
    }

    FM_DEVICE void pack(int chunk) {
        plan().input(chunk, [&](int i, const FlatPort& port) {
            const Slot at = slot(port, chunk);
            const float* from = static_cast<const float*>(l.pointers[plan().head().n_task_buffers + i]) + at.skip;
            const int rows = static_cast<int>(port.port.rows), cols = static_cast<int>(port.port.cols),
                      plain = rows * cols;
            const bool packed = port.port.layout == Layout::kPacked;
            const int floats = packed ? static_cast<int>(packed_floats(cols, rows)) : padded(plain);
            const auto load = [&](int k) {
                const int source = packed ? plain_index(k, cols, rows) : k < plain ? k : -1;
                return source < 0 ? 0.f : from[source];
            };
            stream<4>(at.first, stop(at.first, floats), load, [&](int k, float v) { at.packed[k] = v; });
        });
    }

    FM_DEVICE void deliver(int chunk) {
        plan().output(chunk, [&](int i, const FlatPort& port) {
            const Slot at = slot(port, chunk);
            const FlatPlan& p = plan().head();
            float* to = static_cast<float*>(l.pointers[p.n_task_buffers + p.n_inputs + i]);
            if (to == nullptr) return;
            const int rows = static_cast<int>(port.port.rows), cols = static_cast<int>(port.port.cols),
                      plain = rows * cols;
            const auto load = [&](int k) {
                const float v = at.packed[port.port.layout == Layout::kPacked ? packed_index(k, cols, rows) : k];
                return l.add_to_outputs ? to[at.skip + k] + v : v;
            };
            stream<4>(at.first, stop(at.first, plain), load, [&](int k, float v) { to[at.skip + k] = v; });
        });
    }

    FM_DEVICE bool losses_finite(int t) {            // of one thread
        if (plan().half() != 0) return l.finite[t];  // the forward half has said
        bool finite = true;
        plan().each_checked([&](const Scalars& scalars) {
            for (int64_t k = scalars.begin; k < scalars.end; ++k)
                finite = finite && isfinite(*reinterpret_cast<const float*>(address(scalars.at, k)));
        });
        return finite;
    }

    // The weights of step 0 are those of all tasks, read where they are packed: asked for at once, and not by the first
    // product, which waits for a few at a time. Not for a cluster, whose barriers empty L1.
    FM_DEVICE void warm() {
        for (int at = 32 * b.thread; at < plan().head().warm_bytes; at += 32 * b.threads) touch(l.meta + at);
    }

    FM_DEVICE void run_task(int t) {
        warm();
        plan().begin(t);
        plan().phases(kOfTask);
        bool bad = b.thread == 0 && !losses_finite(t);
        if (plan().half() == plan().head().halves - 1)
            plan().each_reduction([&](const FlatReduction& r) {
                const float* from = reinterpret_cast<const float*>(address(r.source, 0));
                float* to = l.sums + t * plan().head().sums_floats + r.offset;
                stream<8>(
                    0, r.count, [&](int k) { return from[k]; },
                    [&](int k, float v) {
                        bad = bad || !isfinite(v);
                        if (r.copied) to[k] = v;
                    });
            });
        bad = any(bad);
        if (b.thread == 0) l.finite[t] = !bad;
    }

    FM_DEVICE float share(int64_t t, int64_t k) {  // of a task in a sum
        const double weight = l.task_weights ? l.task_weights[t] : l.uniform_weight;
        const float v = l.sums[t * plan().head().sums_floats + k];
        return l.finite[t] ? static_cast<float>(weight) * v : 0.f;
    }

    // Elements of the sum over the finite tasks, in batch order, of weight * source
    FM_DEVICE void sum(int chunk) {
        plan().reduction(chunk, [&](int, const FlatReduction& r) {
            float* target = reinterpret_cast<float*>(l.meta + r.target);
            const int first = (chunk - r.first_chunk) * plan().head().chunk;
            for (int k = first + b.thread; k < stop(first, r.count); k += b.threads) {
                double total = 0;
                for (int64_t t0 = 0; t0 < l.tasks; t0 += 8) {
                    float v[8];  // loaded together, added in order
                    for (int i = 0; i < 8; ++i) v[i] = t0 + i < l.tasks ? share(t0 + i, r.offset + k) : 0.f;
                    for (int i = 0; i < 8; ++i) total += v[i];
                }
                target[k] = static_cast<float>(total);
            }
        });
    }

    FM_DEVICE bool all_finite() {
        bool bad = false;
        for (int64_t t = b.thread; t < l.tasks; t += b.threads) bad = bad || !l.finite[t];
        return !any(bad);
    }

    FM_DEVICE void run() {
        const FlatPlan& p = plan().head();
        const int half = plan().half(), bit = 1 << half;
        stage<&Walk::pack>(kPack, half == 0 ? p.input_chunks : 0);
        stage<&Walk::template run_outside<kBefore>>(kPrologue, (p.prologue & bit) != 0);
        stage<&Walk::run_task>(kTasks, static_cast<int>(l.tasks));
        if (half == p.halves - 1) {
            stage<&Walk::sum>(kSum, p.sum_chunks);
            stage<&Walk::template run_outside<kBehind>>(kEpilogue, (p.epilogue & bit) != 0);
            if (!l.strict || all_finite()) stage<&Walk::deliver>(kDeliver, p.output_chunks);
        }
        b.sync();
        if (b.thread == 0 &&
            take(l.counters + 2 * kStages) == l.blocks - 1)  // the last block: ready for the next launch
            for (int i = 0; i < kCounters; ++i) l.counters[i] = 0;
    }
};

}  // namespace cuda
}  // namespace fastmaml
