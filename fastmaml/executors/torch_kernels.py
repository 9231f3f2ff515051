"""One short function per ``<op>_<mode>``: the readable truth that every other executor is held against.

Each takes (task, attrs, *inputs) and returns its outputs. Absent operands are None and count as zero. Plain torch functions, any dtype and device, no
autograd. ``task`` knows the rows of each extent and the ways. Formulas: x, w, b, y values; dx, dy gradients; a trailing t marks a tangent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Attrs = Mapping[str, Any]
KERNELS: dict[str, Callable[..., Any]] = {}


def kernel(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            KERNELS[name] = function
        return function

    return register


def total(*terms: Tensor | None) -> Tensor | None:
    """Sum of the terms that are there."""
    given = [term for term in terms if term is not None]
    return sum(given[1:], given[0]) if given else None


def times(*factors: Tensor | None) -> Tensor | None:
    """Product, zero (None) if any factor is."""
    if any(factor is None for factor in factors):
        return None
    out = factors[0]
    for factor in factors[1:]:
        out = out * factor
    return out


# ---------------------------------------------------------------------------------------------------------------- linear, conv2d
@kernel("linear_fwd")
def linear_fwd(task, attrs: Attrs, x, w, b):  # y = x w^T + b
    return F.linear(x, w, b)


@kernel("linear_jvp")
def linear_jvp(task, attrs: Attrs, x, w, xt, wt, bt):  # yt = xt w^T + x wt^T + bt
    yt = total(None if xt is None else F.linear(xt, w), None if wt is None else F.linear(x, wt))
    return bt.expand(*x.shape[:-1], -1) if yt is None else yt if bt is None else yt + bt


@kernel("linear_bwd_input")
def linear_bwd_input(task, attrs: Attrs, dy, w):  # dx = dy w
    return dy @ w


@kernel("linear_bwd_input_jvp")
def linear_bwd_input_jvp(task, attrs: Attrs, dy, w, dyt, wt):  # dxt = dyt w + dy wt
    return total(None if dyt is None else dyt @ w, None if wt is None else dy @ wt)


@kernel("linear_bwd_weight")
def linear_bwd_weight(task, attrs: Attrs, x, dy):  # dw = dy^T x, db = sum dy
    dy2 = dy.flatten(0, -2)
    return dy2.T @ x.flatten(0, -2), dy2.sum(0)


@kernel("linear_bwd_weight_jvp")
def linear_bwd_weight_jvp(task, attrs: Attrs, x, dy, xt, dyt):  # dwt = dyt^T x + dy^T xt, dbt = sum dyt
    first = (None, None) if dyt is None else linear_bwd_weight(task, attrs, x, dyt)
    return total(first[0], None if xt is None else linear_bwd_weight(task, attrs, xt, dy)[0]), first[1]


@kernel("gram_fwd")
def gram_fwd(task, attrs: Attrs, x, xs):  # G = x xs^T, in double: it is large where images share a mean, and D mostly cancels it
    return x.flatten(1).double() @ xs.flatten(1).double().T


@kernel("factored_linear_fwd")
def factored_linear_fwd(task, attrs: Attrs, base, gram, state, b):  # y = A + G D + b
    y = base + gram @ state.double()
    return (y if b is None else y + b).to(base.dtype)


@kernel("factored_linear_jvp")
def factored_linear_jvp(task, attrs: Attrs, direction, bt):
    return bt.expand(task.rows["support"], -1) if direction is None else direction + bt


@kernel("factored_linear_bwd", "factored_linear_bwd_jvp")
def factored_linear_bwd(task, attrs: Attrs, gram, dy):  # D_bar = G^T dy
    return (gram.T @ dy.double()).to(dy.dtype)


@kernel("row_sum_bwd", "row_sum_bwd_jvp")
def row_sum_bwd(task, attrs: Attrs, dy):  # db = sum dy
    return dy.sum(0)


def _padded(x: Tensor, attrs: Attrs) -> Tensor:
    top, bottom, left, right = attrs["padding"]
    return F.pad(x, (left, right, top, bottom))


@kernel("conv2d_fwd")
def conv2d_fwd(task, attrs: Attrs, x, w, b):  # y = x * w + b, zero padding (top, bottom, left, right)
    return F.conv2d(_padded(x, attrs), w, b, attrs["stride"])


@kernel("conv2d_jvp")
def conv2d_jvp(task, attrs: Attrs, x, w, xt, wt, bt):  # yt = xt * w + x * wt + bt
    yt = total(
        None if xt is None else conv2d_fwd(task, attrs, xt, w, None),
        None if wt is None else conv2d_fwd(task, attrs, x, wt, None),
    )
    if yt is None:
        return torch.zeros_like(conv2d_fwd(task, attrs, x, w, None)) + bt[:, None, None]
    return yt if bt is None else yt + bt[:, None, None]


def _conv2d_bwd_input(attrs: Attrs, dy: Tensor, w: Tensor) -> Tensor:
    top, bottom, left, right = attrs["padding"]
    h, wd = attrs["input_shape"][1:]
    shape = (len(dy), w.shape[1], h + top + bottom, wd + left + right)
    dx = torch.nn.grad.conv2d_input(shape, w, dy, attrs["stride"])
    return dx[:, :, top : top + h, left : left + wd]


@kernel("conv2d_bwd_input")
def conv2d_bwd_input(task, attrs: Attrs, dy, w):  # the transposed convolution of dy with w
    return _conv2d_bwd_input(attrs, dy, w)


@kernel("conv2d_bwd_input_jvp")
def conv2d_bwd_input_jvp(task, attrs: Attrs, dy, w, dyt, wt):
    return total(
        None if dyt is None else _conv2d_bwd_input(attrs, dyt, w), None if wt is None else _conv2d_bwd_input(attrs, dy, wt)
    )


@kernel("conv2d_bwd_weight")
def conv2d_bwd_weight(task, attrs: Attrs, x, dy):  # dw[o, i] = sum over samples and pixels of dy[o] x[i] shifted by the tap
    dw = torch.nn.grad.conv2d_weight(_padded(x, attrs), attrs["weight_shape"], dy, attrs["stride"])
    return dw, dy.sum((0, 2, 3))


@kernel("conv2d_bwd_weight_jvp")
def conv2d_bwd_weight_jvp(task, attrs: Attrs, x, dy, xt, dyt):
    first = (None, None) if dyt is None else conv2d_bwd_weight(task, attrs, x, dyt)
    return total(first[0], None if xt is None else conv2d_bwd_weight(task, attrs, xt, dy)[0]), first[1]


# ---------------------------------------------------------------------------------------------------------------- normalisation
def _channels(v: Tensor | None, x: Tensor) -> Tensor | None:
    """[c] against [n, c, ...]."""
    return None if v is None else v.view(-1, *[1] * (x.dim() - 2))


def _stat_rows(task, attrs: Attrs, x: Tensor) -> Tensor:
    return x[: task.rows[attrs["stat_rows"]]]


def _reduced(x: Tensor) -> tuple[int, ...]:
    return (0, *range(2, x.dim()))


@kernel("batchnorm_stats_fwd")
def batchnorm_stats_fwd(task, attrs: Attrs, x):  # mean, 1 / sqrt(biased variance + eps)
    var, mean = torch.var_mean(_stat_rows(task, attrs, x), _reduced(x), correction=0)
    return mean, (var + attrs["eps"]).rsqrt()


@kernel("batchnorm_running_fwd")
def batchnorm_running_fwd(task, attrs: Attrs, running_mean, running_var):
    return running_mean, (running_var + attrs["eps"]).rsqrt()


@kernel("batchnorm_stats_jvp")
def batchnorm_stats_jvp(task, attrs: Attrs, x, mean, rstd, xt):  # meant = E[xt], rstdt = -rstd^3 E[(x - mean) xt]
    x, xt = _stat_rows(task, attrs, x), _stat_rows(task, attrs, xt)
    return xt.mean(_reduced(x)), -(rstd**3) * ((x - _channels(mean, x)) * xt).mean(_reduced(x))


@kernel("batchnorm_fwd")
def batchnorm_fwd(task, attrs: Attrs, x, mean, rstd, gamma, beta):  # y = gamma (x - mean) rstd + beta
    y = (x - _channels(mean, x)) * _channels(rstd, x)
    y = y if gamma is None else y * _channels(gamma, x)
    return y if beta is None else y + _channels(beta, x)


def _xhat_t(x, mean, rstd, xt, mean_t, rstd_t):
    """(xt - meant) rstd + (x - mean) rstdt."""
    centred = xt if mean_t is None or xt is None else xt - _channels(mean_t, x)
    return total(times(centred, _channels(rstd, x)), times(x - _channels(mean, x), _channels(rstd_t, x)))


@kernel("batchnorm_jvp")
def batchnorm_jvp(task, attrs: Attrs, x, mean, rstd, gamma, xt, mean_t, rstd_t, gamma_t, beta_t):
    xhat = (x - _channels(mean, x)) * _channels(rstd, x)
    xhat_t = _xhat_t(x, mean, rstd, xt, mean_t, rstd_t)
    yt = total(xhat_t if gamma is None else times(xhat_t, _channels(gamma, x)), times(xhat, _channels(gamma_t, x)))
    if beta_t is None:
        return yt
    return torch.zeros_like(x) + _channels(beta_t, x) if yt is None else yt + _channels(beta_t, x)


@kernel("batchnorm_bwd_stats")
def batchnorm_bwd_stats(task, attrs: Attrs, x, mean, rstd, dy):  # sum dy, sum dy xhat: also dbeta, dgamma
    xhat = (x - _channels(mean, x)) * _channels(rstd, x)
    return dy.sum(_reduced(x)), (dy * xhat).sum(_reduced(x))


def _correction(task, attrs: Attrs, x: Tensor, s1, xhat, s2, *more: tuple[Tensor, Tensor]) -> Tensor | float:
    """(s1 + xhat s2) / N on the rows that made the statistics, zero on the others."""
    if attrs["stat_rows"] is None:
        return 0.0
    rows = task.rows[attrs["stat_rows"]]
    value = total(_channels(s1, x), times(xhat, _channels(s2, x)), *(times(a, _channels(b, x)) for a, b in more))
    if value is None:
        return 0.0
    value = (value / (x[:1, :1].numel() * rows)).expand_as(x)
    if rows == len(x):
        return value
    keep = (torch.arange(len(x), device=x.device) < rows).view(-1, *[1] * (x.dim() - 1))
    return value * keep


@kernel("batchnorm_bwd_input")
def batchnorm_bwd_input(task, attrs: Attrs, x, mean, rstd, gamma, dy, s1, s2):
    # dx = gamma rstd (dy - [row made the statistics] (s1 + xhat s2) / N)
    xhat = (x - _channels(mean, x)) * _channels(rstd, x)
    scale = rstd if gamma is None else gamma * rstd
    return _channels(scale, x) * (dy - _correction(task, attrs, x, s1, xhat, s2))


@kernel("batchnorm_bwd_stats_jvp")
def batchnorm_bwd_stats_jvp(task, attrs: Attrs, x, mean, rstd, dy, xt, mean_t, rstd_t, dyt):
    xhat = (x - _channels(mean, x)) * _channels(rstd, x)
    xhat_t = _xhat_t(x, mean, rstd, xt, mean_t, rstd_t)
    s2t = total(times(dyt, xhat), times(dy, xhat_t))
    return None if dyt is None else dyt.sum(_reduced(x)), None if s2t is None else s2t.sum(_reduced(x))


@kernel("batchnorm_bwd_input_jvp")
def batchnorm_bwd_input_jvp(
    task, attrs: Attrs, x, mean, rstd, gamma, dy, s1, s2, xt, mean_t, rstd_t, gamma_t, dyt, s1t, s2t
):  # the product rule on batchnorm_bwd_input
    xhat = (x - _channels(mean, x)) * _channels(rstd, x)
    xhat_t = _xhat_t(x, mean, rstd, xt, mean_t, rstd_t)
    scale = rstd if gamma is None else gamma * rstd
    scale_t = total(times(gamma_t, rstd), rstd_t if gamma is None else times(gamma, rstd_t))
    inner = None if dy is None else dy - _correction(task, attrs, x, s1, xhat, s2)
    inner_t = _correction(task, attrs, x, s1t, xhat, s2t, *([] if xhat_t is None else [(xhat_t, s2)]))
    inner_t = -inner_t if dyt is None else dyt - inner_t
    if isinstance(inner_t, float):
        inner_t = torch.zeros_like(x)
    return total(times(_channels(scale_t, x), inner), _channels(scale, x) * inner_t)


@kernel("batchnorm_maxpool2d_fwd")
def batchnorm_maxpool2d_fwd(task, attrs: Attrs, x, gamma):
    # what the window's maximum is made of after a multiplication with gamma: its maximum or minimum, or the first element
    _, index = F.max_pool2d(x if gamma is None else x * _channels(gamma.sign(), x), *_pool(attrs), return_indices=True)
    return maxpool2d_replay(task, attrs, x, index), index


@kernel("batchnorm_maxpool2d_replay")
def batchnorm_maxpool2d_replay(task, attrs: Attrs, x, gamma, index):
    return maxpool2d_replay(task, attrs, x, index)


@kernel("batchnorm_maxpool2d_bwd_input")
def batchnorm_maxpool2d_bwd_input(task, attrs: Attrs, x, mean, rstd, gamma, dy, index, s1, s2):  # of all pixels, dy of those that were chosen
    return batchnorm_bwd_input(task, attrs, x, mean, rstd, gamma, maxpool2d_bwd(task, attrs, dy, index), s1, s2)


@kernel("batchnorm_maxpool2d_bwd_input_jvp")
def batchnorm_maxpool2d_bwd_input_jvp(
    task, attrs: Attrs, x, mean, rstd, gamma, dy, index, s1, s2, xt, mean_t, rstd_t, gamma_t, dyt, s1t, s2t
):
    dy, dyt = (None if d is None else maxpool2d_bwd(task, attrs, d, index) for d in (dy, dyt))
    return batchnorm_bwd_input_jvp(task, attrs, x, mean, rstd, gamma, dy, s1, s2, xt, mean_t, rstd_t, gamma_t, dyt, s1t, s2t)


class _Rows:
    """layernorm and groupnorm as one: x seen as [n, sets, members], statistics over the members."""

    def __init__(self, x: Tensor, attrs: Attrs) -> None:
        self.shape, self.norm = x.shape, "dims" in attrs
        sets = x.shape[1 : x.dim() - attrs["dims"]].numel() if self.norm else attrs["groups"]
        self.x = x.reshape(len(x), sets, -1)
        var, mean = torch.var_mean(self.x, -1, correction=0, keepdim=True)
        self.rstd = (var + attrs["eps"]).rsqrt()
        self.xhat = (self.x - mean) * self.rstd

    def sets(self, v: Tensor) -> Tensor:
        return v.reshape(self.x.shape)

    def affine(self, v: Tensor | None) -> Tensor | None:
        """gamma or beta, ready to broadcast against x."""
        return v if v is None or self.norm else v.view(-1, *[1] * (len(self.shape) - 2))

    def out(self, v: Tensor) -> Tensor:
        return v.reshape(self.shape)

    def project(self, h: Tensor) -> Tensor:
        """h - E[h] - xhat E[h xhat]."""
        return h - h.mean(-1, keepdim=True) - self.xhat * (h * self.xhat).mean(-1, keepdim=True)

    def xhat_t(self, xt: Tensor | None) -> Tensor | None:
        return None if xt is None else self.rstd * self.project(self.sets(xt))

    def sum_to_affine(self, v: Tensor, attrs: Attrs) -> Tensor:
        v = self.out(v)
        return v.flatten(0, v.dim() - attrs["dims"] - 1).sum(0) if self.norm else v.sum((0, *range(2, v.dim())))


@kernel("layernorm_fwd", "groupnorm_fwd")
def rownorm_fwd(task, attrs: Attrs, x, gamma, beta):  # y = gamma xhat + beta, statistics within a sample
    r = _Rows(x, attrs)
    y = r.out(r.xhat)
    y = y if gamma is None else y * r.affine(gamma)
    return y if beta is None else y + r.affine(beta)


@kernel("layernorm_jvp", "groupnorm_jvp")
def rownorm_jvp(task, attrs: Attrs, x, gamma, xt, gamma_t, beta_t):
    r = _Rows(x, attrs)
    xhat_t = None if xt is None else r.out(r.xhat_t(xt))
    yt = total(
        xhat_t if gamma is None else times(xhat_t, r.affine(gamma)), times(r.out(r.xhat), r.affine(gamma_t)), r.affine(beta_t)
    )
    return yt.expand_as(x)


@kernel("layernorm_bwd_input", "groupnorm_bwd_input")
def rownorm_bwd_input(task, attrs: Attrs, x, gamma, dy):  # h = dy gamma; dx = rstd (h - E[h] - xhat E[h xhat])
    r = _Rows(x, attrs)
    return r.out(r.rstd * r.project(r.sets(dy if gamma is None else dy * r.affine(gamma))))


@kernel("layernorm_bwd_weight", "groupnorm_bwd_weight")
def rownorm_bwd_weight(task, attrs: Attrs, x, dy):
    r = _Rows(x, attrs)
    return r.sum_to_affine(r.sets(dy) * r.xhat, attrs), r.sum_to_affine(dy, attrs)


@kernel("layernorm_bwd_input_jvp", "groupnorm_bwd_input_jvp")
def rownorm_bwd_input_jvp(task, attrs: Attrs, x, gamma, dy, xt, gamma_t, dyt):
    r = _Rows(x, attrs)
    h = None if dy is None else r.sets(dy if gamma is None else dy * r.affine(gamma))
    ht = total(dyt if gamma is None else times(dyt, r.affine(gamma)), times(dy, r.affine(gamma_t)))
    out = None if ht is None else r.rstd * r.project(r.sets(ht))
    if xt is not None and h is not None:
        xhat_t, mean = r.xhat_t(xt), lambda v: v.mean(-1, keepdim=True)
        rstd_t = -r.rstd * r.rstd * mean(r.xhat * r.sets(xt))
        moved = rstd_t * r.project(h) - r.rstd * (xhat_t * mean(h * r.xhat) + r.xhat * mean(h * xhat_t))
        out = total(out, moved)
    return r.out(out)


@kernel("layernorm_bwd_weight_jvp", "groupnorm_bwd_weight_jvp")
def rownorm_bwd_weight_jvp(task, attrs: Attrs, x, dy, xt, dyt):
    r = _Rows(x, attrs)
    dgamma_t = total(None if dyt is None else r.sets(dyt) * r.xhat, None if xt is None else r.sets(dy) * r.xhat_t(xt))
    return r.sum_to_affine(dgamma_t, attrs), None if dyt is None else r.sum_to_affine(dyt, attrs)


# ---------------------------------------------------------------------------------------------------------------- activations
def _gelu(x: Tensor, approximate: str) -> tuple[Tensor, Tensor, Tensor]:
    if approximate == "none":
        cdf, pdf = 0.5 * (1 + torch.erf(x * 0.5**0.5)), torch.exp(-0.5 * x * x) * (2 * torch.pi) ** -0.5
        return x * cdf, cdf + x * pdf, (2 - x * x) * pdf
    a, c = (2 / torch.pi) ** 0.5, 0.044715
    t = torch.tanh(a * (x + c * x**3))
    du, ddu = a * (1 + 3 * c * x * x), a * 6 * c * x
    dt, ddt = (1 - t * t) * du, (1 - t * t) * (ddu - 2 * t * du * du)
    return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * dt, dt + 0.5 * x * ddt


def _activation(name: str, attrs: Attrs, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """f(x), f'(x), f''(x) of the smooth activations."""
    if name == "tanh":
        y = torch.tanh(x)
        return y, 1 - y * y, -2 * y * (1 - y * y)
    if name == "sigmoid":
        y = torch.sigmoid(x)
        return y, y * (1 - y), y * (1 - y) * (1 - 2 * y)
    if name == "exp":
        y = torch.exp(x)
        return y, y, y
    if name == "silu":
        s = torch.sigmoid(x)
        ds = s * (1 - s)
        return x * s, s + x * ds, ds * (2 + x * (1 - 2 * s))
    if name == "elu":
        e = attrs["alpha"] * torch.expm1(torch.clamp(x, max=0))
        slope = torch.where(x > 0, torch.ones_like(x), e + attrs["alpha"])
        return torch.where(x > 0, x, e), slope, torch.where(x > 0, torch.zeros_like(x), slope)
    if name == "softplus":
        beta = attrs["beta"]
        linear = x * beta > attrs["threshold"]
        s = torch.sigmoid(beta * x)
        one, zero = torch.ones_like(x), torch.zeros_like(x)
        y = F.softplus(x, beta, attrs["threshold"])
        return y, torch.where(linear, one, s), torch.where(linear, zero, beta * s * (1 - s))
    return _gelu(x, attrs["approximate"])


def _register_smooth(name: str) -> None:
    kernel(f"{name}_fwd")(lambda task, attrs, x: _activation(name, attrs, x)[0])
    kernel(f"{name}_jvp")(lambda task, attrs, x, xt: _activation(name, attrs, x)[1] * xt)
    kernel(f"{name}_bwd")(lambda task, attrs, x, dy: _activation(name, attrs, x)[1] * dy)

    @kernel(f"{name}_bwd_jvp")
    def bwd_jvp(task, attrs: Attrs, x, xt, dy, dyt):  # f'(x) dyt + f''(x) xt dy
        _, f1, f2 = _activation(name, attrs, x)
        return total(times(f1, dyt), times(f2, xt, dy))


for _name in ("tanh", "sigmoid", "exp", "elu", "gelu", "silu", "softplus"):
    _register_smooth(_name)


def _slope(attrs: Attrs, mask: Tensor, v: Tensor) -> Tensor:
    """v where the mask is set, slope * v elsewhere (ReLU: zero)."""
    return torch.where(mask, v, v * attrs["slope"] if "slope" in attrs else torch.zeros_like(v))


@kernel("relu_fwd", "leaky_relu_fwd")
def relu_fwd(task, attrs: Attrs, x):  # also the mask x > 0, so ReLU'(0) = 0 as in torch; NaN stays NaN: it has diverged
    return F.leaky_relu(x, attrs["slope"]) if "slope" in attrs else F.relu(x), x > 0


@kernel("relu_replay", "leaky_relu_replay")
def relu_replay(task, attrs: Attrs, x, mask):
    return _slope(attrs, mask, x)


@kernel("relu_jvp", "relu_bwd", "relu_bwd_jvp", "leaky_relu_jvp", "leaky_relu_bwd", "leaky_relu_bwd_jvp")
def relu_bwd(task, attrs: Attrs, mask, v):
    return _slope(attrs, mask, v)


# ---------------------------------------------------------------------------------------------------------------- pooling, shapes
def _pool(attrs: Attrs) -> tuple[Any, Any, Any]:
    return attrs["kernel"], attrs["stride"], attrs["padding"]


@kernel("maxpool2d_fwd")
def maxpool2d_fwd(task, attrs: Attrs, x):  # also the index (h * w) of the first maximum of each window
    return F.max_pool2d(x, *_pool(attrs), return_indices=True)


@kernel("maxpool2d_replay")
def maxpool2d_replay(task, attrs: Attrs, x, index):
    return x.flatten(2).gather(2, index.flatten(2)).view(index.shape)


@kernel("maxpool2d_jvp")
def maxpool2d_jvp(task, attrs: Attrs, xt, index):
    return maxpool2d_replay(task, attrs, xt, index)


@kernel("maxpool2d_bwd", "maxpool2d_bwd_jvp")
def maxpool2d_bwd(task, attrs: Attrs, dy, index):
    c, h, w = attrs["input_shape"]
    return dy.new_zeros(len(dy), c, h * w).scatter_add_(2, index.flatten(2), dy.flatten(2)).view(-1, c, h, w)


@kernel("avgpool2d_fwd", "avgpool2d_jvp")
def avgpool2d_fwd(task, attrs: Attrs, x):
    return F.avg_pool2d(x, *_pool(attrs), count_include_pad=attrs["count_include_pad"])


@kernel("avgpool2d_bwd", "avgpool2d_bwd_jvp")
def avgpool2d_bwd(task, attrs: Attrs, dy):  # every element of a window gets its share of dy
    (kh, kw), (sh, sw), (ph, pw) = _pool(attrs)
    c, h, w = attrs["input_shape"]
    share = dy / (kh * kw)
    if not attrs["count_include_pad"]:
        ones = F.avg_pool2d(dy.new_ones(1, 1, h, w), *_pool(attrs))  # torch divides by kh kw here: the share that is inside
        share = share / ones
    taps = share.new_ones(c, 1, kh, kw)
    dx = torch.nn.grad.conv2d_input((len(dy), c, h + 2 * ph, w + 2 * pw), taps, share.contiguous(), (sh, sw), groups=c)
    return dx[:, :, ph : ph + h, pw : pw + w]


@kernel("global_avgpool2d_fwd", "global_avgpool2d_jvp")
def global_avgpool2d_fwd(task, attrs: Attrs, x):  # mean over h and w
    return x.mean((2, 3))


@kernel("global_avgpool2d_bwd", "global_avgpool2d_bwd_jvp")
def global_avgpool2d_bwd(task, attrs: Attrs, dy):
    c, h, w = attrs["input_shape"]
    return (dy / (h * w))[:, :, None, None].expand(-1, c, h, w)


@kernel("pad2d_fwd", "pad2d_jvp")
def pad2d_fwd(task, attrs: Attrs, x):
    return _padded(x, attrs)


@kernel("pad2d_bwd", "pad2d_bwd_jvp")
def pad2d_bwd(task, attrs: Attrs, dy):
    top, _, left, _ = attrs["padding"]
    _, h, w = attrs["input_shape"]
    return dy[:, :, top : top + h, left : left + w]


@kernel("reshape_fwd", "reshape_jvp")
def reshape_fwd(task, attrs: Attrs, x):
    return x.reshape(-1, *attrs["shape"]) if attrs["rows"] else x.reshape(attrs["shape"])


@kernel("reshape_bwd", "reshape_bwd_jvp")
def reshape_bwd(task, attrs: Attrs, dy):
    return dy.reshape(-1, *attrs["input_shape"]) if attrs["rows"] else dy.reshape(attrs["input_shape"])


@kernel("join_rows_fwd")
def join_rows_fwd(task, attrs: Attrs, support, query):
    return torch.cat([support, query])


@kernel("support_rows_fwd")
def support_rows_fwd(task, attrs: Attrs, joint):  # the first n_support rows
    return joint[: task.rows["support"]]


@kernel("query_rows_fwd")
def query_rows_fwd(task, attrs: Attrs, joint):  # the last n_query rows
    return joint[task.rows["support"] :]


@kernel("query_rows_bwd")
def query_rows_bwd(task, attrs: Attrs, dy):
    return torch.cat([dy.new_zeros(task.rows["support"], *dy.shape[1:]), dy])


# ---------------------------------------------------------------------------------------------------------------- sums, products
@kernel("add_fwd", "add_jvp")
def add_fwd(task, attrs: Attrs, x, y):
    return total(x, y).expand(attrs["shape"]) if "shape" in attrs and (x is None or y is None) else total(x, y)


def _sum_to(v: Tensor, shape: tuple[int, ...]) -> Tensor:
    return v.sum_to_size(shape) if tuple(v.shape) != tuple(shape) else v


@kernel("add_bwd", "add_bwd_jvp")
def add_bwd(task, attrs: Attrs, dz):  # broadcast axes are summed
    return _sum_to(dz, attrs["input_shape"])


@kernel("mul_fwd")
def mul_fwd(task, attrs: Attrs, x, y):
    return x * y


@kernel("mul_jvp")
def mul_jvp(task, attrs: Attrs, x, y, xt, yt):
    return total(times(xt, y), times(x, yt))


@kernel("mul_bwd")
def mul_bwd(task, attrs: Attrs, x, y, dz):
    mine, other = (x, y) if attrs["operand"] == 0 else (y, x)
    return _sum_to(dz * other, mine.shape)


@kernel("mul_bwd_jvp")
def mul_bwd_jvp(task, attrs: Attrs, x, y, dz, other_t, dzt):
    mine, other = (x, y) if attrs["operand"] == 0 else (y, x)
    return _sum_to(total(times(dzt, other), times(dz, other_t)), mine.shape)


@kernel("matmul_fwd")
def matmul_fwd(task, attrs: Attrs, x, y):
    return x @ y


@kernel("matmul_jvp")
def matmul_jvp(task, attrs: Attrs, x, y, xt, yt):
    return total(None if xt is None else xt @ y, None if yt is None else x @ yt)


@kernel("matmul_bwd")
def matmul_bwd(task, attrs: Attrs, x, y, dz):
    return dz @ y.T if attrs["operand"] == 0 else x.T @ dz


@kernel("matmul_bwd_jvp")
def matmul_bwd_jvp(task, attrs: Attrs, x, y, dz, other_t, dzt):
    if attrs["operand"] == 0:
        return total(None if dzt is None else dzt @ y.T, None if other_t is None else dz @ other_t.T)
    return total(None if dzt is None else x.T @ dzt, None if other_t is None else other_t.T @ dz)


@kernel("transpose_fwd", "transpose_jvp", "transpose_bwd", "transpose_bwd_jvp")
def transpose_fwd(task, attrs: Attrs, x):
    return x.T


@kernel("slice_fwd", "slice_jvp")
def slice_fwd(task, attrs: Attrs, x):
    return x.narrow(attrs["dim"], attrs["start"], attrs["stop"] - attrs["start"])


@kernel("slice_bwd", "slice_bwd_jvp")
def slice_bwd(task, attrs: Attrs, dz):
    dx = dz.new_zeros(attrs["input_shape"])
    dx.narrow(attrs["dim"], attrs["start"], attrs["stop"] - attrs["start"]).copy_(dz)
    return dx


# ---------------------------------------------------------------------------------------------------------------- losses
def _cross_entropy(task, attrs: Attrs, logits, labels, weight):
    """(log p, q, 1 / normaliser): loss = -sum q log p / normaliser, q the smoothed and weighted target; classes beyond the task's ways are cut."""
    z = logits[:, : task.ways] if task.ways else logits
    weight = z.new_ones(z.shape[1]) if weight is None else weight[: z.shape[1]]
    smoothing = attrs["label_smoothing"]
    q = (smoothing / z.shape[1] * weight).expand_as(z).clone()
    rows = torch.arange(len(z), device=z.device)
    q[rows, labels] += (1 - smoothing) * weight[labels]
    reduction = attrs["reduction"]
    normaliser = weight[labels].sum() if reduction == "mean" else 1.0 if reduction == "sum" else float(reduction)
    return z.log_softmax(1), q, 1 / normaliser


@kernel("cross_entropy_fwd")
def cross_entropy_fwd(task, attrs: Attrs, logits, labels, weight):  # loss, number of right predictions
    logp, q, scale = _cross_entropy(task, attrs, logits, labels, weight)
    return -(q * logp).sum() * scale, (logp.argmax(1) == labels).sum().to(logits.dtype)


def _widen(v: Tensor, like: Tensor) -> Tensor:
    return F.pad(v, (0, like.shape[1] - v.shape[1]))


@kernel("cross_entropy_bwd")
def cross_entropy_bwd(task, attrs: Attrs, logits, labels, weight, step_weight):  # ((sum q) softmax - q) / normaliser
    logp, q, scale = _cross_entropy(task, attrs, logits, labels, weight)
    d = (q.sum(1, keepdim=True) * logp.exp() - q) * scale
    return _widen(d if step_weight is None else d * step_weight, logits)


@kernel("cross_entropy_jvp")
def cross_entropy_jvp(task, attrs: Attrs, logits, labels, weight, logits_t):  # <dlogits, logits_t>
    return (cross_entropy_bwd(task, attrs, logits, labels, weight, None) * logits_t).sum()


@kernel("cross_entropy_bwd_jvp")
def cross_entropy_bwd_jvp(task, attrs: Attrs, logits, labels, weight, logits_t):  # (sum q) p (zt - <p, zt>) / normaliser
    logp, q, scale = _cross_entropy(task, attrs, logits, labels, weight)
    p, zt = logp.exp(), logits_t[:, : logp.shape[1]]
    return _widen(q.sum(1, keepdim=True) * p * (zt - (p * zt).sum(1, keepdim=True)) * scale, logits)


def _mse_scale(attrs: Attrs, y: Tensor) -> float:
    reduction = attrs["reduction"]
    return 1 / y.numel() if reduction == "mean" else 1.0 if reduction == "sum" else 1 / float(reduction)


@kernel("mse_fwd")
def mse_fwd(task, attrs: Attrs, y, target, weight):  # sum (y - target)^2 / normaliser
    return ((y - target) ** 2).sum() * _mse_scale(attrs, y), None


@kernel("mse_bwd")
def mse_bwd(task, attrs: Attrs, y, target, weight, step_weight):
    d = (y - target) * (2 * _mse_scale(attrs, y))
    return d if step_weight is None else d * step_weight


@kernel("mse_jvp")
def mse_jvp(task, attrs: Attrs, y, target, weight, yt):
    return ((y - target) * yt).sum() * (2 * _mse_scale(attrs, y))


@kernel("mse_bwd_jvp")
def mse_bwd_jvp(task, attrs: Attrs, y, target, weight, yt):
    return yt * (2 * _mse_scale(attrs, y))


# ---------------------------------------------------------------------------------------------------------------- updates
@kernel("sgd_fwd")
def sgd_fwd(task, attrs: Attrs, theta, g, rate):  # theta - rate g
    return theta - rate * g


@kernel("sgd_bwd")
def sgd_bwd(task, attrs: Attrs, theta_bar, rate):  # cotangent of g
    return -rate * theta_bar


@kernel("sgd_bwd_rate")
def sgd_bwd_rate(task, attrs: Attrs, theta_bar, g, acc):  # acc - theta_bar g, summed where one rate serves the whole tensor
    out = -(theta_bar * g)
    return total(acc, out if attrs["per_element"] else out.sum())


@kernel("clip_value_fwd")
def clip_value_fwd(task, attrs: Attrs, g):
    return g.clamp(-attrs["bound"], attrs["bound"])


@kernel("clip_value_bwd")
def clip_value_bwd(task, attrs: Attrs, g, dc):  # dc where g is within the bound, which itself is
    return torch.where(g.abs() <= attrs["bound"], dc, torch.zeros_like(dc))


@kernel("dot_fwd")
def dot_fwd(task, attrs: Attrs, x, y, acc):  # acc + <x, y>
    return total(acc, (x * y).sum())


@kernel("ratio_fwd")
def ratio_fwd(task, attrs: Attrs, x, y):  # x / y, and 0 where y is
    return torch.where(y == 0, torch.zeros_like(x), x / y)


@kernel("clip_norm_fwd")
def clip_norm_fwd(task, attrs: Attrs, square):  # c = scale g with scale = min(1, max_norm / (norm + 1e-6)); dc = scale dg + slope <g, dg> g
    norm = square.sqrt()
    scale = attrs["max_norm"] / (norm + 1e-6)
    slope = torch.where((scale <= 1) & (norm > 0), -scale / ((norm + 1e-6) * norm), torch.zeros_like(norm))
    return scale.clamp(max=1.0), slope


@kernel("axpy_fwd")
def axpy_fwd(task, attrs: Attrs, acc, x, scale):  # acc + sign scale x
    return acc + attrs["sign"] * (x if scale is None else scale * x)


@kernel("scale_fwd")
def scale_fwd(task, attrs: Attrs, x, scale):
    return attrs["sign"] * (x if scale is None else scale * x)


@kernel("copy_fwd")
def copy_fwd(task, attrs: Attrs, x):
    return x


@kernel("zero_fwd")
def zero_fwd(task, attrs: Attrs):
    return task.zeros()
