// Layer norm and group norm: see rownorm.h for how a sample is seen. Statistics are computed anew by each mode; they
// cost two passes over a sample that lies in the cache, and nothing of them crosses from one pass to another.
#include "rownorm.h"

namespace fastmaml {
namespace FASTMAML_ISA {

void layernorm_fwd(const Call& c) {  // x, gamma?, beta?, y
    const Norm n(c);
    const Affine gamma(n, c, 1, 1.f), beta(n, c, 2);
    for_lines(c, n.slabs, [&](int64_t row, int64_t slab) {
        const In x(n, c, 0, row, slab);
        float* y = out_slab(n, c, 3, row, slab);
        Statistics s;
        s.of(n, x);
        for (int64_t l = 0; l < n.lanes; l += VL) {
            const Point k(x, s, l);
            const auto scale = gamma.lane(l), shift = beta.lane(l);
            for (int64_t p = 0; p < n.pixels; ++p) store(y + p * n.lanes + l, fma(k.xhat(p), scale.at(p), shift.at(p)));
        }
    });
}

void layernorm_jvp(const Call& c) {  // x, gamma?, xt?, gammat?, betat?, yt
    const Norm n(c);
    const Affine gamma(n, c, 1, 1.f), gamma_t(n, c, 3), beta_t(n, c, 4);
    for_lines(c, n.slabs, [&](int64_t row, int64_t slab) {
        const In x(n, c, 0, row, slab), xt(n, c, 2, row, slab);
        float* yt = out_slab(n, c, 5, row, slab);
        Statistics s;
        Projection project;
        s.of(n, x);
        project.of(n, x, s, plain(xt));
        for (int64_t l = 0; l < n.lanes; l += VL) {
            const Point k(x, s, l);
            const auto tangent = project.lane(l);
            const auto scale = gamma.lane(l), scale_t = gamma_t.lane(l), shift_t = beta_t.lane(l);
            for (int64_t p = 0; p < n.pixels; ++p) {
                const vec xhat = k.xhat(p), xhat_t = k.rstd * tangent.of(xt.at(p, l), xhat);
                store(yt + p * n.lanes + l, fma(scale.at(p), xhat_t, fma(scale_t.at(p), xhat, shift_t.at(p))));
            }
        }
    });
}

void layernorm_bwd_input(const Call& c) {  // x, gamma?, dy, dx
    const Norm n(c);
    const Affine gamma(n, c, 1, 1.f);
    for_lines(c, n.slabs, [&](int64_t row, int64_t slab) {
        const In x(n, c, 0, row, slab), dy(n, c, 2, row, slab);
        float* dx = out_slab(n, c, 3, row, slab);
        const auto h = [&](int64_t l) {
            return [&dy, l, scale = gamma.lane(l)](int64_t p) { return dy.at(p, l) * scale.at(p); };
        };
        Statistics s;
        Projection project;
        s.of(n, x);
        project.of(n, x, s, h);
        for (int64_t l = 0; l < n.lanes; l += VL) {
            const Point k(x, s, l);
            const auto lane = project.lane(l);
            const auto at = h(l);
            for (int64_t p = 0; p < n.pixels; ++p) store(dx + p * n.lanes + l, k.rstd * lane.of(at(p), k.xhat(p)));
        }
    });
}

// x, gamma?, dy?, xt?, gammat?, dyt?, dxt: the product rule on layernorm_bwd_input, with E[h xhat]'s tangent as
// E[ht xhat] + E[h xhatt], and rstdt = -rstd^2 E[xt xhat]
void layernorm_bwd_input_jvp(const Call& c) {
    const Norm n(c);
    const Affine gamma(n, c, 1, 1.f), gamma_t(n, c, 4);
    for_lines(c, n.slabs, [&](int64_t row, int64_t slab) {
        const In x(n, c, 0, row, slab), dy(n, c, 2, row, slab), xt(n, c, 3, row, slab), dyt(n, c, 5, row, slab);
        float* dxt = out_slab(n, c, 6, row, slab);
        const auto h = [&](int64_t l) {
            return [&dy, l, scale = gamma.lane(l)](int64_t p) { return dy.at(p, l) * scale.at(p); };
        };
        const auto ht = [&](int64_t l) {
            return [&dy, &dyt, l, scale = gamma.lane(l), scale_t = gamma_t.lane(l)](int64_t p) {
                return fma(dyt.at(p, l), scale.at(p), dy.at(p, l) * scale_t.at(p));
            };
        };
        Statistics s;
        Projection of_h, of_ht, of_xt;
        PerChannel moved;  // E[h xhatt]
        s.of(n, x);
        of_h.of(n, x, s, h);
        of_ht.of(n, x, s, ht);
        of_xt.of(n, x, s, plain(xt));
        channel_sums(n, &moved, nullptr, [&](int64_t l) {
            return [&xt, l, k = Point(x, s, l), tangent = of_xt.lane(l), at = h(l)](int64_t p, vec& a, vec&) {
                a = fma(at(p), k.rstd * tangent.of(xt.at(p, l), k.xhat(p)), a);
            };
        });
        to_means(n, moved);
        for (int64_t l = 0; l < n.lanes; l += VL) {
            const Point k(x, s, l);
            const auto tangent = of_xt.lane(l), first = of_h.lane(l), second = of_ht.lane(l);
            const vec along_t = second.along + moved.at(l), rstd_t = -(k.rstd * k.rstd) * tangent.along;
            const auto at = h(l);
            const auto at_t = ht(l);
            for (int64_t p = 0; p < n.pixels; ++p) {
                const vec xhat = k.xhat(p), xhat_t = k.rstd * tangent.of(xt.at(p, l), xhat);
                const vec inner_t = at_t(p) - second.mean - fma(xhat, along_t, xhat_t * first.along);
                store(dxt + p * n.lanes + l, fma(k.rstd, inner_t, rstd_t * first.of(at(p), xhat)));
            }
        }
    });
}

namespace {

struct Terms {  // x, dy: what one element adds to dgamma and dbeta
    const Norm& n;
    In x, dy;
    Statistics s;
    Terms(const Norm& n, const Call& c, int64_t row, int64_t slab)
        : n(n), x(n, c, 0, row, slab), dy(n, c, 1, row, slab) {
        s.of(n, x);
    }
    auto lane(int64_t l) const {
        return [this, l, k = Point(x, s, l)](int64_t p, vec& a, vec& b) {
            const vec d = dy.at(p, l);
            a = fma(d, k.xhat(p), a);
            b += d;
        };
    }
};

struct TangentTerms {  // x, dy?, xt?, dyt?
    const Norm& n;
    In x, dy, xt, dyt;
    Statistics s;
    Projection project;
    TangentTerms(const Norm& n, const Call& c, int64_t row, int64_t slab)
        : n(n), x(n, c, 0, row, slab), dy(n, c, 1, row, slab), xt(n, c, 2, row, slab), dyt(n, c, 3, row, slab) {
        s.of(n, x);
        project.of(n, x, s, plain(xt));
    }
    auto lane(int64_t l) const {
        return [this, l, k = Point(x, s, l), tangent = project.lane(l)](int64_t p, vec& a, vec& b) {
            const vec d = dyt.at(p, l), xhat = k.xhat(p);
            a = fma(dy.at(p, l), k.rstd * tangent.of(xt.at(p, l), xhat), fma(d, xhat, a));
            b += d;
        };
    }
};

}  // namespace

// [c]: rows are summed in chunks, so that the sums' error does not grow with the block. Members of a team
// have channels of their own (and the statistics all to themselves: teams are for few and large tasks).
template <class T>
static inline void sum_channels(const Call& c, const Norm& n, float* dgamma, float* dbeta) {
    constexpr int64_t kChunk = 32;
    const Share mine = share(n.lanes / kLane, c);
    const int64_t begin = mine.begin * kLane, end = mine.end * kLane;
    PerChannel a, b;
    bool fresh = c.first;
    for (int64_t row0 = 0; row0 == 0 || row0 < c.n; row0 += kChunk, fresh = false) {
        for (int64_t l = begin; l < end; l += VL) a.set(l, vec{}), b.set(l, vec{});
        for (int64_t row = row0; row < c.n && row < row0 + kChunk; ++row) {
            const T terms(n, c, row, 0);
            for (int64_t l = begin; l < end; l += VL) {
                const Sums s = sum_terms(n.pixels, terms.lane(l));
                a.set(l, a.at(l) + s.a);
                b.set(l, b.at(l) + s.b);
            }
        }
        for (int64_t l = begin; l < end; l += VL) {
            if (dgamma) store(dgamma + l, fresh ? a.at(l) : load(dgamma + l) + a.at(l));
            if (dbeta) store(dbeta + l, fresh ? b.at(l) : load(dbeta + l) + b.at(l));
        }
    }
}

static inline void add_elements(const Norm& n, float* to, int64_t p, int64_t l, vec v) {  // [c, pixels]
    for (int i = 0; i < VL; ++i)
        if (to && l + i < n.channels) to[(l + i) * n.pixels + p] += v[i];
}

// [pixels] or [c, pixels]: members of a team have pixels of their own.
template <class T>
static inline void sum_pixels(const Call& c, const Norm& n, float* dgamma, float* dbeta) {
    const Share mine = share(n.pixels, c);
    const bool each = n.kind == AffineKind::kElement;
    const int64_t planes = each ? n.channels : 1, floats = planes * n.pixels;
    for (float* to : {dgamma, dbeta}) {
        if (!to || !c.first) continue;
        for (int64_t i = 0; i < planes; ++i)
            for (int64_t p = mine.begin; p < mine.end; ++p) to[i * n.pixels + p] = 0.f;
        for (int64_t i = floats; c.part == c.parts - 1 && i < pad_lane(floats); ++i) to[i] = 0.f;
    }
    for (int64_t unit = 0; unit < c.n * n.slabs; ++unit) {
        const T terms(n, c, unit / n.slabs, unit % n.slabs);
        for (int64_t p = mine.begin; p < mine.end; ++p) {
            vec a = vec{}, b = vec{};
            for (int64_t l = 0; l < n.lanes; l += VL) {
                if (each) a = b = vec{};
                terms.lane(l)(p, a, b);
                if (each) add_elements(n, dgamma, p, l, a), add_elements(n, dbeta, p, l, b);
            }
            if (!each && dgamma) dgamma[p] += sum_lanes(a);
            if (!each && dbeta) dbeta[p] += sum_lanes(b);
        }
    }
}

template <class T>
static inline void bwd_weight(const Call& c, int out) {
    const Norm n(c);
    (n.kind == AffineKind::kChannel ? sum_channels<T> : sum_pixels<T>)(c, n, c.f(out), c.f(out + 1));
}

void layernorm_bwd_weight(const Call& c) { bwd_weight<Terms>(c, 2); }  // x, dy, dgamma?, dbeta?
void layernorm_bwd_weight_jvp(const Call& c) {
    bwd_weight<TangentTerms>(c, 4);
}  // x, dy?, xt?, dyt?, dgammat?, dbetat?

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
