"""linear_* and row_sum_bwd: every combination of absent operands, blocks, teams, unpadded rows, narrow and wide weights;
then what may be fused to a product, which must not change a bit."""

from __future__ import annotations

import pytest
from kernel_cases import TIERS, Case, Operand, Pool, check_activation, exact, normal, out, same_bits, scalar, vector
from torch import Tensor

from fastmaml.executors.torch.kernels import KERNELS

SIZES, ROWS, BLOCKS = (1, 7, 8, 9, 40, 63, 64, 65, 130), (1, 5, 10, 11, 97), (3, 50)
# n, in, out: half of all pairs of sizes, every size on every number of rows (or all but one)
SHAPES = [(ROWS[(a + 2 * b) % 5], i, o) for a, i in enumerate(SIZES) for b, o in enumerate(SIZES) if (a + b) % 2 == 0]
FEW, MANY = SHAPES[::4], [(97, 20, 5), (193, 9, 65)]
EXTENT = {"x": "ni", "y": "no", "w": "oi", "b": "o"}  # of x and dx, ... and their tangents
KIND = {"x": "rows", "y": "rows", "w": "packed", "b": "vector"}

# "-": absent
ROW_KERNELS = [
    *(("linear_fwd", f"x w {b}", "y") for b in ("b", "-")),
    *(
        ("linear_jvp", f"x w {t}", "yt")
        for t in ("xt wt bt", "xt wt -", "xt - bt", "xt - -", "- wt bt", "- wt -", "- - bt")
    ),
    ("linear_bwd_input", "dy w", "dx"),
    *(("linear_bwd_input_jvp", t, "dxt") for t in ("dy w dyt wt", "dy w - wt", "dy w dyt -", "- w dyt -")),
    *(("linear_bwd_input_both", f"dy w dyt {wt}", "dx dxt") for wt in ("wt", "-")),
]
SUMS = [
    *(("linear_bwd_weight", "x dy", wanted) for wanted in ("dw db", "dw -", "- db")),
    *(("linear_bwd_weight_jvp", "x dy xt dyt", wanted) for wanted in ("dwt dbt", "dwt -", "- dbt")),
    ("linear_bwd_weight_jvp", "x dy xt -", "dwt -"),
    *(("linear_bwd_weight_jvp", f"x {dy} - dyt", "dwt dbt") for dy in ("dy", "-")),
]
Call, Shape = tuple[str, str, str], tuple[int, int, int]
tiers = pytest.mark.parametrize("tier", TIERS)


def parametrize(calls: list[Call]):
    return pytest.mark.parametrize("call", calls, ids=lambda c: f"{c[0].removeprefix('linear_')}[{c[1]} > {c[2]}]")


def letter(name: str) -> str:
    return name.removeprefix("d")[0]


def shape_of(name: str, n: int, i: int, o: int) -> list[int]:
    return [{"n": n, "i": i, "o": o}[axis] for axis in EXTENT[letter(name)]]


def given(names: str, shape: Shape, unpadded: bool = False) -> list[Operand | None]:
    def one(name: str) -> Operand:
        kind = "plain" if unpadded and letter(name) == "x" else KIND[letter(name)]
        return Operand(kind, normal(*shape_of(name, *shape), seed=sum(map(ord, name))))

    return [None if name == "-" else one(name) for name in names.split()]


def wanted(names: str, shape: Shape) -> list[Operand | None]:
    return [None if name == "-" else out(KIND[letter(name)], *shape_of(name, *shape)) for name in names.split()]


def both(task, attrs, dy, w, dyt, wt) -> tuple[Tensor, Tensor]:
    return KERNELS["linear_bwd_input"](task, attrs, dy, w), KERNELS["linear_bwd_input_jvp"](task, attrs, dy, w, dyt, wt)


def case(call: Call, shape: Shape, unpadded: bool = False) -> Case:
    kernel, inputs, outputs = call
    n, i, o = shape
    formula = both if kernel == "linear_bwd_input_both" else None
    return Case(kernel, given(inputs, shape, unpadded), wanted(outputs, shape), n, [i, o], formula=formula)


def check(call: Call, tier: str, shapes: list[Shape], blocks: tuple[int, ...] = BLOCKS) -> None:
    with Pool() as pool:
        for shape in shapes:
            whole = case(call, shape).check(tier, blocks, elementwise=call in ROW_KERNELS, pool=pool)
            if "x" in call[1] and shape[1] % 16:
                assert same_bits(case(call, shape, unpadded=True).run(tier), whole), "unpadded rows of x change bits"


@tiers
@parametrize(ROW_KERNELS + SUMS)
def test_kernel(tier: str, call: Call) -> None:
    check(call, tier, SHAPES)


@tiers
@parametrize(ROW_KERNELS + SUMS)
def test_long_sums(tier: str, call: Call) -> None:
    """Longer than any chain of FMAs should be; the weights of the second shape are narrow."""
    shapes = [(3, 784, 300), (3, 784, 5)] if call in ROW_KERNELS else [(300, 20, 40), (300, 20, 7)]
    check(call, tier, shapes, (100,))


@tiers
@parametrize(ROW_KERNELS + SUMS)
def test_half_a_vector(tier: str, call: Call) -> None:
    """Layers, with inputs and outputs of which the last vector of 16 holds at most 8: two rows share a register there."""
    check(call, tier, [(1, 40, 17), (2, 17, 24), (9, 20, 37), (10, 40, 40), (11, 24, 20), (23, 56, 53), (97, 37, 56), (12, 53, 120)])


@tiers
@parametrize(ROW_KERNELS + SUMS)
def test_teams(tier: str, call: Call) -> None:
    for shape in ((5, 130, 130), (97, 65, 40), (10, 130, 7), (5, 1, 9)):
        made = case(call, shape)
        alone = made.run(tier)
        for parts in (4, 7, 16):
            assert same_bits(made.run(tier, None, parts), alone), f"{parts} parts change bits on {shape}"


@tiers
def test_row_sum_bwd(tier: str) -> None:
    with Pool() as pool:
        for shape in SHAPES[:18]:
            made = Case("row_sum_bwd", given("dy", shape), wanted("db", shape), shape[0], [0, shape[2]])
            made.check(tier, BLOCKS, pool=pool)


@tiers
def test_row_sum_over_thousands(tier: str) -> None:
    shape = (4000, 1, 40)
    Case("row_sum_bwd", given("dy", shape), wanted("db", shape), 4000, [0, 40]).check(tier, ())


@tiers
@parametrize(SUMS)
def test_no_rows(tier: str, call: Call) -> None:
    """A batch of which no task is left."""
    for shape in ((0, 9, 65), (0, 65, 7)):
        for got in case(call, shape).run(tier):
            assert got is None or not got.any()


# ------------------------------------------------------------------------------------------------- a transposed weight
TURNED = [call for call in ROW_KERNELS if call[0].startswith("linear_bwd_input")]


def turned(call: Call, shape: Shape) -> Case:
    """The transpose is another matrix than w, so that what read w would not agree."""
    made, other = case(call, shape), normal(shape[1], shape[2], seed=77)
    function = made.formula or KERNELS[call[0]]
    made.formula = lambda task, attrs, dy, _, *rest: function(task, attrs, dy, rest[-1].T, *rest[:-2])
    made.after = [None, Operand("packed", other)]
    return made


@tiers
@parametrize(TURNED)
def test_transposed_weight(tier: str, call: Call) -> None:
    with Pool() as pool:
        for shape in ((10, 40, 40), (5, 65, 130), (97, 63, 64), (1, 9, 9), (7, 130, 17), (3, 300, 784)):
            made = turned(call, shape)
            alone = made.check(tier, BLOCKS, elementwise=True, pool=pool)
            for parts in (4, 7, 16):
                assert same_bits(made.run(tier, None, parts), alone), f"{parts} parts change bits on {shape}"
            check_activation(tier, turned(call, shape), lambda: wanted(call[2], shape), 0.0)  # noqa: B023


# ------------------------------------------------------------------------------------------------- a fused activation
@tiers
@pytest.mark.parametrize("slope", [0.0, exact(0.1)], ids=["relu", "leaky"])
@parametrize(ROW_KERNELS)
def test_activation(tier: str, call: Call, slope: float) -> None:
    """The bits of the product with a relu kernel after it, also at ties."""
    for shape in FEW:
        plain = case(call, shape)
        for operand in plain.inputs:
            if operand is not None and operand.kind == "rows":
                operand.value[0] = 0.0  # where nothing is added
        check_activation(tier, plain, lambda: wanted(call[2], shape), slope)  # noqa: B023


# ------------------------------------------------------------------------------------------------- a fused update
UPDATED = [call for call in SUMS if not call[2].startswith("-")]
SIGNS, FACTORS = (-1.0, 1.0), (exact(0.3), exact(0.7))


def check_update(tier: str, call: Call, shapes: list[Shape], scaled: bool, in_place: bool = True) -> None:
    """base + sign scale dw: the bits of the gradient with axpy after it (which of the two runs may depend on the other
    tasks of the batch)."""

    def formula(task, attrs, *operands):
        *inputs, base, scale, bias_base, bias_scale = operands
        terms = zip(KERNELS[call[0]](task, attrs, *inputs), (base, bias_base), SIGNS, (scale, bias_scale), strict=True)
        return tuple(g if to is None else to + sign * (g if by is None else by * g) for g, to, sign, by in terms)

    with Pool() as pool:
        for shape in shapes:
            plain = case(call, shape)
            gradients = plain.run(tier)
            for only in ("w", "b", "wb"):
                after, expected, outputs = [], [], []
                for which, g, o, sign, factor in zip("wb", gradients, plain.outputs, SIGNS, FACTORS, strict=True):
                    at = len(plain.inputs) + 2 + len(after)
                    add, scale = which in only and g is not None, scalar(factor) if scaled else None
                    (base,) = given(f"{which}base" if add else "-", shape)
                    after += [base, scale if add else None]
                    expected.append(axpy(tier, base.value, g, scale, sign) if add else g)
                    outputs.append(Operand(o.kind, None, o.shape, over=at) if add and in_place else o)
                extra = {"after": after, "formula": formula}
                made = Case(call[0], plain.inputs, plain.outputs, shape[0], plain.sizes, list(SIGNS), **extra)
                for made.outputs in (plain.outputs, outputs):
                    got = made.run(tier)
                    made.judge(got, tier, pool)
                    assert same_bits(got, expected)
                    assert same_bits(made.run(tier, parts=3), expected)


def axpy(tier: str, base: Tensor, gradient: Tensor, scale: Operand | None, sign: float) -> Tensor:
    inputs = [vector(base), vector(gradient), scale]
    return Case("axpy_fwd", inputs, [out("vector", *base.shape)], 1, [base.numel()], [sign]).run(tier)[0]


@tiers
@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "unscaled"])
@parametrize(UPDATED)
def test_update(tier: str, call: Call, scaled: bool) -> None:
    check_update(tier, call, [shape for shape in FEW if shape[0] < 97], scaled)


@tiers
@parametrize(UPDATED)
def test_update_over_many_rows(tier: str, call: Call) -> None:
    check_update(tier, call, MANY, True, in_place=False)
