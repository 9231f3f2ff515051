"""Several parameterisations at once: against plain torch, by verify, in checkpoints; what is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from families import distance, small_conv, truth
from helpers_families import IMAGES, OPTIONS, encoder
from plain_loop import classify, mlp, one_thread  # noqa: F401

from fastmaml import MAML
from fastmaml.parameterisation import Context, Head, LowRank, Mixture, Modulation, ScaleShift, TNet

BODY = ["0.weight", "2.weight"]
LISTS = {
    "scales, zero head": lambda: [ScaleShift("scale_shift", layers=BODY), Head("zero")],
    "T-net, zero head": lambda: [TNet(layers=BODY), Head("zero")],
    "MT-net, zero head": lambda: [TNet("unit", layers=BODY), Head("zero")],
    "low rank, prototypes": lambda: [LowRank(2, layers=BODY), Head("prototypes")],
    "modulation, zero head": lambda: [Modulation(encoder()), Head("zero")],
    "low rank, ANIL": lambda: [LowRank(2, layers=BODY), "anil"],
    "FiLM context, prototypes": lambda: [Context(5, ["0.weight", "4.weight"]), Head("prototypes", body="outer")],
}


def made(name: str, dtype: torch.dtype = torch.float32) -> tuple[MAML, tuple]:
    conv = "FiLM" in name
    tasks = classify(**IMAGES) if conv else classify(tasks=4)
    maml = MAML(small_conv() if conv else mlp(), parameterisation=LISTS[name](), **OPTIONS).to(dtype)
    return maml, tuple(v.to(dtype) if v.is_floating_point() else v for v in tasks)


@pytest.mark.parametrize("name", LISTS)
def test_verify(name: str) -> None:
    maml, tasks = made(name)
    result = maml.verify(tasks, repeats=1)
    assert result.ok and result.plan_error < 1e-10


def test_t_net_under_a_zero_head() -> None:
    """Straight from the equations: h = tanh(T (W x + b)) twice, then a head from zero; W, b and the head adapted."""
    maml, tasks = made("T-net, zero head", torch.float64)

    def forward(w: dict, phi: dict, x: torch.Tensor) -> torch.Tensor:
        for layer in ("0", "2"):
            x = (F.linear(x, phi[f"{layer}.weight"], phi[f"{layer}.bias"]) @ w[f"t_net.T.{layer}.weight"].T).tanh()
        return F.linear(x, phi["head"], phi["bias"])

    def start(w: dict, t: int) -> dict:
        head = {"head": torch.zeros(4, 8, dtype=torch.float64), "bias": torch.zeros(4, dtype=torch.float64)}
        return {name: w[name] for name in ("0.weight", "0.bias", "2.weight", "2.bias")} | head

    loss, expected, _ = truth(maml, tasks, forward, start, lr=OPTIONS["inner_lr"], steps=OPTIONS["inner_steps"])
    out = maml(tasks)
    out.loss.backward()
    assert torch.allclose(out.loss.detach(), loss)
    assert distance({n: p.grad for n, p in maml.named_parameters()}, expected) < 1e-11


@pytest.mark.parametrize("name", LISTS)
def test_state_and_copies(name: str) -> None:
    maml, tasks = made(name)
    seeds = {"task_seeds": list(range(len(tasks[0])))}
    optimizer = torch.optim.SGD(maml.parameter_groups(), lr=0.1)
    maml(tasks, **seeds).loss.backward()
    optimizer.step()
    loss = maml(tasks, **seeds).loss
    other = made(name)[0]
    other.load_state_dict(pickle.loads(pickle.dumps(maml.state_dict())))
    for same in (other, copy.deepcopy(maml), pickle.loads(pickle.dumps(maml))):
        assert torch.equal(same(tasks, **seeds).loss, loss)
    with pytest.raises(RuntimeError, match=r"saved with parameterisation .* \+ .*, this object has full"):
        MAML(copy.deepcopy(maml.model)).load_state_dict(maml.state_dict())
    wrapped, again = torch.nn.ModuleDict({"maml": maml}), torch.nn.ModuleDict({"maml": made(name)[0]})
    again.load_state_dict(wrapped.state_dict())
    assert torch.equal(again["maml"](tasks, **seeds).loss, loss)
    assert " + " in maml.explain(tasks).splitlines()[0]


@pytest.mark.parametrize("name", LISTS)
def test_module_of_a_task(name: str) -> None:
    maml, (support_x, support_y, query_x, _) = made(name)
    adapted = maml.adapt(support_x, support_y)
    assert torch.allclose(adapted.module(1)(query_x[1]), adapted(query_x)[1], atol=1e-4)


def test_groups() -> None:
    names = {g["name"] for g in made("low rank, ANIL")[0].parameter_groups({"low_rank": 1e-4})}
    assert names == {"model", "low_rank"}


WRONG = {
    "two on one layer": (lambda: MAML(mlp(), parameterisation=[LowRank(2), TNet()])(classify()), "'0.weight' is rewritten by both low_rank and t_net"),
    "two for each task": (lambda: MAML(mlp(), parameterisation=[Modulation(encoder()), Head()]), "mmaml and proto_head both make something for each task"),
    "twice the same": (lambda: MAML(mlp(), parameterisation=[LowRank(2), LowRank(3)]), "there are 2 of 'low_rank'"),
    "a mixture": (lambda: MAML(mlp(), parameterisation=[Mixture(2), Head("zero")]), "'mixture' is no part of a list"),
    "one": (lambda: MAML(mlp(), parameterisation=[LowRank(2)]), "a list needs at least two"),
    "an unknown one": (lambda: MAML(mlp(), parameterisation=["anil", "annul"]), "parameterisation='annul': choose one of"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name: str) -> None:
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_parts_belong_to_one_object() -> None:
    parts = [TNet(layers=BODY), Head("zero")]
    maml = MAML(mlp(), parameterisation=parts)
    with pytest.raises(ValueError, match="already belongs to a MAML object"):
        MAML(mlp(), parameterisation=parts)
    assert maml(classify()).loss.isfinite()
