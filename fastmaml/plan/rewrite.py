"""Exact rewrites of a Program before it is planned.

**Factored first layers.** The gradient of a linear layer whose input x is data has the rank of the batch: dW = delta^T x. With a scalar rate the
adapted weight is therefore always W_k = W_0 + D_k^T x_s, D_{k+1} = D_k - rate_k delta_k, and

    x W_k^T = x W_0^T + (x x_s^T) D_k = A + G D_k

A is made once per meta-iteration for all tasks in one product, the Gram matrix G once per task; an inner step and its HVP then cost n_support instead of
in_features per output. D_bar = x_s W_bar^T takes the place of theta_bar, and the gradient of W_0 is that of A: one product over all tasks at the end.
It pays where a task has fewer support rows than the layer has inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from fastmaml.program import Leaf, Op, Program, Value

STATE = ".factor"  # D of the layer with weight <name> is called <name>.factor


@dataclass(frozen=True)
class Factored:
    """What became of one layer: the values of A, G and D."""

    weight: str
    base: int
    gram: int
    state: int


def factor_first_layers(
    program: Program, scalar_rate: Mapping[str, bool], support_rows: int
) -> tuple[Program, tuple[Factored, ...]]:
    """``scalar_rate``: adapted leaves whose rate is one number for the whole tensor; ``support_rows``: of the largest task."""
    data = _data(program)
    uses: dict[int, int] = {}
    for op in program.ops:
        for v in op.inputs:
            if v is not None:
                uses[v] = uses.get(v, 0) + 1
    leaves = {leaf.value: leaf for leaf in program.leaves}
    values, ops, done = list(program.values), [], []
    for op in program.ops:
        w = leaves.get(op.inputs[1]) if op.name == "linear" else None
        fits = w is not None and w.role == "adapted" and w.home == "meta" and scalar_rate.get(w.name, False)
        one_row = fits and len(program.values[op.inputs[0]].shape) == 1
        if not one_row or op.inputs[0] not in data or uses[w.value] > 1 or 2 * support_rows > values[w.value].shape[1]:
            ops.append(op)
            continue
        x, _, b = op.inputs
        base, gram, state = range(len(values), len(values) + 3)
        values += [values[op.output], Value((), True), values[op.output]]
        ops.append(Op("linear", (x, w.value, None), base))
        ops.append(Op("gram", (x,), gram))
        ops.append(Op("factored_linear", (base, gram, state, b), op.output, MappingProxyType({})))
        done.append(Factored(w.name, base, gram, state))
    if not done:
        return program, ()
    weights = {f.weight for f in done}
    kept = tuple(replace(leaf, role="outer" if leaf.learned else "const") if leaf.name in weights else leaf for leaf in program.leaves)
    states = tuple(Leaf(f.state, f.weight + STATE, "adapted") for f in done)
    return replace(program, values=tuple(values), ops=tuple(ops), leaves=kept + states), tuple(done)


def _data(program: Program) -> set[int]:
    """Values that are the samples themselves, or a reshape of them."""
    data = {program.input}
    for op in program.ops:
        if op.name == "reshape" and op.inputs[0] in data:
            data.add(op.output)
    return data
