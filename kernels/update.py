"""Updates of the inner loop, and sums, copies and zeros of any array.

    axpy            y = a + sign s b      sgd_fwd: theta - rate g;  sgd_bwd: -rate theta_bar;  axpy, scale, add, copy, zero; s one number, or one for each
    sgd_bwd_rate    y = acc - theta_bar g, number by number, or acc - sum theta_bar g
    dot             y = acc + sum a b
    clip_value      fwd: g between -bound and bound;  bwd: dc where |g| <= bound, else 0
    scalars         ratio_fwd: x / y, 0 where y is;  clip_norm_fwd: norm = sqrt(x), scale = min(1, max_norm / (norm + 1e-6)), slope = -scale / ((norm + 1e-6) norm)
                    where that clips, else 0
"""

import triton
import triton.language as tl
from fastmaml.kernels.tiles import address, array_of, rows_of


@triton.jit
def axpy(count, offsets, a, s, b, y, sign, per, a_task, s_task, b_task, y_task, EACH: tl.constexpr, BLOCK: tl.constexpr):
    """*count rows of ``per`` numbers of each task, or with ``offsets`` those of its rows; a, s or b may be absent. EACH: s has a number for each.

    Grid: blocks, tasks."""
    t = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if offsets is None:
        there = i < tl.load(count).to(tl.int64) * per
    else:
        first, rows = rows_of(offsets, t)
        there = i < rows.to(tl.int64) * per
        i += first * per
    v = tl.zeros((BLOCK,), tl.float32)
    if b is not None:
        v = sign * tl.load(b + t * b_task + i, there, 0.0)
    if s is not None:
        if EACH:
            v *= tl.load(s + t * s_task + i, there, 0.0)
        else:
            v *= tl.load(s + t * s_task)
    if a is not None:
        v += tl.load(a + t * a_task + i, there, 0.0)
    tl.store(y + t * y_task + i, v, there)


@triton.jit
def _numbers(row, operand: tl.constexpr, t, i):
    """Of an operand of ``axpys``; zero where there is none."""
    n = tl.where(tl.load(row + operand) != 0, tl.load(row + 4), 0)
    return tl.load(address(row + operand) + t * tl.load(row + 5 + operand) + i, i < n, 0.0)


@triton.jit
def axpys(blocks, arrays, sign, BLOCK: tl.constexpr):
    """The same of several arrays at once, s one number. ``arrays`` [n, 9]: addresses of y, a, s, b (a, s or b may be 0), numbers of a task,
    then <operand>_task of y, a, s, b. Grid: blocks (tiles.array_of), tasks."""
    row, block = array_of(blocks, arrays, 9)
    t = tl.program_id(1).to(tl.int64)
    i = block * BLOCK + tl.arange(0, BLOCK)
    v = sign * _numbers(row, 3, t, i)
    v *= tl.load(address(row + 2) + t * tl.load(row + 7), tl.load(row + 2) != 0, 1.0)
    v += _numbers(row, 1, t, i)
    tl.store(address(row) + t * tl.load(row + 5) + i, v, i < tl.load(row + 4))


@triton.jit
def sgd_bwd_rate_each(theta_bar, g, acc, y, n, task, acc_task, BLOCK: tl.constexpr):
    """Grid: blocks, tasks."""
    t = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = -tl.load(theta_bar + t * task + i, i < n, 0.0) * tl.load(g + t * task + i, i < n, 0.0)
    if acc is not None:
        v += tl.load(acc + t * acc_task + i, i < n, 0.0)
    tl.store(y + t * acc_task + i, v, i < n)


@triton.jit
def dot(offsets, a, b, acc, y, sign, per, a_task, b_task, acc_task, y_task, BLOCK: tl.constexpr):
    """y = acc + sign sum a b. ``offsets``: of arrays with rows; None where each task has ``per`` numbers. Grid: tasks."""
    t = tl.program_id(0)
    n = per
    a += t.to(tl.int64) * a_task
    b += t.to(tl.int64) * b_task
    if offsets is not None:
        first, rows = rows_of(offsets, t)
        n = rows * per
        a += first * per
        b += first * per
    total = tl.zeros((BLOCK,), tl.float32)
    for i0 in range(0, n, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        total += tl.load(a + i, i < n, 0.0) * tl.load(b + i, i < n, 0.0)
    v = sign * tl.sum(total, 0)
    if acc is not None:
        v += tl.load(acc + t * acc_task)
    tl.store(y + t * y_task, v)


@triton.jit
def clip_value(g, dc, y, bound, n, g_task, dc_task, y_task, BLOCK: tl.constexpr):
    """bwd where there is dc. Grid: blocks, tasks."""
    t = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(g + t * g_task + i, i < n, 0.0)
    if dc is None:
        v = tl.where(v > bound, bound, tl.where(v < -bound, -bound, v))  # a NaN stays one
    else:
        v = tl.where((v <= bound) & (v >= -bound), tl.load(dc + t * dc_task + i, i < n, 0.0), 0.0)
    tl.store(y + t * y_task + i, v, i < n)


@triton.jit
def ratio(x, y, out, x_task, y_task, out_task):
    """Grid: tasks."""
    t = tl.program_id(0).to(tl.int64)
    below = tl.load(y + t * y_task)
    none = below == 0.0
    tl.store(out + t * out_task, tl.where(none, 0.0, tl.load(x + t * x_task) / tl.where(none, 1.0, below)))


@triton.jit
def clip_norm(square, scale, slope, max_norm, square_task, scale_task, slope_task):
    """slope may be absent. Grid: tasks."""
    t = tl.program_id(0).to(tl.int64)
    norm = tl.sqrt(tl.load(square + t * square_task))
    factor = max_norm / (norm + 1e-6)
    tl.store(scale + t * scale_task, tl.minimum(factor, 1.0, tl.PropagateNan.ALL))
    if slope is not None:
        clips = (factor <= 1.0) & (norm > 0.0)
        tl.store(slope + t * slope_task, tl.where(clips, -factor / ((norm + 1e-6) * tl.where(clips, norm, 1.0)), 0.0))
