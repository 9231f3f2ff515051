"""Forward over the inner steps: the prologue, and at each step the gradient on the support rows. The update is in update.py."""

from __future__ import annotations

from dataclasses import replace

from fastmaml.plan import rollback
from fastmaml.plan.dependence import differentiable_values
from fastmaml.plan.differentiate import backward, forward
from fastmaml.plan.frame import Frame
from fastmaml.plan.instructions import Instruction, Ref
from fastmaml.plan.passes import Pass


class Inner(Frame):
    """prologue, begin (of the state), gradient."""

    def _prologue(self) -> None:
        self.meta = self._pass("meta", self.ops["meta"], "query")
        forward(self.meta)
        self.segments["prologue_meta"] = self._take(self.meta)
        self.segments["prologue"] = []
        if self._joins:
            self._buffer("x.joint", self.program.values[self.program.input].shape, "joint", home="run")
            join = Instruction("join_rows_fwd", (Ref("x.support"), Ref("x.query")), (Ref("x.joint"),))
            self.segments["prologue"].append(join)
        self.segments["prologue_batch"] = []
        if self.ops["task"]:
            extents = ["support"] * (self.steps > 0) + [self.outer_extent] * (self.a.entry != "adapt")
            for extent in ["joint"] if self.joint_body else extents:
                self.prefix[extent] = self._prefix_pass(extent)
                self.features[extent] = {op.output: self.prefix[extent].value[op.output] for op in self.ops["task"]}
            if self.joint_body:
                self._split_features()
        self.segments["begin"] = []
        for leaf in self.adapted:
            if self._is_factor(leaf):
                self.segments["begin"].append(Instruction("zero_fwd", (), (Ref(f"theta.{leaf.name}"),)))
            elif leaf.name in self.in_place:
                self.segments["begin"].append(Instruction("copy_fwd", (Ref(leaf.name),), (Ref(f"theta.{leaf.name}"),)))
        differentiable = differentiable_values(self.program)
        self.segments["begin"] += self.update.begin() if self.steps else []
        self.zeta = [v for v in self._consumed(self.ops["step"], ("meta", "task")) if v in differentiable]
        self.zeta += [leaf.value for leaf in self.program.leaves if leaf.per_step and leaf.role == "outer"]

    def _split_features(self) -> None:
        """Of a body that ran over support and query together: each extent's rows of what the inner loop reads."""
        joint = self.features["joint"]
        for extent in ("support", "query"):
            self.features[extent] = dict(joint)
            for v in (v for v in self._consumed(self.ops["step"], ("task",)) if v in joint and self.program.values[v].rows):
                part = self._buffer(f"prologue.{extent}.v{v}", self.program.values[v].shape, extent)
                self.segments["prologue"].append(Instruction(f"{extent}_rows_fwd", (joint[v],), (part,)))
                self.features[extent][v] = part

    def _prefix_pass(self, extent: str) -> Pass:
        """The layers that no adapted leaf reaches, over one extent. Linear maps of the samples run for all tasks together."""
        p = self._pass(f"prologue.{extent}", self.ops["task"], extent)
        p.support_data = Ref("x.support")  # a factored layer reads the samples themselves, in whatever shape
        forward(p)
        self.together.setdefault(extent, {f"x.{extent}"} if extent != "joint" else set())
        for instr in self._take(p):
            rows = [ref.buffer for ref in instr.reads() if self.buffers[ref.buffer].rows]
            batch = instr.kernel in ("linear_fwd", "reshape_fwd") and all(name in self.together[extent] for name in rows)
            if batch:
                self.together[extent].update(ref.buffer for ref in instr.writes())
            self.segments["prologue_batch" if batch else "prologue"].append(instr)
        return p

    def _gradient(self) -> None:
        p = self._pass("gradient", self.ops["step"], "support")
        p.keep_steps = self.steps if self.second_order or self.a.record_masks else 0
        p.keep_values = self.keeps_values
        p.want(leaf.value for leaf in self.adapted)
        forward(p)
        logits = p.value[self.program.output]
        loss = self._buffer("loss.support", home="task", steps=self.steps)
        self.results["loss.support"] = None
        operands = (logits, Ref("y.support"), self._class_weight())
        p.emit(f"{self.a.loss.name}_fwd", operands, (loss, None), **self._loss_attrs())
        p.add_bar(self.program.output, lambda d: p.emit(f"{self.a.loss.name}_bwd", (*operands, None), (d,), **self._loss_attrs()))
        backward(p)
        steps = self.steps if self.update.keeps_gradient else 0
        for leaf in self.adapted:
            g = self._buffer(f"g.{leaf.name}", self.program.values[leaf.value].shape, self._rows(leaf), home="run", steps=steps)
            p.place(p.bar.get(leaf.value), g)
        for v in (v for v in self.zeta if self._steps_of(v) and self.trains):  # on the way back only one step, and the query after it, add to a slot
            p.emit("zero_fwd", (), (self._buffer(self._zeta_name(v, "support"), self.program.values[v].shape, home="run", steps=self.steps),))
        self.gradient = p
        self.deltas = {v: p.bar[op.output] for v, op in self.rolled.items()}
        self.kept_inputs = {v: p.value[v] for v in rollback.inputs_to_keep(self.program, self.rolled)}
        for ref in (*self.deltas.values(), *self.kept_inputs.values()):
            self.buffers[ref.buffer] = replace(self.buffers[ref.buffer], home="run", steps=self.steps)
        self.segments["gradient"] = self._take(p)
