"""patch_moments and patch_stats: batch statistics of a convolution of the samples from the moments of its patches (fastmaml/plan/patches.py says why).

    patch_moments_fwd     m [size] and C [size, size], size = channels * taps in the order of the plain weight: [2, 1 + size, size], a float and what it leaves
    patch_stats_fwd       mean = w . m,     rstd = 1 / sqrt(w^T C w + eps)
    patch_stats_jvp       mean_t = wt . m,  rstd_t = -rstd^3 w^T C wt
    patch_stats_bwd       dw = -gamma rstd (s1 m + rstd s2 C w)
    patch_stats_bwd_jvp   the product rule on it

All in double: of neighbouring pixels, which are nearly equal, a filter takes the small difference. The products are small: sums, without tensor cores.
"""

import triton
import triton.language as tl
from fastmaml.kernels.conv2d import _taps
from fastmaml.kernels.tiles import rows_of, updated


@triton.jit
def _patches(x, m, k, rows, H: tl.constexpr, W: tl.constexpr, CI: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
             SH: tl.constexpr, SW: tl.constexpr, PT: tl.constexpr, PL: tl.constexpr):  # fmt: skip
    """Elements k of the patches of pixels m [pixels, elements]; of element -1, a one."""
    turned = k % (KH * KW) * CI + k // (KH * KW)  # the order of the packed weight
    there = (m < rows)[:, None] & (k >= 0)[None, :]
    at, mask = _taps(m[:, None], tl.where(k >= 0, turned, 0)[None, :], there, H, W, CI, OH, OW, KH, KW, SH, SW, PT, PL, False)
    found = tl.load(x + at, mask & (k < KH * KW * CI)[None, :], 0.0)
    return tl.where((m < rows)[:, None] & (k == -1)[None, :], 1.0, found).to(tl.float64)


@triton.jit
def patch_moments_sums(offsets, x, sums, chunk, chunks, TILES: tl.constexpr, H: tl.constexpr, W: tl.constexpr, CI: tl.constexpr, OH: tl.constexpr,
                       OW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PT: tl.constexpr, PL: tl.constexpr,
                       BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Of each chunk of a task's pixels [1 + size, size]: the sum of the patches, and of their outer products. Grid: tiles, chunks, tasks."""
    s, t = tl.program_id(1), tl.program_id(2)
    first, rows = rows_of(offsets, t)
    begin = s * chunk
    end = tl.minimum(begin + chunk, rows * (OH * OW))
    i = tl.program_id(0) // TILES * BN + tl.arange(0, BN) - 1
    j = tl.program_id(0) % TILES * BN + tl.arange(0, BN)
    if begin < end:
        image = x + first * (H * W * CI)
        acc = tl.zeros((BN, BN), tl.float64)
        for m0 in range(begin, end, BM):
            m = m0 + tl.arange(0, BM)
            a = _patches(image, m, i, end, H, W, CI, OH, OW, KH, KW, SH, SW, PT, PL)
            b = _patches(image, m, j, end, H, W, CI, OH, OW, KH, KW, SH, SW, PT, PL)
            acc += tl.sum(a[:, :, None] * b[:, None, :], 0)
        size = KH * KW * CI
        at = (t.to(tl.int64) * chunks + s) * ((1 + size) * size) + (1 + i)[:, None] * size + j[None, :]
        tl.store(sums + at, acc, (i < size)[:, None] & (j < size)[None, :])


@triton.jit
def patch_moments_fwd(offsets, sums, moments, chunk, chunks, pixels, size, moments_task, BS: tl.constexpr, BLOCK: tl.constexpr):
    """Merges the chunks. Grid: numbers, tasks."""
    t = tl.program_id(1)
    _, rows = rows_of(offsets, t)
    n = rows * pixels
    own = tl.cdiv(n, chunk)
    numbers = (1 + size) * size
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i, j = e // size - 1, e % size
    whole = tl.zeros((BLOCK,), tl.float64)
    left = tl.zeros((BLOCK,), tl.float64)
    right = tl.zeros((BLOCK,), tl.float64)
    for s0 in range(0, own, BS):
        s = s0 + tl.arange(0, BS)
        row = sums + (t * chunks + s).to(tl.int64)[:, None] * numbers
        mask = (s < own)[:, None] & (e < numbers)[None, :]
        whole += tl.sum(tl.load(row + e[None, :], mask, 0.0), 0)
        left += tl.sum(tl.load(row + i[None, :], mask & (i >= 0)[None, :], 0.0), 0)
        right += tl.sum(tl.load(row + j[None, :], mask, 0.0), 0)
    value = whole / n - left / n * (right / n)
    high = value.to(tl.float32)
    at = moments + t.to(tl.int64) * moments_task + e
    tl.store(at, high, e < numbers)
    tl.store(at + numbers, (value - high.to(tl.float64)).to(tl.float32), e < numbers)


@triton.jit
def _double(values, t, stride, o, outputs, absent: tl.constexpr):
    """[1, outputs] of a task's vector, or the number that an absent one stands for."""
    if values is None:
        return tl.full((1, o.shape[0]), absent, tl.float64)
    else:
        return tl.load(values + t * stride + o, o < outputs, 0.0).to(tl.float64)[None, :]


@triton.jit
def _moment(moments, at, mask, size):
    low = tl.load(moments + (1 + size) * size + at, mask, 0.0)
    return tl.load(moments + at, mask, 0.0).to(tl.float64) + low.to(tl.float64)


@triton.jit
def _weight(w, k, o, CI, TAPS, outputs):
    at = (k % TAPS * CI + k // TAPS)[:, None] * outputs + o[None, :]
    return tl.load(w + at, (k < TAPS * CI)[:, None] & (o < outputs)[None, :], 0.0).to(tl.float64)


@triton.jit
def _rows_of_product(moments, w, i, o, CI, TAPS, outputs, BJ: tl.constexpr):
    """Rows i of C w for the outputs o."""
    size = TAPS * CI
    y = tl.zeros((i.shape[0], o.shape[0]), tl.float64)
    for j0 in range(0, size, BJ):
        j = j0 + tl.arange(0, BJ)
        c = _moment(moments, (1 + i)[:, None] * size + j[None, :], (i < size)[:, None] & (j < size)[None, :], size)
        y += tl.sum(c[:, :, None] * _weight(w, j, o, CI, TAPS, outputs)[None, :, :], 1)
    return y


@triton.jit
def patch_stats(moments, w, rstd, wt, mean, second, eps, CI, TAPS, outputs, moments_task, w_task, wt_task, BI: tl.constexpr, BO: tl.constexpr):
    """``fwd``: mean and rstd; ``jvp`` (``wt`` is there): their tangents. Grid: outputs, tasks."""
    t = tl.program_id(1).to(tl.int64)
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    moments, w = moments + t * moments_task, w + t * w_task
    other = w if wt is None else wt + t * wt_task
    size = TAPS * CI
    one = tl.zeros((BO,), tl.float64)
    two = tl.zeros((BO,), tl.float64)
    for i0 in range(0, size, BI):
        i = i0 + tl.arange(0, BI)
        y = _rows_of_product(moments, w, i, o, CI, TAPS, outputs, BI)
        v = _weight(other, i, o, CI, TAPS, outputs)
        one += tl.sum(_moment(moments, i, i < size, size)[:, None] * v, 0)
        two += tl.sum(v * y, 0)
    if wt is None:
        two = 1.0 / tl.sqrt(tl.maximum(two, 0.0) + eps)
    else:
        r = tl.load(rstd + t * outputs + o, o < outputs, 0.0).to(tl.float64)
        two = -r * r * r * two
    tl.store(mean + t * outputs + o, one.to(tl.float32), o < outputs)
    tl.store(second + t * outputs + o, two.to(tl.float32), o < outputs)


@triton.jit
def patch_stats_weight(moments, w, gamma, rstd, s1, s2, wt, gamma_t, rstd_t, s1t, s2t, plus, base, scale, sign, dw, CI, TAPS, outputs,
                       moments_task, w_task, gamma_task, wt_task, plus_task, base_task, scale_task, dw_task,
                       TANGENT: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr):  # fmt: skip
    """``bwd``; TANGENT: ``bwd_jvp``. With ``plus`` the sum of both, and with a base base + sign scale times that. Grid: rows of the weight, outputs, tasks."""
    t = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    o = tl.program_id(1) * BO + tl.arange(0, BO)
    moments, w = moments + t * moments_task, w + t * w_task
    size = TAPS * CI
    g, r = _double(gamma, t, gamma_task, o, outputs, 1.0), _double(rstd, t, outputs, o, outputs, 0.0)
    one, two = _double(s1, t, outputs, o, outputs, 0.0), _double(s2, t, outputs, o, outputs, 0.0)
    gr = g * r
    a, e = gr * one, gr * r * two
    m = _moment(moments, i, i < size, size)[:, None]
    y = _rows_of_product(moments, w, i, o, CI, TAPS, outputs, BI)
    if TANGENT:
        rt = _double(rstd_t, t, outputs, o, outputs, 0.0)
        gr_t = _double(gamma_t, t, outputs, o, outputs, 0.0) * r + g * rt
        a_t = gr_t * one + gr * _double(s1t, t, outputs, o, outputs, 0.0)
        e_t = (gr_t * r + gr * rt) * two + gr * r * _double(s2t, t, outputs, o, outputs, 0.0)
        v = a_t * m + e_t * y
        if wt is not None:
            v += e * _rows_of_product(moments, wt + t * wt_task, i, o, CI, TAPS, outputs, BI)
    else:
        v = a * m + e * y
    at = (i % TAPS * CI + i // TAPS)[:, None] * outputs + o[None, :]
    there = (i < size)[:, None] & (o < outputs)[None, :]
    if plus is not None:
        v -= tl.load(plus + t * plus_task + at, there, 0.0).to(tl.float64)
    v = updated(-v.to(tl.float32), base, scale, sign, scale_task, t, t * base_task + at, there)
    tl.store(dw + t * dw_task + at, v, there)
