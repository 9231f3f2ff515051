// The kernel, its launch, and what there is to know of the device.
#include "executor.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <stdexcept>

#include "tables.cuh"

namespace fastmaml {
namespace cuda {

__global__ void __launch_bounds__(512) run_plan(const __grid_constant__ Launch l) {
    const int ranks = reinterpret_cast<const FlatPlan*>(l.plan)->ranks, threads = static_cast<int>(blockDim.x);
    const int rank = static_cast<int>(blockIdx.x) % ranks, block = static_cast<int>(blockIdx.x) / ranks;
    Tables({rank * threads + static_cast<int>(threadIdx.x), ranks * threads, ranks}, l, block, nullptr).run();
}

static void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // what was wrong here is not wrong for the next caller
    throw std::runtime_error(std::string("fastmaml._cuda: ") + what + ": " + cudaGetErrorString(error));
}

int device_count(std::string& why_none) {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess) {
        cudaGetLastError();
        why_none = cudaGetErrorString(error);
        return 0;
    }
    return count;
}

static int attribute(cudaDeviceAttr which, int index) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, index), "cudaDeviceGetAttribute");
    return value;
}

Device device(int index) {
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, index), "cudaGetDeviceProperties");
    return {properties.name, attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index), properties.multiProcessorCount,
            properties.major, properties.minor};
}

struct OnDevice {  // the caller's current device comes back
    int before = 0, index;
    explicit OnDevice(int index) : index(index) {
        check(cudaGetDevice(&before), "cudaGetDevice");
        if (index != before) check(cudaSetDevice(index), "cudaSetDevice");
    }
    ~OnDevice() {
        if (index != before) cudaSetDevice(before);  // setting it makes a context there
    }
};

static const FlatPlan& head(const std::vector<char>& plan) { return *reinterpret_cast<const FlatPlan*>(plan.data()); }

struct Config {  // of a launch on the current device
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute cluster = {};
    Config(const FlatPlan& p, int blocks, void* stream) {
        config.gridDim = dim3(blocks * p.ranks);
        config.blockDim = dim3(p.threads);
        config.stream = static_cast<cudaStream_t>(stream);
        config.dynamicSmemBytes = p.ranks == 1 ? fixed_bytes(p.threads) + p.shared_arena_bytes : 0;
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim.x = p.ranks, cluster.val.clusterDim.y = 1, cluster.val.clusterDim.z = 1;
        config.attrs = &cluster;
        config.numAttrs = p.ranks > 1;
    }
};

// Shared memory beyond 48 KB is asked for: the kernel may then use all that a block can have of the current device.
static void allow_shared(const void* kernel, int index) {
    const int most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), "cudaFuncSetAttribute");
}

static const void* walk(int index) {  // the kernel of every Plan
    static std::mutex mutex;
    static std::vector<bool> allowed;
    const void* kernel = reinterpret_cast<const void*>(run_plan);
    std::lock_guard<std::mutex> lock(mutex);
    if (static_cast<int>(allowed.size()) <= index) allowed.resize(index + 1);
    if (!allowed[index]) allow_shared(kernel, index);
    allowed[index] = true;
    return kernel;
}

std::string why_not(int index) {
    try {
        const OnDevice on(index);
        walk(index);
    } catch (const std::runtime_error& error) {
        return error.what();
    }
    return "";
}

bool can_load() { return CUDART_VERSION >= 12080; }

const void* load(const std::string& cubin, int index) {
#if CUDART_VERSION >= 12080
    const OnDevice on(index);
    cudaLibrary_t library;
    cudaKernel_t kernel;
    check(cudaLibraryLoadData(&library, cubin.data(), nullptr, nullptr, 0, nullptr, nullptr, 0), "cudaLibraryLoadData");
    check(cudaLibraryGetKernel(&kernel, library, "fastmaml_half"), "cudaLibraryGetKernel");
    allow_shared(kernel, index);
    return kernel;
#else
    throw std::runtime_error("fastmaml._cuda: built with a CUDA older than 12.8, which cannot load a compiled kernel");
#endif
}

int resident_blocks(const FlatPlan& p, int index) {
    const OnDevice on(index);
    int blocks = 0;
    const Config c(p, 1, nullptr);
    if (p.ranks > 1) {
        cudaFuncAttributes made;
        check(cudaFuncGetAttributes(&made, walk(index)), "cudaFuncGetAttributes");
        if (made.ptxVersion < 90) return 0;  // without the barrier of a cluster (block.cuh)
        check(cudaOccupancyMaxActiveClusters(&blocks, walk(index), &c.config), "occupancy");
        return blocks;
    }
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, walk(index), p.threads, c.config.dynamicSmemBytes),
          "occupancy");
    return std::max(1, blocks * attribute(cudaDevAttrMultiProcessorCount, index));
}

void launch(const std::vector<char>& plan, const Launch& l, const void* compiled, int index, void* stream,
            const std::string&) {
    const OnDevice on(index);
    const FlatPlan& p = head(plan);
    void* arguments[] = {const_cast<Launch*>(&l)};
    const Config c(p, l.blocks, stream);
    check(cudaLaunchKernelExC(&c.config, compiled ? compiled : walk(index), arguments), "launch");
}

void call_kernel(const Instruction&, const std::vector<Place>&, const Task&, int, int, const std::string&) {
    throw std::runtime_error("fastmaml._cuda: single device functions run on the host, in fastmaml._cuda_host");
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
