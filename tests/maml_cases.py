"""MAML objects on each executor, and their gradient against the plain loop's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from plain_loop import distance, grads, mlp, plain_loop
from torch import nn

from fastmaml import MAML
from fastmaml.executors.cpu import executor as cpu

LOSSES = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss}
BOUND = {torch.float32: 3e-6, torch.float64: 1e-11}
needs_cpu = pytest.mark.skipif(cpu._cpu is None, reason="fastmaml._cpu is not built")
BACKENDS = [pytest.param(("cpu", torch.float32), marks=needs_cpu, id="cpu"), ("torch", torch.float32), ("torch", torch.float64)]
backends = pytest.mark.parametrize("how", BACKENDS, ids=lambda h: f"{h[0]}-{str(h[1]).removeprefix('torch.')}" if isinstance(h, tuple) else None)


def made(how=("auto", torch.float32), model: nn.Module | None = None, **options) -> MAML:
    model = (mlp() if model is None else model).to(how[1])
    return MAML(model, **{"inner_lr": 0.3, "inner_steps": 3, "backend": how[0], **options})


def agrees(maml: MAML, tasks, call=None, factor: float = 1.0, **truth) -> None:
    """The gradient that ``maml`` leaves in ``.grad`` is that of the plain loop in float64."""
    call = call or (lambda: maml(tasks).loss.backward())
    call()
    found = {n: g if g is None else g / factor for n, g in grads(maml.model).items()}
    dtype = next(maml.model.parameters()).dtype
    expected = plain_loop(maml.model, tasks, **{"lr": 0.3, "steps": 3, **truth}).gradients
    assert distance(found, {n: expected[n] for n in found}) <= BOUND[dtype]


def conv_net(channels: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(channels * 9, 4)]
    return nn.Sequential(*layers)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 4)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.head(self.b(self.a(x).tanh()).tanh())
