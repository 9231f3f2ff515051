"""Batch statistics of a convolution of the samples from the moments of its patches."""

from __future__ import annotations

from typing import Any

import torch

from fastmaml.executors.triton.site import CHUNK, Attrs, Site, Views, blocks, data, power, rule, step, updating
from fastmaml.executors.triton.storage import View
from fastmaml.kernels import patch_stats


@rule("patch_moments_fwd")
def patch_moments_fwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    (x,), (moments,) = inputs, outputs
    (channels, kh, kw), (sh, sw), (top, _, left, _), (oh, ow) = (attrs[name] for name in ("patch", "stride", "padding", "pixels"))
    table, most, tasks = s.own(x.rows)
    size, chunks, tile = channels * kh * kw, blocks(most * oh * ow, CHUNK), 16
    sums = s.temp(tasks * chunks * (1 + size) * size, torch.float64)
    args = dict(offsets=table, sums=sums, chunk=CHUNK, chunks=chunks)
    shape = dict(H=x.shape[1], W=x.shape[2], CI=channels, OH=oh, OW=ow, KH=kh, KW=kw, SH=sh, SW=sw, PT=top, PL=left)
    columns = blocks(size, tile)
    s.launch(patch_stats.patch_moments_sums, (blocks(1 + size, tile) * columns, chunks, tasks), **args, x=x.data, TILES=columns, **shape, BM=8, BN=tile)
    args |= dict(moments=moments.data, pixels=oh * ow, size=size, moments_task=moments.task, BS=8, BLOCK=64)
    s.launch(patch_stats.patch_moments_fwd, (blocks((1 + size) * size, 64), tasks), **args)


def _weight(moments: View, w: View) -> dict[str, Any]:
    outputs, channels, kh, kw = w.shape
    return dict(moments=moments.data, w=w.data, moments_task=moments.task, w_task=w.task, CI=channels, TAPS=kh * kw, outputs=outputs)


@rule("patch_stats_fwd", "patch_stats_jvp")
def patch_stats_fwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    moments, w, rstd, wt = (*inputs, None, None)[:4]
    mean, second = (v or View(s.temp(s.tasks * w.shape[0]), w.shape[:1], None, w.shape[0]) for v in outputs)
    bo = power(w.shape[0], 1, 16)
    args = _weight(moments, w) | dict(rstd=data(rstd), wt=data(wt), wt_task=step(wt), mean=mean.data, second=second.data, eps=attrs.get("eps", 0.0))
    s.launch(patch_stats.patch_stats, (blocks(w.shape[0], bo), s.tasks), **args, BI=8, BO=bo)


@rule("patch_stats_bwd", "patch_stats_bwd_jvp")
def patch_stats_bwd(s: Site, attrs: Attrs, inputs: Views, outputs: Views) -> None:
    moments, w, gamma, rstd, s1, s2, wt, gamma_t, rstd_t, s1t, s2t = (*inputs, *[None] * 5)[:11]
    (dw,), size, bo, (update,) = outputs, w.numel // w.shape[0], power(w.shape[0], 1, 16), attrs.get("updates", (None,))
    args = _weight(moments, w) | dict(gamma=data(gamma), rstd=rstd.data, s1=data(s1), s2=data(s2), wt=data(wt), gamma_t=data(gamma_t), rstd_t=data(rstd_t))
    args |= dict(s1t=data(s1t), s2t=data(s2t), dw=dw.data, gamma_task=step(gamma), wt_task=step(wt), dw_task=dw.task, TANGENT=len(inputs) > 6)
    args |= dict(plus=data(update and update.plus), plus_task=step(update and update.plus), **updating("", update))
    s.launch(patch_stats.patch_stats_weight, (blocks(size, 8), blocks(w.shape[0], bo), s.tasks), **args, BI=8, BO=bo)
