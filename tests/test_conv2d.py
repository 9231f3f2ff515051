"""conv2d_*: every combination of absent operands over odd shapes, strides, paddings and kernels; blocks and teams; images as the caller has
them; layers that are too large for one strip."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import TIERS, Case, Operand, Pool, check_activation, exact, normal, out, same_bits

import fastmaml
from fastmaml.program import _window

# n, c, h, w, o, (kh, kw), stride, padding (top, bottom, left, right)
SHAPES = [
    (1, 1, 1, 1, 1, (1, 1), (1, 1), (0, 0, 0, 0)),
    (2, 1, 7, 5, 7, (3, 3), (1, 1), (1, 1, 1, 1)),
    (3, 3, 9, 9, 16, (3, 3), (2, 2), (0, 1, 0, 1)),  # TensorFlow's SAME
    (2, 7, 6, 8, 63, (3, 3), (1, 1), (1, 1, 1, 1)),
    (5, 16, 4, 4, 65, (3, 3), (2, 2), (1, 1, 1, 1)),
    (2, 64, 5, 3, 64, (3, 3), (1, 1), (1, 1, 1, 1)),
    (7, 63, 2, 2, 17, (2, 2), (1, 1), (0, 0, 0, 0)),
    (1, 5, 11, 7, 33, (5, 3), (3, 2), (2, 0, 1, 2)),
    (2, 17, 7, 7, 9, (1, 1), (2, 2), (0, 0, 0, 0)),  # pixels that no tap reaches
    (2, 2, 13, 13, 6, (7, 7), (2, 2), (3, 3, 3, 3)),
    (1, 4, 3, 3, 5, (3, 3), (1, 1), (2, 2, 2, 2)),
    (2, 32, 14, 14, 32, (3, 3), (1, 1), (1, 1, 1, 1)),
    (4, 16, 6, 5, 20, (3, 3), (1, 1), (0, 0, 0, 0)),  # in place, where the caller's own layout is not
    (60, 16, 1, 1, 16, (1, 1), (1, 1), (0, 0, 0, 0)),
]
LARGE = [
    (1, 40, 45, 47, 20, (3, 3), (1, 1), (1, 1, 1, 1)),  # several strips
    (1, 512, 5, 30, 80, (3, 3), (1, 1), (1, 1, 1, 1)),  # several cuts of the channels
    (1, 20, 6, 7, 300, (5, 5), (1, 1), (2, 2, 2, 2)),
    (1, 1, 40, 40, 3, (31, 31), (1, 1), (0, 0, 0, 0)),
    (1, 2, 3, 3000, 3, (3, 3), (1, 2), (1, 1, 1, 1)),  # cut columns
    (1, 64, 2, 100, 20, (1, 96), (1, 1), (0, 0, 1, 0)),  # weights of a row of taps that fit a quarter of a panel
]
KIND = {"x": "image", "y": "image", "w": "conv", "b": "vector"}

# "-": absent
ROW_KERNELS = [
    *(("conv2d_fwd", f"x w {b}", "y") for b in ("b", "-")),
    *(("conv2d_jvp", f"x w {t}", "yt") for t in ("xt wt bt", "xt wt -", "xt - bt", "xt - -", "- wt bt", "- wt -", "- - bt")),
    ("conv2d_bwd_input", "dy w", "dx"),
    *(("conv2d_bwd_input_jvp", t, "dxt") for t in ("dy w dyt wt", "dy w - wt", "dy w dyt -", "- w dyt -")),
]
SUMS = [
    *(("conv2d_bwd_weight", "x dy", wanted) for wanted in ("dw db", "dw -", "- db")),
    *(("conv2d_bwd_weight_jvp", "x dy xt dyt", wanted) for wanted in ("dwt dbt", "dwt -", "- dbt")),
    ("conv2d_bwd_weight_jvp", "x dy xt -", "dwt -"),
    *(("conv2d_bwd_weight_jvp", f"x {dy} - dyt", "dwt dbt") for dy in ("dy", "-")),
]
tiers = pytest.mark.parametrize("tier", TIERS)


def parametrize(calls):
    return pytest.mark.parametrize("call", calls, ids=lambda c: f"{c[0].removeprefix('conv2d_')}[{c[1]} > {c[2]}]")


def extents(shape) -> dict[str, tuple[int, ...]]:
    n, c, h, w, o, (kh, kw), (sh, sw), (top, bottom, left, right) = shape
    oh, ow = _window(h, kh, sh, top, bottom), _window(w, kw, sw, left, right)
    return {"x": (n, c, h, w), "y": (n, o, oh, ow), "w": (o, c, kh, kw), "b": (o,)}


def letter(name: str) -> str:
    return name.removeprefix("d")[0]


def case(call, shape, planes: bool = False) -> Case:
    kernel, inputs, outputs = call
    n, c, h, w, o, kernel_size, stride, padding = shape
    of = extents(shape)

    def given(name: str) -> Operand:
        kind = "plain" if planes and name == "x" else KIND[letter(name)]
        return Operand(kind, normal(*of[letter(name)], seed=sum(map(ord, name))))

    ins = [None if name == "-" else given(name) for name in inputs.split()]
    outs = [None if name == "-" else out(KIND[letter(name)], *of[letter(name)]) for name in outputs.split()]
    sizes = [c, h, w, o, *kernel_size, *stride, padding[0], padding[2], *of["y"][2:], int(planes)]
    attrs = {"stride": stride, "padding": padding, "input_shape": (c, h, w), "weight_shape": of["w"]}
    return Case(kernel, ins, outs, n, sizes, attrs=attrs)


@tiers
@parametrize(ROW_KERNELS + SUMS)
def test_kernel(tier: str, call) -> None:
    with Pool() as pool:
        for shape in SHAPES:
            whole = case(call, shape).check(tier, (1, 2), elementwise=call in ROW_KERNELS, pool=pool)
            if call[1].startswith("x"):
                assert same_bits(case(call, shape, planes=True).run(tier), whole), "the caller's layout changes bits"


@tiers
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_large(tier: str, shape) -> None:
    for call in (("conv2d_fwd", "x w b", "y"), ("conv2d_jvp", "x w xt wt bt", "yt"), ("conv2d_bwd_input", "dy w", "dx"),
                 ("conv2d_bwd_input_jvp", "dy w dyt wt", "dxt"), ("conv2d_bwd_weight", "x dy", "dw db"),
                 ("conv2d_bwd_weight_jvp", "x dy xt dyt", "dwt dbt")):
        case(call, shape).check(tier, ())


@tiers
@pytest.mark.parametrize("call", [("conv2d_bwd_input", "dy w", "dx"), ("conv2d_bwd_input_jvp", "dy w dyt wt", "dxt")], ids=lambda call: call[0])
def test_a_team_that_shares_channels(tier: str, call) -> None:
    """Few pixels, and weights that do not fit at once: what is brought together is of the whole panel, whoever works on a part of it."""
    shape = (1, 64, 3, 3, 512, (3, 3), (1, 1), (1, 1, 1, 1))
    alone = case(call, shape).check(tier, ())
    for parts in (2, 3, 4):
        assert same_bits(case(call, shape).run(tier, None, parts), alone), f"{parts} parts change bits"


@tiers
@pytest.mark.parametrize("slope", [0.0, exact(0.1)], ids=["relu", "leaky"])
@parametrize(ROW_KERNELS)
def test_activation(tier: str, call, slope: float) -> None:
    """The bits of the convolution with a relu kernel after it, also at ties, and where the sum is made in pieces: of strips, channels, rows of taps."""
    for shape in SHAPES + LARGE:
        plain = case(call, shape)
        for operand in plain.inputs:
            if operand is not None and operand.kind == "image" and len(operand.value) > 1:
                operand.value[0] = 0.0  # where nothing is added
        (wanted,) = plain.outputs
        check_activation(tier, plain, lambda: [out("image", *wanted.shape)], slope)  # noqa: B023


@pytest.mark.parametrize("net", [fastmaml.nn.DragenOmniglot, fastmaml.nn.CbfinnMiniImagenet], ids=["conv-relu-norm-pool", "conv-norm-relu-pool"])
def test_activations_are_no_calls_of_their_own(net) -> None:
    """Neither where they follow a convolution or a normalisation, nor where their reverse follows the transposed convolution."""
    channels, side = (1, 28) if net is fastmaml.nn.DragenOmniglot else (3, 84)
    x, y = torch.rand(2, 5, channels, side, side), torch.arange(5).expand(2, 5)
    maml = fastmaml.MAML(net(5), inner_steps=2, backend="cpu")
    executor = maml.runner(fastmaml.TaskBatch.of((x, y, x, y))).executor
    calls = [step.call.kernel for _, groups in executor.prepared(5, 5).lowering.phases for _, steps in groups for step in steps]
    assert calls.count("conv2d_fwd") >= 8 and "relu_fwd" not in calls and "relu_jvp" not in calls
    assert calls.count("relu_bwd") <= (0 if net is fastmaml.nn.DragenOmniglot else 4)  # the head's linear reverse is of a flat row
