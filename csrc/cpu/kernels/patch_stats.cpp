// Batch statistics of a convolution of the samples from the moments of its patches (plan/patches.py). All in double: of
// neighbouring pixels, which are nearly equal, a filter takes the small difference. A patch stands in the order of the
// packed weight's rows, in the Plan's arrays in that of the plain weight.
#include <math.h>

#include "conv_strips.h"
#include "doubles.h"

namespace fastmaml {
namespace FASTMAML_ISA {
namespace {

constexpr int64_t kMostPatch = 160;  // MOST in plan/patches.py
constexpr int64_t kPixels = 64;      // whose patches go through all products together
constexpr int kTileRows = 4, kTileCols = VL == 16 ? 4 : 2;
static_assert(kStripFloats * sizeof(float) + (kMostPatch + 1 + kPixels) * kMostPatch * sizeof(double) <= kScratchBytes,
              "scratch");

int64_t pad_double(int64_t n) { return (n + 7) / 8 * 8; }

// ---------------------------------------------------------------------------------------------------- moments
// Of pixels' patches [pixels][ld]: rows [0, R) of the sums of their outer products gain these pixels' share.
template <int R, int C>
void tile(const double* patches, int64_t ld, int64_t pixels, int64_t row, int64_t col, double* sums) {
    dvec acc[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) acc[r][c] = load(sums + r * ld + c * DL);
    for (int64_t i = 0; i < pixels; ++i, patches += ld) {
        dvec b[C];
        for (int c = 0; c < C; ++c) b[c] = load(patches + col + c * DL);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const dvec a = splat(patches[row + r]);
#pragma GCC unroll 16
            for (int c = 0; c < C; ++c) acc[r][c] = fma(a, b[c], acc[r][c]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) store(sums + r * ld + c * DL, acc[r][c]);
}

template <int R>
void tile_row(const double* patches, int64_t ld, int64_t pixels, int64_t row, double* sums) {  // from the diagonal on
    int64_t col = row / DL * DL;
    for (; col + kTileCols * DL <= ld; col += kTileCols * DL)
        tile<R, kTileCols>(patches, ld, pixels, row, col, sums + row * ld + col);
    for (; col < ld; col += DL) tile<R, 1>(patches, ld, pixels, row, col, sums + row * ld + col);
}

class Moments {  // of the support rows; a team shares the rows of C
public:
    explicit Moments(const Call& call)
        : c(call),
          s(call),
          size_(s.kh * s.kw * s.c),
          ld_(pad_double(size_)),
          rows_(share((size_ + kTileRows - 1) / kTileRows, call)),
          total_(reinterpret_cast<double*>(call.scratch + kStripFloats)),
          sums_(total_ + ld_),
          patches_(sums_ + size_ * ld_) {
        std::memset(total_, 0, (1 + size_ + kPixels) * ld_ * sizeof(double));
    }

    void run() {
        const Cut cut = cut_of(s.c, s.kh, s.kw, s.sh, s.sw, s.ow, s.oh, 1, s.c);
        for (int64_t image = 0; image < c.task->n_support; ++image)
            for_pieces(cut, 0, s.oh, s.ow, [&](int64_t row, int64_t rows, int64_t col, int64_t cols) {
                const Region region = {row * s.sh - s.top,
                                       col * s.sw - s.left,
                                       (rows - 1) * s.sh + s.kh,
                                       (cols - 1) * s.sw + s.kw,
                                       0,
                                       s.c};
                const Strip strip = bring(image_at(c, 0, image, s), 1, 0, region, c.scratch);
                for (int64_t r = 0; r < rows; ++r)
                    for (int64_t q = 0; q < cols; ++q)
                        take(strip.at + r * s.sh * strip.row + q * s.sw * strip.pixel, strip.row);
            });
        add();
        write();
    }

private:
    const Call& c;
    const Shape s;
    const int64_t size_, ld_;
    const Share rows_;
    double *total_, *sums_, *patches_;  // sum of the patches, of their products (from the diagonal on); some patches
    int64_t pixels_ = 0;

    void take(const float* at, int64_t line) {
        double* to = patches_ + pixels_ * ld_;
        const int64_t run = s.kw * s.c;
        for (int64_t a = 0; a < s.kh; ++a, at += line, to += run)
            for (int64_t i = 0; i < run; ++i) to[i] = at[i];
        if (++pixels_ == kPixels) add();
    }

    void add() {
        for (int64_t j = 0; j < ld_; j += DL) {
            dvec sum = load(total_ + j);
            for (int64_t i = 0; i < pixels_; ++i) sum += load(patches_ + i * ld_ + j);
            store(total_ + j, sum);
        }
        for (int64_t i = rows_.begin * kTileRows; i < rows_.end * kTileRows; i += kTileRows) {
            switch (size_ - i) {
                case 1:
                    tile_row<1>(patches_, ld_, pixels_, i, sums_);
                    break;
                case 2:
                    tile_row<2>(patches_, ld_, pixels_, i, sums_);
                    break;
                case 3:
                    tile_row<3>(patches_, ld_, pixels_, i, sums_);
                    break;
                default:
                    tile_row<4>(patches_, ld_, pixels_, i, sums_);
            }
        }
        pixels_ = 0;
    }

    void write() const {
        const int64_t floats = (1 + size_) * size_, taps = s.kh * s.kw;
        const double n = static_cast<double>(c.task->n_support * s.oh * s.ow);
        float* out = c.f(1);
        auto put = [&](int64_t at, double v) {
            const float high = static_cast<float>(v);
            out[at] = high, out[floats + at] = static_cast<float>(v - high);
        };
        const int64_t end = rows_.end * kTileRows < size_ ? rows_.end * kTileRows : size_;
        for (int64_t i = rows_.begin * kTileRows; i < end; ++i) {
            const int64_t pi = packed_input(i, size_, taps);
            for (int64_t j = i; j < size_; ++j) {
                const int64_t pj = packed_input(j, size_, taps);
                const double v = sums_[i * ld_ + j] / n - total_[i] / n * (total_[j] / n);
                put((1 + pi) * size_ + pj, v), put((1 + pj) * size_ + pi, v);
            }
        }
        if (c.part != 0) return;
        for (int64_t i = 0; i < size_; ++i) put(packed_input(i, size_, taps), total_[i] / n);
        for (int64_t i = 2 * floats; i < pad_lane(2 * floats); ++i) out[i] = 0.f;
    }
};

// ---------------------------------------------------------------------------------------------------- statistics
struct Patches {  // m and C in the order of the weight's rows; sizes {channels, taps, outputs}
    int64_t size, ld, outputs;
    double *mean, *covariance;
    explicit Patches(const Call& c)
        : size(c.sizes[0] * c.sizes[1]),
          ld(pad_double(size)),
          outputs(c.sizes[2]),
          mean(reinterpret_cast<double*>(c.scratch)),
          covariance(mean + ld) {
        const int64_t floats = (1 + size) * size, taps = c.sizes[1];
        const float *high = c.f(0), *low = high + floats;
        for (int64_t i = 0; i < size; ++i) {
            const int64_t pi = packed_input(i, size, taps), row = (1 + pi) * size;
            mean[i] = static_cast<double>(high[pi]) + low[pi];
            for (int64_t j = 0; j < ld; ++j) {
                const int64_t pj = row + packed_input(j, size, taps);
                covariance[i * ld + j] = j < size ? static_cast<double>(high[pj]) + low[pj] : 0.0;
            }
        }
    }
};

// body(first of DL outputs, where their column of a packed weight begins, width of its rows); a share of the outputs
template <class F>
void for_outputs(const Call& c, const Patches& p, F body) {
    const Share lanes = share(pad_lane(p.outputs) / kLane, c);
    for (int64_t o = lanes.begin * kLane; o < lanes.end * kLane; o += DL)
        body(o, o / kPanel * kPanel * p.size + o % kPanel, packed_width(o / kPanel, p.outputs));
}

// body(i, row i of C w, row i of C wt) for DL outputs; zero where wt is null
template <class F>
void for_rows(const Patches& p, const float* w, const float* wt, int64_t width, F body) {
    constexpr int R = 8;
    for (int64_t i = 0; i < p.size; i += R) {
        dvec y[R], yt[R];
        for (int r = 0; r < R; ++r) y[r] = yt[r] = dvec{};
        for (int64_t j = 0; j < p.size; ++j) {
            const double* column = p.covariance + j * p.ld + i;  // or row: it is symmetric
            const dvec v = load_double(w + j * width), vt = wt ? load_double(wt + j * width) : dvec{};
            for (int r = 0; r < R; ++r) y[r] = fma(splat(column[r]), v, y[r]);
            for (int r = 0; wt && r < R; ++r) yt[r] = fma(splat(column[r]), vt, yt[r]);
        }
        for (int r = 0; r < R && i + r < p.size; ++r) body(i + r, y[r], yt[r]);
    }
}

dvec channel(const Call& c, int i, int64_t o, double absent = 0.0) {
    return c.operands[i] ? load_double(c.f(i) + o) : splat(absent);
}

}  // namespace

void patch_moments_fwd(const Call& c) { Moments(c).run(); }

void patch_stats_fwd(const Call& c) {  // moments, w, mean, rstd
    const Patches p(c);
    for_outputs(c, p, [&](int64_t o, int64_t at, int64_t width) {
        const float* w = c.f(1) + at;
        dvec mean{}, var{};
        for_rows(p, w, nullptr, width, [&](int64_t i, dvec y, dvec) {
            const dvec v = load_double(w + i * width);
            mean = fma(splat(p.mean[i]), v, mean);
            var = fma(v, y, var);
        });
        store_float(c.f(2) + o, mean);
        for (int l = 0; l < DL; ++l)
            c.f(3)[o + l] =
                o + l < p.outputs ? static_cast<float>(1.0 / sqrt((var[l] < 0 ? 0 : var[l]) + c.numbers[0])) : 0.f;
    });
}

void patch_stats_jvp(const Call& c) {  // moments, w, rstd, wt, meant, rstdt
    const Patches p(c);
    for_outputs(c, p, [&](int64_t o, int64_t at, int64_t width) {
        const float* wt = c.f(3) + at;
        dvec mean_t{}, product{};
        for_rows(p, c.f(1) + at, nullptr, width, [&](int64_t i, dvec y, dvec) {
            const dvec v = load_double(wt + i * width);
            mean_t = fma(splat(p.mean[i]), v, mean_t);
            product = fma(v, y, product);
        });
        const dvec rstd = channel(c, 2, o);
        store_float(c.f(4) + o, mean_t);
        store_float(c.f(5) + o, -(rstd * rstd * rstd) * product);
    });
}

void patch_stats_bwd(const Call& c) {  // moments, w, gamma?, rstd, s1, s2, dw
    const Patches p(c);
    for_outputs(c, p, [&](int64_t o, int64_t at, int64_t width) {
        const dvec rstd = channel(c, 3, o), scale = -channel(c, 2, o, 1.0) * rstd;
        const dvec a = scale * channel(c, 4, o), e = scale * rstd * channel(c, 5, o);
        float* dw = c.f(6) + at;
        for_rows(p, c.f(1) + at, nullptr, width,
                 [&](int64_t i, dvec y, dvec) { store_float(dw + i * width, fma(a, splat(p.mean[i]), e * y)); });
    });
}

// moments, w, gamma?, rstd, s1?, s2?, wt?, gammat?, rstdt?, s1t?, s2t?, dwt: the product rule on patch_stats_bwd
void patch_stats_bwd_jvp(const Call& c) {
    const Patches p(c);
    for_outputs(c, p, [&](int64_t o, int64_t at, int64_t width) {
        const dvec gamma = -channel(c, 2, o, 1.0), rstd = channel(c, 3, o), s1 = channel(c, 4, o),
                   s2 = channel(c, 5, o), rstd_t = channel(c, 8, o);
        const dvec scale = gamma * rstd, scale_t = gamma * rstd_t - channel(c, 7, o) * rstd;
        const dvec a_t = scale_t * s1 + scale * channel(c, 9, o);
        const dvec e = scale * rstd * s2;
        const dvec e_t = (scale_t * rstd + scale * rstd_t) * s2 + scale * rstd * channel(c, 10, o);
        const float* wt = c.f(6) ? c.f(6) + at : nullptr;
        float* dwt = c.f(11) + at;
        for_rows(p, c.f(1) + at, wt, width, [&](int64_t i, dvec y, dvec yt) {
            store_float(dwt + i * width, fma(a_t, splat(p.mean[i]), fma(e_t, y, e * yt)));
        });
    });
}

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
