"""Steps of the inner loop, and sums over whole arrays."""

from __future__ import annotations

from fastmaml.executors.triton.site import BLOCK, Attrs, Site, Views, blocks, data, rule, step
from fastmaml.kernels import update


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
