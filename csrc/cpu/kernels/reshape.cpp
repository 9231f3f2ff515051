// Between an image [h][w][channels padded] and a row of torch's order, channel by channel: a transposition, in tiles of
// 4 x 4 for which every instruction set has registers.
#include "sums.h"

namespace fastmaml {
namespace FASTMAML_ISA {
namespace {

typedef float quad __attribute__((vector_size(16)));
typedef float uquad __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t iquad __attribute__((vector_size(16)));

}  // namespace

static inline quad load4(const float* p) { return *reinterpret_cast<const uquad*>(p); }
static inline void store4(float* p, quad v) { *reinterpret_cast<uquad*>(p) = v; }

// out[j * ldo + i] = in[i * ldi + j] for i < rows, j < cols
static inline void transpose(const float* in, int64_t ldi, float* out, int64_t ldo, int64_t rows, int64_t cols) {
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) {
        int64_t j = 0;
        for (; j + 4 <= cols; j += 4) {
            const float* p = in + i * ldi + j;
            float* q = out + j * ldo + i;
            const quad a = load4(p), b = load4(p + ldi), c = load4(p + 2 * ldi), d = load4(p + 3 * ldi);
            const quad ab = __builtin_shuffle(a, b, iquad{0, 4, 1, 5}), cd = __builtin_shuffle(c, d, iquad{0, 4, 1, 5});
            const quad ef = __builtin_shuffle(a, b, iquad{2, 6, 3, 7}), gh = __builtin_shuffle(c, d, iquad{2, 6, 3, 7});
            store4(q, __builtin_shuffle(ab, cd, iquad{0, 1, 4, 5}));
            store4(q + ldo, __builtin_shuffle(ab, cd, iquad{2, 3, 6, 7}));
            store4(q + 2 * ldo, __builtin_shuffle(ef, gh, iquad{0, 1, 4, 5}));
            store4(q + 3 * ldo, __builtin_shuffle(ef, gh, iquad{2, 3, 6, 7}));
        }
        for (; j < cols; ++j)
            for (int k = 0; k < 4; ++k) out[j * ldo + i + k] = in[(i + k) * ldi + j];
    }
    for (; i < rows; ++i)
        for (int64_t j = 0; j < cols; ++j) out[j * ldo + i] = in[i * ldi + j];
}

// x, y; sizes {c, h, w, 1 if the rows of y are not padded}. Shared out by pixels' lanes; the last one writes the
// padding
void flatten_image_fwd(const Call& c) {
    const int64_t channels = c.sizes[0], pixels = c.sizes[1] * c.sizes[2], lanes = pad_lane(channels);
    const int64_t floats = channels * pixels, written = c.sizes[3] ? floats : pad_lane(floats);
    for_lines(c, lanes / kLane, [&](int64_t row, int64_t lane) {
        const int64_t first = lane * kLane, left = channels - first;
        float* y = c.f(1) + row * c.stride(1);
        transpose(c.f(0) + row * c.stride(0) + first, lanes, y + first * pixels, pixels, pixels,
                  left < kLane ? left : kLane);
        if (left <= kLane)
            for (int64_t i = floats; i < written; ++i) y[i] = 0.f;
    });
}

// x, y; sizes {c, h, w}: nothing behind the last element of x is read
void unflatten_image_fwd(const Call& c) {
    const int64_t channels = c.sizes[0], pixels = c.sizes[1] * c.sizes[2], lanes = pad_lane(channels);
    for_lines(c, lanes / kLane, [&](int64_t row, int64_t lane) {
        const int64_t first = lane * kLane, left = channels - first;
        float* y = c.f(1) + row * c.stride(1) + first;
        if (left < kLane)
            for (int64_t p = 0; p < pixels; ++p)
                for (int l = 0; l < kLane; l += VL) store(y + p * lanes + l, vec{});
        transpose(c.f(0) + row * c.stride(0) + first * pixels, pixels, y, lanes, left < kLane ? left : kLane, pixels);
    });
}

// x, y; sizes {c, h, w of x, c, h, w of y}
void reshape_image_fwd(const Call& c) {
    const int64_t in = c.sizes[0], pixels_in = c.sizes[1] * c.sizes[2], out = c.sizes[3];
    const int64_t pixels_out = c.sizes[4] * c.sizes[5], lanes_in = pad_lane(in), lanes_out = pad_lane(out);
    for_lines(c, pixels_out, [&](int64_t row, int64_t p) {
        const float* x = c.f(0) + row * c.stride(0);
        float* y = c.f(1) + row * c.stride(1) + p * lanes_out;
        for (int64_t k = 0; k < lanes_out; ++k) {
            const int64_t at = k * pixels_out + p;  // in torch's order
            y[k] = k < out ? x[at % pixels_in * lanes_in + at / pixels_in] : 0.f;
        }
    });
}

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
