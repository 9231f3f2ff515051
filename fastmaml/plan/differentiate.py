"""Ops to instructions: the four modes of every op, emitted by demand.

``forward`` emits ``<op>_fwd``, and ``<op>_jvp`` for the values whose tangent is not zero; ``backward`` emits ``<op>_bwd`` and ``<op>_bwd_jvp``.
jvp + bwd_jvp is the exact Hessian-vector product, forward over reverse (Pearlmutter 1994). One rule per op, in RULES.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fastmaml.plan.instructions import Operand, Ref
from fastmaml.plan.passes import Pass
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


@dataclass(frozen=True)
class Rule:
    """How an op becomes instructions. ``jvp`` returns the tangent's Ref, or None where it vanishes."""

    fwd: Callable[[Pass, Op], None]
    jvp: Callable[[Pass, Op], Operand]
    bwd: Callable[[Pass, Op], None]
    bwd_jvp: Callable[[Pass, Op], None]


def _values(p: Pass, op: Op) -> list[Operand]:
    return [None if v is None else p.value[v] for v in op.inputs]


def _dots(p: Pass, op: Op) -> list[Operand]:
    return [None if v is None else p.dot.get(v) for v in op.inputs]


def _attrs(op: Op) -> dict[str, Any]:
    return dict(op.attrs)


def _contraction(name: str) -> Rule:
    """y = x * w + b, bilinear in x and w (linear, conv2d). The weight gradient and the input gradient are kernels of their own."""

    def attrs(p: Pass, op: Op) -> dict[str, Any]:
        x, w = (p.program.values[v].shape for v in op.inputs[:2])
        return _attrs(op) | ({"input_shape": x, "weight_shape": w} if name == "conv2d" else {})

    def fwd(p: Pass, op: Op) -> None:
        p.emit(f"{name}_fwd", _values(p, op), (p.value[op.output],), **_attrs(op))

    def jvp(p: Pass, op: Op) -> Operand:
        x, w, _ = _values(p, op)
        out = p.like("t", op.output)
        p.emit(f"{name}_jvp", (x, w, *_dots(p, op)), (out,), **_attrs(op))
        return out

    def bwd(p: Pass, op: Op) -> None:
        (x, w, _), dy = _values(p, op), p.bar[op.output]
        vx, vw, vb = op.inputs
        p.add_bar(vx, lambda dx: p.emit(f"{name}_bwd_input", (dy, w), (dx,), **attrs(p, op)))
        _weight_and_bias(p, vw, vb, f"{name}_bwd_weight", (x, dy), False, attrs(p, op))

    def bwd_jvp(p: Pass, op: Op) -> None:
        (x, w, _), (xt, wt, _) = _values(p, op), _dots(p, op)
        vx, vw, vb = op.inputs
        dy, dyt = p.bar.get(op.output), p.bar_dot.get(op.output)
        if dyt is not None or (dy is not None and wt is not None):
            p.add_bar(vx, lambda dx: p.emit(f"{name}_bwd_input_jvp", (dy, w, dyt, wt), (dx,), **attrs(p, op)), dot=True)
        if dyt is not None or (dy is not None and xt is not None):
            _weight_and_bias(p, vw, vb if dyt is not None else None, f"{name}_bwd_weight_jvp", (x, None if xt is None else dy, xt, dyt), True, attrs(p, op))

    return Rule(fwd, jvp, bwd, bwd_jvp)


def _weight_and_bias(
    p: Pass, vw: int | None, vb: int | None, kernel: str, inputs: tuple[Operand, ...], dot: bool, attrs: dict[str, Any]
) -> None:
    """One instruction for dw and db, either of which may be unwanted."""
    targets = [v if v is not None and v in p.wanted else None for v in (vw, vb)]
    refs = [None if v is None else p.like("dd" if dot else "d", v, keep=not dot) for v in targets]
    if any(refs):
        p.emit(kernel, inputs, refs, **attrs)
        for v, ref in zip(targets, refs, strict=True):
            p.alias_bar(v, ref, dot)


def _unary(name: str, mask: str | None = None) -> Rule:
    """Elementwise f(x). ``mask``: the kind of discrete decision that the backward pass reads instead of x (ReLU)."""

    def shape(p: Pass, op: Op) -> tuple[tuple[int, ...], bool]:
        return p.program.values[op.output].shape, p.program.values[op.output].rows

    def fwd(p: Pass, op: Op) -> None:
        (x,), y = _values(p, op), p.value[op.output]
        if mask is None:
            p.emit(f"{name}_fwd", (x,), (y,), **_attrs(op))
        elif (op.output, mask) in p.saved:  # replays the decision of an earlier pass of this step
            p.emit(f"{name}_replay", (x, p.saved[op.output, mask]), (y,), **_attrs(op))
        else:
            p.emit(f"{name}_fwd", (x,), (y, p.save(op, mask, *shape(p, op), kind=mask)), **_attrs(op))

    def point(p: Pass, op: Op) -> Ref:
        return p.saved[op.output, mask] if mask else p.value[op.inputs[0]]

    def jvp(p: Pass, op: Op) -> Operand:
        out = p.like("t", op.output)
        p.emit(f"{name}_jvp", (point(p, op), p.dot[op.inputs[0]]), (out,), **_attrs(op))
        return out

    def bwd(p: Pass, op: Op) -> None:
        dy = p.bar[op.output]
        p.add_bar(op.inputs[0], lambda dx: p.emit(f"{name}_bwd", (point(p, op), dy), (dx,), **_attrs(op)))

    def bwd_jvp(p: Pass, op: Op) -> None:
        xt, dy, dyt = p.dot.get(op.inputs[0]), p.bar.get(op.output), p.bar_dot.get(op.output)
        if mask is not None and dyt is not None:  # piecewise linear: no second derivative
            p.add_bar(op.inputs[0], lambda dx: p.emit(f"{name}_bwd_jvp", (point(p, op), dyt), (dx,), **_attrs(op)), dot=True)
        elif mask is None and (dyt is not None or (xt is not None and dy is not None)):
            inputs = (point(p, op), xt, dy, dyt)
            p.add_bar(op.inputs[0], lambda dx: p.emit(f"{name}_bwd_jvp", inputs, (dx,), **_attrs(op)), dot=True)

    return Rule(fwd, jvp, bwd, bwd_jvp)


def _structural(name: str) -> Rule:
    """Linear in x and without weights (reshape, pads, average pools): the jvp is the fwd of the tangent."""

    def attrs(p: Pass, op: Op) -> dict[str, Any]:
        """The reverse needs the shape it goes back to."""
        spec = p.program.values[op.inputs[0]]
        return {**op.attrs, "input_shape": spec.shape, "rows": spec.rows}

    def fwd(p: Pass, op: Op) -> None:
        p.emit(f"{name}_fwd", _values(p, op), (p.value[op.output],), **attrs(p, op))

    def jvp(p: Pass, op: Op) -> Operand:
        out = p.like("t", op.output)
        p.emit(f"{name}_jvp", _dots(p, op), (out,), **attrs(p, op))
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
        (x,), y = _values(p, op), p.value[op.output]
        if (op.output, "index") in p.saved:
            p.emit(f"{name}_replay", (x, p.saved[op.output, "index"]), (y,), **_attrs(op))
        else:
            index = p.save(op, "index", p.program.values[op.output].shape, True, kind="index")
            p.emit(f"{name}_fwd", (x,), (y, index), **_attrs(op))

    def jvp(p: Pass, op: Op) -> Operand:
        out = p.like("t", op.output)
        p.emit(f"{name}_jvp", (p.dot[op.inputs[0]], p.saved[op.output, "index"]), (out,), **_attrs(op))
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


def _batchnorm(pooled: bool = False) -> Rule:
    """Statistics are reductions of their own (they close a group); normalising is row by row. d(statistics) are also dbeta and dgamma.

    ``pooled``: batchnorm_maxpool2d (see pooling.py). The extremum of each window is taken before it is normalised, so that only the statistics and
    the gradient of x are of all pixels; the rest works on what was chosen."""

    def attrs(p: Pass, op: Op) -> dict[str, Any]:
        """``stat_rows``: the extent whose rows make the statistics (in a joint pass the support's), None for running ones."""
        statistics = op.attrs["statistics"]
        rows = None if statistics == "running" else "support" if statistics == "support" and p.extent == "joint" else p.extent
        return {"eps": op.attrs["eps"], "stat_rows": rows}

    def window(op: Op) -> dict[str, Any]:
        return {name: op.attrs[name] for name in ("kernel", "stride", "padding")}

    def stats(p: Pass, op: Op) -> tuple[Ref, Ref]:
        """Made where they are first asked for: by the jvp, where the output itself is given."""
        if (op.output, "mean") not in p.saved:
            x, _, _, running_mean, running_var = _values(p, op)
            channels = p.program.values[op.output].shape[:1]
            out = (p.save(op, "mean", channels, False), p.save(op, "rstd", channels, False))
            if op.attrs["statistics"] == "running":
                p.emit("batchnorm_running_fwd", (running_mean, running_var), out, **attrs(p, op))
            else:
                p.emit("batchnorm_stats_fwd", (x,), out, **attrs(p, op))
        return p.saved[op.output, "mean"], p.saved[op.output, "rstd"]

    def chosen(p: Pass, op: Op) -> Operand:
        """x where the normalisation sees it."""
        x, gamma, *_ = _values(p, op)
        if not pooled:
            return x
        if op.output not in p.chosen:
            shape = p.program.values[op.output].shape
            p.chosen[op.output] = out = p.new(f"x{op.output}", shape, True)
            if (op.output, "index") in p.saved:
                p.emit("maxpool2d_replay", (x, p.saved[op.output, "index"]), (out,), **window(op))
            else:
                index = p.save(op, "index", shape, True, kind="index")
                p.emit("batchnorm_maxpool2d_fwd", (x, gamma), (out, index), **window(op))
        return p.chosen[op.output]

    def chosen_dot(p: Pass, op: Op) -> Operand:
        xt = p.dot.get(op.inputs[0])
        if not pooled or xt is None:
            return xt
        if op.output not in p.chosen_dot:
            p.chosen_dot[op.output] = out = p.new(f"tx{op.output}", p.program.values[op.output].shape, True)
            p.emit("maxpool2d_jvp", (xt, p.saved[op.output, "index"]), (out,), **window(op))
        return p.chosen_dot[op.output]

    def fwd(p: Pass, op: Op) -> None:
        _, gamma, beta, *_ = _values(p, op)
        x = chosen(p, op)  # first: while x is still in the cache
        p.emit("batchnorm_fwd", (x, *stats(p, op), gamma, beta), (p.value[op.output],), **attrs(p, op))

    def jvp(p: Pass, op: Op) -> Operand:
        (x, gamma, *_), (xt, gamma_t, beta_t, *_) = _values(p, op), _dots(p, op)
        stats_t: tuple[Operand, Operand] = (None, None)
        if xt is not None and op.attrs["statistics"] != "running":
            channels = p.program.values[op.output].shape[:1]
            stats_t = (p.new(f"tmean{op.output}", channels, False), p.new(f"trstd{op.output}", channels, False))
            p.emit("batchnorm_stats_jvp", (x, *stats(p, op), xt), stats_t, **attrs(p, op))
        p.dot_stats[op.output] = stats_t
        out = p.like("t", op.output)
        p.emit("batchnorm_jvp", (chosen(p, op), *stats(p, op), gamma, chosen_dot(p, op), *stats_t, gamma_t, beta_t), (out,), **attrs(p, op))
        return out

    def to_input(p: Pass, op: Op, mode: str, before: tuple[Operand, ...], after: tuple[Operand, ...], dot: bool) -> None:
        """The gradient of all of x, or its tangent."""
        name, index, more = "batchnorm", (), attrs(p, op)
        if pooled:
            name, index = "batchnorm_maxpool2d", (p.saved[op.output, "index"],)
            more |= window(op) | {"input_shape": p.program.values[op.inputs[0]].shape}
        p.add_bar(op.inputs[0], lambda dx: p.emit(f"{name}_{mode}", (*before, *index, *after), (dx,), **more), dot=dot)

    def bwd(p: Pass, op: Op) -> None:
        (x, gamma, *_), dy = _values(p, op), p.bar[op.output]
        _, vgamma, vbeta = op.inputs[:3]
        sums = _channel_sums(p, op, "")
        p.emit("batchnorm_bwd_stats", (chosen(p, op), *stats(p, op), dy), sums, **attrs(p, op))
        p.bar_sums[op.output] = sums
        to_input(p, op, "bwd_input", (x, *stats(p, op), gamma, dy), sums, False)
        p.alias_bar(vgamma, sums[1])
        p.alias_bar(vbeta, sums[0])

    def bwd_jvp(p: Pass, op: Op) -> None:
        (x, gamma, *_), (xt, gamma_t, *_) = _values(p, op), _dots(p, op)
        _, vgamma, vbeta = op.inputs[:3]
        dy, dyt = p.bar.get(op.output), p.bar_dot.get(op.output)
        if dyt is None and (dy is None or (xt is None and gamma_t is None)):
            return
        stats_t = p.dot_stats.get(op.output, (None, None))
        sums_t: tuple[Operand, Operand] = (None, None)
        if dyt is not None or xt is not None:
            sums_t = _channel_sums(p, op, "t")
            p.emit("batchnorm_bwd_stats_jvp", (chosen(p, op), *stats(p, op), dy, chosen_dot(p, op), *stats_t, dyt), sums_t, **attrs(p, op))
        sums = p.bar_sums.get(op.output, (None, None))
        to_input(p, op, "bwd_input_jvp", (x, *stats(p, op), gamma, dy), (*sums, xt, *stats_t, gamma_t, dyt, *sums_t), True)
        p.alias_bar(vgamma, sums_t[1], dot=True)
        p.alias_bar(vbeta, sums_t[0] if dyt is not None else None, dot=True)

    return Rule(fwd, jvp, bwd, bwd_jvp)


def _channel_sums(p: Pass, op: Op, tag: str) -> tuple[Ref, Ref]:
    channels = p.program.values[op.output].shape[:1]
    keep = p.keep_steps if p.keep_values and not tag else 0
    return p.new(f"s{tag}dy{op.output}", channels, False, steps=keep), p.new(f"s{tag}dyx{op.output}", channels, False, steps=keep)


def _rownorm(name: str) -> Rule:
    """layernorm, groupnorm: statistics within one sample, so everything but the affine's gradient is row by row."""

    def fwd(p: Pass, op: Op) -> None:
        p.emit(f"{name}_fwd", _values(p, op), (p.value[op.output],), **_attrs(op))

    def jvp(p: Pass, op: Op) -> Operand:
        (x, gamma, _), out = _values(p, op), p.like("t", op.output)
        p.emit(f"{name}_jvp", (x, gamma, *_dots(p, op)), (out,), **_attrs(op))
        return out

    def bwd(p: Pass, op: Op) -> None:
        (x, gamma, _), dy = _values(p, op), p.bar[op.output]
        p.add_bar(op.inputs[0], lambda dx: p.emit(f"{name}_bwd_input", (x, gamma, dy), (dx,), **_attrs(op)))
        _affine(p, op, f"{name}_bwd_weight", (x, dy), False)

    def bwd_jvp(p: Pass, op: Op) -> None:
        (x, gamma, _), (xt, gamma_t, _) = _values(p, op), _dots(p, op)
        dy, dyt = p.bar.get(op.output), p.bar_dot.get(op.output)
        if dyt is None and (dy is None or (xt is None and gamma_t is None)):
            return
        inputs = (x, gamma, dy, xt, gamma_t, dyt)
        p.add_bar(op.inputs[0], lambda dx: p.emit(f"{name}_bwd_input_jvp", inputs, (dx,), **_attrs(op)), dot=True)
        if dyt is not None or xt is not None:
            _affine(p, op, f"{name}_bwd_weight_jvp", (x, dy, xt, dyt), True, beta=dyt is not None)

    return Rule(fwd, jvp, bwd, bwd_jvp)


def _affine(p: Pass, op: Op, kernel: str, inputs: tuple[Operand, ...], dot: bool, beta: bool = True) -> None:
    vgamma, vbeta = op.inputs[1], op.inputs[2] if beta else None
    if vgamma is None and vbeta is None:
        return
    _weight_and_bias(p, vgamma, vbeta, kernel, inputs, dot, _attrs(op))


def _add() -> Rule:
    """Residual sums of samples (the adjoint is an alias), or a broadcasting sum of weights."""

    def broadcasts(p: Pass, op: Op) -> bool:
        return any(p.program.values[v].shape != p.program.values[op.output].shape for v in op.inputs)

    def fwd(p: Pass, op: Op) -> None:
        p.emit("add_fwd", _values(p, op), (p.value[op.output],))

    def jvp(p: Pass, op: Op) -> Operand:
        x, y = _dots(p, op)
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
        p.emit(f"{name}_fwd", _values(p, op), (p.value[op.output],))

    def jvp(p: Pass, op: Op) -> Operand:
        out = p.like("t", op.output)
        p.emit(f"{name}_jvp", (*_values(p, op), *_dots(p, op)), (out,))
        return out

    def bwd(p: Pass, op: Op) -> None:
        (x, y), dz = _values(p, op), p.bar[op.output]
        for i, v in enumerate(op.inputs):
            p.add_bar(v, lambda dx, i=i: p.emit(f"{name}_bwd", (x, y, dz), (dx,), operand=i))

    def bwd_jvp(p: Pass, op: Op) -> None:
        (x, y), dots = _values(p, op), _dots(p, op)
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
        p.emit("factored_linear_fwd", _values(p, op), (p.value[op.output],))

    def jvp(p: Pass, op: Op) -> Operand:
        _, _, state_t, bias_t = _dots(p, op)
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
        values, y = _values(p, op), p.value[op.output]
        p.saved[op.output, "graph"] = handle = p.new(f"graph{op.output}", (), False, "handle")
        if (op.output, "rng") in p.saved:  # the same dropout as in the gradient pass of this step
            p.emit("module_replay", (*values, p.saved[op.output, "rng"]), (y, handle), **_attrs(op))
        else:
            p.emit("module_fwd", values, (y, handle, p.save(op, "rng", (), False, "handle")), **_attrs(op))

    def leaves(p: Pass, op: Op, tag: str) -> list[Operand]:
        return [p.like(tag, v) if v in p.wanted else None for v in op.inputs[1:]]

    def jvp(p: Pass, op: Op) -> Operand:
        p.bar[op.output] = p.like("d", op.output)  # written by the loss's backward, read here
        second = leaves(p, op, "s")
        out = p.like("t", op.output)
        p.emit("module_jvp", (graph(p, op), p.bar[op.output], *_dots(p, op)[1:]), (out, *second), **_attrs(op))
        p.second[op.output] = second
        return out

    def bwd(p: Pass, op: Op) -> None:
        if op.output in p.second:
            return  # the HVP never reads the primal gradient
        grads = leaves(p, op, "d")
        p.emit("module_bwd", (graph(p, op), p.bar[op.output]), grads, **_attrs(op))
        for v, ref in zip(op.inputs[1:], grads, strict=True):
            p.alias_bar(v, ref)

    def bwd_jvp(p: Pass, op: Op) -> None:
        grads = leaves(p, op, "dd")
        p.emit("module_bwd_jvp", (graph(p, op), p.bar_dot[op.output], *p.second[op.output]), grads, **_attrs(op))
        for v, ref in zip(op.inputs[1:], grads, strict=True):
            p.alias_bar(v, ref, dot=True)

    return Rule(fwd, jvp, bwd, bwd_jvp)


RULES: Mapping[str, Rule] = {
    "linear": _contraction("linear"),
    "conv2d": _contraction("conv2d"),
    "batchnorm": _batchnorm(),
    "batchnorm_maxpool2d": _batchnorm(pooled=True),
    "layernorm": _rownorm("layernorm"),
    "groupnorm": _rownorm("groupnorm"),
    "relu": _unary("relu", "mask"),
    "leaky_relu": _unary("leaky_relu", "mask"),
    **{name: _unary(name) for name in ("tanh", "sigmoid", "exp", "elu", "gelu", "silu", "softplus")},
    "maxpool2d": _maxpool2d(),
    **{name: _structural(name) for name in ("avgpool2d", "global_avgpool2d", "pad2d", "reshape", "transpose", "slice")},
    "add": _add(),
    "mul": _product("mul"),
    "matmul": _product("matmul"),
    "gram": _gram(),
    "factored_linear": _factored_linear(),
    "module": _module(),
}
