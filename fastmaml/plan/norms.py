"""Rules of the normalisations: batchnorm, with and without the pooling that comes first; layernorm and groupnorm."""

from __future__ import annotations

from typing import Any

from fastmaml.plan.instructions import Operand, Ref
from fastmaml.plan.passes import Pass
from fastmaml.plan.rule import Rule, add_weight_and_bias, attrs_of, dots_of, values_of
from fastmaml.program import Op


def batchnorm(pooled: bool = False) -> Rule:
    rule = _BatchNorm(pooled)
    return Rule(rule.fwd, rule.jvp, rule.bwd, rule.bwd_jvp)


class _BatchNorm:
    """Statistics are reductions of their own (they close a group); normalising is row by row. d(statistics) are also dbeta and dgamma.

    ``pooled``: batchnorm_maxpool2d (see pooling.py). The extremum of each window is taken before it is normalised, so that only the statistics and
    the gradient of x are of all pixels; the rest works on what was chosen."""

    def __init__(self, pooled: bool) -> None:
        self.pooled = pooled

    @staticmethod
    def _attrs(p: Pass, op: Op) -> dict[str, Any]:
        """``stat_rows``: the extent whose rows make the statistics (in a joint pass the support's), None for running ones."""
        statistics = op.attrs["statistics"]
        rows = None if statistics == "running" else "support" if statistics == "support" and p.extent == "joint" else p.extent
        return {"eps": op.attrs["eps"], "stat_rows": rows}

    @staticmethod
    def _window(op: Op) -> dict[str, Any]:
        return {name: op.attrs[name] for name in ("kernel", "stride", "padding")}

    def _stats(self, p: Pass, op: Op) -> tuple[Ref, Ref]:
        """Made where they are first asked for: by the jvp, where the output itself is given. From patches they are there already."""
        if patches := p.from_patches.get(op.inputs[0]):
            return p.saved[patches.output, "mean"], p.saved[patches.output, "rstd"]
        if (op.output, "mean") not in p.saved:
            x, _, _, running_mean, running_var = values_of(p, op)
            channels = p.program.values[op.output].shape[:1]
            out = (p.save(op, "mean", channels, False), p.save(op, "rstd", channels, False))
            if op.attrs["statistics"] == "running":
                p.emit("batchnorm_running_fwd", (running_mean, running_var), out, **self._attrs(p, op))
            else:
                p.emit("batchnorm_stats_fwd", (x,), out, **self._attrs(p, op))
        return p.saved[op.output, "mean"], p.saved[op.output, "rstd"]

    def _chosen(self, p: Pass, op: Op) -> Operand:
        """x where the normalisation sees it."""
        x, gamma, *_ = values_of(p, op)
        if not self.pooled:
            return x
        if op.output not in p.chosen:
            shape = p.program.values[op.output].shape
            steps = p.keep_steps if p.keep_values and op.inputs[0] in p.from_patches else 0  # where nobody asks for all of x any more
            p.chosen[op.output] = out = p.new(f"x{op.output}", shape, True, steps=steps)
            if (op.output, "index") in p.saved:
                p.emit("maxpool2d_replay", (x, p.saved[op.output, "index"]), (out,), **self._window(op))
            else:
                index = p.save(op, "index", shape, True, kind="index")
                p.emit("batchnorm_maxpool2d_fwd", (x, gamma), (out, index), **self._window(op))
        return p.chosen[op.output]

    def _chosen_dot(self, p: Pass, op: Op) -> Operand:
        xt = p.dot.get(op.inputs[0])
        if not self.pooled or xt is None:
            return xt
        if op.output not in p.chosen_dot:
            p.chosen_dot[op.output] = out = p.new(f"tx{op.output}", p.program.values[op.output].shape, True)
            p.emit("maxpool2d_jvp", (xt, p.saved[op.output, "index"]), (out,), **self._window(op))
        return p.chosen_dot[op.output]

    def fwd(self, p: Pass, op: Op) -> None:
        _, gamma, beta, *_ = values_of(p, op)
        x = self._chosen(p, op)  # first: while x is still in the cache
        p.emit("batchnorm_fwd", (x, *self._stats(p, op), gamma, beta), (p.value[op.output],), **self._attrs(p, op))

    def jvp(self, p: Pass, op: Op) -> Operand:
        (x, gamma, *_), (xt, gamma_t, beta_t, *_) = values_of(p, op), dots_of(p, op)
        stats_t: tuple[Operand, Operand] = (None, None)
        if patches := p.from_patches.get(op.inputs[0]):
            stats_t = p.dot_stats.get(patches.output, (None, None))
        elif xt is not None and op.attrs["statistics"] != "running":
            channels = p.program.values[op.output].shape[:1]
            stats_t = (p.new(f"tmean{op.output}", channels, False), p.new(f"trstd{op.output}", channels, False))
            p.emit("batchnorm_stats_jvp", (x, *self._stats(p, op), xt), stats_t, **self._attrs(p, op))
        p.dot_stats[op.output] = stats_t
        out = p.like("t", op.output)
        p.emit("batchnorm_jvp", (self._chosen(p, op), *self._stats(p, op), gamma, self._chosen_dot(p, op), *stats_t, gamma_t, beta_t), (out,), **self._attrs(p, op))
        return out

    def _to_input(self, p: Pass, op: Op, mode: str, before: tuple[Operand, ...], after: tuple[Operand, ...], dot: bool) -> None:
        """The gradient of all of x, or its tangent."""
        name, index, more = "batchnorm", (), self._attrs(p, op)
        if self.pooled:
            name, index = "batchnorm_maxpool2d", (p.saved[op.output, "index"],)
            more |= self._window(op) | {"input_shape": p.program.values[op.inputs[0]].shape}
        p.add_bar(op.inputs[0], lambda dx: p.emit(f"{name}_{mode}", (*before, *index, *after), (dx,), **more), dot=dot)

    def _by_pixel(self, p: Pass, op: Op, gamma: Operand, dy: Operand, tangents: tuple[Operand, ...] | None = None) -> None:
        """The same of statistics from patches, whose own share goes to the weight (patches.py): gamma rstd dy, of what was chosen alone.
        ``tangents``: of rstd, gamma, dy."""
        dot, spec, index = tangents is not None, p.program.values, p.saved.get((op.output, "index"))
        mode, tag = ("bwd_jvp", "dd") if dot else ("bwd", "d")
        rest = (None, None, None, None, *tangents, None, None) if dot else (None, None)  # neither s1 and s2, nor the tangents of x and mean
        inputs = (self._chosen(p, op), *self._stats(p, op), gamma, dy, *rest)

        def scaled(dx: Ref) -> None:
            p.emit("batchnorm_bwd_input_jvp" if dot else "batchnorm_bwd_input", inputs, (dx,), eps=op.attrs["eps"], stat_rows=None)

        def scattered(dx: Ref) -> None:
            chosen = p.new(f"{tag}x{op.output}", spec[op.output].shape, True)
            scaled(chosen)
            p.emit(f"maxpool2d_{mode}", (chosen, index), (dx,), **self._window(op), input_shape=spec[op.inputs[0]].shape)

        p.add_bar(op.inputs[0], scattered if self.pooled else scaled, dot=dot)

    def bwd(self, p: Pass, op: Op) -> None:
        (x, gamma, *_), dy = values_of(p, op), p.bar[op.output]
        _, vgamma, vbeta = op.inputs[:3]
        sums = self._sums(p, op, "")
        p.emit("batchnorm_bwd_stats", (self._chosen(p, op), *self._stats(p, op), dy), sums, **self._attrs(p, op))
        p.bar_sums[op.output] = sums
        if patches := p.from_patches.get(op.inputs[0]):
            p.bar[patches.output] = sums[0]  # and sums[1]: in bar_sums
            self._by_pixel(p, op, gamma, dy)
        else:
            self._to_input(p, op, "bwd_input", (x, *self._stats(p, op), gamma, dy), sums, False)
        p.alias_bar(vgamma, sums[1])
        p.alias_bar(vbeta, sums[0])

    def bwd_jvp(self, p: Pass, op: Op) -> None:
        (x, gamma, *_), (xt, gamma_t, *_) = values_of(p, op), dots_of(p, op)
        _, vgamma, vbeta = op.inputs[:3]
        dy, dyt = p.bar.get(op.output), p.bar_dot.get(op.output)
        if dyt is None and (dy is None or (xt is None and gamma_t is None)):
            return
        stats_t = p.dot_stats.get(op.output, (None, None))
        sums_t: tuple[Operand, Operand] = (None, None)
        if dyt is not None or xt is not None:
            sums_t = self._sums(p, op, "t")
            p.emit("batchnorm_bwd_stats_jvp", (self._chosen(p, op), *self._stats(p, op), dy, self._chosen_dot(p, op), *stats_t, dyt), sums_t, **self._attrs(p, op))
        p.bar_sums_dot[op.output] = sums_t
        sums = p.bar_sums.get(op.output, (None, None))
        if op.inputs[0] in p.from_patches:
            self._by_pixel(p, op, gamma, dy, (stats_t[1], gamma_t, dyt))
        else:
            self._to_input(p, op, "bwd_input_jvp", (x, *self._stats(p, op), gamma, dy), (*sums, xt, *stats_t, gamma_t, dyt, *sums_t), True)
        p.alias_bar(vgamma, sums_t[1], dot=True)
        p.alias_bar(vbeta, sums_t[0] if dyt is not None else None, dot=True)

    @staticmethod
    def _sums(p: Pass, op: Op, tag: str) -> tuple[Ref, Ref]:
        channels = p.program.values[op.output].shape[:1]
        keep = p.keep_steps if p.keep_values and not tag else 0
        return p.new(f"s{tag}dy{op.output}", channels, False, steps=keep), p.new(f"s{tag}dyx{op.output}", channels, False, steps=keep)


def rownorm(name: str) -> Rule:
    """layernorm, groupnorm: statistics within one sample, so everything but the affine's gradient is row by row."""

    def fwd(p: Pass, op: Op) -> None:
        p.emit(f"{name}_fwd", values_of(p, op), (p.value[op.output],), **attrs_of(op))

    def jvp(p: Pass, op: Op) -> Operand:
        (x, gamma, _), out = values_of(p, op), p.like("t", op.output)
        p.emit(f"{name}_jvp", (x, gamma, *dots_of(p, op)), (out,), **attrs_of(op))
        return out

    def bwd(p: Pass, op: Op) -> None:
        (x, gamma, _), dy = values_of(p, op), p.bar[op.output]
        p.add_bar(op.inputs[0], lambda dx: p.emit(f"{name}_bwd_input", (x, gamma, dy), (dx,), **attrs_of(op)))
        _affine(p, op, f"{name}_bwd_weight", (x, dy), False)

    def bwd_jvp(p: Pass, op: Op) -> None:
        (x, gamma, _), (xt, gamma_t, _) = values_of(p, op), dots_of(p, op)
        dy, dyt = p.bar.get(op.output), p.bar_dot.get(op.output)
        if dyt is None and (dy is None or (xt is None and gamma_t is None)):
            return
        inputs = (x, gamma, dy, xt, gamma_t, dyt)
        p.add_bar(op.inputs[0], lambda dx: p.emit(f"{name}_bwd_input_jvp", inputs, (dx,), **attrs_of(op)), dot=True)
        if dyt is not None or xt is not None:
            _affine(p, op, f"{name}_bwd_weight_jvp", (x, dy, xt, dyt), True, beta=dyt is not None)

    return Rule(fwd, jvp, bwd, bwd_jvp)


def _affine(p: Pass, op: Op, kernel: str, inputs: tuple[Operand, ...], dot: bool, beta: bool = True) -> None:
    vgamma, vbeta = op.inputs[1], op.inputs[2] if beta else None
    if vgamma is None and vbeta is None:
        return
    add_weight_and_bias(p, vgamma, vbeta, kernel, inputs, dot, attrs_of(op))
