"""Back over the inner steps: the reverse of the update, and the Hessian-vector product."""

from __future__ import annotations

from functools import partial

from fastmaml.plan import rollback
from fastmaml.plan.differentiate import backward, forward
from fastmaml.plan.frame import Frame
from fastmaml.plan.instructions import Instruction, Ref
from fastmaml.plan.passes import Pass
from fastmaml.plan.tidy import order


class Reverse(Frame):
    """update_bwd, hvp."""

    def _reverse(self) -> None:
        """update_bwd and hvp: one step back, from theta_bar_{k+1} to theta_bar_k."""
        self.segments["update_bwd"] = self._rate_gradients() if self.update.kept_rates else []
        direction = {leaf.value: Ref(f"theta_bar.{leaf.name}") for leaf in self.adapted}
        if not self.shared_rate:
            back, direction = self.update.reverse()
            self.segments["update_bwd"] += back
            self.segments[self._first_query] += self.update.begin_reverse()
        if self.second_order:
            self._hvp(direction)

    def _rate_gradients(self) -> list[Instruction]:
        """rate_bar_k += -theta_bar_{k+1} * s_k, elementwise or as a dot product; s_k: what the rate is multiplied with, g_k of plain steps."""
        out, begun = [], set()
        for leaf in self.adapted:
            rate = self.a.rates[leaf.name]
            if rate.learned:
                operands = (Ref(f"theta_bar.{leaf.name}"), self.update.moved(leaf))
                acc, attrs = self._rate_bar(rate), {"per_element": rate.shape != ()}
                if rate.per_step and rate not in begun:  # a slot of its own: nothing to add to
                    out.append(Instruction("sgd_bwd_rate", (*operands, None), (acc,), attrs))
                else:
                    out.append(Instruction("sgd_bwd_rate", (*operands, acc), (acc,), attrs))
                begun.add(rate)
        return out

    def _hvp(self, direction: dict[int, Ref]) -> None:
        g = self.gradient
        p = self._pass("hvp", self.ops["step"], "support")
        self._follow(p, g)
        p.dot = dict(direction)
        p.value |= self.kept_inputs
        leaves = {leaf.value: (self._theta(leaf.name), Ref(self.a.rates[leaf.name].name)) for leaf in self.adapted if leaf.name in self.in_place}
        if self.rolled and not self.keeps_values:
            self._make_again(p)
        p.before = {op.output: partial(rollback.roll_back, p, op, self.deltas[v], leaves) for v, op in self.rolled.items()}
        p.want([leaf.value for leaf in self.adapted] + self.zeta)
        forward(p)
        self._hvp_loss(p)
        backward(p, tangents=True)
        scale = Ref(self.shared_rate.name) if self.shared_rate else None
        sign = -1.0 if scale else 1.0
        for leaf in self.adapted:
            if leaf.value in p.bar_dot:
                acc = Ref(f"theta_bar.{leaf.name}")
                p.emit("axpy_fwd", (acc, p.bar_dot[leaf.value], scale), (acc,), sign=sign)
        for v in self.zeta:
            if v in p.bar_dot:
                acc = Ref(self._zeta_name(v, "support"))
                p.emit("axpy_fwd", (acc, p.bar_dot[v], scale), (acc,), sign=sign)
        self.segments["hvp"] = order(self._take(p))

    def _follow(self, p: Pass, g: Pass) -> None:
        """What ``g`` has found out at the same theta."""
        p.saved = {key: ref for key, ref in g.saved.items() if key[1] != "graph"}
        if self.keeps_values:
            p.value |= g.value
            p.chosen = {op.output: g.chosen[op.output] for op in p.ops if op.inputs[0] in p.from_patches and op.output in g.chosen}
            p.bar, p.bar_sums, p.bars_given = dict(g.bar), dict(g.bar_sums), True

    def _make_again(self, p: Pass) -> None:
        """What the HVP pass has from others, instead of kept. Masks that are brought out, or given, are kept all the same."""
        again = rollback.statistics_to_make_again(self.program)
        p.saved = {(v, tag): ref for (v, tag), ref in p.saved.items() if v not in again or tag not in ("mean", "rstd")}
        for op in () if self.a.record_masks else rollback.masks_from_outputs(self.program, self.kept_inputs):
            p.saved[op.output, "mask"] = mask = p.new(f"mask{op.output}", self.program.values[op.output].shape, True, "mask")
            p.emit(f"{op.name}_fwd", (self.kept_inputs[op.output],), (None, mask), **op.attrs)

    def _hvp_loss(self, p: Pass) -> None:
        out, name = self.program.output, self.a.loss.name
        operands = (p.value[out], Ref("y.support"), self._class_weight())
        if self.shared_rate and self.shared_rate.learned:  # d loss / d rate_k = -(loss tangent in direction theta_bar)
            rate_bar = self._rate_bar(self.shared_rate)
            tangent = p.new("tloss", (), False)
            p.emit(f"{name}_jvp", (*operands, p.dot[out]), (tangent,), **self._loss_attrs())
            if self.shared_rate.per_step:
                p.emit("scale_fwd", (tangent, None), (rate_bar,), sign=-1.0)
            else:
                p.emit("axpy_fwd", (rate_bar, tangent, None), (rate_bar,), sign=-1.0)
        if not p.bars_given:
            given = p.bar.get(out)  # a module's jvp has made room for it
            d = given or p.like("d", out)
            p.emit(f"{name}_bwd", (*operands, None), (d,), **self._loss_attrs())
            p.bar[out] = d
        p.add_bar(out, lambda d: p.emit(f"{name}_bwd_jvp", (*operands, p.dot[out]), (d,), **self._loss_attrs()), dot=True)
