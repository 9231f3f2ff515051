"""relu and leaky_relu: y = x where mask, slope x elsewhere (relu: zero); fwd makes the mask x > 0, the other modes read it. NaN stays NaN in fwd.

Alone, or as the epilogue of what makes x: ``activated``.
"""

import triton
import triton.language as tl


@triton.jit
def activated(x, mask, at, there, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """y of a tile x that lies at ``at``. ACTIVATION: "make", mask = x > 0 is stored, if wanted; "apply", by the stored mask; None, y = x."""
    if ACTIVATION is None:
        return x
    else:
        y = tl.zeros(x.shape, tl.float32) if SLOPE is None else x * SLOPE
        if ACTIVATION == "make":
            y = tl.where(x <= 0, y, x)
            if mask is not None:
                tl.store(mask + at, (x > 0).to(tl.uint8), there)
        else:
            y = tl.where(tl.load(mask + at, there, 0) != 0, x, y)
        return y


@triton.jit
def relu_fwd(count, x, y, mask, per, SLOPE: tl.constexpr, BLOCK: tl.constexpr):
    """``y`` or ``mask`` may be unwanted. Grid: blocks of *count rows of ``per`` numbers each."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = i < tl.load(count).to(tl.int64) * per
    v = activated(tl.load(x + i, there, 0.0), mask, i, there, "make", SLOPE)
    if y is not None:
        tl.store(y + i, v, there)


@triton.jit
def relu_masked(count, mask, x, y, per, SLOPE: tl.constexpr, BLOCK: tl.constexpr):
    """replay, jvp, bwd, bwd_jvp: by the stored mask. Grid: blocks."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = i < tl.load(count).to(tl.int64) * per
    tl.store(y + i, activated(tl.load(x + i, there, 0.0), mask, i, there, "apply", SLOPE), there)
