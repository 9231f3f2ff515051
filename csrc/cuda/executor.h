// What bindings.cpp calls: executor.cu on a device, host/executor.cpp as fibers on the host.
#pragma once
#include <string>

#include "flat.h"

namespace fastmaml {
namespace cuda {

struct Device {
    std::string name;
    int64_t shared_bytes = 0;  // that one block may use
    int multiprocessors = 0, major = 0, minor = 0;
};

int device_count(std::string& why_none);
Device device(int index);

// Why a device cannot run what was built (it has no code for its architecture), or "".
std::string why_not(int device);

// How many blocks, or clusters, run at once; 0: no cluster of this size can.
int resident_blocks(const FlatPlan& plan, int device);

// A kernel that was compiled from half_source: as `compiled` below, for as long as the process lives. All throw
// std::runtime_error with what CUDA says.
bool can_load();
const void* load(const std::string& cubin, int device);

// compiled: of this half and batch, or null for the walk. order: of the threads of the host, where `compiled` is the
// address of the source's function.
void launch(const std::vector<char>& plan, const Launch& launch, const void* compiled, int device, void* stream,
            const std::string& order);

// One device function on its own, on the host: places of its operands, then as in a Plan.
void call_kernel(const Instruction& in, const std::vector<Place>& places, const Task& task, int rows, int threads,
                 const std::string& order);

std::vector<int> supported_kernels();

}  // namespace cuda
}  // namespace fastmaml
