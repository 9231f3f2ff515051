"""Normalisation over the batch, over a sample, over groups of its channels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastmaml.executors.triton.fused import Pool, Update
from fastmaml.executors.triton.site import (
    CHUNK,
    SUMMED,
    Attrs,
    Site,
    Views,
    activating,
    blocks,
    by_channel,
    data,
    delivered,
    plain,
    power,
    rule,
    step,
)
from fastmaml.executors.triton.storage import View
from fastmaml.kernels import batchnorm, layernorm


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
    whole = chunks == 1
    means, squares = (mean.data, rstd.data) if whole else (s.temp(tasks * chunks * c), s.temp(tasks * chunks * c))
    shape = dict(counted=s.storage.offsets[attrs["stat_rows"]], eps=attrs["eps"], chunk=CHUNK, chunks=chunks, C=c, P=p, BC=bc)
    args = dict(offsets=table, x=x.data, means=means, squares=squares, WHOLE=whole, BM=bm)
    s.launch(batchnorm.batchnorm_moments, (blocks(c, bc), chunks, tasks), **args, **shape)
    if not whole:
        args = dict(means=means, squares=squares, mean=mean.data, rstd=rstd.data, BS=16)
        s.launch(batchnorm.batchnorm_stats_fwd, (blocks(c, bc), tasks), **args, **shape)


@rule("batchnorm_running_fwd")
def batchnorm_running_fwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    running_mean, running_var = inputs
    c = running_mean.numel
    mean, rstd = (v or View(s.temp(s.tasks * c), (c,), None, c) for v in outputs)
    args = dict(running_mean=running_mean.data, running_var=running_var.data, mean=mean.data, rstd=rstd.data, eps=attrs["eps"], C=c)
    args |= dict(mean_task=running_mean.task, var_task=running_var.task, BC=power(c, 1, 256))
    s.launch(batchnorm.batchnorm_running_fwd, (blocks(c, power(c, 1, 256)), s.tasks), **args)


def _sums(s: Site, attrs: Attrs, mode: str, extent: str, counted: str, x: View, whole: Views, **operands: Any) -> tuple[Any, Any, dict[str, Any]]:
    """The two sums of every chunk, and what finishing them needs; where there is one chunk, nothing does: what they are for is in ``whole``."""
    (c, p), (bm, bc) = _pixels(x), _tile(x.shape[0], SUMMED, 1024 if mode == "bwd_stats_jvp" else 2048)
    table, most, tasks = s.own(extent)
    chunks = blocks(most * p, CHUNK)
    one, two = map(data, whole) if chunks == 1 else (s.temp(tasks * chunks * c), s.temp(tasks * chunks * c))
    absent = dict.fromkeys(("dy", "xt", "mean_t", "rstd_t", "dyt"))
    shape = dict(counted=s.storage.offsets[counted], chunk=CHUNK, chunks=chunks, C=c, P=p)
    args = absent | operands | shape | dict(offsets=table, x=x.data, sums=one, products=two, MODE=mode, WHOLE=chunks == 1, BM=bm, BC=bc)
    s.launch(batchnorm.batchnorm_sums, (blocks(c, bc), chunks, tasks), **args)
    return one, two, shape


@rule("batchnorm_stats_jvp")
def batchnorm_stats_jvp(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    x, mean, rstd, xt = inputs
    x, xt = by_channel(s, x), by_channel(s, xt)
    c = x.shape[0]
    mean_t, rstd_t = (v or View(s.temp(s.tasks * c), (c,), None, c) for v in outputs)
    operands = dict(mean=mean.data, rstd=rstd.data, xt=xt.data)
    sums, products, shape = _sums(s, attrs, "stats_jvp", x.rows, attrs["stat_rows"], x, (mean_t, rstd_t), **operands)
    if shape["chunks"] > 1:
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
    *parts, shape = _sums(s, attrs, mode, x.rows, x.rows, x, outputs, **operands)
    for part, whole in zip(parts, outputs, strict=True):
        if whole is not None and shape["chunks"] > 1:
            s.sum_chunks(s.storage.offsets[x.rows], part, whole, CHUNK, shape["P"], shape["chunks"], shape["C"])


def _batchnorm_rows(s: Site, attrs: Attrs, mode: str, y: View, index: View | None = None, **operands: View | None) -> None:
    """``index``: of dy, where that is of pooled images. What a pool in front chooses (attrs) comes as its images."""
    pools: dict[str, Pool] = {pool.operand: pool for pool in attrs.get("pools", ())}
    views = {name: by_channel(s, v) if name in ("x", "xt") or (name in ("dy", "dyt") and index is None) else v for name, v in operands.items()}
    views |= {pool.operand: pool.images for pool in pools.values()} | {f"{pool.operand}_out": pool.out for pool in pools.values()}
    index = next(iter(pools.values())).index if pools else index
    rows = replace(y, shape=attrs["pooled"]) if pools else views["x"] or y  # without statistics of rows, dx does not depend on x
    (c, p), (bm, bc) = _pixels(rows), _tile(rows.shape[0], numbers=1024 if mode == "jvp" else 2048)  # so many that they stay in registers
    y, deliver = delivered(s, y, c if len(y.shape) > 1 else 1)
    names = ("x", "mean", "rstd", "gamma", "beta", "dy", "s1", "s2", "xt", "mean_t", "rstd_t", "gamma_t", "beta_t", "dyt", "s1t", "s2t", "x_out", "xt_out")
    args: dict[str, Any] = {name: data(views.get(name)) for name in names}
    window = dict.fromkeys(("H", "W", "OH", "OW", "KH", "KW", "SH", "SW"), 1)
    if pools or index:
        (kh, kw), (sh, sw), (_, h, w) = attrs["kernel"], attrs["stride"], attrs["input_shape"]
        _, oh, ow = attrs["pooled"] if pools else index.shape
        window = dict(H=h, W=w, OH=oh, OW=ow, KH=kh, KW=kw, SH=sh, SW=sw)
    table, most, tasks = s.own(y.rows)
    counted = None if attrs["stat_rows"] is None or not mode.startswith("bwd") else s.storage.offsets[attrs["stat_rows"]]
    args |= {f"{name.upper()}_POOLED": pools[name].how if name in pools else None for name in ("x", "xt")}
    args |= dict(offsets=table, counted=counted, index=data(index), y=y.data, C=c, P=p, MODE=mode, DY_POOLED=mode.startswith("bwd") and index is not None, **window)
    args |= dict(gamma_task=step(views.get("gamma")), beta_task=step(views.get("beta")), BM=bm, BC=bc, **activating(attrs, "relu_mask"))
    s.launch(batchnorm.batchnorm_rows, (blocks(most * p, bm), blocks(c, bc), tasks), **args)
    deliver()


@rule("batchnorm_fwd")
def batchnorm_fwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    x, mean, rstd, gamma, beta = inputs
    _batchnorm_rows(s, attrs, "fwd", outputs[0], x=x, mean=mean, rstd=rstd, gamma=gamma, beta=beta)


@rule("batchnorm_jvp")
def batchnorm_jvp(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    x, mean, rstd, gamma, xt, mean_t, rstd_t, gamma_t, beta_t = inputs
    tangents = dict(xt=xt, mean_t=mean_t, rstd_t=rstd_t, gamma_t=gamma_t, beta_t=beta_t)
    _batchnorm_rows(s, attrs, "jvp", outputs[0], x=x, mean=mean, rstd=rstd, gamma=gamma, **tangents)


@rule("batchnorm_bwd_input", "batchnorm_maxpool2d_bwd_input")
def batchnorm_bwd_input(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    x, mean, rstd, gamma, dy, *index, s1, s2 = inputs
    _batchnorm_rows(s, attrs, "bwd_input", outputs[0], *index, x=x, mean=mean, rstd=rstd, gamma=gamma, dy=dy, s1=s1, s2=s2)


@rule("batchnorm_bwd_input_jvp", "batchnorm_maxpool2d_bwd_input_jvp")
def batchnorm_bwd_input_jvp(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    x, mean, rstd, gamma, dy, *index, s1, s2, xt, mean_t, rstd_t, gamma_t, dyt, s1t, s2t = inputs
    primals = dict(mean=mean, rstd=rstd, gamma=gamma, dy=dy, s1=s1, s2=s2)
    tangents = dict(xt=xt, mean_t=mean_t, rstd_t=rstd_t, gamma_t=gamma_t, dyt=dyt, s1t=s1t, s2t=s2t)
    _batchnorm_rows(s, attrs, "bwd_input_jvp", outputs[0], *index, x=x, **primals, **tangents)


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

    def weight(self, tangent: bool, outputs: Views, updates: Sequence[Update | None] = (None, None)) -> None:
        s, gn, u = self.s, self.cut["GN"], self.cut["U"]
        table, most, tasks = s.own(self.x.rows)
        chunks = blocks(most * u, CHUNK)
        parts = [None if v is None else s.temp(tasks * chunks * gn) for v in outputs]
        bm, bc = _tile(gn, SUMMED)
        args = dict(offsets=table, x=self.x.data, moments=self.moments, dgamma=parts[0], dbeta=parts[1], chunk=CHUNK, chunks=chunks)
        args |= {k: data(v) for k, v in self.rows.items()} | self.cut | dict(TANGENT=tangent, BM=bm, BC=bc)
        s.launch(layernorm.layernorm_weight, (blocks(gn, bc), chunks, tasks), **args)
        for part, whole, update in zip(parts, outputs, updates, strict=True):
            if whole is not None:
                s.sum_chunks(table, part, whole, CHUNK, u, chunks, gn, update)


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
        _RowNorm(s, attrs, name, x, dy=dy).weight(False, outputs, attrs.get("updates", (None, None)))

    @rule(f"{name}_bwd_weight_jvp")
    def bwd_weight_jvp(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
        x, dy, xt, dyt = inputs
        _RowNorm(s, attrs, name, x, dy=dy, xt=xt, dyt=dyt).weight(True, outputs, attrs.get("updates", (None, None)))


for _name in ("layernorm", "groupnorm"):
    _register_rownorm(_name)
