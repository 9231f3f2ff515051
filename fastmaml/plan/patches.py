"""An exact rewrite of a Program: batch statistics of a convolution of the samples from the moments of its patches.

Where the input of a convolution is data, its patches p [taps * channels] have a mean m and a covariance C that no inner step changes. Of z = W * x, channel c,

    mean_c = w_c . m        var_c = w_c^T C w_c

without a pass over z, and dz = gamma rstd dy pixel by pixel: what the statistics' share of it adds to dW is, of s1 = sum dy and s2 = sum dy xhat,

    dW_c += -gamma rstd (s1 m + rstd s2 C w_c)

So no reduction stands between a convolution and its normalisation, its activation and the next layer, nor between these and its weight gradient on the way
back: one walk over the rows in each direction. A bias of the convolution moves z and mean alike: these passes leave it out, and its gradient is zero.

It pays where patches are small beside what the inner loop makes of them (``_pays``). The query rows are seen once or twice: they keep the ordinary way.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from fastmaml.plan.dependence import levels
from fastmaml.plan.instructions import Operand
from fastmaml.plan.passes import Pass
from fastmaml.plan.rule import Rule, dots_of, values_of
from fastmaml.program import Op, Program, Value

NORMS = ("batchnorm", "batchnorm_maxpool2d")
MOST = 160  # taps * channels: executors have room for the products of so many
# Multiply-adds for each element of z that the moments save: sum and squares; (s1 + xhat s2) / N; the tangents of both (costs.ELEMENTWISE)
FORWARD, BACKWARD, HVP = 2, 1, 4


def statistics_from_patches(program: Program, entry: str, steps: int, products: int) -> Program:
    """``steps``: gradients of the support rows; ``products``: Hessian-vector products."""
    statistics = {op.attrs["statistics"] for op in program.ops if op.name in NORMS}
    if "joint" in statistics:  # there are no passes over the support rows alone
        return program
    level, data = levels(program, entry), _data(program)
    readers: dict[int, list[Op]] = {}
    for op in program.ops:
        for v in op.inputs:
            if v is not None:
                readers.setdefault(v, []).append(op)
    values, ops = list(program.values), []
    moments: dict[tuple[object, ...], int] = {}
    for op in program.ops:
        norm = next(iter(readers.get(op.output, ())), None)
        alone = norm is not None and len(readers[op.output]) == 1 and op.output != program.output and norm.inputs[0] == op.output
        fits = op.name == "conv2d" and op.inputs[0] in data and level[op.output] == "step" and alone and norm.name in NORMS
        if fits and norm.attrs["statistics"] in ("batch", "support") and _pays(program, op, steps, products):
            x, w = op.inputs[:2]
            outputs, *patch = values[w].shape
            key = (x, *patch, *op.attrs["stride"], *op.attrs["padding"])
            size = patch[0] * patch[1] * patch[2]
            if key not in moments:
                values.append(Value((2, size + 1, size), False))
                moments[key] = len(values) - 1
                ops.append(Op("patch_moments", (x,), moments[key], MappingProxyType({**op.attrs, "patch": tuple(patch), "pixels": values[op.output].shape[1:]})))
            values.append(Value((outputs,), False))
            attrs = {"of": op.output, "norm": norm.output, "gamma": norm.inputs[1], "eps": norm.attrs["eps"]}
            ops.append(Op("patch_stats", (moments[key], w), len(values) - 1, MappingProxyType(attrs)))
        ops.append(op)
    return replace(program, values=tuple(values), ops=tuple(ops))


def _data(program: Program) -> set[int]:
    """Values that hold the samples, in any shape, and zeros around them."""
    data = {program.input}
    for op in program.ops:
        if op.name in ("reshape", "pad2d") and op.inputs[0] in data:
            data.add(op.output)
    return data


def _pays(program: Program, conv: Op, steps: int, products: int) -> bool:
    """By the multiply-adds for each pixel of z: those of the moments, once, and those that they save in every pass."""
    outputs, *patch = program.values[conv.inputs[1]].shape
    size = patch[0] * patch[1] * patch[2]
    saved = (FORWARD + BACKWARD) * steps + HVP * products
    return size <= MOST and size * (size + 1) <= 2 * saved * outputs


# ---------------------------------------------------------------------------------------------------------------- rules
def patch_moments() -> Rule:
    """m and C of data alone: they have no derivatives. In two numbers each, whose sum has the digits of a double."""

    def fwd(p: Pass, op: Op) -> None:
        if p.extent == "support":
            p.emit("patch_moments_fwd", values_of(p, op), (p.value[op.output],), **op.attrs)

    def none(p: Pass, op: Op) -> None:
        return None

    return Rule(fwd, none, none, none)


def patch_stats() -> Rule:
    """mean and rstd where ``Pass.from_patches`` says so: the rule of the normalisation reads them (norms.py), and leaves s1 and s2 in ``bar_sums``."""

    def fwd(p: Pass, op: Op) -> None:
        if op.attrs["of"] in p.from_patches and (op.output, "mean") not in p.saved:
            channels = p.program.values[op.output].shape
            out = (p.save(op, "mean", channels, False), p.save(op, "rstd", channels, False))
            p.emit("patch_stats_fwd", values_of(p, op), out, eps=op.attrs["eps"])

    def jvp(p: Pass, op: Op) -> Operand:
        (moments, w), (_, wt) = values_of(p, op), dots_of(p, op)
        if op.attrs["of"] in p.from_patches and wt is not None:
            channels = p.program.values[op.output].shape
            out = (p.new(f"tmean{op.output}", channels, False), p.new(f"trstd{op.output}", channels, False))
            p.emit("patch_stats_jvp", (moments, w, p.saved[op.output, "rstd"], wt), out)
            p.dot_stats[op.output] = out
        return None

    def bwd(p: Pass, op: Op) -> None:
        inputs = (*values_of(p, op), p.value.get(op.attrs["gamma"]), p.saved[op.output, "rstd"], *p.bar_sums[op.attrs["norm"]])
        p.add_bar(op.inputs[1], lambda dw: p.emit("patch_stats_bwd", inputs, (dw,)))

    def bwd_jvp(p: Pass, op: Op) -> None:
        (_, wt), gamma, gamma_t = dots_of(p, op), *(table.get(op.attrs["gamma"]) for table in (p.value, p.dot))
        sums, sums_t = (table.get(op.attrs["norm"], (None, None)) for table in (p.bar_sums, p.bar_sums_dot))
        _, rstd_t = p.dot_stats.get(op.output, (None, None))
        if not any((*sums_t, sums[0] and (wt or gamma_t))):
            return
        inputs = (*values_of(p, op), gamma, p.saved[op.output, "rstd"], *sums, wt, gamma_t, rstd_t, *sums_t)
        p.add_bar(op.inputs[1], lambda dw: p.emit("patch_stats_bwd_jvp", inputs, (dw,)), dot=True)

    return Rule(fwd, jvp, bwd, bwd_jvp)

