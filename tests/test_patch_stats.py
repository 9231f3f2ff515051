"""patch_moments and patch_stats: every kernel over odd shapes, strides, paddings and kernels; images as the caller has them; teams; absent operands."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernel_cases import TIERS, Case, Operand, Pool, exact, normal, out, same_bits, vector
from test_conv2d import SHAPES as LAYERS
from test_conv2d import extents
from torch import Tensor

from fastmaml.executors.torch.kernels import KERNELS

EPS = exact(1e-5)
SHAPES = [shape for shape in LAYERS if shape[1] * shape[5][0] * shape[5][1] <= 160]
SHAPES += [(3, 17, 4, 5, 6, (3, 3), (1, 1), (1, 1, 1, 1)), (1, 32, 7, 2500, 3, (1, 5), (1, 1), (0, 0, 2, 2))]  # as large as they may be; several strips
tiers = pytest.mark.parametrize("tier", TIERS)


def moments_case(shape, x: Tensor, planes: bool) -> Case:
    n, c, h, w, _, kernel, stride, padding = shape
    pixels, size = extents(shape)["y"][2:], c * kernel[0] * kernel[1]
    sizes = [c, h, w, 0, *kernel, *stride, padding[0], padding[2], *pixels, int(planes)]
    attrs = {"stride": stride, "padding": padding, "patch": (c, *kernel), "pixels": pixels}
    x = Operand("plain" if planes else "image", x)
    return Case("patch_moments_fwd", [x], [out("vector", 2, size + 1, size)], n, sizes, attrs=attrs, support=n)


def truth_of(shape, x: Tensor) -> Tensor:
    """[1 + size, size] in double"""
    attrs = {"stride": shape[6], "padding": shape[7], "patch": (shape[1], *shape[5])}
    return KERNELS["patch_moments_fwd"](None, attrs, x.double())[0]


@tiers
@pytest.mark.parametrize("shift", [0.0, 3.0, 1000.0])
def test_moments(tier: str, shift: float) -> None:
    """To nearly double's precision, however far the mean; no bit depends on the layout or the team."""
    for shape in SHAPES:
        x = normal(*shape[:4], shift=shift)
        whole = moments_case(shape, x, False).run(tier)
        got, truth = whole[0].double().sum(0), truth_of(shape, x)
        assert (got - truth).norm() <= 2.0**-44 * (1 + shift) * truth.norm() + 1e-11 * shift**2, shape
        assert torch.equal(got[1:], got[1:].T)
        assert (whole[0][1].abs() <= 2.0**-23 * whole[0][0].abs()).all()
        for planes, parts in ((True, 1), (False, 2), (True, 3), (False, 64)):
            assert same_bits(moments_case(shape, x, planes).run(tier, None, parts), whole), (shape, planes, parts)


def stats_case(mode: str, shape, given: frozenset[str]) -> Case:
    n, c, h, w, o, kernel, *_ = shape
    weight = (o, c, *kernel)
    images = torch.rand(n, c, h, w, generator=torch.Generator().manual_seed(1)) + 0.5  # with a mean, as images have one
    pair = KERNELS["patch_moments_fwd"](None, {"stride": shape[6], "padding": shape[7], "patch": weight[1:]}, images)

    def conv(name: str, seed: int) -> Operand | None:
        return Operand("conv", normal(*weight, seed=seed)) if name in given else None

    def channels(name: str, seed: int, shift: float = 0.0) -> Operand | None:
        return vector(normal(o, seed=seed, scale=0.3, shift=shift)) if name in given else None

    lead, rstd = [vector(pair), Operand("conv", normal(*weight, seed=2))], vector(normal(o, seed=3, scale=0.1, shift=1.2))
    gamma, sums = channels("gamma", 4, 1.0), [channels("s1", 5), channels("s2", 6)]
    if mode == "fwd":
        inputs, outputs = lead, [out("vector", o), out("vector", o)]
    elif mode == "jvp":
        inputs, outputs = [*lead, rstd, Operand("conv", normal(*weight, seed=7))], [out("vector", o), out("vector", o)]
    elif mode == "bwd":
        inputs, outputs = [*lead, gamma, rstd, *sums], [out("conv", *weight)]
    else:
        more = [conv("wt", 7), channels("gammat", 8), channels("rstdt", 9), channels("s1t", 10), channels("s2t", 11)]
        inputs, outputs = [*lead, gamma, rstd, *sums, *more], [out("conv", *weight)]
    return Case(f"patch_stats_{mode}", inputs, outputs, 1, [c, kernel[0] * kernel[1], o], [EPS], {"eps": EPS})


def check(tier: str, mode: str, *given: str) -> None:
    with Pool() as pool:
        for shape in SHAPES:
            made = stats_case(mode, shape, frozenset(given))
            whole = made.check(tier, (), pool=pool)
            assert same_bits(made.run(tier, None, 7), whole)


@tiers
@pytest.mark.parametrize("mode", ["fwd", "jvp"])
def test_stats(tier: str, mode: str) -> None:
    check(tier, mode)


@tiers
@pytest.mark.parametrize("gamma", [("gamma",), ()], ids=["gamma", "-"])
def test_stats_bwd(tier: str, gamma: tuple[str, ...]) -> None:
    check(tier, "bwd", "s1", "s2", *gamma)


OPTIONAL = [  # what there may be: the tangents of w, of gamma, of the sums
    (*primal, *w, *g, *sums)
    for primal, w, g, sums in itertools.product(
        ((), ("s1", "s2")), ((), ("wt", "rstdt")), ((), ("gamma",), ("gamma", "gammat")), ((), ("s2t",), ("s1t", "s2t"))
    )
    if sums or (primal and (w or "gammat" in g))
]


@tiers
@pytest.mark.parametrize("given", OPTIONAL, ids=" ".join)
def test_stats_bwd_jvp(tier: str, given: tuple[str, ...]) -> None:
    check(tier, "bwd_jvp", *given)


@tiers
def test_padding_survives_without_eps(tier: str) -> None:
    """1 / sqrt(0) in the padding would turn into NaN further on."""
    made = stats_case("fwd", SHAPES[1], frozenset())
    made.numbers, made.attrs = [0.0], {"eps": 0.0}
    made.check(tier, ())


@tiers
def test_a_filter_of_neighbours(tier: str) -> None:
    """Smooth images, and a weight that takes differences: of C hardly anything is left, and that must be right."""
    h = torch.linspace(0, 1, 33)
    x = (3.0 + (2.0 * h[:, None] + h).sin() + 1e-3 * normal(33, 33, seed=5))[None, None]
    shape = (1, 1, 33, 33, 7, (3, 3), (1, 1), (0, 0, 0, 0))
    pair = moments_case(shape, x, True).run(tier)[0]
    w = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]).repeat(7, 1, 1, 1) * torch.arange(1, 8)[:, None, None, None]
    made = Case("patch_stats_fwd", [vector(pair), Operand("conv", w)], [out("vector", 7), out("vector", 7)], 1, [1, 9, 7], [EPS], {"eps": EPS})
    mean, rstd = made.run(tier)
    z = torch.nn.functional.conv2d(x.double(), w.double())
    assert (mean - z.mean((0, 2, 3))).abs().max() <= 1e-6 * 8 * 7 * 3
    torch.testing.assert_close(rstd.double(), (z.var((0, 2, 3), unbiased=False) + EPS).rsqrt(), rtol=2e-7, atol=0)
