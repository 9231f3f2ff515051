"""What is done over tasks: which of them are finite, and their weighted sum, in batch order; of several arrays at once (tiles.array_of)."""

import triton
import triton.language as tl
from fastmaml.kernels.conv2d import weight_numbers
from fastmaml.kernels.tiles import address, array_of


@triton.jit
def all_finite(blocks, arrays, finite, BLOCK: tl.constexpr):
    """finite[task] = 0 where a number of x is not (whoever finds one writes the same 0). ``arrays`` [n, 4]: addresses of x and of the offsets of its rows,
    or 0; numbers of a row, or of a task; x_task. Grid: blocks, tasks."""
    row, block = array_of(blocks, arrays, 4)
    t = tl.program_id(1).to(tl.int64)
    offsets, per = tl.load(row + 1).to(tl.pointer_type(tl.int32)), tl.load(row + 2)
    by_rows = tl.load(row + 1) != 0
    first = tl.load(offsets + t, by_rows, 0).to(tl.int64)
    rows = tl.load(offsets + t + 1, by_rows, 1).to(tl.int64) - first
    i = block * BLOCK + tl.arange(0, BLOCK)
    x = address(row) + first * per + t * tl.load(row + 3)
    v = tl.load(x + i, i < rows * per, 0.0)
    tl.store(finite + t, 0, mask=tl.sum((v - v != 0).to(tl.int32), 0) > 0)


@triton.jit
def sum_tasks(blocks, arrays, weights, finite, tasks, BLOCK: tl.constexpr):
    """y = sum over the finite tasks of weight x. ``arrays`` [n, 30]: addresses of x and y, numbers of a task, x_task, chunks, and of a product what
    conv2d.weight_numbers reads. Of a product x has not tasks but chunks of them, summed already: where a task is not finite, it is made again. Grid: blocks."""
    row, block = array_of(blocks, arrays, 30)
    x, n, x_task, chunks = address(row), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    i = block * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    if chunks == 0:
        for t in range(0, tasks):
            v = tl.load(weights + t) * tl.load(x + t * x_task + i, i < n, 0.0)
            total += tl.where(tl.load(finite + t) != 0, v, 0.0)
    else:
        there = 0
        for t in range(0, tasks):
            there += tl.load(finite + t)
        if there == tasks:
            for s in range(0, chunks):
                total += tl.load(x + s * x_task + i, i < n, 0.0)
        else:
            for t in range(0, tasks):
                if tl.load(finite + t) != 0:
                    total += tl.load(weights + t) * weight_numbers(row + 5, t, i, i < n, 4)
    tl.store(address(row + 1) + i, total, i < n)
