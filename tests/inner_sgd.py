"""The inner optimizers in plain torch, differentiable; tests/test_optimizers.py holds them against torch.optim."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastmaml import SGD


def moves(rule: SGD, theta: Mapping[str, Tensor], grads: Mapping[str, Tensor], velocity: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the rates are multiplied with. ``velocity``: between the steps of one loop, empty in front of the first."""
    if rule.max_norm is not None:
        norm = sum((g * g).sum() for g in grads.values()).sqrt()
        grads = {n: g * torch.clamp(rule.max_norm / (norm + 1e-6), max=1.0) for n, g in grads.items()}
    out = {}
    for n, g in grads.items():
        d = g if rule.clip_value is None else torch.clamp(g, -rule.clip_value, rule.clip_value)
        d = d + rule.weight_decay * theta[n]
        if rule.momentum:
            velocity[n] = rule.momentum * velocity[n] + (1 - rule.dampening) * d if n in velocity else d
            d = d + rule.momentum * velocity[n] if rule.nesterov else velocity[n]
        out[n] = d
    return out
