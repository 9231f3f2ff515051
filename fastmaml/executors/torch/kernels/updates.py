"""Inner updates, and what they are made of."""

from __future__ import annotations

import torch

from fastmaml.executors.torch.kernels.registry import Attrs, kernel, total


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
def copy_fwd(task, attrs: Attrs, x):  # no view: two results may be copies of one value
    return x.clone()


@kernel("zero_fwd")
def zero_fwd(task, attrs: Attrs):
    return task.zeros()
