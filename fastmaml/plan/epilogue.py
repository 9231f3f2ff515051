"""Out of a meta-iteration: the reverse of the frozen layers, the sums over tasks, the reverse of the weight expressions."""

from __future__ import annotations

from fastmaml.plan.dependence import differentiable_values
from fastmaml.plan.differentiate import backward
from fastmaml.plan.frame import Frame
from fastmaml.plan.instructions import Buffer, Instruction, Reduction, Ref


class Epilogue(Frame):
    """epilogue, epilogue_batch, epilogue_meta."""

    def _epilogue(self) -> None:
        """Reverse of the frozen layers, then the sums over tasks, then the reverse of the weight expressions."""
        contributions: dict[int, list[Ref]] = {}
        differentiable = differentiable_values(self.program)
        for v, acc in self.accumulators.items():
            if self.level[v] == "meta" or v in self.leaf_of:  # or a task's own leaf
                contributions.setdefault(v, []).append(acc)
        epilogue: list[Instruction] = self._join_features() if self.joint_body else []
        self.segments["epilogue_batch"] = []
        self.summed: dict[int, list[Ref]] = {}  # cotangents that are sums over tasks already
        for extent, p in self.prefix.items():
            leaves = [v for v in self._consumed(self.ops["task"], ("task",)) if v in self.leaf_of]
            targets = [v for v in (*self._consumed(self.ops["task"], ("meta",)), *leaves) if v in differentiable]
            p.want(targets)
            for v in self.zeta:
                name, once = self._zeta_name(v, extent), self.program.values[v].rows or extent == self.outer_extent or self.joint_body
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

    def _join_features(self) -> list[Instruction]:
        """The cotangents of features that were split between support and query."""
        out = []
        for v in (v for v in self.zeta if self.level[v] == "task" and v not in self.leaf_of and self.program.values[v].rows):
            joint = self._buffer(self._zeta_name(v, "joint"), self.program.values[v].shape, "joint", home="run")
            support, query = (Ref(self._zeta_name(v, extent)) for extent in ("support", "query"))
            if support.buffer in self.buffers:
                out.append(Instruction("join_rows_fwd", (support, query), (joint,)))
            else:  # first order: the inner loop hands nothing back
                out.append(Instruction("query_rows_bwd", (query,), (joint,)))
        return out

    def _reduce(self, sources: dict[int, Ref]) -> None:
        self.reductions: list[Reduction] = []
        meta = self.meta
        meta.want([leaf.value for leaf in self.program.leaves if leaf.role == "outer" and leaf.home == "meta"])
        for leaf in (leaf for leaf in self.adapted if leaf.learned and not self._is_factor(leaf)):  # a factor begins at zero: nothing to learn
            sources[leaf.value] = self._solution(leaf) if self.implicit else Ref(f"theta_bar.{leaf.name}")
        for v, source in sources.items():
            shape, leaf = self.program.values[v].shape, self.leaf_of.get(v)
            if leaf and leaf.home == "task":
                self._result(f"grad.{leaf.name}", shape, "finish", source)
                continue
            tied = v in self.summed or any(v in op.inputs for op in self.ops["meta"])  # also read by an expression: the parts are added below
            name = f"grad.{leaf.name}" if leaf and not tied else f"sum.{v}"
            self._buffer(name, shape, home="meta", steps=self._steps_of(v))
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
                if rate.home == "task":
                    self._result(name, rate.shape, "finish", acc)
                    self.segments[self._first_query].append(Instruction("zero_fwd", (), (acc,)))
                    continue
                self._buffer(name, rate.shape, home="meta", steps=self.steps if rate.per_step else 0)
                self.reductions.append(Reduction(acc, name))
                self.results[name] = None
                if not rate.per_step:
                    self.segments[self._first_query].append(Instruction("zero_fwd", (), (acc,)))


def _at_home(buffer: Buffer, home: str) -> Buffer:
    return buffer if buffer.home else Buffer(buffer.name, buffer.shape, buffer.rows, buffer.kind, home, buffer.steps, buffer.first)
