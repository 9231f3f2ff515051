#include "flat.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace fastmaml {
namespace cuda {
namespace {

template <class T>
int32_t append(std::vector<char>& to, const std::vector<T>& table) {
    to.resize((to.size() + 15) / 16 * 16);
    const size_t at = to.size();
    to.resize(at + table.size() * sizeof(T));
    if (!table.empty()) std::memcpy(to.data() + at, table.data(), table.size() * sizeof(T));
    return static_cast<int32_t>(at);
}

int32_t chunks(int64_t floats, int32_t chunk) { return static_cast<int32_t>((floats + chunk - 1) / chunk); }

int64_t stored_floats(const Port& p) {
    return p.layout == Layout::kPacked ? packed_floats(p.cols, p.rows) : pad_lane(p.rows * p.cols);
}

// A piece for every block, as long as each thread has a float of it.
int32_t choose_chunk(const std::vector<Port>& ports, int32_t threads) {
    int64_t floats = 0;
    for (const Port& p : ports) floats += p.steps * stored_floats(p);
    const int64_t share = std::min<int64_t>(kMostFloats, floats / kPieces);
    return static_cast<int32_t>(std::max<int64_t>(1, share / threads) * threads);
}

std::vector<FlatPort> flat_ports(const std::vector<Port>& ports, bool stored, int32_t chunk, int32_t& count) {
    std::vector<FlatPort> out;
    count = 0;
    for (const Port& p : ports) {
        out.push_back({p, count, chunks(stored ? stored_floats(p) : p.rows * p.cols, chunk)});
        count += static_cast<int32_t>(p.steps) * out.back().chunks_of_slot;
    }
    return out;
}

struct Split {  // of the run's memory: which of its two parts lie in shared memory, and where the second one begins
    bool state, scratch;
    int64_t scratch_at;
    void move(int32_t& base, int64_t& offset, int32_t shared) const {
        if (base != kArenaBase) return;
        const bool second = offset >= scratch_at;  // a state whose slot 0 lies elsewhere may begin before its memory
        if (second && state != scratch) offset -= scratch_at;  // it has its kind of memory to itself
        if (second ? scratch : state) base = shared;
    }
    void move(Operand& o, int32_t shared) const {
        move(o.base, o.offset, shared);
        move(o.first_base, o.first_offset, shared);
    }
};

Split choose(const Plan& plan, int64_t scratch_at, int64_t limit) {
    const int64_t scratch = plan.run_bytes - scratch_at;
    if (plan.run_bytes <= limit) return {true, true, scratch_at};
    if (scratch <= limit) return {false, true, scratch_at};
    return {scratch_at <= limit, false, scratch_at};
}

int choose_threads(const Plan& plan) {
    int64_t largest = 0;
    for (const Port& p : plan.inputs) largest = std::max(largest, p.rows * p.cols);
    return largest > 4096 ? 512 : 256;
}

// What a batch phase sums over the rows of all tasks, as a sum over tasks of each one's share: its outputs go to the
// task's own row of sums.
void redirect(const Instruction& in, std::vector<Operand>& operands, int32_t base, std::vector<FlatReduction>& sums,
              int64_t& floats) {
    for (int i = 2; i < 4; ++i) {
        Operand& o = operands[in.operands + i];
        if (o.base == kNoBase) continue;
        const int64_t count = i == 2 ? packed_floats(in.sizes[0], in.sizes[1]) : pad_lane(in.sizes[1]);
        const int64_t target = o.offset;
        o = Operand();
        o.base = base;
        o.offset = floats * 4;
        sums.push_back({o, target, static_cast<int32_t>(count), static_cast<int32_t>(floats), 0, 0});
        floats += count;
    }
}

void refuse(bool refused, const std::string& why) {
    if (refused) throw std::runtime_error("fastmaml._cuda: " + why);
}

}  // namespace

std::vector<char> flatten(const Plan& plan, int64_t scratch_at, int64_t shared_limit, int threads, int ranks) {
    FlatPlan head = {};
    const int32_t buffers = static_cast<int32_t>(plan.task_buffers.size());
    const size_t pointers = plan.task_buffers.size() + plan.inputs.size() + plan.outputs.size();
    refuse(buffers > kMaxTaskBuffers, "the Plan keeps " + std::to_string(buffers) + " arrays for every task, at most " +
                                          std::to_string(kMaxTaskBuffers) + " can be addressed");
    refuse(pointers > static_cast<size_t>(kMaxPointers), "the Plan has " + std::to_string(pointers) +
                                                             " inputs and outputs, a launch takes at most " +
                                                             std::to_string(kMaxPointers));
    head.threads = threads ? threads : choose_threads(plan);
    refuse(head.threads % 32 || head.threads > 512,
           std::to_string(head.threads) + " threads: must be a multiple of 32, at most 512");
    refuse(ranks != 1 && ranks != 2 && ranks != 4 && ranks != 8,
           "clusters of " + std::to_string(ranks) + " blocks: must be of 1, 2, 4 or 8");
    head.ranks = ranks;
    const Split split = ranks == 1 ? choose(plan, scratch_at, shared_limit - fixed_bytes(head.threads))
                                   : Split{false, false, scratch_at};
    head.shared_arena_bytes = (split.state ? scratch_at : 0) + (split.scratch ? plan.run_bytes - scratch_at : 0);
    head.arena_bytes = plan.run_bytes - head.shared_arena_bytes;
    if (ranks > 1) head.arena_bytes = (head.arena_bytes + 63) / 64 * 64 + fixed_bytes(ranks * head.threads);
    head.meta_bytes = plan.meta_bytes;
    head.halves = plan.halves;
    head.n_task_buffers = buffers;

    std::vector<Operand> operands = plan.operands;
    for (Operand& o : operands) split.move(o, shared_base(buffers));
    std::vector<FlatReduction> reductions;
    for (const Reduction& r : plan.reductions) {
        reductions.push_back({r.source, r.target, static_cast<int32_t>(r.count), static_cast<int32_t>(r.offset), 0, 1});
        split.move(reductions.back().source, shared_base(buffers));
    }
    head.sums_floats = plan.accumulator_floats;

    std::vector<FlatPhase> phases;
    std::vector<FlatGroup> groups;
    std::vector<Instruction> instructions;
    bool after = false;
    for (const Phase& phase : plan.phases) {
        after = after || phase.scope == Scope::kTask;
        if (phase.scope == Scope::kMeta) (after ? head.epilogue : head.prologue) |= 1 << phase.half;
        const int32_t first = static_cast<int32_t>(groups.size());
        for (const Group& group : phase.groups) {
            const int32_t begin = static_cast<int32_t>(instructions.size());
            for (const Instruction& in : group.instructions) {
                instructions.push_back(in);
                if (in.sums) redirect(in, operands, sums_base(buffers), reductions, head.sums_floats);
            }
            groups.push_back({group.rows, {begin, static_cast<int32_t>(instructions.size())}});
        }
        phases.push_back({phase.scope,
                          phase.half,
                          phase.start,
                          phase.stop,
                          phase.stride,
                          after && phase.scope != Scope::kTask,
                          {first, static_cast<int32_t>(groups.size())}});
    }
    head.chunk = choose_chunk(plan.inputs, head.ranks * head.threads);
    for (FlatReduction& r : reductions) r.first_chunk = head.sum_chunks, head.sum_chunks += chunks(r.count, head.chunk);
    for (const Port& p : plan.inputs) {
        const int64_t end = p.offset + (p.steps - 1) * p.step_stride + 4 * stored_floats(p);
        if (ranks == 1) head.warm_bytes = std::max(head.warm_bytes, static_cast<int32_t>(std::min(end, kWarmBytes)));
    }

    std::vector<char> out(sizeof head);
    std::vector<Scalars> checked = plan.checked;
    for (Scalars& s : checked) split.move(s.at, shared_base(buffers));
    const auto inputs = flat_ports(plan.inputs, true, head.chunk, head.input_chunks),
               outputs = flat_ports(plan.outputs, false, head.chunk, head.output_chunks);
    head.phases = append(out, phases), head.n_phases = static_cast<int32_t>(phases.size());
    head.groups = append(out, groups);
    head.instructions = append(out, instructions);
    head.operands = append(out, operands);
    head.task_buffers = append(out, plan.task_buffers);
    head.inputs = append(out, inputs), head.n_inputs = static_cast<int32_t>(inputs.size());
    head.outputs = append(out, outputs), head.n_outputs = static_cast<int32_t>(outputs.size());
    head.reductions = append(out, reductions), head.n_reductions = static_cast<int32_t>(reductions.size());
    head.checked = append(out, checked), head.n_checked = static_cast<int32_t>(checked.size());
    std::memcpy(out.data(), &head, sizeof head);
    return out;
}

}  // namespace cuda
}  // namespace fastmaml
