"""Expressions of weights, and sums of rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from fastmaml.executors.triton.site import Attrs, Site, Views, blocks, data, power, rule, step
from fastmaml.executors.triton.storage import View
from fastmaml.kernels import expression

Pair = tuple[View | None, View | None]
Axes = list[tuple[int, dict[str, int]]]  # size, and stride by operand


def contract(s: Site, y: View, pairs: Sequence[Pair], out: Axes, reduced: Axes = ()) -> None:
    """y = the sum over ``reduced`` of a b + c d, for the pairs that are there. Operands are called a, b, c, d, y."""
    (a, b), (c, d) = (*pairs, (None, None))[:2]
    out = [axis for axis in out if axis[0] != 1] or [(1, {})]
    reduced = [axis for axis in reduced if axis[0] != 1] or [(1, {})]
    used = [*out, *reduced]
    if len(used) > expression.AXES.value:
        raise NotImplementedError(f"an expression of weights over {len(used)} axes: at most {expression.AXES.value}")
    rest = [0] * (expression.AXES.value - len(used))
    table = [axis[0] for axis in used] + rest
    for name in "abcdy":
        table += [axis[1].get(name, 0) for axis in used] + rest
    n = math.prod(axis[0] for axis in out)
    args = dict(table=s.table(table), a=data(a), b=data(b), c=data(c), d=data(d), y=y.data, n=n, reduced=math.prod(axis[0] for axis in reduced))
    args |= dict(a_task=step(a), b_task=step(b), c_task=step(c), d_task=step(d), y_task=y.task, OUT=len(out), AXES_USED=len(used))
    size = power(n, 16, 256)
    s.launch(expression.contract, (blocks(n, size), s.tasks if y.task else 1), **args, BLOCK=size)


def _full(*views: View | None) -> tuple[int, ...]:
    """The shape that operands broadcast to."""
    return tuple(torch.broadcast_shapes(*(v.shape for v in views if v is not None)))


def broadcast(s: Site, y: View, full: tuple[int, ...], pairs: Sequence[Pair]) -> None:
    """y = the sum of the products, summed over the axes of ``full`` that y does not have."""
    pairs = [pair for pair in pairs if pair[0] is not None]

    def strides(view: View) -> list[int]:
        missing = len(full) - len(view.shape)
        return [0] * missing + [0 if n == 1 else at for n, at in zip(view.shape, view.strides, strict=True)]

    operands = dict(zip("abcd", [v for pair in (*pairs, (None, None))[:2] for v in pair], strict=True)) | {"y": y}
    of = {name: strides(v) for name, v in operands.items() if v is not None}
    mine = (1,) * (len(full) - len(y.shape)) + y.shape
    axes: list[Axes] = [[], []]
    for k, n in enumerate(full):
        summed = mine[k] == 1 and n > 1
        axes[summed].append((n, {name: at[k] for name, at in of.items()}))
    contract(s, y, pairs, *axes)


@rule("add_fwd", "add_jvp")
def add_fwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    (x, y), (z,) = inputs, outputs
    if z.rows or all(v is None or v.shape == z.shape for v in (x, y)):
        return s.axpy(z, x, None, y)
    return broadcast(s, z, z.shape, [(x, None), (y, None)])


@rule("add_bwd", "add_bwd_jvp")
def add_bwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    broadcast(s, outputs[0], inputs[0].shape, [(inputs[0], None)])


@rule("mul_fwd")
def mul_fwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    broadcast(s, outputs[0], outputs[0].shape, [tuple(inputs)])


def _both(*pairs: Pair) -> list[Pair]:
    return [pair for pair in pairs if None not in pair]


@rule("mul_jvp")
def mul_jvp(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    x, y, xt, yt = inputs
    broadcast(s, outputs[0], outputs[0].shape, _both((xt, y), (x, yt)))


@rule("mul_bwd")
def mul_bwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    x, y, dz = inputs
    broadcast(s, outputs[0], dz.shape, [(dz, y if attrs["operand"] == 0 else x)])


@rule("mul_bwd_jvp")
def mul_bwd_jvp(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    x, y, dz, other_t, dzt = inputs
    pairs = _both((dzt, y if attrs["operand"] == 0 else x), (dz, other_t))
    broadcast(s, outputs[0], _full(*pairs[0]), pairs)


def _turn(view: View | None, shape: tuple[int, ...]) -> View | None:
    return None if view is None else replace(view, shape=shape)


def _matmul(s: Site, out: View, pairs: Sequence[Pair], left: str = "ik", right: str = "kj") -> None:
    """out[i, j] = sum_k over the pairs, whose axes are named."""
    pairs = _both(*pairs)
    sizes: dict[str, int] = {}
    strides: dict[str, dict[str, int]] = {"i": {"y": out.strides[0]}, "j": {"y": out.strides[1]}, "k": {}}
    for (p, q), (a, b) in zip(pairs, ("ab", "cd"), strict=False):
        for view, name, axes in ((p, a, left), (q, b, right)):
            for axis, n, at in zip(axes, view.shape, view.strides, strict=True):
                sizes[axis] = n
                strides[axis][name] = at
    contract(s, out, pairs, [(sizes["i"], strides["i"]), (sizes["j"], strides["j"])], [(sizes["k"], strides["k"])])


@rule("matmul_fwd")
def matmul_fwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    _matmul(s, outputs[0], [tuple(inputs)])


@rule("matmul_jvp")
def matmul_jvp(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    x, y, xt, yt = inputs
    _matmul(s, outputs[0], [(xt, y), (x, yt)])


@rule("matmul_bwd", "matmul_bwd_jvp")
def matmul_bwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    x, y, dz, other_t, dzt = (*inputs, None, None)[:5]
    tangent = len(inputs) > 3
    if attrs["operand"] == 0:  # dz y^T
        return _matmul(s, outputs[0], [(dzt, y), (dz, other_t)] if tangent else [(dz, y)], right="jk")
    return _matmul(s, outputs[0], [(x, dzt), (other_t, dz)] if tangent else [(x, dz)], left="ki")


@rule("transpose_fwd", "transpose_jvp", "transpose_bwd", "transpose_bwd_jvp")
def transpose_fwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    (x,), (y,) = inputs, outputs
    contract(s, y, [(x, None)], [(n, {"a": x.strides[1 - k], "y": y.strides[k]}) for k, n in enumerate(y.shape)])


def _part(view: View, attrs: Attrs) -> tuple[View, tuple[int, ...]]:
    """The slice of a weight, and its strides."""
    start = attrs["start"] * view.strides[attrs["dim"]]
    return replace(view, data=view.data[start:]), view.strides


@rule("slice_fwd", "slice_jvp")
def slice_fwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    (x,), (y,) = inputs, outputs
    part, strides = _part(x, attrs)
    contract(s, y, [(part, None)], [(n, {"a": strides[k], "y": y.strides[k]}) for k, n in enumerate(y.shape)])


@rule("slice_bwd", "slice_bwd_jvp")
def slice_bwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    (dz,), (dx,) = inputs, outputs
    s.axpy(dx, None, None, None)
    part, strides = _part(dx, attrs)
    contract(s, part, [(dz, None)], [(n, {"a": dz.strides[k], "y": strides[k]}) for k, n in enumerate(dz.shape)])


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _reshape_weight(s: Site, x: View, y: View) -> None:
    """Through the Plan's own order, where one of them is a convolution's."""
    if len(x.shape) == 4:
        own = x if x.task == y.task else replace(x, task=x.numel if x.task else 0)
        copies = s.tasks if x.task else 1
        flat = View(s.temp(copies * x.numel), (x.numel,), None, own.task)
        axes = [(n, {"a": x.strides[k], "y": at}) for k, (n, at) in enumerate(zip(x.shape, _row_major(x.shape), strict=True))]
        contract(s, flat, [(x, None)], axes)
        x = flat
    if len(y.shape) == 4:
        axes = [(n, {"a": at, "y": y.strides[k]}) for k, (n, at) in enumerate(zip(y.shape, _row_major(y.shape), strict=True))]
        return contract(s, y, [(x, None)], axes)
    return s.axpy(y, None, None, x)
