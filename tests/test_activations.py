"""The smooth activations: f, f' and f'' on inputs of normal size, tiny and large, each judged on its own."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernel_cases import SHAPES, TIERS, Case, normal, out, rows
from torch import Tensor

# name -> kernel, numbers, second size, attributes of the reference
ACTIVATIONS = {
    "tanh": ("tanh", [], 0, {}),
    "sigmoid": ("sigmoid", [], 0, {}),
    "exp": ("exp", [], 0, {}),
    "elu": ("elu", [1.0], 0, {"alpha": 1.0}),
    "elu_alpha": ("elu", [0.75], 0, {"alpha": 0.75}),
    "gelu": ("gelu", [], 0, {"approximate": "none"}),
    "gelu_tanh": ("gelu", [], 1, {"approximate": "tanh"}),
    "silu": ("silu", [], 0, {}),
    "softplus": ("softplus", [1.0, 20.0], 0, {"beta": 1.0, "threshold": 20.0}),
    "softplus_beta": ("softplus", [2.5, 5.0], 0, {"beta": 2.5, "threshold": 5.0}),
}
tiers = pytest.mark.parametrize("tier", TIERS)
activations = pytest.mark.parametrize("name", ACTIVATIONS)
SECOND = [(0, 0, 1), (1, 1, 0), (1, 1, 1), (1, 0, 1), (0, 1, 1)]  # which of xt, dy, dyt bwd_jvp is given
INPUTS = {
    "normal": lambda n, c: normal(n, c),
    "tiny": lambda n, c: normal(n, c, scale=1e-3),
    "large": lambda n, c: (torch.rand(n, c, generator=torch.Generator().manual_seed(n + c)) - 0.5) * 60,
}


def case(name: str, mode: str, inputs: list, n: int, c: int, over: int | None = None) -> Case:
    kernel, numbers, form, attrs = ACTIVATIONS[name]
    return Case(f"{kernel}_{mode}", inputs, [out("rows", n, c, over=over)], n, [c, form], numbers, attrs)


def every_mode(name: str, x: Tensor) -> list[Case]:
    n, c = x.shape
    xt, dy, dyt = (rows(normal(n, c, seed=seed)) for seed in (1, 2, 3))
    modes = [("fwd", []), ("jvp", [xt]), ("bwd", [dy])]
    modes += [("bwd_jvp", [xt if a else None, dy if b else None, dyt if c else None]) for a, b, c in SECOND]
    return [case(name, mode, [rows(x), *more], n, c) for mode, more in modes]


@tiers
@activations
@pytest.mark.parametrize("size", INPUTS)
def test_shapes(tier: str, name: str, size: str) -> None:
    for n, c in (*SHAPES, (150, 33)):
        for made in every_mode(name, INPUTS[size](n, c)):
            whole = made.check(tier, elementwise=True)
            for i, given in enumerate(made.inputs):
                if given is not None:
                    made.outputs[0].over = i
                    assert torch.equal(made.run(tier, 4)[0], whole[0]), f"{made.kernel} in place of operand {i}"


@tiers
@activations
def test_everywhere(tier: str, name: str) -> None:
    """One interval after another, so that a bad stretch cannot hide behind larger values."""
    for low, high in itertools.pairwise([-30, -8, -2, -0.5, -1e-2, 1e-2, 0.5, 2, 8, 30]):
        x = torch.linspace(low, high, 16 * 65).view(16, 65)
        slack = 2.0**-50 * float(x.norm()) if name.startswith("gelu") else 0.0  # the reference's 1 + erf, 1 + tanh
        for made in every_mode(name, x):
            made.judge(made.run(tier), f"{tier} on [{low}, {high}]", slack=slack)


LIMITS = {  # at -inf (where finite), -1e4, 1e4
    "tanh": (-1, -1, 1),
    "sigmoid": (0, 0, 1),
    "exp": (0, 0, float("inf")),
    "elu": (-1, -1, 1e4),
    "elu_alpha": (-0.75, -0.75, 1e4),
    "gelu": (None, 0, 1e4),
    "gelu_tanh": (None, 0, 1e4),
    "silu": (None, 0, 1e4),
    "softplus": (0, 0, 1e4),
    "softplus_beta": (0, 0, 1e4),
}


@tiers
@activations
def test_far_out(tier: str, name: str) -> None:
    x = torch.tensor([[-float("inf"), -1e4, 1e4, float("nan"), 0.0]])
    first, *rest, nan, _ = case(name, "fwd", [rows(x)], 1, 5).run(tier)[0][0].tolist()
    limit, *others = LIMITS[name]
    assert rest == others and nan != nan and (limit is None or first == limit)
    one = torch.ones(1, 5)
    for given in ([rows(one), None, None], [None, None, rows(one)], [rows(one), rows(one), rows(one)]):
        if name != "exp" and (given[1] is not None or given[2] is not None):
            y = case(name, "bwd_jvp", [rows(x), *given], 1, 5).run(tier)[0][0]
            assert torch.isfinite(y[[1, 2, 4]]).all() and torch.isnan(y[3])
