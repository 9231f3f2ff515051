// Norms within a sample, as one: layer norm over the last axes and group norm.
//
// A sample is `slabs` images [pixels][channels]; a set of elements with common statistics is a group of channels of one
// slab. (Layer norm over h and w makes each channel a group, over w alone each line a slab as well.) So sums go over
// pixels for each channel, vectors of channels at a time, and then over the channels of each group, and what follows
// from them is spread over the channels again: an array of one number per channel, zero in the padding, where with it
// everything stays zero.
#pragma once
#include <math.h>

#include "sums.h"

namespace fastmaml {
namespace FASTMAML_ISA {

constexpr int64_t kMaxNormChannels = 8192;  // these arrays lie on the stack: cpu/rules/norms.py refuses more

enum class AffineKind : int64_t { kChannel, kPixel, kElement };  // gamma [c], [pixels], [c, pixels] in torch's order

struct Norm {  // sizes {c, pixels, slabs, groups, affine kind}, numbers {eps}
    int64_t channels, lanes, pixels, slabs, groups, members;
    AffineKind kind;
    float count, eps;  // elements of a set
    explicit Norm(const Call& c)
        : channels(c.sizes[0]),
          lanes(pad_lane(channels)),
          pixels(c.sizes[1]),
          slabs(c.sizes[2]),
          groups(c.sizes[3]),
          members(channels / groups),
          kind(static_cast<AffineKind>(c.sizes[4])),
          count(static_cast<float>(pixels * members)),
          eps(c.numbers[0]) {}
};

struct PerChannel {
    alignas(64) float v[kMaxNormChannels + 272];  // no power of two: side by side, they must not share cache sets
    vec at(int64_t l) const { return load(v + l); }
    void set(int64_t l, vec x) { store(v + l, x); }
};

static const float kNoRow[kLane] = {};

struct In {  // one slab of an operand; an absent one reads zeros
    const float* p;
    int64_t step, lane;
    In(const Norm& n, const Call& c, int i, int64_t row, int64_t slab) : p(kNoRow), step(0), lane(0) {
        if (c.operands[i]) p = c.f(i) + row * c.stride(i) + slab * n.pixels * n.lanes, step = n.lanes, lane = 1;
    }
    vec at(int64_t pixel, int64_t l) const { return load(p + pixel * step + l * lane); }
};

static inline float* out_slab(const Norm& n, const Call& c, int i, int64_t row, int64_t slab) {
    return c.f(i) + row * c.stride(i) + slab * n.pixels * n.lanes;
}

// gamma or beta, or a tangent of theirs.
struct Affine {
    const Norm& n;
    const float* p;
    float absent;
    Affine(const Norm& n, const Call& c, int i, float absent = 0.f) : n(n), p(c.f(i)), absent(absent) {}
    vec element(int64_t pixel, int64_t l) const {
        vec v = vec{};
        const bool same = n.kind == AffineKind::kPixel;
        for (int i = 0; i < VL; ++i)
            if (l + i < n.channels) v[i] = p[(same ? 0 : (l + i) * n.pixels) + pixel];
        return v;
    }
    struct Lane {
        const Affine* each;  // of its own for each pixel, or null
        vec common;
        int64_t l;
        vec at(int64_t pixel) const { return each ? each->element(pixel, l) : common; }
    };
    Lane lane(int64_t l) const {
        if (!p) return {nullptr, splat(absent), l};
        if (n.kind == AffineKind::kChannel) return {nullptr, load(p + l), l};
        return {this, vec{}, l};
    }
};

static inline float sum_range(const float* p, int64_t n) {
    const int64_t whole = n / VL;
    const vec sum = sum_terms(whole, [=](int64_t i, vec& a, vec&) { a += load(p + i * VL); }).a;
    return sum_lanes(sum + load_part(p + whole * VL, n - whole * VL));
}

// Sums over pixels, channel by channel; lane(l) makes the function (pixel, a, b) that adds a term to each sum.
template <class F>
static inline void channel_sums(const Norm& n, PerChannel* a, PerChannel* b, F lane) {
    for (int64_t l = 0; l < n.lanes; l += VL) {
        const Sums s = sum_terms(n.pixels, lane(l));
        a->set(l, s.a);
        if (b) b->set(l, s.b);
    }
}

// f(first channel, channels) for each group; then zeros in the padding.
template <class F>
static inline void for_groups(const Norm& n, PerChannel& to, F f) {
    for (int64_t g = 0; g < n.groups; ++g) f(g * n.members, n.members);
    for (int64_t i = n.channels; i < n.lanes; ++i) to.v[i] = 0.f;
}

// Sums per channel become means of their set.
static inline void to_means(const Norm& n, PerChannel& v) {
    for_groups(n, v, [&](int64_t first, int64_t members) {
        const float mean = (members == 1 ? v.v[first] : sum_range(v.v + first, members)) / n.count;
        for (int64_t i = first; i < first + members; ++i) v.v[i] = mean;
    });
}

struct Statistics {
    PerChannel mean, rstd;
    void of(const Norm& n, const In& x) {
        channel_sums(n, &mean, nullptr,
                     [&](int64_t l) { return [&x, l](int64_t p, vec& a, vec&) { a += x.at(p, l); }; });
        to_means(n, mean);
        PerChannel rest;  // what rounding left in the mean
        channel_sums(n, &rest, &rstd, [&](int64_t l) {
            return [&x, l, centre = mean.at(l)](int64_t p, vec& a, vec& b) {
                const vec d = x.at(p, l) - centre;
                a += d;
                b = fma(d, d, b);
            };
        });
        for_groups(n, rstd, [&](int64_t first, int64_t members) {
            const float sum = sum_range(rest.v + first, members), shift = sum / n.count;
            const float m2 = sum_range(rstd.v + first, members) - sum * shift;
            const float r = 1.f / sqrtf((m2 < 0.f ? 0.f : m2) / n.count + n.eps);
            for (int64_t i = first; i < first + members; ++i) mean.v[i] += shift, rstd.v[i] = r;
        });
    }
};

struct Point {  // one vector of channels of x
    const In& x;
    vec mean, rstd;
    int64_t l;
    Point(const In& x, const Statistics& s, int64_t l) : x(x), mean(s.mean.at(l)), rstd(s.rstd.at(l)), l(l) {}
    vec xhat(int64_t p) const { return (x.at(p, l) - mean) * rstd; }
};

// E[h] and E[h xhat] of each set: what takes h to h - E[h] - xhat E[h xhat].
struct Projection {
    PerChannel mean, along;
    template <class H>  // h(l) makes the function of the pixel
    void of(const Norm& n, const In& x, const Statistics& s, H h) {
        channel_sums(n, &mean, &along, [&](int64_t l) {
            return [k = Point(x, s, l), at = h(l)](int64_t p, vec& a, vec& b) {
                const vec v = at(p);
                a += v;
                b = fma(k.xhat(p), v, b);
            };
        });
        to_means(n, mean);
        to_means(n, along);
    }
    struct Lane {
        vec mean, along;
        vec of(vec h, vec xhat) const { return fma(-xhat, along, h - mean); }
    };
    Lane lane(int64_t l) const { return {mean.at(l), along.at(l)}; }
};

static inline auto plain(const In& in) {  // h of an operand as it is
    return [&in](int64_t l) { return [&in, l](int64_t p) { return in.at(p, l); }; };
}

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
