"""join_rows, query_rows: rows of a task from one array to another.

    join_rows_fwd     joint = the support rows, then the query rows
    query_rows_fwd    the joint rows behind the first n_support;   query_rows_bwd: the other way round, zero in front
"""

import triton
import triton.language as tl
from fastmaml.kernels.tiles import rows_of


@triton.jit
def copy_rows(offsets, x_offsets, y_offsets, x_skip, y_skip, x, y, per, BLOCK: tl.constexpr):
    """A task's rows of x, behind those of x_skip, to its rows of y, behind those of y_skip; as many as it has in ``offsets``. x None: zeros.

    Grid: blocks, tasks."""
    t = tl.program_id(1)
    _, rows = rows_of(offsets, t)
    y_first, _ = rows_of(y_offsets, t)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = i < rows * per
    if y_skip is not None:
        _, skip = rows_of(y_skip, t)
        y_first += skip
    v = tl.zeros((BLOCK,), tl.float32)
    if x is not None:
        x_first, _ = rows_of(x_offsets, t)
        if x_skip is not None:
            _, skip = rows_of(x_skip, t)
            x_first += skip
        v = tl.load(x + x_first * per + i, there, 0.0)
    tl.store(y + y_first * per + i, v, there)
