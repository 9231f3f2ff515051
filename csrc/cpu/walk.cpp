#include "walk.h"

#include <cstring>

namespace fastmaml {

void begin_task(Worker& w, int64_t t) {
    const Run& r = *w.run;
    w.task = {t, r.support_rows[t + 1] - r.support_rows[t], r.query_rows[t + 1] - r.query_rows[t],
              r.ways ? r.ways[t] : 0};
    for (size_t i = 0; i < w.plan->task_buffers.size(); ++i) {
        const TaskBuffer& b = w.plan->task_buffers[i];
        const int64_t at = b.rows == Rows::kSupport ? r.support_rows[t] : b.rows == Rows::kQuery ? r.query_rows[t] : t;
        w.base[kFirstTaskBase + i] = r.task_buffers[i] + at * b.stride;
    }
}

Call prepare_call(const Instruction& in, const Worker& w, int64_t step, int64_t row0, int64_t n, int64_t total) {
    Call c;
    const Operand* operands = w.plan->operands.data() + in.operands;
    if (in.fixed) {  // most are, and where tasks take microseconds their addresses are a part of the time
        for (int i = 0; i < in.n_operands; ++i)
            c.operands[i] = w.base[operands[i].base] + (operands[i].offset + row0 * operands[i].advance);
    } else {
        for (int i = 0; i < in.n_operands; ++i) c.operands[i] = address(operands[i], w, step, row0);
    }
    c.row_stride = w.plan->strides.data() + in.operands;
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

void run_phase(const Phase& phase, const Worker& w) {
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

static bool one_call_each(const Phase& phase, const Worker& w) {
    if (phase.start + phase.stride != phase.stop) return false;
    for (const Group& group : phase.groups)
        if (group.rows != Rows::kNone && group.block_rows > 0 && group.block_rows < extent(group.rows, w.task))
            return false;
    return true;
}

Linked::Linked(const Worker& w, bool same_rows) {
    if (!same_rows) return;
    size_t calls = 0, operands = 0;
    for (const Phase& phase : w.plan->phases) {
        if (phase.scope != Scope::kTask || phase.half != w.run->half) continue;
        if (!one_call_each(phase, w)) return;
        for (const Group& group : phase.groups) {
            calls += group.instructions.size();
            for (const Instruction& in : group.instructions) operands += in.n_operands;
        }
    }
    links_.reserve(calls);
    moved_.reserve(operands);
    for (const Phase& phase : w.plan->phases) {
        if (phase.scope != Scope::kTask || phase.half != w.run->half) continue;
        for (const Group& group : phase.groups) {
            const int64_t n = group.rows == Rows::kNone ? 1 : extent(group.rows, w.task);
            for (const Instruction& in : group.instructions) {
                links_.push_back({prepare_call(in, w, phase.start, 0, n, n), w.tier->table[in.kernel], in.stages, 0});
                Link& link = links_.back();
                for (int i = 0; i < in.n_operands; ++i) {
                    const Operand& o = w.plan->operands[in.operands + i];
                    const int base = o.first_base != kNoBase && phase.start + o.shift == 0 ? o.first_base : o.base;
                    if (base < kFirstTaskBase) continue;
                    moved_.push_back({i, base, static_cast<char*>(link.call.operands[i]) - w.base[base]});
                    ++link.moved;
                }
            }
        }
    }
}

void Linked::run(const Worker& w) {
    const Moved* moved = moved_.data();
    for (Link& link : links_) {
        for (const Moved* end = moved + link.moved; moved < end; ++moved)
            link.call.operands[moved->operand] = w.base[moved->base] + moved->offset;
        for (link.call.stage = 0; link.call.stage < link.stages; ++link.call.stage) {
            link.kernel(link.call);
            if (w.parts > 1) w.barrier->wait();
        }
    }
}

bool all_finite(const float* p, int64_t n) {
    uint32_t bad = 0;
    for (int64_t i = 0; i < n; ++i) {
        uint32_t bits;
        std::memcpy(&bits, p + i, sizeof bits);
        bad |= (bits & 0x7f800000u) == 0x7f800000u;  // infinity or NaN
    }
    return !bad;
}

}  // namespace fastmaml
