"""batchnorm_maxpool2d_*: what gamma makes of a maximum, to the last bit of torch's; gradients with absent operands, statistics over all rows,
the support's or none. batchnorm_* where the pixels of images are its rows."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import IMAGES, TIERS, Case, Operand, Pool, exact, image, lowered, normal, out, vector
from test_batchnorm import BWD_INPUT, BWD_STATS, JVP, combinations, parametrize
from test_maxpool2d import Pool as Windows
from torch import Tensor

EPS = exact(1e-5)
tiers = pytest.mark.parametrize("tier", TIERS)
WINDOWS = [  # kernel, stride
    ((2, 2), (2, 2)),
    ((1, 1), (1, 1)),
    ((1, 1), (2, 3)),
    ((3, 2), (4, 3)),
    ((3, 3), (3, 3)),
    ((17, 16), (17, 16)),
]
windows = pytest.mark.parametrize("window", WINDOWS, ids=lambda w: "-".join(f"{a}x{b}" for a, b in w))
STATISTICS = {"batch": (-1, "joint"), "support": (-2, "support"), "running": (0, None)}
statistics = pytest.mark.parametrize("statistic", STATISTICS)
GAMMAS = ("absent", "mixed", "positive", "negative", "zero")


def cases(window: tuple) -> list[Windows]:
    made = [Windows((*window, (0, 0)), shape) for shape in [*IMAGES, (2, 7, 17, 19)]]
    return [pool for pool in made if pool.fits()]


def gamma_of(kind: str, c: int) -> Tensor | None:
    """"mixed" has a zero of either sign."""
    v = normal(c, seed=5)
    if kind == "mixed":
        v[::3], v[1::6] = 0.0, -0.0
    return {"absent": None, "mixed": v, "positive": v.abs() + 0.1, "negative": -v.abs() - 0.1, "zero": v * 0}[kind]


def choice(pool: Windows, x: Tensor, gamma: Tensor | None, outputs: str = "y index") -> Case:
    outs = [
        out("image", *pool.output) if "y" in outputs.split() else None,
        out(pool.kind, *pool.output) if "index" in outputs else None,
    ]
    attrs = {"kernel": pool.kernel, "stride": pool.stride, "padding": pool.padding, "stat_rows": "joint", "eps": EPS}
    made = lowered("batchnorm_maxpool2d_fwd", [image(x), vector(gamma)], outs, pool.n, attrs)
    reference = made.formula

    def formula(*arguments: object) -> tuple[Tensor, Tensor]:
        y, index = reference(*arguments)
        return y, pool.positions(index)

    made.formula = formula
    return made


@tiers
@windows
@pytest.mark.parametrize("kind", GAMMAS)
def test_choice(tier: str, window: tuple, kind: str) -> None:
    """Equal numbers in plenty: the first of them is taken. Bit for bit as torch, which normalises first."""
    assert cases(window)
    for pool in cases(window):
        x, gamma = normal(*pool.shape).mul(2).round() / 2, gamma_of(kind, pool.shape[1])
        made = choice(pool, x, gamma)
        y, index = made.check(tier, elementwise=True)
        expected = made.reference(torch.float32)
        assert torch.equal(y, expected[0]) and torch.equal(index.long(), expected[1])
        scaled = x if gamma is None else x * gamma.view(-1, 1, 1)
        _, torchs = torch.nn.functional.max_pool2d(scaled, pool.kernel, pool.stride, return_indices=True)
        assert torch.equal(pool.index(index), torchs)
        for outputs in ("y", "index", "none"):
            only_y, only_index = choice(pool, x, gamma, outputs).run(tier, 2)
            assert only_y is None or torch.equal(only_y, y)
            assert only_index is None or torch.equal(only_index, index)


@tiers
@windows
@pytest.mark.parametrize("kind", GAMMAS)
def test_choice_among_numbers_that_are_not_finite(tier: str, window: tuple, kind: str) -> None:
    pool = cases(window)[-1]
    x, gamma = normal(*pool.shape), gamma_of(kind, pool.shape[1])
    chosen = torch.rand(x.shape, generator=torch.Generator().manual_seed(3))
    x[chosen < 0.2] = float("nan")
    if kind in ("absent", "positive", "negative"):  # zero times infinity is no number
        x[(chosen > 0.2) & (chosen < 0.4)] = float("inf")
        x[chosen > 0.6] = -float("inf")
        x[0, 1] = -float("inf")
    made = choice(pool, x, gamma)
    y, index = made.run(tier)
    expected, where = made.reference(torch.float32)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(index.long(), where)


class Given:
    """Operands that are there only where their name is: of all pixels, of the chosen ones, of channels."""

    def __init__(self, pool: Windows, given: frozenset[str]) -> None:
        self.pool, self.given, self.seed = pool, given, 10

    def made(self, name: str, wrap, *shape: int) -> Operand | None:
        self.seed += 1
        return wrap(normal(*shape, seed=self.seed)) if name in self.given else None

    def pixels(self, name: str) -> Operand | None:
        return self.made(name, image, *self.pool.shape)

    def pooled(self, name: str) -> Operand | None:
        return self.made(name, image, *self.pool.output)

    def vector(self, name: str) -> Operand | None:
        return self.made(name, vector, self.pool.shape[1])


def lead(shape: tuple[int, ...]) -> list[Operand]:
    """x, and statistics of about its own."""
    c = shape[1]
    x = image(normal(*shape, seed=1, shift=0.5))
    return [x, vector(normal(c, seed=2, scale=0.1, shift=0.5)), vector(normal(c, seed=3, scale=0.1, shift=1.2))]


def kept(pool: Windows, tier: str) -> Operand:
    _, index = choice(pool, normal(*pool.shape, seed=1), None).run(tier)
    return Operand(pool.kind, index)


def reverse(mode: str, pool: Windows, inputs: list, index_at: int, statistic: str) -> Case:
    size, extent = STATISTICS[statistic]
    attrs = {"kernel": pool.kernel, "stride": pool.stride, "padding": (0, 0), "input_shape": tuple(pool.image)}
    attrs |= {"eps": EPS, "stat_rows": extent}
    made = lowered(f"batchnorm_maxpool2d_{mode}", inputs, [out("image", *pool.shape)], pool.n, attrs)
    assert made.sizes[10] == size
    made.support, reference = pool.n // 2 + 1, made.formula

    def formula(task: object, attrs: dict, *operands: Tensor | None) -> object:
        operands = list(operands)
        operands[index_at] = pool.index(operands[index_at])
        return reference(task, attrs, *operands)

    made.formula = formula
    return made


@tiers
@windows
@statistics
@parametrize(combinations("gamma"))
def test_bwd_input(tier: str, window: tuple, statistic: str, given: frozenset[str]) -> None:
    for pool in cases(window):
        g = Given(pool, given | {"dy", "s1", "s2"})
        inputs = [*lead(pool.shape), g.vector("gamma"), g.pooled("dy"), kept(pool, tier), g.vector("s1"), g.vector("s2")]
        reverse("bwd_input", pool, inputs, 5, statistic).check(tier, elementwise=True)


@tiers
@statistics
@parametrize(BWD_INPUT)
def test_bwd_input_jvp(tier: str, statistic: str, given: frozenset[str]) -> None:
    for pool in (cases(WINDOWS[0])[0], cases(WINDOWS[3])[-1], cases(WINDOWS[5])[0]):
        g = Given(pool, given)
        primal = [g.vector("gamma"), g.pooled("dy"), kept(pool, tier), g.vector("s1"), g.vector("s2")]
        tangents = [g.pixels("xt"), *map(g.vector, ("meant", "rstdt", "gammat")), g.pooled("dyt"), g.vector("s1t"), g.vector("s2t")]
        reverse("bwd_input_jvp", pool, [*lead(pool.shape), *primal, *tangents], 5, statistic).check(tier, (2,), elementwise=True)


# ------------------------------------------------------------------------------------------------- batchnorm over images


class Pixels:
    """A batchnorm kernel on images: [n, c, h, w] there, to the kernel rows of channels, a row for each pixel."""

    def __init__(self, shape: tuple[int, int, int, int], given: frozenset[str] = frozenset()) -> None:
        (self.n, self.c, self.h, self.w), self.given, self.seed = shape, given, 10
        self.rows = self.n * self.h * self.w

    def dense(self, value: Tensor) -> Operand:
        return Operand("dense", value)

    def pixels(self, name: str) -> Operand | None:
        self.seed += 1
        return self.dense(normal(self.rows, self.c, seed=self.seed)) if name in self.given else None

    def vector(self, name: str) -> Operand | None:
        self.seed += 1
        return vector(normal(self.c, seed=self.seed)) if name in self.given else None

    def lead(self) -> list[Operand]:
        c = self.c
        x = self.dense(normal(self.rows, c, seed=1, shift=0.5))
        return [x, vector(normal(c, seed=2, scale=0.1, shift=0.5)), vector(normal(c, seed=3, scale=0.1, shift=1.2))]

    def pair(self) -> list[Operand]:
        return [out("vector", self.c), out("vector", self.c)]

    def check(self, tier: str, kernel: str, inputs: list, outputs: list, statistic: str, pool: Pool | None = None) -> None:
        """As the executor calls it: n, the rows of a block and the sizes count pixels, the rows of the support images."""
        pixels, (size, extent) = self.h * self.w, STATISTICS[statistic]
        made = Case(kernel, inputs, outputs, self.rows, [self.c, size, pixels], [EPS], {"eps": EPS, "stat_rows": extent})
        made.support = self.n // 2 + 1
        counted = made.reference

        def reference(dtype: torch.dtype) -> tuple[Tensor | None, ...]:
            made.support *= pixels
            try:
                return counted(dtype)
            finally:
                made.support //= pixels

        made.reference = reference
        made.check(tier, (2 * pixels,), elementwise=pool is None, pool=pool)


SHAPES = [(1, 1, 1, 1), (5, 7, 3, 5), (2, 33, 1, 35)]


@tiers
@pytest.mark.parametrize("statistic", ["batch", "support"])
def test_statistics_over_pixels(tier: str, statistic: str) -> None:
    with Pool() as pool:
        for shape in SHAPES:
            p = Pixels(shape, frozenset({"xt"}))
            x, *stats = p.lead()
            p.check(tier, "batchnorm_stats_fwd", [x], p.pair(), statistic, pool)
            p.check(tier, "batchnorm_stats_jvp", [x, *stats, p.pixels("xt")], p.pair(), statistic, pool)
            p.check(tier, "batchnorm_bwd_stats", [x, *stats, p.pixels("xt")], p.pair(), statistic, pool)


@tiers
@parametrize(JVP)
def test_forward_over_pixels(tier: str, given: frozenset[str]) -> None:
    for shape in SHAPES:
        p = Pixels(shape, given)
        gamma = p.vector("gamma")
        p.check(tier, "batchnorm_fwd", [*p.lead(), gamma, p.vector("betat")], [out("dense", p.rows, p.c)], "batch")
        tangents = [p.pixels("xt"), *map(p.vector, ("meant", "rstdt", "gammat", "betat"))]
        p.check(tier, "batchnorm_jvp", [*p.lead(), gamma, *tangents], [out("dense", p.rows, p.c)], "batch")


@tiers
@parametrize(BWD_STATS)
def test_sums_over_pixels(tier: str, given: frozenset[str]) -> None:
    with Pool() as pool:
        for shape in SHAPES:
            p = Pixels(shape, given)
            tangents = [p.pixels("dy"), p.pixels("xt"), p.vector("meant"), p.vector("rstdt"), p.pixels("dyt")]
            p.check(tier, "batchnorm_bwd_stats_jvp", [*p.lead(), *tangents], p.pair(), "batch", pool)


@tiers
@statistics
@parametrize(BWD_INPUT)
def test_reverse_over_pixels(tier: str, statistic: str, given: frozenset[str]) -> None:
    for shape in SHAPES:
        p = Pixels(shape, given)
        output = [out("dense", p.rows, p.c)]
        gamma, dy = p.vector("gamma"), p.pixels("dy")
        sums = [p.vector("s1"), p.vector("s2")]
        if dy:
            p.check(tier, "batchnorm_bwd_input", [*p.lead(), gamma, dy, *sums], output, statistic)
        tangents = [p.pixels("xt"), *map(p.vector, ("meant", "rstdt", "gammat")), p.pixels("dyt"), p.vector("s1t"), p.vector("s2t")]
        p.check(tier, "batchnorm_bwd_input_jvp", [*p.lead(), gamma, dy, *sums, *tangents], [out("dense", p.rows, p.c)], statistic)
