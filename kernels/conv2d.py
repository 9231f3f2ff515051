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
from fastmaml.kernels.tiles import address, product, rows_of, updated


@triton.jit
def _moved(at, tap, STRIDE, BEFORE, SIZE, REVERSED: tl.constexpr):
    """Where a tap leads, and whether that is inside: from an output to the input, or REVERSED."""
    if REVERSED:
        far = at + BEFORE - tap
        to = far // STRIDE
        return to, (far >= 0) & (far % STRIDE == 0) & (to < SIZE)
    to = at * STRIDE - BEFORE + tap
    return to, (to >= 0) & (to < SIZE)


@triton.jit
def _taps(m, k, pixels_mask, H, W, CI, OH, OW, KH, KW, SH, SW, PT, PL, REVERSED: tl.constexpr):
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
def _row_sum(dy, n, begin, end, CO: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """The sum of dy over the pixels begin .. end of a task."""
    total = tl.zeros((BN,), tl.float32)
    for m0 in range(begin, end, BM):
        m = m0 + tl.arange(0, BM)
        total += tl.sum(tl.load(dy + m[:, None] * CO + n[None, :], (m < end)[:, None] & (n < CO)[None, :], 0.0), 0)
    return total


@triton.jit
def _mark(finite, t, v, at, mask):
    """finite[t] = 0 where a number of a tile v is not finite (whoever finds one writes the same 0)."""
    if finite is not None:
        tl.store(finite + t + tl.zeros_like(at), 0, mask & (v - v != 0))


@triton.jit
def conv2d_weight(offsets, x, dy, x2, dy2, dw, db, w_base, w_scale, w_sign, b_base, b_scale, b_sign, finite, chunk, chunks, dw_task, db_task,
                  w_base_task, w_scale_task, b_base_task, b_scale_task,
                  H: tl.constexpr, W: tl.constexpr, CI: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr, CO: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
                  SH: tl.constexpr, SW: tl.constexpr, PT: tl.constexpr, PL: tl.constexpr, W_TAP: tl.constexpr, W_IN: tl.constexpr, W_OUT: tl.constexpr,
                  TILES_N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """dw = x^T dy + x2^T dy2 and db = sum dy, of one chunk of a task's pixels; with a base, where that chunk is all,
    dw = w_base + w_sign w_scale (x^T dy + x2^T dy2), and db likewise. finite[task] = 0 where a number of dw is not. Grid: tiles of dw, chunks, tasks.

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
            _mark(finite, t, acc, at, there)
            tl.store(dw + slot * dw_task + at, acc, there)
        if db is not None and tile // TILES_N == 0:
            total = _row_sum(dy + pixel, n, begin, end, CO, BM, BN)
            total = updated(total, b_base, b_scale, b_sign, b_scale_task, t, t.to(tl.int64) * b_base_task + n, n < CO)
            tl.store(db + slot * db_task + n, total, n < CO)


@triton.jit
def conv2d_weight_tasks(offsets, x, dy, x2, dy2, sums, db, w_base, w_scale, w_sign, b_base, b_scale, b_sign, weights, finite, tasks, group, db_task,
                        w_base_task, w_scale_task, b_base_task, b_scale_task,
                        H: tl.constexpr, W: tl.constexpr, CI: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr, CO: tl.constexpr, KH: tl.constexpr,
                        KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PT: tl.constexpr, PL: tl.constexpr, W_TAP: tl.constexpr, W_IN: tl.constexpr,
                        W_OUT: tl.constexpr, TILES_N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """sums[chunk] = the sum over ``group`` tasks of weight dw, dw and db as in conv2d_weight; dw of a task is never stored, but finite[task] = 0 where a number of
    it is not (then ``weight_numbers`` make the sum). Grid: tiles of dw, chunks."""
    tile, s = tl.program_id(0), tl.program_id(1)
    k = tile // TILES_N * BK + tl.arange(0, BK)
    n = tile % TILES_N * BN + tl.arange(0, BN)
    at = (k // CI * W_TAP + k % CI * W_IN)[:, None] + (n * W_OUT)[None, :]
    there = (k < KH * KW * CI)[:, None] & (n < CO)[None, :]
    total = tl.zeros((BK, BN), tl.float32)
    for t in range(s * group, tl.minimum(s * group + group, tasks)):
        first, rows = rows_of(offsets, t)
        end, image, pixel = rows * (OH * OW), first * (H * W * CI), first * (OH * OW * CO)
        acc = tl.zeros((BK, BN), tl.float32)
        if dy is not None:
            acc = _outer(acc, x + image, dy + pixel, k, n, 0, end, H, W, CI, OH, OW, CO, KH, KW, SH, SW, PT, PL, BM, PRECISION)
        if x2 is not None:
            acc = _outer(acc, x2 + image, dy2 + pixel, k, n, 0, end, H, W, CI, OH, OW, CO, KH, KW, SH, SW, PT, PL, BM, PRECISION)
        acc = updated(acc, w_base, w_scale, w_sign, w_scale_task, t, t * w_base_task + at, there)
        _mark(finite, t, acc, at, there)
        total += tl.load(weights + t) * acc
        if db is not None and tile // TILES_N == 0:
            bias = updated(_row_sum(dy + pixel, n, 0, end, CO, BM, BN), b_base, b_scale, b_sign, b_scale_task, t, t * b_base_task + n, n < CO)
            tl.store(db + t * db_task + n, bias, n < CO)
    tl.store(sums + s.to(tl.int64) * (KH * KW * CI * CO) + at, total, there)


@triton.jit
def _number(row):
    return tl.load(row).to(tl.int32)


@triton.jit
def weight_numbers(row, t, i, mask, BM: tl.constexpr):
    """Numbers i of dw of task t as in conv2d_weight_tasks, of any product: ``row`` [25] has addresses of offsets, x, dy, x2, dy2, base, scale (0: absent), then
    base_task, scale_task, sign, and H .. W_OUT."""
    H, W, CI, OH, OW, CO = _number(row + 10), _number(row + 11), _number(row + 12), _number(row + 13), _number(row + 14), _number(row + 15)
    KH, KW, SH, SW, PT, PL = _number(row + 16), _number(row + 17), _number(row + 18), _number(row + 19), _number(row + 20), _number(row + 21)
    first, rows = rows_of(tl.load(row).to(tl.pointer_type(tl.int32)), t)
    end = rows * (OH * OW)
    outputs_last = tl.load(row + 24) == 1
    k, n = tl.where(outputs_last, i // CO, i % CI), tl.where(outputs_last, i % CO, i // CI)
    g = tl.zeros(i.shape, tl.float32)
    for pair in tl.static_range(1, 5, 2):
        if tl.load(row + pair + 1) != 0:
            x, dy = address(row + pair) + first * (H * W * CI), address(row + pair + 1) + first * (OH * OW * CO)
            for m0 in range(0, end, BM):
                m = m0 + tl.arange(0, BM)
                there = (m < end)[None, :] & mask[:, None]
                at, inside = _taps(m[None, :], k[:, None], there, H, W, CI, OH, OW, KH, KW, SH, SW, PT, PL, False)
                g += tl.sum(tl.load(x + at, inside, 0.0) * tl.load(dy + m[None, :] * CO + n[:, None], there, 0.0), 1)
    g *= tl.load(row + 9).to(tl.float32)
    if tl.load(row + 6) != 0:
        g *= tl.load(address(row + 6) + t * tl.load(row + 8))
    if tl.load(row + 5) != 0:
        g += tl.load(address(row + 5) + t * tl.load(row + 7) + i, mask, 0.0)
    return g
