// The same walk on the host, every thread a fiber: for tests. Shared memory is poisoned before each launch.
#include "../executor.h"

#include <cstring>
#include <stdexcept>

#include "../tables.cuh"

namespace fastmaml {
namespace cuda {
namespace {

// "forward", "reversed" or "shuffled", with a seed behind it: "shuffled7"; behind that "-deaf" or "-apart"
host::Schedule schedule_of(const std::string& text) {
    const size_t digits = text.find_first_of("0123456789-");
    const std::string name = text.substr(0, digits);
    host::Schedule out;
    if (digits != std::string::npos && text[digits] != '-') out.seed = std::stoull(text.substr(digits));
    out.deaf = text.find("-deaf") != std::string::npos;
    out.apart = text.find("-apart") != std::string::npos;
    out.order = name == "reversed"   ? host::Order::kReversed
                : name == "shuffled" ? host::Order::kShuffled
                                     : host::Order::kForward;
    if (name != "forward" && name != "reversed" && name != "shuffled")
        throw std::runtime_error("order " + text + ": must be forward, reversed or shuffled");
    return out;
}

struct Aligned {  // poisoned: bytes 255, which as floats are NaN
    std::vector<char> memory;
    explicit Aligned(int64_t bytes) : memory(bytes + 64, static_cast<char>(0xff)) {}
    char* data() { return memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64; }
};

}  // namespace

int device_count(std::string&) { return 1; }
Device device(int) { return {"the host, threads as fibers", 163 * 1024, 3, 0, 0}; }
std::string why_not(int) { return ""; }
int resident_blocks(const FlatPlan&, int) { return 3; }

bool can_load() { return false; }
const void* load(const std::string&, int) {
    throw std::runtime_error("fastmaml._cuda_host: a half compiled for the host is a function's address already");
}

void launch(const std::vector<char>& plan, const Launch& l, const void* compiled, int, void*,
            const std::string& order) {
    const FlatPlan& p = *reinterpret_cast<const FlatPlan*>(plan.data());
    std::vector<Aligned> shared;
    for (int i = 0; i < l.blocks; ++i) shared.emplace_back(fixed_bytes(p.threads) + p.shared_arena_bytes);
    host::Grid grid(l.blocks, p.threads, p.ranks, schedule_of(order));
    const auto half = reinterpret_cast<void (*)(const Block&, const Launch&, int, char*)>(compiled);
    grid.run([&](int block, const Block& b) {
        half ? half(b, l, block, shared[block].data()) : Tables(b, l, block, shared[block].data()).run();
    });
}

void call_kernel(const Instruction& in, const std::vector<Place>& places, const Task& task, int rows, int threads,
                 const std::string& order) {
    std::vector<double> partials(kPartials, nan(""));
    host::Grid grid(1, threads, 1, schedule_of(order));
    grid.run([&](int, const Block& b) { dispatch(prepare(b, &in, places.data(), &task, partials.data(), rows)); });
}

std::vector<int> supported_kernels() {
    return {
#define FASTMAML_ID(name) kId_##name,
        FASTMAML_CUDA_ROWS(FASTMAML_ID) FASTMAML_CUDA_BLOCKS(FASTMAML_ID)
#undef FASTMAML_ID
    };
}

}  // namespace cuda
}  // namespace fastmaml
