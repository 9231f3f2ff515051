"""The family of meta-parameterisations as their papers write them, in plain torch and float64. It shares no line with fastmaml."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmaml import TaskBatch

Weights = dict[str, Tensor]


def truth(
    maml: Any,
    tasks: Any,
    forward: Callable[[Weights, Weights, Tensor], Tensor],
    start: Callable[[Weights, int], Weights],
    *,
    lr: float | Callable[[Weights, int, str], Any] = 0.3,
    steps: int = 3,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    first_order: bool = False,
    weights: list[float] | None = None,
) -> tuple[Tensor, dict[str, Tensor | None], list[Weights]]:
    """(outer loss, its gradient for each trained parameter, what each task adapted to).

    forward(w, phi, x): the network; start(w, t): phi_0 of task t; lr(w, t, name): a rate of its own. w: everything that is not adapted, by name."""
    trained = {n: p.detach().double().requires_grad_() for n, p in maml.named_parameters()}
    known = {**dict(maml.model.named_parameters()), **dict(maml.model.named_buffers()), **maml.parameterisation.values()}
    w = {**{n: v.detach().double() for n, v in known.items()}, **trained}
    batch, total, ends = TaskBatch.of(tasks), 0.0, []
    for t in range(len(batch)):
        sx, sy, qx, qy = (v.double() if v.is_floating_point() else v for v in batch.task(t))
        cut = slice(None) if batch.ways is None else slice(int(batch.ways[t]))
        phi = {n: v.clone() if v.requires_grad else v.requires_grad_() for n, v in start(w, t).items()}  # no way back but through phi
        for _ in range(steps):
            grads = torch.autograd.grad(loss(forward(w, phi, sx)[:, cut], sy), list(phi.values()), create_graph=True)
            grads = [g.detach() if first_order else g for g in grads]
            rate = lr if callable(lr) else lambda w, t, n: lr
            phi = {n: v - rate(w, t, n) * g for (n, v), g in zip(phi.items(), grads, strict=True)}
        share = 1 / len(batch) if weights is None else weights[t]
        total = total + share * loss(forward(w, phi, qx)[:, cut], qy)
        ends.append({n: v.detach() for n, v in phi.items()})
    found = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    return total.detach(), dict(zip(trained, found, strict=True)), ends


def distance(got: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None]) -> float:
    """Norm of the difference over norm of the truth; no gradient is zero."""
    assert got.keys() == expected.keys()
    pairs = [(torch.zeros(()) if a is None else a.double(), torch.zeros(()) if b is None else b) for a, b in ((got[n], expected[n]) for n in got)]
    return float(sum(((a - b) ** 2).sum() for a, b in pairs) ** 0.5 / sum((b**2).sum() for _, b in pairs) ** 0.5)


def mlp(w: Weights, x: Tensor, layers: tuple[str, ...] = ("0", "2", "4")) -> Tensor:
    """Linear layers with tanh between them, from their weights and biases by name."""
    for i, name in enumerate(layers):
        x = F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])
        x = x if i == len(layers) - 1 else x.tanh()
    return x


def small_conv(seed: int = 0) -> nn.Sequential:
    """Two blocks of conv, batch norm, tanh (one of them without a bias), a pooling and a head. Images [n, 2, 6, 6]."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4, track_running_stats=False), nn.Tanh(), nn.MaxPool2d(2),
        nn.Conv2d(4, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5, track_running_stats=False), nn.Tanh(), nn.Flatten(), nn.Linear(45, 4),
    )  # fmt: skip
    for norm in (net[1], net[5]):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    return net


def conv(w: Weights, x: Tensor, film: Callable[[str, Tensor], Tensor] = lambda name, y: y, film_norm: Callable[[str, Tensor], Tensor] = lambda name, y: y) -> Tensor:
    for layer, norm in (("0", "1"), ("4", "5")):
        y = film(layer, F.conv2d(x, w[f"{layer}.weight"], w.get(f"{layer}.bias"), padding=1))
        y = (y - y.mean((0, 2, 3), keepdim=True)) / (y.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
        y = film_norm(layer, y * w[f"{norm}.weight"].view(-1, 1, 1) + w[f"{norm}.bias"].view(-1, 1, 1))
        x = F.max_pool2d(y.tanh(), 2) if layer == "0" else y.tanh()
    return F.linear(x.flatten(1), w["8.weight"], w["8.bias"])
