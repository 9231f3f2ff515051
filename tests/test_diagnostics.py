"""verify: agreement on every option, honest verdicts, and that nothing of the user's is touched."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from fastmaml import MAML, TaskBatch, diagnostics
from fastmaml import nn as nets
from fastmaml.diagnostics import BOUND, Verification, distance, verify


def labelled(tasks: int = 2, shape: tuple[int, ...] = (6,), classes: int = 3, n: int = 6) -> TaskBatch:
    g = torch.Generator().manual_seed(0)
    x = [torch.randn(tasks, n, *shape, generator=g) for _ in range(2)]
    y = torch.arange(n).remainder(classes).repeat(tasks, 1)
    return TaskBatch.from_tensors(x[0], y, x[1], y)


def line(tasks: int = 2) -> TaskBatch:
    g = torch.Generator().manual_seed(0)
    return TaskBatch.from_tensors(*(torch.randn(tasks, 5, 1, generator=g) for _ in range(4)))


def mlp() -> nn.Module:
    torch.manual_seed(1)
    return nets.MLP(6, 8, 3)


def normed() -> nn.Module:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    net[1].running_mean.normal_()
    return net


def conv() -> nn.Module:
    torch.manual_seed(1)
    pooled = (nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(*pooled, nn.Flatten(), nn.Linear(4 * 9, 3))


def dropout() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 3))


def frozen() -> nn.Module:
    net = mlp()
    net[0].bias.requires_grad_(False)
    return net


class Words(nn.Module):
    """Tokens, a recurrent layer, a parameter that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding, self.rnn, self.head = nn.Embedding(5, 3), nn.GRU(3, 4, batch_first=True), nn.Linear(4, 3)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(self.embedding(x))[0][:, -1])


WEIGHTED = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]), label_smoothing=0.1)
OPTIONS = {
    "plain": (mlp, {}),
    "no inner steps": (mlp, {"inner_steps": 0}),
    "first order": (mlp, {"first_order": True}),
    "head only": (mlp, {"adapt": "2.*"}),
    "frozen bias": (frozen, {}),
    "sum": (mlp, {"reduction": "sum", "inner_lr": 0.01}),
    "divisor": (mlp, {"reduction": 4}),
    "weighted loss": (mlp, {"loss": WEIGHTED}),
    "one learned rate": (mlp, {"learn_inner_lr": True}),
    "a learned rate per step": (mlp, {"learn_inner_lr": True, "inner_lr": [0.1, 0.2, 0.3]}),
    "learned rates by name": (mlp, {"learn_inner_lr": True, "inner_lr": {"0.*": 0.1, "2.*": [0.2, 0.3]}}),
    "learned rates, first order": (mlp, {"learn_inner_lr": True, "first_order": True}),
    "multi-step": (mlp, {"step_loss_weights": [0.2, 0.3, 0.5]}),
    "fast memory": (mlp, {"memory": "fast"}),
    "batch statistics": (normed, {"batchnorm": "batch"}),
    "support statistics": (normed, {"batchnorm": "support"}),
    "running statistics": (normed, {"batchnorm": "running"}),
    "module's own statistics": (normed, {}),
    "batch statistics in eval mode": (lambda: normed().eval(), {"batchnorm": "batch"}),
    "torch executor": (mlp, {"backend": "torch"}),
    "autograd executor": (mlp, {"backend": "autograd"}),
    "dropout": (dropout, {"backend": "autograd"}),
    "float64": (lambda: mlp().double(), {}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_agreement(name: str) -> None:
    build, options = OPTIONS[name]
    maml = MAML(build(), **{"inner_lr": 0.1, "inner_steps": 2, **options})
    result = verify(maml, labelled(), repeats=1)
    assert result.ok and result.error < 1e-5 and result.plain_error < 1e-5
    assert result.loss_error < 1e-5 and result.plain_loss_error < 1e-5
    if maml.backend == "autograd":
        assert result.plan_error is None and result.flips is None and result.executor == "autograd"
    else:
        assert result.plan_error < 1e-12 and result.equal_error < 1e-5
    if name == "float64":
        assert result.dtype == "float64" and max(result.error, result.plain_error) < 1e-12


def test_tokens_and_recurrent_layers() -> None:
    x, y = torch.arange(2 * 6 * 4).remainder(5).view(2, 6, 4), torch.arange(6).remainder(3).repeat(2, 1)
    result = verify(MAML(Words(), inner_lr=0.1, backend="autograd"), (x, y, x.flip(1), y.flip(1)), repeats=1)
    assert result.ok and result.error < 1e-5


def test_regression_and_medians() -> None:
    maml = MAML(nets.SinusoidMLP(8, init="torch"), loss="mse", inner_steps=3)
    result = maml.verify(line(4), repeats=2)
    assert result.ok and result.tasks == 4 and result.steps == 3
    assert result.median_error < BOUND and result.plain_median_error < BOUND
    assert result.decisions == 4 * 5 * 8 * (3 + 1)
    assert verify(maml, line(3), repeats=1).median_error is None


def test_poolings_are_decisions_too() -> None:
    result = verify(MAML(conv(), inner_lr=0.1), labelled(shape=(1, 6, 6)), repeats=1)
    assert result.ok and result.decisions == 2 * 6 * 4 * (9 + 9) * (1 + 1)  # the pooling comes first


def test_tasks_of_different_sizes_and_ways() -> None:
    tasks = [labelled(1, n=n).task(0) for n in (3, 6)]
    result = verify(MAML(mlp(), inner_lr=0.1), TaskBatch.from_tasks(tasks, ways=[3, 3]), repeats=1)
    assert result.ok and result.error < 1e-5
    two = [labelled(1, classes=2).task(0), labelled(1).task(0)]
    assert verify(MAML(mlp(), inner_lr=0.1), TaskBatch.from_tasks(two, ways=[2, 3]), repeats=1).error < 1e-5


@pytest.mark.filterwarnings("ignore:1 task:UserWarning")
def test_tasks_that_are_skipped_are_left_out_of_the_truth() -> None:
    batch = labelled(3)
    batch.support_x[:6] = float("inf")
    result = verify(MAML(mlp(), on_nonfinite="skip"), batch, repeats=1)
    assert result.error < 1e-5 and result.loss_error < 1e-5


@pytest.mark.parametrize("build", [mlp, normed, dropout])
def test_nothing_of_the_users_is_touched(build) -> None:
    net = build()
    traced = not any(isinstance(m, nn.Dropout) for m in net)
    maml = MAML(net, inner_lr=0.1, learn_inner_lr=True, backend="auto" if traced else "autograd")
    next(net.parameters()).grad = torch.full_like(next(net.parameters()), 7.0)
    state, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    grads = [None if p.grad is None else p.grad.clone() for p in maml.parameters()]
    rate = maml.rates.values["inner_lr"].clone()
    with torch.no_grad():
        verify(maml, labelled(), repeats=1)
    assert torch.equal(torch.get_rng_state(), random) and torch.equal(maml.rates.values["inner_lr"], rate)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), net.state_dict().values(), strict=True))
    for p, g in zip(maml.parameters(), grads, strict=True):
        assert p.grad is None if g is None else torch.equal(p.grad, g)
    assert net.training and not torch.is_inference_mode_enabled()


# ---------------------------------------------------------------------------------------------------------- the verdict

GOOD = Verification("cpu", "float32", 4, 1, 3e-7, 3e-7, 3e-7, 3e-7, 0.0, 0.0, 100, 0, 3e-7, 1e-15, 1e-3, 5e-2)


@pytest.mark.parametrize(
    ("changes", "ok"),
    [
        ({}, True),
        ({"error": 2.9e-5}, True),
        ({"error": 1e-2, "plain_error": 6e-3, "equal_error": 1e-2}, True),  # plain torch is as far
        ({"error": 1e-2, "flips": 1}, True),  # only a flip
        ({"error": 1e-2, "equal_error": 1e-4}, False),
        ({"error": 1e-2, "plan_error": 1e-2}, False),  # the Plan itself is wrong: replaying it proves nothing
        ({"error": 1e-2, "equal_error": None, "plan_error": None}, False),
        ({"error": float("nan"), "equal_error": float("nan")}, False),
    ],
)
def test_rule(changes: dict, ok: bool) -> None:
    result = replace(GOOD, **changes)
    assert result.ok is ok
    assert ("NOT OK" in str(result)) is not ok


def test_what_is_printed() -> None:
    text = str(replace(GOOD, flips=3, decisions=120000)).splitlines()
    assert text[0] == "verify: 4 tasks, 1 inner step, cpu executor, float32"
    assert text[1] == "  agreement  3.0e-07 from float64 autograd (plain float32 torch: 3.0e-07)  OK"
    assert "3 of 120,000" in text[4] and "replayed" in text[5]
    assert text[-1].endswith("1 ms, plain torch loop 50 ms: 50 x as fast")
    short = str(replace(GOOD, median_error=None, decisions=None, flips=None, equal_error=None, plan_error=None))
    assert len(short.splitlines()) == 4


def test_a_wrong_gradient_is_found(monkeypatch) -> None:
    taken = diagnostics._take_gradient
    monkeypatch.setattr(diagnostics, "_take_gradient", lambda maml: {n: 1.001 * g for n, g in taken(maml).items()})
    result = verify(MAML(mlp(), inner_lr=0.1), labelled(4), repeats=1)
    assert not result.ok
    assert result.error == pytest.approx(1e-3, rel=0.01) and result.median_error == pytest.approx(1e-3, rel=0.01)


def test_flips_are_counted_and_replayed(monkeypatch) -> None:
    """One mask of ours is turned over: counted once, and the float64 Plan with it is another gradient."""
    recorded, seen = diagnostics._recorded, []

    def turned(maml, batch, seeds, replay=None):
        ran = recorded(maml, batch, seeds, replay)
        if next(maml.model.parameters()).dtype == torch.float32:
            mask = ran.results.values["gradient.mask6", 0][1]
            mask[0, 0] = ~mask[0, 0]
        seen.append(replay)
        return ran

    monkeypatch.setattr(diagnostics, "_recorded", turned)
    maml = MAML(mlp(), inner_lr=0.1)
    assert ("gradient.mask6", 0) in recorded(maml, labelled(), None).results.values
    result = verify(maml, labelled(), repeats=1)
    assert result.flips == 1 and len(seen) == 3 and seen[-1]
    assert result.equal_error > 1e-4 > result.plan_error and result.ok  # ours is near float64 all the same


def test_distance() -> None:
    a = {"w": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    b = {"w": torch.tensor([3.0, 0.5]), "b": torch.tensor([4.0])}
    assert distance(b, a) == pytest.approx(0.1)
    assert distance(b, {"w": torch.zeros(2), "b": torch.zeros(1)}) == pytest.approx((9.25 + 16) ** 0.5)


@pytest.mark.parametrize("repeats", [0, 1.5, True])
def test_wrong_repeats(repeats) -> None:
    with pytest.raises(ValueError if repeats == 0 else TypeError, match=f"repeats={repeats}: expected a whole number of at least 1"):
        verify(MAML(mlp()), labelled(), repeats=repeats)
