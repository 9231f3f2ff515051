#include "ports.h"

#include <cstring>

namespace fastmaml {

// A weight between the caller's layout and the packed one, with the tier's kernel
static void move(int kernel, const Port& port, float* from, float* to, bool add, const Tier& tier, int part,
                 int parts) {
    const int64_t sizes[4] = {port.cols, port.rows, port.taps, add ? 2 : 1};
    Call c{};
    c.operands[0] = from;
    c.operands[1] = to;
    c.sizes = sizes;
    c.part = part;
    c.parts = parts;
    tier.table[kernel](c);
}

// As the packed transpose of its transpose: panels of columns, each [rows][width]
static void pack_turned(const Port& port, const float* from, float* to, int part, int parts) {
    for (int64_t panel = 0; panel * kPanel < port.cols; ++panel) {
        const int64_t at = panel * kPanel, width = packed_width(panel, port.cols);
        const int64_t n = port.cols - at < kPanel ? port.cols - at : kPanel;
        for (int64_t r = port.rows * part / parts; r < port.rows * (part + 1) / parts; ++r) {
            float* row = to + at * port.rows + r * width;
            std::memcpy(row, from + r * port.cols + at, n * sizeof(float));
            std::memset(row + n, 0, (width - n) * sizeof(float));
        }
    }
}

void pack(const Port& port, const float* from, char* meta, const Tier& tier, int part, int parts) {
    for (int64_t k = 0; k < port.steps; ++k) {
        float* to = reinterpret_cast<float*>(meta + port.offset + k * port.step_stride);
        const float* src = from + k * port.rows * port.cols;
        if (port.layout == Layout::kPacked) {
            move(kId_pack_fwd, port, const_cast<float*>(src), to, false, tier, part, parts);
        } else if (port.layout == Layout::kTurned) {
            pack_turned(port, src, to, part, parts);
        } else if (part == 0) {
            const int64_t n = port.rows * port.cols;
            std::memcpy(to, src, n * sizeof(float));
            std::memset(to + n, 0, (pad_lane(n) - n) * sizeof(float));
        }
    }
}

void unpack(const Port& port, float* to, bool add, char* meta, const Tier& tier, int part, int parts) {
    for (int64_t k = 0; k < port.steps; ++k) {
        float* from = reinterpret_cast<float*>(meta + port.offset + k * port.step_stride);
        const int64_t n = port.rows * port.cols;
        float* out = to + k * n;
        if (port.layout == Layout::kPacked) {
            move(kId_unpack_fwd, port, from, out, add, tier, part, parts);
        } else if (add) {
            for (int64_t i = n * part / parts; i < n * (part + 1) / parts; ++i) out[i] += from[i];
        } else {
            const int64_t begin = n * part / parts;
            std::memcpy(out + begin, from + begin, (n * (part + 1) / parts - begin) * sizeof(float));
        }
    }
}

}  // namespace fastmaml
