"""What is done over tasks: which of them are finite, and their weighted sum, in batch order."""

import triton
import triton.language as tl
from fastmaml.kernels.tiles import rows_of


@triton.jit
def all_finite(offsets, x, finite, per, task, BLOCK: tl.constexpr):
    """finite[task] = 0 where a number of x is not (whoever finds one writes the same 0). ``offsets`` None: ``per`` numbers of each task. Grid: blocks, tasks."""
    t = tl.program_id(1)
    n = per
    start = t.to(tl.int64) * task
    if offsets is not None:
        first, rows = rows_of(offsets, t)
        n = rows * per
        start = first * per
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + start + i, i < n, 0.0)
    tl.store(finite + t, 0, mask=tl.sum((v - v != 0).to(tl.int32), 0) > 0)


@triton.jit
def sum_tasks(x, weights, finite, y, n, tasks, task, BLOCK: tl.constexpr):
    """y = sum over the finite tasks of weight x. Grid: blocks."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for t in range(0, tasks):
        v = tl.load(weights + t) * tl.load(x + i, i < n, 0.0)
        total += tl.where(tl.load(finite + t) != 0, v, 0.0)
        x += task
    tl.store(y + i, total, i < n)
