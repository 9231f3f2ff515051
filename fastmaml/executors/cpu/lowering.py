"""Plan -> the flat numbers that ``fastmaml._cpu`` walks: layouts, native calls; addresses are in cpu/storage.py. Nothing here knows of meta-learning.

Rows are padded to LANE floats, and images are [h][w][c] with the channels padded. A weight that a linear or conv2d layer reads is kept packed
(csrc/include/fastmaml/plan.h), and so is everything elementwise with it (its trajectory, gradients, rates); expressions work on plain arrays, with
conversions in between, but for most that make a convolution's weight (cpu/layouts.py). A lowering is made for one capacity: the largest task of the batch.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import replace

from fastmaml.executors.cpu.fusion import DEEP, Fusion, Step
from fastmaml.executors.cpu.layouts import packed_weights, turned_weights, views
from fastmaml.executors.cpu.native import PLANES, Native, is_flat, is_image, windows
from fastmaml.executors.cpu.rules import native
from fastmaml.executors.cpu.storage import ALIGN, Storage, pad
from fastmaml.plan.instructions import Buffer, Group, Instruction, Phase, Plan, Ref

PANEL = 64  # as in csrc/include/fastmaml/plan.h
ROWS = {None: 0, "support": 1, "query": 2, "joint": 3}
SCRATCH = ("conv2d_", "patch_")  # kernels that need it
ARRAYS = ("sgd_fwd", "sgd_bwd", "sgd_bwd_rate", "clip_value_fwd", "clip_value_bwd", "dot_fwd", "axpy_fwd", "scale_fwd", "add_fwd", "zero_fwd", "copy_fwd")


class Lowering(Storage):
    """``words`` for ``_cpu.Plan``, and where the caller's arrays go.

    task_buffers   names in the order in which pointers are expected
    inputs         meta-home inputs (leaves, rates, weights), in order;  outputs: gradients, in order
    turned         of each leaf that all tasks multiply by from both sides the name of its transpose, packed too (where ``turn``: for kernels that read it)
    kept_bytes     per task, of buffers that stay between the halves or are results: name -> bytes
    """

    def __init__(
        self, plan: Plan, capacity: Mapping[str, int], kernel_ids: Mapping[str, int], block_rows: int | None = None, turn: bool = False
    ) -> None:
        self.plan, self.capacity, self.kernel_ids, self.block_rows = plan, dict(capacity), kernel_ids, block_rows
        self.buffers: dict[str, Buffer] = dict(plan.buffers)
        self.alias: dict[str, Ref] = {}
        self.windows = windows(plan)
        self._aliases()
        self.packed = packed_weights(plan, self.buffers, self._plain_result)
        self.alias |= views(plan, self.packed)
        self.phases = [self._phase(phase) for phase in plan.schedule]
        self._import_task_leaves()
        fusion = Fusion(plan, self.buffers, lambda rows, steps: bool(self._block(rows, steps)) or (rows is not None and self.capacity[rows] > DEEP))
        for phase, groups in self.phases:
            fusion.run(groups, weights=phase.scope == "task")
        self.turned = turned_weights(self.phases, self.buffers, self.packed, self._own, plan.inputs) if turn else {}
        self.block_rows_of = self._blocks()
        self._addresses()
        self.words = self._words()

    # ------------------------------------------------------------------------------------------------- names and layouts
    def _aliases(self) -> None:
        """Reshaped rows are the same memory, unless somebody writes them a second time."""
        writers: dict[str, int] = {}
        for _, instr in self.plan.instructions():
            for ref in instr.writes():
                writers[ref.buffer] = writers.get(ref.buffer, 0) + 1
        joined = {instr.outputs[0].buffer for _, instr in self.plan.instructions() if instr.kernel == "join_rows_fwd"}
        for name, buffer in self.buffers.items():
            if is_image(buffer) and (self._outside(buffer) or name in joined):
                self.buffers[name] = replace(buffer, kind=PLANES)
        for _, instr in self.plan.instructions():
            if not instr.kernel.startswith("reshape_"):
                continue
            x, y = self.buffers[instr.inputs[0].buffer], self.buffers[instr.outputs[0].buffer]
            once = writers[y.name] == 1 and writers.get(x.name, 0) <= 1
            source = self.buffers[self._name(x.name)]
            callers = self._outside(source) or source.kind == PLANES
            if x.rows and once and x.steps == y.steps and y.name not in self.plan.results and (callers or x.shape == y.shape or (is_flat(x.shape) and is_flat(y.shape))):
                self.alias[y.name] = Ref(x.name)
                if callers and is_image(y):
                    self.buffers[y.name] = replace(y, kind=PLANES)
                if x.home == "block" or (x.home == "scratch" and y.home == "run"):  # lives as long as its longest-lived name
                    self.buffers[x.name] = replace(x, home=y.home)

    def _plain_result(self, name: str) -> bool:
        """Results of a task leave in the model's own layout."""
        return self.buffers[name].home == "task" and name in self.plan.results

    # ------------------------------------------------------------------------------------------------- instructions
    def _phase(self, phase: Phase) -> tuple[Phase, list[tuple[str | None, list[Step]]]]:
        groups = []
        for name in phase.segments:
            for group in self.plan.segments[name].groups:
                groups.append((group.rows, list(self._group(group, "run" if phase.scope == "task" else "meta"))))
        return phase, groups

    def _group(self, group: Group, home: str) -> Iterable[Step]:
        for instr in group.instructions:
            if instr.kernel.startswith("reshape_") and self._own(instr.outputs[0]) == self._own(instr.inputs[0]):
                continue
            yield from self._convert(instr, group.rows, home)

    def _temporary(self, tag: str, like: Buffer, home: str) -> Ref:
        name = f"{like.name}.{tag}.{home}"
        self.buffers.setdefault(name, Buffer(name, like.shape, like.rows, like.kind, home))
        return Ref(name)

    def _convert(self, instr: Instruction, rows: str | None, home: str) -> Iterable[Step]:
        """The native call, with packing, unpacking and padding around it where an operand lies in another form than the kernel reads."""
        call = self._as_they_lie(native(instr, self.buffers, rows))
        before, after, operands = [], [], list(call.operands)
        outputs = {id(ref) for ref in instr.outputs if ref is not None}
        for i, ref in enumerate(operands):
            if ref is None:
                continue
            buffer = self.buffers[self._name(ref.buffer)]
            is_output = id(ref) in outputs
            if self.buffers[ref.buffer].kind == PLANES:
                if i not in call.unpadded:
                    temporary = self._temporary("image", replace(self.buffers[ref.buffer], kind="real"), home)
                    before.append(Step(Native("unflatten_image_fwd", (ref, temporary), self.buffers[ref.buffer].shape), rows))
                    operands[i] = temporary
            elif buffer.rows and i not in call.unpadded and self._unpadded(buffer):
                temporary = self._temporary("padded", buffer, home)
                copy = Native("copy_rows_fwd", (temporary, ref) if is_output else (ref, temporary), (buffer.numel,))
                (after if is_output else before).append(Step(self._sized(copy), rows))
                operands[i] = temporary
            elif call.plain and ref.buffer in self.packed and i not in call.packed:
                temporary, shape = self._temporary("plain", buffer, home), self.packed[ref.buffer]
                convert = Native("pack_fwd", (temporary, ref), shape) if is_output else Native("unpack_fwd", (ref, temporary), shape)
                (after if is_output else before).append(Step(convert, None))
                operands[i] = temporary
        call = replace(call, operands=tuple(operands))
        yield from before
        for one in self._copies(call, home) if call.kernel == "copy_fwd" else (call,):
            yield Step(self._sized(one), rows)
        yield from after

    def _as_they_lie(self, call: Native) -> Native:
        """An expression of arrays that are all packed as for a convolution."""
        lie = [self.packed.get(call.operands[i].buffer, ()) for i in call.together if call.operands[i]]
        if not lie or any(len(sizes) != 3 for sizes in lie):
            return call
        if call.kernel == "matmul_fwd":
            return replace(call, sizes=(*call.sizes, 1), packed=call.together)
        inputs, outputs, taps = max(lie)
        panels, width = (outputs // PANEL, PANEL) if outputs > PANEL else (1, pad(outputs))
        if outputs > PANEL * panels:  # the last panel is narrower
            return call
        broadcast = (4 if bits else 0 for bits in call.sizes[4:])  # over the taps
        return replace(call, sizes=(1, panels, taps, inputs // taps * width, *broadcast), packed=call.together)

    def _copies(self, call: Native, home: str) -> Iterable[Native]:
        """A copy between arrays that lie in different ways (a reshape may make one) is a conversion; a number that leaves has no padding."""
        x, y = call.operands
        if self.buffers[y.buffer].shape == () and self._outside(self.buffers[y.buffer]):
            return [Native("copy_rows_fwd", (x, y), (1,))]
        source, target = (self.packed.get(ref.buffer) for ref in (x, y))
        if source == target:
            return [call]
        plain = self._temporary("plain", self.buffers[x.buffer], home) if source and target else x if target else y
        unpack, pack = Native("unpack_fwd", (x, plain), source), Native("pack_fwd", (plain, y), target)
        return [unpack] * (source is not None) + [pack] * (target is not None)

    def _sized(self, call: Native) -> Native:
        """Elementwise kernels walk the stored floats (packed arrays have padding of their own); row copies say what is padded."""
        if call.kernel == "sgd_bwd_rate" and len(call.sizes) == 3:
            return call
        if call.kernel in ARRAYS:
            ref = next(ref for ref in call.operands if ref is not None)
            scalar = (1,) if call.kernel in ("axpy_fwd", "scale_fwd") and self.buffers[ref.buffer].shape == () else ()
            return replace(call, sizes=(self._floats(self.buffers[ref.buffer]), *call.sizes[1:], *scalar))
        if call.kernel == "copy_rows_fwd":
            flags = [int(self._unpadded(self.buffers[self._name(ref.buffer)])) for ref in call.operands]
            return replace(call, sizes=(call.sizes[0], *flags))
        return call

    def _import_task_leaves(self) -> None:
        """Weights of a task's own come plain and unpadded: brought into the run's memory first."""
        steps = []
        for name in self.plan.inputs:
            buffer = self.plan.buffers[name]
            if buffer.home == "task" and buffer.rows is None:
                own = f"{name}.own"
                self.buffers[own] = replace(buffer, name=own, home="run")
                if name in self.packed:
                    self.packed[own] = self.packed[name]
                    steps.append(Step(Native("pack_fwd", (Ref(name), Ref(own)), self.packed[name]), None))
                else:
                    flags = (1, 0)
                    steps.append(Step(Native("copy_rows_fwd", (Ref(name), Ref(own)), (buffer.numel, *flags)), None))
                self._rename(name, own)
        for half in range(self.plan.entries) if steps else ():  # the run's memory does not outlive a half
            first = next(i for i, (phase, _) in enumerate(self.phases) if phase.scope == "task" and phase.half == half)
            self.phases.insert(first, (Phase((), "task", half=half), [(None, [Step(s.call, s.rows) for s in steps])]))

    def _rename(self, old: str, new: str) -> None:
        for _, groups in self.phases:
            for _, steps in groups:
                for step in steps:
                    refs = tuple(Ref(new, r.shift) if r is not None and r.buffer == old else r for r in step.call.operands)
                    step.call = replace(step.call, operands=refs)
        for name, buffer in self.buffers.items():
            if buffer.first == old:
                self.buffers[name] = replace(buffer, first=new)

    # ------------------------------------------------------------------------------------------------- out
    def _words(self) -> list[int]:
        scratch = any(step.call.kernel.startswith(SCRATCH) for _, groups in self.phases for _, steps in groups for step in steps)
        words = [self.meta_bytes, self.run_bytes, int(scratch)]
        reductions, floats = [], 0
        for r in self.plan.reductions:
            buffer = self.buffers[r.source.buffer]
            count = self._slots(buffer) * pad(self._bytes(buffer), ALIGN) // 4 if buffer.steps else self._floats(buffer)
            reductions += [*self._operand(r.source), self.at[r.target][2], count, floats]
            floats += count
        words += [floats, self.plan.entries, len(self.task_buffers)]
        for name in self.task_buffers:
            buffer = self.buffers[name]
            rows = ROWS[buffer.rows] if self._outside(buffer) or self.by_rows(name) else 0
            words += [rows, self.row_bytes(name) if rows else self.kept_bytes(name)]
        self.inputs = [n for n in self.plan.inputs if self.buffers[n].home == "meta"]
        self.outputs = [n for n in self.plan.results if self.buffers[n].home == "meta"]
        for ports, turned in ((self.inputs, self.turned), (self.outputs, {})):
            words.append(len(ports) + len(turned))
            for name in (*ports, *turned.values()):
                words += self._port(self.buffers[name])
        self.inputs += self.turned  # given twice
        words += [len(self.plan.reductions), *reductions, *self._weighted(), *self._checked(), len(self.phases)]
        for phase, groups in self.phases:
            words += [("task", "meta", "batch").index(phase.scope), phase.half, phase.start, phase.stop, phase.stride, len(groups)]
            for rows, steps in groups:
                words += [ROWS[rows], self._block(rows, steps), len(steps)]
                for step in steps:
                    words += self._call(step.call, phase.scope == "batch" and self._sums(step))
        return words

    def _port(self, buffer: Buffer) -> list[int]:
        packed = buffer.name in self.packed
        cols, rows, taps = (*self.packed[buffer.name], 0)[:3] if packed else (buffer.numel, 1, 0)
        layout = int(packed)
        if buffer.name in self.turned.values():
            layout, rows, cols = 2, cols, rows
        return [self.at[buffer.name][2], layout, rows, cols, taps, self._slots(buffer), self._step_stride(buffer)]

    def _weighted(self) -> list[int]:
        """Rows that a batch phase sums over all tasks."""
        refs = {}
        for phase, groups in self.phases:
            for _, steps in groups if phase.scope == "batch" else ():
                for step in steps:
                    if self._sums(step):
                        refs[step.call.operands[1]] = None  # dy of linear_bwd_weight
        words = [len(refs)]
        for ref in refs:
            buffer = self.buffers[self._name(ref.buffer)]
            words += [*self._operand(ref), ROWS[buffer.rows], self._stride(buffer) // 4]
        return words

    @staticmethod
    def _sums(step: Step) -> bool:
        return step.call.kernel == "linear_bwd_weight"

    def _checked(self) -> list[int]:
        words, count = [], 0
        self.first_slot: dict[str, int] = {}  # of what has a step axis but does not begin at step 0
        for name in ("loss.support", "loss.query"):
            if name in self.at:
                steps = self.buffers[name].steps
                slots = [k for phase, _ in self.phases for k in phase.steps() if self._writes(phase, name)] if steps else [0]
                words += [*self._operand(Ref(name)), min(slots), max(slots) + 1]
                self.first_slot[name] = min(slots)
                count += 1
        return [count, *words]

    def _writes(self, phase: Phase, name: str) -> bool:
        return any(r.buffer == name for s in phase.segments for i in self.plan.segments[s].instructions for r in i.writes())

    def _call(self, call: Native, sums: bool) -> list[int]:
        words = [self.kernel_ids[call.kernel], int(sums), call.pixels, len(call.operands)]
        for ref in call.operands:
            words += self._operand(ref)
        numbers = [struct.unpack("<i", struct.pack("<f", n))[0] for n in call.numbers]
        return [*words, len(call.sizes), *call.sizes, len(numbers), *numbers]


def rows_capacity(support: int, query: int) -> dict[str, int]:
    return {"support": support, "query": query, "joint": support + query}


