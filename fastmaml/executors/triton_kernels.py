"""Which Triton kernels run an instruction of the Plan, on which operands and grid: one short rule for each ``<op>_<mode>``.

A rule takes (site, attrs, inputs, outputs) and emits launches; operands are Views, absent ones None. Tiles follow from the shape of a layer alone, so that the
results of a task do not depend on the batch that it is in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastmaml.executors.triton_storage import Storage, Temp, View
from fastmaml.kernels import (
    activations,
    avgpool2d,
    batchnorm,
    conv2d,
    cross_entropy,
    expression,
    factored_linear,
    layernorm,
    maxpool2d,
    mse,
    pad2d,
    relu,
    reshape,
    rows,
    tiles,
    update,
)

Attrs = Mapping[str, Any]
Views = Sequence[View | None]
RULES: dict[str, Callable[..., None]] = {}
BLOCK = 1024  # numbers of an elementwise program
CHUNK = 4096  # rows (of samples times pixels) that one program sums
SUMMED = 64  # of these, rows of a tile


def rule(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def register(function: Callable[..., None]) -> Callable[..., None]:
        for name in names:
            RULES[name] = function
        return function

    return register


@dataclass
class Launch:
    """``kernel[grid](**arguments, **options)``; a Temp among the arguments stands for its place."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)

    def __call__(self) -> None:
        self.kernel[self.grid](**self.arguments, **self.options)


def power(n: int, least: int = 1, most: int = 1 << 30) -> int:
    """The power of two that n fits into, between bounds."""
    return min(max(1 << (n - 1).bit_length(), least), most)


def blocks(n: int, size: int) -> int:
    return -(-n // size)


def data(view: View | None) -> Any:
    return None if view is None else view.data


def step(view: View | None) -> int:
    return 0 if view is None else view.task


class Site:
    """What a rule needs besides its operands. ``tasks`` 1 where a phase runs once for all."""

    def __init__(self, storage: Storage) -> None:
        self.storage, self.bucket = storage, storage.bucket
        self.tasks, self.precision = storage.bucket.tasks, "tf32x3"
        self.launches: list[Launch] = []
        self.constants: dict[tuple[int, ...], Tensor] = {}
        self.temp_bytes = self._top = 0

    def begin(self) -> None:
        """A new instruction: its temporaries may lie where the last one's did."""
        self._top = 0

    def temp(self, numel: int, dtype: torch.dtype = torch.float32) -> Temp:
        out = Temp(self._top, numel, dtype)
        self._top += out.bytes
        self.temp_bytes = max(self.temp_bytes, self._top)
        return out

    def table(self, numbers: Sequence[int]) -> Tensor:
        """Constants on the device, kept as long as the launches."""
        key = tuple(numbers)
        if key not in self.constants:
            self.constants[key] = torch.tensor(key, dtype=torch.int32, device=self.storage.device)
        return self.constants[key]

    def launch(self, kernel: Any, grid: tuple[int, ...], options: dict[str, int] | None = None, /, **arguments: Any) -> None:
        self.launches.append(Launch(kernel, grid, arguments, {"enable_fp_fusion": True, **(options or {})}))  # Triton's default is about to change

    def span(self, view: View) -> tuple[Tensor, int, int]:
        """(count, numbers in all, copies) of an elementwise walk: all rows at once, or each copy of a weight."""
        if view.rows:
            return self.storage.joined[view.rows][1:], self.bucket.tasks * self.bucket.rows(view.rows) * view.numel, 1
        return self.storage.one[1:], view.numel, self.tasks if view.task else 1

    def offsets(self, extent: str, *operands: View | None) -> tuple[Tensor, int, int]:
        """(offsets, most rows of a task, tasks); the rows of all tasks as one task's where no operand is a task's own."""
        if any(step(v) for v in operands):
            return self.storage.offsets[extent], self.bucket.rows(extent), self.tasks
        return self.storage.joined[extent], self.bucket.tasks * self.bucket.rows(extent), 1

    def own(self, extent: str) -> tuple[Tensor, int, int]:
        """The same, always by task."""
        return self.storage.offsets[extent], self.bucket.rows(extent), self.tasks

    def like(self, view: View) -> View:
        """A temporary in the shape of some rows."""
        return replace(view, data=self.temp(self.bucket.tasks * self.bucket.rows(view.rows) * view.numel))

    def axpy(self, y: View, a: View | None, s: View | None, b: View | None, sign: float = 1.0) -> None:
        """y = a + sign s b."""
        offsets, (count, n, copies) = None, self.span(y)
        if y.rows and step(s):  # each task's rows by a number of its own
            offsets, most, copies = self.own(y.rows)
            n = most * y.numel
        args = dict(count=count, offsets=offsets, a=data(a), s=data(s), b=data(b), y=y.data, sign=sign, per=y.numel)
        args |= dict(a_task=step(a), s_task=step(s), b_task=step(b), y_task=y.task)
        self.launch(update.axpy, (blocks(n, BLOCK), copies), **args, EACH=s is not None and s.numel > 1, BLOCK=BLOCK)

    def dot(self, y: View, acc: View | None, a: View, b: View, sign: float) -> None:
        """y = acc + sign <a, b> of each task."""
        table = self.storage.offsets[a.rows] if a.rows else None
        args = dict(offsets=table, a=a.data, b=b.data, acc=data(acc), y=y.data, sign=sign, per=a.numel)
        self.launch(update.dot, (self.tasks,), **args, a_task=a.task, b_task=b.task, acc_task=step(acc), y_task=y.task, BLOCK=BLOCK)

    def reshape(self, x: View, y: View, xc: int, yc: int) -> None:
        """Rows of x, of xc channels behind the pixels, as rows of y."""
        count, n, _ = self.span(y)
        self.launch(reshape.reshape, (blocks(n, BLOCK),), count=count, x=x.data, y=y.data, NUMEL=y.numel, XC=xc, YC=yc, BLOCK=BLOCK)

    def sum_chunks(self, table: Tensor, x: Temp, y: View, chunk: int, per_row: int, chunks: int, n: int) -> None:
        size = power(n, 16, 256)
        grid = (blocks(n, size), self.tasks)
        self.launch(tiles.sum_chunks, grid, offsets=table, x=x, y=y.data, chunk=chunk, per_row=per_row, chunks=chunks, n=n, y_task=y.task, BS=16, BN=size)


# ---------------------------------------------------------------------------------------------------------------- layouts
def channels_last(view: View) -> int:
    """Channels of rows as they are stored: images have them last, other rows count as one channel of themselves."""
    return view.shape[0] if len(view.shape) == 3 else 1


def plain(s: Site, view: View | None) -> View | None:
    """Rows in the Plan's order."""
    if view is None or channels_last(view) in (1, view.numel):
        return view
    out = s.like(view)
    s.reshape(view, out, channels_last(view), 1)
    return out


def by_channel(s: Site, view: View | None) -> View | None:
    """Rows with channels last, whatever they are."""
    if view is None or len(view.shape) in (1, 3) or view.shape[0] in (1, view.numel):
        return view
    out = s.like(view)
    s.reshape(view, out, 1, view.shape[0])
    return out


def delivered(s: Site, y: View, channels: int) -> tuple[View, Callable[[], None]]:
    """Where a kernel may write rows with that many channels behind the pixels, and what then brings them to ``y``."""
    if channels == channels_last(y) or {channels, channels_last(y)} <= {1, y.numel}:
        return y, lambda: None
    out = s.like(y)
    return out, lambda: s.reshape(out, y, channels, channels_last(y))


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
    """Three products in TF32 need registers for their parts: a large tile is dealt out to more warps."""
    return {"num_warps": 8 if rows * columns >= 4096 and precision != "tf32" else 4, "num_stages": 3}


def product(s: Site, g: Geometry, pairs: Sequence[tuple[View | None, View | None]], bias: View | None, y: View, reverse: bool) -> None:
    """y = the sum of x * w over the pairs where neither is absent, and the bias."""
    given = [pair for pair in pairs if None not in pair]
    (x, w), (x2, w2) = (*given, (None, None), (None, None))[:2]
    table, most, tasks = s.offsets(y.rows, w, w2, bias)
    m = 64 if g.OH * g.OW >= 16 else 32
    n, k = power(g.CO, 16, 64), power(g.depth, 16, 32)
    grid = (blocks(most * g.OH * g.OW, m), blocks(g.CO, n), tasks)
    args = dict(offsets=table, x=data(x), w=data(w), x2=data(x2), w2=data(w2), bias=data(bias), y=y.data)
    args |= dict(w_task=step(w), w2_task=step(w2), bias_task=step(bias), **vars(g), REVERSED=reverse, BM=m, BN=n, BK=k, PRECISION=s.precision)
    s.launch(conv2d.conv2d_rows, grid, _warps(s.precision, m, n), **args)


def weight_product(s: Site, g: Geometry, extent: str, pairs: Sequence[tuple[View | None, View | None]], dw: View | None, db: View | None) -> None:
    """dw = the sum of x^T dy over the pairs, db = the row sum of the first dy."""
    (x, dy), (x2, dy2) = (*pairs, (None, None))[:2]
    if x2 is None or dy2 is None:
        x2 = dy2 = None
    table, most, tasks = s.own(extent)
    pixels, numel = g.OH * g.OW, g.depth * g.CO
    chunks = blocks(most * pixels, CHUNK)
    k, n, m = power(g.depth, 32, 64), power(g.CO, 16, 64), 32
    out = [None if v is None else v if chunks == 1 else replace(v, data=s.temp(tasks * chunks * v.numel), task=v.numel) for v in (dw, db)]
    grid = (blocks(g.depth if dw else 1, k) * blocks(g.CO, n), chunks, tasks)
    args = dict(offsets=table, x=data(x), dy=data(dy), x2=data(x2), dy2=data(dy2), dw=data(out[0]), db=data(out[1]), chunk=CHUNK, chunks=chunks)
    args |= dict(dw_task=numel, db_task=g.CO, **vars(g), TILES_N=blocks(g.CO, n), BM=m, BN=n, BK=k, PRECISION=s.precision)
    s.launch(conv2d.conv2d_weight, grid, _warps(s.precision, k, n), **args)
    for part, whole in zip(out, (dw, db), strict=True):
        if whole is not None and chunks > 1:
            s.sum_chunks(table, part.data, whole, CHUNK, pixels, chunks, whole.numel)


@rule("linear_fwd", "linear_jvp")
def linear_fwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    x, w, *rest = inputs
    xt, wt, b = (None, None, *rest) if len(rest) == 1 else rest
    y, deliver = delivered(s, outputs[0], 1)
    x, xt = plain(s, x), plain(s, xt)
    pairs = [(xt, w), (x, wt)] if len(rest) > 1 else [(x, w)]
    product(s, _linear(x, w.shape), pairs, b, y, False)
    deliver()


@rule("linear_bwd_input", "linear_bwd_input_jvp")
def linear_bwd_input(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    dy, w, dyt, wt = (*inputs, None, None)[:4]
    x, deliver = delivered(s, outputs[0], 1)
    dy, dyt = plain(s, dy), plain(s, dyt)
    pairs = [(dyt, w), (dy, wt)] if len(inputs) > 2 else [(dy, w)]
    product(s, _back(_linear(x, w.shape)), pairs, None, x, False)
    deliver()


@rule("linear_bwd_weight", "linear_bwd_weight_jvp")
def linear_bwd_weight(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    x, dy, xt, dyt = (*(plain(s, v) for v in inputs), None, None)[:4]
    pairs = [(x, dyt), (xt, dy)] if len(inputs) > 2 else [(x, dy)]
    any_x, any_dy = x or xt, dy or dyt
    g = _linear(any_x, (any_dy.shape[-1], any_x.shape[-1]))
    weight_product(s, g, any_x.rows, pairs, *outputs)


@rule("row_sum_bwd", "row_sum_bwd_jvp")
def row_sum_bwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    (dy,) = inputs
    weight_product(s, Geometry(1, 1, 1, 1, 1, dy.numel), dy.rows, [(dy, dy)], None, outputs[0])


@rule("conv2d_fwd", "conv2d_jvp")
def conv2d_fwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    x, w, *rest = inputs
    xt, wt, b = (None, None, *rest) if len(rest) == 1 else rest
    pairs = [(xt, w), (x, wt)] if len(rest) > 1 else [(x, w)]
    product(s, _conv2d(attrs, x.shape, outputs[0].shape, w.shape), pairs, b, outputs[0], False)


@rule("conv2d_bwd_input", "conv2d_bwd_input_jvp")
def conv2d_bwd_input(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    dy, w, dyt, wt = (*inputs, None, None)[:4]
    pairs = [(dyt, w), (dy, wt)] if len(inputs) > 2 else [(dy, w)]
    g = _conv2d(attrs, attrs["input_shape"], (dy or dyt).shape, attrs["weight_shape"])
    product(s, _back(g), pairs, None, outputs[0], True)


@rule("conv2d_bwd_weight", "conv2d_bwd_weight_jvp")
def conv2d_bwd_weight(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    x, dy, xt, dyt = (*inputs, None, None)[:4]
    pairs = [(x, dyt), (xt, dy)] if len(inputs) > 2 else [(x, dy)]
    g = _conv2d(attrs, attrs["input_shape"], (dy or dyt).shape, attrs["weight_shape"])
    weight_product(s, g, (dy or dyt).rows, pairs, *outputs)


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


# ---------------------------------------------------------------------------------------------------------------- normalisation
def _pixels(x: View) -> tuple[int, int]:
    """(channels, pixels) of rows with channels last."""
    return x.shape[0], x.numel // x.shape[0]


def _tile(channels: int, rows: int = 2048, numbers: int = 2048) -> tuple[int, int]:
    """Rows, at most so many, and channels of a tile of that many numbers."""
    c = power(channels, 1, 64)
    return min(numbers // c, rows), c


@rule("batchnorm_stats_fwd")
def batchnorm_stats_fwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    x = by_channel(s, inputs[0])
    mean, rstd = (v or View(s.temp(s.tasks * x.shape[0]), x.shape[:1], None, x.shape[0]) for v in outputs)
    (c, p), (bm, bc) = _pixels(x), _tile(x.shape[0], SUMMED)
    table, most, tasks = s.own(x.rows)
    chunks = blocks(most * p, CHUNK)
    means, squares = s.temp(tasks * chunks * c), s.temp(tasks * chunks * c)
    shape = dict(counted=s.storage.offsets[attrs["stat_rows"]], chunk=CHUNK, chunks=chunks, C=c, P=p, BC=bc)
    s.launch(batchnorm.batchnorm_moments, (blocks(c, bc), chunks, tasks), offsets=table, x=x.data, means=means, squares=squares, **shape, BM=bm)
    args = dict(means=means, squares=squares, mean=mean.data, rstd=rstd.data, eps=attrs["eps"], **shape, BS=16)
    s.launch(batchnorm.batchnorm_stats_fwd, (blocks(c, bc), tasks), **args)


@rule("batchnorm_running_fwd")
def batchnorm_running_fwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    running_mean, running_var = inputs
    c = running_mean.numel
    mean, rstd = (v or View(s.temp(s.tasks * c), (c,), None, c) for v in outputs)
    args = dict(running_mean=running_mean.data, running_var=running_var.data, mean=mean.data, rstd=rstd.data, eps=attrs["eps"], C=c)
    args |= dict(mean_task=running_mean.task, var_task=running_var.task, BC=power(c, 1, 256))
    s.launch(batchnorm.batchnorm_running_fwd, (blocks(c, power(c, 1, 256)), s.tasks), **args)


def _sums(s: Site, attrs: Attrs, mode: str, extent: str, counted: str, x: View, **operands: Any) -> tuple[Temp, Temp, dict[str, Any]]:
    """The two sums of every chunk, and what finishing them needs."""
    (c, p), (bm, bc) = _pixels(x), _tile(x.shape[0], SUMMED, 1024 if mode == "bwd_stats_jvp" else 2048)
    table, most, tasks = s.own(extent)
    chunks = blocks(most * p, CHUNK)
    one, two = s.temp(tasks * chunks * c), s.temp(tasks * chunks * c)
    absent = dict.fromkeys(("dy", "xt", "mean_t", "rstd_t", "dyt"))
    shape = dict(counted=s.storage.offsets[counted], chunk=CHUNK, chunks=chunks, C=c, P=p)
    args = absent | operands | shape | dict(offsets=table, x=x.data, sums=one, products=two, MODE=mode, BM=bm, BC=bc)
    s.launch(batchnorm.batchnorm_sums, (blocks(c, bc), chunks, tasks), **args)
    return one, two, shape


@rule("batchnorm_stats_jvp")
def batchnorm_stats_jvp(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    x, mean, rstd, xt = inputs
    x, xt = by_channel(s, x), by_channel(s, xt)
    c = x.shape[0]
    mean_t, rstd_t = (v or View(s.temp(s.tasks * c), (c,), None, c) for v in outputs)
    sums, products, shape = _sums(s, attrs, "stats_jvp", x.rows, attrs["stat_rows"], x, mean=mean.data, rstd=rstd.data, xt=xt.data)
    bc = power(c, 1, 64)
    args = dict(sums=sums, products=products, rstd=rstd.data, mean_t=mean_t.data, rstd_t=rstd_t.data, **shape, BS=16, BC=bc)
    s.launch(batchnorm.batchnorm_stats_jvp, (blocks(c, bc), s.tasks), **args)


@rule("batchnorm_bwd_stats", "batchnorm_bwd_stats_jvp")
def batchnorm_bwd_stats(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    x, mean, rstd, dy, xt, mean_t, rstd_t, dyt = (*inputs, None, None, None, None)[:8]
    mode = "bwd_stats" if len(inputs) == 4 else "bwd_stats_jvp"
    x, dy, xt, dyt = (by_channel(s, v) for v in (x, dy, xt, dyt))
    if xt is None and mean_t is None and rstd_t is None:
        dy = dy if mode == "bwd_stats" else None
    operands = dict(mean=mean.data, rstd=rstd.data, dy=data(dy), xt=data(xt), mean_t=data(mean_t), rstd_t=data(rstd_t), dyt=data(dyt))
    *parts, shape = _sums(s, attrs, mode, x.rows, x.rows, x, **operands)
    for part, whole in zip(parts, outputs, strict=True):
        if whole is not None:
            s.sum_chunks(s.storage.offsets[x.rows], part, whole, CHUNK, shape["P"], shape["chunks"], shape["C"])


def _batchnorm_rows(s: Site, attrs: Attrs, mode: str, x: View, y: View, index: View | None = None, **operands: View | None) -> None:
    rows_like = ("dy", "xt", "dyt")
    views = {name: by_channel(s, v) if name in rows_like and index is None else v for name, v in operands.items()}
    x = by_channel(s, x)
    y, deliver = delivered(s, y, x.shape[0] if len(y.shape) > 1 else 1)
    names = ("mean", "rstd", "gamma", "beta", "dy", "s1", "s2", "xt", "mean_t", "rstd_t", "gamma_t", "beta_t", "dyt", "s1t", "s2t")
    args: dict[str, Any] = {name: data(views.get(name)) for name in names}
    window = dict.fromkeys(("W", "OH", "OW", "KH", "KW", "SH", "SW"), 1)
    if index is not None:
        (kh, kw), (sh, sw) = attrs["kernel"], attrs["stride"]
        window = dict(W=attrs["input_shape"][2], OH=index.shape[1], OW=index.shape[2], KH=kh, KW=kw, SH=sh, SW=sw)
    (c, p), (bm, bc) = _pixels(x), _tile(x.shape[0])
    table, most, tasks = s.own(x.rows)
    counted = None if attrs["stat_rows"] is None or not mode.startswith("bwd") else s.storage.offsets[attrs["stat_rows"]]
    args |= dict(offsets=table, counted=counted, x=x.data, index=data(index), y=y.data, C=c, P=p, MODE=mode, POOLED=index is not None, **window)
    args |= dict(gamma_task=step(views.get("gamma")), beta_task=step(views.get("beta")), BM=bm, BC=bc)
    s.launch(batchnorm.batchnorm_rows, (blocks(most * p, bm), blocks(c, bc), tasks), **args)
    deliver()


@rule("batchnorm_fwd")
def batchnorm_fwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    x, mean, rstd, gamma, beta = inputs
    _batchnorm_rows(s, attrs, "fwd", x, outputs[0], mean=mean, rstd=rstd, gamma=gamma, beta=beta)


@rule("batchnorm_jvp")
def batchnorm_jvp(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    x, mean, rstd, gamma, xt, mean_t, rstd_t, gamma_t, beta_t = inputs
    tangents = dict(xt=xt, mean_t=mean_t, rstd_t=rstd_t, gamma_t=gamma_t, beta_t=beta_t)
    _batchnorm_rows(s, attrs, "jvp", x, outputs[0], mean=mean, rstd=rstd, gamma=gamma, **tangents)


@rule("batchnorm_bwd_input", "batchnorm_maxpool2d_bwd_input")
def batchnorm_bwd_input(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    x, mean, rstd, gamma, dy, *index, s1, s2 = inputs
    _batchnorm_rows(s, attrs, "bwd_input", x, outputs[0], *index, mean=mean, rstd=rstd, gamma=gamma, dy=dy, s1=s1, s2=s2)


@rule("batchnorm_bwd_input_jvp", "batchnorm_maxpool2d_bwd_input_jvp")
def batchnorm_bwd_input_jvp(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    x, mean, rstd, gamma, dy, *index, s1, s2, xt, mean_t, rstd_t, gamma_t, dyt, s1t, s2t = inputs
    primals = dict(mean=mean, rstd=rstd, gamma=gamma, dy=dy, s1=s1, s2=s2)
    tangents = dict(xt=xt, mean_t=mean_t, rstd_t=rstd_t, gamma_t=gamma_t, dyt=dyt, s1t=s1t, s2t=s2t)
    _batchnorm_rows(s, attrs, "bwd_input_jvp", x, outputs[0], *index, **primals, **tangents)


def _sets(s: Site, attrs: Attrs, name: str, x: View) -> tuple[dict[str, Any], int]:
    """(how a sample is cut into sets, channels behind the pixels)."""
    if name.startswith("layernorm"):
        lead = len(x.shape) - attrs["dims"]
        sets = math.prod(x.shape[:lead])
        return dict(U=sets, GN=math.prod(x.shape[lead:]), SETS=sets, GROUPED=False), 1
    return dict(U=x.numel // x.shape[0], GN=x.shape[0], SETS=attrs["groups"], GROUPED=True), x.shape[0]


class _RowNorm:
    """layernorm or groupnorm: the means of every set, then what reads them."""

    def __init__(self, s: Site, attrs: Attrs, name: str, x: View, gamma: View | None = None, gamma_t: View | None = None, **rows: View | None) -> None:
        self.s, self.gamma, self.gamma_t = s, gamma, gamma_t
        self.cut, self.channels = _sets(s, attrs, name, x)
        turn = by_channel if self.cut["GROUPED"] else plain
        self.x, self.rows = turn(s, x), {"xt": None, "dy": None, "dyt": None} | {k: turn(s, v) for k, v in rows.items()}
        table, most, tasks = s.own(x.rows)
        sets, size = self.cut["SETS"], power(x.numel // self.cut["SETS"], 1, 1024)
        self.moments = s.temp(s.bucket.tasks * most * sets * 9)
        args = dict(offsets=table, x=self.x.data, gamma=data(gamma), gamma_t=data(gamma_t), moments=self.moments, eps=attrs["eps"], gamma_task=step(gamma))
        args |= {k: data(v) for k, v in self.rows.items()} | self.cut | dict(BS=1024 // size, BLOCK=size)
        s.launch(layernorm.layernorm_moments, (blocks(most * sets, 1024 // size), tasks), **args)

    def apply(self, mode: str, y: View, beta: View | None = None, beta_t: View | None = None) -> None:
        s, gn = self.s, self.cut["GN"]
        y, deliver = delivered(s, y, self.channels if len(y.shape) > 1 else 1)
        table, most, tasks = s.own(self.x.rows)
        bm, bc = _tile(gn)
        args = dict(offsets=table, x=self.x.data, gamma=data(self.gamma), beta=data(beta), gamma_t=data(self.gamma_t), beta_t=data(beta_t), y=y.data)
        args |= {k: data(v) for k, v in self.rows.items()} | self.cut | dict(moments=self.moments, MODE=mode, BM=bm, BC=bc)
        args |= dict(gamma_task=step(self.gamma), beta_task=step(beta))
        s.launch(layernorm.layernorm_rows, (blocks(most * self.cut["U"], bm), blocks(gn, bc), tasks), **args)
        deliver()

    def weight(self, tangent: bool, outputs: Views) -> None:
        s, gn, u = self.s, self.cut["GN"], self.cut["U"]
        table, most, tasks = s.own(self.x.rows)
        chunks = blocks(most * u, CHUNK)
        parts = [None if v is None else s.temp(tasks * chunks * gn) for v in outputs]
        bm, bc = _tile(gn, SUMMED)
        args = dict(offsets=table, x=self.x.data, moments=self.moments, dgamma=parts[0], dbeta=parts[1], chunk=CHUNK, chunks=chunks)
        args |= {k: data(v) for k, v in self.rows.items()} | self.cut | dict(TANGENT=tangent, BM=bm, BC=bc)
        s.launch(layernorm.layernorm_weight, (blocks(gn, bc), chunks, tasks), **args)
        for part, whole in zip(parts, outputs, strict=True):
            if whole is not None:
                s.sum_chunks(table, part, whole, CHUNK, u, chunks, gn)


def _register_rownorm(name: str) -> None:
    @rule(f"{name}_fwd")
    def fwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
        x, gamma, beta = inputs
        _RowNorm(s, attrs, name, x, gamma).apply("fwd", outputs[0], beta)

    @rule(f"{name}_jvp")
    def jvp(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
        x, gamma, xt, gamma_t, beta_t = inputs
        _RowNorm(s, attrs, name, x, gamma, gamma_t, xt=xt).apply("jvp", outputs[0], None, beta_t)

    @rule(f"{name}_bwd_input")
    def bwd_input(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
        x, gamma, dy = inputs
        _RowNorm(s, attrs, name, x, gamma, dy=dy).apply("bwd_input", outputs[0])

    @rule(f"{name}_bwd_input_jvp")
    def bwd_input_jvp(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
        x, gamma, dy, xt, gamma_t, dyt = inputs
        _RowNorm(s, attrs, name, x, gamma, gamma_t, dy=dy, xt=xt, dyt=dyt).apply("bwd_input_jvp", outputs[0])

    @rule(f"{name}_bwd_weight")
    def bwd_weight(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
        x, dy = inputs
        _RowNorm(s, attrs, name, x, dy=dy).weight(False, outputs)

    @rule(f"{name}_bwd_weight_jvp")
    def bwd_weight_jvp(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
        x, dy, xt, dyt = inputs
        _RowNorm(s, attrs, name, x, dy=dy, xt=xt, dyt=dyt).weight(True, outputs)


for _name in ("layernorm", "groupnorm"):
    _register_rownorm(_name)


# ---------------------------------------------------------------------------------------------------------------- activations
def _register_smooth(name: str) -> None:
    def emit(s: Site, attrs: Attrs, mode: str, y: View, x: View, xt: View | None = None, dy: View | None = None, dyt: View | None = None) -> None:
        a, b = attrs.get("alpha", attrs.get("beta", 0.0)), attrs.get("threshold", 0.0)
        count, n, _ = s.span(y)
        count = count if y.rows else s.table([s.tasks if y.task else 1])  # copies of a weight lie one after another
        args = dict(count=count, x=x.data, xt=data(xt), dy=data(dy), dyt=data(dyt), y=y.data, per=y.numel, MODE=mode, A=a, B=b, BLOCK=BLOCK)
        kind = "gelu_tanh" if attrs.get("approximate") == "tanh" else name
        s.launch(activations.activation, (blocks(n * (s.tasks if not y.rows and y.task else 1), BLOCK),), **args, NAME=kind)

    rule(f"{name}_fwd")(lambda s, attrs, inputs, outputs: emit(s, attrs, "fwd", outputs[0], _same(s, inputs[0], outputs[0])))

    @rule(f"{name}_jvp")
    def jvp(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
        x, xt = (_same(s, v, outputs[0]) for v in inputs)
        emit(s, attrs, "jvp", outputs[0], x, xt=xt)

    @rule(f"{name}_bwd")
    def bwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
        x, dy = (_same(s, v, outputs[0]) for v in inputs)
        emit(s, attrs, "bwd", outputs[0], x, dy=dy)

    @rule(f"{name}_bwd_jvp")
    def bwd_jvp(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
        x, xt, dy, dyt = (_same(s, v, outputs[0]) for v in inputs)
        emit(s, attrs, "bwd_jvp", outputs[0], x, xt, dy, dyt)


def _same(s: Site, view: View | None, like: View) -> View | None:
    """A weight as every task's own, where the result is: these kernels walk over all copies at once."""
    if view is None or like.rows or view.task == like.task:
        return view
    out = View(s.temp(s.tasks * like.numel), like.shape, None, like.numel)
    s.axpy(out, None, None, view)
    return out


for _name in ("tanh", "sigmoid", "exp", "elu", "gelu", "silu", "softplus"):
    _register_smooth(_name)


@rule("relu_fwd", "leaky_relu_fwd")
def relu_fwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    (x,), (y, mask) = inputs, outputs
    count, n, _ = s.span(x)
    args = dict(count=count, x=x.data, y=data(y), mask=data(mask), per=x.numel, SLOPE=attrs.get("slope"), BLOCK=BLOCK)
    s.launch(relu.relu_fwd, (blocks(n, BLOCK),), **args)


def relu_masked(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    (mask, x), (y,) = inputs, outputs
    count, n, _ = s.span(y)
    s.launch(relu.relu_masked, (blocks(n, BLOCK),), count=count, mask=mask.data, x=x.data, y=y.data, per=y.numel, SLOPE=attrs.get("slope"), BLOCK=BLOCK)


for _name in ("relu", "leaky_relu"):
    rule(f"{_name}_jvp", f"{_name}_bwd", f"{_name}_bwd_jvp")(relu_masked)
    rule(f"{_name}_replay")(lambda s, attrs, inputs, outputs: relu_masked(s, attrs, inputs[::-1], outputs))


# ---------------------------------------------------------------------------------------------------------------- pooling, shapes
def _window(attrs: Attrs, x: tuple[int, ...], y: tuple[int, ...]) -> dict[str, int]:
    (kh, kw), (sh, sw), (ph, pw) = attrs["kernel"], attrs["stride"], attrs["padding"]
    return dict(C=x[0], H=x[1], W=x[2], OH=y[1], OW=y[2], KH=kh, KW=kw, SH=sh, SW=sw, PH=ph, PW=pw, BLOCK=256)


@rule("maxpool2d_fwd", "batchnorm_maxpool2d_fwd")
def maxpool2d_fwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    x, gamma = (*inputs, None)[:2]
    y, index = outputs
    like = y or index
    y = y or replace(like, data=s.temp(s.bucket.tasks * s.bucket.rows(like.rows) * like.numel))
    table, most, tasks = s.offsets(x.rows, gamma)
    args = dict(offsets=table, x=x.data, gamma=data(gamma), y=y.data, index=data(index), gamma_task=step(gamma))
    s.launch(maxpool2d.maxpool2d_fwd, (blocks(most * y.numel, 256), tasks), **args, **_window(attrs, x.shape, y.shape))


def maxpool2d_gather(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    (x, index), (y,) = inputs, outputs
    count, n, _ = s.span(y)
    args = dict(count=count, x=x.data, index=index.data, y=y.data, C=x.shape[0], PIXELS=x.numel // x.shape[0], OUTPUTS=y.numel // y.shape[0])
    s.launch(maxpool2d.maxpool2d_gather, (blocks(n, 256),), **args, BLOCK=256)


rule("maxpool2d_replay", "maxpool2d_jvp")(maxpool2d_gather)


@rule("maxpool2d_bwd", "maxpool2d_bwd_jvp")
def maxpool2d_bwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    (dy, index), (dx,) = inputs, outputs
    count, n, _ = s.span(dx)
    args = dict(count=count, dy=dy.data, index=index.data, dx=dx.data)
    s.launch(maxpool2d.maxpool2d_bwd, (blocks(n, 256),), **args, **_window(attrs, dx.shape, dy.shape))


def _average(attrs: Attrs, x: tuple[int, ...], y: tuple[int, ...]) -> dict[str, Any]:
    if "kernel" in attrs:
        return _window(attrs, x, y) | {"COUNT_PAD": attrs["count_include_pad"]}
    whole = {"kernel": x[1:], "stride": x[1:], "padding": (0, 0)}
    return _window(whole, x, (*y[:1], 1, 1)) | {"COUNT_PAD": True}


@rule("avgpool2d_fwd", "avgpool2d_jvp", "global_avgpool2d_fwd", "global_avgpool2d_jvp")
def avgpool2d_fwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    (x,), (y,) = inputs, outputs
    count, n, _ = s.span(y)
    s.launch(avgpool2d.avgpool2d_fwd, (blocks(n, 256),), count=count, x=x.data, y=y.data, **_average(attrs, x.shape, y.shape))


@rule("avgpool2d_bwd", "avgpool2d_bwd_jvp", "global_avgpool2d_bwd", "global_avgpool2d_bwd_jvp")
def avgpool2d_bwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    (dy,), (dx,) = inputs, outputs
    count, n, _ = s.span(dx)
    s.launch(avgpool2d.avgpool2d_bwd, (blocks(n, 256),), count=count, dy=dy.data, dx=dx.data, **_average(attrs, dx.shape, dy.shape))


def _pad2d(s: Site, x: View, y: View, top: int, left: int) -> None:
    count, n, _ = s.span(y)
    args = dict(count=count, x=x.data, y=y.data, C=x.shape[0], H=x.shape[1], W=x.shape[2], OH=y.shape[1], OW=y.shape[2], TOP=top, LEFT=left, BLOCK=256)
    s.launch(pad2d.pad2d, (blocks(n, 256),), **args)


@rule("pad2d_fwd", "pad2d_jvp")
def pad2d_fwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    top, _, left, _ = attrs["padding"]
    _pad2d(s, inputs[0], outputs[0], top, left)


@rule("pad2d_bwd", "pad2d_bwd_jvp")
def pad2d_bwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    top, _, left, _ = attrs["padding"]
    _pad2d(s, inputs[0], outputs[0], -top, -left)


@rule("reshape_fwd", "reshape_jvp", "reshape_bwd", "reshape_bwd_jvp")
def reshape_fwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    (x,), (y,) = inputs, outputs
    if not attrs["rows"]:
        return _reshape_weight(s, x, y)
    xc, yc = channels_last(x), channels_last(y)
    if xc == yc or {xc, yc} <= {1, y.numel}:
        return s.axpy(y, None, None, x)
    return s.reshape(x, y, xc, yc)


def _copy_rows(s: Site, x: View | None, y: View, extent: str, behind: str | None = None, y_behind: str | None = None) -> None:
    """A task's rows, as many as ``extent`` has, from x to y; behind those of another extent in x or y."""
    of = {None: None, **s.storage.offsets}
    most = s.bucket.rows(extent) * y.numel
    args = dict(offsets=of[extent], x_offsets=of[x.rows] if x else None, y_offsets=of[y.rows], x_skip=of[behind], y_skip=of[y_behind], x=data(x), y=y.data)
    s.launch(rows.copy_rows, (blocks(most, BLOCK), s.tasks), **args, per=y.numel, BLOCK=BLOCK)


@rule("join_rows_fwd")
def join_rows_fwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    (support, query), (joint,) = inputs, outputs
    _copy_rows(s, support, joint, "support")
    _copy_rows(s, query, joint, "query", y_behind="support")


@rule("support_rows_fwd")
def support_rows_fwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    _copy_rows(s, inputs[0], outputs[0], "support")


@rule("query_rows_fwd")
def query_rows_fwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    _copy_rows(s, inputs[0], outputs[0], "query", behind="support")


@rule("query_rows_bwd")
def query_rows_bwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    _copy_rows(s, None, outputs[0], "support")
    _copy_rows(s, inputs[0], outputs[0], "query", y_behind="support")


# ---------------------------------------------------------------------------------------------------------------- weights
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


# ---------------------------------------------------------------------------------------------------------------- losses
def _reduction(attrs: Attrs) -> dict[str, Any]:
    reduction = attrs["reduction"]
    return dict(divisor=1.0 if isinstance(reduction, str) else float(reduction), MEAN=reduction == "mean")


def _classes(n: int) -> tuple[int, int]:
    c = power(n)
    return max(1, min(32, 2048 // c)), c


@rule("cross_entropy_fwd", "cross_entropy_jvp")
def cross_entropy_fwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    z, y, weight, zt = (*inputs, None)[:4]
    loss, correct = (*outputs, None)[:2]
    table, _, tasks = s.own(z.rows)
    br, bc = _classes(z.numel)
    out = s.temp(tasks) if loss is None else loss.data
    args = dict(offsets=table, ways=s.storage.ways, logits=z.data, labels=y.data, weight=data(weight), logits_t=data(zt), loss=out, correct=data(correct))
    args |= _reduction(attrs) | dict(smoothing=attrs["label_smoothing"], C=z.numel, BR=br, BC=bc)
    s.launch(cross_entropy.cross_entropy_fwd, (tasks,), **args)


@rule("cross_entropy_bwd", "cross_entropy_bwd_jvp")
def cross_entropy_bwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    z, y, weight, last = inputs
    tangent = last is not None and last.rows is not None  # bwd has the step's weight there
    table, most, tasks = s.own(z.rows)
    br, bc = _classes(z.numel)
    args = dict(offsets=table, ways=s.storage.ways, logits=z.data, labels=y.data, weight=data(weight), d=outputs[0].data)
    args |= dict(logits_t=data(last) if tangent else None, step_weight=None if tangent else data(last))
    args |= _reduction(attrs) | dict(smoothing=attrs["label_smoothing"], C=z.numel, BR=br, BC=bc)
    s.launch(cross_entropy.cross_entropy_bwd, (blocks(most, br), tasks), **args)


@rule("mse_fwd", "mse_jvp")
def mse_fwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    y, target, _, yt = (*inputs, None)[:4]
    table, _, tasks = s.own(y.rows)
    args = dict(offsets=table, y=y.data, target=target.data, yt=data(yt), loss=outputs[0].data, per=y.numel, BLOCK=BLOCK)
    s.launch(mse.mse_fwd, (tasks,), **args, **_reduction(attrs))


@rule("mse_bwd", "mse_bwd_jvp")
def mse_bwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    y, target, _, last = inputs
    tangent = last is not None and last.rows is not None
    table, most, tasks = s.own(y.rows)
    args = dict(offsets=table, y=y.data, target=target.data, yt=data(last) if tangent else None, step_weight=None if tangent else data(last))
    args |= dict(d=outputs[0].data, per=y.numel, BLOCK=BLOCK)
    s.launch(mse.mse_bwd, (blocks(most * y.numel, BLOCK), tasks), **args, **_reduction(attrs))


# ---------------------------------------------------------------------------------------------------------------- updates
@rule("sgd_fwd")
def sgd_fwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    theta, g, rate = inputs
    s.axpy(outputs[0], theta, rate, g, -1.0)


@rule("sgd_bwd")
def sgd_bwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    theta_bar, rate = inputs
    s.axpy(outputs[0], None, rate, theta_bar, -1.0)


@rule("sgd_bwd_rate")
def sgd_bwd_rate(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    (theta_bar, g, acc), (y,) = inputs, outputs
    if not attrs["per_element"]:
        return s.dot(y, acc, theta_bar, g, -1.0)
    n, args = theta_bar.numel, dict(theta_bar=theta_bar.data, g=g.data, acc=data(acc), y=y.data, task=theta_bar.task)
    return s.launch(update.sgd_bwd_rate_each, (blocks(n, BLOCK), s.tasks), **args, n=n, acc_task=y.task, BLOCK=BLOCK)


@rule("dot_fwd")
def dot_fwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    (x, y, acc), (out,) = inputs, outputs
    s.dot(out, acc, x, y, 1.0)


@rule("clip_value_fwd", "clip_value_bwd")
def clip_value(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    (g, dc), (y,) = (*inputs, None)[:2], outputs
    args = dict(g=g.data, dc=data(dc), y=y.data, bound=attrs["bound"], n=y.numel, g_task=g.task, dc_task=step(dc), y_task=y.task, BLOCK=BLOCK)
    s.launch(update.clip_value, (blocks(y.numel, BLOCK), s.tasks), **args)


@rule("ratio_fwd")
def ratio_fwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    (x, y), (out,) = inputs, outputs
    s.launch(update.ratio, (s.tasks,), x=x.data, y=y.data, out=out.data, x_task=x.task, y_task=y.task, out_task=out.task)


@rule("clip_norm_fwd")
def clip_norm_fwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    (square,), (scale, slope) = inputs, outputs
    args = dict(square=square.data, scale=scale.data, slope=data(slope), max_norm=attrs["max_norm"])
    s.launch(update.clip_norm, (s.tasks,), **args, square_task=square.task, scale_task=scale.task, slope_task=step(slope))


@rule("axpy_fwd")
def axpy_fwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    acc, x, scale = inputs
    s.axpy(outputs[0], acc, scale, x, attrs["sign"])


@rule("scale_fwd")
def scale_fwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    x, scale = inputs
    s.axpy(outputs[0], None, scale, x, attrs["sign"])


@rule("copy_fwd")
def copy_fwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    s.axpy(outputs[0], None, None, inputs[0])


@rule("zero_fwd")
def zero_fwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    s.axpy(outputs[0], None, None, None)
