"""Pooling, padding, reshapes, and moves of rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastmaml.executors.triton.rules.weights import _reshape_weight
from fastmaml.executors.triton.site import BLOCK, Attrs, Site, Views, blocks, data, rule, step
from fastmaml.executors.triton.storage import View, channels_last, same_order
from fastmaml.kernels import avgpool2d, maxpool2d, pad2d, rows


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
    if same_order(x.shape, y.shape):
        return s.axpy(y, None, None, x)
    return s.reshape(x, y, channels_last(x.shape), channels_last(y.shape))


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
