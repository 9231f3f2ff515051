"""What all parts of a sweep share: the Program and its Arrangement, the buffers, the inputs, and passes over the ops."""

from __future__ import annotations

from collections.abc import Iterable

from fastmaml.optimizers import ImplicitGradient
from fastmaml.plan import rollback
from fastmaml.plan.arrangement import Arrangement, Rate
from fastmaml.plan.dependence import levels
from fastmaml.plan.instructions import Buffer, Instruction, Operand, Ref
from fastmaml.plan.passes import Pass
from fastmaml.plan.update import Update
from fastmaml.program import CLASS_WEIGHT, Leaf, Op, Program

KEPT_BYTES = 8 * 2**20  # of each task in flight: activations of one step that are kept rather than made again


class Frame:
    """The state of a Plan in the making."""

    def __init__(self, program: Program, arrangement: Arrangement) -> None:
        self.program, self.a, self.steps = program, arrangement, arrangement.steps
        self.buffers: dict[str, Buffer] = {}
        self.segments: dict[str, list[Instruction]] = {}
        self.leaf_of = {leaf.value: leaf for leaf in program.leaves}
        self.adapted = [leaf for leaf in program.leaves if leaf.role == "adapted"]
        self.level = levels(program, arrangement.entry)
        self.ops = {level: [op for op in program.ops if self.level[op.output] == level] for level in ("meta", "task", "step")}
        self.trains = self.a.entry in ("train", "halves")
        self.unrolls = self.trains and arrangement.meta_gradient == "unrolled"
        self.implicit = self.trains and self.steps > 0 and isinstance(arrangement.meta_gradient, ImplicitGradient)
        self.second_order = self.unrolls and not self.a.first_order and self.steps > 0
        self.learned = sorted({r for leaf in self.adapted if (r := self.a.rates.get(leaf.name)) and r.learned}, key=lambda r: r.name)
        rates = {self.a.rates.get(leaf.name) for leaf in self.adapted}
        shared = len(rates) == 1 and next(iter(rates), None) and next(iter(rates)).shape == () and arrangement.optimizer.plain
        self.shared_rate = rates.pop() if shared else None
        kept_rates = self.trains and bool(self.learned) and not (self.shared_rate and self.second_order)
        self.update = Update(program, arrangement, self.adapted, self._buffer, self._theta, self.second_order, kept_rates)
        statistics = {op.attrs["statistics"] for op in program.ops if op.name.startswith("batchnorm")}
        self.joint_body = "joint" in statistics and arrangement.entry not in ("adapt", "predict")
        self._check_joint_body()
        self.outer_extent = "joint" if "support" in statistics or ("joint" in statistics and arrangement.entry == "predict") else "query"
        self.rolled = rollback.rolled_back(program, arrangement) if self.second_order else {}
        self.in_place = self._in_place()
        self.keeps_values = (self.second_order or self.implicit) and (arrangement.memory == "fast" or self._keeps_its_step())
        self.accumulators: dict[int, Ref] = {}  # zeta_bar: cotangents of non-adapted values, summed over the steps
        self.prefix: dict[str, Pass] = {}
        self.features: dict[str, dict[int, Ref]] = {}  # by extent: the values of the layers that no adapted leaf reaches
        self.together: dict[str, set[str]] = {}  # by extent: row buffers that exist for all tasks at once
        self.results: dict[str, None] = {}

    def _check_joint_body(self) -> None:
        """Statistics of support and query together exist for layers that the inner loop does not change."""
        inner = [op for op in self.ops["step"] if op.name.startswith("batchnorm") and op.attrs["statistics"] == "joint"]
        if inner and self.joint_body:
            raise ValueError("batchnorm='joint' needs a body that the inner loop does not change, as ANIL's: here it adapts a layer below a batch normalisation")

    def _keeps_its_step(self) -> bool:
        """A single inner step, or the only one that is gone back over, keeps its activations and their gradients, if these are few: reading them back beats making them again."""
        if not (self.steps == 1 or self.implicit) or not self.a.support_rows or any(op.name == "module" for op in self.program.ops):
            return False
        floats = sum(self.program.values[op.output].numel for op in self.ops["step"] if self.program.values[op.output].rows)
        return 2 * 4 * self.a.support_rows * floats <= KEPT_BYTES

    def _in_place(self) -> set[str]:
        """Adapted leaves of which theta_k is not kept: those that are rolled back, and all where nothing goes back to theta_k."""
        if self.implicit:
            values = {leaf.value for leaf in self.adapted}
        elif self.second_order:
            values = {*self.rolled, *rollback.biases(self.program, self.a, self.rolled)}
        elif self.steps > rollback.KEPT and self.a.query_from is None:
            values = {leaf.value for leaf in self.adapted if not self._is_factor(leaf)}
        else:
            values = set()
        return {leaf.name for leaf in self.adapted if leaf.value in values}

    def _consumed(self, ops: Iterable[Op], below: tuple[str, ...]) -> list[int]:
        """Values of a lower level that ``ops`` read, in order of use."""
        return list(dict.fromkeys(v for op in ops for v in op.inputs if v is not None and self.level[v] in below))

    def _buffer(self, name: str, shape: tuple[int, ...] = (), rows: str | None = None, **kw) -> Ref:
        self.buffers.setdefault(name, Buffer(name, shape, rows, **kw))
        return Ref(name)

    def _inputs(self) -> None:
        extents = ["support"] * (self.steps > 0) + ["query"] * (self.a.entry != "adapt")
        if self._joins:
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
                self._buffer(leaf.name, self.program.values[leaf.value].shape, home=leaf.home, steps=max(self.steps, 1) if leaf.per_step else 0)
        if self.a.loss.class_weight:
            self._buffer(CLASS_WEIGHT, self.program.values[self.program.output].shape, home="meta")
        for rate in {self.a.rates[leaf.name] for leaf in self.adapted} if self.steps else ():
            self._buffer(rate.name, rate.shape, home=rate.home, steps=self.steps if rate.per_step else 0)
        if self.steps:
            self.update.inputs()
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

    @property
    def _joins(self) -> bool:
        """Whether some pass runs over support and query rows together."""
        return self.joint_body or (self.outer_extent == "joint" and self.a.entry != "adapt")

    def _is_factor(self, leaf: Leaf) -> bool:
        return self.program.values[leaf.value].rows

    def _rows(self, leaf: Leaf) -> str | None:
        return "support" if self._is_factor(leaf) else None

    def _theta(self, name: str, shift: int = 0) -> Ref:
        return Ref(f"theta.{name}", 0 if name in self.in_place else shift) if self.steps else Ref(name)

    def _pass(self, name: str, ops: list[Op], extent: str) -> Pass:
        p = Pass(name, self.program, ops, extent, self.buffers)
        p.value[self.program.input] = Ref(f"x.{extent}")
        before = -1 if self.steps and name.startswith("query") else 0  # the query at theta_k reads what the step before it has read
        for leaf in self.program.leaves:
            p.value[leaf.value] = self._theta(leaf.name) if leaf.role == "adapted" else Ref(leaf.name, before if leaf.per_step else 0)
        if self.ops["meta"] and name != "meta":
            p.value.update({op.output: self.meta.value[op.output] for op in self.ops["meta"]})
        if not name.startswith("prologue"):
            p.value.update(self.features.get(extent, {}))
        p.factor_gradient = name == "gradient"
        return p

    def _result(self, name: str, shape: tuple[int, ...], segment: str, source: Ref) -> None:
        """A per-task result that leaves through a copy."""
        out = self._buffer(name, shape, home="task")
        self.results[name] = None
        self.segments.setdefault(segment, []).append(Instruction("copy_fwd", (source,), (out,)))

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

    def _zeta_name(self, v: int, extent: str) -> str:
        leaf = self.leaf_of.get(v)
        return f"zeta_bar.{leaf.name}" if leaf else f"zeta_bar.{v}.{extent}" if self.program.values[v].rows else f"zeta_bar.{v}"

    @property
    def _first_query(self) -> str:
        """The segment that begins what goes back over the steps."""
        return "query" if self.a.entry == "train" else "query_reverse"

    def _steps_of(self, v: int) -> int:
        """Slots of the cotangent of a value: of a leaf per step one for each."""
        return self.steps if v in self.leaf_of and self.leaf_of[v].per_step else 0

    def _rate_bar(self, rate: Rate) -> Ref:
        return self._buffer(f"rate_bar.{rate.name}", rate.shape, home="run", steps=self.steps if rate.per_step else 0)
