"""relu and leaky_relu: y = x where mask, slope x elsewhere (relu: zero); fwd makes the mask x > 0, the other modes read it. NaN stays NaN in fwd."""

import triton
import triton.language as tl


@triton.jit
def relu_fwd(count, x, y, mask, per, SLOPE: tl.constexpr, BLOCK: tl.constexpr):
    """``y`` or ``mask`` may be unwanted. Grid: blocks of *count rows of ``per`` numbers each."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = i < tl.load(count).to(tl.int64) * per
    v = tl.load(x + i, there, 0.0)
    if y is not None:
        if SLOPE is None:
            tl.store(y + i, tl.where(v <= 0, 0.0, v), there)
        else:
            tl.store(y + i, tl.where(v > 0, v, v * SLOPE), there)
    if mask is not None:
        tl.store(mask + i, (v > 0).to(tl.uint8), there)


@triton.jit
def relu_masked(count, mask, x, y, per, SLOPE: tl.constexpr, BLOCK: tl.constexpr):
    """replay, jvp, bwd, bwd_jvp: by the stored mask. Grid: blocks."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = i < tl.load(count).to(tl.int64) * per
    v = tl.load(x + i, there, 0.0)
    other = tl.zeros((BLOCK,), tl.float32) if SLOPE is None else v * SLOPE
    tl.store(y + i, tl.where(tl.load(mask + i, there, 0) != 0, v, other), there)
