// Strips of images for conv2d: the rows and columns that a few output rows read, brought together with zeros around and
// without padded channels.
#pragma once
#include "../simd.h"

namespace fastmaml {
namespace FASTMAML_ISA {

struct Shape {  // Instruction::sizes of every conv2d kernel
    int64_t c, h, w, o, kh, kw, sh, sw, top, left, oh, ow;
    bool planes;  // x is the caller's own: [c][h][w] instead of [h][w][c padded]
    explicit Shape(const Call& call)
        : c(call.sizes[0]),
          h(call.sizes[1]),
          w(call.sizes[2]),
          o(call.sizes[3]),
          kh(call.sizes[4]),
          kw(call.sizes[5]),
          sh(call.sizes[6]),
          sw(call.sizes[7]),
          top(call.sizes[8]),
          left(call.sizes[9]),
          oh(call.sizes[10]),
          ow(call.sizes[11]),
          planes(call.sizes[12] != 0) {}
};

struct Image {
    const float* p;
    int64_t c, h, w;
    bool planes;
};

struct Region {  // rows and columns may lie outside of the image
    int64_t row, col, rows, cols, c0, channels;
};

struct Strip {  // floats from one row, pixel, image to the next
    const float* at;
    int64_t row, pixel, image;
};

static constexpr int64_t kStripFloats = 64 * 1024, kWeightFloats = 80 * 1024;  // what each kernel has of its scratch
static_assert((kStripFloats + kWeightFloats + 4096) * 4 <= kScratchBytes, "scratch");

// body(row of the image, where it goes, first and last column of the region inside) for the rows of a region; those
// outside of the image become zeros
template <class F>
static inline void for_region(const Image& from, const Region& r, float* to, F body) {
    int64_t begin = r.col < 0 ? -r.col : 0, end = from.w - r.col < r.cols ? from.w - r.col : r.cols;
    if (begin > r.cols) begin = r.cols;
    if (end < begin) end = begin;
    for (int64_t i = 0; i < r.rows; ++i, to += r.cols * r.channels) {
        const int64_t h = r.row + i;
        if (h >= 0 && h < from.h)
            body(h, to, begin, end);
        else
            std::memset(to, 0, r.cols * r.channels * sizeof(float));
    }
}

static void bring_planes(const Image& from, const Region& r, float* to) {
    for_region(from, r, to, [&](int64_t h, float* row, int64_t begin, int64_t end) {
        for (int64_t c = 0; c < r.channels; ++c) {
            const float* plane = from.p + ((r.c0 + c) * from.h + h) * from.w + r.col;
            int64_t j = 0;
            for (; j < begin; ++j) row[j * r.channels + c] = 0.f;
            for (; j < end; ++j) row[j * r.channels + c] = plane[j];
            for (; j < r.cols; ++j) row[j * r.channels + c] = 0.f;
        }
    });
}

static void bring_pixels(const Image& from, const Region& r, float* to) {
    const int64_t padded = pad_lane(from.c);
    for_region(from, r, to, [&](int64_t h, float* row, int64_t begin, int64_t end) {
        const float* pixel = from.p + (h * from.w + r.col + begin) * padded + r.c0;
        std::memset(row, 0, begin * r.channels * sizeof(float));
        row += begin * r.channels;
        if (r.channels == padded) {
            std::memcpy(row, pixel, (end - begin) * padded * sizeof(float));
            row += (end - begin) * padded;
        } else {
            for (int64_t j = begin; j < end; ++j, pixel += padded, row += r.channels)
                std::memcpy(row, pixel, r.channels * sizeof(float));
        }
        std::memset(row, 0, (r.cols - end) * r.channels * sizeof(float));
    });
}

// How a source is cut so that its strips fit: channels at a time, and of those output columns and rows at a time. The
// channels (which alone change a sum's order) follow from the layer's shape; `least` of them stay together.
struct Cut {
    int64_t channels, cols, rows;
};
static Cut cut_of(int64_t channels, int64_t kh, int64_t kw, int64_t sh, int64_t sw, int64_t cols, int64_t rows, int n,
                  int64_t least = kLane) {
    const int64_t room = kStripFloats / n;
    auto floats = [&](const Cut& k) { return ((k.rows - 1) * sh + kh) * ((k.cols - 1) * sw + kw) * k.channels; };
    Cut cut = {channels, cols, 1};
    while (floats(cut) > room && cut.channels > least) cut.channels = pad_lane((cut.channels + 1) / 2);
    while (floats(cut) > room && cut.cols > 1) cut.cols = (cut.cols + 1) / 2;
    const int64_t line = ((cut.cols - 1) * sw + kw) * cut.channels, lines = room / line;
    if (lines > kh) cut.rows = (lines - kh) / sh + 1;
    if (cut.rows > rows) cut.rows = rows;
    return cut;
}

// The same region of some images, `stride` floats apart: copied to `to`, or in place where nothing is missing.
static Strip bring(const Image& first, int64_t images, int64_t stride, const Region& r, float* to) {
    const bool inside = r.row >= 0 && r.col >= 0 && r.row + r.rows <= first.h && r.col + r.cols <= first.w;
    const int64_t padded = pad_lane(first.c), floats = r.rows * r.cols * r.channels;
    if (!first.planes && inside && r.channels == padded)
        return {first.p + (r.row * first.w + r.col) * padded, first.w * padded, padded, stride};
    Image from = first;
    for (int64_t i = 0; i < images; ++i, from.p += stride, to += floats)
        first.planes ? bring_planes(from, r, to) : bring_pixels(from, r, to);
    return {to - images * floats, r.cols * r.channels, r.channels, floats};
}

// Image i of an operand that is the layer's input.
static inline Image image_at(const Call& c, int operand, int64_t i, const Shape& s) {
    return {c.f(operand) + i * c.stride(operand), s.c, s.h, s.w, s.planes && operand == 0};
}

static constexpr int64_t kBlock = 96;  // output pixels that go through all of the weights together

// How many images of `pixels` output pixels make a block, where strips of whole images of that many floats fit.
static inline int64_t images_together(int64_t pixels, int64_t floats, int64_t room) {
    const int64_t fit = floats ? room / floats : kBlock, images = pixels ? kBlock / pixels : 1;
    return images < 1 || fit < 1 ? 1 : images < fit ? images : fit;
}

// body(image, images, first line, lines): the share of n images of `height` lines; up to `together` whole images at
// once
template <class F>
static void for_lines(const Call& c, int64_t height, int64_t together, F body) {
    const Share s = share(c.n * height, c);
    for (int64_t line = s.begin; line < s.end;) {
        const int64_t image = line / height, first = line % height, whole = (s.end - line) / height;
        if (first == 0 && whole > 0) {
            const int64_t images = whole < together ? whole : together;
            body(image, images, 0, height);
            line += images * height;
            continue;
        }
        const int64_t lines = s.end - line < height - first ? s.end - line : height - first;
        body(image, 1, first, lines);
        line += lines;
    }
}

// body(row, rows, col, cols): an output of `lines` rows from `first` on, in the pieces that fit
template <class F>
static void for_pieces(const Cut& cut, int64_t first, int64_t lines, int64_t width, F body) {
    for (int64_t col = 0; col < width; col += cut.cols)
        for (int64_t r = first; r < first + lines; r += cut.rows)
            body(r, first + lines - r < cut.rows ? first + lines - r : cut.rows, col,
                 width - col < cut.cols ? width - col : cut.cols);
}

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
