#include "executor.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace fastmaml {

// ---------------------------------------------------------------------------------------------------- threads
// GNU OpenMP hangs in a forked child once a parallel region has run in the parent: a child runs serially.
static std::atomic<bool> forked{false};
static const int registered = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

class Barrier {  // for the threads that OpenMP really gave; spins, then yields where there are more threads than cores
public:
    explicit Barrier(int count) : count_(count) {}
    void wait() {
        if (count_ == 1) return;
        const int turn = turn_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
            arrived_.store(0, std::memory_order_relaxed);
            turn_.store(turn + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; turn_.load(std::memory_order_acquire) == turn; ++spins) {
            if (spins > 2048) sched_yield();
#ifdef FASTMAML_X86
            __builtin_ia32_pause();
#endif
        }
    }

private:
    const int count_;
    std::atomic<int> arrived_{0}, turn_{0};
};

// Chunks of tasks that are summed on their own: fixed by the Plan and the number of tasks, never by threads. Where
// tasks take microseconds, bringing the sums together is a part of the time.
static int64_t chunks_of(const Plan& plan, int64_t tasks) {
    const int64_t most = plan.run_bytes <= 128 * 1024 ? 8 : 16;
    return tasks < 1 ? 1 : tasks < most ? tasks : most;
}

Shape shape_of(const Plan& plan, int64_t tasks, int threads) {
    if (threads < 1) threads = 1;
    const int team = tasks > 0 && tasks < threads ? static_cast<int>(threads / tasks) : 1;
    const int64_t chunks = chunks_of(plan, tasks), workers = threads / team < chunks ? threads / team : chunks;
    return {static_cast<int>(workers), team, chunks};
}

static int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

static int64_t team_bytes(const Plan& plan, int members) {
    return aligned(plan.run_bytes) + aligned(plan.shared_bytes) + members * aligned(plan.scratch_bytes);
}

int64_t work_bytes(const Plan& plan, int64_t tasks, int threads) {
    const Shape s = shape_of(plan, tasks, threads);
    return s.workers * team_bytes(plan, s.team) + s.chunks * aligned(plan.accumulator_floats * 4);
}

// ---------------------------------------------------------------------------------------------------- addresses
struct Worker {  // what one member of a team knows while it runs one task
    const Plan* plan;
    const Run* run;
    const Tier* tier;
    Task task;
    Barrier* barrier;
    int part, parts;
    std::vector<char*> base;  // by Operand::base
    float *scratch = nullptr, *shared = nullptr;
};

static int64_t extent(Rows rows, const Task& t) {
    switch (rows) {
        case Rows::kSupport:
            return t.n_support;
        case Rows::kQuery:
            return t.n_query;
        case Rows::kJoint:
            return t.n_support + t.n_query;
        default:
            return 0;
    }
}

static void begin_task(Worker& w, int64_t t) {
    const Run& r = *w.run;
    w.task = {t, r.support_rows[t + 1] - r.support_rows[t], r.query_rows[t + 1] - r.query_rows[t],
              r.ways ? r.ways[t] : 0};
    for (size_t i = 0; i < w.plan->task_buffers.size(); ++i) {
        const TaskBuffer& b = w.plan->task_buffers[i];
        const int64_t at = b.rows == Rows::kSupport ? r.support_rows[t] : b.rows == Rows::kQuery ? r.query_rows[t] : t;
        w.base[kFirstTaskBase + i] = r.task_buffers[i] + at * b.stride;
    }
}

static inline void* address(const Operand& o, const Worker& w, int64_t step, int64_t row0) {
    const int64_t slot = step + o.shift;
    if (o.first_base != kNoBase && slot == 0) return w.base[o.first_base] + o.first_offset;
    return w.base[o.base] + (o.offset + slot * o.step_stride + row0 * o.advance);
}

// ---------------------------------------------------------------------------------------------------- walking
static Call prepare_call(const Instruction& in, const Worker& w, int64_t step, int64_t row0, int64_t n, int64_t total) {
    Call c;
    const Operand* operands = w.plan->operands.data() + in.operands;
    for (int i = 0; i < in.n_operands; ++i) {
        c.operands[i] = address(operands[i], w, step, row0);
        c.row_stride[i] = in.pixels == 1 ? operands[i].row_stride : operands[i].row_stride / in.pixels;
    }
    c.n = n * in.pixels;
    c.row0 = row0 * in.pixels;
    c.n_total = total * in.pixels;
    c.first = row0 == 0;
    c.last = row0 + n >= total;
    c.part = w.part;
    c.parts = w.parts;
    c.stage = 0;
    c.scratch = w.scratch;
    c.shared = w.shared;
    c.sizes = in.sizes;
    c.numbers = in.numbers;
    c.task = &w.task;
    return c;
}

static inline void run_instruction(const Instruction& in, const Worker& w, int64_t step, int64_t row0, int64_t n,
                                   int64_t total) {
    Call c = prepare_call(in, w, step, row0, n, total);
    for (; c.stage < in.stages; ++c.stage) {
        w.tier->table[in.kernel](c);
        if (w.parts > 1) w.barrier->wait();
    }
}

static void run_phase(const Phase& phase, const Worker& w) {
    for (int step = phase.start; phase.stride > 0 ? step < phase.stop : step > phase.stop; step += phase.stride)
        for (const Group& group : phase.groups) {
            const int64_t total = group.rows == Rows::kNone ? 1 : extent(group.rows, w.task);
            const int64_t block = group.rows == Rows::kNone || group.block_rows <= 0 ? total : group.block_rows;
            for (int64_t row0 = 0; row0 < total; row0 += block) {
                const int64_t n = total - row0 < block ? total - row0 : block;
                for (const Instruction& in : group.instructions) run_instruction(in, w, step, row0, n, total);
            }
        }
}

static bool all_finite(const float* p, int64_t n) {
    uint32_t bad = 0;
    for (int64_t i = 0; i < n; ++i) {
        uint32_t bits;
        std::memcpy(&bits, p + i, sizeof bits);
        bad |= (bits & 0x7f800000u) == 0x7f800000u;  // infinity or NaN
    }
    return !bad;
}

static bool losses_finite(const Worker& w) {
    if (w.run->half != 0) return w.run->finite[w.task.index];  // the forward half has said
    for (const Scalars& scalars : w.plan->checked)
        for (int64_t k = scalars.begin; k < scalars.end; ++k)
            if (!std::isfinite(*static_cast<float*>(address(scalars.at, w, k, 0)))) return false;
    return true;
}

// out = base + f x (base null: f x), with the tier's own kernels
static void add_scaled(const Tier& tier, const float* base, const float* x, float f, float* out, int64_t n) {
    Call c{};
    const int64_t sizes[2] = {n, 0};
    c.parts = 1;
    c.sizes = sizes;
    c.numbers = &f;
    c.operands[0] = const_cast<float*>(base ? base : x);
    c.operands[1] = base ? const_cast<float*>(x) : nullptr;
    c.operands[base ? 3 : 2] = out;
    tier.table[base ? kId_axpy_fwd : kId_scale_fwd](c);
}

// acc = sum over the chunk's finite tasks, in batch order, of weight * source
static void accumulate(const Worker& w, float* acc, bool& begun) {
    const Plan& plan = *w.plan;
    const double weight = w.run->task_weights ? w.run->task_weights[w.task.index] : w.run->uniform_weight;
    const float f = static_cast<float>(weight);
    bool finite = (!w.run->exclude || w.run->finite[w.task.index]) && losses_finite(w);
    if (finite && w.run->careful)
        for (const Reduction& r : plan.reductions)
            finite = finite && all_finite(static_cast<float*>(address(r.source, w, 0, 0)), r.count);
    if (finite && w.run->careful)
        for (const Weighted& rows : plan.weighted)
            finite = finite && all_finite(static_cast<float*>(address(rows.at, w, 0, 0)),
                                          extent(rows.rows, w.task) * rows.floats);
    w.run->finite[w.task.index] = finite;
    if (!finite) return;
    for (const Weighted& rows : plan.weighted) {
        float* at = static_cast<float*>(address(rows.at, w, 0, 0));
        if (f != 1.f) add_scaled(*w.tier, nullptr, at, f, at, extent(rows.rows, w.task) * rows.floats);
    }
    for (const Reduction& r : plan.reductions) {
        const float* source = static_cast<float*>(address(r.source, w, 0, 0));
        float* out = acc + r.offset;
        add_scaled(*w.tier, begun ? out : nullptr, source, f, out, r.count);
    }
    begun = true;
}

static void pack(const Port& port, const float* from, const Run& run, const Tier& tier, int part, int parts) {
    for (int64_t k = 0; k < port.steps; ++k) {
        float* to = reinterpret_cast<float*>(run.meta + port.offset + k * port.step_stride);
        const float* src = from + k * port.rows * port.cols;
        if (port.layout == Layout::kPacked) {
            Call c{};
            const int64_t sizes[3] = {port.cols, port.rows, port.taps};
            c.operands[0] = const_cast<float*>(src);
            c.operands[1] = to;
            c.sizes = sizes;
            c.part = part;
            c.parts = parts;
            tier.table[kId_pack_fwd](c);
        } else if (part == 0) {
            const int64_t n = port.rows * port.cols;
            std::memcpy(to, src, n * sizeof(float));
            std::memset(to + n, 0, (pad_lane(n) - n) * sizeof(float));
        }
    }
}

// A share of the rows of a leaf's gradient, out of the packed or plain form, in pieces of 16 x 16 that stay in L1.
static void unpack(const Port& port, float* to, bool add, const Run& run, int part, int parts) {
    const int64_t begin = port.rows * part / parts, end = port.rows * (part + 1) / parts;
    for (int64_t k = 0; k < port.steps; ++k) {
        const float* from = reinterpret_cast<float*>(run.meta + port.offset + k * port.step_stride);
        float* dst = to + k * port.rows * port.cols;
        for (int64_t r0 = begin; r0 < end; r0 += kLane)
            for (int64_t c0 = 0; c0 < port.cols; c0 += kLane)
                for (int64_t r = r0; r < end && r < r0 + kLane; ++r) {
                    const bool packed = port.layout == Layout::kPacked;
                    const float* row =
                        from + (packed ? packed_offset(r, port.cols, port.rows, port.taps) : r * port.cols);
                    const int64_t stride = packed ? packed_stride(r, port.rows, port.taps) : 1;
                    const int64_t stop = port.cols < c0 + kLane ? port.cols : c0 + kLane;
                    float* out = dst + r * port.cols;
                    for (int64_t c = c0; c < stop; ++c) {
                        float& to_c = out[packed_input(c, port.cols, port.taps)];
                        to_c = add ? to_c + row[c * stride] : row[c * stride];
                    }
                }
    }
}

struct alignas(64) Counter {  // threads that count different things do not share a line
    std::atomic<int64_t> value{0};
};

// One meta-iteration half, as seen by thread `me` of `n`. Everything that crosses threads lies behind a barrier, or
// behind a counter of the chunks that are done.
struct Shared {
    const Plan& plan;
    const Run& run;
    const Tier& tier;
    Shape shape{};
    std::vector<std::unique_ptr<Barrier>> teams{};
    std::unique_ptr<Barrier> all{};
    std::vector<Counter> counters{};  // what the next three point into
    Counter* taken = nullptr;         // chunks of each team's share
    Counter* current = nullptr;       // the chunk that each team works on
    Counter* arrived = nullptr;       // by right half: halves of a sum that are complete
    std::atomic<bool> finite{true};
    std::atomic<bool> ready{false};   // a small Plan: packed, the others may begin
    bool small = false;               // see is_small
    std::atomic<bool> summed{false};  // a small Plan: all chunks, into the first
    std::atomic<bool> bad{false};
    std::atomic<bool> again{false};  // a batch phase found tasks whose own share of a sum is not finite
};

// Which tasks' own share of a sum over all tasks is not finite: each is made alone, in the place of the sum.
static void find_bad_tasks(Shared& s, const Instruction& in, const Worker& w, const int64_t* offsets, int me, int n) {
    const int64_t floats = packed_floats(in.sizes[0], in.sizes[1]), begin = floats * me / n,
                  end = floats * (me + 1) / n;
    for (int64_t t = 0; t < s.run.tasks; ++t) {
        if (!s.run.finite[t]) continue;  // the same for all threads: changed behind a barrier alone
        Call c = prepare_call(in, w, 0, offsets[t], offsets[t + 1] - offsets[t], offsets[s.run.tasks]);
        c.first = c.last = true;
        s.tier.table[in.kernel](c);
        s.all->wait();
        if (c.f(2) && !all_finite(c.f(2) + begin, end - begin)) s.bad.store(true);
        s.all->wait();
        if (me == 0 && s.bad.exchange(false)) {
            s.run.finite[t] = false;
            s.again.store(true);
        }
        s.all->wait();
    }
}

// Rows of all tasks that a kernel of a batch phase takes at once. It walks them for each of its tiles, so they stay in
// a cache of the second level.
static int64_t rows_in_cache(const Instruction& in, const Plan& plan) {
    constexpr int64_t kBytes = 1 << 20;
    int64_t row = 1;
    for (int i = 0; i < in.n_operands; ++i) row += plan.operands[in.operands + i].advance;
    return row < kBytes / 64 ? kBytes / row : 64;
}

// A batch phase: row kernels take a share of the rows of all tasks; sums take a share of their output, over the rows of
// all finite tasks.
static void run_batch(Shared& s, const Phase& phase, int me, int n) {
    Barrier alone(1);
    Worker w{&s.plan, &s.run, &s.tier, Task{}, &alone, 0, 1, {nullptr, s.run.meta, nullptr}};
    w.base.resize(kFirstTaskBase + s.plan.task_buffers.size());
    begin_task(w, 0);
    for (const Group& group : phase.groups) {
        const int64_t* offsets = group.rows == Rows::kSupport ? s.run.support_rows : s.run.query_rows;
        const int64_t total = offsets[s.run.tasks];
        for (const Instruction& in : group.instructions) {
            const int64_t most = rows_in_cache(in, s.plan);
            if (in.sums) {
                w.part = me, w.parts = n;
                if (s.run.careful && !s.run.exclude) find_bad_tasks(s, in, w, offsets, me, n);
                bool first = true;
                for (int64_t t = 0; t <= s.run.tasks; ++t) {
                    const int64_t begin = t;
                    while (t < s.run.tasks && s.run.finite[t]) ++t;
                    if (t == begin && !(first && t == s.run.tasks))
                        continue;  // a task left out; with none at all the sum is zero
                    int64_t row = offsets[begin];
                    do {
                        const int64_t left = offsets[t] - row;
                        Call c = prepare_call(in, w, 0, row, left < most ? left : most, total);
                        c.first = first, c.last = true;
                        s.tier.table[in.kernel](c);
                        first = false;
                        row += most;
                    } while (row < offsets[t]);
                }
                w.part = 0, w.parts = 1;
            } else {
                const int64_t begin = total * me / n, end = total * (me + 1) / n;
                for (int64_t row = begin; row < end; row += most)
                    s.tier.table[in.kernel](prepare_call(in, w, 0, row, end - row < most ? end - row : most, total));
            }
            s.all->wait();
            if (in.sums) {
                const float* out = prepare_call(in, w, 0, 0, 0, 0).f(2);
                const int64_t floats = packed_floats(in.sizes[0], in.sizes[1]), begin = floats * me / n;
                if (out && !all_finite(out + begin, floats * (me + 1) / n - begin)) s.finite.store(false);
            }
        }
    }
}

// The phases outside the tasks: before them, or after.
static void run_outside(Shared& s, bool after, int me, int n) {
    Barrier alone(1);
    Worker w{&s.plan, &s.run, &s.tier, Task{}, &alone, 0, 1, {nullptr, s.run.meta, nullptr}};
    bool tasks_seen = false;
    for (const Phase& phase : s.plan.phases) {
        if (phase.scope == Scope::kTask) tasks_seen = true;
        if (phase.scope == Scope::kTask || phase.half != s.run.half || tasks_seen != after) continue;
        if (phase.scope == Scope::kBatch)
            run_batch(s, phase, me, n);
        else if (me == 0)
            run_phase(phase, w);
        s.all->wait();
    }
}

static float* accumulator(const Shared& s, int64_t chunk) {
    char* at = s.run.work + s.shape.workers * team_bytes(s.plan, s.shape.team);
    return reinterpret_cast<float*>(at + chunk * aligned(s.plan.accumulator_floats * 4));
}

// The sums of chunks c.. and c + width.. become one, in the place of the first: `n` floats from `begin` on.
static void merge(const Shared& s, int64_t c, int64_t width, int64_t begin, int64_t n) {
    float* sum = accumulator(s, c) + begin;
    add_scaled(s.tier, sum, accumulator(s, c + width) + begin, 1.f, sum, n);
}

// Chunk c is done: what is complete with it is summed, in a tree that is always the same. True: that was all.
static bool join(Shared& s, int64_t c) {
    for (int64_t width = 1; width < s.shape.chunks; width *= 2) {
        c -= c % (2 * width);
        if (c + width >= s.shape.chunks) continue;  // no right half
        if (s.arrived[c + width].value.fetch_add(1, std::memory_order_acq_rel) == 0) return false;
        if (s.run.half == s.plan.halves - 1) merge(s, c, width, 0, s.plan.accumulator_floats);
    }
    return true;
}

// A team begins with its own share of the chunks, whose data and results lie together, and goes on with what others
// have left.
static int64_t next_chunk(Shared& s, int team) {
    const int64_t chunks = s.shape.chunks, teams = s.shape.workers;
    for (int64_t i = 0; i < teams; ++i) {
        const int64_t of = (team + i) % teams, begin = chunks * of / teams, end = chunks * (of + 1) / teams;
        const int64_t chunk = begin + s.taken[of].value.fetch_add(1);
        if (chunk < end) return chunk;
    }
    return chunks;
}

static void run_tasks(Shared& s, int team, int part) {
    Worker w{&s.plan, &s.run, &s.tier, Task{}, s.teams[team].get(), part, s.shape.team, {}};
    char* arena = s.run.work + team * team_bytes(s.plan, s.shape.team);
    w.base = {nullptr, s.run.meta, arena};
    arena += aligned(s.plan.run_bytes);
    w.shared = reinterpret_cast<float*>(arena);
    w.scratch = reinterpret_cast<float*>(arena + aligned(s.plan.shared_bytes) + part * aligned(s.plan.scratch_bytes));
    w.base.resize(kFirstTaskBase + s.plan.task_buffers.size());
    const bool sums = s.run.half == s.plan.halves - 1;
    for (;;) {
        if (part == 0) s.current[team].value.store(next_chunk(s, team), std::memory_order_relaxed);
        w.barrier->wait();
        const int64_t chunk = s.current[team].value.load(std::memory_order_relaxed);
        if (chunk >= s.shape.chunks) return;
        const int64_t begin = s.run.tasks * chunk / s.shape.chunks, end = s.run.tasks * (chunk + 1) / s.shape.chunks;
        bool begun = false;
        for (int64_t t = begin; t < end; ++t) {
            begin_task(w, t);
            for (const Phase& phase : s.plan.phases)
                if (phase.scope == Scope::kTask && phase.half == s.run.half) run_phase(phase, w);
            if (part == 0) {
                if (sums)
                    accumulate(w, accumulator(s, chunk), begun);
                else
                    s.run.finite[t] = losses_finite(w);
            }
            w.barrier->wait();
        }
        if (part == 0) {
            if (sums && !begun) std::memset(accumulator(s, chunk), 0, s.plan.accumulator_floats * sizeof(float));
            if (s.small && join(s, chunk)) s.summed.store(true, std::memory_order_release);
        }
        w.barrier->wait();
    }
}

// The sums over all tasks go to their places: a share of each, in pieces that stay in a cache while their chunks are
// merged as `join` does it.
static void reduce(Shared& s, int part, int parts) {
    constexpr int64_t kPiece = 2048;
    for (const Reduction& r : s.plan.reductions) {
        float* out = reinterpret_cast<float*>(s.run.meta + r.target);
        const int64_t lanes = r.count / kLane, end = lanes * (part + 1) / parts * kLane;
        for (int64_t i = lanes * part / parts * kLane; i < end; i += kPiece) {
            const int64_t n = end - i < kPiece ? end - i : kPiece;
            if (!s.small)
                for (int64_t width = 1; width < s.shape.chunks; width *= 2)
                    for (int64_t c = 0; c + width < s.shape.chunks; c += 2 * width) merge(s, c, width, r.offset + i, n);
            std::memcpy(out + i, accumulator(s, 0) + r.offset + i, n * sizeof(float));
            if (!all_finite(out + i, n)) s.finite.store(false);
        }
    }
}

// The outputs, unless the caller has to run again or must not have them.
static void deliver(Shared& s, int me, int n) {
    if (s.again.load() || (!s.finite.load() && !s.run.careful)) return;  // the caller runs it again
    if (s.run.strict)
        for (int64_t t = 0; t < s.run.tasks; ++t)
            if (!s.run.finite[t]) return;
    for (size_t i = 0; i < s.plan.outputs.size(); ++i)
        if (s.run.outputs[i]) unpack(s.plan.outputs[i], s.run.outputs[i], s.run.add_to_outputs, s.run, me, n);
}

static void pack_inputs(Shared& s, int me, int n) {
    if (s.run.half == 0)
        for (size_t i = 0; i < s.plan.inputs.size(); ++i) pack(s.plan.inputs[i], s.run.inputs[i], s.run, s.tier, me, n);
}

// Every thread does its share of everything, with barriers between.
static void run_thread(Shared& s, int me, int n) {
    pack_inputs(s, me, n);
    s.all->wait();
    run_outside(s, false, me, n);
    if (me / s.shape.team < s.shape.workers) run_tasks(s, me / s.shape.team, me % s.shape.team);
    s.all->wait();
    if (s.run.half != s.plan.halves - 1) return;
    reduce(s, me, n);
    s.all->wait();
    run_outside(s, true, me, n);
    deliver(s, me, n);
}

template <class F>
static void spin_until(F done) {
    for (int spins = 0; !done(); ++spins) {
        if (spins > 2048) sched_yield();
#ifdef FASTMAML_X86
        __builtin_ia32_pause();
#endif
    }
}

// A Plan whose weights are small: the first thread does all that is not a task, and waits for nobody to wake up; the
// others help with the tasks.
static bool is_small(const Plan& plan, const Shape& shape) {
    for (const Phase& phase : plan.phases)
        if (phase.scope == Scope::kBatch) return false;
    return shape.team == 1 && plan.meta_bytes <= 256 * 1024;
}

static void run_small(Shared& s, int me) {
    if (me == 0) {
        pack_inputs(s, 0, 1);
        run_outside(s, false, 0, 1);
        s.ready.store(true, std::memory_order_release);
    } else {
        spin_until([&] { return s.ready.load(std::memory_order_acquire); });
    }
    if (me < s.shape.workers) run_tasks(s, me, 0);
    if (me != 0) return;
    spin_until([&] { return s.summed.load(std::memory_order_acquire); });
    if (s.run.half != s.plan.halves - 1) return;
    reduce(s, 0, 1);
    run_outside(s, true, 0, 1);
    deliver(s, 0, 1);
}

static bool written(const Shared& s) { return !s.again.load() && (s.finite.load() || s.run.careful); }

bool execute(const Plan& plan, const Run& run, const Tier& tier) {
    (void)registered;
#ifdef _OPENMP
    const int threads = forked.load() || run.threads < 1 ? 1 : run.threads;
#else
    const int threads = 1;
#endif
    Shared s{plan, run, tier};
    auto prepare = [&](int given, int meet) {  // the workspace is laid out for run.threads; fewer may have come
        s.shape = shape_of(plan, run.tasks, given);
        s.all.reset(new Barrier(meet));
        for (int i = 0; i < s.shape.workers; ++i) s.teams.emplace_back(new Barrier(s.shape.team));
        s.counters = std::vector<Counter>(2 * s.shape.workers + s.shape.chunks);
        s.taken = s.counters.data(), s.current = s.taken + s.shape.workers, s.arrived = s.current + s.shape.workers;
    };
    if (threads == 1) {
        prepare(1, 1);
        run_thread(s, 0, 1);
        return written(s);
    }
#ifdef _OPENMP
    if (is_small(plan, shape_of(plan, run.tasks, threads))) {
        s.small = true;
        prepare(threads, 1);
#pragma omp parallel num_threads(threads)
        run_small(s, omp_get_thread_num());
        return written(s);
    }
#pragma omp parallel num_threads(threads)
    {
#pragma omp single
        prepare(omp_get_num_threads(), omp_get_num_threads());
        run_thread(s, omp_get_thread_num(), omp_get_num_threads());
    }
#endif
    return written(s);
}

}  // namespace fastmaml
