"""Expressions of weights: add, mul, matmul, transpose, slice, reshape and their derivatives are all

    y[i] = sum_r a[i, r] b[i, r] + c[i, r] d[i, r]

with strides that say which axes an operand has. A broadcast operand has stride 0, a sum over broadcast axes is a reduction, a matmul reduces over its inner axis,
a tangent is the second pair.
"""

import triton
import triton.language as tl

AXES = tl.constexpr(8)  # outputs and reduction together


@triton.jit
def _offset(i, table, operand: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr):
    """The offset of element i (counted over the axes FIRST .. LAST, the last one fastest) in an operand."""
    at = i * 0
    for k in tl.static_range(LAST - FIRST):
        size = tl.load(table + (LAST - 1 - k))
        at += i % size * tl.load(table + ((1 + operand) * AXES + LAST - 1 - k))
        i = i // size
    return at


@triton.jit
def _times(a, b, i, r, mask, table, first: tl.constexpr, OUT: tl.constexpr, AXES_USED: tl.constexpr):
    v = tl.zeros(i.shape, tl.float32)
    if a is not None:
        v = tl.load(a + _offset(i, table, first, 0, OUT) + _offset(r, table, first, OUT, AXES_USED), mask, 0.0)
        if b is not None:
            v *= tl.load(b + _offset(i, table, first + 1, 0, OUT) + _offset(r, table, first + 1, OUT, AXES_USED), mask, 0.0)
    return v


@triton.jit
def contract(table, a, b, c, d, y, n, reduced, a_task, b_task, c_task, d_task, y_task, OUT: tl.constexpr, AXES_USED: tl.constexpr, BLOCK: tl.constexpr):
    """``table``: [AXES] sizes, then [AXES] strides of each of a, b, c, d, y; the first OUT axes are those of y. b or d None: one. Grid: blocks, tasks."""
    t = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if a is not None:
        a += t * a_task
    if b is not None:
        b += t * b_task
    if c is not None:
        c += t * c_task
    if d is not None:
        d += t * d_task
    total = tl.zeros((BLOCK,), tl.float32)
    for r in range(0, reduced):
        total += _times(a, b, i, r, i < n, table, 0, OUT, AXES_USED) + _times(c, d, i, r, i < n, table, 2, OUT, AXES_USED)
    tl.store(y + t * y_task + _offset(i, table, 4, 0, OUT), total, i < n)
