#include "executor.h"

#include <pthread.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "half.h"
#include "ports.h"
#ifdef _OPENMP
#include <omp.h>
#endif

namespace fastmaml {

// GNU OpenMP hangs in a forked child once a parallel region has run in the parent: a child runs serially.
static std::atomic<bool> forked{false};
static const int registered = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

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

// A Plan whose weights are small: every thread packs them for itself and waits for nobody to wake up; the first does
// all else that is not a task.
static bool is_small(const Plan& plan, const Shape& shape) {
    for (const Phase& phase : plan.phases)
        if (phase.scope == Scope::kBatch) return false;
    return shape.team == 1 && plan.meta_bytes <= 256 * 1024;
}

// The arena of a team: what its tasks hold, what its members share, scratch of each, and packed weights of its own.
static int64_t own_meta_at(const Plan& plan, int members) {
    return aligned(plan.run_bytes) + aligned(plan.shared_bytes) + members * aligned(plan.scratch_bytes);
}

static int64_t team_bytes(const Plan& plan, const Shape& shape) {
    return own_meta_at(plan, shape.team) + (is_small(plan, shape) ? aligned(plan.meta_bytes) : 0);
}

int64_t work_bytes(const Plan& plan, int64_t tasks, int threads) {
    const Shape s = shape_of(plan, tasks, threads);
    return s.workers * team_bytes(plan, s) + s.chunks * aligned(plan.accumulator_floats * 4);
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
    Call c;  // tasks of microseconds feel it being cleared
    const int64_t sizes[2] = {n, 0};
    c.part = 0, c.parts = 1;
    c.sizes = sizes;
    c.numbers = &f;
    c.operands[0] = const_cast<float*>(base ? base : x);
    c.operands[1] = base ? const_cast<float*>(x) : nullptr;
    c.operands[2] = base ? nullptr : out;
    c.operands[3] = out;
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
    if (!finite) {
        w.run->finite[w.task.index] = false;
        return;
    }
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

// The phases outside the tasks: before them, or after.
static void run_outside(Shared& s, char* meta, bool after, int me, int n) {
    Barrier alone(1);
    Worker w{&s.plan, &s.run, &s.tier, Task{}, &alone, 0, 1, {nullptr, meta, nullptr}};
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
    char* at = s.run.work + s.shape.workers * team_bytes(s.plan, s.shape);
    return reinterpret_cast<float*>(at + chunk * aligned(s.plan.accumulator_floats * 4));
}

// The sums of chunks c.. and c + width.. become one, in the place of the first: `n` floats from `begin` on.
static void merge(const Shared& s, int64_t c, int64_t width, int64_t begin, int64_t n) {
    float* sum = accumulator(s, c) + begin;
    add_scaled(s.tier, sum, accumulator(s, c + width) + begin, 1.f, sum, n);
}

// Chunk c is done: what is complete with it is summed, in a tree that is always the same. True: that was all, but the
// sum of the two halves of the tree (see `reduce`).
static bool join(Shared& s, int64_t c) {
    for (int64_t width = 1; width < s.shape.chunks; width *= 2) {
        c -= c % (2 * width);
        if (c + width >= s.shape.chunks) continue;  // no right half
        if (s.arrived[c + width].value.fetch_add(1, std::memory_order_acq_rel) == 0) return false;
        const bool top = 2 * width >= s.shape.chunks;
        if (s.run.half == s.plan.halves - 1 && !top) merge(s, c, width, 0, s.plan.accumulator_floats);
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

static bool same_rows(const Run& r) {
    for (int64_t t = 1; t < r.tasks; ++t)
        if (r.support_rows[t + 1] - r.support_rows[t] != r.support_rows[1] - r.support_rows[0] ||
            r.query_rows[t + 1] - r.query_rows[t] != r.query_rows[1] - r.query_rows[0])
            return false;
    return true;
}

static void run_tasks(Shared& s, char* meta, int team, int part) {
    Worker w{&s.plan, &s.run, &s.tier, Task{}, s.teams[team].get(), part, s.shape.team, {}};
    char* arena = s.run.work + team * team_bytes(s.plan, s.shape);
    w.base = {nullptr, meta, arena};
    arena += aligned(s.plan.run_bytes);
    w.shared = reinterpret_cast<float*>(arena);
    w.scratch = reinterpret_cast<float*>(arena + aligned(s.plan.shared_bytes) + part * aligned(s.plan.scratch_bytes));
    w.base.resize(kFirstTaskBase + s.plan.task_buffers.size());
    const bool sums = s.run.half == s.plan.halves - 1;
    begin_task(w, 0);
    Linked linked(w, same_rows(s.run));
    for (;;) {
        if (part == 0) s.current[team].value.store(next_chunk(s, team), std::memory_order_relaxed);
        w.barrier->wait();
        const int64_t chunk = s.current[team].value.load(std::memory_order_relaxed);
        if (chunk >= s.shape.chunks) return;
        const int64_t begin = s.run.tasks * chunk / s.shape.chunks, end = s.run.tasks * (chunk + 1) / s.shape.chunks;
        bool begun = false;
        for (int64_t t = begin; t < end; ++t) {
            begin_task(w, t);
            if (linked)
                linked.run(w);
            else
                for (const Phase& phase : s.plan.phases)
                    if (phase.scope == Scope::kTask && phase.half == s.run.half) run_phase(phase, w);
            if (part == 0) {
                if (sums)
                    accumulate(w, accumulator(s, chunk), begun);
                else if (!losses_finite(w))
                    s.run.finite[t] = false;
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
            for (int64_t width = 1; width < s.shape.chunks; width *= 2)
                if (!s.small || 2 * width >= s.shape.chunks)
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
        if (s.run.outputs[i])
            unpack(s.plan.outputs[i], s.run.outputs[i], s.run.add_to_outputs, s.run.meta, s.tier, me, n);
}

static void pack_inputs(Shared& s, char* meta, int me, int n) {
    if (s.run.half == 0)
        for (size_t i = 0; i < s.plan.inputs.size(); ++i) pack(s.plan.inputs[i], s.run.inputs[i], meta, s.tier, me, n);
}

// Every thread does its share of everything, with barriers between.
static void run_thread(Shared& s, int me, int n) {
    pack_inputs(s, s.run.meta, me, n);
    s.all->wait();
    run_outside(s, s.run.meta, false, me, n);
    if (me / s.shape.team < s.shape.workers) run_tasks(s, s.run.meta, me / s.shape.team, me % s.shape.team);
    s.all->wait();
    if (s.run.half != s.plan.halves - 1) return;
    reduce(s, me, n);
    s.all->wait();
    run_outside(s, s.run.meta, true, me, n);
    deliver(s, me, n);
}

// Where two threads may be far apart a line that goes from one to the other costs as much as an instruction of a task:
// so little goes. Only the weights of a reverse half come from the half before.
static void run_small(Shared& s, int me) {
    if (me >= s.shape.workers) return;
    const bool own = me > 0 && s.run.half == 0;
    char* meta = own ? s.run.work + me * team_bytes(s.plan, s.shape) + own_meta_at(s.plan, s.shape.team) : s.run.meta;
    if (own || me == 0) {
        pack_inputs(s, meta, 0, 1);
        run_outside(s, meta, false, 0, 1);
    }
    if (me == 0)
        s.ready.store(true, std::memory_order_release);
    else if (!own)
        spin_until([&] { return s.ready.load(std::memory_order_acquire); });
    run_tasks(s, meta, me, 0);
    if (me != 0) return;
    spin_until([&] { return s.summed.load(std::memory_order_acquire); });
    if (s.run.half != s.plan.halves - 1) return;
    reduce(s, 0, 1);
    run_outside(s, meta, true, 0, 1);
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
    if (run.half == 0 && !run.exclude) std::fill_n(run.finite, run.tasks, true);  // tasks only clear their own
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
