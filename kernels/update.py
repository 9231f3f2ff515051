"""Updates of the inner loop, and sums, copies and zeros of any array.

    axpy            y = a + sign s b      sgd_fwd: theta - rate g;  sgd_bwd: -rate theta_bar;  axpy, scale, add, copy, zero; s one number, or one for each
    sgd_bwd_rate    y = acc - theta_bar g, number by number, or acc - sum theta_bar g
"""

import triton
import triton.language as tl
from fastmaml.kernels.tiles import rows_of


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
def sgd_bwd_rate_each(theta_bar, g, acc, y, n, task, acc_task, BLOCK: tl.constexpr):
    """Grid: blocks, tasks."""
    t = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = -tl.load(theta_bar + t * task + i, i < n, 0.0) * tl.load(g + t * task + i, i < n, 0.0)
    if acc is not None:
        v += tl.load(acc + t * acc_task + i, i < n, 0.0)
    tl.store(y + t * acc_task + i, v, i < n)


@triton.jit
def sgd_bwd_rate(offsets, theta_bar, g, acc, y, per, task, BLOCK: tl.constexpr):
    """``offsets``: of arrays with rows; None where each task has ``per`` numbers. Grid: tasks."""
    t = tl.program_id(0)
    n = per
    start = t.to(tl.int64) * task
    if offsets is not None:
        first, rows = rows_of(offsets, t)
        n = rows * per
        start = first * per
    total = tl.zeros((BLOCK,), tl.float32)
    for i0 in range(0, n, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        total += tl.load(theta_bar + start + i, i < n, 0.0) * tl.load(g + start + i, i < n, 0.0)
    v = -tl.sum(total, 0)
    if acc is not None:
        v += tl.load(acc + t)
    tl.store(y + t, v)
