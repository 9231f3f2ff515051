"""mse_*: the target is the user's array, its rows unpadded."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import SHAPES, TIERS, Case, Operand, exact, normal, out, rows

tiers = pytest.mark.parametrize("tier", TIERS)
REDUCTIONS = {"mean": (0, "mean"), "sum": (1, "sum"), "divisor": (2, 24.0)}


@tiers
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("near", [False, True], ids=["apart", "near"])
def test_mse(tier: str, reduction: str, near: bool) -> None:
    code, name = REDUCTIONS[reduction]
    for n, c in SHAPES:
        z = normal(n, c)
        target = z + normal(n, c, seed=1, scale=1e-3) if near else normal(n, c, seed=1)
        lead, row, one = [rows(z), Operand("plain", target), None], out("rows", n, c), out("scalar")
        zt, step = rows(normal(n, c, seed=2)), Operand("scalar", torch.tensor(exact(0.3)))
        for mode, more, outputs in (
            ("fwd", [], [one, None]),
            ("fwd", [], [None, out("scalar")]),
            ("bwd", [None], [row]),
            ("bwd", [step], [row]),
            ("jvp", [zt], [one]),
            ("bwd_jvp", [zt], [row]),
        ):
            attrs, numbers = {"reduction": name}, [0.0, 24.0]
            Case(f"mse_{mode}", [*lead, *more], outputs, n, [c, code], numbers, attrs, ways=3).check(tier)
        in_place = Case("mse_bwd", [*lead, None], [out("rows", n, c, over=0)], n, [c, code], [0.0, 24.0])
        plain = Case("mse_bwd", [*lead, None], [row], n, [c, code], [0.0, 24.0])
        assert torch.equal(in_place.run(tier, 4)[0], plain.run(tier)[0])
