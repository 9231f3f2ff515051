"""Smooth activations f, number by number: tanh, sigmoid, exp, elu, gelu, silu, softplus.

    fwd   y = f(x)          jvp   yt = f'(x) xt          bwd   dx = f'(x) dy          bwd_jvp   dxt = f'(x) dyt + f''(x) xt dy

Triton's exp is good to rounding, but 1 - exp(x) and log(1 + z) cancel; so expm1 and log1p are series where they must be.
"""

import triton
import triton.language as tl


@triton.jit
def _expm1(x):
    """exp(x) - 1: for small x its series (the first term left out is below 2^-30)."""
    series = 1 + x / 8 * (1 + x / 9)
    series = 1 + x / 5 * (1 + x / 6 * (1 + x / 7 * series))
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * series)))
    return tl.where(tl.abs(x) < 0.5, series, tl.exp(x) - 1)


@triton.jit
def _log1p(z):
    """log(1 + z) for z in 0 .. 1: 2 artanh(z / (2 + z))."""
    s = z / (2 + z)
    q = s * s
    series = 1.0 / 11 + q * (1.0 / 13 + q * (1.0 / 15 + q / 17))
    return 2 * s * (1 + q * (1.0 / 3 + q * (1.0 / 5 + q * (1.0 / 7 + q * (1.0 / 9 + q * series)))))


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1 / (1 + e), e / (1 + e))


@triton.jit
def _sigmoid_slope(x):
    """s (1 - s), which cancels nowhere."""
    e = tl.exp(-tl.abs(x))
    return e / ((1 + e) * (1 + e))


@triton.jit
def _tanh(x):
    e = _expm1(-2 * tl.abs(x))  # in -1 .. 0
    y = -e / (2 + e)
    return tl.where(x >= 0, y, -y)


@triton.jit
def derivatives(x, NAME: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """f(x), f'(x), f''(x). ``A``, ``B``: alpha of elu; beta and threshold of softplus."""
    if NAME == "tanh":
        y = _tanh(x)
        slope = 4 * _sigmoid_slope(2 * x)  # 1 - y^2
        return y, slope, -2 * y * slope
    elif NAME == "sigmoid":
        y = _sigmoid(x)
        slope = _sigmoid_slope(x)
        return y, slope, -slope * _tanh(0.5 * x)
    elif NAME == "exp":
        y = tl.exp(x)
        return y, y, y
    elif NAME == "silu":
        s = _sigmoid(x)
        d = _sigmoid_slope(x)
        return x * s, s + x * d, d * (2 - x * _tanh(0.5 * x))
    elif NAME == "elu":
        e = A * _expm1(tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL))
        slope = tl.where(x > 0, 1.0, e + A)
        return tl.where(x > 0, x, e), slope, tl.where(x > 0, 0.0, slope)
    elif NAME == "softplus":
        z = A * x
        s = _sigmoid(z)
        soft = (tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL) + _log1p(tl.exp(-tl.abs(z)))) / A
        return tl.where(z > B, x, soft), tl.where(z > B, 1.0, s), tl.where(z > B, 0.0, A * _sigmoid_slope(z))
    elif NAME == "gelu":
        cdf = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        pdf = tl.exp(-0.5 * x * x) * 0.3989422804014327
        return x * cdf, cdf + x * pdf, (2 - x * x) * pdf
    else:  # gelu by tanh
        u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        v = _tanh(u)
        slope = 4 * _sigmoid_slope(2 * u)
        du = 0.7978845608028654 * (1 + 0.134145 * x * x)
        dv = slope * du
        ddv = slope * (0.2140644488 * x - 2 * v * du * du)
        return 0.5 * x * (1 + v), 0.5 * (1 + v) + 0.5 * x * dv, dv + 0.5 * x * ddv


@triton.jit
def activation(count, x, xt, dy, dyt, y, per, NAME: tl.constexpr, MODE: tl.constexpr, A: tl.constexpr, B: tl.constexpr, BLOCK: tl.constexpr):
    """y of *count rows of ``per`` numbers each. Grid: blocks."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < tl.load(count).to(tl.int64) * per
    f, f1, f2 = derivatives(tl.load(x + i, mask, 0.0), NAME, A, B)
    if MODE == "fwd":
        out = f
    elif MODE == "jvp":
        out = f1 * tl.load(xt + i, mask, 0.0)
    elif MODE == "bwd":
        out = f1 * tl.load(dy + i, mask, 0.0)
    else:
        out = tl.zeros((BLOCK,), tl.float32)
        if dyt is not None:
            out += f1 * tl.load(dyt + i, mask, 0.0)
        if dy is not None and xt is not None:
            out += f2 * tl.load(xt + i, mask, 0.0) * tl.load(dy + i, mask, 0.0)
    tl.store(y + i, out, mask)
