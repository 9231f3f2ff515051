"""gram and factored_linear: whole extents; the Gram matrix in double, and large beside what is left of it."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import TIERS, Case, Operand, normal, out, rows, same_bits, vector
from torch import Tensor

SIZES, SUPPORT = (1, 7, 8, 9, 40, 63, 64, 65, 130), (1, 5, 10, 11, 97)
SHAPES = [(SUPPORT[a % 5], (3, 1, 11)[a % 3], c) for a, c in enumerate(SIZES)] + [(5, 10, c) for c in SIZES]  # + 784s
EXTENTS = {"support": 1, "query": 2, "joint": 3}
tiers = pytest.mark.parametrize("tier", TIERS)
extents = pytest.mark.parametrize("extent", EXTENTS)


def rows_of(extent: str, support: int, query: int) -> int:
    return {"support": support, "query": query, "joint": support + query}[extent]


def check(made: Case, tier: str) -> list[Tensor | None]:
    whole = made.check(tier, ())
    for parts in (7, 16):
        assert same_bits(made.run(tier, None, parts), whole), f"{parts} parts change bits"
    return whole


@tiers
@extents
def test_gram_fwd(tier: str, extent: str) -> None:
    """To double's precision, padded or not."""
    for support, query, c in [*SHAPES, (11, 3, 784)]:
        n = rows_of(extent, support, query)
        x, xs, results = normal(n, c, shift=3.0), normal(support, c, seed=1, shift=3.0), []
        for kinds in (("rows", "rows"), ("plain", "plain"), ("rows", "plain"), ("plain", "rows")):
            inputs, sizes = [Operand(k, v) for k, v in zip(kinds, (x, xs), strict=True)], [c, EXTENTS[extent]]
            made = Case("gram_fwd", inputs, [out("double", n, support)], support + query, sizes, support=support)
            results += check(made, tier)
            assert torch.equal(results[-1], results[0]), "unpadded rows change bits"
        error = results[0] - x.double() @ xs.double().T
        assert torch.all(error.abs() <= c * 2.0**-52 * (x.abs().double() @ xs.abs().double().T))  # of any two orders


@tiers
@extents
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_factored_linear_fwd(tier: str, extent: str, bias: bool) -> None:
    for support, query, c in SHAPES:
        n = rows_of(extent, support, query)
        d = normal(support, c, seed=1)
        gram = normal(n, support, seed=2).double() / 3 + 1e4  # of images with a common mean, which D cancels
        inputs = [rows(normal(n, c)), Operand("double", gram), rows(d - d.mean(0)), vector(normal(c)) if bias else None]
        sizes = [c, EXTENTS[extent]]
        check(Case("factored_linear_fwd", inputs, [out("rows", n, c)], support + query, sizes, support=support), tier)


@tiers
@extents
def test_factored_linear_bwd(tier: str, extent: str) -> None:
    for support, query, c in SHAPES:
        n = rows_of(extent, support, query)
        dy = normal(n, c, seed=1)
        gram = normal(n, support, seed=2).double() / 3 + 1e4
        inputs, sizes = [Operand("double", gram), rows(dy - dy.mean(0))], [c, EXTENTS[extent]]
        outputs = [out("rows", support, c)]
        check(Case("factored_linear_bwd", inputs, outputs, support + query, sizes, support=support), tier)


@tiers
@pytest.mark.parametrize("direction", [True, False], ids=["direction", "no_direction"])
def test_factored_linear_jvp(tier: str, direction: bool) -> None:
    """Row by row: blocks and teams change no bit."""
    for n, _, c in SHAPES:
        inputs = [rows(normal(n, c)) if direction else None, vector(normal(c, seed=1))]
        made = Case("factored_linear_jvp", inputs, [out("rows", n, c)], n, [c, 1], support=n)
        whole = made.check(tier, (3, 50), elementwise=True)
        if direction:
            made.outputs = [out("rows", n, c, over=0)]
            assert same_bits(made.run(tier, 3), whole)
