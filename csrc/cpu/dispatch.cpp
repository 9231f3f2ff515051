#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace fastmaml {

static const std::vector<Tier>& available() {
    static const std::vector<Tier> list = [] {
        std::vector<Tier> out;
#ifdef FASTMAML_X86
        __builtin_cpu_init();  // __builtin_cpu_supports also asks the operating system (XCR0)
        const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
            out.push_back({"avx512", avx512::kTable, avx512::peak_flops});
        if (has_avx2) out.push_back({"avx2", avx2::kTable, avx2::peak_flops});
#endif
        out.push_back({"baseline", baseline::kTable, baseline::peak_flops});
        return out;
    }();
    return list;
}

std::vector<Tier> tiers() { return available(); }

const Tier& find_tier(const std::string& name) {
    std::string all;
    for (const Tier& tier : available()) {
        if (name == tier.name) return tier;
        all += (all.empty() ? "" : ", ") + std::string(tier.name);
    }
    throw std::runtime_error("FASTMAML_ISA=" + name + ": this machine has " + all);
}

const Tier& active_tier() {
    static const Tier& tier = [&]() -> const Tier& {
        const char* wanted = std::getenv("FASTMAML_ISA");
        return wanted && *wanted ? find_tier(wanted) : available().front();
    }();
    return tier;
}

const char* kernel_name(int id) {
    static const char* names[] = {
#define FASTMAML_NAME(name) #name,
        FASTMAML_KERNELS(FASTMAML_NAME)
#undef FASTMAML_NAME
    };
    return names[id];
}

}  // namespace fastmaml
