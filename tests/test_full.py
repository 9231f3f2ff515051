"""Methods that adapt the network's own parameters, by name, against plain torch written from the papers; and what they cost."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from plain_loop import classify, distance, grads, mlp, one_thread, plain_loop, ragged, regress  # noqa: F401
from test_optimizers import BOUND, backends
from test_rollback import net
from test_rollback import tasks as images
from torch import Tensor, nn

from fastmaml import MAML, SGD, TaskBatch, methods
from fastmaml.plan import rollback
from fastmaml.plan.costs import costs


def flops(maml: MAML, data) -> int:
    """Of a meta-iteration, counted from its Plan."""
    batch = TaskBatch.of(data)
    return sum(cost.flops for cost in costs(maml.plan(batch), batch))


# ---------------------------------------------------------------------------------------------------------------- first order
@backends
def test_first_order(how) -> None:
    data, model = classify(), mlp().to(how[1])
    maml = methods.FirstOrderMAML(model, inner_lr=0.3, inner_steps=3, backend=how[0])
    maml.meta_grad(data)
    assert distance(grads(model), plain_loop(model, data, lr=0.3, steps=3, first_order=True).gradients) <= BOUND[how[1]]
    assert maml.plan(data).count("sgd_bwd") == 0 and "hvp" not in maml.plan(data).segments


# ---------------------------------------------------------------------------------------------------------------- Reptile
def reptile(model: nn.Module, batch: TaskBatch, lr: float, steps: int, rule: SGD, loss=F.cross_entropy) -> dict[str, Tensor]:
    """mean(theta - theta_K), the inner loop by torch.optim.SGD."""
    total = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in model.named_parameters()}
    for t in range(len(batch)):
        own = copy.deepcopy(model).double()
        numbers = {n: getattr(rule, n) for n in ("momentum", "dampening", "nesterov", "weight_decay")}
        optimizer = torch.optim.SGD(own.parameters(), lr=lr, **numbers)
        x, y, *_ = batch.task(t)
        cut = slice(None) if batch.ways is None else slice(int(batch.ways[t]))
        for _ in range(steps):
            optimizer.zero_grad()
            loss(own(x.double())[:, cut], y.double() if y.is_floating_point() else y).backward()
            optimizer.step()
        for (n, first), last in zip(model.named_parameters(), own.parameters(), strict=True):
            total[n] += (first.detach().double() - last.detach()) / len(batch)
    return total


@backends
@pytest.mark.parametrize("rule", [SGD(), SGD(momentum=0.9, weight_decay=0.1)], ids=["plain", "momentum"])
@pytest.mark.parametrize("steps", [1, 3, rollback.KEPT + 1])
def test_reptile(how, rule: SGD, steps: int) -> None:
    data, model = classify(), mlp().to(how[1])
    maml = methods.Reptile(model, inner_lr=0.1, inner_steps=steps, inner_optimizer=rule, backend=how[0])
    truth = reptile(model, TaskBatch.of(data), 0.1, steps, rule)
    out = maml.meta_grad(data)
    assert distance(grads(model), truth) <= BOUND[how[1]]
    maml(data).loss.backward()
    assert distance(grads(model), truth) <= BOUND[how[1]]
    query = plain_loop(model, data, lr=0.1, steps=steps, optimizer=rule)
    torch.testing.assert_close(out.task_losses, query.task_losses, rtol=1e-5, atol=1e-5, check_dtype=False)
    own = maml(data[:2])  # no query set
    own.loss.backward()
    assert distance(grads(model), truth) <= BOUND[how[1]]
    support = plain_loop(model, (*data[:2], *data[:2]), lr=0.1, steps=steps, optimizer=rule)
    torch.testing.assert_close(own.task_losses.detach(), support.task_losses, rtol=1e-5, atol=1e-5, check_dtype=False)


def test_reptile_of_tasks_of_different_sizes_and_of_wide_layers() -> None:
    model, batch = mlp(), ragged()
    methods.Reptile(model, inner_lr=0.1, inner_steps=3).meta_grad(batch)
    assert distance(grads(model), reptile(model, batch, 0.1, 3, SGD())) <= 3e-6
    model, data = net(), images(torch.float32)
    methods.Reptile(model, inner_lr=0.02, inner_steps=2).meta_grad(data)
    assert distance(grads(model), reptile(model, TaskBatch.of(data), 0.02, 2, SGD())) <= 3e-5


def test_reptiles_step_is_the_papers() -> None:
    """theta + epsilon mean(theta_K - theta), by an outer SGD with rate epsilon."""
    data, model = regress(), mlp()
    maml = methods.Reptile(model, loss="mse")
    adapted, before = maml.adapt(*data[:2]).weights, {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(maml.parameters(), lr=0.1)
    maml(data).loss.backward()
    optimizer.step()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[n] + 0.1 * (adapted[n].mean(0) - before[n]), rtol=0, atol=1e-6)


def test_reptile_goes_nowhere_back() -> None:
    data = classify()
    plan = methods.Reptile(mlp()).plan(data)
    assert set(plan.segments) <= {"begin", "gradient", "update", "query", "reptile"}
    assert all(not b.steps for b in plan.buffers.values() if b.kind == "mask")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"learn_inner_lr": True}, "no gradient of the inner rates"),
        ({"step_loss_weights": [0.1] * 5}, "does not look at the losses of the steps"),
        ({"adapt": "0.*"}, "leaves out '2.weight': adapt it, or freeze it"),
    ],
    ids=str,
)
def test_what_reptile_has_not(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        methods.Reptile(mlp(), **options)
    with pytest.raises(ValueError, match="Reptile's gradient is theta - theta_K, whatever the outer loss"):
        methods.Reptile(mlp())(classify(), outer_loss=lambda z, y: z.sum())


def test_reptile_with_a_frozen_body_and_in_verify() -> None:
    model, data = mlp(), classify(tasks=4)
    model[0].requires_grad_(False)
    maml = methods.Reptile(model, inner_lr=0.1)
    assert maml.verify(data, repeats=1).ok
    maml.meta_grad(data)
    assert model[0].weight.grad is None and model[2].weight.grad is not None


# ---------------------------------------------------------------------------------------------------------------- Meta-SGD
@backends
def test_meta_sgd(how) -> None:
    """d loss / d alpha = -sum over the steps of the gradient at theta_{k+1}, element by element (Li et al. 2017, equation 4)."""
    data, model = classify(), mlp().to(how[1])
    maml = methods.MetaSGD(model, inner_lr=0.2, inner_steps=2, backend=how[0])
    rates = {n: r.detach().double().requires_grad_() for n, r in maml.rates.learned()}
    assert {n.removeprefix("inner_lr."): tuple(r.shape) for n, r in rates.items()} == {n: tuple(p.shape) for n, p in model.named_parameters()}
    maml.meta_grad(data)
    truth = plain_loop(model, data, lr=lambda n, k: rates[f"inner_lr.{n}"], steps=2, learned=rates).gradients
    assert distance(grads(maml), truth) <= BOUND[how[1]]


def test_meta_sgds_rates_begin_as_in_the_paper() -> None:
    torch.manual_seed(3)
    maml = methods.MetaSGD(mlp())
    first = {float(v) for r in maml.rates.values.values() for v in r.detach().flatten()}
    assert len(first) == 1 and 0.005 <= first.pop() <= 0.1
    torch.manual_seed(3)
    again = methods.MetaSGD(mlp())
    assert all(torch.equal(a, b) for a, b in zip(maml.rates.values.values(), again.rates.values.values(), strict=True))
    with pytest.raises(TypeError, match="one number that all rates begin with"):
        methods.MetaSGD(mlp(), inner_lr=[0.1])


@pytest.mark.parametrize(("method", "option"), [(methods.FirstOrderMAML, "first_order"), (methods.Reptile, "first_order"), (methods.MetaSGD, "learn_inner_lr")])
def test_what_makes_the_method_is_its_own(method, option: str) -> None:
    with pytest.raises(TypeError, match=f"sets {option} itself"):
        method(mlp(), **{option: True})
