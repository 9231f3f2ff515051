"""conv2d and linear: implicit matrix products, one per task, on tensor cores.

    conv2d_fwd              y[p, o] = sum_{tap, i} x[p moved by tap, i] w[tap, i, o] + b[o]
    conv2d_bwd_input        dx[q, i] = sum_{tap, o} dy[q moved back by tap, o] w[tap, i, o]
    conv2d_bwd_weight       dw[tap, i, o] = sum_{samples, p} x[p moved by tap, i] dy[p, o],   db[o] = sum dy[p, o]

The rows of the product are the pixels of a task's samples. A tangent is the same product with a doubled reduction, [xt | x] [w ; wt], in one accumulator: every
kernel takes a second pair of operands. linear is the convolution of images of 1 x lead pixels with one tap.

What is made of a result right away is made of the accumulator: relu(y) and its mask, y by a stored mask (relu.py), the sums of a batchnorm (tile_sums.py),
theta - rate dw (tiles.updated).
"""

import triton
import triton.language as tl
from fastmaml.kernels.relu import activated
from fastmaml.kernels.tile_sums import tile_sums
from fastmaml.kernels.tiles import product, rows_of, updated


@triton.jit
def _moved(at, tap, STRIDE: tl.constexpr, BEFORE: tl.constexpr, SIZE: tl.constexpr, REVERSED: tl.constexpr):
    """Where a tap leads, and whether that is inside: from an output to the input, or REVERSED."""
    if REVERSED:
        far = at + BEFORE - tap
        to = far // STRIDE
        return to, (far >= 0) & (far % STRIDE == 0) & (to < SIZE)
    to = at * STRIDE - BEFORE + tap
    return to, (to >= 0) & (to < SIZE)


@triton.jit
def _taps(m, k, pixels_mask, H: tl.constexpr, W: tl.constexpr, CI: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
          SH: tl.constexpr, SW: tl.constexpr, PT: tl.constexpr, PL: tl.constexpr, REVERSED: tl.constexpr):  # fmt: skip
    """(offsets from the task's first image, mask) of x at pixels ``m`` moved by the taps and channels ``k``; one of them is a column, the other a row."""
    p = m % (OH * OW)
    tap = k // CI
    h, in_h = _moved(p // OW, tap // KW, SH, PT, H, REVERSED)
    w, in_w = _moved(p % OW, tap % KW, SW, PL, W, REVERSED)
    at = (m // (OH * OW) * (H * W) + h * W + w) * CI + k % CI
    return at, pixels_mask & (k < KH * KW * CI) & in_h & in_w


@triton.jit
def _product(acc, x, w, m, n, rows, H: tl.constexpr, W: tl.constexpr, CI: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr, CO: tl.constexpr,
             KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PT: tl.constexpr, PL: tl.constexpr, REVERSED: tl.constexpr,
             W_TAP: tl.constexpr, W_IN: tl.constexpr, W_OUT: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """acc + x w for the pixels m and the outputs n."""
    for k0 in range(0, KH * KW * CI, BK):
        k = k0 + tl.arange(0, BK)
        at, mask = _taps(m[:, None], k[None, :], (m < rows)[:, None], H, W, CI, OH, OW, KH, KW, SH, SW, PT, PL, REVERSED)
        a = tl.load(x + at, mask, 0.0)
        at = (k // CI * W_TAP + k % CI * W_IN)[:, None] + (n * W_OUT)[None, :]
        b = tl.load(w + at, (k < KH * KW * CI)[:, None] & (n < CO)[None, :], 0.0)
        acc = product(a, b, acc, PRECISION)
    return acc


@triton.jit
def conv2d_rows(offsets, x, w, x2, w2, bias, mask, y, w_task, w2_task, bias_task, counted, parts, arrivals, sums, products, bn_x, bn_mean, bn_rstd, bn_dy, bn_xt,
                bn_mean_t, bn_rstd_t, eps, slots,
                H: tl.constexpr, W: tl.constexpr, CI: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr, CO: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
                SH: tl.constexpr, SW: tl.constexpr, PT: tl.constexpr, PL: tl.constexpr, REVERSED: tl.constexpr,
                W_TAP: tl.constexpr, W_IN: tl.constexpr, W_OUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                PRECISION: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, SUMS: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """y [rows, OH, OW, CO] = activated(x * w + x2 * w2 + bias) with x [rows, H, W, CI]; REVERSED: the transposed convolution. Grid: pixels, outputs, tasks.

    fwd: (x, w), bias. jvp: (xt, w), (x, wt), bias_t. bwd_input: (dy, w) REVERSED. bwd_input_jvp: (dyt, w), (dy, wt) REVERSED.
    activated: y > 0 ? y : slope y, mask = y > 0 ("make"); mask ? y : slope y ("apply"); y (None). SUMS: which sums of a batchnorm are made of y, or None."""
    t = tl.program_id(2)
    first, rows = rows_of(offsets, t)
    rows = rows * (OH * OW)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    if tl.program_id(0) * BM < rows:
        acc = tl.zeros((BM, BN), tl.float32)
        image, own = first * (H * W * CI), t.to(tl.int64)
        if x is not None:
            acc = _product(acc, x + image, w + own * w_task, m, n, rows, H, W, CI, OH, OW, CO, KH, KW, SH, SW, PT, PL, REVERSED, W_TAP, W_IN, W_OUT, BK, PRECISION)
        if x2 is not None:
            acc = _product(acc, x2 + image, w2 + own * w2_task, m, n, rows, H, W, CI, OH, OW, CO, KH, KW, SH, SW, PT, PL, REVERSED, W_TAP, W_IN, W_OUT, BK, PRECISION)
        if bias is not None:
            acc += tl.load(bias + own * bias_task + n, n < CO, 0.0)[None, :]
        at, there = first * (OH * OW * CO) + m[:, None] * CO + n[None, :], (m < rows)[:, None] & (n < CO)[None, :]
        acc = activated(acc, mask, at, there, ACTIVATION, SLOPE)
        tl.store(y + at, acc, there)
        if SUMS is not None:
            _, summed = rows_of(counted, t)
            tile_sums(acc, bn_x, bn_mean, bn_rstd, bn_dy, bn_xt, bn_mean_t, bn_rstd_t, sums, products, parts, arrivals, eps, at, there, summed * (OH * OW), slots,
                      t, n, CO, SUMS, BM, GROUP)  # fmt: skip


@triton.jit
def _outer(acc, x, dy, k, n, begin, end, H: tl.constexpr, W: tl.constexpr, CI: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr, CO: tl.constexpr,
           KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PT: tl.constexpr, PL: tl.constexpr, BM: tl.constexpr,
           PRECISION: tl.constexpr):  # fmt: skip
    """acc + x^T dy over the pixels begin .. end of a task."""
    for m0 in range(begin, end, BM):
        m = m0 + tl.arange(0, BM)
        at, mask = _taps(m[None, :], k[:, None], (m < end)[None, :], H, W, CI, OH, OW, KH, KW, SH, SW, PT, PL, False)
        a = tl.load(x + at, mask, 0.0)
        b = tl.load(dy + m[:, None] * CO + n[None, :], (m < end)[:, None] & (n < CO)[None, :], 0.0)
        acc = product(a, b, acc, PRECISION)
    return acc


@triton.jit
def conv2d_weight(offsets, x, dy, x2, dy2, dw, db, w_base, w_scale, w_sign, b_base, b_scale, b_sign, chunk, chunks, dw_task, db_task,
                  w_base_task, w_scale_task, b_base_task, b_scale_task,
                  H: tl.constexpr, W: tl.constexpr, CI: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr, CO: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
                  SH: tl.constexpr, SW: tl.constexpr, PT: tl.constexpr, PL: tl.constexpr, W_TAP: tl.constexpr, W_IN: tl.constexpr, W_OUT: tl.constexpr,
                  TILES_N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """dw = x^T dy + x2^T dy2 and db = sum dy, of one chunk of a task's pixels; with a base, where that chunk is all,
    dw = w_base + w_sign w_scale (x^T dy + x2^T dy2), and db likewise. Grid: tiles of dw, chunks, tasks.

    bwd_weight: (x, dy). bwd_weight_jvp: (x, dyt), (xt, dy). sgd: base = theta, scale = its rate, sign = -1."""
    tile, s, t = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, rows = rows_of(offsets, t)
    begin = s * chunk
    end = tl.minimum(begin + chunk, rows * (OH * OW))
    k = tile // TILES_N * BK + tl.arange(0, BK)
    n = tile % TILES_N * BN + tl.arange(0, BN)
    if begin < end:
        image, pixel = first * (H * W * CI), first * (OH * OW * CO)
        slot = t.to(tl.int64) * chunks + s
        if dw is not None:
            acc = tl.zeros((BK, BN), tl.float32)
            if dy is not None:
                acc = _outer(acc, x + image, dy + pixel, k, n, begin, end, H, W, CI, OH, OW, CO, KH, KW, SH, SW, PT, PL, BM, PRECISION)
            if x2 is not None:
                acc = _outer(acc, x2 + image, dy2 + pixel, k, n, begin, end, H, W, CI, OH, OW, CO, KH, KW, SH, SW, PT, PL, BM, PRECISION)
            at = (k // CI * W_TAP + k % CI * W_IN)[:, None] + (n * W_OUT)[None, :]
            there = (k < KH * KW * CI)[:, None] & (n < CO)[None, :]
            acc = updated(acc, w_base, w_scale, w_sign, w_scale_task, t, t.to(tl.int64) * w_base_task + at, there)
            tl.store(dw + slot * dw_task + at, acc, there)
        if db is not None and tile // TILES_N == 0:
            total = tl.zeros((BN,), tl.float32)
            for m0 in range(begin, end, BM):
                m = m0 + tl.arange(0, BM)
                total += tl.sum(tl.load(dy + pixel + m[:, None] * CO + n[None, :], (m < end)[:, None] & (n < CO)[None, :], 0.0), 0)
            total = updated(total, b_base, b_scale, b_sign, b_scale_task, t, t.to(tl.int64) * b_base_task + n, n < CO)
            tl.store(db + slot * db_task + n, total, n < CO)
