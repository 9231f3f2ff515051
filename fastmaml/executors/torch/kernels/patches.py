"""Batch statistics of a convolution of the samples from the moments of its patches (plan/patches.py says why)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmaml.executors.torch.kernels.images import padded
from fastmaml.executors.torch.kernels.registry import Attrs, kernel, times, total


@kernel("patch_moments_fwd")
def patch_moments_fwd(task, attrs: Attrs, x):  # [2, 1 + size, size]: m, then C, as a float and what it leaves of a double
    patches = F.unfold(padded(x, attrs).double(), attrs["patch"][1:], stride=attrs["stride"]).transpose(1, 2).flatten(0, 1)
    mean = patches.mean(0)
    patches = patches - mean
    whole = torch.cat([mean[None], patches.T @ patches / len(patches)])
    high = whole.to(x.dtype)
    return torch.stack([high, (whole - high.double()).to(x.dtype)])


def _moments(moments: Tensor) -> tuple[Tensor, Tensor]:
    """m [size], C [size, size]"""
    whole = moments.double().sum(0)
    return whole[0], whole[1:]


def _rows(w: Tensor | None) -> Tensor | None:
    """[outputs, size]"""
    return None if w is None else w.flatten(1).double()


@kernel("patch_stats_fwd")
def patch_stats_fwd(task, attrs: Attrs, moments, w):  # mean = w . m, rstd = 1 / sqrt(w^T C w + eps)
    (m, c), rows = _moments(moments), _rows(w)
    var = ((rows @ c) * rows).sum(1).clamp(min=0)
    return (rows @ m).to(w.dtype), (var + attrs["eps"]).rsqrt().to(w.dtype)


@kernel("patch_stats_jvp")
def patch_stats_jvp(task, attrs: Attrs, moments, w, rstd, wt):  # mean_t = wt . m, rstd_t = -rstd^3 w^T C wt
    (m, c), rows, rows_t = _moments(moments), _rows(w), _rows(wt)
    return (rows_t @ m).to(w.dtype), (-(rstd.double() ** 3) * ((rows @ c) * rows_t).sum(1)).to(w.dtype)


def _shares(gamma: Tensor | None, rstd: Tensor, s1: Tensor | None, s2: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The factors of m and of C w in -dw."""
    scale = rstd if gamma is None else gamma * rstd
    return times(scale, s1), times(scale, rstd, s2)


def _column(v: Tensor | None) -> Tensor | None:
    return None if v is None else v.double()[:, None]


@kernel("patch_stats_bwd")
def patch_stats_bwd(task, attrs: Attrs, moments, w, gamma, rstd, s1, s2):  # dw = -gamma rstd (s1 m + rstd s2 C w)
    (m, c), (a, e) = _moments(moments), _shares(gamma, rstd, s1, s2)
    return -(_column(a) * m + _column(e) * (_rows(w) @ c)).to(w.dtype).view_as(w)


@kernel("patch_stats_bwd_jvp")
def patch_stats_bwd_jvp(task, attrs: Attrs, moments, w, gamma, rstd, s1, s2, wt, gamma_t, rstd_t, s1t, s2t):  # the product rule on patch_stats_bwd
    (m, c), (_, e) = _moments(moments), _shares(gamma, rstd, s1, s2)
    terms = [_shares(gamma, rstd, s1t, s2t)]
    if gamma_t is not None:
        terms.append(_shares(gamma_t, rstd, s1, s2))
    if rstd_t is not None:  # rstd (s1, rstd s2): the second is a square
        a, twice = _shares(gamma, rstd_t, s1, None)[0], times(_shares(gamma, rstd_t, s2, None)[0], rstd)
        terms.append((a, times(twice, torch.full_like(rstd, 2.0))))
    a_t, e_t = (total(*(term[i] for term in terms)) for i in (0, 1))
    wc, wtc = _rows(w) @ c, None if wt is None else _rows(wt) @ c
    out = total(times(_column(a_t), m), times(_column(e_t), wc), times(_column(e), wtc))
    return -out.to(w.dtype).view_as(w)
