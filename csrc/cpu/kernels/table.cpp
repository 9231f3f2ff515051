// The tier's kernels in the order of KernelId, and its peak.
#include "../simd.h"

namespace fastmaml {
namespace FASTMAML_ISA {

extern const Kernel kTable[kKernelCount] = {
#define FASTMAML_ROW(name) name,
    FASTMAML_KERNELS(FASTMAML_ROW)
#undef FASTMAML_ROW
};

// A loop of independent FMAs that never leaves the registers: what "peak" means here.
float peak_flops(int64_t iterations) {
    constexpr int kChains = VL == 16 ? 24 : 12;
    vec acc[kChains], a = splat(0.999f), b = splat(0.001f);
    for (int i = 0; i < kChains; ++i) acc[i] = splat(static_cast<float>(i));
    for (int64_t it = 0; it < iterations; ++it)
#pragma GCC unroll 24
        for (int i = 0; i < kChains; ++i) acc[i] = fma(acc[i], a, b);
    vec sum = vec{};
    for (int i = 0; i < kChains; ++i) sum += acc[i];
    volatile float sink = sum[0];
    (void)sink;
    return static_cast<float>(2.0 * kChains * VL * static_cast<double>(iterations));
}

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
