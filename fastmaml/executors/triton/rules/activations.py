"""Activations: smooth ones, and those with masks."""

from __future__ import annotations

from fastmaml.executors.triton.site import BLOCK, Attrs, Site, Views, blocks, data, rule
from fastmaml.executors.triton.storage import View
from fastmaml.kernels import activations, relu


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
