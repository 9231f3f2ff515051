// What a device function sees of the hardware: a block of threads in warps of 32, its barriers, sums over a warp, and
// counters that several blocks share. The same sources are compiled by nvcc and, for tests, by the host's compiler:
// there every thread is a fiber (host/fibers.h) that runs until it meets a barrier, the threads one after another
// forward, reversed or shuffled. So ordinary CUDA code is tested as it is, and a barrier that is missing, or that not
// all threads reach, shows.
#pragma once
#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#define FM_DEVICE __device__ __forceinline__
#define FM_NOINLINE __device__ __noinline__
#define FM_UNROLL _Pragma("unroll 4")
#else
#define FM_DEVICE inline
#define FM_NOINLINE inline
#define FM_UNROLL
#include "host/fibers.h"
#endif

namespace fastmaml {
namespace cuda {

constexpr int kWarp = 32;

#ifdef __CUDACC__

struct Block {
    int thread, threads;

    FM_DEVICE void sync() const { __syncthreads(); }
    FM_DEVICE void warp_sync() const { __syncwarp(); }
    template <class T>
    FM_DEVICE T warp_sum(T v) const {  // the same bits in every lane
        for (int mask = kWarp / 2; mask > 0; mask /= 2) v += __shfl_xor_sync(0xffffffffu, v, mask);
        return v;
    }
    FM_DEVICE bool any(bool v) const { return __syncthreads_or(v); }
    FM_DEVICE void pause() const { __nanosleep(20); }
};

// Of one thread for its block: what the block wrote before `add` is seen by who has then read the sum by `read`.
FM_DEVICE int take(int* counter) { return atomicAdd(counter, 1); }
FM_DEVICE void add(int* counter, int n) {
    __threadfence();
    atomicAdd(counter, n);
}
FM_DEVICE int read(const int* counter) {
    const int n = *static_cast<const volatile int*>(counter);
    __threadfence();
    return n;
}

#else

struct Block {
    int thread, threads;
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
    bool any(bool v) const { return fiber->any(v); }
    void pause() const { fiber->wait(host::kOthers); }
};

inline int take(int* counter) { return (*counter)++; }
inline void add(int* counter, int n) { *counter += n; }
inline int read(const int* counter) { return *counter; }

#endif

}  // namespace cuda
}  // namespace fastmaml
