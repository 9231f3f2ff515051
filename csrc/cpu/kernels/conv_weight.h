// The weight gradient of conv2d and its tangent: for each row of taps, the outer product of what it reads for a pixel
// (one run of kw * c floats of a strip) with dy of that pixel, summed over pixels in the layout of the packed weight.
#pragma once
#include "conv_strips.h"
#include "linear_tiles.h"

namespace fastmaml {
namespace FASTMAML_ISA {
namespace {

constexpr int64_t kDeepPixels = 96;  // in one chain of products: a few lines of an image, or a few small images

struct Factor {  // dw += x^T dy
    int x, dy;
};

// Some channels of the weight: the runs that rows of taps read, one each, or one per tap where channels are cut.
struct Runs {
    int64_t count, per_row, floats, next, first;  // next: rows of the packed weight from one to the next
    Runs(const Shape& s, int64_t c0, int64_t channels) {
        const bool all = channels == s.c;
        per_row = all ? 1 : s.kw;
        count = s.kh * per_row;
        floats = all ? s.kw * s.c : channels;
        next = all ? floats : s.c;
        first = c0;
    }
};

// The share [begin, end) of the rows of a panel gains the terms' sum. Term t reads strip t % n_strips.
void add_runs(const Runs& runs, const Share& rows, const Outer* terms, int n, int64_t cols, const Strip* strips,
              int n_strips, int64_t width, float* panel, bool begun) {
    for (int64_t q = 0; q < runs.count; ++q) {
        const int64_t at = q * runs.next + runs.first;
        const int64_t begin = rows.begin > at ? rows.begin : at;
        const int64_t end = rows.end < at + runs.floats ? rows.end : at + runs.floats;
        if (begin >= end) continue;
        for (int64_t o = 0; o < width; o += kCols * VL) {
            Outer here[kMaxOuter];
            for (int t = 0; t < n; ++t) {
                here[t] = terms[t];
                const Strip& strip = strips[t % n_strips];
                here[t].x += q / runs.per_row * strip.row + q % runs.per_row * strip.pixel + begin - at;
                here[t].d += o;
            }
            float* dw = panel + begin * width + o;
            outer_columns(width - o < kCols * VL ? width - o : kCols * VL, end - begin, here, n, cols, dw, width,
                          {nullptr, begun ? dw : nullptr, nullptr, 1.f});
        }
    }
}

class WeightGradient {
public:
    WeightGradient(const Call& call, const Factor* factors, int n, float* dw)
        : c(call),
          s(call),
          factors_(factors),
          n_(n),
          dw_(dw),
          rows_(share(s.kh * s.kw * s.c, call)),
          cut_(cut_of(s.c, s.kh, s.kw, s.sh, s.sw, s.ow, s.oh, n)) {}

    void run() const {
        for (int64_t c0 = 0; c0 < s.c; c0 += cut_.channels) {
            const int64_t channels = s.c - c0 < cut_.channels ? s.c - c0 : cut_.channels,
                          group = images_at_once(channels);
            bool begun = !c.first;
            for (int64_t image = 0; image < c.n; image += group) {
                const int64_t images = c.n - image < group ? c.n - image : group;
                for_pieces(cut_, 0, s.oh, s.ow, [&](int64_t row, int64_t rows, int64_t col, int64_t cols) {
                    piece(c0, channels, image, images, row, rows, col, cols, begun);
                    begun = true;
                });
            }
        }
    }

private:
    const Call& c;
    const Shape s;
    const Factor* factors_;
    const int n_;
    float* dw_;
    const Share rows_;
    const Cut cut_;

    int64_t images_at_once(int64_t channels) const {
        if (cut_.rows < s.oh || cut_.cols < s.ow) return 1;
        const int64_t floats = ((s.oh - 1) * s.sh + s.kh) * ((s.ow - 1) * s.sw + s.kw) * channels;
        int64_t images = kDeepPixels / n_ / (s.oh * s.ow);
        if (images > kStripFloats / n_ / floats) images = kStripFloats / n_ / floats;
        if (images > kMaxOuter / n_) images = kMaxOuter / n_;
        return images < 1 ? 1 : images;
    }

    // Some output pixels of some images
    void piece(int64_t c0, int64_t channels, int64_t image, int64_t images, int64_t row, int64_t rows, int64_t col,
               int64_t cols, bool begun) const {
        const Region region = {
            row * s.sh - s.top, col * s.sw - s.left, (rows - 1) * s.sh + s.kh, (cols - 1) * s.sw + s.kw, c0, channels};
        const int64_t padded = pad_lane(s.o);
        Strip strips[2];
        for (int t = 0; t < n_; ++t)
            strips[t] = bring(image_at(c, factors_[t].x, image, s), images, c.stride(factors_[t].x), region,
                              c.scratch + t * (kStripFloats / n_));
        const int64_t fit = kDeepPixels / n_ / cols, few = fit < 1 ? 1 : fit;
        for (int64_t r = 0; r < rows; r += few) {
            const int64_t lines = rows - r < few ? rows - r : few;
            for (int64_t o = 0; o < padded; o += kPanel) {
                Outer terms[kMaxOuter];
                for (int64_t i = 0; i < images; ++i)
                    for (int t = 0; t < n_; ++t) {
                        const Strip& strip = strips[t];
                        const float* dy = c.f(factors_[t].dy) + (image + i) * c.stride(factors_[t].dy);
                        terms[i * n_ + t] = {strip.at + i * strip.image + r * s.sh * strip.row,
                                             s.sw * strip.pixel,
                                             dy + ((row + r) * s.ow + col) * padded + o,
                                             padded,
                                             lines,
                                             s.sh * strip.row,
                                             s.ow * padded};
                    }
                add_runs(Runs(s, c0, channels), rows_, terms, static_cast<int>(images) * n_, cols, strips, n_,
                         packed_width(o / kPanel, s.o), dw_ + o * s.kh * s.kw * s.c, begun || r > 0);
            }
        }
    }
};

void backward_weight(const Call& c, const Factor* factors, int n, float* dw) {
    if (n > 0 && c.n > 0) return WeightGradient(c, factors, n, dw).run();
    if (!c.first) return;
    const Shape s(c);
    const Share zero = share(s.kh * s.kw * s.c * pad_lane(s.o), c);
    std::memset(dw + zero.begin, 0, (zero.end - zero.begin) * sizeof(float));
}

// db = sum of dy over pixels
void backward_bias(const Call& c, int operand, float* db) {
    const Shape s(c);
    const int64_t padded = pad_lane(s.o), pixels = s.oh * s.ow;
    const Share lanes = share(padded / kLane, c);
    for (int64_t o = lanes.begin * kLane; o < lanes.end * kLane; o += VL) {
        vec sum = c.first ? vec{} : load(db + o);
        for (int64_t image = 0; image < c.n; ++image) {
            const float* dy = c.f(operand) + image * c.stride(operand) + o;
            for (int64_t i = 0; i < pixels;) {
                vec chain{};
                for (const int64_t stop = pixels - i < kDeepPixels ? pixels : i + kDeepPixels; i < stop; ++i)
                    chain += load(dy + i * padded);
                sum += chain;
            }
        }
        store(db + o, sum);
    }
}

}  // namespace
}  // namespace FASTMAML_ISA
}  // namespace fastmaml
