"""What kernels of several ops share: the rows of a task, the numbers of a tile, the product of two, the sum of what chunks of rows have summed."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def rows_of(offsets, t):
    """(first row, number of rows) of task t."""
    first = tl.load(offsets + t)
    return first.to(tl.int64), tl.load(offsets + t + 1) - first


@triton.jit
def array_of(blocks, arrays, WIDTH: tl.constexpr):
    """(row of ``arrays`` [n, WIDTH], block of that array) of a program, for kernels that walk over several arrays: ``blocks`` [programs, 2] has both."""
    p = tl.program_id(0)
    return arrays + tl.load(blocks + 2 * p) * WIDTH, tl.load(blocks + 2 * p + 1)


@triton.jit
def address(row):
    """An array of float32 whose address stands there; 0: there is none."""
    return tl.load(row).to(tl.pointer_type(tl.float32))


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, summed in float32. PRECISION: "bf16", both factors rounded to bfloat16; else what tl.dot calls input_precision: "tf32x3" (the error of
    float32), "bf16x3" (half of its digits more than "tf32"), "tf32"."""
    if PRECISION == "bf16":
        a, b = a.to(tl.bfloat16), b.to(tl.bfloat16)
    if INTERPRETED:  # it multiplies the bits of two bfloat16, and knows no bf16x3
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    elif PRECISION == "bf16":
        acc = tl.dot(a, b, acc)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def channel(values, task, stride, c, mask, absent: tl.constexpr):
    """[1, channels] of a task's vector, or the number that an absent one stands for."""
    if values is None:
        return tl.full((1, c.shape[0]), absent, tl.float32)
    else:  # what stands behind an if is compiled too
        return tl.load(values + task * stride + c, mask, 0.0)[None, :]


@triton.jit
def element(values, at, mask):
    """A tile of an operand; zero where there is none."""
    if values is None:
        return tl.zeros(at.shape, tl.float32)
    else:
        return tl.load(values + at, mask, 0.0)


@triton.jit
def updated(g, base, scale, sign, scale_task, t, at, mask):
    """base + sign scale g of a tile g of task t, at ``at`` of its own copy of ``base``; base None: g itself. ``scale``: one number, or absent."""
    if base is None:
        return g
    else:
        v = sign * g
        if scale is not None:
            v *= tl.load(scale + t * scale_task)
        return v + tl.load(base + at, mask, 0.0)


@triton.jit
def sum_chunks(offsets, x, y, base, scale, sign, chunk, per_row, chunks, n, y_task, base_task, scale_task, BS: tl.constexpr, BN: tl.constexpr):
    """y[i] = sum over the task's own chunks s of x[task, s, i], or base[i] + sign scale times that; a chunk is of ``chunk`` rows of which each sample has
    ``per_row``."""
    t = tl.program_id(1)
    _, rows = rows_of(offsets, t)
    i = tl.program_id(0) * BN + tl.arange(0, BN)
    own = tl.cdiv(rows * per_row, chunk)
    total = tl.zeros((BN,), tl.float32)
    for s0 in range(0, own, BS):
        s = s0 + tl.arange(0, BS)
        at = (t * chunks + s).to(tl.int64)[:, None] * n + i[None, :]
        total += tl.sum(tl.load(x + at, (s < own)[:, None] & (i < n)[None, :], 0.0), 0)
    total = updated(total, base, scale, sign, scale_task, t, t.to(tl.int64) * base_task + i, i < n)
    tl.store(y + t.to(tl.int64) * y_task + i, total, i < n)
