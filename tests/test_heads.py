"""Zero head and ProtoMAML, against their equations."""

from __future__ import annotations

import families
import pytest
import torch
import torch.nn.functional as F
from families import small_conv
from helpers_families import IMAGES, NAMES, agrees, backends, options
from plain_loop import classify, mlp, one_thread, ragged  # noqa: F401

import fastmaml
from fastmaml import methods

BODIES = {"adapted": NAMES[:4], "outer": [], "frozen": []}


def head_started(w, name: str, weight, bias, body: str):
    return {**{n: w[n] for n in BODIES[body]}, f"{name}.4.weight": weight, f"{name}.4.bias": bias}


def with_head(name: str):
    return lambda w, phi, x: families.mlp({**w, **phi, "4.weight": phi[f"{name}.4.weight"], "4.bias": phi[f"{name}.4.bias"]}, x)


@backends
@pytest.mark.parametrize("body", BODIES)
def test_zero_head(how, body: str) -> None:
    if body == "frozen":  # then nothing is outer-learned
        return
    maml = methods.ZeroHead(mlp().to(how[1]), body=body, **options(how))
    assert sorted(dict(maml.named_parameters())) == sorted(NAMES[:4])
    zeros = torch.zeros(4, 8, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    agrees(maml, classify(), with_head("zero_head"), lambda w, t: head_started(w, "zero_head", *(z.clone() for z in zeros), body))


@backends
@pytest.mark.parametrize("body", ["adapted", "outer"])
@pytest.mark.parametrize("even", [True, False])
def test_proto_maml(how, body: str, even: bool) -> None:
    """Triantafillou et al. 2020, eq. 4: W_n = 2 c_n, b_n = -|c_n|^2; tasks may have ways of their own."""
    maml, tasks = methods.ProtoMAML(mlp().to(how[1]), body=body, **options(how, inner_lr=0.1)), classify() if even else ragged()
    batch = fastmaml.TaskBatch.of(tasks)

    def start(w, t):
        x, y = batch.task(t)[0].double(), batch.task(t)[1]
        f = torch.tanh(F.linear(torch.tanh(F.linear(x, w["0.weight"], w["0.bias"])), w["2.weight"], w["2.bias"]))
        c = torch.stack([f[y == n].mean(0) if (y == n).any() else torch.zeros(8, dtype=torch.float64) for n in range(4)])
        return head_started(w, "proto_head", 2 * c, -(c**2).sum(1), body)

    agrees(maml, tasks, with_head("proto_head"), start, lr=0.1)


@backends
@pytest.mark.parametrize("even", [True, False])
def test_prototypes_through_batch_norm_and_pooling(how, even: bool) -> None:
    """The body's features at theta_0 of all tasks at once, with the statistics of the support rows of each. (Small steps: at 0.05 rounding grows to 1e-5 here.)"""
    maml, tasks = methods.ProtoMAML(small_conv().to(how[1]), **options(how, inner_lr=0.01)), classify(**IMAGES) if even else ragged(shape=(2, 6, 6))
    body, batch = [n for n, _ in maml.named_parameters()], fastmaml.TaskBatch.of(tasks)

    def start(w, t):
        eye = {"8.weight": torch.eye(45, dtype=torch.float64), "8.bias": torch.zeros(45, dtype=torch.float64)}
        f, y = families.conv({**w, **eye}, batch.task(t)[0].double()), batch.task(t)[1]
        c = torch.stack([f[y == n].mean(0) if (y == n).any() else torch.zeros(45, dtype=torch.float64) for n in range(4)])
        return {**{n: w[n] for n in body}, "proto_head.8.weight": 2 * c, "proto_head.8.bias": -(c**2).sum(1)}

    def forward(w, phi, x):
        return families.conv({**w, **phi, "8.weight": phi["proto_head.8.weight"], "8.bias": phi["proto_head.8.bias"]}, x)

    agrees(maml, tasks, forward, start, lr=0.01)
