"""fastmaml.functional: for code that carries its parameters itself."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from maml_cases import Tied
from plain_loop import classify, distance, mlp, one_thread, plain_loop, ragged  # noqa: F401
from torch import nn

import fastmaml
from fastmaml import functional


def other(model: nn.Module, seed: int = 5) -> dict[str, torch.Tensor]:
    """Parameters that are not the model's own."""
    torch.manual_seed(seed)
    return {n: (p + 0.1 * torch.randn_like(p)).detach().requires_grad_() for n, p in model.named_parameters()}


def expected(model: nn.Module, params: dict[str, torch.Tensor], tasks, **options) -> dict[str, torch.Tensor]:
    model = type(model)(*model) if isinstance(model, nn.Sequential) else model
    saved = {n: p.detach().clone() for n, p in model.named_parameters()}
    try:
        model.load_state_dict(params, strict=False)
        return plain_loop(model, tasks, **options).gradients
    finally:
        model.load_state_dict(saved, strict=False)


@pytest.mark.parametrize("model", [mlp(), Tied()], ids=["mlp", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_meta_loss(model: nn.Module, dtype: torch.dtype) -> None:
    model.to(dtype)
    tasks, params = classify(), other(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    out = functional.meta_loss(model, params, tasks, inner_lr=0.3, inner_steps=3)
    out.loss.backward()
    found = {n: p.grad for n, p in params.items()}
    assert distance(found, expected(model, params, tasks, lr=0.3, steps=3)) <= (3e-6 if dtype == torch.float32 else 1e-11)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())


def test_through_a_network_that_makes_the_parameters() -> None:
    model, tasks = mlp().double(), classify()
    z = torch.ones(2, dtype=torch.float64, requires_grad=True)
    base = other(model)
    params = {n: p.detach() * z[0] + z[1] for n, p in base.items()}
    functional.meta_loss(model, params, tasks, inner_lr=0.3).loss.backward()
    g = expected(model, {n: p.detach() for n, p in params.items()}, tasks, lr=0.3)
    truth = torch.stack([sum((g[n] * base[n].detach()).sum() for n in g), sum(v.sum() for v in g.values())])
    torch.testing.assert_close(z.grad, truth, rtol=1e-10, atol=1e-12)


def test_options_of_the_call() -> None:
    model, tasks = mlp(), classify()
    params = other(model)

    def outer(z, y):
        return F.cross_entropy(z.flatten(0, 1), y.flatten())

    for options, truth in (
        ({"outer_loss": outer}, {}),
        ({"task_weights": [1.0, 0.0, 2.0]}, {"task_weights": [1.0, 0.0, 2.0]}),
        ({"first_order": True}, {"first_order": True}),
        ({"adapt": "4.*"}, {"adapt": "4.*"}),
        ({"step_loss_weights": [0.5, 0.5]}, {"step_weights": [0, 0.5, 0.5]}),
    ):
        found = torch.autograd.grad(functional.meta_loss(model, params, tasks, inner_lr=0.3, inner_steps=2, **options).loss, list(params.values()))
        assert distance(dict(zip(params, found, strict=True)), expected(model, params, tasks, lr=0.3, steps=2, **truth)) <= 3e-6
    batch = ragged()
    found = torch.autograd.grad(functional.meta_loss(model, params, batch, inner_lr=0.3).loss, list(params.values()))
    assert distance(dict(zip(params, found, strict=True)), expected(model, params, batch, lr=0.3)) <= 3e-6


def test_rates_that_print_alike_are_not_alike() -> None:
    model, tasks = mlp(), classify()
    params = other(model)
    losses = set()
    for lr in (torch.tensor(0.30001), torch.tensor(0.30002), 0.1, [0.1, 0.3], [0.3, 0.1], {"*": 0.2}, {"*": torch.tensor(0.25)}):
        losses.add(functional.meta_loss(model, params, tasks, inner_lr=lr, inner_steps=2).loss.item())
    for weight in (torch.ones(4), torch.tensor([1.0, 2.0, 1.0, 1.0])):
        losses.add(functional.meta_loss(model, params, tasks, inner_lr=0.3, inner_steps=2, loss=nn.CrossEntropyLoss(weight)).loss.item())
    assert len(losses) == 9


def test_plans_are_kept(monkeypatch) -> None:
    model, tasks = mlp(), classify()
    functional.meta_loss(model, other(model), tasks, inner_lr=0.3)
    monkeypatch.setattr("fastmaml.engine.build_plan", lambda *a: pytest.fail("a Plan was built"))
    functional.meta_loss(model, other(model, 6), tasks, inner_lr=0.2)


def test_adapt() -> None:
    model, tasks = mlp(), classify()
    params = other(model)
    weights = functional.adapt(model, params, *tasks[:2], inner_lr=0.3, inner_steps=2)
    saved = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.load_state_dict(params)
    truth = plain_loop(model, tasks, lr=0.3, steps=2).adapted
    model.load_state_dict(saved)
    for name, w in weights.items():
        assert not w.requires_grad
        torch.testing.assert_close(w, torch.stack([t[name] for t in truth]), rtol=1e-5, atol=1e-5, check_dtype=False)


def test_no_grad() -> None:
    model, tasks = mlp(), classify()
    with torch.no_grad():
        assert not functional.meta_loss(model, other(model), tasks).loss.requires_grad


def test_threads_with_parameters_of_their_own() -> None:
    model, tasks, failed = mlp(), classify(), []
    functional.meta_loss(model, other(model), tasks, inner_lr=0.3)

    def work(seed: int) -> None:
        params = other(model, seed)
        losses = {functional.meta_loss(model, params, tasks, inner_lr=0.3).loss.item() for _ in range(5)}
        failed.extend(losses if len(losses) != 1 else ())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_models_do_not_pile_up() -> None:
    seen = []
    for seed in range(12):
        model = mlp(seed=seed)
        functional.meta_loss(model, dict(model.named_parameters()), classify())
        seen.append(weakref.ref(model))
    del model
    gc.collect()
    assert sum(ref() is not None for ref in seen) <= functional.KEPT


WRONG = {
    "missing": (lambda p: p.pop("4.bias"), ValueError, "lacks '4.bias'.*named_parameters"),
    "unknown": (lambda p: p.update(spare=torch.zeros(1)), ValueError, "has 'spare', which the model has not"),
    "shape": (lambda p: p.update({"4.bias": torch.zeros(3)}), ValueError, r"params\['4.bias'\] is torch.float32 \[3\].*\[4\]"),
    "dtype": (lambda p: p.update({"4.bias": torch.zeros(4).double()}), ValueError, r"params\['4.bias'\] is torch.float64"),
    "no tensor": (lambda p: p.update({"4.bias": 0.0}), TypeError, r"params\['4.bias'\] is float: expected a tensor"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_parameters(case: str) -> None:
    model = mlp()
    params = other(model)
    edit, kind, message = WRONG[case]
    edit(params)
    with pytest.raises(kind, match=message):
        functional.meta_loss(model, params, classify())


def test_other_wrong_arguments() -> None:
    model = mlp()
    with pytest.raises(TypeError, match="params is list: expected {name: tensor}"):
        functional.meta_loss(model, list(model.parameters()), classify())
    with pytest.raises(ValueError, match="learn_inner_lr=True needs an object.*fastmaml.MAML"):
        functional.meta_loss(model, other(model), classify(), learn_inner_lr=True)
    with pytest.raises(TypeError, match="task_weights"):
        functional.adapt(model, other(model), *classify()[:2], task_weights=[1, 1, 1])
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"params\['0.weight'\] requires grad, the model's own does not.*requires_grad_"):
        functional.meta_loss(model, other(model), classify())
    with pytest.raises(TypeError, match="unexpected keyword argument 'steps'"):
        functional.meta_loss(mlp(), other(mlp()), classify(), steps=3)
    assert fastmaml.functional is functional
