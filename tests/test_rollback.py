"""Weights that are rolled back on the way over the steps, instead of kept: the same gradients, in a fraction of the memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fastmaml
import fastmaml.nn as nets
from fastmaml.plan import rollback

STEPS = 11
OPTIONS = {
    "plain": {},
    "fast memory": {"memory": "fast"},
    "learned rate": {"learn_inner_lr": True},
    "learned rates per step": {"learn_inner_lr": True, "inner_lr": [0.05] * STEPS},
    "rates per tensor": {"inner_lr": {"*weight": 0.05, "*": 0.02}},
    "multi-step loss": {"step_loss_weights": [1 / STEPS] * STEPS},
    "first order": {"first_order": True},
    "weights alone": {"adapt": "*weight"},
    "support statistics": {"batchnorm": "support"},
}


def tasks(dtype: torch.dtype, support: int = 1) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    x = (torch.randn(3, 4 * n, 1, 28, 28, generator=g, dtype=torch.float64).to(dtype) for n in (support, 2))
    y = (torch.arange(4).repeat(n).expand(3, -1).contiguous() for n in (support, 2))
    (sx, qx), (sy, qy) = x, y
    return [sx, sy, qx, qy]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nets.OmniglotFC(4)


def gradients(
    backend: str, dtype: torch.dtype, kept: int, monkeypatch: pytest.MonkeyPatch, **options
) -> dict[str, Tensor]:
    monkeypatch.setattr(rollback, "KEPT", kept)
    maml = fastmaml.MAML(net().to(dtype), backend=backend, inner_steps=STEPS, **{"inner_lr": 0.05, **options})
    outer = options.get("outer")
    maml.meta_grad(tasks(dtype), **({"outer_loss": outer} if outer else {}))
    rolled = {
        r.buffer for _, i in maml.plan(tasks(dtype)).instructions() for r in i.writes() if r.buffer.startswith("theta.")
    }
    assert any(not maml.plan(tasks(dtype)).buffers[n].steps for n in rolled) == (kept < STEPS)
    return {n: p.grad.double() for n, p in maml.named_parameters()}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    norm = sum(float(v.square().sum()) for v in b.values()) ** 0.5
    return sum(float((a[n] - b[n]).square().sum()) for n in b) ** 0.5 / norm


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_same_gradients(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = gradients("torch", torch.float64, 99, monkeypatch, **options)
    assert distance(gradients("torch", torch.float64, 8, monkeypatch, **options), truth) <= 1e-12
    kept, rolled = (gradients("cpu", torch.float32, k, monkeypatch, **options) for k in (99, 8))
    assert distance(rolled, truth) <= max(1.5 * distance(kept, truth), 3e-6)


@pytest.mark.parametrize("rate", [0.5, 1.0, 3.0])
def test_large_steps(rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of rolled back weights must not grow on the way back, as they would through inputs made from them."""
    truth = gradients("torch", torch.float64, 99, monkeypatch, inner_lr=rate)
    kept, rolled = (distance(gradients("cpu", torch.float32, k, monkeypatch, inner_lr=rate), truth) for k in (99, 8))
    assert rolled <= 1.5 * kept + 1e-6


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_around_an_outer_loss(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """theta_K waits for the reverse half, of every task."""
    found = []
    for kept in (99, 8):
        monkeypatch.setattr(rollback, "KEPT", kept)
        maml = fastmaml.MAML(net(), backend=backend, inner_lr=0.05, inner_steps=STEPS)
        maml(
            tasks(torch.float32), outer_loss=lambda z, y: nn.functional.cross_entropy(z.flatten(0, 1), y.flatten())
        ).loss.backward()
        found.append({n: p.grad.double() for n, p in maml.named_parameters()})
    assert distance(found[1], found[0]) <= 3e-6


def test_adapt_and_evaluate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing goes back to theta_k: one copy, the same bits."""
    data, found = tasks(torch.float32), []
    for kept in (99, 8):
        monkeypatch.setattr(rollback, "KEPT", kept)
        maml = fastmaml.MAML(net(), backend="cpu", inner_lr=0.05, inner_steps=STEPS)
        with torch.no_grad():
            found.append([maml(data).logits, *maml.adapt(*data[:2]).weights.values()])
        assert sum(maml.memory_bytes(data, entry="evaluate").values()) > 0
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_memory_does_not_grow_by_weights() -> None:
    maml = fastmaml.MAML(net(), inner_lr=0.05)
    one, fifty = (sum(maml.memory_bytes(tasks(torch.float32), inner_steps=k).values()) for k in (1, 50))
    weights = sum(p.numel() for n, p in maml.named_parameters() if p.dim() == 2) - 256 * 784
    assert fifty - one < 49 * 4 * weights / 3  # of one task in flight, were theta_k kept

    def grown(entry: str) -> int:
        return sum(maml.memory_bytes(tasks(torch.float32), inner_steps=50, entry=entry).values())

    assert grown("evaluate") < grown("train")


def test_where_it_does_not_pay() -> None:
    """More support rows than half a layer's inputs, a tied weight, rates per element: theta_k is kept."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(784, 64), nn.Linear(64, 4)
            self.middle = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x.flatten(1)).tanh()
            return self.last(self.middle(self.middle(h).tanh()).tanh())

    def kept(maml: fastmaml.MAML, support: int = 1) -> set[str]:
        buffers = maml.plan(tasks(torch.float32, support), inner_steps=STEPS).buffers
        return {n.removeprefix("theta.") for n, b in buffers.items() if n.startswith("theta.") and b.steps}

    assert "middle.weight" in kept(fastmaml.MAML(Tied()))
    many, few = (kept(fastmaml.MAML(net()), n) for n in (20, 1))
    assert {n for n in many - few if n.endswith("weight")}
    model = net()
    rates = {n: torch.full_like(p, 0.05) for n, p in model.named_parameters()}
    assert set(rates) <= kept(fastmaml.MAML(copy.deepcopy(model), inner_lr=rates)) | {"linear.0.weight"}
