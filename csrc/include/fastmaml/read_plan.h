// The Plan out of the flat list of numbers that executors/cpu/lowering.py writes. A list that is not one throws
// std::runtime_error.
#pragma once
#include <stdexcept>
#include <string>

#include "fastmaml/kernels.h"

namespace fastmaml {

class Reader {  // a list of integers, read in order
public:
    explicit Reader(const std::vector<int64_t>& words) : words_(words) {}
    int64_t next() {
        if (at_ >= words_.size()) throw std::runtime_error("fastmaml: a Plan ended too early");
        return words_[at_++];
    }
    int count(int most = 1 << 20) {
        const int64_t n = next();
        if (n < 0 || n > most) throw std::runtime_error("fastmaml: a Plan has a count of " + std::to_string(n));
        return static_cast<int>(n);
    }
    bool done() const { return at_ == words_.size(); }

private:
    const std::vector<int64_t>& words_;
    size_t at_ = 0;
};

inline int32_t read_base(Reader& in) {  // home (0 meta, 1 task, 2 run, 3 nowhere), task buffer
    const int64_t home = in.next(), task_buffer = in.next();
    const int32_t others[4] = {kMetaBase, kFirstTaskBase + static_cast<int32_t>(task_buffer), kArenaBase, kNoBase};
    if (home < 0 || home > 3) throw std::runtime_error("fastmaml: a Plan has a home of " + std::to_string(home));
    return others[home];
}

inline Operand read_operand(Reader& in) {
    Operand o;
    if (!in.next()) return o;
    o.base = read_base(in);
    const bool by_row = in.next() != 0;
    o.shift = in.next();
    o.offset = in.next();
    o.step_stride = in.next();
    o.row_stride = in.next();
    o.advance = by_row ? o.row_stride : 0;
    if (in.next()) {
        o.first_base = read_base(in);
        o.first_offset = in.next();
    }
    return o;
}

inline Instruction read_instruction(Reader& in, Plan& plan) {
    Instruction i;
    i.kernel = in.next();
    if (i.kernel < 0 || i.kernel >= kKernelCount) throw std::runtime_error("fastmaml: unknown kernel id");
    i.stages = stages_of(i.kernel);
    if (i.stages > 1) plan.shared_bytes = kSharedBytes;
    i.sums = in.next() != 0;
    i.pixels = in.next();
    i.n_operands = in.count(kMaxOperands);
    i.operands = static_cast<int32_t>(plan.operands.size());
    for (int n = 0; n < i.n_operands; ++n) {
        const Operand o = read_operand(in);
        i.fixed = i.fixed && o.first_base == kNoBase && o.step_stride == 0;
        plan.operands.push_back(o);
        plan.strides.push_back(o.row_stride / i.pixels);
    }
    const int sizes = in.count(kMaxSizes);
    for (int n = 0; n < sizes; ++n) i.sizes[n] = in.next();
    const int numbers = in.count(kMaxNumbers);
    for (int n = 0; n < numbers; ++n) {  // the bits of a float
        const int32_t bits = static_cast<int32_t>(in.next());
        static_assert(sizeof(float) == sizeof(bits), "float32");
        __builtin_memcpy(&i.numbers[n], &bits, sizeof bits);
    }
    return i;
}

inline Plan read_plan(const std::vector<int64_t>& words) {
    Reader in(words);
    Plan plan;
    plan.meta_bytes = in.next();
    plan.run_bytes = in.next();
    plan.scratch_bytes = in.next() ? kScratchBytes : 0;
    plan.accumulator_floats = in.next();
    plan.halves = in.next();
    for (int n = in.count(); n > 0; --n) {
        TaskBuffer b;
        b.rows = static_cast<Rows>(in.next());
        b.stride = in.next();
        plan.task_buffers.push_back(b);
    }
    for (auto* ports : {&plan.inputs, &plan.outputs})
        for (int n = in.count(); n > 0; --n) {
            Port p;
            p.offset = in.next();
            p.layout = static_cast<Layout>(in.next());
            p.rows = in.next();
            p.cols = in.next();
            p.taps = in.next();
            p.steps = in.next();
            p.step_stride = in.next();
            ports->push_back(p);
        }
    for (int n = in.count(); n > 0; --n) {
        Reduction r;
        r.source = read_operand(in);
        r.target = in.next();
        r.count = in.next();
        r.offset = in.next();
        plan.reductions.push_back(r);
    }
    for (int n = in.count(); n > 0; --n) {
        Weighted w;
        w.at = read_operand(in);
        w.rows = static_cast<Rows>(in.next());
        w.floats = in.next();
        plan.weighted.push_back(w);
    }
    for (int n = in.count(); n > 0; --n) {
        Scalars s;
        s.at = read_operand(in);
        s.begin = in.next();
        s.end = in.next();
        plan.checked.push_back(s);
    }
    for (int n = in.count(); n > 0; --n) {
        Phase phase;
        phase.scope = static_cast<Scope>(in.next());
        phase.half = in.next();
        phase.start = in.next();
        phase.stop = in.next();
        phase.stride = in.next();
        for (int g = in.count(); g > 0; --g) {
            Group group;
            group.rows = static_cast<Rows>(in.next());
            group.block_rows = in.next();
            for (int i = in.count(); i > 0; --i) {
                group.instructions.push_back(read_instruction(in, plan));
                if (group.instructions.back().stages > 1 && phase.scope != Scope::kTask)
                    throw std::runtime_error("fastmaml: a kernel in stages needs the team of a task");
            }
            phase.groups.push_back(std::move(group));
        }
        plan.phases.push_back(std::move(phase));
    }
    if (!in.done()) throw std::runtime_error("fastmaml: a Plan has words left over");
    return plan;
}

}  // namespace fastmaml
