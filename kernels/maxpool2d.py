"""maxpool2d, and the choice of batchnorm_maxpool2d.

    fwd         y = max over the window, index = h W + w of its first maximum (of x sign(gamma), where gamma is given)
    replay, jvp y = x[index]
    bwd         dx[p] = sum of dy over the windows whose index is p: each pixel asks the windows that it lies in, so nothing is added twice at once
"""

import triton
import triton.language as tl
from fastmaml.kernels.tiles import rows_of


@triton.jit
def extremum(x, image, h0, w0, sign, there, C, H: tl.constexpr, W: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr):
    """h W + w of the first maximum of sign x in the window that begins at (h0, w0), of images that begin at ``image``."""
    best = tl.full(there.shape, float("-inf"), tl.float32)
    chosen = tl.zeros(there.shape, tl.int32) + (tl.maximum(h0, 0) * W + tl.maximum(w0, 0))
    for k in range(KH * KW):
        h, w = h0 + k // KW, w0 + k % KW
        inside = there & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        v = tl.load(x + image + (h * W + w) * C, inside, 0.0) * sign
        better = inside & ((v > best) | (v != v))
        best = tl.where(better, v, best)
        chosen = tl.where(better, h * W + w, chosen)
    return chosen


@triton.jit
def maxpool2d_fwd(offsets, x, gamma, y, index, gamma_task, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
                  KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Grid: blocks of a task's outputs, tasks."""
    t = tl.program_id(1)
    first, rows = rows_of(offsets, t)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = i < rows * (OH * OW * C)
    c, q = i % C, i // C
    h0, w0 = q // OW % OH * SH - PH, q % OW * SW - PW
    image = (first + q // (OH * OW)) * (H * W * C) + c
    sign = tl.full((BLOCK,), 1.0, tl.float32)
    if gamma is not None:
        g = tl.load(gamma + t * gamma_task + c, there, 0.0)
        sign = tl.where(g > 0, 1.0, tl.where(g < 0, -1.0, 0.0))
    chosen = extremum(x, image, h0, w0, sign, there, C, H, W, KH, KW)
    out = first * (OH * OW * C) + i
    tl.store(y + out, tl.load(x + image + chosen * C, there, 0.0), there)
    if index is not None:
        tl.store(index + out, chosen, there)


@triton.jit
def maxpool2d_gather(count, x, index, y, C: tl.constexpr, PIXELS: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr):
    """y = x[index], of images of PIXELS and OUTPUTS. Grid: blocks of *count samples."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = i < tl.load(count).to(tl.int64) * (OUTPUTS * C)
    at = (i // (OUTPUTS * C) * PIXELS + tl.load(index + i, there, 0)) * C + i % C
    tl.store(y + i, tl.load(x + at, there, 0.0), there)


@triton.jit
def maxpool2d_bwd(count, dy, index, dx, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
                  KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Grid: blocks of the inputs of *count samples."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = i < tl.load(count).to(tl.int64) * (H * W * C)
    c, q = i % C, i // C
    p = (q % (H * W)).to(tl.int32)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(KH * KW):
        h, w = p // W + PH - k // KW, p % W + PW - k % KW  # where a window would begin
        inside = there & (h >= 0) & (h % SH == 0) & (h // SH < OH) & (w >= 0) & (w % SW == 0) & (w // SW < OW)
        at = (q // (H * W) * (OH * OW) + h // SH * OW + w // SW) * C + c
        total += tl.where(tl.load(index + at, inside, -1) == p, tl.load(dy + at, inside, 0.0), 0.0)
    tl.store(dx + i, total, there)
