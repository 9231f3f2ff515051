"""Losses of the rows of a task."""

from __future__ import annotations

from typing import Any

from fastmaml.executors.triton.site import BLOCK, Attrs, Site, Views, blocks, data, power, rule
from fastmaml.kernels import cross_entropy, mse


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
