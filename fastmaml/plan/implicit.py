"""The implicit meta-gradient: conjugate gradient over Hessian-vector products at theta_K (Rajeswaran et al. 2019).

    b = gradient of the outer loss at theta_K     A v = (1 + cg_damping) v + H v / (lam + lam_damping), H of the support loss at theta_K
    r = p = b, x = 0; cg_steps times:
        alpha = <r, r> / <p, A p>     x += alpha p     r' = r - alpha A p     p = r' + <r', r'> / <r, r> p

No inner step is gone back over, so that of theta only the last is there, and the cost of the way back is that of cg_steps products, however many inner steps
there were. r lies where the outer loss leaves b: in theta_bar.
"""

from __future__ import annotations

from fastmaml.plan.differentiate import backward, forward
from fastmaml.plan.frame import Frame
from fastmaml.plan.instructions import Instruction, Operand, Phase, Ref
from fastmaml.plan.passes import Pass
from fastmaml.plan.tidy import order
from fastmaml.program import Leaf


class Implicit(Frame):
    """cg_begin, cg."""

    def _implicit(self) -> None:
        at_last = self._at_last()
        self.segments["cg_begin"] = self._take(at_last)
        for leaf in self.adapted:
            self._op("cg_begin", "copy", (Ref(f"theta_bar.{leaf.name}"),), self._cg("p", leaf))
            self._op("cg_begin", "zero", (), self._cg("x", leaf))
        self._dots("cg_begin", "rr", [(Ref(f"theta_bar.{leaf.name}"),) * 2 for leaf in self.adapted])
        self._product(at_last)
        self._iteration()

    def _at_last(self) -> Pass:
        """What every product at theta_K has in common: masks and statistics, and activations with their cotangents where these are few."""
        p = self._pass("implicit", self.ops["step"], "support")
        forward(p)
        if self.keeps_values:
            p.want(leaf.value for leaf in self.adapted)
            operands = (p.value[self.program.output], Ref("y.support"), self._class_weight(), None)
            p.add_bar(self.program.output, lambda d: p.emit(f"{self.a.loss.name}_bwd", operands, (d,), **self._loss_attrs()))
            backward(p)
        return p

    def _cg(self, name: str, leaf: Leaf) -> Ref:
        return self._buffer(f"cg.{name}.{leaf.name}", self.program.values[leaf.value].shape, home="run")

    def _op(self, segment: str, name: str, inputs: tuple[Operand, ...], output: Ref, **attrs: float) -> None:
        self.segments[segment].append(Instruction(f"{name}_fwd", inputs, (output,), attrs))

    def _dots(self, segment: str, name: str, pairs: list[tuple[Ref, Ref]]) -> Ref:
        total = self._buffer(f"cg.{name}", home="run")
        for i, (x, y) in enumerate(pairs):
            self._op(segment, "dot", (x, y, total if i else None), total)
        return total

    def _product(self, at_last: Pass) -> None:
        """cg.a = A p"""
        rule = self.a.meta_gradient
        p = self._pass("cg", self.ops["step"], "support")
        self._follow(p, at_last)
        p.dot = {leaf.value: self._cg("p", leaf) for leaf in self.adapted}
        p.want(leaf.value for leaf in self.adapted)
        forward(p)
        self._hvp_loss(p)
        backward(p, tangents=True)
        self.segments["cg"] = order(self._take(p))
        for leaf in self.adapted:
            product = self._cg("a", leaf)
            self._op("cg", "scale", (self._cg("p", leaf), None), product, sign=1.0 + rule.cg_damping)
            if leaf.value in p.bar_dot:
                self._op("cg", "axpy", (product, p.bar_dot[leaf.value], None), product, sign=1.0 / (rule.lam + rule.lam_damping))

    def _iteration(self) -> None:
        rr, new = Ref("cg.rr"), Ref("cg.new")
        curvature = self._dots("cg", "pap", [(self._cg("p", leaf), self._cg("a", leaf)) for leaf in self.adapted])
        alpha, beta = (self._buffer(f"cg.{name}", home="run") for name in ("alpha", "beta"))
        self._op("cg", "ratio", (rr, curvature), alpha)
        for leaf in self.adapted:
            x, r = self._cg("x", leaf), Ref(f"theta_bar.{leaf.name}")
            self._op("cg", "axpy", (x, self._cg("p", leaf), alpha), x, sign=1.0)
            self._op("cg", "axpy", (r, self._cg("a", leaf), alpha), r, sign=-1.0)
        self._dots("cg", "new", [(Ref(f"theta_bar.{leaf.name}"),) * 2 for leaf in self.adapted])
        self._op("cg", "ratio", (new, rr), beta)
        for leaf in self.adapted:
            self._op("cg", "axpy", (Ref(f"theta_bar.{leaf.name}"), self._cg("p", leaf), beta), self._cg("p", leaf), sign=1.0)
        self._op("cg", "scale", (new, None), rr, sign=1.0)

    def _solution(self, leaf: Leaf) -> Ref:
        return self._cg("x", leaf)

    def _implicit_phases(self, half: int) -> list[Phase]:
        k = self.steps
        return [Phase(("cg_begin",), start=k, stop=k + 1, half=half), Phase(("cg",), start=0, stop=self.a.meta_gradient.cg_steps, half=half)]
