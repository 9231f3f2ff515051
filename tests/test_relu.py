"""relu_fwd, relu_replay, relu_bwd: slope 0 (ReLU) and leaky. They only select and scale: the bits are torch's."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import SHAPES, TIERS, Case, Operand, exact, normal, out, rows
from torch import Tensor

SLOPE = exact(0.01)
tiers = pytest.mark.parametrize("tier", TIERS)
slopes = pytest.mark.parametrize("slope", [0.0, SLOPE], ids=["relu", "leaky"])


def case(kernel: str, inputs: list, outputs: list, shape: tuple[int, int], slope: float) -> Case:
    return Case(kernel, inputs, outputs, shape[0], [shape[1]], [slope], {"slope": slope} if slope else {})


def with_zeros(n: int, c: int) -> Tensor:
    x = normal(n, c)
    x[torch.rand(n, c, generator=torch.Generator().manual_seed(n + c)) < 0.2] = 0.0
    return x


@tiers
@slopes
@pytest.mark.parametrize("mask", [True, False], ids=["mask", "no_mask"])
def test_fwd(tier: str, slope: float, mask: bool) -> None:
    for n, c in (*SHAPES, (150, 33)):
        x = with_zeros(n, c)
        made = case("relu_fwd", [rows(x)], [out("rows", n, c), out("mask", n, c) if mask else None], (n, c), slope)
        y, m = made.check(tier, elementwise=True)
        expected, where = made.reference(torch.float32)
        assert torch.equal(y, expected) and (m is None or torch.equal(m, where.to(torch.uint8)))
        in_place = case("relu_fwd", [rows(x)], [out("rows", n, c, over=0), None], (n, c), slope)
        assert torch.equal(in_place.run(tier)[0], expected)


@tiers
@slopes
@pytest.mark.parametrize("kernel", ["relu_replay", "relu_bwd"])
def test_masked(tier: str, slope: float, kernel: str) -> None:
    for n, c in (*SHAPES, (150, 33)):
        value, mask = rows(normal(n, c)), Operand("mask", normal(n, c, seed=1) > 0)
        inputs = [value, mask] if kernel == "relu_replay" else [mask, value]
        made = case(kernel, inputs, [out("rows", n, c)], (n, c), slope)
        (y,) = made.check(tier, elementwise=True)
        assert torch.equal(y, made.reference(torch.float32)[0])
        in_place = case(kernel, inputs, [out("rows", n, c, over=inputs.index(value))], (n, c), slope)
        assert torch.equal(in_place.run(tier)[0], y)


@tiers
@slopes
def test_special_values(tier: str, slope: float) -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[0.0, -0.0, inf, -inf, nan, 1e-40, -1e-40]])
    y, mask = case("relu_fwd", [rows(x)], [out("rows", 1, 7), out("mask", 1, 7)], (1, 7), slope).run(tier)
    expected = torch.nn.functional.leaky_relu(x, slope) if slope else torch.relu(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    assert mask.tolist() == [[0, 0, 1, 0, 0, 1, 0]]  # ReLU'(0) = 0
