"""layerwise: ANIL, BOIL, any subset, frozen features; statistics of support and query together."""

from __future__ import annotations

import copy

import families
import pytest
import torch
import torch.nn.functional as F
from families import small_conv, truth
from helpers_families import IMAGES, OPTIONS, backends, grads, options
from maml_cases import BOUND
from plain_loop import classify, mlp, one_thread, plain_loop  # noqa: F401
from torch import nn

import fastmaml
from fastmaml import MAML, methods
from fastmaml.parameterisation import Layerwise

LAYERWISE = {"anil": ("4.*", "[024].*"), "boil": ("[02].*", "[024].*"), "head_only": ("4.*", "4.*")}


@backends
@pytest.mark.parametrize("name", LAYERWISE)
def test_layerwise(how, name: str) -> None:
    """Raghu et al. 2020, Oh et al. 2021: the same loop over fewer parameters."""
    patterns, trained = LAYERWISE[name]
    maml, tasks = MAML(mlp().to(how[1]), parameterisation=name, **options(how)), classify()
    maml.meta_grad(tasks)
    found, expected = grads(maml), plain_loop(maml.model, tasks, lr=0.3, steps=3, adapt=patterns).gradients
    assert sorted(found) == sorted(n for n in expected if torch.tensor([n.startswith(c) for c in trained.strip("[].*")]).any())
    assert families.distance(found, {n: expected[n] for n in found}) <= BOUND[how[1]]
    assert maml.executor == how[0]


def test_layerwise_by_pattern_and_constructor() -> None:
    for maml in (methods.ANIL(mlp(), **OPTIONS), methods.ANIL(mlp(), head="4.*", **OPTIONS), MAML(mlp(), parameterisation=Layerwise("4.*"), **OPTIONS)):
        tasks = classify()
        maml.meta_grad(tasks)
        assert families.distance(grads(maml), plain_loop(maml.model, tasks, lr=0.3, steps=3, adapt="4.*").gradients) <= 3e-6
        assert sorted(maml.adapt(*tasks[:2]).weights) == ["4.bias", "4.weight"]
    assert "parameterisation layerwise(adapt='4.*'): adapted: 4.weight, 4.bias; outer-learned only: 0.weight" in maml.explain(tasks)
    assert "constant: 0.weight" in methods.HeadOnly(mlp()).explain(tasks)
    assert methods.BOIL(mlp(), **OPTIONS).verify(classify()).ok and methods.HeadOnly(mlp(), **OPTIONS).verify(classify()).ok


def test_layerwise_by_module() -> None:
    """A module of the model, itself or by its name, stands for all parameters in it."""
    tasks, expected = classify(), plain_loop(mlp(), classify(), lr=0.3, steps=3, adapt="[04].*").gradients
    for which in (lambda net: ["0", "4"], lambda net: [net[0], "4.*"], lambda net: (net[0], net[4])):
        net, other = mlp(), mlp()
        for maml in (methods.ANIL(net, head=which(net), **OPTIONS), MAML(other, adapt=which(other), **OPTIONS)):
            assert sorted(maml.adapt(*tasks[:2]).weights) == ["0.bias", "0.weight", "4.bias", "4.weight"]
            maml.meta_grad(tasks)
            assert families.distance(grads(maml), expected) <= 3e-6
            again = copy.deepcopy(maml)
            assert torch.equal(again(tasks).loss, maml(tasks).loss)
    net = mlp()
    frozen = MAML(net, parameterisation=Layerwise(net[4], frozen=net[0]), **OPTIONS)
    assert sorted(n for n, _ in frozen.named_parameters()) == ["2.bias", "2.weight", "4.bias", "4.weight"]
    assert frozen.parameterisation.signature == "layerwise(adapt=['4'], frozen=['0'])"
    for wrong in (lambda: methods.ANIL(mlp(), head=nn.Linear(8, 4)), lambda: MAML(mlp(), adapt=nn.Linear(8, 4))):
        with pytest.raises(ValueError, match="adapt has a Linear that is no module of the model"):
            wrong()
    with pytest.raises(ValueError, match="adapt='conv' matches none of 0.weight"):
        methods.ANIL(mlp(), head="conv")


def test_a_rate_for_each_layer() -> None:
    """Under a module's name weight and bias have one rate, and a learned one is one number."""
    maml = MAML(mlp(), inner_lr={"0": 0.1, "2": [0.2, 0.1], "4.*": 0.3}, learn_inner_lr=True, inner_steps=2)
    assert {n: tuple(r.shape) for n, r in maml.rates.learned()} == {"inner_lr.0": (), "inner_lr.2": (2,), "inner_lr.4.weight": (), "inner_lr.4.bias": ()}
    with pytest.raises(ValueError, match=r"inner_lr has shape \[8, 3\] for the module '0'"):
        MAML(mlp(), inner_lr={"0": torch.ones(8, 3), "*": 0.1})
    with pytest.raises(ValueError, match="inner_lr has '1', which matches no adapted parameter"):
        MAML(mlp(), inner_lr={"1": 0.1, "*": 0.1})


def test_functions_of_a_dict() -> None:
    model, tasks = mlp(), classify()
    params = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    fastmaml.functional.meta_loss(model, params, tasks, parameterisation="anil", **OPTIONS).loss.backward()
    assert families.distance({n: p.grad for n, p in params.items()}, plain_loop(model, tasks, lr=0.3, steps=3, adapt="4.*").gradients) <= 3e-6


def test_head_of_a_bare_layer() -> None:
    assert sorted(MAML(nn.Linear(3, 4), parameterisation="anil").adapt(*classify()[:2]).weights) == ["bias", "weight"]


@backends
@pytest.mark.parametrize("first_order", [False, True])
def test_joint_statistics(how, first_order: bool) -> None:
    """learn2learn's anil_fc100.py: features of support and query rows together, then split."""
    maml, tasks = methods.ANIL(small_conv().to(how[1]), batchnorm="joint", first_order=first_order, **options(how)), classify(**IMAGES)

    def forward(w, phi, x):
        t, part = next((t, i) for t in range(3) for i in (0, 2) if torch.equal(tasks[i][t].double(), x))
        rows = torch.cat([tasks[0][t], tasks[2][t]]).double()
        eye = {"8.weight": torch.eye(45, dtype=torch.float64), "8.bias": torch.zeros(45, dtype=torch.float64)}
        features = families.conv({**w, **eye}, rows)
        return F.linear(features[:8] if part == 0 else features[8:], phi["8.weight"], phi["8.bias"])

    loss, expected, _ = truth(maml, tasks, forward, lambda w, t: {n: w[n] for n in ("8.weight", "8.bias")}, first_order=first_order)
    for steps in (3, 0):
        for call in (lambda k=steps: maml(tasks, inner_steps=k).loss.backward(), lambda k=steps: maml.meta_grad(tasks, inner_steps=k)):
            call()
            found = grads(maml)
            if steps:
                assert families.distance(found, expected) <= BOUND[how[1]]
    with torch.no_grad():
        assert float(maml(tasks).loss) == pytest.approx(float(loss), rel=1e-5)
    assert maml.executor == how[0]
    assert maml.adapt(*tasks[:2])(tasks[2]).shape == (3, 9, 4)


def test_joint_statistics_need_a_body_that_stays() -> None:
    for wrong in (MAML(small_conv(), batchnorm="joint"), methods.BOIL(small_conv(), batchnorm="joint")):
        with pytest.raises(ValueError, match="batchnorm='joint' needs a body that the inner loop does not change"):
            wrong(classify(**IMAGES))
