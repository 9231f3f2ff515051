// One vector type for the three tiers, on GCC's vector extensions; everything here is static, so that no tier's code can stand in for another's.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "fastmaml/kernels.h"

namespace fastmaml {
namespace FASTMAML_ISA {

#if defined(__AVX512F__)
static constexpr int VL = 16;
#elif defined(__AVX2__)
static constexpr int VL = 8;
#else
static constexpr int VL = 4;
#endif

typedef float vec __attribute__((vector_size(4 * VL)));
typedef int32_t ivec __attribute__((vector_size(4 * VL)));
typedef uint8_t bvec __attribute__((vector_size(VL)));
typedef float uvec __attribute__((vector_size(4 * VL), aligned(4), may_alias));
typedef uint8_t ubvec __attribute__((vector_size(VL), aligned(1), may_alias));

static inline vec load(const float* p) { return *reinterpret_cast<const uvec*>(p); }
static inline void store(float* p, vec v) { *reinterpret_cast<uvec*>(p) = v; }
static inline vec splat(float x) { return x - vec{}; }
static inline ivec isplat(int32_t x) { return x - ivec{}; }
static inline ivec load_mask(const uint8_t* p) {  // bytes 0/1 -> lanes 0/-1
    return -__builtin_convertvector(*reinterpret_cast<const ubvec*>(p), ivec);
}
static inline void store_mask(uint8_t* p, ivec m) { *reinterpret_cast<ubvec*>(p) = __builtin_convertvector(-m, bvec); }
static inline vec select(ivec m, vec a, vec b) { return (vec)(((ivec)a & m) | ((ivec)b & ~m)); }

static inline vec fma(vec a, vec b, vec c) {
#if defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

// e^x, relative error about 1e-7: x = n ln2 + r, |r| <= ln2 / 2, a polynomial of degree 6 for e^r (Cephes' coefficients), then 2^n.
static inline vec vexp(vec x) {
    const vec big = splat(88.3762626647950f), small = splat(-87.3365447504019f);
    ivec overflow = x > big, underflow = x < small, nan = x != x;
    vec c = select(overflow, big, select(underflow, small, x));
    c = select(nan, vec{}, c);
    vec n = c * splat(1.44269504088896341f) + splat(12582912.f);  // round to nearest by adding 1.5 * 2^23
    n = n - splat(12582912.f);
    vec r = fma(n, splat(-0.693359375f), c);
    r = fma(n, splat(2.12194440e-4f), r);
    vec p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r + splat(1.f));
    ivec whole = __builtin_convertvector(n, ivec), half = whole >> 1;  // in two factors: 2^128 is no float
    vec y = p * (vec)((half + isplat(127)) << 23) * (vec)((whole - half + isplat(127)) << 23);
    y = select(overflow, splat(__builtin_inff()), select(underflow, vec{}, y));
    return select(nan, x, y);
}

// The share of a team member, in whole units: [begin, end).
struct Share {
    int64_t begin, end;
};
static inline Share share(int64_t units, const Call& c) {
    if (c.parts == 1) return {0, units};
    return {units * c.part / c.parts, units * (c.part + 1) / c.parts};
}

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
