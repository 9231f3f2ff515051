// The Plan as one piece of memory without pointers, for a device to read: the same instructions and operands as
// fastmaml::Plan, phases and groups as ranges of them, and where the arena of a task in flight lies.
#pragma once
#include "fastmaml/kernels.h"

namespace fastmaml {
namespace cuda {

constexpr int kMaxTaskBuffers = 120;
constexpr int kPartials = 256;     // of a sum over a whole array
constexpr int kMaxPointers = 480;  // of a launch, all in its parameters: 4 KB
constexpr int kPieces = 128;  // of what is packed, summed or delivered: about as many as a GPU has multiprocessors,
constexpr int kMostFloats = 2048;      // of at most so many floats: a piece costs two round trips to the counters
constexpr int64_t kWarmBytes = 24576;  // of L1: what shared memory always leaves

struct Range {  // of entries of the next table
    int32_t begin, end;
};

struct FlatPhase {
    Scope scope;
    int32_t half, start, stop, stride;
    int32_t after;  // behind the first phase of the tasks
    Range groups;
};

struct FlatGroup {
    Rows rows;
    Range instructions;
};

struct FlatPort {
    Port port;
    int32_t first_chunk, chunks_of_slot;
};

struct FlatReduction {
    Operand source;
    int64_t target;         // meta arena, bytes
    int32_t count, offset;  // floats; of a task's row of sums
    int32_t first_chunk;
    int32_t copied;  // 0: the source is that place itself
};

struct FlatPlan {  // the head; tables lie behind it, at these bytes
    int32_t phases, n_phases, groups, instructions, operands, task_buffers, n_task_buffers;
    int32_t inputs, n_inputs, input_chunks, outputs, n_outputs, output_chunks;
    int32_t reductions, n_reductions, sum_chunks, checked, n_checked;
    int32_t halves, prologue, epilogue;  // whether there are phases outside the tasks: bit h for half h
    int32_t threads, ranks;  // of a block; blocks of a cluster, which then runs a task as one block does, or 1
    int32_t chunk;           // floats that a block packs, sums or delivers at once
    int32_t warm_bytes;      // of the inputs in meta: asked for when a task begins
    int64_t meta_bytes, sums_floats;
    int64_t arena_bytes, shared_arena_bytes;  // of a task in flight: in global, in shared memory
};

// Bases of operands behind those of plan.h's task buffers
FASTMAML_ANYWHERE int32_t shared_base(int32_t task_buffers) { return kFirstTaskBase + task_buffers; }
FASTMAML_ANYWHERE int32_t sums_base(int32_t task_buffers) { return kFirstTaskBase + task_buffers + 1; }

enum Part { kBefore, kOfTask, kBehind };  // phases before the tasks, of each of them, behind them
FASTMAML_ANYWHERE bool runs(const FlatPhase& phase, Part part, int half, int halves) {
    if (phase.half != half) return false;
    if (phase.scope == Scope::kMeta) return part == (phase.after ? kBehind : kBefore);
    return part == kOfTask && (!phase.after || half == halves - 1);
}

// What a call of the kernel is given.
struct Launch {
    const char* plan;
    int64_t tasks;
    int32_t half, blocks, add_to_outputs, strict;     // blocks: or clusters
    const int64_t *support_rows, *query_rows, *ways;  // ways may be null
    const double* task_weights;                       // or null: uniform_weight
    double uniform_weight;
    char *meta, *arenas;           // arenas: arena_bytes for each block or cluster
    float* sums;                   // [tasks, sums_floats]
    int* counters;                 // kCounters; zero, and left as zeros
    uint8_t* finite;               // [tasks]
    void* pointers[kMaxPointers];  // task buffers, inputs, outputs
};
static_assert(sizeof(Launch) <= 4096, "kernel parameters");

enum Stage { kPack, kPrologue, kTasks, kSum, kEpilogue, kDeliver, kStages };
constexpr int kCounters = 2 * kStages + 1;

struct Place {  // of an operand
    char* at;
    int64_t row_stride;  // bytes
};

// The part of shared memory that every block has, in front of its warps' Places and of the arena. A cluster has it,
// with the Places, behind its arena in global memory.
struct Fixed {
    double partials[kPartials];
    Task task;
    char* bases[kFirstTaskBase + kMaxTaskBuffers + 2];
    int ticket, vote;
};

FASTMAML_ANYWHERE int64_t fixed_bytes(int threads) {  // the arena begins behind them, aligned
    return static_cast<int64_t>(sizeof(Fixed) + threads / 32 * kMaxOperands * sizeof(Place) + 63) / 64 * 64;
}

// Throws std::runtime_error naming the limit. scratch_at: where scratch begins in the run's memory; threads 0: chosen
// by the Plan. Of the run's memory as much lies in shared memory as fits: all, its scratch, its state, nothing; of a
// cluster's nothing.
std::vector<char> flatten(const Plan& plan, int64_t scratch_at, int64_t shared_limit, int threads, int ranks);

}  // namespace cuda
}  // namespace fastmaml
