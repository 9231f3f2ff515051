"""Weight expressions (add, mul, sum, matmul, transpose, slice) on arrays of up to four axes; pack and unpack."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from kernel_cases import TIERS, Case, Operand, Pool, normal, out, same_bits, vector
from torch import Tensor

from fastmaml.executors.torch.kernels.registry import times, total

Shape = tuple[int, ...]
SIZES = (1, 7, 8, 9, 40, 63, 64, 65, 130)
# shapes of x and y; the result's is what they broadcast to
PAIRS: list[tuple[Shape, Shape]] = [
    ((), ()), ((1,), (65,)), ((63,), (63,)), ((), (8, 9)), ((40, 7), (40, 1)), ((65, 1), (1, 17)), ((1, 9), (64, 9)),
    ((130, 40), (130, 40)), ((5, 1, 7), (8, 1)), ((9, 1, 3), (9, 4, 3)), ((1, 4, 1, 7), (3, 1, 5, 7)), ((2, 3, 4, 5), (1, 3, 1, 5)),
    ((1, 1, 1, 8), (3, 4, 5, 1)), ((2, 1, 1, 1), (1, 3, 4, 9)), ((9, 7, 1, 1), (9, 7, 3, 3)), ((65, 1, 1, 1), (65, 2, 1, 3)), ((3, 1, 33, 1), (3, 2, 33, 17)),
]  # fmt: skip
tiers = pytest.mark.parametrize("tier", TIERS)


def axes(shape: Shape) -> Shape:
    return (1,) * (4 - len(shape)) + tuple(shape)


def bits(shape: Shape, whole: Shape) -> int:
    """The axes on which the one is broadcast to the other."""
    return sum(1 << a for a, (p, q) in enumerate(zip(axes(shape), axes(whole), strict=True)) if p != q)


def sized(*shapes: Shape) -> tuple[Shape, list[int]]:
    whole = torch.broadcast_shapes(*shapes)
    return whole, [*axes(whole), *(bits(shape, whole) for shape in shapes)]


def array(shape: Shape, seed: int, given: bool = True) -> Operand | None:
    return vector(normal(*shape, seed=seed)) if given else None


def name(flags: tuple[bool, ...]) -> str:
    return "".join("1" if flag else "-" for flag in flags)


def absent(n: int):
    return pytest.mark.parametrize("given", [f for f in itertools.product([True, False], repeat=n) if any(f)], ids=name)


def check(made: Case, tier: str, pool: Pool | None = None) -> list[Tensor | None]:
    whole = made.check(tier, (), pool=pool)
    for parts in (7, 16):
        assert same_bits(made.run(tier, None, parts), whole), f"{parts} parts change bits"
    return whole


# ------------------------------------------------------------------------------------------------- broadcasting
@tiers
@absent(2)
def test_add(tier: str, given: tuple[bool, ...]) -> None:
    for shapes in PAIRS:
        whole, sizes = sized(*shapes)
        sizes[4:] = [b if there else 0 for b, there in zip(sizes[4:], given, strict=True)]
        inputs = [array(shape, seed, there) for seed, (shape, there) in enumerate(zip(shapes, given, strict=True))]
        made = Case("add_expr_fwd", inputs, [out("vector", *whole)], 1, sizes)
        made.formula = lambda task, attrs, x, y: total(x, y).expand(whole)  # noqa: B023
        check(made, tier)


@tiers
def test_mul(tier: str) -> None:
    for shapes in PAIRS:
        whole, sizes = sized(*shapes)
        inputs = [array(shape, seed) for seed, shape in enumerate(shapes)]
        check(Case("mul_expr_fwd", inputs, [out("vector", *whole)], 1, sizes, formula=lambda _, __, x, y: x * y), tier)


@tiers
@absent(2)
def test_mul_jvp(tier: str, given: tuple[bool, ...]) -> None:
    with Pool() as pool:
        for x, y in PAIRS:
            whole, sizes = sized(x, y)
            inputs = [array(x, 0), array(y, 1), array(x, 2, given[0]), array(y, 3, given[1])]
            made = Case("mul_expr_jvp", inputs, [out("vector", *whole)], 1, sizes)
            made.formula = lambda task, attrs, x, y, xt, yt: total(times(xt, y), times(x, yt))
            check(made, tier, pool)


def sum_case(mine: Shape, other: Shape, terms: str) -> Case:
    """The gradient of one factor; "a": alone, as in a sum; "ab", "cd": with the other factor."""
    whole, sizes = sized(mine, other)

    def formula(task, attrs, a, b, c, d):
        return total(a if b is None else times(a, b), times(c, d)).sum_to_size(mine)

    shapes = {"a": whole, "b": other, "c": whole, "d": other}
    inputs = [array(shape, ord(n), n in terms) for n, shape in shapes.items()]
    return Case("sum_expr", inputs, [out("vector", *mine)], 1, sizes, formula=formula)


TERMS = pytest.mark.parametrize("terms", ["a", "ab", "abcd", "cd"])


@tiers
@TERMS
def test_sum(tier: str, terms: str) -> None:
    with Pool() as pool:
        for x, y in PAIRS:
            check(sum_case(x, y, terms), tier, pool)
            check(sum_case(y, x, terms), tier, pool)


@tiers
@TERMS
def test_long_sum(tier: str, terms: str) -> None:
    for mine, other in (((1, 40), (300, 40)), ((40, 1), (40, 300))):
        check(sum_case(mine, other, terms), tier)


@tiers
@TERMS
def test_sum_of_thousands(tier: str, terms: str) -> None:
    with Pool() as pool:
        for mine, other in (((1, 40), (5000, 40)), ((40, 1), (40, 5000)), ((9, 1, 5, 1), (9, 30, 5, 30)), ((), (70, 70)), ((1, 1), (9, 700))):
            check(sum_case(mine, other, terms), tier, pool)


# ------------------------------------------------------------------------------------------------- matrices
def matmul_case(m: int, n: int, k: int, transposed: int, terms: str, packed: bool = False) -> Case:
    """``packed``: what has the columns of the weight lies as a convolution's."""
    shapes = [(k, m) if transposed & 1 else (m, k), (n, k) if transposed & 2 else (k, n), (m, n)]
    lies = [packed and bool(transposed & 2), packed, packed and not transposed & 2]
    a, b, result = ((*shape, 1, 1) if conv else shape for shape, conv in zip(shapes, lies, strict=True))

    def formula(task, attrs, *factors: Tensor | None) -> Tensor:
        flat = [None if f is None else f.flatten(1) for f in factors]
        a, b, c, d = (f.T if f is not None and transposed >> (i % 2) & 1 else f for i, f in enumerate(flat))
        return total(None if a is None else a @ b, None if c is None else c @ d).reshape(result)

    inputs = []
    for name, shape in zip("abcd", (a, b, a, b), strict=True):
        value = normal(*shape, seed=ord(name))
        inputs.append(Operand("conv" if len(shape) == 4 else "vector", value) if name in terms else None)
    made = out("conv" if len(result) == 4 else "vector", *result)
    return Case("matmul_fwd", inputs, [made], 1, [m, n, k, transposed, int(packed)], formula=formula)


MATRICES = list(zip(SIZES, SIZES[3:] + SIZES[:3], SIZES[5:] + SIZES[:5], strict=True)) + [(1, 1, 7), (3, 130, 5)]
MATRICES += [(64, 144, 64), (70, 80, 97), (100, 15, 200), (100, 16, 95)]  # blocks and chains of every kind
matrix = pytest.mark.parametrize("transposed", [0, 1, 2, 3], ids=["ab", "aTb", "abT", "aTbT"])


@tiers
@matrix
@pytest.mark.parametrize("terms", ["ab", "abcd", "cd"])
def test_matmul(tier: str, transposed: int, terms: str) -> None:
    with Pool() as pool:
        for m, n, k in MATRICES:
            check(matmul_case(m, n, k, transposed, terms), tier, pool)


@tiers
@pytest.mark.parametrize("transposed", [0, 1, 2], ids=["ab", "aTb", "abT"])
@pytest.mark.parametrize("terms", ["ab", "abcd", "cd"])
def test_matmul_of_packed_weights(tier: str, transposed: int, terms: str) -> None:
    with Pool() as pool:
        for m, n, k in (*MATRICES, (64, 577, 64)):
            check(matmul_case(m, n, k, transposed, terms, packed=True), tier, pool)


@tiers
@matrix
def test_long_matmul(tier: str, transposed: int) -> None:
    check(matmul_case(5, 7, 784, transposed, "ab"), tier)


@tiers
@matrix
def test_matmul_of_thousands(tier: str, transposed: int) -> None:
    check(matmul_case(5, 7, 20000, transposed, "ab"), tier)


@tiers
def test_transpose(tier: str) -> None:
    for m, n, _ in MATRICES:
        (y,) = check(Case("transpose_fwd", [array((m, n), 0)], [out("vector", n, m)], 1, [m, n]), tier)
        assert torch.equal(y, normal(m, n).T)


SLICES = [((7,), 0, 2, 5), ((40, 9), 0, 0, 8), ((9, 40), 1, 39, 40), ((3, 65, 4), 1, 1, 64), ((5, 4, 3, 63), 2, 1, 2), ((8, 1), 0, 0, 8)]  # fmt: skip


@tiers
@pytest.mark.parametrize("shape,dim,start,stop", SLICES)
def test_slice(tier: str, shape: Shape, dim: int, start: int, stop: int) -> None:
    part = (*shape[:dim], stop - start, *shape[dim + 1 :])
    sizes = [math.prod(shape[:dim]), shape[dim], start, stop - start, math.prod(shape[dim + 1 :])]
    attrs = {"input_shape": shape, "dim": dim, "start": start, "stop": stop}
    for kernel, source, target in (("slice_fwd", shape, part), ("slice_bwd", part, shape)):
        made = Case(kernel, [array(source, 0)], [out("vector", *target)], 1, sizes, attrs=attrs)
        assert torch.equal(check(made, tier)[0], made.reference(torch.float32)[0])


def check_packing(tier: str, w: Tensor, kind: str, taps: int) -> None:
    """The plain array may be the caller's: nothing behind it is read."""
    plain, sizes = w.flatten(1), [w[0].numel(), len(w), taps]
    packed = Case("pack_fwd", [Operand("plain", plain)], [out(kind, *w.shape)], 1, sizes)
    unpacked = Case("unpack_fwd", [Operand(kind, w)], [out("vector", *plain.shape)], 1, sizes)
    for parts in (1, 2, 7, 16):
        assert torch.equal(packed.run(tier, None, parts)[0].reshape(w.shape), w), (w.shape, parts)
        assert torch.equal(unpacked.run(tier, None, parts)[0], plain), (w.shape, parts)


@tiers
def test_pack_and_unpack(tier: str) -> None:
    for inputs, outputs in itertools.product(SIZES, (*SIZES, 2, 200)):
        check_packing(tier, normal(outputs, inputs), "packed", 0)


@tiers
@pytest.mark.parametrize("taps", [(1, 1), (3, 3), (2, 5)])
def test_pack_and_unpack_of_convolutions(tier: str, taps: Shape) -> None:
    for inputs, outputs in itertools.product((1, 3, 8, 17, 64), (1, 5, 16, 63, 65, 130)):
        check_packing(tier, normal(outputs, inputs, *taps), "conv", math.prod(taps))
