"""groupnorm_*: the kernels of layernorm, with gamma and beta per channel; every mode and combination of absent operands."""

from __future__ import annotations

import pytest
from kernel_cases import IMAGES, SHAPES, TIERS
from test_layernorm import (
    AFFINES,
    BWD_INPUT_JVP,
    BWD_WEIGHT_JVP,
    JVP,
    Given,
    Sample,
    check_elementwise,
    check_sums,
    named,
    sets,
)

tiers = pytest.mark.parametrize("tier", TIERS)


def samples() -> list[Sample]:
    made = []
    for shape in [*SHAPES[2:], *IMAGES, (2, 32, 4, 5), (3, 70, 3, 2)]:
        groups = [g for g in (1, 2, 3, 7, 16, shape[1]) if shape[1] % g == 0]
        made += [Sample("groupnorm", shape, shape[1:2], {"groups": g}) for g in dict.fromkeys(groups)]
    # sets of one element have no derivatives; those of two are all rounding
    return [s for s in made if s.x.width // s.attrs["groups"] > 2]


@tiers
@pytest.mark.parametrize("given", AFFINES, ids=named)
def test_fwd(tier: str, given: Given) -> None:
    check_elementwise(tier, samples(), "fwd", given, "gamma", "beta")


@tiers
@pytest.mark.parametrize("given", JVP, ids=named)
def test_jvp(tier: str, given: Given) -> None:
    check_elementwise(tier, samples(), "jvp", given, "gamma", "xt", "gamma_t", "beta_t")


@tiers
@pytest.mark.parametrize("given", sets("gamma"), ids=named)
def test_bwd_input(tier: str, given: Given) -> None:
    check_elementwise(tier, samples(), "bwd_input", given | {"dy"}, "gamma", "dy")


@tiers
@pytest.mark.parametrize("given", BWD_INPUT_JVP, ids=named)
def test_bwd_input_jvp(tier: str, given: Given) -> None:
    check_elementwise(tier, samples(), "bwd_input_jvp", given, "gamma", "dy", "xt", "gamma_t", "dyt")


@tiers
def test_bwd_weight(tier: str) -> None:
    check_sums(tier, samples(), "bwd_weight", frozenset({"dy"}), "dy")


@tiers
@pytest.mark.parametrize("given", BWD_WEIGHT_JVP, ids=named)
def test_bwd_weight_jvp(tier: str, given: Given) -> None:
    check_sums(tier, samples(), "bwd_weight_jvp", given, "dy", "xt", "dyt")


@tiers
def test_sets_of_one_element(tier: str) -> None:
    """xhat is zero, and so are its derivatives."""
    sample = Sample("groupnorm", (5, 7), (7,), {"groups": 7})
    sample.case("fwd", frozenset({"gamma", "beta"}), "gamma", "beta").check(tier, elementwise=True)
    (dx,) = sample.case("bwd_input", frozenset({"dy"}), "gamma", "dy").run(tier)
    assert not dx.any()
