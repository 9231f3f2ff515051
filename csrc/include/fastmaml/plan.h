// The Plan as plain data, as the cpu executor receives it: no Python, no torch, no knowledge of meta-learning.
//
// Real buffers are float arrays. A buffer with rows is [rows, stride] with the stride padded to kLane floats and zeros
// in the padding; a vector is padded the same way; a weight matrix that a linear layer reads is "packed" (see
// packed_offset). Masks are bytes.
#pragma once
#include <cstdint>
#include <vector>

#ifdef __CUDACC__
#define FASTMAML_ANYWHERE __host__ __device__ inline
#else
#define FASTMAML_ANYWHERE inline
#endif

namespace fastmaml {

constexpr int64_t kLane = 16;   // floats; every row stride is a multiple of it, on every instruction set
constexpr int64_t kPanel = 64;  // columns of a packed weight that lie together
constexpr int64_t kNarrow = 8;  // weights of so few outputs lie the other way round
constexpr int kMaxOperands = 16;
constexpr int kMaxSizes = 16;
constexpr int kMaxNumbers = 4;

FASTMAML_ANYWHERE int64_t pad_lane(int64_t n) { return (n + kLane - 1) / kLane * kLane; }

enum class Rows : int32_t { kNone, kSupport, kQuery, kJoint };

// Bases that addresses are relative to: none (an absent operand), the meta arena, the arena of the task in flight, then
// one per task buffer.
constexpr int32_t kNoBase = 0, kMetaBase = 1, kArenaBase = 2, kFirstTaskBase = 3;

// Where an operand of an instruction lies. Offsets and strides count bytes.
struct Operand {
    int32_t base = kNoBase;
    int32_t first_base = kNoBase;  // where slot 0 lies elsewhere (theta_0 is the leaf itself)
    int32_t shift = 0;             // slot on the step axis = step + shift
    int64_t offset = 0, step_stride = 0, row_stride = 0, first_offset = 0;
    int64_t advance = 0;  // from one row of a block to the next: row_stride, or 0 for what has no rows
};

struct Instruction {
    int32_t kernel = 0;  // index into the kernel table
    int32_t n_operands = 0;
    int32_t operands = 0;  // index of the first one in Plan::operands
    bool sums = false;     // in a batch phase: adds over the rows of all tasks, instead of working row by row
    bool fixed = true;     // operands that lie where they lie at every step
    int32_t stages = 1;    // calls that make it, see stages_of
    int64_t pixels = 1;    // each of them is a row to the kernel: what works row by row on vectors works on images
    int64_t sizes[kMaxSizes] = {};
    float numbers[kMaxNumbers] = {};
};

struct Group {
    Rows rows = Rows::kNone;
    int64_t block_rows = 0;  // rows that run through the whole group before the next ones begin
    std::vector<Instruction> instructions;
};

enum class Scope : int32_t { kTask, kMeta, kBatch };  // batch: the rows of all tasks at once

struct Phase {
    Scope scope = Scope::kTask;
    int32_t half = 0, start = 0, stop = 0, stride = 1;
    std::vector<Group> groups;
};

// One per task and kept: user data, results, what crosses from the forward to the reverse half.
struct TaskBuffer {
    Rows rows = Rows::kNone;  // addressed through the row offsets of the batch, else by task index
    int64_t stride = 0;       // bytes of one row, or of one task
};

// How a leaf or a gradient meets the caller's array. kPacked: a [rows, cols] matrix <-> packed transpose, or with taps
// a [rows, cols / taps, taps] convolution; kTurned: a [rows, cols] matrix -> itself, packed; kPlain: contiguous.
enum class Layout : int32_t { kPlain, kPacked, kTurned };

struct Port {
    int64_t offset = 0;  // in the meta arena, bytes
    Layout layout = Layout::kPlain;
    int64_t rows = 1, cols = 1;          // of one slot
    int64_t taps = 0;                    // of a convolution's kernel
    int64_t steps = 1, step_stride = 0;  // slots on the step axis
};

struct Reduction {
    Operand source;
    int64_t target = 0;  // meta arena, bytes
    int64_t count = 0;   // floats, over all slots, contiguous
    int64_t offset = 0;  // of this reduction in a chunk's accumulator, floats
};

struct Weighted {  // rows that a batch phase sums: scaled by the task's weight when the task is done
    Operand at;
    Rows rows = Rows::kNone;
    int64_t floats = 0;  // of one row
};

struct Scalars {  // slots [begin, end) of a scalar per task
    Operand at;
    int64_t begin = 0, end = 1;
};

struct Plan {
    std::vector<Operand> operands;  // of all instructions, in the order in which they run
    std::vector<int64_t> strides;   // of each operand, bytes from one row to the next as its kernel counts rows
    std::vector<Phase> phases;
    std::vector<TaskBuffer> task_buffers;
    std::vector<Port> inputs, outputs;
    std::vector<Reduction> reductions;
    std::vector<Weighted> weighted;
    std::vector<Scalars> checked;  // must be finite: the losses of every step
    int64_t meta_bytes = 0, run_bytes = 0, scratch_bytes = 0, shared_bytes = 0, accumulator_floats = 0;
    int32_t halves = 1;
};

// A packed [out, in] weight: panels of kPanel outputs, each [in][width]; width = what is left, padded to kLane. With at
// most kNarrow outputs: [out][in padded to kLane]. A convolution's [out, channels, taps] is packed as [out, in] with
// in = taps * channels, the channels of a tap together, and is never narrow.
FASTMAML_ANYWHERE bool is_narrow(int64_t out, int64_t taps = 0) { return taps == 0 && out <= kNarrow; }
FASTMAML_ANYWHERE int64_t packed_floats(int64_t in, int64_t out, int64_t taps = 0) {
    return is_narrow(out, taps) ? out * pad_lane(in) : in * pad_lane(out);
}
FASTMAML_ANYWHERE int64_t packed_width(int64_t panel, int64_t out) {
    int64_t left = pad_lane(out) - panel * kPanel;
    return left < kPanel ? left : kPanel;
}
// Of the first input's element of output o.
FASTMAML_ANYWHERE int64_t packed_offset(int64_t o, int64_t in, int64_t out, int64_t taps = 0) {
    return is_narrow(out, taps) ? o * pad_lane(in) : o / kPanel * kPanel * in + o % kPanel;
}
// From one input's element to the next.
FASTMAML_ANYWHERE int64_t packed_stride(int64_t o, int64_t out, int64_t taps = 0) {
    return is_narrow(out, taps) ? 1 : packed_width(o / kPanel, out);
}
// Which input stands at row k of a packed weight: of a convolution's plain [channels, taps] the packed one is the
// transpose.
FASTMAML_ANYWHERE int64_t packed_input(int64_t k, int64_t in, int64_t taps) {
    return taps == 0 ? k : k % (in / taps) * taps + k / (in / taps);
}

}  // namespace fastmaml
