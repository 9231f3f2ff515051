"""Trace rules for reshapes, indexing, sums, products with and of parameters, and types."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from fastmaml._trace.rules import Refusal, dims_of, rule

if TYPE_CHECKING:
    from fastmaml._trace.recorder import Recorder


def without_reshape(r: Recorder, value: int) -> int:
    made = r.producer(value)
    return made.inputs[0] if made is not None and made.name == "reshape" else value


def reshaped(r: Recorder, value: int, shape: Sequence[int]) -> int:
    """``value`` with a new shape (as torch sees it, sample axis included); no op where nothing changes."""
    shape, numel = [operator.index(size) for size in shape], math.prod(r.full_shape(value))
    if shape.count(-1) == 1:
        rest = -math.prod(shape)
        if not rest or numel % rest:
            raise Refusal(f"reshape to {_shown(r, shape)} does not divide {_shown(r, r.full_shape(value))}")
        shape[shape.index(-1)] = numel // rest
    if math.prod(shape) != numel or any(size < 0 for size in shape):
        raise Refusal(
            f"reshape of {_shown(r, r.full_shape(value))} to {_shown(r, shape)}: the numbers of elements differ"
        )
    if r.is_rows(value):
        if not shape or shape[0] != r.samples:
            change = f"{_shown(r, r.full_shape(value))} to {_shown(r, shape)}"
            raise Refusal(f"reshape of {change} mixes samples: the first axis must stay theirs")
        shape = shape[1:]
    if tuple(shape) == r.shape(value):
        return value
    source = without_reshape(r, value)
    return source if tuple(shape) == r.shape(source) else r.op("reshape", source, shape=tuple(shape))


def _shown(r: Recorder, shape: Sequence[int]) -> str:
    """A shape for a message: the number of samples as n."""
    n = r.samples
    return f"[{', '.join('n' if s == n else f'n*{s // n}' if s and s % n == 0 else str(s) for s in shape)}]"


def _sizes(shape: tuple) -> Sequence[int]:
    if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
        shape = shape[0]
    if any(isinstance(size, torch.dtype) for size in shape):
        raise Refusal("view as another dtype")
    return shape


@rule("view", "reshape")
def view(r: Recorder, input: Any, *shape: Any, size: Any = None, **named: Any) -> int:
    given = size if size is not None else named.get("shape", shape)
    return reshaped(r, r.use(input), _sizes(tuple(given)))


@rule("view_as", "reshape_as")
def view_as(r: Recorder, input: Any, other: torch.Tensor) -> int:
    return reshaped(r, r.use(input), tuple(other.shape))


@rule("flatten", "ravel")
def flatten(r: Recorder, input: Any, start_dim: int = 0, end_dim: int = -1) -> int:
    value = r.use(input)
    full = r.full_shape(value)
    start, end = dims_of(start_dim, max(len(full), 1))[0], dims_of(end_dim, max(len(full), 1))[0]
    return reshaped(r, value, (*full[:start], math.prod(full[start : end + 1]), *full[end + 1 :]))


@rule("unflatten")
def unflatten(r: Recorder, input: Any, dim: int, sizes: Any, names: Any = None) -> int:
    value = r.use(input)
    full = r.full_shape(value)
    axis = dims_of(dim, len(full))[0]
    sizes = [operator.index(size) for size in (sizes if isinstance(sizes, (tuple, list)) else (sizes,))]
    if -1 in sizes:
        sizes[sizes.index(-1)] = -(full[axis] // math.prod(sizes))
    return reshaped(r, value, (*full[:axis], *sizes, *full[axis + 1 :]))


@rule("squeeze")
def squeeze(r: Recorder, input: Any, dim: Any = None) -> int:
    value = r.use(input)
    full = r.full_shape(value)
    dims = range(len(full)) if dim is None else dims_of(dim, len(full))
    return reshaped(r, value, [size for i, size in enumerate(full) if size != 1 or i not in dims])


@rule("unsqueeze")
def unsqueeze(r: Recorder, input: Any, dim: int) -> int:
    value = r.use(input)
    full = r.full_shape(value)
    axis = dims_of(dim, len(full) + 1)[0]
    return reshaped(r, value, (*full[:axis], 1, *full[axis:]))


@rule("permute")
def permute(r: Recorder, input: Any, *dims: Any, **named: Any) -> int:
    """Of samples: where only axes of size 1 move; of a weight: a matrix may also be transposed."""
    value = r.use(input)
    full = r.full_shape(value)
    order = [d % len(full) for d in _sizes(tuple(named.get("dims", dims)))]
    moved = [d for d in order if full[d] != 1]
    if moved == sorted(moved):
        return reshaped(r, value, [full[d] for d in order])
    if not r.is_rows(value) and order == [1, 0]:
        return transposed(r, value)
    raise Refusal(f"permute{tuple(order)} of {_shown(r, full)} changes the order of the elements")


@rule("transpose", "swapaxes", "swapdims")
def transpose(r: Recorder, input: Any, dim0: int, dim1: int) -> int:
    rank = len(r.full_shape(r.use(input)))
    order = list(range(rank))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return permute(r, input, *order)


@rule("t", "T", "mT")
def t(r: Recorder, input: Any) -> int:
    rank = len(r.full_shape(r.use(input)))
    return r.use(input) if rank < 2 else permute(r, input, *reversed(range(rank)))


def transposed(r: Recorder, value: int) -> int:
    made = r.producer(value)
    return made.inputs[0] if made is not None and made.name == "transpose" else r.op("transpose", value)


@rule("select")
def select(r: Recorder, input: Any, dim: Any, index: Any) -> int:
    """Of a parameter per step the one of the step that runs."""
    value = r.use(input)
    if r.is_per_step(value):
        return value
    return getitem(r, input, (*[slice(None)] * (dim % len(r.full_shape(value))), index))


@rule("__getitem__")
def getitem(r: Recorder, input: Any, index: Any) -> int:
    value = r.use(input)
    items = list(index) if isinstance(index, tuple) else [index]
    rank = len(r.full_shape(value))
    if Ellipsis in [item for item in items if not isinstance(item, torch.Tensor)]:
        at = next(i for i, item in enumerate(items) if item is Ellipsis)
        items[at : at + 1] = [slice(None)] * (rank - sum(item is not None for item in items) + 1)
    shape, dim = [], 0
    for item in [*items, *[slice(None)] * (rank - sum(item is not None for item in items))]:
        if item is None:
            shape.append(1)
            continue
        size = r.full_shape(value)[dim] if dim < rank else 0
        if isinstance(item, slice) and item.step in (None, 1):
            start, stop, _ = item.indices(size)
            shape.append(stop - start)
        elif isinstance(item, int) and not isinstance(item, bool) and -size <= item < size:
            start, stop = item % size, item % size + 1
        else:
            raise Refusal(f"indexing with {item!r}: only slices of step 1 and single numbers are supported")
        value = _sliced(r, value, dim, start, stop)
        dim += 1
    return reshaped(r, value, shape)


def _sliced(r: Recorder, value: int, dim: int, start: int, stop: int) -> int:
    if (start, stop) == (0, r.full_shape(value)[dim]):
        return value
    if r.is_rows(value):
        raise Refusal("indexing takes a part of the samples or of their features")
    return r.op("slice", value, dim=dim, start=start, stop=stop)


@rule("add")
def add(r: Recorder, input: Any, other: Any, *, alpha: float = 1) -> int:
    if alpha != 1:
        raise Refusal("add with alpha is not supported")
    if isinstance(other, (int, float)) and other == 0:  # sum([x, y]) begins with 0
        return r.use(input)
    return add_values(r, r.use(input), r.use(other))


def add_values(r: Recorder, x: int, y: int) -> int:
    if r.is_rows(x) == r.is_rows(y):
        return r.op("add", x, y)
    rows, bias = (x, y) if r.is_rows(x) else (y, x)
    made = r.producer(rows)
    if made is None or made.name not in ("linear", "conv2d") or made.inputs[2] is not None:
        raise Refusal("adding a parameter to samples is supported as the bias of a linear or conv2d alone")
    out = r.shape(made.inputs[1])[0]
    shape = list(r.shape(bias))
    while shape and shape[0] == 1 and out != 1:
        shape.pop(0)
    if shape != ([out] if made.name == "linear" else [out, 1, 1]):
        raise Refusal(f"a parameter {list(r.shape(bias))} added to {made.name} with {out} outputs is no bias")
    return r.op(made.name, *made.inputs[:2], reshaped(r, bias, (out,)), **made.attrs)


@rule("addmm")
def addmm(r: Recorder, input: Any, mat1: Any, mat2: Any) -> int:
    return add_values(r, matmul(r, mat1, mat2), r.use(input))


@rule("matmul", "mm", "__matmul__")
def matmul(r: Recorder, input: Any, other: Any) -> int:
    x, w = r.use(input), r.use(other)
    if r.is_rows(w):
        raise Refusal("a matrix product with samples on its right side")
    if len(r.shape(w)) != 2 or not r.shape(x) or r.shape(x)[-1] != r.shape(w)[0]:
        raise Refusal(f"matrix product of {list(r.shape(x))} and {list(r.shape(w))}")
    if r.is_rows(x):
        return r.op("linear", x, transposed(r, w))  # linear holds its weight as [out, in]
    if len(r.shape(x)) != 2:
        raise Refusal(f"matrix product of {list(r.shape(x))} and {list(r.shape(w))}")
    return r.op("matmul", x, w)


@rule("mul", "multiply")
def mul(r: Recorder, input: Any, other: Any) -> int:
    x, y = r.use(input), r.use(other)
    if r.is_rows(x) or r.is_rows(y):
        raise Refusal("multiplying samples is not supported")
    return r.op("mul", x, y)


@rule("contiguous", "clone")
def same(r: Recorder, input: Any, *, memory_format: Any = None) -> int:
    return r.use(input)


@rule("to", "type", "type_as", "cpu", "cuda")
def cast(r: Recorder, input: torch.Tensor, *args: Any, **kwargs: Any) -> int:
    """A device means nothing in a Program; a dtype must be the model's."""
    wanted = [a.dtype if isinstance(a, torch.Tensor) else a for a in (*args, *kwargs.values())]
    other = next((a for a in wanted if isinstance(a, torch.dtype) and a != r.dtype), None)
    if other is not None:
        raise Refusal(f"a conversion to {other}; the model is {r.dtype}")
    return r.use(input)


def _cast_rule(name: str, dtype: torch.dtype) -> None:
    @rule(name)
    def convert(r: Recorder, input: torch.Tensor, *, memory_format: Any = None) -> int:
        return cast(r, input, dtype)


for _name, _dtype in {"float": torch.float32, "double": torch.float64, "half": torch.float16}.items():
    _cast_rule(_name, _dtype)
