// Walks a Plan: one native call runs one half of a meta-iteration for all tasks.
#pragma once
#include "dispatch.h"

namespace fastmaml {

// The per-call part: where everything lies. Offsets of rows are in rows, one more than tasks.
struct Run {
    int64_t tasks = 0;
    int half = 0, threads = 1;
    bool careful = false;  // check every summed array of every task before it joins the sum
    bool exclude = false;  // leave out the tasks that `finite` already names
    const int64_t* support_rows = nullptr;
    const int64_t* query_rows = nullptr;
    const int64_t* ways = nullptr;         // or null
    const double* task_weights = nullptr;  // or null: uniform_weight
    double uniform_weight = 1.0;
    std::vector<char*> task_buffers;   // by TaskBuffer index; null where the half does not use it
    std::vector<const float*> inputs;  // by Plan::inputs, contiguous in the model's layout
    std::vector<float*> outputs;       // by Plan::outputs; null: not wanted
    bool add_to_outputs = false;       // += instead of =
    bool strict = false;               // leave the outputs alone if any task is not finite
    char* meta = nullptr;              // meta_bytes
    char* work = nullptr;              // workers * run_bytes, then the accumulators of the chunks
    bool* finite = nullptr;            // [tasks], written
};

// How many tasks run at once and how many threads share one of them.
struct Shape {
    int workers, team;
    int64_t chunks;
};
Shape shape_of(const Plan& plan, int64_t tasks, int threads);
int64_t work_bytes(const Plan& plan, int64_t tasks, int threads);

// True if the outputs are written. False: something summed is not finite, so run again with `careful`; careful and
// false: `finite` now names tasks that only a sum over all tasks shows, so run again with `exclude` too.
bool execute(const Plan& plan, const Run& run, const Tier& tier);

}  // namespace fastmaml
