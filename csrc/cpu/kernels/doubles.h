// Vectors of double: half as many numbers as in a vec.
#pragma once
#include "../simd.h"

namespace fastmaml {
namespace FASTMAML_ISA {

typedef double dvec __attribute__((vector_size(4 * VL)));
typedef double udvec __attribute__((vector_size(4 * VL), aligned(8), may_alias));
typedef float hvec __attribute__((vector_size(2 * VL)));
typedef float uhvec __attribute__((vector_size(2 * VL), aligned(4), may_alias));
static constexpr int DL = VL / 2;

static inline dvec load(const double* p) { return *reinterpret_cast<const udvec*>(p); }
static inline void store(double* p, dvec v) { *reinterpret_cast<udvec*>(p) = v; }
static inline dvec splat(double x) { return x - dvec{}; }
static inline dvec load_double(const float* p) {
    return __builtin_convertvector(hvec(*reinterpret_cast<const uhvec*>(p)), dvec);
}
static inline void store_float(float* p, dvec v) { *reinterpret_cast<uhvec*>(p) = __builtin_convertvector(v, hvec); }

static inline dvec fma(dvec a, dvec b, dvec c) {
#if defined(__AVX512F__)
    return (dvec)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
    return (dvec)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
    return a * b + c;
#endif
}

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
