"""mse: N = rows * outputs ("mean"), 1 ("sum"), or a number.

    fwd   sum (y - target)^2 / N       bwd       2 (y - target) / N times the step's weight
    jvp   2 sum (y - target) yt / N    bwd_jvp   2 yt / N
"""

import triton
import triton.language as tl
from fastmaml.kernels.tiles import rows_of


@triton.jit
def mse_fwd(offsets, y, target, yt, loss, divisor, per, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """``yt`` given: jvp. Grid: tasks."""
    t = tl.program_id(0)
    first, rows = rows_of(offsets, t)
    n = rows * per
    total = tl.zeros((BLOCK,), tl.float32)
    for i0 in range(0, n, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        at = first * per + i
        e = tl.load(y + at, i < n, 0.0) - tl.load(target + at, i < n, 0.0)
        if yt is None:
            total += e * e
        else:
            total += 2 * e * tl.load(yt + at, i < n, 0.0)
    if MEAN:
        tl.store(loss + t, tl.sum(total, 0) / n)
    else:
        tl.store(loss + t, tl.sum(total, 0) / divisor)


@triton.jit
def mse_bwd(offsets, y, target, yt, step_weight, d, divisor, per, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """``yt`` given: bwd_jvp. Grid: blocks of a task's numbers, tasks."""
    t = tl.program_id(1)
    first, rows = rows_of(offsets, t)
    n = rows * per
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = first * per + i
    v = tl.load(y + at, i < n, 0.0) - tl.load(target + at, i < n, 0.0) if yt is None else tl.load(yt + at, i < n, 0.0)
    scale = 2.0 / n if MEAN else 2.0 / divisor
    if step_weight is not None:
        scale *= tl.load(step_weight)
    tl.store(d + at, v * scale, i < n)
