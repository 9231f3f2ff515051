"""cross_entropy_*: class weights, smoothing, reductions, fewer ways than outputs, labels that do not exist."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import SHAPES, TIERS, Case, Operand, Pool, exact, normal, out, rows, vector
from torch import Tensor

tiers = pytest.mark.parametrize("tier", TIERS)
weights = pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
smoothings = pytest.mark.parametrize("smoothing", [0.0, 0.125], ids=["sharp", "smooth"])
REDUCTIONS = {"mean": (0, "mean"), "sum": (1, "sum"), "divisor": (2, 24.0)}
reductions = pytest.mark.parametrize("reduction", REDUCTIONS)
cut = pytest.mark.parametrize("cut", [False, True], ids=["all_ways", "some_ways"])


class Problem:
    def __init__(self, n: int, c: int, cut=False, weighted=False, smoothing=0.0, reduction="mean", scale=3.0) -> None:
        self.n, self.c, self.ways = n, c, c // 2 + 1 if cut else 0
        self.z = normal(n, c, scale=scale)
        self.label = torch.randint(self.ways or c, (n,), generator=torch.Generator().manual_seed(n * c))
        self.weight = normal(c, seed=5).abs() + 0.1 if weighted else None
        code, name = REDUCTIONS[reduction]
        self.sizes, self.numbers = [c, code], [smoothing, 24.0]
        self.attrs = {"reduction": name, "label_smoothing": smoothing}

    def case(self, mode: str, more: list, outputs: list) -> Case:
        inputs = [rows(self.z), Operand("label", self.label), vector(self.weight), *more]
        kernel = f"cross_entropy_{mode}"
        return Case(kernel, inputs, outputs, self.n, self.sizes, self.numbers, self.attrs, ways=self.ways)

    def cases(self) -> list[Case]:
        row, one, step = out("rows", self.n, self.c), out("scalar"), Operand("scalar", torch.tensor(exact(0.3)))
        zt = rows(normal(self.n, self.c, seed=7))
        return [
            self.case("fwd", [], [one, out("scalar")]),
            self.case("fwd", [], [one, None]),
            self.case("fwd", [], [None, one]),
            self.case("bwd", [None], [row]),
            self.case("bwd", [step], [row]),
            self.jvp(zt),
            self.case("bwd_jvp", [zt], [row]),
        ]

    def jvp(self, zt: Operand) -> Case:
        if self.ways:  # the reference reads all columns of zt, the kernel the first ways: the others of dz are zero
            zt = rows(torch.where(torch.arange(self.c) < self.ways, zt.value, 0.0))
        return self.case("jvp", [zt], [out("scalar")])


def torchs_loss(problem: Problem) -> Tensor:
    weight = None if problem.weight is None else problem.weight.double()
    smoothing = problem.attrs["label_smoothing"]
    return F.cross_entropy(problem.z.double(), problem.label, weight, label_smoothing=smoothing)


@tiers
@cut
@weights
@smoothings
@reductions
def test_cross_entropy(tier: str, cut: bool, weighted: bool, smoothing: float, reduction: str) -> None:
    with Pool() as pool:
        for n, c in SHAPES:
            for case in Problem(n, c, cut, weighted, smoothing, reduction).cases():
                case.check(tier, pool=pool)


@tiers
@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e4], ids=["tiny", "confident", "huge"])
def test_sizes_of_logits(tier: str, scale: float) -> None:
    with Pool() as pool:
        for n, c in SHAPES:
            for case in Problem(n, c, False, True, 0.125, "mean", scale).cases():
                case.check(tier, pool=pool)


@tiers
def test_rows_with_one_sure_class(tier: str) -> None:
    """p - 1 at the label, where float32 has no digits left. (Rounding z - max costs the others 20 * 2^-24.)"""
    problem = Problem(5, 7, scale=1.0)
    problem.z[torch.arange(5), problem.label] += 20.0
    case = problem.case("bwd", [None], [out("rows", 5, 7)])
    (dz,), (truth,) = case.run(tier), case.reference(torch.float64)
    torch.testing.assert_close(dz.double(), truth, rtol=2e-6, atol=0)


@tiers
def test_in_place(tier: str) -> None:
    problem = Problem(23, 65, True, True, 0.125, "mean")
    zt = rows(normal(23, 65, seed=7))
    for mode, more, places in (("bwd", [None], (0,)), ("bwd_jvp", [zt], (0, 3))):
        (plain,) = problem.case(mode, more, [out("rows", 23, 65)]).run(tier)
        for place in places:
            (got,) = problem.case(mode, more, [out("rows", 23, 65, over=place)]).run(tier, 4)
            assert torch.equal(got, plain)


@tiers
def test_ignores_what_lies_beyond_the_ways(tier: str) -> None:
    problem = Problem(5, 7, True, True, 0.125, "mean")
    expected = [case.run(tier) for case in problem.cases()]
    problem.z[:, problem.ways :] = float("nan")
    problem.weight[problem.ways :] = float("nan")
    for case, values in zip(problem.cases(), expected, strict=True):
        for got, value in zip(case.run(tier), values, strict=True):
            assert got is None or torch.equal(got, value)


@tiers
@weights
@pytest.mark.parametrize("bad", [-1, -100, 4, 7, 2**40])
def test_label_that_does_not_exist(tier: str, weighted: bool, bad: int) -> None:
    """A safety net behind the check of the arguments: NaN in that row, nothing read out of bounds."""
    problem = Problem(5, 7, True, weighted, 0.125, "mean")
    problem.label[2] = bad
    row, one = out("rows", 5, 7), out("scalar")
    zt = rows(normal(5, 7, seed=7))
    for block in (None, 1):
        assert problem.case("fwd", [], [one, None]).run(tier, block)[0].isnan()
        assert problem.case("jvp", [zt], [one]).run(tier, block)[0].isnan()
        for mode, more in (("bwd", [None]), ("bwd_jvp", [zt])):
            (d,) = problem.case(mode, more, [row]).run(tier, block)
            assert d[2, : problem.ways].isnan().all() and not d[2, problem.ways :].any()
            assert d[[0, 1, 3, 4]].isfinite().all()


@tiers
def test_ties_and_non_finite(tier: str) -> None:
    problem = Problem(5, 7)
    problem.z = torch.zeros(5, 7)
    problem.z[:, [2, 4]] = 1.0
    problem.label = torch.tensor([2, 4, 2, 0, 4])
    loss, correct = problem.case("fwd", [], [out("scalar"), out("scalar")]).run(tier)
    assert correct == 2  # the first maximum
    problem.z[0, 0] = -float("inf")  # an impossible class that is not asked for
    loss, _ = problem.case("fwd", [], [out("scalar"), None]).run(tier)
    torch.testing.assert_close(loss.double(), torchs_loss(problem), rtol=1e-6, atol=0)
    problem.z[1, 3] = float("nan")
    (dz,) = problem.case("bwd", [None], [out("rows", 5, 7)]).run(tier)
    assert dz[1].isnan().all() and dz[[0, 2, 3, 4]].isfinite().all()


@tiers
def test_agrees_with_torch_itself(tier: str) -> None:
    problem = Problem(23, 63, False, True, 0.125, "mean")
    (loss, _) = problem.case("fwd", [], [out("scalar"), None]).run(tier, 4)
    torch.testing.assert_close(loss.double(), torchs_loss(problem), rtol=1e-6, atol=0)
