// conv2d in all modes, direct, on images [h][w][channels] and packed weights [tap][channel][outputs] (plan.h). A strip
// of the input is brought together first, with its zero padding and without padded channels, so that all that one row
// of taps reads for a pixel lies in one run of kw * c floats: what is left is the matrix product of linear_tiles.h over
// a few such runs. The transposed convolution is the same on dy, with transposed weights, once for each residue of the
// stride. A sum is made of pieces in an order that depends on the shape of the layer alone.
#include "conv_weight.h"
#include "gate.h"

namespace fastmaml {
namespace FASTMAML_ISA {
namespace {

struct Term {  // one product of a sum: a strip and its weights, [row of taps][col of taps][channel][width]
    Strip strip;
    const float* w;
};

struct Product {
    int64_t taps_h, runs;    // rows of taps, and runs in each of them: one, or one per tap where channels are cut
    int64_t run, next;       // floats of a run, and rows of the weights from one run to the next
    int64_t width;           // of a row of the weights: columns of the output
    int64_t step_h, step_w;  // from one output pixel to the next, in pixels of the strip
    float* y;
    int64_t y_row, y_pixel, y_image;  // floats from one output row, pixel, image to the next
    const float* bias;                // or null
    bool begun;                       // adds to what is there
    Activation act;                   // of the finished sum: its mask lies as y
};

// ---------------------------------------------------------------------------------------------------- tiles
// As linear_tiles.h, but of pixels that lie anywhere: whatever the sides of an image, a tile is full.
constexpr int pixels_of(int vectors) { return VL == 16 ? (vectors == 4 ? 6 : 8) : vectors == 1 ? 8 : 6; }
constexpr int kMaxRuns = 16;

struct Run {
    const float* x;
    const int32_t* at;  // where each pixel's run begins
    const float* w;
};

struct Output {
    float* y;
    const int32_t* at;
    const float* bias;  // or null
    bool begun;
};

// Unrolled by order: see outer_tile.
template <int R, int C>
inline void tile_of_pixels(const Run* runs, int n, int64_t k, int64_t width, int64_t first, int64_t col,
                           const Output& out) {
    vec acc[R][C];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int c = 0; c < C; ++c) acc[r][c] = vec{};
    for (int run = 0; run < n; ++run) {
        const float* x[R];
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) x[r] = runs[run].x + runs[run].at[first + r];
        const float* w = runs[run].w + col;
        for (int64_t i = 0; i < k; ++i, w += width) {
            vec b[C];
#pragma GCC unroll 16
            for (int c = 0; c < C; ++c) b[c] = load(w + c * VL);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                const vec a = splat(x[r][i]);
#pragma GCC unroll 16
                for (int c = 0; c < C; ++c) acc[r][c] = fma(a, b[c], acc[r][c]);
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        float* y = out.y + out.at[first + r] + col;
#pragma GCC unroll 16
        for (int c = 0; c < C; ++c) {
            if (out.begun) acc[r][c] = load(y + c * VL) + acc[r][c];
            if (!out.begun && out.bias) acc[r][c] = load(out.bias + col + c * VL) + acc[r][c];
            store(y + c * VL, acc[r][c]);
        }
    }
}

template <int R, int C>
inline void some_pixels(int64_t pixels, const Run* runs, int n, int64_t k, int64_t width, int64_t first, int64_t col,
                        const Output& out) {
    if (pixels >= R) return tile_of_pixels<R, C>(runs, n, k, width, first, col, out);
    if constexpr (R > 1) some_pixels<R - 1, C>(pixels, runs, n, k, width, first, col, out);
}

template <int C>
void column_of_pixels(int64_t pixels, const Run* runs, int n, int64_t k, int64_t width, int64_t col,
                      const Output& out) {
    constexpr int R = pixels_of(C);
    for (int64_t p = 0; p < pixels;) {
        const int64_t left = pixels - p, here = left < R ? left : left < 2 * R && left > R ? (left + 1) / 2 : R;
        some_pixels<R, C>(here, runs, n, k, width, p, col, out);
        p += here;
    }
}

// All columns of some pixels: sums over n runs of k products each
void all_columns(int64_t pixels, const Run* runs, int n, int64_t k, int64_t width, const Output& out) {
    for (int64_t col = 0; col < width; col += kCols * VL) {
        switch ((width - col < kCols * VL ? width - col : kCols * VL) / VL) {
            case 1:
                column_of_pixels<1>(pixels, runs, n, k, width, col, out);
                break;
            case 2:
                column_of_pixels<2>(pixels, runs, n, k, width, col, out);
                break;
#if defined(__AVX512F__)
            case 3:
                column_of_pixels<3>(pixels, runs, n, k, width, col, out);
                break;
            default:
                column_of_pixels<4>(pixels, runs, n, k, width, col, out);
                break;
#endif
        }
    }
}

// The activation of some pixels, while they are in the first-level cache
void activate(int64_t pixels, int64_t width, const Output& out, const Activation& act) {
    with_gate(act.gate, [&](auto gate) {
        if constexpr (gate() != Gate::kNone)
            for (int64_t p = 0; p < pixels; ++p)
                for (int64_t i = out.at[p]; i < out.at[p] + width; i += VL)
                    store(out.y + i, act.template apply<gate()>(load(out.y + i), 0, i));
    });
}

// Where the pixels [first, first + n) of some images' strips begin
void find(int32_t* at, int64_t first, int64_t n, int64_t rows, int64_t cols, int64_t image, int64_t row,
          int64_t pixel) {
    int64_t c = first % cols, r = first / cols % rows, i = first / cols / rows;
    for (int64_t k = 0; k < n; ++k) {
        at[k] = static_cast<int32_t>(i * image + r * row + c * pixel);
        if (++c == cols) {
            c = 0;
            if (++r == rows) r = 0, ++i;
        }
    }
}

// Some strips' worth of the output: chains of about kDepth products each; short runs go together.
void multiply(const Term* terms, int n_terms, const Product& p, int64_t images, int64_t rows, int64_t cols) {
    const int64_t runs = p.taps_h * p.runs, most = kMaxRuns / (n_terms ? n_terms : 1);
    const int64_t fit = p.run ? kDepth / p.run : 1, together = fit < 1 ? 1 : fit < most ? fit : most;
    int32_t at[2][kBlock], y_at[kBlock];
    const int64_t total = images * rows * cols;
    for (int64_t first = 0; first < total; first += kBlock) {
        const int64_t pixels = total - first < kBlock ? total - first : kBlock;
        find(y_at, first, pixels, rows, cols, p.y_image, p.y_row, p.y_pixel);
        for (int t = 0; t < n_terms; ++t) {
            const Strip& x = terms[t].strip;
            find(at[t], first, pixels, rows, cols, x.image, p.step_h * x.row, p.step_w * x.pixel);
        }
        Output out = {p.y, y_at, p.bias, p.begun};
        Run some[kMaxRuns];
        for (int64_t q0 = 0; q0 < runs; q0 += together) {
            for (int64_t i = 0; i < p.run;) {
                const int64_t depth = p.run - i < kDepth + kDepth / 2 ? p.run - i : kDepth;
                int n = 0;
                for (int t = 0; t < n_terms; ++t)
                    for (int64_t q = q0; q < runs && q < q0 + together; ++q) {
                        const Strip& s = terms[t].strip;
                        some[n++] = {s.at + q / p.runs * s.row + q % p.runs * s.pixel + i, at[t],
                                     terms[t].w + (q * p.next + i) * p.width};
                    }
                all_columns(pixels, some, n, depth, p.width, out);
                out.begun = true;
                i += depth;
            }
        }
        if (!out.begun) all_columns(pixels, some, 0, 0, p.width, out);  // no tap reaches these pixels
        activate(pixels, p.width, out, p.act);
    }
}

struct Source {  // an image operand against a weight
    int operand;
    const float* w;
};

// What follows the sums that go to `y`, a place of operand `out`, once they are `finished`; the mask is the next
// operand
Activation activation_at(const Call& c, int out, const float* y, bool finished) {
    return finished ? activation_of(c, out + 1).at(0, y - c.f(out)) : kLinear;
}

// ---------------------------------------------------------------------------------------------------- forward
// y = act(bias + sum over sources of x * w)
void forward(const Call& c, const Source* sources, int n, const float* bias, int out) {
    const Shape s(c);
    const int64_t padded = pad_lane(s.o);
    const Cut cut = cut_of(s.c, s.kh, s.kw, s.sh, s.sw, s.ow, s.oh, n ? n : 1);
    const bool whole = cut.rows >= s.oh && cut.cols >= s.ow;
    const int64_t floats = ((s.oh - 1) * s.sh + s.kh) * ((s.ow - 1) * s.sw + s.kw) * cut.channels;
    const int64_t together = whole ? images_together(s.oh * s.ow, floats, kStripFloats / (n ? n : 1)) : 1;
    for_lines(c, s.oh, together, [&](int64_t image, int64_t images, int64_t first, int64_t lines) {
        for_pieces(cut, first, lines, s.ow, [&](int64_t row, int64_t rows, int64_t col, int64_t cols) {
            for (int64_t c0 = 0; c0 < s.c; c0 += cut.channels) {
                const int64_t channels = s.c - c0 < cut.channels ? s.c - c0 : cut.channels;
                const bool all = channels == s.c;
                const Region region = {row * s.sh - s.top,
                                       col * s.sw - s.left,
                                       (rows - 1) * s.sh + s.kh,
                                       (cols - 1) * s.sw + s.kw,
                                       c0,
                                       channels};
                Term terms[2];
                for (int t = 0; t < n; ++t)
                    terms[t].strip = bring(image_at(c, sources[t].operand, image, s), images,
                                           c.stride(sources[t].operand), region, c.scratch + t * (kStripFloats / n));
                Product p;
                p.taps_h = n ? s.kh : 0, p.runs = all ? 1 : s.kw, p.step_h = s.sh, p.step_w = s.sw;
                p.run = all ? s.kw * s.c : channels, p.next = all ? p.run : s.c;
                p.y_pixel = padded, p.y_row = s.ow * padded, p.y_image = c.stride(out), p.begun = c0 > 0;
                for (int64_t o = 0; o < padded; o += kPanel) {
                    p.width = packed_width(o / kPanel, s.o);
                    p.y = c.f(out) + image * c.stride(out) + row * p.y_row + col * padded + o;
                    p.bias = bias ? bias + o : nullptr;
                    p.act = activation_at(c, out, p.y, c0 + channels == s.c);
                    for (int t = 0; t < n; ++t) terms[t].w = sources[t].w + o * s.kh * s.kw * s.c + c0 * p.width;
                    multiply(terms, n, p, images, rows, cols);
                }
            }
        });
    });
}

// ---------------------------------------------------------------------------------------------------- bwd_input
// The pixels of dx in one residue of the stride along one axis: `count` of them from `start` on; the taps that reach
// them, `taps` of them from the last one down in steps of the stride, in the order in which they meet dy; and where
// the first of those meets it for the first pixel.
struct Axis {
    int64_t start, count, taps, last, offset;
    Axis(int64_t residue, int64_t size, int64_t kernel, int64_t stride, int64_t before) {
        start = residue;
        count = size > residue ? (size - residue + stride - 1) / stride : 0;
        const int64_t tap = (residue + before) % stride;  // the first one that divides
        taps = kernel > tap ? (kernel - tap + stride - 1) / stride : 0;
        last = tap + (taps - 1) * stride;
        offset = taps ? (residue + before - last) / stride : 0;
    }
};

// Weights [o][c][tap] of some rows of taps, `cols` input channels from k on and some outputs, as [tap][o][cols]
void transpose_weights(const Shape& s, const float* w, const Axis& h, const Axis& v, int64_t a0, int64_t a1, int64_t o0,
                       int64_t outputs, int64_t k, int64_t cols, float* to) {
    const int64_t in = s.kh * s.kw * s.c;
    for (int64_t a = a0; a < a1; ++a)
        for (int64_t b = 0; b < v.taps; ++b) {
            const int64_t tap = (h.last - a * s.sh) * s.kw + v.last - b * s.sw;
            for (int64_t o = o0; o < o0 + outputs;) {
                const int64_t width = packed_width(o / kPanel, s.o);
                int64_t outs = kPanel - o % kPanel;
                if (outs > o0 + outputs - o) outs = o0 + outputs - o;
                const float* from = w + o / kPanel * kPanel * in + (tap * s.c + k) * width + o % kPanel;
                transpose_piece(from, width, s.c - k, cols, outs, to);
                to += outs * cols;
                o += outs;
            }
        }
}

// dx for `cols` input channels from k on, of a panel of `panel`, and one residue: dy's channels, and the rows of taps,
// a few at a time, which depends on the panel alone
void backward_residue(const Call& c, const Shape& s, const Source* sources, int n, int out, const Axis& h,
                      const Axis& v, int64_t k, int64_t cols, int64_t panel) {
    const int64_t taps_w = v.taps ? v.taps : 1, room = kWeightFloats / n, padded = pad_lane(s.c);
    Cut cut = cut_of(s.o, h.taps ? h.taps : 1, taps_w, 1, 1, v.count, h.count, n);
    while (taps_w * cut.channels * panel > room && cut.channels > kLane)
        cut.channels = pad_lane((cut.channels + 1) / 2);
    const int64_t fit = room / (taps_w * cut.channels * panel), group = fit < 1 ? 1 : fit;
    const bool whole = cut.rows >= h.count && cut.cols >= v.count;
    const int64_t floats = (h.count - 1 + h.taps) * (v.count - 1 + v.taps) * cut.channels;
    const int64_t together = whole ? images_together(h.count * v.count, floats, kStripFloats / n) : 1;
    bool begun = false;
    for (int64_t o0 = 0; o0 < s.o; o0 += cut.channels) {
        const int64_t outputs = s.o - o0 < cut.channels ? s.o - o0 : cut.channels;
        int64_t a = 0;
        do {
            const int64_t taps = v.taps == 0 ? 0 : h.taps - a < group ? h.taps - a : group;
            const bool finished = o0 + outputs == s.o && a + (taps ? taps : 1) >= h.taps;
            Term terms[2];
            for (int t = 0; t < n; ++t) {
                float* to = c.scratch + kStripFloats + t * room;
                transpose_weights(s, sources[t].w, h, v, a, a + taps, o0, outputs, k, cols, to);
                terms[t].w = to;
            }
            Product p;
            p.taps_h = taps, p.runs = 1, p.run = p.next = v.taps * outputs, p.width = cols, p.step_h = p.step_w = 1;
            p.y_row = s.sh * s.w * padded, p.y_pixel = s.sw * padded, p.y_image = c.stride(out);
            p.bias = nullptr, p.begun = begun;
            for_lines(c, h.count, together, [&](int64_t image, int64_t images, int64_t first, int64_t lines) {
                for_pieces(cut, first, lines, v.count, [&](int64_t row, int64_t rows, int64_t col, int64_t width) {
                    const Region region = {
                        row + h.offset + a, col + v.offset, rows - 1 + taps, width - 1 + v.taps, o0, outputs};
                    const int products = taps ? n : 0;  // none: no tap reaches these pixels
                    for (int t = 0; t < products; ++t) {
                        const float* dy = c.f(sources[t].operand) + image * c.stride(sources[t].operand);
                        terms[t].strip = bring({dy, s.o, s.oh, s.ow, false}, images, c.stride(sources[t].operand),
                                               region, c.scratch + t * (kStripFloats / n));
                    }
                    p.y = c.f(out) + image * c.stride(out) + k +
                          ((h.start + row * s.sh) * s.w + v.start + col * s.sw) * padded;
                    p.act = activation_at(c, out, p.y, finished);
                    multiply(terms, products, p, images, rows, width);
                });
            });
            begun = true;
            a += taps ? taps : 1;
        } while (a < h.taps);
    }
}

// A team shares the lines of the images, or, where these are so few that transposing the weights counts, the channels.
void backward_input(const Call& c, const Source* sources, int n, int out) {
    constexpr int64_t kFewPixels = 512;
    const Shape s(c);
    Call mine = c;
    Share lanes = {0, pad_lane(s.c) / kLane};
    if (c.n * s.h * s.w < kFewPixels && lanes.end >= c.parts) {
        lanes = share(lanes.end, c);
        mine.part = 0, mine.parts = 1;
    }
    int64_t panel = kPanel;  // input channels at a time: fewer where a row of taps is long, or its weights do not fit
    while (panel > kLane && s.kw * kLane * panel > kWeightFloats / n) panel /= 2;
    for (int64_t k = 0; k < pad_lane(s.c); k += panel) {
        const int64_t cols = pad_lane(s.c) - k < panel ? pad_lane(s.c) - k : panel;
        const int64_t begin = lanes.begin * kLane > k ? lanes.begin * kLane : k;
        const int64_t end = lanes.end * kLane < k + cols ? lanes.end * kLane : k + cols;
        if (begin >= end) continue;
        for (int64_t i = 0; i < s.sh; ++i)
            for (int64_t j = 0; j < s.sw; ++j) {
                const Axis h(i, s.h, s.kh, s.sh, s.top), v(j, s.w, s.kw, s.sw, s.left);
                if (h.count && v.count) backward_residue(mine, s, sources, n, out, h, v, begin, end - begin, cols);
            }
    }
}

}  // namespace

void conv2d_fwd(const Call& c) {
    const Source source = {0, c.f(1)};
    forward(c, &source, 1, c.f(2), 3);
}

void conv2d_jvp(const Call& c) {  // x, w, xt?, wt?, bt?, yt
    Source sources[2];
    int n = 0;
    if (c.f(2)) sources[n++] = {2, c.f(1)};
    if (c.f(3)) sources[n++] = {0, c.f(3)};
    forward(c, sources, n, c.f(4), 5);
}

void conv2d_bwd_input(const Call& c) {
    const Source source = {0, c.f(1)};
    backward_input(c, &source, 1, 2);
}

void conv2d_bwd_input_jvp(const Call& c) {  // dy?, w, dyt?, wt?, dxt
    Source sources[2];
    int n = 0;
    if (c.f(2)) sources[n++] = {2, c.f(1)};
    if (c.f(0) && c.f(3)) sources[n++] = {0, c.f(3)};
    backward_input(c, sources, n, 4);
}

void conv2d_bwd_weight(const Call& c) {  // x, dy, dw?, db?
    const Factor factor = {0, 1};
    if (c.f(2)) backward_weight(c, &factor, 1, c.f(2));
    if (c.f(3)) backward_bias(c, 1, c.f(3));
}

void conv2d_bwd_weight_jvp(const Call& c) {  // x, dy?, xt?, dyt?, dwt?, dbt?
    Factor factors[2];
    int n = 0;
    if (c.f(3)) factors[n++] = {0, 3};
    if (c.f(2) && c.f(1)) factors[n++] = {2, 1};
    if (c.f(4)) backward_weight(c, factors, n, c.f(4));
    if (c.f(5)) backward_bias(c, 3, c.f(5));
}

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
