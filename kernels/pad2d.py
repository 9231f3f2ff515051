"""pad2d: y = x with TOP and LEFT zeros in front; bwd cuts them off again, which is the same with negative ones."""

import triton
import triton.language as tl


@triton.jit
def pad2d(count, x, y, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr,
          BLOCK: tl.constexpr):  # fmt: skip
    """Images of H x W into images of OH x OW. Grid: blocks of the outputs of *count samples."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = i < tl.load(count).to(tl.int64) * (OH * OW * C)
    c, q = i % C, i // C
    h, w = (q // OW % OH).to(tl.int32) - TOP, (q % OW).to(tl.int32) - LEFT
    inside = there & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    tl.store(y + i, tl.load(x + q // (OH * OW) * (H * W * C) + (h * W + w) * C + c, inside, 0.0), there)
