#include "ports.h"

#include <cstring>

namespace fastmaml {

void pack(const Port& port, const float* from, const Run& run, const Tier& tier, int part, int parts) {
    for (int64_t k = 0; k < port.steps; ++k) {
        float* to = reinterpret_cast<float*>(run.meta + port.offset + k * port.step_stride);
        const float* src = from + k * port.rows * port.cols;
        if (port.layout == Layout::kPacked) {
            Call c{};
            const int64_t sizes[3] = {port.cols, port.rows, port.taps};
            c.operands[0] = const_cast<float*>(src);
            c.operands[1] = to;
            c.sizes = sizes;
            c.part = part;
            c.parts = parts;
            tier.table[kId_pack_fwd](c);
        } else if (part == 0) {
            const int64_t n = port.rows * port.cols;
            std::memcpy(to, src, n * sizeof(float));
            std::memset(to + n, 0, (pad_lane(n) - n) * sizeof(float));
        }
    }
}

// In pieces of 16 x 16 that stay in L1.
void unpack(const Port& port, float* to, bool add, const Run& run, int part, int parts) {
    const int64_t begin = port.rows * part / parts, end = port.rows * (part + 1) / parts;
    for (int64_t k = 0; k < port.steps; ++k) {
        const float* from = reinterpret_cast<float*>(run.meta + port.offset + k * port.step_stride);
        float* dst = to + k * port.rows * port.cols;
        for (int64_t r0 = begin; r0 < end; r0 += kLane)
            for (int64_t c0 = 0; c0 < port.cols; c0 += kLane)
                for (int64_t r = r0; r < end && r < r0 + kLane; ++r) {
                    const bool packed = port.layout == Layout::kPacked;
                    const float* row =
                        from + (packed ? packed_offset(r, port.cols, port.rows, port.taps) : r * port.cols);
                    const int64_t stride = packed ? packed_stride(r, port.rows, port.taps) : 1;
                    const int64_t stop = port.cols < c0 + kLane ? port.cols : c0 + kLane;
                    float* out = dst + r * port.cols;
                    for (int64_t c = c0; c < stop; ++c) {
                        float& to_c = out[packed_input(c, port.cols, port.taps)];
                        to_c = add ? to_c + row[c * stride] : row[c * stride];
                    }
                }
    }
}

}  // namespace fastmaml
