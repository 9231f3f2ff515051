"""Ops to instructions: the four modes of every op, emitted by demand.

``forward`` emits ``<op>_fwd``, and ``<op>_jvp`` for the values whose tangent is not zero; ``backward`` emits ``<op>_bwd`` and ``<op>_bwd_jvp``.
jvp + bwd_jvp is the exact Hessian-vector product, forward over reverse (Pearlmutter 1994). One rule per op, in RULES.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastmaml.plan.instructions import Operand, Ref
from fastmaml.plan.norms import batchnorm, rownorm
from fastmaml.plan.passes import Pass
from fastmaml.plan.patches import patch_moments, patch_stats
from fastmaml.plan.rule import Rule, add_weight_and_bias, attrs_of, dots_of, values_of
from fastmaml.program import Op


def forward(p: Pass) -> None:
    """Primal values of every op, and the tangents that follow from ``p.dot``."""
    for op in p.ops:
        rule = RULES[op.name]
        if op.output in p.before:
            p.before[op.output]()
        if op.output not in p.value:  # memory="fast" brings the values along
            p.value[op.output] = p.like("v", op.output, keep=True)
            rule.fwd(p, op)
        if any(v in p.dot for v in op.inputs):
            ref = rule.jvp(p, op)
            if ref is not None:
                p.dot[op.output] = ref


def backward(p: Pass, tangents: bool = False) -> None:
    """From ``p.bar`` (and ``p.bar_dot``) of the last values to those of the wanted leaves."""
    for op in reversed(p.ops):
        if op.output not in p.wanted:
            continue
        rule = RULES[op.name]
        if op.output in p.bar and not p.bars_given:
            rule.bwd(p, op)
        if tangents:
            rule.bwd_jvp(p, op)


def _contraction(name: str) -> Rule:
    """y = x * w + b, bilinear in x and w (linear, conv2d). The weight gradient and the input gradient are kernels of their own."""

    def attrs(p: Pass, op: Op) -> dict[str, Any]:
        x, w = (p.program.values[v].shape for v in op.inputs[:2])
        return attrs_of(op) | ({"input_shape": x, "weight_shape": w} if name == "conv2d" else {})

    def biased(p: Pass, op: Op, b: Any) -> Any:
        """The bias, but where a normalisation takes it away again (patches.py)."""
        return None if op.output in p.from_patches else b

    def fwd(p: Pass, op: Op) -> None:
        x, w, b = values_of(p, op)
        p.emit(f"{name}_fwd", (x, w, biased(p, op, b)), (p.value[op.output],), **attrs_of(op))

    def jvp(p: Pass, op: Op) -> Operand:
        (x, w, _), (xt, wt, bt) = values_of(p, op), dots_of(p, op)
        tangents = (xt, wt, biased(p, op, bt))
        if not any(tangents):
            return None
        out = p.like("t", op.output)
        p.emit(f"{name}_jvp", (x, w, *tangents), (out,), **attrs_of(op))
        return out

    def bwd(p: Pass, op: Op) -> None:
        (x, w, _), dy = values_of(p, op), p.bar[op.output]
        vx, vw, vb = op.inputs
        p.add_bar(vx, lambda dx: p.emit(f"{name}_bwd_input", (dy, w), (dx,), **attrs(p, op)))
        add_weight_and_bias(p, vw, biased(p, op, vb), f"{name}_bwd_weight", (x, dy), False, attrs(p, op))

    def bwd_jvp(p: Pass, op: Op) -> None:
        (x, w, _), (xt, wt, _) = values_of(p, op), dots_of(p, op)
        vx, vw, vb = op.inputs
        dy, dyt = p.bar.get(op.output), p.bar_dot.get(op.output)
        if dyt is not None or (dy is not None and wt is not None):
            p.add_bar(vx, lambda dx: p.emit(f"{name}_bwd_input_jvp", (dy, w, dyt, wt), (dx,), **attrs(p, op)), dot=True)
        if dyt is not None or (dy is not None and xt is not None):
            vb = biased(p, op, vb) if dyt is not None else None
            add_weight_and_bias(p, vw, vb, f"{name}_bwd_weight_jvp", (x, None if xt is None else dy, xt, dyt), True, attrs(p, op))

    return Rule(fwd, jvp, bwd, bwd_jvp)


def _unary(name: str, mask: str | None = None) -> Rule:
    """Elementwise f(x). ``mask``: the kind of discrete decision that the backward pass reads instead of x (ReLU)."""

    def shape(p: Pass, op: Op) -> tuple[tuple[int, ...], bool]:
        return p.program.values[op.output].shape, p.program.values[op.output].rows

    def fwd(p: Pass, op: Op) -> None:
        (x,), y = values_of(p, op), p.value[op.output]
        if mask is None:
            p.emit(f"{name}_fwd", (x,), (y,), **attrs_of(op))
        elif (op.output, mask) in p.saved:  # replays the decision of an earlier pass of this step
            p.emit(f"{name}_replay", (x, p.saved[op.output, mask]), (y,), **attrs_of(op))
        else:
            p.emit(f"{name}_fwd", (x,), (y, p.save(op, mask, *shape(p, op), kind=mask)), **attrs_of(op))

    def point(p: Pass, op: Op) -> Ref:
        return p.saved[op.output, mask] if mask else p.value[op.inputs[0]]

    def jvp(p: Pass, op: Op) -> Operand:
        out = p.like("t", op.output)
        p.emit(f"{name}_jvp", (point(p, op), p.dot[op.inputs[0]]), (out,), **attrs_of(op))
        return out

    def bwd(p: Pass, op: Op) -> None:
        dy = p.bar[op.output]
        p.add_bar(op.inputs[0], lambda dx: p.emit(f"{name}_bwd", (point(p, op), dy), (dx,), **attrs_of(op)))

    def bwd_jvp(p: Pass, op: Op) -> None:
        xt, dy, dyt = p.dot.get(op.inputs[0]), p.bar.get(op.output), p.bar_dot.get(op.output)
        if mask is not None and dyt is not None:  # piecewise linear: no second derivative
            p.add_bar(op.inputs[0], lambda dx: p.emit(f"{name}_bwd_jvp", (point(p, op), dyt), (dx,), **attrs_of(op)), dot=True)
        elif mask is None and (dyt is not None or (xt is not None and dy is not None)):
            inputs = (point(p, op), xt, dy, dyt)
            p.add_bar(op.inputs[0], lambda dx: p.emit(f"{name}_bwd_jvp", inputs, (dx,), **attrs_of(op)), dot=True)

    return Rule(fwd, jvp, bwd, bwd_jvp)


def _structural(name: str) -> Rule:
    """Linear in x and without weights (reshape, pads, average pools): the jvp is the fwd of the tangent."""

    def attrs(p: Pass, op: Op) -> dict[str, Any]:
        """The reverse needs the shape it goes back to."""
        spec = p.program.values[op.inputs[0]]
        return {**op.attrs, "input_shape": spec.shape, "rows": spec.rows}

    def fwd(p: Pass, op: Op) -> None:
        p.emit(f"{name}_fwd", values_of(p, op), (p.value[op.output],), **attrs(p, op))

    def jvp(p: Pass, op: Op) -> Operand:
        out = p.like("t", op.output)
        p.emit(f"{name}_jvp", dots_of(p, op), (out,), **attrs(p, op))
        return out

    def bwd(p: Pass, op: Op) -> None:
        p.add_bar(op.inputs[0], lambda dx: p.emit(f"{name}_bwd", (p.bar[op.output],), (dx,), **attrs(p, op)))

    def bwd_jvp(p: Pass, op: Op) -> None:
        if op.output in p.bar_dot:
            dyt = p.bar_dot[op.output]
            p.add_bar(op.inputs[0], lambda dx: p.emit(f"{name}_bwd_jvp", (dyt,), (dx,), **attrs(p, op)), dot=True)

    return Rule(fwd, jvp, bwd, bwd_jvp)


def _maxpool2d() -> Rule:
    """Keeps the index of the first maximum of each window; everything after is a gather or a scatter."""
    name = "maxpool2d"

    def fwd(p: Pass, op: Op) -> None:
        (x,), y = values_of(p, op), p.value[op.output]
        if (op.output, "index") in p.saved:
            p.emit(f"{name}_replay", (x, p.saved[op.output, "index"]), (y,), **attrs_of(op))
        else:
            index = p.save(op, "index", p.program.values[op.output].shape, True, kind="index")
            p.emit(f"{name}_fwd", (x,), (y, index), **attrs_of(op))

    def jvp(p: Pass, op: Op) -> Operand:
        out = p.like("t", op.output)
        p.emit(f"{name}_jvp", (p.dot[op.inputs[0]], p.saved[op.output, "index"]), (out,), **attrs_of(op))
        return out

    def scatter(p: Pass, op: Op, dy: Operand, mode: str) -> None:
        index, shape = p.saved[op.output, "index"], p.program.values[op.inputs[0]].shape
        p.add_bar(
            op.inputs[0],
            lambda dx: p.emit(f"{name}_{mode}", (dy, index), (dx,), **op.attrs, input_shape=shape),
            dot=mode == "bwd_jvp",
        )

    def bwd_jvp(p: Pass, op: Op) -> None:
        if op.output in p.bar_dot:
            scatter(p, op, p.bar_dot[op.output], "bwd_jvp")

    return Rule(fwd, jvp, lambda p, op: scatter(p, op, p.bar[op.output], "bwd"), bwd_jvp)


def _add() -> Rule:
    """Residual sums of samples (the adjoint is an alias), or a broadcasting sum of weights."""

    def broadcasts(p: Pass, op: Op) -> bool:
        return any(p.program.values[v].shape != p.program.values[op.output].shape for v in op.inputs)

    def fwd(p: Pass, op: Op) -> None:
        p.emit("add_fwd", values_of(p, op), (p.value[op.output],))

    def jvp(p: Pass, op: Op) -> Operand:
        x, y = dots_of(p, op)
        if not broadcasts(p, op) and (x is None or y is None):
            return x or y
        out = p.like("t", op.output)
        p.emit("add_jvp", (x, y), (out,), shape=p.program.values[op.output].shape)
        return out

    def reverse(p: Pass, op: Op, dy: Ref, dot: bool) -> None:
        for v in op.inputs:
            shape = p.program.values[v].shape
            if shape == p.program.values[op.output].shape:
                p.alias_bar(v, dy, dot)
            else:
                mode = "bwd_jvp" if dot else "bwd"
                p.add_bar(v, lambda dx, s=shape, m=mode: p.emit(f"add_{m}", (dy,), (dx,), input_shape=s), dot)

    def bwd_jvp(p: Pass, op: Op) -> None:
        if op.output in p.bar_dot:
            reverse(p, op, p.bar_dot[op.output], True)

    return Rule(fwd, jvp, lambda p, op: reverse(p, op, p.bar[op.output], False), bwd_jvp)


def _product(name: str) -> Rule:
    """mul and matmul of weights: z = x * y."""

    def fwd(p: Pass, op: Op) -> None:
        p.emit(f"{name}_fwd", values_of(p, op), (p.value[op.output],))

    def jvp(p: Pass, op: Op) -> Operand:
        out = p.like("t", op.output)
        p.emit(f"{name}_jvp", (*values_of(p, op), *dots_of(p, op)), (out,))
        return out

    def bwd(p: Pass, op: Op) -> None:
        (x, y), dz = values_of(p, op), p.bar[op.output]
        for i, v in enumerate(op.inputs):
            p.add_bar(v, lambda dx, i=i: p.emit(f"{name}_bwd", (x, y, dz), (dx,), operand=i))

    def bwd_jvp(p: Pass, op: Op) -> None:
        (x, y), dots = values_of(p, op), dots_of(p, op)
        dz, dzt = p.bar.get(op.output), p.bar_dot.get(op.output)
        for i, v in enumerate(op.inputs):
            other = dots[1 - i]
            if dzt is not None or (dz is not None and other is not None):
                inputs = (x, y, dz, other, dzt)
                p.add_bar(v, lambda dx, a=inputs, i=i: p.emit(f"{name}_bwd_jvp", a, (dx,), operand=i), dot=True)

    return Rule(fwd, jvp, bwd, bwd_jvp)


def _gram() -> Rule:
    """G = x x_s^T: of data alone, so it has no derivatives."""

    def fwd(p: Pass, op: Op) -> None:
        g = p.value[op.output]
        p.buffers[g.buffer] = replace(p.buffers[g.buffer], columns="support")
        p.emit("gram_fwd", (p.value[op.inputs[0]], p.support_data), (g,))

    def none(p: Pass, op: Op) -> None:
        return None

    return Rule(fwd, none, none, none)


def _factored_linear() -> Rule:
    """y = A + G D + b (see rewrite.py). The gradient pass hands out delta = dy itself as the gradient of D, which is what the update of W does to D;
    the others hand out the cotangent G^T dy. An HVP's direction is that of y."""

    def fwd(p: Pass, op: Op) -> None:
        p.emit("factored_linear_fwd", values_of(p, op), (p.value[op.output],))

    def jvp(p: Pass, op: Op) -> Operand:
        _, _, state_t, bias_t = dots_of(p, op)
        if bias_t is None:
            return state_t
        out = p.like("t", op.output)
        p.emit("factored_linear_jvp", (state_t, bias_t), (out,))
        return out

    def reverse(p: Pass, op: Op, dy: Ref, dot: bool) -> None:
        base, gram, state, bias = op.inputs
        if p.factor_gradient:
            p.alias_bar(state, dy)
        else:
            mode = "bwd_jvp" if dot else "bwd"
            p.add_bar(state, lambda d: p.emit(f"factored_linear_{mode}", (p.value[gram], dy), (d,)), dot)
        p.alias_bar(base, dy, dot)
        if bias in p.wanted:
            name = "row_sum_bwd_jvp" if dot else "row_sum_bwd"
            p.add_bar(bias, lambda d: p.emit(name, (dy,), (d,)), dot)

    def bwd_jvp(p: Pass, op: Op) -> None:
        if op.output in p.bar_dot:
            reverse(p, op, p.bar_dot[op.output], True)

    return Rule(fwd, jvp, lambda p, op: reverse(p, op, p.bar[op.output], False), bwd_jvp)


def _module() -> Rule:
    """A whole nn.Module as one op. Its graph is recomputed once per pass; one double backward of it gives the tangent J u and the second-order
    term of the HVP together, so ``module_jvp`` also reads dy: the caller orders it after the primal backward pass (see sweep.order)."""

    def graph(p: Pass, op: Op) -> Ref:
        return p.saved[op.output, "graph"]

    def fwd(p: Pass, op: Op) -> None:
        values, y = values_of(p, op), p.value[op.output]
        p.saved[op.output, "graph"] = handle = p.new(f"graph{op.output}", (), False, "handle")
        if (op.output, "rng") in p.saved:  # the same dropout as in the gradient pass of this step
            p.emit("module_replay", (*values, p.saved[op.output, "rng"]), (y, handle), **attrs_of(op))
        else:
            p.emit("module_fwd", values, (y, handle, p.save(op, "rng", (), False, "handle")), **attrs_of(op))

    def leaves(p: Pass, op: Op, tag: str) -> list[Operand]:
        return [p.like(tag, v) if v in p.wanted else None for v in op.inputs[1:]]

    def jvp(p: Pass, op: Op) -> Operand:
        p.bar[op.output] = p.like("d", op.output)  # written by the loss's backward, read here
        second = leaves(p, op, "s")
        out = p.like("t", op.output)
        p.emit("module_jvp", (graph(p, op), p.bar[op.output], *dots_of(p, op)[1:]), (out, *second), **attrs_of(op))
        p.second[op.output] = second
        return out

    def bwd(p: Pass, op: Op) -> None:
        grads = leaves(p, op, "d")
        if op.output in p.second:  # the HVP never reads the primal gradient of a leaf, only of an expression
            grads = [None if v in p.leaf_values else ref for v, ref in zip(op.inputs[1:], grads, strict=True)]
            if not any(grads):
                return
        p.emit("module_bwd", (graph(p, op), p.bar[op.output]), grads, **attrs_of(op))
        for v, ref in zip(op.inputs[1:], grads, strict=True):
            p.alias_bar(v, ref)

    def bwd_jvp(p: Pass, op: Op) -> None:
        grads = leaves(p, op, "dd")
        p.emit("module_bwd_jvp", (graph(p, op), p.bar_dot[op.output], *p.second[op.output]), grads, **attrs_of(op))
        for v, ref in zip(op.inputs[1:], grads, strict=True):
            p.alias_bar(v, ref, dot=True)

    return Rule(fwd, jvp, bwd, bwd_jvp)


RULES: Mapping[str, Rule] = {
    "linear": _contraction("linear"),
    "conv2d": _contraction("conv2d"),
    "batchnorm": batchnorm(),
    "batchnorm_maxpool2d": batchnorm(pooled=True),
    "layernorm": rownorm("layernorm"),
    "groupnorm": rownorm("groupnorm"),
    "relu": _unary("relu", "mask"),
    "leaky_relu": _unary("leaky_relu", "mask"),
    **{name: _unary(name) for name in ("tanh", "sigmoid", "exp", "elu", "gelu", "silu", "softplus")},
    "maxpool2d": _maxpool2d(),
    **{name: _structural(name) for name in ("avgpool2d", "global_avgpool2d", "pad2d", "reshape", "transpose", "slice")},
    "add": _add(),
    "mul": _product("mul"),
    "matmul": _product("matmul"),
    "patch_moments": patch_moments(),
    "patch_stats": patch_stats(),
    "gram": _gram(),
    "factored_linear": _factored_linear(),
    "module": _module(),
}
