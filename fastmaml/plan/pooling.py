"""Exact rewrites of a Program around max pooling: do first what leaves least to do.

**Pool before the activation.** ReLU is monotone, so max(relu(x)) = relu(max(x)) over each window, and their gradients agree: where the maximum is not
positive, both are zero. The activation, its mask and its tangents are then of the pooled image.

**Pool before normalising.** y = gamma (x - mean) rstd + beta is monotone in x for each channel, rising or falling with the sign of gamma: the maximum of y is
y of the maximum or the minimum of x (with gamma = 0 of the first element, as torch chooses among equals). Only the statistics, and their share of the gradient, are
of all pixels. For windows that do not overlap.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from fastmaml.program import Op, Program, Value

MONOTONE = ("relu", "leaky_relu")


def pool_first(program: Program) -> Program:
    """max pooling moves before the activation and the batch norm in front of it."""
    return _merge_norms(program, *_swap(program))


def _uses(ops: list[Op], program: Program) -> dict[int, int]:
    uses = {program.output: 1}
    for op in ops:
        for v in op.inputs:
            if v is not None:
                uses[v] = uses.get(v, 0) + 1
    return uses


def _producer(ops: list[Op], pool: Op, uses: dict[int, int]) -> Op | None:
    """The op that makes the pool's input, where nobody else reads it."""
    v = pool.inputs[0]
    return next((op for op in ops if op.output == v), None) if uses[v] == 1 else None


def _swap(program: Program) -> tuple[list[Op], list[Value]]:
    """x -> activation -> pool becomes x -> pool -> activation; the values in between keep their numbers, in the pooled shape."""
    ops, values = list(program.ops), list(program.values)
    uses = _uses(ops, program)
    for pool in program.ops:
        before = _producer(ops, pool, uses) if pool.name == "maxpool2d" else None
        if before is None or before.name not in MONOTONE or before.attrs.get("slope", 0.0) < 0:
            continue
        values[before.output] = values[pool.output]
        ops[ops.index(before)] = replace(pool, inputs=before.inputs, output=before.output)
        ops[ops.index(pool)] = replace(before, inputs=(before.output,), output=pool.output)
    return ops, values


def _merge_norms(program: Program, ops: list[Op], values: list[Value]) -> Program:
    uses = _uses(ops, program)
    for pool in [op for op in ops if op.name == "maxpool2d"]:
        norm = _producer(ops, pool, uses)
        tiles = all(k <= s for k, s in zip(pool.attrs["kernel"], pool.attrs["stride"], strict=True)) and not any(pool.attrs["padding"])
        if norm is None or norm.name != "batchnorm" or not tiles:
            continue
        attrs = MappingProxyType({**norm.attrs, **pool.attrs})
        ops[ops.index(pool)] = Op("batchnorm_maxpool2d", norm.inputs, pool.output, attrs)
        ops.remove(norm)
    return replace(program, ops=tuple(ops), values=tuple(values))
