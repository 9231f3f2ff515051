"""Products: linear, conv2d and their tangents, and layers that are factored through their samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fastmaml.executors.triton.fused import Sums, Update
from fastmaml.executors.triton.site import (
    CHUNK,
    Attrs,
    Site,
    Views,
    activating,
    blocks,
    data,
    delivered,
    plain,
    pointer,
    power,
    rule,
    step,
    updating,
)
from fastmaml.executors.triton.storage import View
from fastmaml.kernels import conv2d, factored_linear

GROUP = 64  # tiles whose sums are merged at once


# ---------------------------------------------------------------------------------------------------------------- linear, conv2d
@dataclass(frozen=True)
class Geometry:
    """Of a product: images H x W of CI channels, out OH x OW of CO; a weight's element (tap, in, out) lies at the sum of W_TAP, W_IN, W_OUT times these."""

    H: int
    W: int
    CI: int
    OH: int
    OW: int
    CO: int
    KH: int = 1
    KW: int = 1
    SH: int = 1
    SW: int = 1
    PT: int = 0
    PL: int = 0
    W_TAP: int = 0
    W_IN: int = 1
    W_OUT: int = 1

    @property
    def depth(self) -> int:
        return self.KH * self.KW * self.CI


def _linear(x: View, w: tuple[int, ...]) -> Geometry:
    outputs, inputs = w
    lead = x.numel // inputs
    return Geometry(1, lead, inputs, 1, lead, outputs, W_IN=1, W_OUT=inputs)


def _conv2d(attrs: Attrs, x: tuple[int, ...], y: tuple[int, ...], w: tuple[int, ...]) -> Geometry:
    outputs, inputs, kh, kw = w
    (sh, sw), (top, _, left, _) = attrs["stride"], attrs["padding"]
    return Geometry(x[1], x[2], inputs, y[1], y[2], outputs, kh, kw, sh, sw, top, left, inputs * outputs, outputs, 1)


def _back(g: Geometry) -> Geometry:
    """Of the transposed product."""
    return replace(g, H=g.OH, W=g.OW, CI=g.CO, OH=g.H, OW=g.W, CO=g.CI, W_IN=g.W_OUT, W_OUT=g.W_IN)


def _warps(precision: str, rows: int, columns: int) -> dict[str, int]:
    """Three products need registers for their parts: a large tile is dealt out to more warps."""
    return {"num_warps": 8 if rows * columns >= 4096 and precision.endswith("x3") else 4, "num_stages": 3}


def _summing(s: Site, attrs: Attrs, grid: tuple[int, int, int], channels: int) -> dict[str, Any]:
    """Arguments of a product that ends in sums of a batchnorm; ``grid``: tiles, blocks of channels, tasks."""
    names = ("x", "mean", "rstd", "dy", "xt", "mean_t", "rstd_t")
    args: dict[str, Any] = dict.fromkeys(("counted", "parts", "arrivals", "sums", "products", "eps", "SUMS", "GROUP", *(f"bn_{name}" for name in names)))
    args["slots"] = slots = grid[0] + blocks(grid[0], GROUP)
    sums: Sums | None = attrs.get("sums")
    if sums is None:
        return args
    if sums.mode != "stats_fwd":
        given = dict(zip(names if sums.mode != "stats_jvp" else (*names[:3], "xt"), sums.operands, strict=False))
        args |= {f"bn_{name}": data(view) for name, view in given.items()}
    one, two = map(data, attrs["sum_outputs"])
    args |= dict(counted=s.storage.offsets[sums.counted], sums=one, products=two, eps=sums.eps, SUMS=sums.mode, GROUP=GROUP)
    return args | dict(parts=s.temp(grid[2] * slots * 2 * channels), arrivals=s.counts(grid[2] * grid[1] * slots))


def product(s: Site, g: Geometry, pairs: Sequence[tuple[View | None, View | None]], bias: View | None, y: View, reverse: bool, attrs: Attrs) -> None:
    """y = the sum of x * w over the pairs where neither is absent, and the bias; then the activation, if attrs have one."""
    given = [pair for pair in pairs if None not in pair]
    (x, w), (x2, w2) = (*given, (None, None), (None, None))[:2]
    table, most, tasks = s.own(y.rows) if attrs.get("sums") else s.offsets(y.rows, w, w2, bias)
    m = 64 if g.OH * g.OW >= 16 else 32
    n, k = power(g.CO, 16, 64), power(g.depth, 16, 32)
    grid = (blocks(most * g.OH * g.OW, m), blocks(g.CO, n), tasks)
    args = dict(offsets=table, x=data(x), w=data(w), x2=data(x2), w2=data(w2), bias=data(bias), y=y.data)
    args |= dict(w_task=step(w), w2_task=step(w2), bias_task=step(bias), **vars(g), REVERSED=reverse, BM=m, BN=n, BK=k, PRECISION=s.precision)
    args |= activating(attrs) | _summing(s, attrs, grid, g.CO)
    s.launch(conv2d.conv2d_rows, grid, _warps(s.precision, m, n), **args)


def weight_tile(depth: int, outputs: int) -> tuple[int, int]:
    """Of a weight gradient, by program."""
    return power(depth, 32, 64), power(outputs, 16, 64)


def weight_product(s: Site, g: Geometry, extent: str, pairs: Sequence[tuple[View | None, View | None]], out: Views, attrs: Attrs) -> None:
    """Of out = (dw, db), dw = the sum of x^T dy over the pairs, db = the row sum of the first dy; then their updates, if attrs have some."""
    (dw, db), updates, summed = out, attrs.get("updates", (None, None)), attrs.get("summed")
    (x, dy), (x2, dy2) = (*pairs, (None, None))[:2]
    if x2 is None or dy2 is None:
        x2 = dy2 = None
    table, most, tasks = s.own(extent)
    pixels, numel = g.OH * g.OW, g.depth * g.CO
    chunks = blocks(most * pixels, CHUNK)
    (k, n), m = weight_tile(g.depth, g.CO), 32
    tiles = blocks(g.depth if dw else 1, k) * blocks(g.CO, n)
    parts = [None if v is None else v if chunks == 1 else replace(v, data=s.temp(tasks * chunks * v.numel), task=v.numel) for v in (dw, db)]
    args = dict(offsets=table, x=data(x), dy=data(dy), x2=data(x2), dy2=data(dy2), db=data(parts[1]), finite=s.storage.finite if summed else None)
    args |= {k: v for name, update in zip(("w_", "b_"), updates, strict=True) for k, v in updating(name, update if chunks == 1 else None).items()}
    args |= dict(db_task=g.CO, **vars(g), TILES_N=blocks(g.CO, n), BM=m, BN=n, BK=k, PRECISION=s.precision)
    if summed and summed.group > 1:
        grid = tiles, blocks(tasks, summed.group)
        summed.partial = replace(dw, data=s.storage.sums(grid[1] * numel))
        summed.again = _again(table, (x, dy, x2, dy2), updates[0], g)
        args |= dict(sums=summed.partial.data, weights=s.storage.task_weights, tasks=tasks, group=summed.group)
        parts_too = s.precision.endswith("x3")  # in registers, beside two tiles, of a task and of the sum: of half the rows, or they would spill
        args["BM"] = m // 2 if parts_too else m
        return s.launch(conv2d.conv2d_weight_tasks, grid, {"num_warps": 8, "num_stages": 2 if parts_too else 3}, **args)
    args |= dict(dw=data(parts[0]), chunk=CHUNK, chunks=chunks, dw_task=numel)
    s.launch(conv2d.conv2d_weight, (tiles, chunks, tasks), _warps(s.precision, k, n), **args)
    for part, whole, update in zip(parts, (dw, db), updates, strict=True):
        if whole is not None and chunks > 1:
            s.sum_chunks(table, part.data, whole, CHUNK, pixels, chunks, whole.numel, update)
    return None


def _again(table: Tensor, operands: Views, update: Update | None, g: Geometry) -> list[int]:
    """A product as conv2d.weight_numbers reads it."""
    base, scale, sign = (None, None, 1) if update is None else (update.base, update.scale, int(update.sign))
    return [table.data_ptr(), *map(pointer, (*operands, base, scale)), step(base), step(scale), sign, *vars(g).values()]


@rule("linear_fwd", "linear_jvp")
def linear_fwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    x, w, *rest = inputs
    xt, wt, b = (None, None, *rest) if len(rest) == 1 else rest
    y, deliver = delivered(s, outputs[0], 1)
    x, xt = plain(s, x), plain(s, xt)
    pairs = [(xt, w), (x, wt)] if len(rest) > 1 else [(x, w)]
    product(s, _linear(x, w.shape), pairs, b, y, False, attrs)
    deliver()


@rule("linear_bwd_input", "linear_bwd_input_jvp")
def linear_bwd_input(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    dy, w, dyt, wt = (*inputs, None, None)[:4]
    x, deliver = delivered(s, outputs[0], 1)
    dy, dyt = plain(s, dy), plain(s, dyt)
    pairs = [(dyt, w), (dy, wt)] if len(inputs) > 2 else [(dy, w)]
    product(s, _back(_linear(x, w.shape)), pairs, None, x, False, attrs)
    deliver()


@rule("linear_bwd_weight", "linear_bwd_weight_jvp")
def linear_bwd_weight(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    x, dy, xt, dyt = (*(plain(s, v) for v in inputs), None, None)[:4]
    pairs = [(x, dyt), (xt, dy)] if len(inputs) > 2 else [(x, dy)]
    any_x, any_dy = x or xt, dy or dyt
    g = _linear(any_x, (any_dy.shape[-1], any_x.shape[-1]))
    weight_product(s, g, any_x.rows, pairs, outputs, attrs)


@rule("row_sum_bwd", "row_sum_bwd_jvp")
def row_sum_bwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    (dy,) = inputs
    weight_product(s, Geometry(1, 1, 1, 1, 1, dy.numel), dy.rows, [(dy, dy)], (None, *outputs), {"updates": (None, *attrs.get("updates", (None,)))})


@rule("conv2d_fwd", "conv2d_jvp")
def conv2d_fwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    x, w, *rest = inputs
    xt, wt, b = (None, None, *rest) if len(rest) == 1 else rest
    pairs = [(xt, w), (x, wt)] if len(rest) > 1 else [(x, w)]
    product(s, _conv2d(attrs, x.shape, outputs[0].shape, w.shape), pairs, b, outputs[0], False, attrs)


@rule("conv2d_bwd_input", "conv2d_bwd_input_jvp")
def conv2d_bwd_input(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    dy, w, dyt, wt = (*inputs, None, None)[:4]
    pairs = [(dyt, w), (dy, wt)] if len(inputs) > 2 else [(dy, w)]
    g = _conv2d(attrs, attrs["input_shape"], (dy or dyt).shape, attrs["weight_shape"])
    product(s, _back(g), pairs, None, outputs[0], True, attrs)


@rule("conv2d_bwd_weight", "conv2d_bwd_weight_jvp")
def conv2d_bwd_weight(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    x, dy, xt, dyt = (*inputs, None, None)[:4]
    pairs = [(x, dyt), (xt, dy)] if len(inputs) > 2 else [(x, dy)]
    g = _conv2d(attrs, attrs["input_shape"], (dy or dyt).shape, attrs["weight_shape"])
    weight_product(s, g, (dy or dyt).rows, pairs, outputs, attrs)



# ---------------------------------------------------------------------------------------------------------------- factored layers
@rule("gram_fwd")
def gram_fwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    (x, xs), (gram,) = inputs, outputs
    table, most, tasks = s.own(x.rows)
    args = dict(offsets=table, support=s.storage.offsets["support"], x=x.data, xs=xs.data, gram=gram.data, width=gram.numel, inner=x.numel)
    s.launch(factored_linear.gram_fwd, (blocks(most, 8), blocks(s.bucket.support, 8), tasks), **args, BM=8, BN=8, BK=power(x.numel, 1, 32))


@rule("factored_linear_fwd")
def factored_linear_fwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    (base, gram, state, bias), (y,) = inputs, outputs
    table, most, tasks = s.own(y.rows)
    c = power(y.numel, 1, 64)
    args = dict(offsets=table, support=s.storage.offsets["support"], base=base.data, gram=gram.data, state=state.data, bias=data(bias), y=y.data)
    args |= dict(width=gram.numel, C=y.numel, bias_task=step(bias), BM=8, BC=c)
    s.launch(factored_linear.factored_linear_fwd, (blocks(most, 8), blocks(y.numel, c), tasks), **args)


@rule("factored_linear_jvp")
def factored_linear_jvp(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    (direction, bias_t), (y,) = inputs, outputs
    table, most, tasks = s.offsets(y.rows, bias_t)
    c = power(y.numel, 1, 64)
    args = dict(offsets=table, direction=data(direction), bias_t=bias_t.data, y=y.data, C=y.numel, bias_task=step(bias_t), BM=8, BC=c)
    s.launch(factored_linear.factored_linear_jvp, (blocks(most, 8), blocks(y.numel, c), tasks), **args)


@rule("factored_linear_bwd", "factored_linear_bwd_jvp")
def factored_linear_bwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    (gram, dy), (bar,) = inputs, outputs
    table, _, tasks = s.own(dy.rows)
    c = power(dy.numel, 1, 64)
    args = dict(offsets=table, support=s.storage.offsets["support"], gram=gram.data, dy=dy.data, state_bar=bar.data, width=gram.numel, C=dy.numel, BM=8, BC=c)
    s.launch(factored_linear.factored_linear_bwd, (blocks(s.bucket.support, 8), blocks(dy.numel, c), tasks), **args)
