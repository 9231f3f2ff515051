// Which instruction-set tier runs. This file and dispatch.cpp are compiled without ISA flags.
#pragma once
#include <string>
#include <vector>

#include "fastmaml/kernels.h"

namespace fastmaml {

struct Tier {
    const char* name;
    const Kernel* table;
    float (*peak_flops)(int64_t iterations);  // runs iterations of a register-only FMA loop; returns its FLOPs
};

std::vector<Tier> tiers();  // those this machine can run, best first
const Tier& active_tier();  // chosen once: FASTMAML_ISA, or the best; throws std::runtime_error on a wrong value
const Tier& find_tier(const std::string& name);
const char* kernel_name(int id);

}  // namespace fastmaml
