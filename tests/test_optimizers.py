"""Inner optimizers: what users call, against torch.optim.SGD and a plain loop with create_graph; what the Plan keeps and skips for them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from maml_cases import BACKENDS, BOUND, made
from plain_loop import classify, distance, grads, mlp, one_thread, plain_loop  # noqa: F401
from test_rollback import STEPS, net
from test_rollback import tasks as images
from torch import nn

import fastmaml
from fastmaml import MAML, SGD
from fastmaml.plan import rollback

RULES = {
    "momentum": SGD(momentum=0.9),
    "dampening": SGD(momentum=0.8, dampening=0.3),
    "nesterov": SGD(momentum=0.7, nesterov=True),
    "weight decay": SGD(weight_decay=0.1),
    "norm": SGD(max_norm=0.2),
    "value": SGD(clip_value=0.02),
    "all by norm": SGD(momentum=0.9, dampening=0.2, weight_decay=0.1, max_norm=0.3),
    "all by value": SGD(momentum=0.9, nesterov=True, weight_decay=0.1, clip_value=0.05),
}
backends = pytest.mark.parametrize("how", [BACKENDS[0], BACKENDS[2]], ids=["cpu-float32", "torch-float64"])
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


# ---------------------------------------------------------------------------------------------------------------- against torch
@rules
def test_the_trajectory_is_torch_optim_sgds(rule: SGD) -> None:
    """theta_K of adapt, and of the truth of these tests."""
    data = classify()
    maml = made(("torch", torch.float64), inner_optimizer=rule, inner_steps=4)
    weights, truth = maml.adapt(*data[:2]).weights, plain_loop(maml.model, data, lr=0.3, steps=4, optimizer=rule)
    for t in range(3):
        model = copy.deepcopy(maml.model)
        numbers = {n: getattr(rule, n) for n in ("momentum", "dampening", "nesterov", "weight_decay")}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3, **numbers)
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(model(data[0][t].double()), data[1][t]).backward()
            if rule.max_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), rule.max_norm)
            if rule.clip_value is not None:
                nn.utils.clip_grad_value_(model.parameters(), rule.clip_value)
            optimizer.step()
        for name, p in model.named_parameters():
            torch.testing.assert_close(weights[name][t], p.detach(), rtol=0, atol=1e-13)
            torch.testing.assert_close(truth.adapted[t][name], p.detach(), rtol=0, atol=1e-13)


@backends
@rules
@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
def test_gradient(how, rule: SGD, first_order: bool) -> None:
    data, maml = classify(), made(how, inner_optimizer=rule, first_order=first_order)
    maml.meta_grad(data)
    expected = plain_loop(maml.model, data, lr=0.3, steps=3, optimizer=rule, first_order=first_order).gradients
    assert distance(grads(maml.model), expected) <= BOUND[how[1]]


@backends
@rules
@pytest.mark.parametrize("form", ["one", "per step", "per tensor", "per element"])
def test_learned_rates(how, rule: SGD, form: str) -> None:
    model = mlp().to(how[1])
    names = dict(model.named_parameters())
    inner_lr = {
        "one": 0.3,
        "per step": [0.3, 0.2, 0.1],
        "per tensor": {"*weight": 0.3, "*bias": 0.1},
        "per element": {n: torch.full_like(p, 0.2) for n, p in names.items()},
    }[form]
    data, maml = classify(), made(how, model, inner_lr=inner_lr, learn_inner_lr=True, inner_optimizer=rule)
    maml.meta_grad(data)
    rates = {n: r.detach().double().requires_grad_() for n, r in maml.rates.learned()}

    def lr(name: str, k: int) -> torch.Tensor:
        r = rates[maml.rates.rates[name].name]
        return r[k] if form == "per step" else r

    expected = plain_loop(model, data, lr=lr, steps=3, optimizer=rule, learned=rates).gradients
    assert distance(grads(maml), expected) <= BOUND[how[1]]


@backends
@rules
def test_around_an_outer_loss_and_with_a_multi_step_loss(how, rule: SGD) -> None:
    data, maml = classify(), made(how, inner_optimizer=rule, learn_inner_lr=True, inner_lr={"*": 0.3})
    maml(data, outer_loss=lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten())).loss.backward()
    found = grads(maml)
    maml.meta_grad(data)
    whole = grads(maml)
    assert distance(found, whole) <= BOUND[how[1]]
    maml.step_loss_weights = [0.2, 0.3, 0.5]
    maml.meta_grad(data)
    expected = plain_loop(maml.model, data, lr=0.3, steps=3, optimizer=rule, step_weights=[0, 0.2, 0.3, 0.5]).gradients
    found = grads(maml)
    assert distance({n: found[n] for n in expected}, expected) <= BOUND[how[1]]


@pytest.mark.parametrize(("backend", "memory"), [("torch", "constant"), ("cpu", "constant"), ("cpu", "fast")])
@pytest.mark.parametrize("name", ["momentum", "all by norm", "all by value"])
def test_many_steps(name: str, memory: str, backend: str) -> None:
    """Beyond rollback.KEPT steps, of a network with layers that plain steps would roll back."""
    rule = RULES[name]
    dtype = torch.float64 if backend == "torch" else torch.float32
    steps, data = rollback.KEPT + 1, images(dtype)
    maml = MAML(net().to(dtype), inner_lr=0.02, inner_steps=steps, inner_optimizer=rule, memory=memory, backend=backend)
    maml.meta_grad(data)
    expected = plain_loop(maml.model, data, lr=0.02, steps=steps, optimizer=rule).gradients
    assert distance(grads(maml), expected) <= (1e-11 if backend == "torch" else 2e-5)


def test_an_opaque_module() -> None:
    """The same update ops around a module that is not traced."""
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(3, 6), nn.Softsign(), nn.Linear(6, 4)).double(), classify()
    for rule in RULES.values():
        maml = MAML(model, inner_lr=0.3, inner_steps=3, inner_optimizer=rule, backend="autograd")
        maml.meta_grad(data)
        assert distance(grads(model), plain_loop(model, data, lr=0.3, steps=3, optimizer=rule).gradients) <= 1e-11


@rules
def test_with_a_parameterisation(rule: SGD) -> None:
    """Low rank, and CAVIA's context, whose beginning is not outer-learned: float32 on cpu as the torch executor in float64, which the plain loop holds."""
    for method, options in ((fastmaml.methods.LowRankMAML, {"rank": 2}), (fastmaml.methods.CAVIA, {"context": 3})):
        found = []
        for backend, dtype in (("cpu", torch.float32), ("torch", torch.float64)):
            torch.manual_seed(0)
            maml = method(mlp(), inner_lr=0.3, inner_steps=3, inner_optimizer=rule, **options)
            with torch.no_grad():
                for p in maml.parameters():
                    p.add_(0.1 * torch.randn_like(p))
            maml = maml.to(dtype)
            maml.backend = backend
            maml.meta_grad(classify())
            found.append(grads(maml))
        assert distance(*found) <= 1e-5


def test_exactly_at_the_bound() -> None:
    """Clamp passes the gradient of an element at the bound: one weight, one sample, a gradient of exactly 0.5."""
    model = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(0.25)
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    data = (one, 0 * one, one, one)
    for rule in (SGD(clip_value=0.5), SGD(clip_value=0.4999), SGD(max_norm=0.5 + 1e-6), SGD(max_norm=0.4)):
        maml = MAML(model, inner_lr=0.1, inner_steps=1, loss="mse", inner_optimizer=rule)
        maml.meta_grad(data)
        expected = plain_loop(model, data, lr=0.1, loss=F.mse_loss, optimizer=rule).gradients
        assert distance(grads(model), expected) <= 1e-12


# ---------------------------------------------------------------------------------------------------------------- the Plan
def kernels(rule: SGD, segment: str, **options) -> list[str]:
    maml = MAML(mlp((3, 4)), inner_steps=3, inner_optimizer=rule, **options)
    return [i.kernel for i in maml.plan(classify()).segments[segment].instructions]


def test_instructions() -> None:
    """Of one weight and one bias."""
    assert kernels(SGD(momentum=0.9), "update") == ["axpy_fwd", "sgd_fwd", "scale_fwd"] * 2
    assert kernels(SGD(momentum=0.9), "update_bwd") == ["scale_fwd", "sgd_fwd"] * 2
    assert kernels(SGD(weight_decay=0.1), "update_bwd") == ["sgd_bwd", "axpy_fwd"] * 2
    assert kernels(SGD(clip_value=1.0), "update_bwd") == ["sgd_bwd"] * 2 + ["clip_value_bwd"] * 2
    norm = ["dot_fwd"] * 2 + ["clip_norm_fwd"] + ["scale_fwd"] * 2 + ["sgd_fwd"] * 2
    assert kernels(SGD(max_norm=1.0), "update") == norm
    assert kernels(SGD(weight_decay=0.1), "update_bwd", first_order=True) == ["sgd_bwd", "axpy_fwd"] * 2
    plan = MAML(mlp(), inner_steps=3, first_order=True, inner_optimizer=SGD(momentum=0.9, max_norm=1.0)).plan(classify())
    assert "update_bwd" not in plan.segments  # the momentum of a gradient that is a constant


def test_what_is_kept_per_step() -> None:
    def kept(rule: SGD, **options) -> set[str]:
        buffers = MAML(mlp(), inner_steps=3, inner_optimizer=rule, **options).plan(classify()).buffers.values()
        return {b.name.split(".")[0] for b in buffers if b.steps and b.home == "run" and not b.name.startswith(("gradient.", "theta."))}

    assert kept(SGD(momentum=0.9, weight_decay=0.1)) == set()
    assert kept(SGD(clip_value=0.1)) == {"g"} and kept(SGD(max_norm=0.1)) == {"g", "clip"}
    assert kept(SGD(max_norm=0.1), first_order=True) == set()
    assert kept(SGD(momentum=0.9), learn_inner_lr=True) == {"s"}
    assert kept(SGD(momentum=0.9, clip_value=0.1), learn_inner_lr=True) == {"g", "s"}
    assert kept(SGD(weight_decay=0.1), learn_inner_lr=True) == {"d"}


def test_wide_first_layers_stay_factored_with_momentum_alone() -> None:
    data = images(torch.float32)

    def factored(rule: SGD) -> int:
        return MAML(net(), inner_steps=2, inner_optimizer=rule).plan(data).count("gram")

    assert factored(SGD()) == factored(SGD(momentum=0.9, nesterov=True)) > 0
    assert factored(SGD(weight_decay=0.1)) == factored(SGD(max_norm=1.0)) == factored(SGD(clip_value=1.0)) == 0


def test_memory_of_many_steps() -> None:
    """Weights are rolled back by plain steps alone."""
    def grown(rule: SGD) -> int:
        maml = MAML(net(), inner_optimizer=rule)
        few, many = (sum(maml.memory_bytes(images(torch.float32), inner_steps=k).values()) for k in (STEPS, STEPS + 10))
        return many - few

    assert grown(SGD()) < grown(SGD(momentum=0.9)) / 2


def test_explained_and_counted() -> None:
    for rule in RULES.values():
        text = MAML(mlp(), inner_steps=3, inner_optimizer=rule).explain(classify())
        assert "Not counted" not in text


# ---------------------------------------------------------------------------------------------------------------- habits
def test_changed_between_calls() -> None:
    data, maml = classify(), made(inner_optimizer=SGD(momentum=0.9))
    for rule in (SGD(momentum=0.9), SGD(weight_decay=0.1), None):
        maml.inner_optimizer = rule
        maml.meta_grad(data)
        assert distance(grads(maml.model), plain_loop(maml.model, data, lr=0.3, steps=3, optimizer=rule).gradients) <= 3e-6
    copied = pickle.loads(pickle.dumps(made(inner_optimizer=RULES["all by norm"])))
    assert copied.inner_optimizer == RULES["all by norm"]


def test_steps_of_a_call() -> None:
    data, rule = classify(), RULES["dampening"]
    maml = made(inner_optimizer=rule)
    for steps in (0, 1, 5):
        maml(data, inner_steps=steps).loss.backward()
        assert distance(grads(maml.model), plain_loop(maml.model, data, lr=0.3, steps=steps, optimizer=rule).gradients) <= 3e-6


def test_functional_and_verify() -> None:
    data, model, rule = classify(tasks=4), mlp(), RULES["all by value"]
    params = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    out = fastmaml.functional.meta_loss(model, params, data, inner_lr=0.3, inner_steps=3, inner_optimizer=rule)
    found = dict(zip(params, torch.autograd.grad(out.loss, list(params.values())), strict=True))
    assert distance(found, plain_loop(model, data, lr=0.3, steps=3, optimizer=rule).gradients) <= 3e-6
    for rule in (RULES["all by norm"], RULES["all by value"]):
        said = MAML(model, inner_lr=0.3, inner_steps=3, inner_optimizer=rule).verify(data, repeats=1)
        assert said.ok and said.plan_error <= 1e-11


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"momentum": -0.1}, "momentum=-0.1: expected a number of at least 0"),
        ({"momentum": "0.9"}, "momentum='0.9': expected a finite number"),
        ({"max_norm": 0}, "max_norm=0: expected a number above 0, or None not to clip"),
        ({"clip_value": float("inf")}, "clip_value=inf: expected a finite number or None"),
        ({"nesterov": 1, "momentum": 0.9}, "nesterov=1: expected True or False"),
        ({"nesterov": True}, "it needs a momentum"),
        ({"momentum": 0.9, "dampening": 0.1, "nesterov": True}, "no dampening"),
        ({"max_norm": 1.0, "clip_value": 1.0}, "not both"),
    ],
    ids=str,
)
def test_errors(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SGD(**options)


def test_other_optimizers_are_refused() -> None:
    model = mlp()
    for wrong in (torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.Adam, "sgd", 0.9):
        with pytest.raises(TypeError, match=r"inner_optimizer is .*: expected fastmaml.SGD"):
            MAML(model, inner_optimizer=wrong)
