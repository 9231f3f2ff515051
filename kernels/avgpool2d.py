"""avgpool2d and global_avgpool2d (one window of the whole image): y = sum over the window / n; jvp is the fwd of the tangent.

n is KH KW, or with COUNT_PAD False the number of elements inside the image. bwd: dx[p] = sum over the windows that p lies in of dy / n.
"""

import triton
import triton.language as tl


@triton.jit
def _inside(begin, SIZE: tl.constexpr, KERNEL: tl.constexpr):
    """How much of a window is inside."""
    return tl.minimum(begin + KERNEL, SIZE) - tl.maximum(begin, 0)


@triton.jit
def avgpool2d_fwd(count, x, y, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
                  SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, COUNT_PAD: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Grid: blocks of the outputs of *count samples."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = i < tl.load(count).to(tl.int64) * (OH * OW * C)
    c, q = i % C, i // C
    h0, w0 = (q // OW % OH).to(tl.int32) * SH - PH, (q % OW).to(tl.int32) * SW - PW
    image = q // (OH * OW) * (H * W * C) + c
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(KH * KW):
        h, w = h0 + k // KW, w0 + k % KW
        inside = there & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        total += tl.load(x + image + (h * W + w) * C, inside, 0.0)
    n = KH * KW
    if not COUNT_PAD:
        n = _inside(h0, H, KH) * _inside(w0, W, KW)
    tl.store(y + i, total / n, there)


@triton.jit
def avgpool2d_bwd(count, dy, dx, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
                  SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, COUNT_PAD: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Grid: blocks of the inputs of *count samples."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = i < tl.load(count).to(tl.int64) * (H * W * C)
    c, q = i % C, i // C
    p = (q % (H * W)).to(tl.int32)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(KH * KW):
        h, w = p // W + PH - k // KW, p % W + PW - k % KW  # where a window would begin
        inside = there & (h >= 0) & (h % SH == 0) & (h // SH < OH) & (w >= 0) & (w % SW == 0) & (w // SW < OW)
        n = KH * KW
        if not COUNT_PAD:
            n = tl.maximum(_inside(h - PH, H, KH) * _inside(w - PW, W, KW), 1)
        total += tl.load(dy + (q // (H * W) * (OH * OW) + h // SH * OW + w // SW) * C + c, inside, 0.0) / n
    tl.store(dx + i, total, there)
