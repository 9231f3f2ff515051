// A piecewise linear activation inside of the kernel that makes what it is of: executors/cpu/fusion.py.
#pragma once
#include <type_traits>

#include "../simd.h"

namespace fastmaml {
namespace FASTMAML_ISA {

// The piecewise linear activation that follows, or whose reverse or tangent does.
enum class Gate { kNone, kMake, kApply };  // kMake: mask = y > 0 is written; kApply: it is given
struct Activation {
    Gate gate;
    uint8_t* mask;  // or null where nobody reads it
    int64_t ldm;
    float slope;

    Activation at(int64_t row, int64_t column) const {
        return {gate, mask ? mask + row * ldm + column : nullptr, ldm, slope};
    }
    // As the kernels of relu.cpp; Flat: the slope is 0.
    template <Gate G, bool Flat>
    __attribute__((always_inline)) vec apply(vec v, int64_t row, int64_t column) const {
        if (G == Gate::kNone) return v;
        const vec low = Flat ? vec{} : v * splat(slope);
        if (G == Gate::kApply) return select(load_mask(mask + row * ldm + column), v, low);
        if (mask) store_mask(mask + row * ldm + column, v > vec{});
        return Flat ? select(v <= vec{}, vec{}, v) : select(v > vec{}, v, low);
    }
    template <Gate G>
    __attribute__((always_inline)) vec apply(vec v, int64_t row, int64_t column) const {
        return slope == 0.f ? apply<G, true>(v, row, column) : apply<G, false>(v, row, column);
    }
    __attribute__((always_inline)) vec operator()(vec v, int64_t row, int64_t column) const {
        return gate == Gate::kNone   ? v
               : gate == Gate::kMake ? apply<Gate::kMake>(v, row, column)
                                     : apply<Gate::kApply>(v, row, column);
    }
};
static constexpr Activation kLinear = {Gate::kNone, nullptr, 0, 0.f};

// The operand `mask` of a fused call; numbers {gate, slope}
static inline Activation activation_of(const Call& c, int mask) {
    return {static_cast<Gate>(static_cast<int>(c.numbers[0])), c.mask(mask), c.row_stride[mask], c.numbers[1]};
}

// body(std::integral_constant of the gate), so that no loop asks for it
template <class F>
static inline void with_gate(Gate gate, F body) {
    switch (gate) {
        case Gate::kNone:
            return body(std::integral_constant<Gate, Gate::kNone>());
        case Gate::kMake:
            return body(std::integral_constant<Gate, Gate::kMake>());
        case Gate::kApply:
            return body(std::integral_constant<Gate, Gate::kApply>());
    }
}

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
