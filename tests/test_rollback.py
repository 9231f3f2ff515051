"""Weights that are rolled back on the way over the steps, instead of kept: the same gradients, in a fraction of the memory."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastmaml
import fastmaml.nn as nets
from fastmaml.batch import TaskBatch
from fastmaml.diagnostics import _recorded
from fastmaml.plan import Arrangement, Plan, Rate, build_plan, rollback
from fastmaml.trace import trace

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


def running() -> nn.Module:
    model = net()
    for block in (m for m in model.children() if isinstance(m, nn.Sequential)):
        block[1] = nn.BatchNorm1d(block[1].num_features)
    return model


def post() -> nn.Module:
    """The norm's own output is what the next layer reads."""
    torch.manual_seed(0)

    def block(inputs: int) -> list[nn.Module]:
        return [nn.Linear(inputs, 64), nn.ReLU(), nn.BatchNorm1d(64, track_running_stats=False)]

    return nn.Sequential(nn.Flatten(), *block(784), *block(64), *block(64), nn.Linear(64, 4))


def gradients(
    backend: str, dtype: torch.dtype, kept: int, monkeypatch: pytest.MonkeyPatch, **options
) -> dict[str, Tensor]:
    monkeypatch.setattr(rollback, "KEPT", kept)
    maml = fastmaml.MAML(
        options.pop("model", net)().to(dtype), backend=backend, inner_steps=STEPS, **{"inner_lr": 0.05, **options}
    )
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


OPTIONS |= {"running statistics": {"model": running, "batchnorm": "running"}, "norm last": {"model": post}}


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


class Mixed(nn.Module):
    """Norms of images and of vectors; activations in front of layers that are rolled back, the first of them with an input that is made again."""

    def __init__(self, slope: float = 0.1) -> None:
        super().__init__()
        self.conv, self.norm, self.slope = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False), slope
        self.first, self.second, self.third = nn.Linear(2 * 26 * 26, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.vectors, self.last = nn.BatchNorm1d(64, track_running_stats=False), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu().flatten(1)
        x = nn.functional.leaky_relu(self.vectors(self.first(x)), self.slope)
        x = self.third(self.second(x).relu())
        return self.last(x.relu())


def kept(model: nn.Module, steps: int = STEPS, **options) -> tuple[list[int], list[int], Plan]:
    """Values of a row in each mask that is kept per step, and of each mean or rstd."""
    program = trace(model.train(), (1, 28, 28)).with_roles(lambda name: "adapted")
    rates = dict.fromkeys((leaf.name for leaf in program.leaves), Rate("lr"))
    plan = build_plan(program, Arrangement(steps=steps, rates=rates, support_rows=4, **options))
    found = {n: b for n, b in plan.buffers.items() if b.steps and n.startswith("gradient.")}
    masks = [b.numel for b in found.values() if b.kind == "mask"]
    return masks, [b.numel for n, b in found.items() if n.startswith(("gradient.mean", "gradient.rstd"))], plan


def test_what_follows_from_others_is_not_kept() -> None:
    """Statistics of vectors, and masks of outputs that are kept; everything for a few steps, with memory="fast", and masks that are brought out."""
    masks, statistics, plan = kept(net())
    assert masks == [256, 64] and statistics == []  # of the inputs of the first layer rolled back and of the head
    hvp = [i for i in plan.segments["hvp"].instructions if i.kernel == "relu_fwd"]
    assert len(hvp) == 2 and all(i.outputs[0] is None and plan.buffers[i.inputs[0].buffer].steps for i in hvp)
    everything = ([256, 128, 64, 64], [n for n in (256, 128, 64, 64) for _ in "mr"])
    assert kept(net(), rollback.KEPT)[:2] == kept(net(), memory="fast")[:2] == everything
    assert kept(net(), record_masks=True)[:2] == (everything[0], [])
    assert kept(net(), first_order=True)[:2] == ([], [])
    pixels = 2 * 26 * 26
    assert kept(Mixed())[:2] == ([pixels, 64], [2, 2])  # statistics of images cost a pass
    assert kept(Mixed(slope=-0.1))[:2] == ([pixels, 64, 64], [2, 2])  # leaky_relu(-1) > 0: the output does not say


@pytest.mark.parametrize("model", [net, Mixed])
def test_masks_that_are_read_off_are_the_same(model: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for ops in (rollback.masks_from_outputs, lambda program, kept: []):
        monkeypatch.setattr(rollback, "masks_from_outputs", ops)
        torch.manual_seed(0)
        backend = "cpu" if model is net else "torch"
        maml = fastmaml.MAML(model(), backend=backend, inner_lr=0.05, inner_steps=STEPS)
        maml.meta_grad(tasks(torch.float32))
        found.append([p.grad for p in maml.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_given_masks_reach_the_way_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """One decision turned over, whose output says otherwise: the same gradient as with weights that are kept."""
    found, batch = [], TaskBatch.of(tasks(torch.float64))
    for steps in (99, 8):
        monkeypatch.setattr(rollback, "KEPT", steps)
        maml = fastmaml.MAML(net().double(), inner_lr=0.05, inner_steps=STEPS)
        plain = _recorded(maml, batch, None).results
        masks = {key: [m.clone() for m in v] for key, v in plain.values.items() if isinstance(key, tuple)}
        for (name, step), mask in masks.items():
            if name.startswith("gradient.") and step == 5:
                mask[0][0, 0] = ~mask[0][0, 0]
        turned = _recorded(maml, batch, None, masks).results
        found.append({n: v for n, v in turned.values.items() if isinstance(n, str) and n.startswith("grad.")})
        truth = {n: plain.values[n] for n in found[-1]}
        assert distance(found[-1], truth) > 1e-6
    assert distance(found[1], found[0]) <= 1e-12


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
