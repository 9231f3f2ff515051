"""An exact rewrite of a Program before it is planned: the cheaper order of the products that the inner loop makes at every step.

    x (P Q)^t        = (x Q^t) P^t              T-nets, and any weight that is a product; with a bias P c, (x Q^t + c) P^t
    x (W + P Q)^t    = x W^t + (x Q^t) P^t      low rank

With n rows, P [out, r] and Q [r, in], composing the weight costs out r in, and running the factors n r (in + out): few-shot tasks have few rows. A product
that no adapted leaf reaches is made once per meta-iteration, and a convolution has many pixels: these stay composed.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from fastmaml.program import Op, Program, Value

NOTHING = MappingProxyType({})


def reassociate(program: Program, rows: int) -> Program:
    """``rows``: of the largest support set."""
    values, ops = list(program.values), []
    moving = _moving(program)
    made = {op.output: op for op in program.ops}
    uses: dict[int, int] = {}
    for v in (v for op in program.ops for v in op.inputs if v is not None):
        uses[v] = uses.get(v, 0) + 1

    def product(v: int) -> Op | None:
        """The matmul that makes v, if it is made at every step and for nobody else."""
        op = made.get(v)
        return op if op is not None and op.name == "matmul" and v in moving and uses[v] == 1 else None

    def new(shape: tuple[int, ...]) -> int:
        values.append(Value(shape, True))
        return len(values) - 1

    def inner_bias(bias: int | None, left: int) -> int | None:
        """c, where the bias is reshape(left reshape(c))."""
        flat = made.get(bias)
        found = made.get(flat.inputs[0]) if flat is not None and flat.name == "reshape" and uses[bias] == 1 else None
        if found is None or found.name != "matmul" or found.inputs[0] != left or uses[found.output] != 1:
            return None
        column = made.get(found.inputs[1])
        c = column.inputs[0] if column is not None and column.name == "reshape" else None
        return c if c is not None and values[c].shape == values[left].shape[1:] else None

    def factors(x: int, op: Op, bias: int | None, out: int) -> None:
        left, right = op.inputs
        inner = new((values[right].shape[0],))
        c = inner_bias(bias, left)
        ops.append(Op("linear", (x, right, c), inner, NOTHING))
        ops.append(Op("linear", (inner, left, bias if c is None else None), out, NOTHING))

    for op in program.ops:
        x, w, b = op.inputs if op.name == "linear" and len(program.values[op.inputs[0]].shape) == 1 else (None, None, None)
        if w is not None and (whole := product(w)) is not None and _pays(program, whole, rows, alone=True):
            factors(x, whole, b, op.output)
            continue
        parts = made.get(w) if w is not None else None
        if parts is not None and parts.name == "add" and uses[w] == 1:
            found = next((i for i, v in enumerate(parts.inputs) if (p := product(v)) is not None and _pays(program, p, rows, alone=False)), None)
            rest = None if found is None else parts.inputs[1 - found]
            if found is not None and values[rest].shape == values[w].shape:
                one, two = new(values[op.output].shape), new(values[op.output].shape)
                ops.append(Op("linear", (x, rest, b), one, NOTHING))
                factors(x, made[parts.inputs[found]], None, two)
                ops.append(Op("add", (one, two), op.output, NOTHING))
                continue
        ops.append(op)
    return replace(program, values=tuple(values), ops=_read(ops, program.output))


def _pays(program: Program, op: Op, rows: int, alone: bool) -> bool:
    """``alone``: the product is the whole weight, which then is not run itself."""
    (out, r), inputs = program.values[op.inputs[0]].shape, program.values[op.inputs[1]].shape[1]
    composed = out * r * inputs + (rows * out * inputs if alone else 0)
    return rows * r * (inputs + out) < composed


def _moving(program: Program) -> set[int]:
    """Values that depend on an adapted leaf."""
    found = {leaf.value for leaf in program.leaves if leaf.role == "adapted"}
    for op in program.ops:
        if any(v in found for v in op.inputs):
            found.add(op.output)
    return found


def _read(ops: list[Op], output: int) -> tuple[Op, ...]:
    """Without the products that nobody reads any more."""
    needed, kept = {output}, []
    for op in reversed(ops):
        if op.output in needed:
            needed.update(v for v in op.inputs if v is not None)
            kept.append(op)
    return tuple(reversed(kept))
