"""The update of an inner step as instructions, and its reverse.

    g = gradient (+ lam (theta - theta_0), the proximal term of an ImplicitGradient)
    c = clip(g)     d = c + weight_decay theta     v = momentum v + damp d     s = v (nesterov: d + momentum v)     theta' = theta - rate s

Going back, with s_bar = -rate theta_bar:

    v_bar += s_bar (nesterov: momentum s_bar)     d_bar = damp v_bar (nesterov: + s_bar)     v_bar *= momentum for the step before
    theta_bar += weight_decay d_bar               u = clip_bwd(g, d_bar), the direction of the HVP

All of it is linear in the cotangents but the clips, so that only these, and learned rates, want anything of a step kept: g where it is clipped, s where a rate
is learned. v itself is one array that every step writes over, multiplied by the momentum as soon as theta has moved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fastmaml.optimizers import DAMPENING, SGD, ImplicitGradient
from fastmaml.plan.arrangement import Arrangement
from fastmaml.plan.instructions import Instruction, Operand, Ref
from fastmaml.program import Leaf, Program


@dataclass
class Update:
    """The update of all adapted leaves. ``buffer``, ``theta``: those of the sweep; ``second_order``: whether an HVP asks for a direction;
    ``kept_rates``: whether rates are learned by what they multiply, which is then kept per step."""

    program: Program
    a: Arrangement
    adapted: Iterable[Leaf]
    buffer: Callable[..., Ref]
    theta: Callable[..., Ref]
    second_order: bool
    kept_rates: bool

    @property
    def rule(self) -> SGD:
        return self.a.optimizer

    @property
    def keeps_gradient(self) -> bool:
        """Whether g_k is kept per step."""
        return (self.kept_rates and self.rule.plain) or (self.second_order and self.rule.clips)

    @property
    def has_reverse(self) -> bool:
        """Whether going back over a step does anything without an HVP."""
        return self.kept_rates or self.rule.weight_decay != 0

    def _like(self, name: str, leaf: Leaf, home: str = "", steps: int = 0) -> Ref:
        spec = self.program.values[leaf.value]
        return self.buffer(f"{name}.{leaf.name}", spec.shape, "support" if spec.rows else None, home=home, steps=steps)

    def inputs(self) -> None:
        if self.rule.dampens:
            self.buffer(DAMPENING, home="meta", steps=self.a.steps)

    @property
    def _damp(self) -> Operand:
        return Ref(DAMPENING) if self.rule.dampens else None

    # ------------------------------------------------------------------------------------------------------- forward
    def begin(self) -> list[Instruction]:
        """Before the first step: v = 0."""
        return [_op("zero", (), self._like("v", leaf, "run")) for leaf in self.adapted] if self.rule.momentum else []

    def forward(self) -> list[Instruction]:
        """One step: theta of slot k + 1 from theta and g of slot k."""
        out = [*self._proximal(), *self._clip()]
        for leaf in self.adapted:
            g = self._clipped(leaf)
            if self.rule.weight_decay:
                d = self._like("d", leaf, *self._kept(last=not self.rule.momentum))
                out.append(_op("axpy", (g, self.theta(leaf.name), None), d, sign=self.rule.weight_decay))
                g = d
            moved, after = (self._momentum(leaf, g, out) if self.rule.momentum else (g, []))
            inputs = (self.theta(leaf.name), moved, Ref(self.a.rates[leaf.name].name))
            out += [_op("sgd", inputs, self.theta(leaf.name, 1)), *after]
        return out

    def _proximal(self) -> list[Instruction]:
        rule, out = self.a.meta_gradient, []
        for leaf in self.adapted if isinstance(rule, ImplicitGradient) else ():
            g = Ref(f"g.{leaf.name}")
            out += [_op("axpy", (g, self.theta(leaf.name), None), g, sign=rule.lam), _op("axpy", (g, Ref(leaf.name), None), g, sign=-rule.lam)]
        return out

    def moved(self, leaf: Leaf) -> Ref:
        """s_k, that the rate is multiplied with."""
        if self.rule.momentum:
            return Ref(f"s.{leaf.name}")
        return Ref(f"d.{leaf.name}") if self.rule.weight_decay else self._clipped(leaf)

    def _kept(self, last: bool) -> tuple[str, int]:
        """Home and steps of something on the way from g to s."""
        return ("run", self.a.steps) if last and self.kept_rates else ("", 0)

    def _clipped(self, leaf: Leaf) -> Ref:
        return Ref(f"{'c' if self.rule.clips else 'g'}.{leaf.name}")

    def _clip(self) -> list[Instruction]:
        out, kept, scalar = [], self._kept(last=not self.rule.weight_decay and not self.rule.momentum), None
        if self.rule.max_norm is not None:
            scalar, steps = Ref("clip.scale"), self.a.steps if self.second_order else 0
            out += self._dots("clip.square", [(Ref(f"g.{leaf.name}"),) * 2 for leaf in self.adapted])
            results = [self.buffer(f"clip.{name}", home="run" if steps else "", steps=steps) for name in ("scale", "slope")]
            out.append(Instruction("clip_norm_fwd", (Ref("clip.square"),), tuple(results), {"max_norm": self.rule.max_norm}))
        for leaf in self.adapted if self.rule.clips else ():
            g, c = Ref(f"g.{leaf.name}"), self._like("c", leaf, *kept)
            out.append(_op("scale", (g, scalar), c, sign=1.0) if scalar else _op("clip_value", (g,), c, bound=self.rule.clip_value))
        return out

    def _dots(self, name: str, pairs: Iterable[tuple[Ref, Ref]]) -> list[Instruction]:
        """The sum of the inner products of these pairs."""
        total = self.buffer(name)
        return [_op("dot", (x, y, total if i else None), total) for i, (x, y) in enumerate(pairs)]

    def _momentum(self, leaf: Leaf, d: Ref, out: list[Instruction]) -> tuple[Ref, list[Instruction]]:
        """(s, what is done when theta has moved)."""
        v, decay = Ref(f"v.{leaf.name}"), {"sign": self.rule.momentum}
        s = self._like("s", leaf, *self._kept(last=True)) if self.kept_rates or self.rule.nesterov else v
        if self.rule.nesterov:
            out += [_op("axpy", (v, d, None), v, sign=1.0), _op("scale", (v, None), v, **decay), _op("axpy", (v, d, None), s, sign=1.0)]
            return s, []
        out.append(_op("axpy", (v, d, self._damp), s, sign=1.0))
        return s, [_op("scale", (s, None), v, **decay)]

    # ------------------------------------------------------------------------------------------------------- back
    def begin_reverse(self) -> list[Instruction]:
        """Before the first step back: v_bar = 0."""
        return [_op("zero", (), self._like("v_bar", leaf, "run")) for leaf in self.adapted] if self.rule.momentum else []

    def reverse(self) -> tuple[list[Instruction], dict[int, Ref]]:
        """One step back from theta_bar of slot k + 1 to that of slot k but for the HVP; and its direction, by value of the leaf."""
        out, direction = [], {}
        for leaf in self.adapted:
            theta_bar, rate = Ref(f"theta_bar.{leaf.name}"), Ref(self.a.rates[leaf.name].name)
            u = self._momentum_reverse(leaf, theta_bar, rate, out)
            if self.rule.weight_decay:
                out.append(_op("axpy", (theta_bar, u, None), theta_bar, sign=self.rule.weight_decay))
            direction[leaf.value] = u
        if self.rule.clips and self.second_order:
            self._clip_reverse(direction, out)
        return out, direction

    def _momentum_reverse(self, leaf: Leaf, theta_bar: Ref, rate: Ref, out: list[Instruction]) -> Ref:
        """d_bar. Where it is not a buffer of its own it is v_bar, which must stay as it is until the next step back."""
        if not self.rule.momentum or self.rule.nesterov:
            u = self._like("u", leaf, "run")
            out.append(Instruction("sgd_bwd", (theta_bar, rate), (u,)))
            if not self.rule.momentum:
                return u
        v_bar, decay = Ref(f"v_bar.{leaf.name}"), {"sign": self.rule.momentum}
        out.append(_op("scale", (v_bar, None), v_bar, **decay))
        if self.rule.nesterov:
            out += [_op("axpy", (v_bar, u, None), v_bar, **decay), _op("axpy", (u, v_bar, None), u, sign=1.0)]
            return u
        out.append(_op("sgd", (v_bar, theta_bar, rate), v_bar))
        if not self.rule.dampens:
            return v_bar
        u = self._like("u", leaf, "run")
        out.append(_op("scale", (v_bar, self._damp), u, sign=1.0))
        return u

    def _clip_reverse(self, direction: dict[int, Ref], out: list[Instruction]) -> None:
        """By value: what was within the bound passes. By norm: scale c_bar + slope <c_bar, g> g, slope = 0 where nothing was clipped."""
        pairs = [(direction[leaf.value], Ref(f"g.{leaf.name}")) for leaf in self.adapted]
        if self.rule.max_norm is not None:
            out += self._dots("clip.dot", pairs)
            share = self.buffer("clip.share")
            out.append(_op("scale", (Ref("clip.dot"), Ref("clip.slope")), share, sign=1.0))
        for leaf, (c_bar, g) in zip(self.adapted, pairs, strict=True):
            u = direction[leaf.value] = self._like("u", leaf, "run")
            if self.rule.clip_value is not None:
                out.append(Instruction("clip_value_bwd", (g, c_bar), (u,), {"bound": self.rule.clip_value}))
            else:
                out += [_op("scale", (c_bar, Ref("clip.scale")), u, sign=1.0), _op("axpy", (u, g, share), u, sign=1.0)]


def _op(name: str, inputs: tuple[Operand, ...], output: Ref, **attrs: float) -> Instruction:
    return Instruction(f"{name}_fwd", inputs, (output,), attrs)
