"""The Program: a network as values and ops, before anything is known of meta-learning or of hardware.

A value is either a batch of samples (``rows=True``; ``shape`` is that of ONE sample) or a weight-like tensor (``rows=False``). Ops are in
static single assignment form: each makes one new value, and a value may be used any number of times. Leaves are the values that come from
outside: parameters, buffers, rates. A weight operand may be a leaf or an expression (``mul add matmul transpose reshape slice exp sigmoid``) over
leaves, which is how parameterisations and tied or rescaled weights enter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

ROLES = ("adapted", "outer", "const")


@dataclass(frozen=True)
class Value:
    """Shape of a value: of one sample if ``rows``, of the whole tensor otherwise."""

    shape: tuple[int, ...]
    rows: bool

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Leaf:
    """A value given from outside. ``role``: adapted in the inner loop | outer-learned only | const."""

    value: int
    name: str
    role: str
    home: str = "meta"  # "meta": one for all tasks; "task": one per task
    learned: bool = True  # of an adapted leaf: whether anybody asks for the gradient of its initial value
    per_step: bool = False  # another value at each inner step; the outer loss at theta_k reads that of the step before


@dataclass(frozen=True)
class Op:
    name: str
    inputs: tuple[int | None, ...]
    output: int
    attrs: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True)
class Program:
    """``input`` is the batch of samples, ``output`` the logits (or predictions); ``ops`` stand in execution order."""

    values: tuple[Value, ...]
    leaves: tuple[Leaf, ...]
    ops: tuple[Op, ...]
    input: int
    output: int

    def leaf(self, name: str) -> Leaf:
        return next(leaf for leaf in self.leaves if leaf.name == name)

    def with_roles(self, role_of: Callable[[str], str]) -> Program:
        """The same network with each leaf's role given by its name."""
        return replace(self, leaves=tuple(replace(leaf, role=role_of(leaf.name)) for leaf in self.leaves))

    def __str__(self) -> str:
        names = {leaf.value: leaf.name for leaf in self.leaves} | {self.input: "input"}

        def show(v: int | None) -> str:
            return "-" if v is None else names.get(v, f"%{v}")

        lines = [f"{leaf.role:8s}{leaf.name} {list(self.values[leaf.value].shape)}" for leaf in self.leaves]
        for op in self.ops:
            out = self.values[op.output]
            shape = ", ".join((["n"] if out.rows else []) + [str(s) for s in out.shape])
            attrs = "".join(f" {k}={v}" for k, v in op.attrs.items())
            lines.append(f"%{op.output} = {op.name}({', '.join(map(show, op.inputs))}){attrs}  # [{shape}]")
        return "\n".join([*lines, f"return {show(self.output)}"])


@dataclass(frozen=True)
class Loss:
    """Inner and outer loss. ``reduction``: "mean" (as torch), "sum", or a number that the sum is divided by (cbfinn: the shots)."""

    name: str = "cross_entropy"  # or "mse"
    reduction: str | float = "mean"
    label_smoothing: float = 0.0
    class_weight: bool = False  # per-class weights come as the const leaf CLASS_WEIGHT


CLASS_WEIGHT = "loss.class_weight"

# ---------------------------------------------------------------------------------------------------------------- shapes of the ops


def _window(size: int, kernel: int, stride: int, before: int, after: int) -> int:
    out = (size + before + after - kernel) // stride + 1
    if out < 1 or size + before + after < kernel:
        raise ValueError(f"a window of {kernel} does not fit an image side of {size} (padding {before}+{after})")
    return out


def _linear(attrs: Mapping[str, Any], x: Value, w: Value, b: Value | None = None) -> Value:
    if len(w.shape) != 2 or x.shape[-1:] != w.shape[1:]:
        raise ValueError(f"linear: input {list(x.shape)} does not fit weight {list(w.shape)} [out, in]")
    return Value((*x.shape[:-1], w.shape[0]), True)


def _conv2d(attrs: Mapping[str, Any], x: Value, w: Value, b: Value | None = None) -> Value:
    if len(x.shape) != 3 or x.shape[0] != w.shape[1]:
        raise ValueError(f"conv2d: input {list(x.shape)} does not fit weight {list(w.shape)} [out, in, kh, kw]")
    (sh, sw), (top, bottom, left, right) = attrs["stride"], attrs["padding"]
    h = _window(x.shape[1], w.shape[2], sh, top, bottom)
    return Value((w.shape[0], h, _window(x.shape[2], w.shape[3], sw, left, right)), True)


def _pool2d(attrs: Mapping[str, Any], x: Value) -> Value:
    if len(x.shape) != 3:
        raise ValueError(f"pooling needs images [c, h, w], got {list(x.shape)}")
    (kh, kw), (sh, sw), (ph, pw) = attrs["kernel"], attrs["stride"], attrs["padding"]
    return Value((x.shape[0], _window(x.shape[1], kh, sh, ph, ph), _window(x.shape[2], kw, sw, pw, pw)), True)


def _pad2d(attrs: Mapping[str, Any], x: Value) -> Value:
    top, bottom, left, right = attrs["padding"]
    return Value((x.shape[0], x.shape[1] + top + bottom, x.shape[2] + left + right), True)


def _reshape(attrs: Mapping[str, Any], x: Value) -> Value:
    if math.prod(attrs["shape"]) != x.numel:
        raise ValueError(f"reshape: {list(x.shape)} has {x.numel} elements, {list(attrs['shape'])} does not")
    return Value(tuple(attrs["shape"]), x.rows)


def _broadcast(attrs: Mapping[str, Any], x: Value, y: Value) -> Value:
    if x.rows != y.rows or (x.rows and x.shape != y.shape):
        raise ValueError(f"elementwise op on {x} and {y}: samples need equal shapes, and weights go with weights")
    a, b = x.shape, y.shape
    n = max(len(a), len(b))
    a, b = (1,) * (n - len(a)) + a, (1,) * (n - len(b)) + b
    if any(p != q and 1 not in (p, q) for p, q in zip(a, b, strict=True)):
        raise ValueError(f"shapes {list(x.shape)} and {list(y.shape)} do not broadcast")
    return Value(tuple(max(p, q) for p, q in zip(a, b, strict=True)), x.rows)


def _slice(attrs: Mapping[str, Any], x: Value) -> Value:
    dim, start, stop = attrs["dim"], attrs["start"], attrs["stop"]
    return Value((*x.shape[:dim], stop - start, *x.shape[dim + 1 :]), x.rows)


def _same(attrs: Mapping[str, Any], x: Value, *rest: Value | None) -> Value:
    return x


@dataclass(frozen=True)
class OpSpec:
    """Operands in order (a trailing ``?`` marks an optional one), attribute names, and the shape of the result."""

    operands: tuple[str, ...]
    attrs: tuple[str, ...]
    shape: Callable[..., Value]


_UNARY = OpSpec(("x",), (), _same)

OPS: Mapping[str, OpSpec] = {
    "linear": OpSpec(("x", "w", "b?"), (), _linear),  # w [out, in]
    "conv2d": OpSpec(("x", "w", "b?"), ("stride", "padding"), _conv2d),  # padding: top, bottom, left, right
    # statistics: "batch" | "support" | "running" | "joint" (of support and query together; not in the inner loop); the running_* operands are given for "running" alone
    "batchnorm": OpSpec(("x", "gamma?", "beta?", "running_mean?", "running_var?"), ("eps", "statistics"), _same),
    "batchnorm_maxpool2d": OpSpec(  # made by plan/pooling.py alone
        ("x", "gamma?", "beta?", "running_mean?", "running_var?"),
        ("eps", "statistics", "kernel", "stride", "padding"),
        lambda attrs, x, *_: _pool2d(attrs, x),
    ),
    "layernorm": OpSpec(("x", "gamma?", "beta?"), ("eps", "dims"), _same),  # dims: how many trailing axes are normalised
    "groupnorm": OpSpec(("x", "gamma?", "beta?"), ("eps", "groups"), _same),
    "relu": _UNARY,
    "leaky_relu": OpSpec(("x",), ("slope",), _same),
    "tanh": _UNARY,
    "sigmoid": _UNARY,
    "exp": _UNARY,
    "elu": OpSpec(("x",), ("alpha",), _same),
    "gelu": OpSpec(("x",), ("approximate",), _same),  # "none" | "tanh"
    "silu": _UNARY,
    "softplus": OpSpec(("x",), ("beta", "threshold"), _same),
    "maxpool2d": OpSpec(("x",), ("kernel", "stride", "padding"), _pool2d),
    "avgpool2d": OpSpec(("x",), ("kernel", "stride", "padding", "count_include_pad"), _pool2d),
    "global_avgpool2d": OpSpec(("x",), (), lambda attrs, x: Value(x.shape[:1], True)),  # mean over h and w: [c, h, w] -> [c]
    "pad2d": OpSpec(("x",), ("padding",), _pad2d),  # zeros: top, bottom, left, right
    "reshape": OpSpec(("x",), ("shape",), _reshape),  # shape of one sample, or of the weight
    "add": OpSpec(("x", "y"), (), _broadcast),
    # weight expressions only
    "mul": OpSpec(("x", "y"), (), _broadcast),
    "matmul": OpSpec(("x", "y"), (), lambda attrs, x, y: Value((x.shape[0], y.shape[1]), False)),
    "transpose": OpSpec(("x",), (), lambda attrs, x: Value(x.shape[::-1], False)),  # of a matrix
    "slice": OpSpec(("x",), ("dim", "start", "stop"), _slice),
    # a whole nn.Module as one op (the autograd executor): any number of leaves after x
    "module": OpSpec(("x",), ("function", "leaves", "shape"), lambda attrs, x, *leaves: Value(tuple(attrs["shape"]), True)),
}


class ProgramBuilder:
    """Appends leaves and ops, checking operands and inferring shapes; ``build(output)`` returns the Program without dead ops."""

    def __init__(self, input_shape: tuple[int, ...]) -> None:
        self.values: list[Value] = [Value(tuple(input_shape), True)]
        self.leaves: list[Leaf] = []
        self.ops: list[Op] = []
        self.input = 0

    def leaf(self, name: str, shape: tuple[int, ...], role: str, home: str = "meta") -> int:
        if role not in ROLES:
            raise ValueError(f"leaf {name!r}: role {role!r} is not one of {', '.join(ROLES)}")
        self.values.append(Value(tuple(shape), False))
        self.leaves.append(Leaf(len(self.values) - 1, name, role, home))
        return len(self.values) - 1

    def op(self, name: str, *inputs: int | None, **attrs: Any) -> int:
        spec = OPS[name]
        if sorted(attrs) != sorted(spec.attrs):
            raise ValueError(f"{name} needs attributes {spec.attrs}, got {tuple(attrs)}")
        required = sum(not operand.endswith("?") for operand in spec.operands)
        if name != "module" and not required <= len(inputs) <= len(spec.operands):
            raise ValueError(f"{name} takes operands {spec.operands}, got {len(inputs)}")
        if name != "module":
            inputs = (*inputs, *([None] * (len(spec.operands) - len(inputs))))
        shape = spec.shape(attrs, *(None if v is None else self.values[v] for v in inputs))
        self.values.append(shape)
        self.ops.append(Op(name, tuple(inputs), len(self.values) - 1, MappingProxyType(dict(attrs))))
        return len(self.values) - 1

    def build(self, output: int) -> Program:
        needed, ops = {output}, []
        for op in reversed(self.ops):
            if op.output in needed:
                needed.update(v for v in op.inputs if v is not None)
                ops.append(op)
        leaves = tuple(leaf for leaf in self.leaves if leaf.value in needed)
        return Program(tuple(self.values), leaves, tuple(reversed(ops)), self.input, output)
