// One vector type for the three tiers, on GCC's vector extensions; everything here is static, so that no tier's code
// can stand in for another's.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__) || defined(__AVX2__)
#pragma GCC diagnostic push  // GCC 12's own headers leave operands of masked forms undefined on purpose
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
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
typedef float uvec __attribute__((vector_size(4 * VL), aligned(4), may_alias));

static inline vec load(const float* p) { return *reinterpret_cast<const uvec*>(p); }
static inline void store(float* p, vec v) { *reinterpret_cast<uvec*>(p) = v; }
static inline vec splat(float x) { return x - vec{}; }
static inline ivec isplat(int32_t x) { return x - ivec{}; }
// The first n floats, VL at most (none where n is not positive), and zeros: where rows are not padded
static inline vec load_part(const float* p, int64_t n) {
    if (n >= VL) return load(p);
#if defined(__AVX512F__)
    return (vec)_mm512_maskz_loadu_ps(static_cast<__mmask16>(n > 0 ? (1u << n) - 1 : 0), p);
#elif defined(__AVX2__)
    const ivec lane = {0, 1, 2, 3, 4, 5, 6, 7};
    return (vec)_mm256_maskload_ps(p, (__m256i)(lane < isplat(static_cast<int32_t>(n))));
#else
    return vec{n > 0 ? p[0] : 0.f, n > 1 ? p[1] : 0.f, n > 2 ? p[2] : 0.f, 0.f};
#endif
}
static inline void store_part(float* p, vec v, int64_t n) {
    if (n >= VL) return store(p, v);
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>(n > 0 ? (1u << n) - 1 : 0), (__m512)v);
#elif defined(__AVX2__)
    const ivec lane = {0, 1, 2, 3, 4, 5, 6, 7};
    _mm256_maskstore_ps(p, (__m256i)(lane < isplat(static_cast<int32_t>(n))), (__m256)v);
#else
    for (int i = 0; i < n; ++i) p[i] = v[i];
#endif
}
// Masks are bytes 0/1 in memory and lanes 0/-1 in registers. (The generic conversion becomes one insert per element.)
static inline ivec load_mask(const uint8_t* p) {
#if defined(__AVX512F__)
    return -(ivec)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
    return -(ivec)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
    return -ivec{p[0], p[1], p[2], p[3]};
#endif
}
static inline void store_mask(uint8_t* p, ivec m) {
#if defined(__AVX512F__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)-m));
#elif defined(__AVX2__)
    const __m256i ones = (__m256i)-m;
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(ones), _mm256_extracti128_si256(ones, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
#else
    for (int i = 0; i < VL; ++i) p[i] = m[i] ? 1 : 0;
#endif
}
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

static inline float sum_lanes(vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#endif
    float lanes[VL];
    store(lanes, v);
    for (int half = VL / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}

// The sums of the lanes of four vectors, each in the same order
typedef float quad __attribute__((vector_size(16)));
typedef int32_t iquad __attribute__((vector_size(16)));
static inline quad sum_lanes(vec a, vec b, vec c, vec d) {
#if defined(__AVX512F__)
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512d lo = _mm512_castps_pd(ab), hi = _mm512_castps_pd(cd);
    const __m512 four =
        _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(lo, hi)), _mm512_castpd_ps(_mm512_unpackhi_pd(lo, hi)));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
    return (quad)_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif defined(__AVX2__)
    const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    const __m256d lo = _mm256_castps_pd(ab), hi = _mm256_castps_pd(cd);
    const __m256 four =
        _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(lo, hi)), _mm256_castpd_ps(_mm256_unpackhi_pd(lo, hi)));
    return (quad)_mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1));
#else
    const quad ab = __builtin_shuffle(a, b, iquad{0, 4, 1, 5}) + __builtin_shuffle(a, b, iquad{2, 6, 3, 7});
    const quad cd = __builtin_shuffle(c, d, iquad{0, 4, 1, 5}) + __builtin_shuffle(c, d, iquad{2, 6, 3, 7});
    return __builtin_shuffle(ab, cd, iquad{0, 1, 4, 5}) + __builtin_shuffle(ab, cd, iquad{2, 3, 6, 7});
#endif
}

// to[kLane] = lo, hi, zeros: in as few stores as there are vectors, for what is stored in parts cannot be loaded as one
// vector before it has reached the cache
static inline void store_lane(float* to, quad lo, quad hi) {
#if defined(__AVX512F__)
    store(to, (vec)_mm512_insertf32x4(_mm512_zextps128_ps512((__m128)lo), (__m128)hi, 1));
#elif defined(__AVX2__)
    store(to, (vec)_mm256_insertf128_ps(_mm256_castps128_ps256((__m128)lo), (__m128)hi, 1));
    store(to + VL, vec{});
#else
    store(to, lo);
    store(to + VL, hi);
    store(to + 2 * VL, vec{});
    store(to + 3 * VL, vec{});
#endif
}

// e^x, relative error about 1e-7: x = n ln2 + r, |r| <= ln2 / 2, a polynomial of degree 6 for e^r (Cephes'
// coefficients), then 2^n.
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

// The share of a row kernel: of the rows where they are many, as convolutions share the lines of their images, so that
// a member reads what it wrote; of the columns, as linear layers do, where they are few.
struct Area {
    Share rows, cols;
};
static inline Area share_rows(int64_t columns, const Call& c) {
    if (c.n >= 32) return {share(c.n, c), {0, columns}};
    const Share lanes = share(columns / kLane, c);
    return {{0, c.n}, {lanes.begin * kLane, lanes.end * kLane}};
}

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
