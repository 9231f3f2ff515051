// What a device function sees of the hardware: a block of threads in warps of 32, its barriers, sums over a warp, and
// counters that several blocks share. The same sources are compiled by nvcc and, for tests, by the host's compiler:
// there every thread is a fiber (host/fibers.h) that runs until it meets a barrier, the threads one after another
// forward, reversed or shuffled. So ordinary CUDA code is tested as it is, and a barrier that is missing, or that not
// all threads reach, shows.
//
// A cluster (sm_90) is one Block too, of all the threads of its blocks, whose barrier is the cluster's; it has no
// memory but the global one. So no device function knows of clusters, and as no bit depends on the number of threads,
// none depends on them.
#pragma once
#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#define FM_DEVICE __device__ __forceinline__
#define FM_NOINLINE __device__ __noinline__
#define FM_UNROLL _Pragma("unroll 4")
#define FM_LOOP _Pragma("unroll 1")
#else
#define FM_DEVICE inline
#define FM_NOINLINE inline
#define FM_UNROLL
#define FM_LOOP
#include "host/fibers.h"
#endif
#ifdef FASTMAML_STRAIGHT  // straight.cuh: in one piece, which is long as it is
#define FM_APART FM_DEVICE
#define FM_ROLLED FM_LOOP
#else
#define FM_APART FM_NOINLINE
#define FM_ROLLED
#endif

namespace fastmaml {
namespace cuda {

constexpr int kWarp = 32;

#ifdef __CUDACC__

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
FM_DEVICE void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}
#endif

struct Block {
    int thread, threads, ranks;  // ranks: blocks of the cluster, or 1

    FM_DEVICE void sync() const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        if (ranks > 1)  // what its threads have written before, in any memory, is seen behind it
            return cluster_barrier();
#endif
        __syncthreads();
    }
    FM_DEVICE void warp_sync() const { __syncwarp(); }
    template <class T>
    FM_DEVICE T warp_sum(T v) const {  // the same bits in every lane
        for (int mask = kWarp / 2; mask > 0; mask /= 2) v += __shfl_xor_sync(0xffffffffu, v, mask);
        return v;
    }
    FM_DEVICE void pause() const { __nanosleep(20); }
};

// Of one thread for its block: what the block wrote before `add` is seen by who has read the sum by `peek` and then
// called `acquire`, which empties the L1 that other blocks use too: once, and not at every look.
FM_DEVICE int take(int* counter) { return atomicAdd(counter, 1); }
FM_DEVICE void add(int* counter, int n) {
    __threadfence();
    atomicAdd(counter, n);
}
FM_DEVICE int peek(const int* counter) { return *static_cast<const volatile int*>(counter); }
FM_DEVICE void acquire() { __threadfence(); }

FM_DEVICE void assume(bool v) { __builtin_assume(v); }
FM_DEVICE char* in_global(void* p) {  // loads and stores then need not ask what kind of memory it is
    __builtin_assume(__isGlobal(p));
    return static_cast<char*>(p);
}
FM_DEVICE void touch(const char* p) {  // asks, and does not wait: ptxas would drop a load that nobody reads
    asm volatile("prefetch.global.L1 [%0];" ::"l"(__cvta_generic_to_global(p)));
}
FM_DEVICE char* shared_memory(char*) {  // by its name: the compiler then knows what kind of memory it is
    extern __shared__ __align__(64) char memory[];
    return memory;
}

// The entry of a half's own source (source.cpp). As many registers as the walk may have.
#define FM_ENTRY(Half)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(fastmaml::cuda::Half::kThreads, 512 / fastmaml::cuda::Half::kThreads) \
        fastmaml_half(const __grid_constant__ fastmaml::cuda::Launch l) {                                              \
        using namespace fastmaml::cuda;                                                                                \
        const int rank = static_cast<int>(blockIdx.x) % Half::kRanks;                                                  \
        const int block = static_cast<int>(blockIdx.x) / Half::kRanks;                                                 \
        const Block b = {rank * Half::kThreads + static_cast<int>(threadIdx.x), Half::kRanks * Half::kThreads,         \
                         Half::kRanks};                                                                                \
        Half(b, l, block, nullptr).run();                                                                              \
    }

#else

struct Block {
    int thread, threads, ranks;
    host::Fiber* fiber;

    void sync() const { fiber->wait(host::kBlock); }
    void warp_sync() const { fiber->wait(host::kWarpOnly); }
    template <class T>
    T warp_sum(T v) const {
        T all[kWarp];
        fiber->gather(&v, sizeof v, all);
        for (int mask = kWarp / 2; mask > 0; mask /= 2)
            for (int lane = 0; lane < kWarp; ++lane)
                if (!(lane & mask)) all[lane] = all[lane | mask] = all[lane] + all[lane | mask];
        return all[0];
    }
    void pause() const { fiber->wait(host::kOthers); }
};

inline int take(int* counter) { return (*counter)++; }
inline void add(int* counter, int n) { *counter += n; }
inline int peek(const int* counter) { return *counter; }
inline void acquire() {}
inline void assume(bool) {}
inline char* in_global(void* p) { return static_cast<char*>(p); }
inline void touch(const char*) {}
inline char* shared_memory(char* memory) { return memory; }

#define FM_ENTRY(Half)                                                                              \
    extern "C" __attribute__((visibility("default"))) void fastmaml_half(                           \
        const fastmaml::cuda::Block& b, const fastmaml::cuda::Launch& l, int block, char* memory) { \
        fastmaml::cuda::Half(b, l, block, memory).run();                                            \
    }

#endif

}  // namespace cuda
}  // namespace fastmaml
