"""mse_*: the target is the user's array, its rows unpadded."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import SHAPES, TIERS, Case, Operand, Pool, exact, normal, out, rows

tiers = pytest.mark.parametrize("tier", TIERS)
REDUCTIONS = {"mean": (0, "mean"), "sum": (1, "sum"), "divisor": (2, 24.0)}


@tiers
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("near", [False, True], ids=["apart", "near"])
def test_mse(tier: str, reduction: str, near: bool) -> None:
    code, name = REDUCTIONS[reduction]
    with Pool() as pool:
        for n, c in SHAPES:
            z = normal(n, c)
            target = z + normal(n, c, seed=1, scale=1e-3) if near else normal(n, c, seed=1)
            lead, row, one = [rows(z), Operand("plain", target), None], out("rows", n, c), out("scalar")
            zt, step = rows(normal(n, c, seed=2)), Operand("scalar", torch.tensor(exact(0.3)))

            def case(mode: str, more: list, *outputs: Operand | None) -> Case:
                kernel, attrs = f"mse_{mode}", {"reduction": name}
                return Case(kernel, [*lead, *more], outputs, n, [c, code], [0.0, 24.0], attrs, ways=3)  # noqa: B023

            case("fwd", [], one, None).check(tier, pool=pool)
            case("fwd", [], None, out("scalar")).check(tier, pool=pool)
            case("bwd", [step], row).check(tier, elementwise=True)
            case("jvp", [zt], one).check(tier, pool=pool)
            case("bwd_jvp", [zt], row).check(tier, elementwise=True)
            (plain,) = case("bwd", [None], row).check(tier, elementwise=True)
            assert torch.equal(case("bwd", [None], out("rows", n, c, over=0)).run(tier, 4)[0], plain)
