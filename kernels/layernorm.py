"""layernorm and groupnorm: a sample is cut into ``SETS`` sets of ``MEMBERS`` numbers each, statistics are of each set; xhat = (x - mean) rstd.

    fwd             y = gamma xhat + beta
    jvp             yt = gamma xhat_t + gamma_t xhat + beta_t,   xhat_t = rstd proj(xt),   proj(v) = v - E[v] - xhat E[v xhat]
    bwd_input       dx = rstd proj(h),   h = gamma dy
    bwd_input_jvp   dxt = rstd proj(ht) - rstd^2 E[xt xhat] proj(h) - rstd (xhat_t E[h xhat] + xhat E[h xhat_t]),   ht = gamma dyt + gamma_t dy
    bwd_weight      dgamma = sum dy xhat,   dbeta = sum dy;   bwd_weight_jvp: sum (dyt xhat + dy xhat_t),   sum dyt

All numbers of a sample are [U][GN]: GN of them have a gamma of their own. layernorm: U sets of GN members each; groupnorm (images with channels last): U pixels of
GN channels, a set is GN / SETS channels of all pixels. The means E[.] of every set come first (``layernorm_moments``), then what reads them.
"""

import triton
import triton.language as tl
from fastmaml.kernels.tiles import channel, element, rows_of

MOMENTS = tl.constexpr(9)  # mean, rstd, E[xt], E[xt xhat], E[h], E[h xhat], E[ht], E[ht xhat], E[h xhat_t]


@triton.jit
def _h(dy, gamma, at, mask, j, t, task):
    """gamma dy of the numbers whose gamma is number j; zero where either is absent."""
    v = element(dy, at, mask)
    if dy is not None and gamma is not None:
        v *= tl.load(gamma + t * task + j, mask, 0.0)
    return v


@triton.jit
def _ht(dy, dyt, gamma, gamma_t, at, mask, j, t, task, GN):
    """gamma dyt + gamma_t dy."""
    out = _h(dyt, gamma, at, mask, j, t, task)
    if gamma_t is not None:
        out += _h(dy, gamma_t, at, mask, j, t, GN)
    return out


@triton.jit
def layernorm_moments(offsets, x, gamma, xt, gamma_t, dy, dyt, moments, eps, gamma_task, U: tl.constexpr, GN: tl.constexpr, SETS: tl.constexpr,
                      GROUPED: tl.constexpr, BS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """moments [row, set, MOMENTS]. Grid: blocks of the sets of a task's rows, tasks."""
    t = tl.program_id(1)
    first, rows = rows_of(offsets, t)
    q = tl.program_id(0) * BS + tl.arange(0, BS)
    WIDTH: tl.constexpr = GN // SETS if GROUPED else GN  # neighbours in memory
    MEMBERS: tl.constexpr = U * GN // SETS
    STRIDE: tl.constexpr = GN if GROUPED else 0
    SHIFT: tl.constexpr = WIDTH if GROUPED else 0  # from one set's gammas to the next one's
    if tl.program_id(0) * BS < rows * SETS:
        there = (q < rows * SETS)[:, None]
        start = ((first + q // SETS) * (U * GN) + q % SETS * WIDTH)[:, None]
        gamma0 = (q % SETS * SHIFT)[:, None]
        total = tl.zeros((BS, BLOCK), tl.float32)
        for i0 in range(0, MEMBERS, BLOCK):
            i = (i0 + tl.arange(0, BLOCK))[None, :]
            total += tl.load(x + start + i // WIDTH * STRIDE + i % WIDTH, there & (i < MEMBERS), 0.0)
        mean = (tl.sum(total, 1) / MEMBERS)[:, None]
        total = tl.zeros((BS, BLOCK), tl.float32)
        for i0 in range(0, MEMBERS, BLOCK):
            i = (i0 + tl.arange(0, BLOCK))[None, :]
            d = tl.load(x + start + i // WIDTH * STRIDE + i % WIDTH, there & (i < MEMBERS), 0.0) - mean
            total += tl.where(i < MEMBERS, d * d, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(total, 1) / MEMBERS + eps)[:, None]
        a1 = tl.zeros((BS, BLOCK), tl.float32)
        a2 = tl.zeros((BS, BLOCK), tl.float32)
        b1 = tl.zeros((BS, BLOCK), tl.float32)
        b2 = tl.zeros((BS, BLOCK), tl.float32)
        c1 = tl.zeros((BS, BLOCK), tl.float32)
        c2 = tl.zeros((BS, BLOCK), tl.float32)
        for i0 in range(0, MEMBERS, BLOCK):
            i = (i0 + tl.arange(0, BLOCK))[None, :]
            mask, at, j = there & (i < MEMBERS), start + i // WIDTH * STRIDE + i % WIDTH, gamma0 + i % WIDTH
            xhat = (tl.load(x + at, mask, 0.0) - mean) * rstd
            v = element(xt, at, mask)
            a1 += v
            a2 += v * xhat
            h = _h(dy, gamma, at, mask, j, t, gamma_task)
            b1 += h
            b2 += h * xhat
            ht = _ht(dy, dyt, gamma, gamma_t, at, mask, j, t, gamma_task, GN)
            c1 += ht
            c2 += ht * xhat
        ext, extx = (tl.sum(a1, 1) / MEMBERS)[:, None], (tl.sum(a2, 1) / MEMBERS)[:, None]
        total = tl.zeros((BS, BLOCK), tl.float32)
        if xt is not None:
            for i0 in range(0, MEMBERS, BLOCK):
                i = (i0 + tl.arange(0, BLOCK))[None, :]
                mask, at, j = there & (i < MEMBERS), start + i // WIDTH * STRIDE + i % WIDTH, gamma0 + i % WIDTH
                xhat = (tl.load(x + at, mask, 0.0) - mean) * rstd
                xhat_t = rstd * (tl.load(xt + at, mask, 0.0) - ext - xhat * extx)
                total += _h(dy, gamma, at, mask, j, t, gamma_task) * xhat_t
        out = moments + ((first * SETS + q) * MOMENTS)[:, None]
        tl.store(out, mean, there)
        tl.store(out + 1, rstd, there)
        tl.store(out + 2, ext, there)
        tl.store(out + 3, extx, there)
        tl.store(out + 4, (tl.sum(b1, 1) / MEMBERS)[:, None], there)
        tl.store(out + 5, (tl.sum(b2, 1) / MEMBERS)[:, None], there)
        tl.store(out + 6, (tl.sum(c1, 1) / MEMBERS)[:, None], there)
        tl.store(out + 7, (tl.sum(c2, 1) / MEMBERS)[:, None], there)
        tl.store(out + 8, (tl.sum(total, 1) / MEMBERS)[:, None], there)


@triton.jit
def _moment(moments, first, m, j, which: tl.constexpr, U: tl.constexpr, GN: tl.constexpr, SETS: tl.constexpr, GROUPED: tl.constexpr, mask):
    """[m, j] of one of the means."""
    if GROUPED:
        at = (first + m // U)[:, None] * SETS + (j // (GN // SETS))[None, :]
    else:
        at = (first * SETS + m)[:, None] + (j * 0)[None, :]
    return tl.load(moments + at * MOMENTS + which, mask, 0.0)


@triton.jit
def layernorm_rows(offsets, x, gamma, beta, xt, gamma_t, beta_t, dy, dyt, moments, y, gamma_task, beta_task, MODE: tl.constexpr, U: tl.constexpr,
                   GN: tl.constexpr, SETS: tl.constexpr, GROUPED: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """``fwd``, ``jvp``, ``bwd_input`` or ``bwd_input_jvp``. Grid: [rows * U], [GN], tasks."""
    t = tl.program_id(2)
    first, rows = rows_of(offsets, t)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    j = tl.program_id(1) * BC + tl.arange(0, BC)
    if tl.program_id(0) * BM < rows * U:
        mask = (m < rows * U)[:, None] & (j < GN)[None, :]
        at, jj = first * (U * GN) + m[:, None] * GN + j[None, :], (m * 0)[:, None] + j[None, :]
        r = _moment(moments, first, m, j, 1, U, GN, SETS, GROUPED, mask)
        xhat = (tl.load(x + at, mask, 0.0) - _moment(moments, first, m, j, 0, U, GN, SETS, GROUPED, mask)) * r
        extx = _moment(moments, first, m, j, 3, U, GN, SETS, GROUPED, mask)
        xhat_t = tl.zeros((BM, BC), tl.float32)
        if xt is not None:
            xhat_t = r * (tl.load(xt + at, mask, 0.0) - _moment(moments, first, m, j, 2, U, GN, SETS, GROUPED, mask) - xhat * extx)
        if MODE == "fwd":
            out = channel(gamma, t, gamma_task, j, j < GN, 1.0) * xhat + channel(beta, t, beta_task, j, j < GN, 0.0)
        elif MODE == "jvp":
            out = channel(gamma, t, gamma_task, j, j < GN, 1.0) * xhat_t + channel(gamma_t, t, GN, j, j < GN, 0.0) * xhat
            out += channel(beta_t, t, GN, j, j < GN, 0.0)
        else:
            ehx = _moment(moments, first, m, j, 5, U, GN, SETS, GROUPED, mask)
            h = _h(dy, gamma, at, mask, jj, t, gamma_task) - _moment(moments, first, m, j, 4, U, GN, SETS, GROUPED, mask) - xhat * ehx
            if MODE == "bwd_input":
                out = r * h
            else:
                ht = _ht(dy, dyt, gamma, gamma_t, at, mask, jj, t, gamma_task, GN) - _moment(moments, first, m, j, 6, U, GN, SETS, GROUPED, mask)
                out = r * (ht - xhat * _moment(moments, first, m, j, 7, U, GN, SETS, GROUPED, mask))
                out -= r * (r * extx * h + xhat_t * ehx + xhat * _moment(moments, first, m, j, 8, U, GN, SETS, GROUPED, mask))
        tl.store(y + at, out, mask)


@triton.jit
def layernorm_weight(offsets, x, xt, dy, dyt, moments, dgamma, dbeta, chunk, chunks, U: tl.constexpr, GN: tl.constexpr, SETS: tl.constexpr,
                     GROUPED: tl.constexpr, TANGENT: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """``bwd_weight`` or its TANGENT, of one chunk of a task's [rows * U]. Grid: [GN], chunks, tasks."""
    s, t = tl.program_id(1), tl.program_id(2)
    first, rows = rows_of(offsets, t)
    begin = s * chunk
    end = tl.minimum(begin + chunk, rows * U)
    j = tl.program_id(0) * BC + tl.arange(0, BC)
    if begin < end:
        one = tl.zeros((BC,), tl.float32)
        two = tl.zeros((BC,), tl.float32)
        for m0 in range(begin, end, BM):
            m = m0 + tl.arange(0, BM)
            at, mask = first * (U * GN) + m[:, None] * GN + j[None, :], (m < end)[:, None] & (j < GN)[None, :]
            r = _moment(moments, first, m, j, 1, U, GN, SETS, GROUPED, mask)
            xhat = (tl.load(x + at, mask, 0.0) - _moment(moments, first, m, j, 0, U, GN, SETS, GROUPED, mask)) * r
            if TANGENT:
                u = element(dyt, at, mask)
                v = u * xhat
                if xt is not None:
                    xhat_t = tl.load(xt + at, mask, 0.0) - _moment(moments, first, m, j, 2, U, GN, SETS, GROUPED, mask)
                    v += element(dy, at, mask) * r * (xhat_t - xhat * _moment(moments, first, m, j, 3, U, GN, SETS, GROUPED, mask))
            else:
                u = element(dy, at, mask)
                v = u * xhat
            one += tl.sum(u, 0)
            two += tl.sum(v, 0)
        at = (t.to(tl.int64) * chunks + s) * GN + j
        if dgamma is not None:
            tl.store(dgamma + at, two, j < GN)
        if dbeta is not None:
            tl.store(dbeta + at, one, j < GN)
