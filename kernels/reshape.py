"""reshape of samples: channels last are c * pixels + p in the Plan's order, so flattening images turns them round."""

import triton
import triton.language as tl


@triton.jit
def reshape(count, x, y, NUMEL: tl.constexpr, XC: tl.constexpr, YC: tl.constexpr, BLOCK: tl.constexpr):
    """x of XC channels, y of YC (1: not an image), NUMEL numbers in each sample. Grid: blocks of *count samples."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = i < tl.load(count).to(tl.int64) * NUMEL
    j = i % NUMEL
    logical = j % YC * (NUMEL // YC) + j // YC
    at = logical % (NUMEL // XC) * XC + logical // (NUMEL // XC)
    tl.store(y + i, tl.load(x + (i - j) + at, there, 0.0), there)
