"""The one sweep over inner steps and back: a Program and an Arrangement become a Plan.

    prologue   what does not depend on the adapted leaves: weight expressions once per meta-iteration, frozen layers once per task
    k = 0..K-1 gradient at theta_k on the support rows; theta_{k+1} = update(theta_k, g_k, rate_k)
    query      outer loss at theta_K (with multi-step losses at every step); theta_bar = its gradient, zeta_bar = that of every other leaf
    k = K-1..0 u = cotangent of g_k; HVP in direction u: theta_bar += H_theta,theta u, zeta_bar += H_zeta,theta u; rate gradients
    epilogue   the prologue's reverse; sums over tasks

Where one scalar rate serves all adapted leaves the direction is theta_bar itself and the rate scales what is accumulated; its own gradient is then
the loss tangent of the HVP. Any other rate reads the stored g_k. ``notes/sweep_check`` style mathematics: Finn et al. 2017; Pearlmutter 1994.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

from fastmaml.plan import rollback
from fastmaml.plan.arrangement import Arrangement, Rate
from fastmaml.plan.dependence import differentiable_values, levels
from fastmaml.plan.differentiate import backward, forward
from fastmaml.plan.groups import make_groups
from fastmaml.plan.instructions import Buffer, Instruction, Operand, Phase, Plan, Reduction, Ref, Segment
from fastmaml.plan.memory import assign_homes
from fastmaml.plan.passes import Pass
from fastmaml.plan.pooling import pool_first
from fastmaml.plan.rewrite import STATE, factor_first_layers
from fastmaml.plan.tidy import live, order, unkept
from fastmaml.program import CLASS_WEIGHT, Leaf, Op, Program


def build_plan(program: Program, arrangement: Arrangement) -> Plan:
    """The Plan of one meta-iteration. Raises ValueError where no adapted leaf reaches the output."""
    program = pool_first(program)
    if arrangement.support_rows and arrangement.steps and arrangement.entry in ("train", "halves", "evaluate"):
        scalar = {name: rate.shape == () for name, rate in arrangement.rates.items()}
        program, factored = factor_first_layers(program, scalar, arrangement.support_rows)
        states = {f.weight + STATE: arrangement.rates[f.weight] for f in factored}
        arrangement = replace(arrangement, rates={**arrangement.rates, **states})
    return _Sweep(program, arrangement).build()


KEPT_BYTES = 8 * 2**20  # of each task in flight: activations of one step that are kept rather than made again


class _Sweep:
    def __init__(self, program: Program, arrangement: Arrangement) -> None:
        self.program, self.a, self.steps = program, arrangement, arrangement.steps
        self.buffers: dict[str, Buffer] = {}
        self.segments: dict[str, list[Instruction]] = {}
        self.leaf_of = {leaf.value: leaf for leaf in program.leaves}
        self.adapted = [leaf for leaf in program.leaves if leaf.role == "adapted"]
        self.level = levels(program, arrangement.entry)
        self.ops = {level: [op for op in program.ops if self.level[op.output] == level] for level in ("meta", "task", "step")}
        self.trains = self.a.entry in ("train", "halves")
        self.second_order = self.trains and not self.a.first_order and self.steps > 0
        self.learned = sorted({r for leaf in self.adapted if (r := self.a.rates.get(leaf.name)) and r.learned}, key=lambda r: r.name)
        rates = {self.a.rates.get(leaf.name) for leaf in self.adapted}
        self.shared_rate = rates.pop() if len(rates) == 1 and next(iter(rates), None) and next(iter(rates)).shape == () else None
        joint = any(op.name.startswith("batchnorm") and op.attrs["statistics"] == "support" for op in program.ops)
        self.outer_extent = "joint" if joint else "query"
        self.rolled = rollback.rolled_back(program, arrangement) if self.second_order else {}
        self.in_place = self._in_place()
        self.keeps_values = self.second_order and (arrangement.memory == "fast" or self._keeps_its_step())
        self.accumulators: dict[int, Ref] = {}  # zeta_bar: cotangents of non-adapted values, summed over the steps
        self.prefix: dict[str, Pass] = {}
        self.together: dict[str, set[str]] = {}  # by extent: row buffers that exist for all tasks at once
        self.results: dict[str, None] = {}

    def _keeps_its_step(self) -> bool:
        """A single inner step keeps its activations and their gradients, if these are few: reading them back beats making them again."""
        if self.steps != 1 or not self.a.support_rows or any(op.name == "module" for op in self.program.ops):
            return False
        floats = sum(self.program.values[op.output].numel for op in self.ops["step"] if self.program.values[op.output].rows)
        return 2 * 4 * self.a.support_rows * floats <= KEPT_BYTES

    def _in_place(self) -> set[str]:
        """Adapted leaves of which theta_k is not kept: those that are rolled back, and all where nothing goes back to theta_k."""
        if self.second_order:
            values = {*self.rolled, *rollback.biases(self.program, self.a, self.rolled)}
        elif self.steps > rollback.KEPT and self.a.query_from is None:
            values = {leaf.value for leaf in self.adapted if not self._is_factor(leaf)}
        else:
            values = set()
        return {leaf.name for leaf in self.adapted if leaf.value in values}

    # ------------------------------------------------------------------------------------------------------- what depends on what
    def _consumed(self, ops: Iterable[Op], below: tuple[str, ...]) -> list[int]:
        """Values of a lower level that ``ops`` read, in order of use."""
        return list(dict.fromkeys(v for op in ops for v in op.inputs if v is not None and self.level[v] in below))

    # ------------------------------------------------------------------------------------------------------- buffers
    def _buffer(self, name: str, shape: tuple[int, ...] = (), rows: str | None = None, **kw) -> Ref:
        self.buffers.setdefault(name, Buffer(name, shape, rows, **kw))
        return Ref(name)

    def _inputs(self) -> None:
        extents = ["support"] * (self.steps > 0) + ["query"] * (self.a.entry != "adapt")
        if self.outer_extent == "joint" and self.a.entry != "adapt":
            extents = ["support", "query"]
        shape = self.program.values[self.program.input].shape
        target = self.program.values[self.program.output].shape if self.a.loss.name == "mse" else ()
        for extent in extents:
            self._buffer(f"x.{extent}", shape, extent, home="task")
            if extent == "support" and self.steps or extent == "query" and self.a.entry in ("train", "evaluate"):
                kind = "real" if self.a.loss.name == "mse" else "label"
                self._buffer(f"y.{extent}", target, extent, kind=kind, home="task")
        for leaf in self.program.leaves:
            if not self._is_factor(leaf):
                self._buffer(leaf.name, self.program.values[leaf.value].shape, home=leaf.home)
        if self.a.loss.class_weight:
            self._buffer(CLASS_WEIGHT, self.program.values[self.program.output].shape, home="meta")
        for rate in {self.a.rates[leaf.name] for leaf in self.adapted} if self.steps else ():
            self._buffer(rate.name, rate.shape, home="meta", steps=self.steps if rate.per_step else 0)
        if self.a.query_from is not None:
            self._buffer("step_weights", home="meta", steps=self.steps + 1)
        self.inputs = tuple(self.buffers)
        for leaf in self.adapted:
            rows, first = ("support", None) if self._is_factor(leaf) else (None, leaf.name)  # a factor begins at zero
            shape = self.program.values[leaf.value].shape
            if leaf.name in self.in_place:
                self._buffer(f"theta.{leaf.name}", shape, home="run")
            elif self.steps:
                self._buffer(f"theta.{leaf.name}", shape, rows, home="run", steps=self.steps + 1, first=first)
            if self.trains:
                self._buffer(f"theta_bar.{leaf.name}", shape, rows, home="run")

    def _is_factor(self, leaf: Leaf) -> bool:
        return self.program.values[leaf.value].rows

    def _rows(self, leaf: Leaf) -> str | None:
        return "support" if self._is_factor(leaf) else None

    def _theta(self, name: str, shift: int = 0) -> Ref:
        return Ref(f"theta.{name}", 0 if name in self.in_place else shift) if self.steps else Ref(name)

    def _pass(self, name: str, ops: list[Op], extent: str) -> Pass:
        p = Pass(name, self.program, ops, extent, self.buffers)
        p.value[self.program.input] = Ref(f"x.{extent}")
        for leaf in self.program.leaves:
            p.value[leaf.value] = self._theta(leaf.name) if leaf.role == "adapted" else Ref(leaf.name)
        if self.ops["meta"] and name != "meta":
            p.value.update({op.output: self.meta.value[op.output] for op in self.ops["meta"]})
        if extent in self.prefix and not name.startswith("prologue"):
            p.value.update({op.output: self.prefix[extent].value[op.output] for op in self.ops["task"]})
        p.factor_gradient = name == "gradient"
        return p

    # ------------------------------------------------------------------------------------------------------- segments
    def build(self) -> Plan:
        self._inputs()
        self._prologue()
        if self.steps:
            self._gradient()
            self._update()
        if self.a.entry == "adapt":
            for leaf in self.adapted:
                self._result(f"adapted.{leaf.name}", self.program.values[leaf.value].shape, "finish", self._theta(leaf.name))
        elif self.a.entry == "halves":
            self._query("query", gradients=False)
            self._query("query_reverse", gradients=True)
        else:
            self._query("query", gradients=self.a.entry == "train")
            if self.a.query_from is not None and self.steps:
                self._query("query_step", gradients=self.trains)
        if self.trains:
            if self.second_order or (self.steps and self.learned):
                self._reverse()
            self._epilogue()
        return self._assemble()

    def _prologue(self) -> None:
        self.meta = self._pass("meta", self.ops["meta"], "query")
        forward(self.meta)
        self.segments["prologue_meta"] = self._take(self.meta)
        self.segments["prologue"] = []
        if self.outer_extent == "joint" and self.a.entry != "adapt":
            self._buffer("x.joint", self.program.values[self.program.input].shape, "joint", home="run")
            join = Instruction("join_rows_fwd", (Ref("x.support"), Ref("x.query")), (Ref("x.joint"),))
            self.segments["prologue"].append(join)
        self.segments["prologue_batch"] = []
        if self.ops["task"]:
            extents = ["support"] * (self.steps > 0) + [self.outer_extent] * (self.a.entry != "adapt")
            for extent in extents:
                self.prefix[extent] = self._prefix_pass(extent)
        for leaf in self.adapted:
            if self._is_factor(leaf):
                self.segments["prologue"].append(Instruction("zero_fwd", (), (Ref(f"theta.{leaf.name}"),)))
            elif leaf.name in self.in_place:
                self.segments["prologue"].append(Instruction("copy_fwd", (Ref(leaf.name),), (Ref(f"theta.{leaf.name}"),)))
        differentiable = differentiable_values(self.program)
        self.zeta = [v for v in self._consumed(self.ops["step"], ("meta", "task")) if v in differentiable]

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

    @staticmethod
    def _take(p: Pass) -> list[Instruction]:
        taken, p.instructions = p.instructions, []
        return taken

    def _class_weight(self) -> Operand:
        return Ref(CLASS_WEIGHT) if self.a.loss.class_weight else None

    def _loss_attrs(self) -> dict[str, object]:
        loss = self.a.loss
        attrs: dict[str, object] = {"reduction": loss.reduction}
        return attrs if loss.name == "mse" else attrs | {"label_smoothing": loss.label_smoothing}

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
        keep = self._keeps_gradient()
        for leaf in self.adapted:
            steps = self.steps if keep else 0
            g = self._buffer(f"g.{leaf.name}", self.program.values[leaf.value].shape, self._rows(leaf), home="run", steps=steps)
            p.place(p.bar.get(leaf.value), g)
        self.gradient = p
        self.deltas = {v: p.bar[op.output] for v, op in self.rolled.items()}
        self.kept_inputs = {v: p.value[v] for v in rollback.inputs_to_keep(self.program, self.rolled)}
        for ref in (*self.deltas.values(), *self.kept_inputs.values()):
            self.buffers[ref.buffer] = replace(self.buffers[ref.buffer], home="run", steps=self.steps)
        self.segments["gradient"] = self._take(p)

    def _keeps_gradient(self) -> bool:
        """g_k is kept only where a rate's gradient reads it."""
        return self.trains and bool(self.learned) and not (self.shared_rate and self.second_order)

    def _update(self) -> None:
        update = []
        for leaf in self.adapted:
            inputs = (self._theta(leaf.name), Ref(f"g.{leaf.name}"), Ref(self.a.rates[leaf.name].name))
            update.append(Instruction("sgd_fwd", inputs, (self._theta(leaf.name, 1),)))
        self.segments["update"] = update

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
                acc = self._buffer(self._zeta_name(v, extent), spec.shape, rows, home="run")
                self.accumulators[v] = acc
                self._begin_or_add(p, v, acc, begin=name != "query_step")
                if spec.rows and self.second_order and extent != "support":  # the HVP reads the support rows' own prefix
                    inner = self._buffer(self._zeta_name(v, "support"), spec.shape, "support", home="run")
                    if name != "query_step":
                        p.emit("zero_fwd", (), (inner,))
        self.segments[name] = self._take(p)

    def _zeta_name(self, v: int, extent: str) -> str:
        leaf = self.leaf_of.get(v)
        return f"zeta_bar.{leaf.name}" if leaf else f"zeta_bar.{v}.{extent}" if self.program.values[v].rows else f"zeta_bar.{v}"

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

    # ------------------------------------------------------------------------------------------------------- back over the steps
    def _reverse(self) -> None:
        """update_bwd and hvp: one step back, from theta_bar_{k+1} to theta_bar_k."""
        update_bwd, direction = [], {}
        for leaf in self.adapted:
            theta_bar, rate = Ref(f"theta_bar.{leaf.name}"), Ref(self.a.rates[leaf.name].name)
            if self.shared_rate:
                direction[leaf.value] = theta_bar
            elif self.second_order:
                direction[leaf.value] = u = self._buffer(
                    f"u.{leaf.name}", self.program.values[leaf.value].shape, self._rows(leaf), home="run"
                )
                update_bwd.append(Instruction("sgd_bwd", (theta_bar, rate), (u,)))
        if self._keeps_gradient():
            update_bwd += self._rate_gradients()
        self.segments["update_bwd"] = update_bwd
        if self.second_order:
            self._hvp(direction)

    def _rate_bar(self, rate: Rate) -> Ref:
        return self._buffer(f"rate_bar.{rate.name}", rate.shape, home="run", steps=self.steps if rate.per_step else 0)

    def _rate_gradients(self) -> list[Instruction]:
        """rate_bar_k += -theta_bar_{k+1} * g_k, elementwise or as a dot product."""
        out, begun = [], set()
        for leaf in self.adapted:
            rate = self.a.rates[leaf.name]
            if rate.learned:
                operands = (Ref(f"theta_bar.{leaf.name}"), Ref(f"g.{leaf.name}"))
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
        p.saved = {key: ref for key, ref in g.saved.items() if key[1] != "graph"}
        if self.keeps_values:
            p.value |= g.value
            p.bar, p.bar_sums, p.bars_given = dict(g.bar), dict(g.bar_sums), True
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

    # ------------------------------------------------------------------------------------------------------- out
    def _epilogue(self) -> None:
        """Reverse of the frozen layers, then the sums over tasks, then the reverse of the weight expressions."""
        contributions: dict[int, list[Ref]] = {}
        differentiable = differentiable_values(self.program)
        for v, acc in self.accumulators.items():
            if self.level[v] == "meta" or v in self.leaf_of:  # or a task's own leaf
                contributions.setdefault(v, []).append(acc)
        epilogue: list[Instruction] = []
        self.segments["epilogue_batch"] = []
        self.summed: dict[int, list[Ref]] = {}  # cotangents that are sums over tasks already
        for extent, p in self.prefix.items():
            leaves = [v for v in self._consumed(self.ops["task"], ("task",)) if v in self.leaf_of]
            targets = [v for v in (*self._consumed(self.ops["task"], ("meta",)), *leaves) if v in differentiable]
            p.want(targets)
            for v in self.zeta:
                name, once = self._zeta_name(v, extent), self.program.values[v].rows or extent == self.outer_extent
                if self.level[v] == "task" and v not in self.leaf_of and once and name in self.buffers:
                    p.bar[v] = Ref(name)
            backward(p)
            found = {p.bar[v]: v for v in targets if v in p.bar}
            for instr in self._take(p):
                data = [instr.inputs[0].buffer] if instr.kernel == "linear_bwd_weight" else []
                batch = data and data[0] in self.together[extent] and all(ref in found for ref in instr.writes())
                self.segments["epilogue_batch"].append(instr) if batch else epilogue.append(instr)
                for ref in instr.writes():
                    if ref in found:
                        (self.summed if batch else contributions).setdefault(found[ref], []).append(ref)
        sources = {}
        for v, refs in contributions.items():
            total = refs[0]
            for i, ref in enumerate(refs[1:]):
                shape = self.program.values[v].shape
                added = self._buffer(f"epilogue.sum{i}.{v}", shape, home="run")
                epilogue.append(Instruction("add_fwd", (total, ref), (added,)))
                total = added
            self.buffers[total.buffer] = _at_home(self.buffers[total.buffer], "run")
            sources[v] = total
        self.segments["epilogue"] = epilogue
        self._reduce(sources)

    def _reduce(self, sources: dict[int, Ref]) -> None:
        self.reductions: list[Reduction] = []
        meta = self.meta
        meta.want([leaf.value for leaf in self.program.leaves if leaf.role == "outer" and leaf.home == "meta"])
        for leaf in (leaf for leaf in self.adapted if not self._is_factor(leaf)):  # a factor begins at zero: nothing to learn
            sources[leaf.value] = Ref(f"theta_bar.{leaf.name}")
        for v, source in sources.items():
            shape, leaf = self.program.values[v].shape, self.leaf_of.get(v)
            if leaf and leaf.home == "task":
                self._result(f"grad.{leaf.name}", shape, "finish", source)
                continue
            tied = v in self.summed or any(v in op.inputs for op in self.ops["meta"])  # also read by an expression: the parts are added below
            name = f"grad.{leaf.name}" if leaf and not tied else f"sum.{v}"
            self._buffer(name, shape, home="meta")
            self.reductions.append(Reduction(source, name))
            meta.bar[v] = Ref(name)
        for v, refs in self.summed.items():
            for ref in refs:
                meta.alias_bar(v, ref)
        backward(meta)
        for leaf in self.program.leaves:
            name = f"grad.{leaf.name}"
            if leaf.role != "const" and leaf.value in meta.bar:
                if name not in self.buffers:
                    self._buffer(name, self.program.values[leaf.value].shape, home="meta")
                    meta.place(meta.bar[leaf.value], Ref(name))
                self.results[name] = None
        self.segments["epilogue_meta"] = self._take(meta)
        for rate in self.learned:
            acc = self._rate_bar(rate) if self.steps else None
            if acc is not None:
                name = f"grad.{rate.name}"
                self._buffer(name, rate.shape, home="meta", steps=self.steps if rate.per_step else 0)
                self.reductions.append(Reduction(acc, name))
                self.results[name] = None
                if not rate.per_step:
                    first = "query" if self.a.entry == "train" else "query_reverse"
                    self.segments[first].append(Instruction("zero_fwd", (), (acc,)))

    def _result(self, name: str, shape: tuple[int, ...], segment: str, source: Ref) -> None:
        """A per-task result that leaves through a copy."""
        out = self._buffer(name, shape, home="task")
        self.results[name] = None
        self.segments.setdefault(segment, []).append(Instruction("copy_fwd", (source,), (out,)))

    def _schedule(self) -> list[Phase]:
        k, first = self.steps, self.a.query_from
        half = 1 if self.a.entry == "halves" else 0
        back = ("update_bwd", "hvp")
        phases = [Phase(("prologue_meta",), "meta"), Phase(("prologue_batch",), "batch"), Phase(("prologue",)), Phase(("gradient", "update"), start=0, stop=k)]
        phases.append(Phase(("query",), start=k, stop=k + 1))
        phases.append(Phase(("query_reverse",), start=k, stop=k + 1, half=half))
        if first is None:
            phases.append(Phase(back, start=k - 1, stop=-1, stride=-1, half=half))
        else:  # at each step back the query loss of theta_k joins in
            phases.append(Phase((*back, "query_step"), start=k - 1, stop=first - 1, stride=-1, half=half))
            phases.append(Phase(back, start=min(first, k) - 1, stop=-1, stride=-1, half=half))
        phases.append(Phase(("epilogue",), half=half))
        phases.append(Phase(("finish",), start=k, stop=k + 1, half=half))
        phases.append(Phase(("epilogue_batch",), "batch", half=half))
        phases.append(Phase(("epilogue_meta",), "meta", half=half))
        return phases

    def _assemble(self) -> Plan:
        results = list(self.results)
        if self.a.record_masks:
            results += [b.name for b in self.buffers.values() if b.kind in ("mask", "index") and not b.name.startswith("hvp.")]
        reductions = tuple(getattr(self, "reductions", ()))
        self.segments = live(self.segments, results, reductions)
        schedule = []
        for phase in self._schedule():
            names = tuple(name for name in phase.segments if self.segments.get(name))
            if names and len(phase.steps()):
                schedule.append(Phase(names, phase.scope, phase.start, phase.stop, phase.stride, phase.half))
        scheduled = {name for phase in schedule for name in phase.segments}
        segments = {
            name: Segment(name, make_groups(instructions, self.buffers))
            for name, instructions in self.segments.items()
            if name in scheduled
        }
        used = {ref.buffer for s in segments.values() for i in s.instructions for ref in (*i.reads(), *i.writes())}
        used |= {b.first for b in self.buffers.values() if b.name in used and b.first}
        used |= {name for r in reductions for name in (r.source.buffer, r.target)}
        results = [name for name in results if name in used]
        buffers = {name: b for name, b in self.buffers.items() if name in used}
        buffers = assign_homes(unkept(buffers, segments, results), segments, schedule, results)
        inputs = tuple(name for name in self.inputs if name in used)
        entries = 2 if self.a.entry == "halves" else 1
        return Plan(self.a.entry, self.steps, buffers, segments, tuple(schedule), reductions, tuple(results), inputs, entries)


def _at_home(buffer: Buffer, home: str) -> Buffer:
    return buffer if buffer.home else Buffer(buffer.name, buffer.shape, buffer.rows, buffer.kind, home, buffer.steps, buffer.first)
