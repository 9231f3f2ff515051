"""Methods together: Meta-SGD's and MAML++'s rates over what other parameterisations adapt, against the equations."""

from __future__ import annotations

import families
import pytest
import torch
from families import small_conv, truth
from helpers_families import IMAGES, NAMES, backends, grads, moved
from maml_cases import BOUND
from plain_loop import classify, mlp, one_thread  # noqa: F401

import fastmaml
from fastmaml import methods
from fastmaml.parameterisation import Context, LowRank, TNet


def low_rank(w, phi, x):
    w = {**w, **phi}
    return families.mlp({**w, **{f"{n}.weight": w[f"{n}.weight"] + w[f"low_rank.B.{n}.weight"] @ w[f"low_rank.A.{n}.weight"] for n in "024"}}, x)


def t_net(w, phi, x):
    w = {**w, **phi}
    return families.mlp({**w, **{f"{n}.{k}": w[f"t_net.T.{n}.weight"] @ w[f"{n}.{k}"] for n in "024" for k in ("weight", "bias")}}, x)


def cavia(w, phi, x):
    joined = torch.cat([x, phi["cavia.context"].T.expand(len(x), -1)], 1)
    return families.mlp({**w, "0.weight": torch.cat([w["0.weight"], w["cavia.weight.0.weight"]], 1)}, joined)


OVER = {
    "anil": ("anil", NAMES[4:], lambda w, phi, x: families.mlp({**w, **phi}, x)),
    "low rank": (LowRank(2), [f"low_rank.{f}.{n}.weight" for n in "024" for f in "AB"], low_rank),
    "t_net": (TNet(), NAMES, t_net),
    "cavia": (Context(3), ["cavia.context"], cavia),
}


@backends
@pytest.mark.parametrize("name", OVER)
def test_meta_sgd_over(how, name: str) -> None:
    """A learned rate for each element of what is adapted, whatever it is."""
    parameterisation, adapted, forward = OVER[name]
    made = parameterisation if isinstance(parameterisation, str) else type(parameterisation)(**parameterisation.settings())
    maml, tasks = methods.MetaSGD(mlp().to(how[1]), parameterisation=made, inner_lr=0.3, inner_steps=2, backend=how[0]), classify()
    moved(maml)
    rates = dict(maml.rates.learned())
    assert {n: r.shape for n, r in rates.items()} == {f"inner_lr.{n}": maml.adapt(*tasks[:2]).weights[n].shape[1:] for n in adapted}

    def start(w, t):
        return {n: torch.zeros(3, 1).double() if name == "cavia" else w[n] for n in adapted}

    _, expected, _ = truth(maml, tasks, forward, start, lr=lambda w, t, n: w[f"inner_lr.{n}"], steps=2)
    maml.meta_grad(tasks)
    assert families.distance(grads(maml), expected) <= BOUND[how[1]]


def test_maml_plus_plus_adapts_the_head_alone() -> None:
    """ANIL with a rate for each step and norms of the body for each step: the body reads the first row, as no step changes it."""
    maml, tasks = methods.MAMLPlusPlus(small_conv(), parameterisation="anil", inner_steps=3), classify(**IMAGES)
    assert sorted(maml.adapt(*tasks[:2]).weights) == ["8.bias", "8.weight"]
    assert [tuple(r.shape) for r in maml.rates.values.values()] == [(3,), (3,)]
    assert maml.verify(classify(**IMAGES), repeats=1).ok


@pytest.mark.parametrize("parameterisation", ["t_net", "proto_head", "zero_head"])
def test_maml_plus_plus_over(parameterisation: str) -> None:
    made = {"t_net": TNet, "proto_head": fastmaml.parameterisation.Head, "zero_head": lambda: fastmaml.parameterisation.Head("zero")}[parameterisation]()
    maml = methods.MAMLPlusPlus(small_conv(), parameterisation=made, inner_lr=0.02, inner_steps=3)
    result = maml.verify(classify(**IMAGES), repeats=1)
    assert result.ok and result.plan_error < 1e-10


@backends
def test_prototypes_under_norms_for_each_step(how) -> None:
    """theta_0 is what the first step reads: row 0."""
    net = small_conv()
    maml, tasks = methods.MAMLPlusPlus(net, parameterisation=fastmaml.parameterisation.Head(), inner_lr=0.01, inner_steps=2, backend=how[0]), classify(**IMAGES)
    maml.to(how[1])
    with torch.no_grad():
        net[1].weight[1:] += 1.0
    weights = {n: v.detach().double()[0] if n.startswith(("1.", "5.")) else v.detach().double() for n, v in net.named_parameters()}
    weights |= {"8.weight": torch.eye(45).double(), "8.bias": torch.zeros(45).double()}
    f, y = families.conv(weights, tasks[0][1].double()), tasks[1][1]
    c = torch.stack([f[y == n].mean(0) if (y == n).any() else torch.zeros(45).double() for n in range(4)])
    head = maml.adapt(*tasks[:2], inner_steps=0).weights
    torch.testing.assert_close(head["proto_head.8.weight"][1].double(), 2 * c, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(head["proto_head.8.bias"][1].double(), -(c**2).sum(1), rtol=1e-5, atol=1e-6)
