"""cross_entropy and mse."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmaml.executors.torch.kernels.registry import Attrs, kernel


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
