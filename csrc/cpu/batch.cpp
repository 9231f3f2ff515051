#include "half.h"

namespace fastmaml {

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

void run_batch(Shared& s, const Phase& phase, int me, int n) {
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

}  // namespace fastmaml
