// The walk of one member of a team through the instructions of one task.
#pragma once
#include "executor.h"
#include "team.h"

namespace fastmaml {

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

inline int64_t extent(Rows rows, const Task& t) {
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

inline void* address(const Operand& o, const Worker& w, int64_t step, int64_t row0) {
    const int64_t slot = step + o.shift;
    if (o.first_base != kNoBase && slot == 0) return w.base[o.first_base] + o.first_offset;
    return w.base[o.base] + (o.offset + slot * o.step_stride + row0 * o.advance);
}

void begin_task(Worker& w, int64_t t);

// Of `n` rows from `row0` on, of `total`.
Call prepare_call(const Instruction& in, const Worker& w, int64_t step, int64_t row0, int64_t n, int64_t total);

void run_phase(const Phase& phase, const Worker& w);

// The phases of a half whose tasks all have as many rows, as the calls that they come to: from one task to the next
// only the addresses of its own arrays change. Where tasks take microseconds, finding the others again for each is a
// part of the time.
class Linked {
public:
    // Nothing is linked unless every instruction is one call: there are no steps, and no blocks of rows.
    Linked(const Worker& w, bool same_rows);
    explicit operator bool() const { return !links_.empty(); }
    void run(const Worker& w);  // the task that has begun

private:
    struct Link {
        Call call;
        Kernel kernel;
        int stages, moved;  // how many of moved_ are its own
    };
    struct Moved {
        int operand, base;
        int64_t offset;
    };
    std::vector<Link> links_;
    std::vector<Moved> moved_;
};

bool all_finite(const float* p, int64_t n);

}  // namespace fastmaml
