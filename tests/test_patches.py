"""plan/patches.py: statistics from the moments of patches, where that is exact and pays, and the same loss and meta-gradient."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import pytest
import torch
from random_programs import Case, error, gradients, norm, numbers_for, random_case
from torch import Tensor

import fastmaml.plan.patches as patches
import fastmaml.plan.sweep as sweep
from fastmaml.executors.torch import TorchExecutor
from fastmaml.optimizers import SGD, ImplicitGradient
from fastmaml.plan import Arrangement, Rate
from fastmaml.program import Loss, Program, ProgramBuilder

TILES = {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0)}
SIZES = [(5, 3), (3, 4)]
Made = tuple[Program, dict[str, object]]


class Net:
    """conv of the samples, norm, relu, [pool], conv, norm, relu, head; every part may be another."""

    def __init__(self, **options: object) -> None:
        self.o = {"pool": True, "bias": True, "affine": "both", "statistics": "batch", "weight": "leaf", "role": "adapted", "data": "plain", "tied": False, **options}
        self.b = ProgramBuilder((2 * 7 * 6,) if self.o["data"] == "flat" else (2, 7, 6))

    def leaf(self, name: str, *shape: int, role: str = "adapted", home: str = "meta") -> int:
        return self.b.leaf(name, shape, role, home)

    def weight(self) -> int:
        kind, b = self.o["weight"], self.b
        if kind == "leaf":
            return self.leaf("w", 6, 2, 2, 3, role=self.o["role"])
        if kind == "scaled":
            return b.op("mul", self.leaf("w", 6, 2, 2, 3, role="outer"), self.leaf("scale", 6, 1, 1, 1))
        left, right = self.leaf("left", 6, 6), self.leaf("right", 6, 12, role="outer")
        return b.op("reshape", b.op("matmul", left, right), shape=(6, 2, 2, 3))

    def norm(self, v: int, name: str) -> int:
        c = self.b.values[v].shape[0]
        affine = self.o["affine"]
        gamma = self.leaf(f"{name}.gamma", c) if affine in ("both", "gamma") else None
        beta = self.leaf(f"{name}.beta", c, role="outer" if affine == "beta" else "adapted") if affine in ("both", "beta") else None
        return self.b.op("batchnorm", v, gamma, beta, eps=1e-3, statistics=self.o["statistics"])

    def build(self) -> Program:
        b, v = self.b, 0
        if self.o["data"] == "flat":
            v = b.op("reshape", v, shape=(2, 7, 6))
        if self.o["data"] == "padded":
            v = b.op("pad2d", v, padding=(1, 0, 0, 2))
        w = self.weight()
        bias = self.leaf("bias", 6, role="outer" if self.o["bias"] == "outer" else "adapted") if self.o["bias"] else None
        v = z = b.op("conv2d", v, w, bias, stride=(1, 1), padding=(1, 0, 1, 1))
        v = self.norm(v, "n0")
        v = b.op("relu", v)
        if self.o["pool"]:
            v = b.op("maxpool2d", v, **TILES)
        if self.o["tied"]:
            other = b.op("global_avgpool2d", b.op("tanh", b.op("conv2d", 0, w, None, stride=(2, 2), padding=(0, 0, 0, 0))))
        v = b.op("conv2d", v, self.leaf("w1", 4, 6, 2, 2), self.leaf("b1", 4), stride=(1, 1), padding=(0, 0, 0, 0))
        v = b.op("relu", self.norm(v, "n1"))
        v = b.op("reshape", v, shape=(b.values[v].numel,))
        v = b.op("linear", v, self.leaf("head", 3, b.values[v].shape[0]), self.leaf("hb", 3))
        if self.o["tied"]:
            v = b.op("add", v, b.op("linear", other, self.leaf("head2", 3, 6), None))
        return b.build(v)


def case_of(program: Program, sizes=SIZES, rate: float = 0.1, **options: object) -> Case:
    rates = {leaf.name: Rate("lr", learned=True) for leaf in program.leaves if leaf.role == "adapted"}
    a = Arrangement(**{"steps": 2, "rates": rates, **options})
    case = numbers_for(program, a, 1, sizes, rate=rate)
    b = case.batch  # a mean, as images have one
    return dataclasses.replace(case, batch=dataclasses.replace(b, support_x=b.support_x + 1.5, query_x=b.query_x + 1.5))


def ordinary(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sweep, "statistics_from_patches", lambda program, *_: program)


NETS = {
    "plain": {},
    "dense": {"pool": False},
    "no-bias": {"bias": False},
    "outer-bias": {"bias": "outer"},
    "no-affine": {"affine": None},
    "gamma": {"affine": "gamma"},
    "beta": {"affine": "beta", "pool": False},
    "support": {"statistics": "support"},
    "scaled": {"weight": "scaled"},
    "product": {"weight": "product", "pool": False},
    "flat": {"data": "flat"},
    "padded": {"data": "padded", "pool": False},
    "tied": {"tied": True},
}
OPTIONS = {
    "second": {},
    "first": {"first_order": True},
    "fast": {"memory": "fast"},
    "one": {"steps": 1, "support_rows": 5},
    "every": {"query_from": 0},
    "many": {"steps": 9, "support_rows": 5},
    "momentum": {"optimizer": SGD(momentum=0.5, max_norm=0.5)},
}


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it is exact, whether it pays or not."""
    monkeypatch.setattr(patches, "_pays", lambda *_: True)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", NETS)
def test_float64(name: str, option: str, always: None) -> None:
    case = case_of(Net(**NETS[name]).build(), **OPTIONS[option])
    plan = case.plan()
    assert plan.count("patch_stats_fwd") >= 1 and plan.count("patch_stats_bwd") >= 1
    losses, truth = case.truth()
    results = TorchExecutor(plan).forward(case.call())
    if option != "every":
        assert torch.allclose(results.values["loss.query"], losses, rtol=1e-12, atol=1e-12)
    e = error(gradients(results, truth), truth, 1e-9)
    print(e, norm(truth))
    assert e <= 1e-11
