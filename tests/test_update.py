"""sgd, its clips, dot, ratio, axpy, scale, add, zero, copy: over whole arrays and row by row; join_rows, support_rows and query_rows."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernel_cases import TIERS, Case, Operand, Pool, exact, normal, out, rows, same_bits, scalar, vector
from torch import Tensor

FLOATS, CHANNELS, ROWS = (1, 7, 16, 63, 65, 1500), (1, 7, 8, 9, 40, 63, 64, 65, 130), (1, 5, 10, 11, 97)
SHAPES = [(ROWS[a % 5], c) for a, c in enumerate(CHANNELS)] + [(ROWS[(a + 2) % 5], c) for a, c in enumerate(CHANNELS)]
RATE, BLOCKS = exact(0.3), (3, 50)
SIGNS = {"plus": 1.0, "minus": -1.0, "weighted": exact(0.7)}
tiers = pytest.mark.parametrize("tier", TIERS)
signs = pytest.mark.parametrize("sign", SIGNS.values(), ids=SIGNS)
scales = pytest.mark.parametrize("scale", [RATE, None], ids=["scaled", "unscaled"])


def array(n: int, seed: int) -> Operand:
    return vector(normal(n, seed=seed))


def check(made: Case, tier: str, *over: int) -> list[Tensor | None]:
    """Also in place of each of the operands ``over``: the same bits."""
    whole = made.check(tier, BLOCKS if made.n > 1 else (), elementwise=True)
    (o,) = made.outputs
    for operand in over:
        made.outputs = [Operand(o.kind, None, o.shape, over=operand)]
        for parts in (1, 3):
            assert same_bits(made.run(tier, None, parts), whole), f"in place of operand {operand}"
    return whole


# ------------------------------------------------------------------------------------------------- whole arrays
@tiers
@pytest.mark.parametrize("per_element", [False, True], ids=["scalar", "per_element"])
def test_sgd(tier: str, per_element: bool) -> None:
    for n in FLOATS:
        theta, g, rate = array(n, 1), array(n, 2), array(n, 3) if per_element else scalar(RATE)
        sizes = [n, int(per_element)]
        check(Case("sgd_fwd", [theta, g, rate], [out("vector", n)], 1, sizes), tier, 0, 1)
        check(Case("sgd_bwd", [theta, rate], [out("vector", n)], 1, sizes), tier, 0)


@tiers
@pytest.mark.parametrize("acc", [True, False], ids=["acc", "no_acc"])
def test_sgd_bwd_rate(tier: str, acc: bool) -> None:
    with Pool() as pool:
        for n in (*FLOATS, 20000):
            bar, g, attrs = array(n, 1), array(n, 2), {"per_element": False}
            inputs = [bar, g, vector(torch.tensor([RATE])) if acc else None]
            made = Case("sgd_bwd_rate", inputs, [out("vector", 1)], 1, [n, 0], attrs=attrs)
            (whole,) = made.check(tier, (), pool=pool)
            if acc:
                made.outputs = [out("vector", 1, over=2)]
                assert torch.equal(made.run(tier, None, 3)[0], whole)
            inputs, attrs = [bar, g, array(n, 3) if acc else None], {"per_element": True}
            made = Case("sgd_bwd_rate", inputs, [out("vector", n)], 1, [n, 1], attrs=attrs)
            check(made, tier, *((2,) if acc else ()))
        for n, c in SHAPES:  # the state of a factored layer: rows of the support, behind each other
            inputs = [Operand("dense", normal(n, c, seed=s)) for s in (1, 2)] + [scalar(RATE) if acc else None]
            made = Case(
                "sgd_bwd_rate", inputs, [out("vector", 1)], n, [c, 0, 1], attrs={"per_element": False}, support=n
            )
            made.check(tier, (), pool=pool)


@tiers
def test_clip_value(tier: str) -> None:
    """The bound itself passes, as torch's clamp has it; NaN is no number of any bound."""
    bound = exact(0.8)
    for n in FLOATS:
        g = normal(n, seed=1)
        g[: n // 3] = bound
        g[n // 3 : n // 2] = -bound
        attrs = {"bound": bound}
        check(Case("clip_value_fwd", [vector(g)], [out("vector", n)], 1, [n], [bound], attrs), tier, 0)
        check(Case("clip_value_bwd", [vector(g), array(n, 2)], [out("vector", n)], 1, [n], [bound], attrs), tier, 0, 1)
    (c,) = Case("clip_value_fwd", [vector(torch.tensor([torch.nan, torch.inf]))], [out("vector", 2)], 1, [2], [bound]).run(tier)
    assert c[0].isnan() and c[1] == bound


@tiers
@pytest.mark.parametrize("acc", [True, False], ids=["acc", "no_acc"])
def test_dot(tier: str, acc: bool) -> None:
    with Pool() as pool:
        for n in (*FLOATS, 20000):
            inputs = [array(n, 1), array(n, 2), vector(torch.tensor([RATE])) if acc else None]
            made = Case("dot_fwd", inputs, [out("vector", 1)], 1, [n])
            made.formula = lambda task, attrs, x, y, a: (x * y).sum().reshape(1) + (0 if a is None else a)
            (whole,) = made.check(tier, (), pool=pool)
            if acc:
                made.outputs = [out("vector", 1, over=2)]
                assert torch.equal(made.run(tier, None, 3)[0], whole)


@tiers
@pytest.mark.parametrize("y", [3.0, -0.5, 0.0])
def test_ratio(tier: str, y: float) -> None:
    made = Case("ratio_fwd", [vector(torch.tensor([RATE])), vector(torch.tensor([y]))], [out("vector", 1)], 1, [])
    (ratio,) = made.check(tier, ())
    assert (ratio == 0) == (y == 0)


@tiers
@pytest.mark.parametrize("square", [0.0, 1e-20, 0.25, 1.0, 4.0, 1e8])
def test_clip_norm(tier: str, square: float) -> None:
    inputs, attrs = [vector(torch.tensor([exact(square)]))], {"max_norm": 0.5}
    made = Case("clip_norm_fwd", inputs, [out("vector", 1), out("vector", 1)], 1, [], [0.5], attrs)
    scale, slope = made.check(tier, ())
    assert bool(scale < 1) == bool(slope < 0) == (square >= 0.25)  # 0.5 / (0.5 + 1e-6) < 1


@tiers
@signs
@scales
def test_axpy_and_scale(tier: str, sign: float, scale: float | None) -> None:
    numbers, attrs = [sign], {"sign": sign}
    for n in FLOATS:
        acc, x, by = array(n, 1), array(n, 2), scalar(scale)
        check(Case("axpy_fwd", [acc, x, by], [out("vector", n)], 1, [n], numbers, attrs), tier, 0, 1)
        check(Case("scale_fwd", [x, by], [out("vector", n)], 1, [n], numbers, attrs), tier, 0)
    acc, x, by = scalar(exact(0.6)), scalar(exact(-1.7)), scalar(scale)  # nothing behind a scalar is read
    check(Case("axpy_fwd", [acc, x, by], [out("vector", 1)], 1, [1, 1], numbers, attrs), tier)
    check(Case("scale_fwd", [x, by], [out("vector", 1)], 1, [1, 1], numbers, attrs), tier)


@tiers
@pytest.mark.parametrize("x", [True, False], ids=["x", "no_x"])
@pytest.mark.parametrize("y", [True, False], ids=["y", "no_y"])
def test_add(tier: str, x: bool, y: bool) -> None:
    for n in FLOATS:
        inputs = [array(n, 1) if x else None, array(n, 2) if y else None]
        check(Case("add_fwd", inputs, [out("vector", n)], 1, [n]), tier, *([0] if x else []), *([1] if y else []))


@tiers
def test_zero_and_copy(tier: str) -> None:
    for n in FLOATS:
        check(Case("zero_fwd", [], [out("vector", n)], 1, [n], formula=lambda *_: None), tier)
        (y,) = check(Case("copy_fwd", [array(n, 1)], [out("vector", n)], 1, [n]), tier)
        assert torch.equal(y, normal(n, seed=1))


# ------------------------------------------------------------------------------------------------- rows
@tiers
@pytest.mark.parametrize("source", ["rows", "plain"])
@pytest.mark.parametrize("target", ["rows", "plain"])
def test_copy_rows(tier: str, source: str, target: str) -> None:
    for n, c in SHAPES:
        sizes = [c, int(source == "plain"), int(target == "plain")]
        made = Case("copy_rows_fwd", [Operand(source, normal(n, c))], [out(target, n, c)], n, sizes)
        made.formula = lambda task, attrs, x: x
        assert torch.equal(check(made, tier)[0], normal(n, c))


@tiers
@signs
@scales
def test_axpy_rows(tier: str, sign: float, scale: float | None) -> None:
    def axpy(task, attrs, acc: Tensor, x: Tensor, by: Tensor | None) -> Tensor:
        return acc + sign * (x if by is None else by * x)

    for n, c in SHAPES:
        inputs = [rows(normal(n, c, seed=1)), rows(normal(n, c, seed=2)), scalar(scale)]
        made = Case("axpy_rows_fwd", inputs, [out("rows", n, c)], n, [c], [sign], formula=axpy)
        check(made, tier, 0, 1)


@tiers
@signs
@scales
def test_scale_rows(tier: str, sign: float, scale: float | None) -> None:
    def times(task, attrs, x: Tensor, by: Tensor | None) -> Tensor:
        return sign * (x if by is None else by * x)

    for n, c in SHAPES:
        check(Case("scale_rows_fwd", [rows(normal(n, c)), scalar(scale)], [out("rows", n, c)], n, [c], [sign], formula=times), tier, 0)


@tiers
@pytest.mark.parametrize("kernel", ["add_rows_fwd", "sgd_rows_fwd", "sgd_rows_bwd", "zero_rows_fwd"])
def test_rows(tier: str, kernel: str) -> None:
    n_rows, formula = {
        "add_rows_fwd": (2, lambda task, attrs, x, y: x + y),
        "sgd_rows_fwd": (2, lambda task, attrs, theta, g, rate: theta - rate * g),
        "sgd_rows_bwd": (1, lambda task, attrs, bar, rate: -rate * bar),
        "zero_rows_fwd": (0, lambda task, attrs: None),
    }[kernel]
    for n, c in SHAPES:
        inputs = [rows(normal(n, c, seed=s)) for s in range(n_rows)] + [scalar(RATE)] * kernel.startswith("sgd")
        check(Case(kernel, inputs, [out("rows", n, c)], n, [c], formula=formula), tier, *range(n_rows))


@tiers
@pytest.mark.parametrize("kind", ["rows", "plain"])
def test_support_and_query(tier: str, kind: str) -> None:
    """Moves of whole extents, the sources perhaps unpadded: bits are copied."""
    for c, support, query in itertools.product(CHANNELS, (1, 5), (1, 10)):
        s, q, both = normal(support, c, seed=1), normal(query, c, seed=2), normal(support + query, c, seed=3)
        n, joint = support + query, out("rows", support + query, c)

        def move(kernel: str, inputs: list[Operand], target: Operand) -> None:
            made = Case(kernel, inputs, [target], n, [c], support=support)  # noqa: B023
            assert torch.equal(made.check(tier, ())[0], made.reference(torch.float32)[0])

        for other in ("rows", "plain"):
            move("join_rows_fwd", [Operand(kind, s), Operand(other, q)], joint)
        move("support_rows_fwd", [Operand(kind, both)], out("rows", support, c))
        move("query_rows_fwd", [Operand(kind, both)], out("rows", query, c))
        move("query_rows_bwd", [Operand(kind, q)], joint)
