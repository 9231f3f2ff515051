"""gram and factored_linear: a first layer as y = A + G D + b, G = x x_s^T (fastmaml/plan/rewrite.py says why).

    gram_fwd              G = x x_s^T, in double: it is large where images share a mean, and D mostly cancels it
    factored_linear_fwd   y = A + G D + b           factored_linear_jvp   yt = u + bt
    factored_linear_bwd   D_bar = G^T dy

These products are small (n_support in one direction) and in double, so they are sums of products, without tensor cores.
"""

import triton
import triton.language as tl
from fastmaml.kernels.tiles import rows_of


@triton.jit
def gram_fwd(offsets, support, x, xs, gram, width, inner, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """gram [rows, width] of double, of which a task with fewer support rows than ``width`` uses the first ones. Grid: rows, support rows, tasks."""
    t = tl.program_id(2)
    first, rows = rows_of(offsets, t)
    s_first, s_rows = rows_of(support, t)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    if (tl.program_id(0) * BM < rows) & (tl.program_id(1) * BN < s_rows):
        acc = tl.zeros((BM, BN), tl.float64)
        for k0 in range(0, inner, BK):
            k = k0 + tl.arange(0, BK)
            a = tl.load(x + (first + m)[:, None] * inner + k[None, :], (m < rows)[:, None] & (k < inner)[None, :], 0.0).to(tl.float64)
            b = tl.load(xs + (s_first + n)[:, None] * inner + k[None, :], (n < s_rows)[:, None] & (k < inner)[None, :], 0.0).to(tl.float64)
            acc += tl.sum(a[:, None, :] * b[None, :, :], 2)
        tl.store(gram + (first + m)[:, None] * width + n[None, :], acc, (m < rows)[:, None] & (n < s_rows)[None, :])


@triton.jit
def factored_linear_fwd(offsets, support, base, gram, state, bias, y, width, C, bias_task, BM: tl.constexpr, BC: tl.constexpr):
    """Grid: rows, outputs, tasks."""
    t = tl.program_id(2)
    first, rows = rows_of(offsets, t)
    s_first, s_rows = rows_of(support, t)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    if tl.program_id(0) * BM < rows:
        at, mask = (first + m)[:, None] * C + c[None, :], (m < rows)[:, None] & (c < C)[None, :]
        acc = tl.load(base + at, mask, 0.0).to(tl.float64)
        for s in range(0, s_rows):
            g = tl.load(gram + (first + m) * width + s, m < rows, 0.0)
            acc += g[:, None] * tl.load(state + (s_first + s) * C + c, c < C, 0.0).to(tl.float64)[None, :]
        if bias is not None:
            acc += tl.load(bias + t * bias_task + c, c < C, 0.0).to(tl.float64)[None, :]
        tl.store(y + at, acc.to(tl.float32), mask)


@triton.jit
def factored_linear_jvp(offsets, direction, bias_t, y, C, bias_task, BM: tl.constexpr, BC: tl.constexpr):
    """``direction`` may be absent. Grid: rows, outputs, tasks."""
    t = tl.program_id(2)
    first, rows = rows_of(offsets, t)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    at, mask = (first + m)[:, None] * C + c[None, :], (m < rows)[:, None] & (c < C)[None, :]
    v = tl.zeros((BM, BC), tl.float32) + tl.load(bias_t + t * bias_task + c, c < C, 0.0)[None, :]
    if direction is not None:
        v += tl.load(direction + at, mask, 0.0)
    tl.store(y + at, v, mask)


@triton.jit
def factored_linear_bwd(offsets, support, gram, dy, state_bar, width, C, BM: tl.constexpr, BC: tl.constexpr):
    """Grid: support rows, outputs, tasks."""
    t = tl.program_id(2)
    first, rows = rows_of(offsets, t)
    s_first, s_rows = rows_of(support, t)
    s = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    if tl.program_id(0) * BM < s_rows:
        acc = tl.zeros((BM, BC), tl.float64)
        for m in range(0, rows):
            g = tl.load(gram + (first + m) * width + s, s < s_rows, 0.0)
            acc += g[:, None] * tl.load(dy + (first + m) * C + c, c < C, 0.0).to(tl.float64)[None, :]
        tl.store(state_bar + (s_first + s)[:, None] * C + c[None, :], acc.to(tl.float32), (s < s_rows)[:, None] & (c < C)[None, :])
