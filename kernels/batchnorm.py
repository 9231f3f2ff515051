"""batchnorm: x seen as [rows * pixels, channels]; xhat = (x - mean) rstd.

    stats_fwd        mean, rstd = 1 / sqrt(biased variance + eps), over the rows that make the statistics
    stats_jvp        mean_t = E[xt],   rstd_t = -rstd^3 E[(x - mean) xt]
    fwd              y = gamma xhat + beta
    jvp              yt = gamma xhat_t + gamma_t xhat + beta_t,   xhat_t = (xt - mean_t) rstd + (x - mean) rstd_t
    bwd_stats        s1 = sum dy,   s2 = sum dy xhat
    bwd_stats_jvp    s1t = sum dyt,   s2t = sum (dyt xhat + dy xhat_t)
    bwd_input        dx = gamma rstd (dy - [row made the statistics] (s1 + xhat s2) / N)
    bwd_input_jvp    the product rule on it

What is reduced is reduced in chunks: mean and sum of squares about it of each chunk, merged as of Chan et al. (1979), or plain sums (sum_chunks). Where a product
makes the rows, it makes their sums too (tile_sums.py).
A relu behind any of them that make rows, its reverse or its tangent, is done as they are stored (relu.activated).
In batchnorm_maxpool2d dy belongs to the pooled image: ``index`` says which pixel of each window it goes to. Where x, or xt, is chosen of an image in front of the
pool right before, it is chosen as it is loaded, and stored if somebody else asks for it.
"""

import triton
import triton.language as tl
from fastmaml.kernels.maxpool2d import extremum
from fastmaml.kernels.relu import activated
from fastmaml.kernels.tiles import channel, element, rows_of


@triton.jit
def batchnorm_moments(offsets, counted, x, means, squares, eps, chunk, chunks, C, P, WHOLE: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):
    """Of each chunk of rows that make the statistics: mean, and the sum of (x - mean)^2. WHOLE: of the only chunk mean and rstd, by the arithmetic of
    ``batchnorm_stats_fwd``. Grid: channels, chunks, tasks."""
    s, t = tl.program_id(1), tl.program_id(2)
    first, _ = rows_of(offsets, t)
    _, rows = rows_of(counted, t)
    begin = s * chunk
    end = tl.minimum(begin + chunk, rows * P)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    if begin < end:
        start = x + first * P * C
        total = tl.zeros((BC,), tl.float32)
        for m0 in range(begin, end, BM):
            m = m0 + tl.arange(0, BM)
            total += tl.sum(tl.load(start + m[:, None] * C + c[None, :], (m < end)[:, None] & (c < C)[None, :], 0.0), 0)
        mean = total / (end - begin)
        square = tl.zeros((BC,), tl.float32)
        for m0 in range(begin, end, BM):
            m = m0 + tl.arange(0, BM)
            mask = (m < end)[:, None] & (c < C)[None, :]
            d = tl.where(mask, tl.load(start + m[:, None] * C + c[None, :], mask, 0.0) - mean[None, :], 0.0)
            square += tl.sum(d * d, 0)
        if WHOLE:
            n = end - begin
            count = n.to(tl.float32)
            average = count * mean / n
            d = mean - average
            mean = average
            square = 1.0 / tl.sqrt((square + count * d * d) / n + eps)
        at = (t.to(tl.int64) * chunks + s) * C + c
        tl.store(means + at, mean, c < C)
        tl.store(squares + at, square, c < C)


@triton.jit
def batchnorm_stats_fwd(counted, means, squares, mean, rstd, eps, chunk, chunks, C, P, BS: tl.constexpr, BC: tl.constexpr):
    """Merges the chunks. Grid: channels, tasks."""
    t = tl.program_id(1)
    _, rows = rows_of(counted, t)
    n = rows * P
    own = tl.cdiv(n, chunk)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    total = tl.zeros((BC,), tl.float32)
    for s0 in range(0, own, BS):
        s = s0 + tl.arange(0, BS)
        count = tl.minimum(n - s * chunk, chunk).to(tl.float32)[:, None]
        at = (t * chunks + s).to(tl.int64)[:, None] * C + c[None, :]
        total += tl.sum(count * tl.load(means + at, (s < own)[:, None] & (c < C)[None, :], 0.0), 0)
    average = total / n
    square = tl.zeros((BC,), tl.float32)
    for s0 in range(0, own, BS):
        s = s0 + tl.arange(0, BS)
        count = tl.minimum(n - s * chunk, chunk).to(tl.float32)[:, None]
        at = (t * chunks + s).to(tl.int64)[:, None] * C + c[None, :]
        mask = (s < own)[:, None] & (c < C)[None, :]
        d = tl.load(means + at, mask, 0.0) - average[None, :]
        square += tl.sum(tl.where(mask, tl.load(squares + at, mask, 0.0) + count * d * d, 0.0), 0)
    tl.store(mean + t * C + c, average, c < C)
    tl.store(rstd + t * C + c, 1.0 / tl.sqrt(square / n + eps), c < C)


@triton.jit
def batchnorm_running_fwd(running_mean, running_var, mean, rstd, eps, C, mean_task, var_task, BC: tl.constexpr):
    """The same from running statistics. Grid: channels, tasks."""
    t = tl.program_id(1)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    tl.store(mean + t * C + c, tl.load(running_mean + t * mean_task + c, c < C, 0.0), c < C)
    tl.store(rstd + t * C + c, 1.0 / tl.sqrt(tl.load(running_var + t * var_task + c, c < C, 1.0) + eps), c < C)


@triton.jit
def batchnorm_stats_jvp(counted, sums, products, rstd, mean_t, rstd_t, chunk, chunks, C, P, BS: tl.constexpr, BC: tl.constexpr):
    """From the chunks' sums of xt and (x - mean) xt. Grid: channels, tasks."""
    t = tl.program_id(1)
    _, rows = rows_of(counted, t)
    n = rows * P
    own = tl.cdiv(n, chunk)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    first = tl.zeros((BC,), tl.float32)
    second = tl.zeros((BC,), tl.float32)
    for s0 in range(0, own, BS):
        s = s0 + tl.arange(0, BS)
        at = (t * chunks + s).to(tl.int64)[:, None] * C + c[None, :]
        mask = (s < own)[:, None] & (c < C)[None, :]
        first += tl.sum(tl.load(sums + at, mask, 0.0), 0)
        second += tl.sum(tl.load(products + at, mask, 0.0), 0)
    r = tl.load(rstd + t * C + c, c < C, 0.0)
    tl.store(mean_t + t * C + c, first / n, c < C)
    tl.store(rstd_t + t * C + c, -r * r * r * (second / n), c < C)


@triton.jit
def _xhat_t(d, xt, r, c, t, mask_c, mean_t, rstd_t, C):
    """(xt - mean_t) rstd + (x - mean) rstd_t with d = x - mean."""
    return (xt - channel(mean_t, t, C, c, mask_c, 0.0)) * r + d * channel(rstd_t, t, C, c, mask_c, 0.0)


@triton.jit
def second_term(u, d, r, dy, xt, mean_t, rstd_t, at, mask, t, c, C, MODE: tl.constexpr):
    """Of the second sum of ``stats_jvp``, ``bwd_stats`` or ``bwd_stats_jvp`` with u = xt, dy or dyt, d = x - mean, r = rstd."""
    if MODE == "stats_jvp":
        return d * u
    else:
        v = u * d * r
        if MODE == "bwd_stats_jvp" and dy is not None:
            v += tl.load(dy + at, mask, 0.0) * _xhat_t(d, element(xt, at, mask), r, c, t, c < C, mean_t, rstd_t, C)
        return v


@triton.jit
def batchnorm_sums(offsets, counted, x, mean, rstd, dy, xt, mean_t, rstd_t, dyt, sums, products, chunk, chunks, C, P,
                   MODE: tl.constexpr, WHOLE: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """Of each chunk, the two sums (either may be unwanted) of ``stats_jvp``, ``bwd_stats`` or ``bwd_stats_jvp``. WHOLE: of the only chunk what they are for;
    for ``stats_jvp`` that is mean_t and rstd_t. Grid: channels, chunks, tasks."""
    s, t = tl.program_id(1), tl.program_id(2)
    first, _ = rows_of(offsets, t)
    _, rows = rows_of(counted, t)
    begin = s * chunk
    end = tl.minimum(begin + chunk, rows * P)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    if begin < end:
        start = first * P * C
        mu, r = channel(mean, t, C, c, c < C, 0.0), channel(rstd, t, C, c, c < C, 0.0)
        one = tl.zeros((BC,), tl.float32)
        two = tl.zeros((BC,), tl.float32)
        for m0 in range(begin, end, BM):
            m = m0 + tl.arange(0, BM)
            at, mask = start + m[:, None] * C + c[None, :], (m < end)[:, None] & (c < C)[None, :]
            d = tl.load(x + at, mask, 0.0) - mu
            if MODE == "stats_jvp":
                u = element(xt, at, mask)
            elif MODE == "bwd_stats":
                u = element(dy, at, mask)
            else:
                u = element(dyt, at, mask)
            v = second_term(u, d, r, dy, xt, mean_t, rstd_t, at, mask, t, c, C, MODE)
            one += tl.sum(u, 0)
            two += tl.sum(tl.where(mask, v, 0.0), 0)
        if WHOLE and MODE == "stats_jvp":
            n = end - begin
            q = tl.load(rstd + t * C + c, c < C, 0.0)
            one = one / n
            two = -q * q * q * (two / n)
        at = (t.to(tl.int64) * chunks + s) * C + c
        if sums is not None:
            tl.store(sums + at, one, c < C)
        if products is not None:
            tl.store(products + at, two, c < C)


@triton.jit
def _cotangent(dy, index, first, m, c, at, mask, C, POOLED: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr, KH: tl.constexpr,
               KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, P):  # fmt: skip
    """dy at pixels m; POOLED: that of a pixel's window where the pixel was chosen, zero elsewhere."""
    if dy is None:
        return tl.zeros(at.shape, tl.float32)
    elif not POOLED:
        return tl.load(dy + at, mask, 0.0)
    else:
        p = m % P
        h, w = p // W, p % W
        inside = mask & ((h % SH < KH) & (w % SW < KW) & (h // SH < OH) & (w // SW < OW))[:, None]
        q = (first + m // P)[:, None] * (OH * OW * C) + ((h // SH * OW + w // SW) * C)[:, None] + c[None, :]
        return tl.where(tl.load(index + q, inside, -1) == p[:, None], tl.load(dy + q, inside, 0.0), 0.0)


@triton.jit
def _chosen(x, out, index, gamma, first, m, c, at, mask, C, POOLED: tl.constexpr, H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr,
            OW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr):  # fmt: skip
    """x at pixels m; POOLED: of images before the pool what ``index`` says ("gather"), or the extremum by the sign of gamma ("choose", index is made); also to out."""
    if x is None:
        return tl.zeros(at.shape, tl.float32)
    elif POOLED is None:
        return tl.load(x + at, mask, 0.0)
    else:
        q = m % (OH * OW)
        image = (first + m // (OH * OW))[:, None] * (H * W * C) + c[None, :]
        if POOLED == "choose":
            sign = tl.where(gamma > 0, 1.0, tl.where(gamma < 0, -1.0, 0.0))
            chosen = extremum(x, image, (q // OW * SH)[:, None], (q % OW * SW)[:, None], sign, mask, C, H, W, KH, KW)
            if index is not None:
                tl.store(index + at, chosen, mask)
        else:
            chosen = tl.load(index + at, mask, 0)
        v = tl.load(x + image + chosen * C, mask, 0.0)
        if out is not None:
            tl.store(out + at, v, mask)
        return v


@triton.jit
def batchnorm_rows(offsets, counted, x, mean, rstd, gamma, beta, dy, index, s1, s2, xt, mean_t, rstd_t, gamma_t, beta_t, dyt, s1t, s2t, relu_mask, y,
                   x_out, xt_out, gamma_task, beta_task, C, P, MODE: tl.constexpr, X_POOLED: tl.constexpr, XT_POOLED: tl.constexpr, DY_POOLED: tl.constexpr,
                   H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
                   BM: tl.constexpr, BC: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):  # fmt: skip
    """activated(``fwd``, ``jvp``, ``bwd_input`` or ``bwd_input_jvp``); ``counted`` None: statistics that no row made. Grid: pixels, channels, tasks.

    X_POOLED, XT_POOLED: how x and xt are chosen of images, stored to x_out and xt_out (``_chosen``). DY_POOLED: dy and dyt are of pooled images.

    activated: y > 0 ? y : slope y, mask = y > 0 ("make"); mask ? y : slope y ("apply"); y (None)."""
    t = tl.program_id(2)
    first, rows = rows_of(offsets, t)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    if tl.program_id(0) * BM < rows * P:
        some = c < C
        at, mask = first * P * C + m[:, None] * C + c[None, :], (m < rows * P)[:, None] & some[None, :]
        r, g = channel(rstd, t, C, c, some, 0.0), channel(gamma, t, gamma_task, c, some, 1.0)
        d = _chosen(x, x_out, index, g, first, m, c, at, mask, C, X_POOLED, H, W, OH, OW, KH, KW, SH, SW) - channel(mean, t, C, c, some, 0.0)
        xhat = d * r
        if MODE == "fwd":
            out = g * xhat + channel(beta, t, beta_task, c, some, 0.0)
        elif MODE == "jvp":
            u = _chosen(xt, xt_out, index, g, first, m, c, at, mask, C, XT_POOLED, H, W, OH, OW, KH, KW, SH, SW)
            out = g * _xhat_t(d, u, r, c, t, some, mean_t, rstd_t, C)
            out += channel(gamma_t, t, C, c, some, 0.0) * xhat + channel(beta_t, t, C, c, some, 0.0)
        else:
            grad = _cotangent(dy, index, first, m, c, at, mask, C, DY_POOLED, W, OH, OW, KH, KW, SH, SW, P)
            one, two = channel(s1, t, C, c, some, 0.0), channel(s2, t, C, c, some, 0.0)
            share = tl.zeros((BM, 1), tl.float32)
            if counted is not None:
                _, made = rows_of(counted, t)
                share = tl.where(m < made * P, 1.0 / (made * P), 0.0)[:, None]
            inner = grad - share * (one + xhat * two)
            if MODE == "bwd_input":
                out = g * r * inner
            else:
                xhat_t = _xhat_t(d, element(xt, at, mask), r, c, t, some, mean_t, rstd_t, C)
                more = channel(s1t, t, C, c, some, 0.0) + xhat * channel(s2t, t, C, c, some, 0.0) + xhat_t * two
                grad_t = _cotangent(dyt, index, first, m, c, at, mask, C, DY_POOLED, W, OH, OW, KH, KW, SH, SW, P)
                out = g * r * (grad_t - share * more)
                out += (channel(gamma_t, t, C, c, some, 0.0) * r + g * channel(rstd_t, t, C, c, some, 0.0)) * inner
        tl.store(y + at, activated(out, relu_mask, at, mask, ACTIVATION, SLOPE), mask)
