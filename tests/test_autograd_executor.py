"""The autograd executor: modules that cannot be traced, exact against the plain loop on the same random numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from autograd_cases import agrees, made, nets
from plain_loop import classify, distance, grads, mlp, plain_loop, ragged, regress
from torch import nn

from fastmaml import MAML

pytestmark = pytest.mark.filterwarnings("ignore:fastmaml cannot trace")


@nets
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_exact(net: str, steps: int) -> None:
    maml, tasks = made(net, inner_steps=steps)
    agrees(maml, tasks, steps=steps)


@nets
def test_float32(net: str) -> None:
    maml, tasks = made(net, torch.float32)
    agrees(maml, tasks, bound=1e-2 if net == "ResNet-12" else 2e-5)  # ReLU and pooling decisions may flip


@nets
def test_meta_grad_and_outer_loss(net: str) -> None:
    maml, tasks = made(net, inner_steps=2)

    def outer(z, y):
        return F.cross_entropy(z.flatten(0, 1), y.flatten())

    agrees(maml, tasks, lambda: maml.meta_grad(tasks), steps=2)
    agrees(maml, tasks, lambda: maml(tasks, outer_loss=outer), steps=2)


def test_two_outer_losses_before_backward() -> None:
    """The query rows are computed again with the masks of their own forward, not of the last one."""
    maml, tasks = made("dropout")
    more = classify(2, 5, 6, seed=9)
    outer = lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten())  # noqa: E731
    maml.plan(tasks, entry="halves")
    torch.manual_seed(3)
    a, b = maml(tasks, outer_loss=outer), maml(more, outer_loss=outer)
    (a.loss + 2 * b.loss).backward(retain_graph=True)
    first = grads(maml)
    (a.loss + 2 * b.loss).backward()
    torch.manual_seed(3)
    expected = [plain_loop(maml.model, t, lr=0.1, steps=3).gradients for t in (tasks, more)]
    truth = {n: expected[0][n] + 2 * expected[1][n] for n in first}
    assert distance(first, truth) <= 1e-10 and distance(grads(maml), truth) <= 1e-10


WEIGHT = torch.tensor([1.0, 2.0, 3.0, 4.0])


OPTIONS = {
    "first order": ({"first_order": True}, {"first_order": True}),
    "sum": ({"reduction": "sum", "inner_lr": 0.01}, {"lr": 0.01, "loss": lambda z, y: F.cross_entropy(z, y, reduction="sum")}),
    "memory": ({"memory": "fast"}, {}),
    "adapt": ({"adapt": "3.*"}, {"adapt": "3.*"}),
    "adapt body": ({"adapt": "0.*"}, {"adapt": "0.*"}),
    "smoothing": ({"loss": nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1)}, {"loss": lambda z, y: F.cross_entropy(z, y, WEIGHT.to(z), label_smoothing=0.1)}),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options(case: str) -> None:
    options, truth = OPTIONS[case]
    maml, tasks = made("dropout", **options)
    agrees(maml, tasks, **truth)


@pytest.mark.parametrize("net", ["dropout", "LSTM"])
@pytest.mark.parametrize("rates", [0.1, [0.1, 0.2, 0.15], {"*": 0.1}, {"*": [0.1, 0.2, 0.15]}], ids=["scalar", "step", "name", "name and step"])
@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
def test_learned_rates(net: str, rates, first_order: bool) -> None:
    maml, tasks = made(net, inner_lr=rates, learn_inner_lr=True, first_order=first_order)
    values = {n: v.detach().clone().requires_grad_() for n, v in maml.rates.values.items()}

    def rate(name: str, k: int):
        r = maml.rates.rates[name]
        return values[r.name][k] if r.per_step else values[r.name]

    agrees(maml, tasks, lr=rate, learned=values, first_order=first_order)


def test_multi_step_loss_without_chance() -> None:
    maml, tasks = made("dropout", step_loss_weights=[0.1, 0.2, 0.3, 0.4])
    maml.eval()
    forced = MAML(maml.model, inner_lr=0.1, inner_steps=3, step_loss_weights=[0.1, 0.2, 0.3, 0.4], backend="autograd")
    agrees(forced, tasks, step_weights=[0.1, 0.2, 0.3, 0.4])


def test_regression_and_ragged_tasks() -> None:
    model = mlp().double()
    agrees(MAML(model, inner_lr=0.1, inner_steps=3, loss="mse", backend="autograd"), regress(), loss=F.mse_loss)
    agrees(MAML(model, inner_lr=0.1, inner_steps=3, backend="autograd"), ragged())


def test_tokens() -> None:
    """Integers go into an embedding as they are."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 6), nn.Flatten(), nn.Linear(18, 4)).double()
    g = torch.Generator().manual_seed(0)
    tasks = tuple(torch.randint(0, high, shape, generator=g) for high, shape in ((11, (2, 5, 3)), (4, (2, 5)), (11, (2, 6, 3)), (4, (2, 6))))
    maml = MAML(model, inner_lr=0.1, inner_steps=3)
    agrees(maml, tasks)
    with torch.no_grad():
        assert maml.adapt(*tasks[:2])(tasks[2]).shape == (2, 6, 4)


class Sometimes(nn.Module):
    """Which parameters are read depends on the data, and one never is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.never = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x):
        y = self.a(x).tanh() * (1 + x.sum().detach())
        return y + self.b(x) if len(x) > 5 else y


def test_parameters_that_are_read_sometimes() -> None:
    maml, tasks = MAML(Sometimes().double(), inner_lr=0.1, inner_steps=3), classify(2, 5, 6)
    agrees(maml, tasks)  # never: None, as in the plain loop; b: of the query alone
    torch.manual_seed(3)
    maml.meta_grad(tasks)
    assert maml.model.never.weight.grad is None and maml.model.b.weight.grad is not None


def test_frozen_and_tied_parameters() -> None:
    maml, tasks = made("transformer")
    maml.model.encoder.requires_grad_(False)
    maml.model.encoder.layers[1].linear1.weight = maml.model.encoder.layers[0].linear1.weight
    agrees(maml, tasks)


class Noted(nn.Sequential):
    """Writes down the masks that are drawn."""

    def forward(self, x):
        mask = torch.bernoulli(torch.full((len(x), 8), 0.5, dtype=x.dtype))
        self.seen.append(mask)
        return self[1]((self[0](x).tanh() + 0 * x.sum().item()) * mask)


def test_masks_are_replayed() -> None:
    model = Noted(nn.Linear(3, 8), nn.Linear(8, 4)).double()
    model.seen = []
    maml, tasks = MAML(model, inner_steps=3), classify(1, 5, 6)
    maml.plan(tasks)
    model.seen.clear()
    maml(tasks)
    drawn = [m for m in model.seen if len(m) == 5]
    # gradient passes 0 1 2, then Hessian-vector products 2 (its graph is kept), 1, 0
    assert len(drawn) == 5 and torch.equal(drawn[3], drawn[1]) and torch.equal(drawn[4], drawn[0])
    assert not torch.equal(drawn[0], drawn[1])


def test_what_cannot_be_replayed_is_refused() -> None:
    class Counting(nn.Sequential):
        def forward(self, x):
            self.calls += 1
            return super().forward(x) * (self.calls + 0 * x.sum().item())

    model = Counting(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))
    model.calls = 1
    with pytest.raises(RuntimeError, match="other outputs when a step is computed again.*keeps state"):
        MAML(model, inner_steps=3)(classify())
    model.calls = 1
    MAML(model, inner_steps=3, first_order=True)(classify())  # nothing is computed again
