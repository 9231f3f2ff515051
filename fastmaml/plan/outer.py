"""The outer loss at theta_K, or at every step, and the first theta_bar and zeta_bar."""

from __future__ import annotations

from fastmaml.plan.differentiate import backward, forward
from fastmaml.plan.frame import Frame
from fastmaml.plan.instructions import Instruction, Ref
from fastmaml.plan.passes import Pass


class Outer(Frame):
    """query, query_reverse, query_step; reptile."""

    def _query(self, name: str, gradients: bool) -> None:
        """The outer loss at one theta. "query" and "query_reverse" begin theta_bar and zeta_bar, "query_step" adds to them."""
        p, extent = self._pass(name, self.ops["step"], self.outer_extent), self.outer_extent
        p.keep_steps = self.steps + 1 if self.a.record_masks else 0
        forward(p)
        self._query_loss(p, name, gradients)
        if gradients:
            p.want([leaf.value for leaf in self.adapted] + self.zeta)
            self._query_gradient(p, name)
            for leaf in self.adapted:
                self._begin_or_add(p, leaf.value, Ref(f"theta_bar.{leaf.name}"), begin=name != "query_step")
            for v in self.zeta:
                spec = self.program.values[v]
                rows = extent if spec.rows else None
                acc = self._buffer(self._zeta_name(v, extent), spec.shape, rows, home="run", steps=self._steps_of(v))
                self.accumulators[v] = acc
                if self._steps_of(v):
                    self._begin_or_add(p, v, Ref(acc.buffer, -1), begin=False)
                else:
                    self._begin_or_add(p, v, acc, begin=name != "query_step")
                if spec.rows and self.second_order and extent != "support":  # the HVP reads the support rows' own prefix
                    inner = self._buffer(self._zeta_name(v, "support"), spec.shape, "support", home="run")
                    if name != "query_step":
                        p.emit("zero_fwd", (), (inner,))
        self.segments[name] = self._take(p)

    @staticmethod
    def _begin_or_add(p: Pass, v: int, acc: Ref, begin: bool) -> None:
        if begin:
            p.place(p.bar.get(v), acc)
        elif v in p.bar:
            p.emit("axpy_fwd", (acc, p.bar[v], None), (acc,), sign=1.0)

    def _query_loss(self, p: Pass, name: str, gradients: bool) -> None:
        """Brings the logits of the query rows out, and the loss where it is one of ours."""
        spec, logits = self.program.values[self.program.output], p.value[self.program.output]
        if self.outer_extent == "joint":
            self.query_logits = self._buffer(f"{name}.logits", spec.shape, "query")
            p.emit("query_rows_fwd", (logits,), (self.query_logits,))
        else:
            self.query_logits = logits
        if name == "query":
            out = self._buffer("logits", spec.shape, "query", home="task")
            self.results["logits"] = None
            p.emit("copy_fwd", (self.query_logits,), (out,))
        if self.a.entry in ("train", "evaluate"):
            steps = self.steps + 1 if self.a.query_from is not None else 0
            loss, correct = self._buffer("loss.query", home="task", steps=steps), None
            self.results["loss.query"] = None
            if self.a.loss.name == "cross_entropy" and name == "query":
                correct = self._buffer("correct", home="task")
                self.results["correct"] = None
            operands = (self.query_logits, Ref("y.query"), self._class_weight())
            p.emit(f"{self.a.loss.name}_fwd", operands, (loss, correct), **self._loss_attrs())

    def _query_gradient(self, p: Pass, name: str) -> None:
        spec = self.program.values[self.program.output]
        if name == "query_reverse":
            dlogits = self._buffer("dlogits", spec.shape, "query", home="task")
            self.inputs += ("dlogits",)
        else:
            dlogits = self._buffer(f"{name}.dlogits", spec.shape, "query")
            scale = Ref("step_weights") if self.a.query_from is not None else None
            operands = (self.query_logits, Ref("y.query"), self._class_weight(), scale)
            p.emit(f"{self.a.loss.name}_bwd", operands, (dlogits,), **self._loss_attrs())
        if self.outer_extent == "joint":
            p.add_bar(self.program.output, lambda d: p.emit("query_rows_bwd", (dlogits,), (d,)))
        else:
            p.bar[self.program.output] = dlogits
        backward(p)

    def _reptile(self) -> None:
        """theta_bar = theta_0 - theta_K (Nichol et al. 2018)."""
        pairs = ((Ref(leaf.name), self._theta(leaf.name), Ref(f"theta_bar.{leaf.name}")) for leaf in self.adapted)
        self.segments["reptile"] = [Instruction("axpy_fwd", (first, last, None), (bar,), {"sign": -1.0}) for first, last, bar in pairs]
