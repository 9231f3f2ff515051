"""layernorm_*: every mode and combination of absent operands, over vectors and over the last axes of images."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from kernel_cases import IMAGES, SHAPES, TIERS, Case, Operand, Pool, exact, image, lowered, normal, out, rows, vector

EPS = exact(1e-5)
tiers = pytest.mark.parametrize("tier", TIERS)
Given = frozenset[str]


def sets(*names: str) -> list[Given]:
    return [frozenset(s) for k in range(len(names) + 1) for s in itertools.combinations(names, k)]


def named(given: Given) -> str:
    return "+".join(sorted(given)) or "none"


# What may be there beside x: as differentiate.py emits it.
AFFINES = sets("gamma", "beta")
JVP = [g for g in sets("gamma", "xt", "gamma_t", "beta_t") if g - {"gamma"} and ("gamma" in g or "gamma_t" not in g)]
BWD_INPUT_JVP = [
    g
    for g in sets("gamma", "dy", "xt", "gamma_t", "dyt")
    if ("dyt" in g or ("dy" in g and g & {"xt", "gamma_t"})) and ("gamma" in g or "gamma_t" not in g)
]
BWD_WEIGHT_JVP = [g for g in sets("dy", "xt", "dyt") if {"dy", "xt"} <= g or ("dyt" in g and "xt" not in g)]


class Sample:
    """One norm over rows of one shape: makes the operands that are there, and the calls."""

    def __init__(self, op: str, shape: Sequence[int], affine: Sequence[int], attrs: dict) -> None:
        self.op, self.shape, self.affine, self.attrs = op, tuple(shape), tuple(affine), attrs | {"eps": EPS}
        self.kind = "image" if len(shape) == 4 else "rows"
        self.x = self.sample(normal(*shape, seed=1, shift=0.5))

    def sample(self, value: torch.Tensor) -> Operand:
        return image(value) if self.kind == "image" else rows(value)

    def operands(self, given: Given, *names: str) -> list[Operand | None]:
        """x's like, but gamma and beta and their tangents, which have the affine's shape."""
        made: list[Operand | None] = []
        for seed, name in enumerate(names, 2):
            if name not in given:
                made.append(None)
            elif name.startswith(("gamma", "beta")):
                made.append(vector(normal(*self.affine, seed=seed, shift=0.5)))
            else:
                made.append(self.sample(normal(*self.shape, seed=seed)))
        return made

    def case(self, mode: str, given: Given, *names: str, over: str | None = None) -> Case:
        inputs = [self.x, *self.operands(given, *names)]
        at = None if over is None else ("x", *names).index(over)
        return lowered(f"{self.op}_{mode}", inputs, [out(self.kind, *self.shape, over=at)], self.shape[0], self.attrs)

    def sums(self, mode: str, given: Given, *names: str, wanted: str = "both") -> Case:
        inputs = [self.x, *self.operands(given, *names)]
        outputs = [out("vector", *self.affine) if wanted in ("both", name) else None for name in ("dgamma", "dbeta")]
        return lowered(f"{self.op}_{mode}", inputs, outputs, self.shape[0], self.attrs)


def vectors() -> list[Sample]:
    return [Sample("layernorm", shape, shape[1:], {"dims": 1}) for shape in [*SHAPES, (2, 300)]]


def images() -> list[Sample]:
    shapes = [*IMAGES, (2, 16, 5, 3)]
    return [Sample("layernorm", s, s[-dims:], {"dims": dims}) for s in shapes for dims in (1, 2, 3)]


def check_elementwise(tier: str, samples: list[Sample], mode: str, given: Given, *names: str) -> None:
    """Also in place of any operand that has x's shape."""
    with Pool() as pool:
        for sample in samples:
            whole = sample.case(mode, given, *names).check(tier, elementwise=True, pool=pool)
            for over in {"x", "dy", "xt", "dyt"} & {"x", *(given & set(names))}:
                assert torch.equal(whole[0], sample.case(mode, given, *names, over=over).run(tier, 4)[0])


def check_sums(tier: str, samples: list[Sample], mode: str, given: Given, *names: str) -> None:
    wanted = (
        ["both", "dgamma", "dbeta"]
        if {"dy", "dyt"} & given and ("dyt" in given or mode == "bwd_weight")
        else ["dgamma"]
    )
    with Pool() as pool:
        for sample in samples:
            for name in wanted:
                sample.sums(mode, given, *names, wanted=name).check(tier, pool=pool)


KINDS = {"vectors": vectors, "images": images}
kinds = pytest.mark.parametrize("kind", KINDS)


@tiers
@kinds
@pytest.mark.parametrize("given", AFFINES, ids=named)
def test_fwd(tier: str, kind: str, given: Given) -> None:
    check_elementwise(tier, KINDS[kind](), "fwd", given, "gamma", "beta")


@tiers
@kinds
@pytest.mark.parametrize("given", JVP, ids=named)
def test_jvp(tier: str, kind: str, given: Given) -> None:
    check_elementwise(tier, KINDS[kind](), "jvp", given, "gamma", "xt", "gamma_t", "beta_t")


@tiers
@kinds
@pytest.mark.parametrize("given", sets("gamma"), ids=named)
def test_bwd_input(tier: str, kind: str, given: Given) -> None:
    check_elementwise(tier, KINDS[kind](), "bwd_input", given | {"dy"}, "gamma", "dy")


@tiers
@kinds
@pytest.mark.parametrize("given", BWD_INPUT_JVP, ids=named)
def test_bwd_input_jvp(tier: str, kind: str, given: Given) -> None:
    check_elementwise(tier, KINDS[kind](), "bwd_input_jvp", given, "gamma", "dy", "xt", "gamma_t", "dyt")


@tiers
@kinds
def test_bwd_weight(tier: str, kind: str) -> None:
    check_sums(tier, KINDS[kind](), "bwd_weight", frozenset({"dy"}), "dy")


@tiers
@kinds
@pytest.mark.parametrize("given", BWD_WEIGHT_JVP, ids=named)
def test_bwd_weight_jvp(tier: str, kind: str, given: Given) -> None:
    check_sums(tier, KINDS[kind](), "bwd_weight_jvp", given, "dy", "xt", "dyt")


@tiers
def test_many_rows_far_from_zero(tier: str) -> None:
    sample = Sample("layernorm", (1000, 24), (24,), {"dims": 1})
    sample.sums("bwd_weight", frozenset({"dy"}), "dy").check(tier, (64, 300))
    sample = Sample("layernorm", (9, 1000), (1000,), {"dims": 1})
    sample.x = rows(normal(9, 1000, shift=100.0))
    sample.case("fwd", frozenset({"gamma"}), "gamma", "beta").check(tier)


@tiers
def test_constant_rows_and_no_eps(tier: str) -> None:
    """The padding stays zero where 1 / sqrt(0) would be infinite."""
    sample = Sample("layernorm", (3, 7), (7,), {"dims": 1})
    sample.x = rows(torch.full((3, 7), exact(0.1)))
    (y,) = sample.case("fwd", frozenset(), "gamma", "beta").run(tier)
    assert y.abs().max() < 1e-4
    sample = Sample("layernorm", (3, 7), (7,), {"dims": 1})
    sample.attrs["eps"] = 0.0
    sample.case("fwd", frozenset(), "gamma", "beta").check(tier)


@tiers
def test_a_row_of_no_numbers_stays_alone(tier: str) -> None:
    sample = Sample("layernorm", (3, 7), (7,), {"dims": 1})
    sample.x.value[1, 2] = float("nan")
    (y,) = sample.case("fwd", frozenset(), "gamma", "beta").run(tier)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


def test_what_no_kernel_runs() -> None:
    for shape in ((2, 3, 4), (2, 8193)):
        with pytest.raises(NotImplementedError, match="no native kernel"):
            Sample("layernorm", shape, shape[1:], {"dims": 1}).case("fwd", frozenset(), "gamma", "beta")
