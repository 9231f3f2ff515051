"""batchnorm, alone and with a max pooling, layernorm and groupnorm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmaml.executors.torch.kernels.images import maxpool2d_bwd, maxpool2d_replay, pool
from fastmaml.executors.torch.kernels.registry import Attrs, kernel, times, total


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
    _, index = F.max_pool2d(x if gamma is None else x * _channels(gamma.sign(), x), *pool(attrs), return_indices=True)
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
