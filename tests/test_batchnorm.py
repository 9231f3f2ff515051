"""batchnorm_*: every kernel and combination of absent operands; statistics over all rows, the support's, or none."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from kernel_cases import SHAPES, TIERS, Case, Operand, Pool, check_activation, exact, normal, out, rows, vector
from torch import Tensor

EPS = exact(1e-5)
tiers = pytest.mark.parametrize("tier", TIERS)
STATISTICS = {"batch": -1, "support": -2, "count": 1, "running": 0}  # sizes[1]; "count": rows of the support
statistics = pytest.mark.parametrize("statistic", STATISTICS)


def case(kernel: str, inputs: list, outputs: list, n: int, c: int, statistic: str = "batch") -> Case:
    support = n // 2 + 1
    size = support if statistic == "count" else STATISTICS[statistic]
    extent = {"batch": "joint", "support": "support", "count": "support", "running": None}[statistic]
    attrs = {"eps": EPS, "stat_rows": extent}
    return Case(kernel, inputs, outputs, n, [c, size], [EPS], attrs, support=support)


def point(n: int, c: int) -> tuple[Tensor, Tensor, Tensor]:
    """x and statistics of about its own."""
    x = normal(n, c, seed=1, shift=0.5)
    return x, normal(c, seed=2, scale=0.1, shift=0.5), normal(c, seed=3, scale=0.1, shift=1.2)


def pair(c: int) -> list[Operand]:
    return [out("vector", c), out("vector", c)]


def combinations(*names: str) -> list[frozenset[str]]:
    return [frozenset(s) for k in range(len(names) + 1) for s in itertools.combinations(names, k)]


def named(given: frozenset[str]) -> str:
    return "+".join(sorted(given)) or "none"


def parametrize(sets: list[frozenset[str]]):
    return pytest.mark.parametrize("given", sets, ids=named)


class Given:
    """Operands that are there only where their name is."""

    def __init__(self, given: frozenset[str], n: int, c: int) -> None:
        self.given, self.n, self.c, self.seed = given, n, c, 10

    def rows(self, name: str):
        self.seed += 1
        return rows(normal(self.n, self.c, seed=self.seed)) if name in self.given else None

    def vector(self, name: str, scale: float = 1.0, shift: float = 0.0):
        self.seed += 1
        return vector(normal(self.c, seed=self.seed, scale=scale, shift=shift)) if name in self.given else None


@tiers
@pytest.mark.parametrize("statistic", ["batch", "support", "count"])
def test_stats_fwd(tier: str, statistic: str) -> None:
    with Pool() as pool:
        for n, c in SHAPES:
            x = normal(n, c)
            case("batchnorm_stats_fwd", [rows(x)], pair(c), n, c, statistic).check(tier, pool=pool)
            case("batchnorm_stats_fwd", [rows(x + 100)], pair(c), n, c, statistic).check(tier, (), pool=pool)


@tiers
@pytest.mark.parametrize("block", [1, 4])
def test_stats_of_far_rows_in_blocks(tier: str, block: int) -> None:
    """Between blocks the mean is one float, so what is lost is of the size of rounding x."""
    for n, c in SHAPES[5:]:
        x = normal(n, c, shift=100.0)
        made = case("batchnorm_stats_fwd", [rows(x)], pair(c), n, c)
        (mean, rstd), (true_mean, true_rstd) = made.run(tier, block), made.reference(torch.float64)
        assert (mean - true_mean).abs().max() < 100 * 2.0**-22
        assert (rstd / true_rstd - 1).abs().max() < 100 * 2.0**-22 * true_rstd.max()


@tiers
def test_stats_of_constant_columns(tier: str) -> None:
    x = torch.full((23, 7), exact(0.1)) * torch.arange(7)
    for block in (None, 1, 4):
        mean, rstd = case("batchnorm_stats_fwd", [rows(x)], pair(7), 23, 7).run(tier, block)
        torch.testing.assert_close(mean, x[0], rtol=2e-7, atol=0)
        torch.testing.assert_close(rstd, torch.full((7,), EPS**-0.5), rtol=1e-6, atol=0)


@tiers
def test_stats_ignore_the_rows_behind(tier: str) -> None:
    x = normal(23, 7)
    x[12:] = float("nan")
    for block in (None, 1, 4, 12, 13):
        made = case("batchnorm_stats_fwd", [rows(x)], pair(7), 23, 7, "support")
        made.judge(made.run(tier, block))


@tiers
def test_many_rows(tier: str) -> None:
    n, c = 1000, 7
    x, xt, mean, rstd = normal(n, c, shift=3.0), normal(n, c, seed=4, shift=1.0), torch.full((c,), 3.0), torch.ones(c)
    blocks = (64, 300)
    case("batchnorm_stats_fwd", [rows(x)], pair(c), n, c).check(tier, blocks)
    lead = [rows(x), vector(mean), vector(rstd)]
    case("batchnorm_stats_jvp", [*lead, rows(xt)], pair(c), n, c).check(tier, blocks)
    case("batchnorm_bwd_stats", [*lead, rows(xt)], pair(c), n, c).check(tier, blocks)
    tangents = [rows(xt), vector(normal(c, seed=5)), vector(normal(c, seed=6)), rows(normal(n, c, seed=7))]
    case("batchnorm_bwd_stats_jvp", [*lead, rows(normal(n, c, seed=8)), *tangents], pair(c), n, c).check(tier, blocks)


@tiers
def test_running_fwd(tier: str) -> None:
    for _, c in SHAPES[:5]:
        mean, var = normal(c), normal(c, seed=1).abs()
        case("batchnorm_running_fwd", [vector(mean), vector(var)], pair(c), 1, c).check(tier)


@tiers
def test_padding_survives_without_eps(tier: str) -> None:
    """1 / sqrt(0) in the padding would turn into NaN further on."""
    x = normal(5, 7)
    made = case("batchnorm_stats_fwd", [rows(x)], pair(7), 5, 7)
    made.numbers = [0.0]
    made.attrs = {"eps": 0.0, "stat_rows": "joint"}
    made.check(tier)


@tiers
@pytest.mark.parametrize("statistic", ["batch", "support", "count"])
def test_stats_jvp(tier: str, statistic: str) -> None:
    with Pool() as pool:
        for n, c in SHAPES:
            x, mean, rstd = point(n, c)
            inputs = [rows(x), vector(mean), vector(rstd), rows(normal(n, c, seed=4))]
            case("batchnorm_stats_jvp", inputs, pair(c), n, c, statistic).check(tier, pool=pool)


@tiers
@parametrize(combinations("gamma", "beta"))
def test_fwd(tier: str, given: frozenset[str]) -> None:
    for n, c in SHAPES:
        x, mean, rstd = point(n, c)
        g = Given(given, n, c)
        inputs = [rows(x), vector(mean), vector(rstd), g.vector("gamma"), g.vector("beta")]
        whole = case("batchnorm_fwd", inputs, [out("rows", n, c)], n, c).check(tier, elementwise=True)
        in_place = case("batchnorm_fwd", inputs, [out("rows", n, c, over=0)], n, c).run(tier, 4)
        assert torch.equal(whole[0], in_place[0])


TANGENTS = [frozenset(), frozenset({"xt"}), frozenset({"xt", "meant", "rstdt"})]
JVP = [a | b for a in TANGENTS for b in combinations("gamma", "gammat", "betat") if a | (b - {"gamma"})]


@tiers
@parametrize(JVP)
def test_jvp(tier: str, given: frozenset[str]) -> None:
    for n, c in SHAPES:
        x, mean, rstd = point(n, c)
        g = Given(given, n, c)
        lead = [rows(x), vector(mean), vector(rstd), g.vector("gamma"), g.rows("xt")]
        inputs = [*lead, *map(g.vector, ("meant", "rstdt", "gammat", "betat"))]
        whole = case("batchnorm_jvp", inputs, [out("rows", n, c)], n, c).check(tier, elementwise=True)
        if "xt" in given:
            in_place = case("batchnorm_jvp", inputs, [out("rows", n, c, over=4)], n, c).run(tier, 4)
            assert torch.equal(whole[0], in_place[0])


@tiers
def test_bwd_stats(tier: str) -> None:
    with Pool() as pool:
        for n, c in SHAPES:
            x, mean, rstd = point(n, c)
            inputs = [rows(x), vector(mean), vector(rstd), rows(normal(n, c, seed=4))]
            case("batchnorm_bwd_stats", inputs, pair(c), n, c).check(tier, pool=pool)


BWD_STATS = [a | b for a in TANGENTS for b in combinations("dy", "dyt") if ("dyt" in b) or (a and "dy" in b)]


@tiers
@parametrize(BWD_STATS)
@pytest.mark.parametrize("wanted", ["both", "s1t", "s2t"])
def test_bwd_stats_jvp(tier: str, given: frozenset[str], wanted: str) -> None:
    with Pool() as pool:
        for n, c in SHAPES:
            x, mean, rstd = point(n, c)
            g = Given(given, n, c)
            lead = [rows(x), vector(mean), vector(rstd), g.rows("dy"), g.rows("xt")]
            inputs = [*lead, g.vector("meant"), g.vector("rstdt"), g.rows("dyt")]
            outputs = [out("vector", c) if wanted in ("both", name) else None for name in ("s1t", "s2t")]
            case("batchnorm_bwd_stats_jvp", inputs, outputs, n, c).check(tier, pool=pool)


@tiers
@statistics
@parametrize(combinations("gamma"))
def test_bwd_input(tier: str, statistic: str, given: frozenset[str]) -> None:
    for n, c in SHAPES:
        x, mean, rstd = point(n, c)
        g = Given(given | {"dy", "s1", "s2"}, n, c)
        inputs = [rows(x), vector(mean), vector(rstd), g.vector("gamma"), g.rows("dy"), g.vector("s1"), g.vector("s2")]
        whole = case("batchnorm_bwd_input", inputs, [out("rows", n, c)], n, c, statistic).check(tier, elementwise=True)
        in_place = case("batchnorm_bwd_input", inputs, [out("rows", n, c, over=4)], n, c, statistic).run(tier, 4)
        assert torch.equal(whole[0], in_place[0])


PRIMAL = [frozenset(), frozenset({"dy", "s1", "s2"})]
BWD_INPUT = [
    a | b | d | e
    for a in TANGENTS
    for b in (frozenset(), frozenset({"gamma"}), frozenset({"gamma", "gammat"}))
    for d in PRIMAL
    for e in (frozenset(), frozenset({"s1t", "s2t"}), frozenset({"dyt", "s1t", "s2t"}))
    if "dyt" in e or (d and (a or "gammat" in b) and (bool(a) == bool(e)))
]


@tiers
@statistics
@parametrize(BWD_INPUT)
def test_bwd_input_jvp(tier: str, statistic: str, given: frozenset[str]) -> None:
    for n, c in SHAPES:
        x, mean, rstd = point(n, c)
        g = Given(given, n, c)
        lead = [rows(x), vector(mean), vector(rstd), g.vector("gamma"), g.rows("dy"), g.vector("s1"), g.vector("s2")]
        tangents = [g.rows("xt"), *map(g.vector, ("meant", "rstdt", "gammat"))]
        inputs = [*lead, *tangents, g.rows("dyt"), g.vector("s1t"), g.vector("s2t")]
        run = partial(case, "batchnorm_bwd_input_jvp", inputs, n=n, c=c, statistic=statistic)
        whole = run([out("rows", n, c)]).check(tier, elementwise=True)
        if "dyt" in given:
            assert torch.equal(whole[0], run([out("rows", n, c, over=11)]).run(tier, 4)[0])


ROW_KERNELS = {  # operands besides x, mean and rstd
    "batchnorm_fwd": "gamma beta",
    "batchnorm_jvp": "gamma xt* meant rstdt gammat betat",
    "batchnorm_bwd_input": "gamma dy* s1 s2",
    "batchnorm_bwd_input_jvp": "gamma dy* s1 s2 xt* meant rstdt gammat dyt* s1t s2t",
}


def row_case(kernel: str, n: int, c: int) -> Case:
    x, mean, rstd = point(n, c)
    names = ROW_KERNELS[kernel].split()
    g = Given(frozenset(name.rstrip("*") for name in names), n, c)
    rest = [g.rows(name[:-1]) if name.endswith("*") else g.vector(name) for name in names]
    return case(kernel, [rows(x), vector(mean), vector(rstd), *rest], [out("rows", n, c)], n, c, "support")


@tiers
@pytest.mark.parametrize("kernel", ROW_KERNELS)
def test_so_many_rows_that_a_team_shares_them(tier: str, kernel: str) -> None:
    for c in (7, 33):
        row_case(kernel, 300, c).check(tier, (37,), elementwise=True)


@tiers
@pytest.mark.parametrize("slope", [0.0, exact(0.1)], ids=["relu", "leaky"])
@pytest.mark.parametrize("kernel", ROW_KERNELS)
def test_activation(tier: str, kernel: str, slope: float) -> None:
    for n, c in ((5, 7), (23, 65), (150, 16)):
        check_activation(tier, row_case(kernel, n, c), lambda: [out("rows", n, c)], slope)  # noqa: B023
