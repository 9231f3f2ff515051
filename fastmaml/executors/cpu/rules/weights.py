"""Expressions of weights."""

from __future__ import annotations

from fastmaml.executors.cpu.native import Buffers, Native, channels_of, has_rows, one_shape, pixels_of, rule, width_of
from fastmaml.plan.instructions import Instruction


def _axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) > 4:
        raise NotImplementedError(f"a weight expression over {len(shape)} axes has no native kernel yet")
    return (1,) * (4 - len(shape)) + tuple(shape)


def _bits(shape: tuple[int, ...], whole: tuple[int, ...]) -> int:
    """Axes on which ``shape`` is broadcast to ``whole``."""
    return sum(1 << a for a, (p, q) in enumerate(zip(_axes(shape), _axes(whole), strict=True)) if p == 1 and q != 1)


@rule("add", "mul")
def expression(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    """add and mul of weights (broadcasting), add of rows."""
    op, _, mode = instr.kernel.partition("_")
    shape = lambda ref: buffers[ref.buffer].shape  # noqa: E731
    if op == "add" and mode in ("fwd", "jvp"):
        (x, y), z = instr.inputs, instr.outputs[0]
        if has_rows(instr, buffers):
            return Native("add_rows_fwd", (x, y, z), (channels_of(z, buffers),), pixels=pixels_of(z, buffers))
        if one_shape([x, y, z], buffers):
            return Native("add_fwd", (x, y, z), (width_of(z, buffers),))
        bits = [0 if ref is None else _bits(shape(ref), shape(z)) for ref in (x, y)]
        return Native("add_expr_fwd", (x, y, z), (*_axes(shape(z)), *bits), plain=True)
    if op == "add":
        dz, dx = instr.inputs[0], instr.outputs[0]
        return Native("sum_expr", (dz, None, None, None, dx), (*_axes(shape(dz)), _bits(shape(dx), shape(dz)), 0), plain=True)
    x, y = instr.inputs[:2]
    whole = tuple(max(p, q) for p, q in zip(_axes(shape(x)), _axes(shape(y)), strict=True))
    kernels = whole in (shape(x), shape(y)) and {shape(x), shape(y)} <= {whole, (*whole[:2], 1, 1)}  # a factor for each kernel of a convolution
    together = (0, 1, 2, 3, 4) if kernels else ()
    if mode in ("fwd", "jvp"):
        sizes = (*whole, _bits(shape(x), whole), _bits(shape(y), whole))
        return Native(f"mul_expr_{mode}", (*instr.inputs, *instr.outputs), sizes, plain=True, together=together[: len(instr.inputs) + 1])
    mine, other = (x, y) if instr.attrs["operand"] == 0 else (y, x)
    sizes = (*whole, _bits(shape(mine), whole), _bits(shape(other), whole))
    if mode == "bwd":
        terms = (instr.inputs[2], other, None, None)
    else:
        dz, other_t, dzt = instr.inputs[2:]
        terms = (*((dzt, other) if dzt else (None, None)), *((dz, other_t) if other_t else (None, None)))
    return Native("sum_expr", (*terms, instr.outputs[0]), sizes, plain=True, together=together)


@rule("matmul")
def matmul(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    """``together``: what has the columns of the product."""
    mode, z = instr.kernel.removeprefix("matmul_"), instr.outputs[0]
    x, y, *rest = instr.inputs
    (m, k), n = buffers[x.buffer].shape, buffers[y.buffer].shape[1]
    right, both = (1, 3, 4), (0, 1, 2, 3)
    if mode == "fwd":
        return Native("matmul_fwd", (x, y, None, None, z), (m, n, k, 0), plain=True, together=right)
    if mode == "jvp":
        return Native("matmul_fwd", (rest[0], y, x, rest[1], z), (m, n, k, 0), plain=True, together=right)
    dz, other_t, dzt = (rest[0], None, rest[0]) if mode == "bwd" else rest
    if instr.attrs["operand"] == 0:
        return Native("matmul_fwd", (dzt, y, dz if other_t else None, other_t, z), (m, k, n, 2), plain=True, together=both)
    return Native("matmul_fwd", (x, dzt, other_t, dz if other_t else None, z), (k, n, m, 1), plain=True, together=right)


@rule("transpose")
def transpose(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    x, y = instr.inputs[0], instr.outputs[0]
    return Native("transpose_fwd", (x, y), buffers[x.buffer].shape, plain=True)


@rule("slice")
def slice(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    a, (x,), (y,) = instr.attrs, instr.inputs, instr.outputs
    if buffers[y.buffer].rows:
        raise NotImplementedError("a slice of samples has no native kernel yet")
    shape, dim = a["input_shape"], a["dim"]
    outer = inner = 1
    for s in shape[:dim]:
        outer *= s
    for s in shape[dim + 1 :]:
        inner *= s
    kernel = "slice_bwd" if "bwd" in instr.kernel else "slice_fwd"
    return Native(kernel, (x, y), (outer, shape[dim], a["start"], a["stop"] - a["start"], inner), plain=True)
