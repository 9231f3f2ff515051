"""Patterns of a Plan's instructions that become one launch: what would be done next to a result is done as it is stored.

    linear, conv2d, batchnorm + relu    any of their modes: the activation, its reverse or its tangent; reshapes before or behind it that move nothing are gone
    bwd_weight + add, sgd or axpy       the gradient is added to what it is for, and is never stored itself
    copy                                the two arrays become one
    what surrounds a batchnorm          triton/fusion_norms.py

``fuse`` makes a Plan of a Plan, so storage is laid out for what is left. What cpu/fusion.py does to native calls, behind their conversions, this does to instructions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from fastmaml.executors.triton.fused import Activation, Fused, Moves, Update, places
from fastmaml.executors.triton.fusion_norms import fuse_norms
from fastmaml.executors.triton.storage import same_order
from fastmaml.executors.uses import Uses
from fastmaml.plan.instructions import Buffer, Group, Instruction, Operand, Plan, Ref, Segment

PRODUCTS = {f"{op}_{mode}" for op in ("linear", "conv2d", "batchnorm") for mode in ("fwd", "jvp", "bwd_input", "bwd_input_jvp")}
PRODUCTS |= {"batchnorm_maxpool2d_bwd_input", "batchnorm_maxpool2d_bwd_input_jvp"}
SHARES = {"patch_stats_bwd", "patch_stats_bwd_jvp"}  # of a gradient whose larger part is there already: both are summed before the update
GRADIENTS = {f"{op}_bwd_weight{jvp}" for op in ("linear", "conv2d", "layernorm", "groupnorm") for jvp in ("", "_jvp")} | {"row_sum_bwd", "row_sum_bwd_jvp"} | SHARES
MASKED = {f"{op}_{mode}": operands for op in ("relu", "leaky_relu") for mode, operands in (("jvp", (1, 0)), ("bwd", (1, 0)), ("bwd_jvp", (1, 0)), ("replay", (0, 1)))}


def fuse(plan: Plan) -> Plan:
    """The same results, from fewer instructions and buffers."""
    return fuse_norms(_Fusion(_without_copies(plan)).run())


# ---------------------------------------------------------------------------------------------------------------- copies
def _without_copies(plan: Plan) -> Plan:
    """y = copy(x) as one array, where each is written once, in the same segment, and nobody asks for y before."""
    uses, buffers, names = Uses(plan), dict(plan.buffers), {}
    readers: dict[str, set[str]] = {name: set() for name in buffers}  # segments
    for segment, instr in plan.instructions():
        for ref in instr.reads():
            readers[ref.buffer].add(segment)

    def now(ref: Operand) -> Operand:
        return ref and names.get(ref.buffer, ref)

    for name, segment in plan.segments.items():
        together = {other for phase in plan.schedule if name in phase.segments for other in phase.segments}
        seen: set[str] = set()
        for instr in segment.instructions:
            reads, writes = [now(ref) for ref in instr.reads()], [now(ref) for ref in instr.writes()]
            if instr.kernel == "copy_fwd" and reads and writes:
                x, y = buffers[reads[0].buffer], buffers[writes[0].buffer]
                fresh = uses.writers[x.name] == uses.writers[y.name] == 1 and x.name in seen and y.name not in seen | {x.name}
                alike = (x.shape, x.rows, x.kind, x.columns) == (y.shape, y.rows, y.kind, y.columns) and "meta" not in (x.home, y.home) and not y.steps
                at_once = not x.steps or readers[y.name] <= together  # an x of this step
                gone, stays = (x, writes[0]) if y.name in uses.kept else (y, reads[0])
                if fresh and alike and at_once and gone.name not in uses.kept and not gone.steps:
                    home = max(x.home, y.home, key=("block", "scratch", "run", "task").index)
                    buffers[stays.buffer] = replace(buffers[stays.buffer], home=home)
                    names = {old: stays if new.buffer == gone.name else new for old, new in names.items()} | {gone.name: stays}
            seen |= {ref.buffer for ref in (*reads, *writes)}

    def group(g: Group) -> Group:
        instructions = (replace(i, inputs=tuple(map(now, i.inputs)), outputs=tuple(map(now, i.outputs))) for i in g.instructions)
        return replace(g, instructions=tuple(i for i in instructions if i.kernel != "copy_fwd" or i.inputs != i.outputs))

    segments = {name: Segment(name, tuple(map(group, segment.groups))) for name, segment in plan.segments.items()}
    return replace(plan, buffers=buffers, segments=segments)


# ---------------------------------------------------------------------------------------------------------------- the rest
class _Fusion(Moves):
    def run(self) -> Plan:
        for name, code in self.code.items():
            for i in range(len(code) - 1, -1, -1):
                if code[i][1].kernel in PRODUCTS:
                    self._activation(name, i)
                elif code[i][1].kernel in GRADIENTS:
                    self._updates(name, i)
        return self.rebuilt()

    # ------------------------------------------------------------------------------------------------- activations
    def _activation(self, name: str, i: int) -> None:
        code, (group, first) = self.code[name], self.code[name][i]
        parts, result = [first], first.outputs[0]
        activation: Activation | None = None
        shape = result and self.buffers[result.buffer].shape
        turned = {"linear": 3, "batchnorm": 2, "conv2d": -1}[first.kernel.split("_")[0]]  # dimensions of samples that the rule brings into another order
        if result is None or (len(shape) == turned and shape[0] not in (1, math.prod(shape))):
            return
        taken = []
        while self.uses.private(result):
            j = next((j for j in range(i + 1, len(code)) if result in code[j][1].inputs), None)
            if j is None or not self._may_run_before(code[j][1], (instr for k, (_, instr) in enumerate(code[i + 1 : j], i + 1) if k not in taken), result):
                break
            instr = code[j][1]
            mine = self._as_activation(instr, result)
            if mine is not None and activation is None:
                activation = mine
            elif not self._moves_nothing(instr):
                break
            parts.append(instr)
            taken.append(j)
            result = instr.outputs[0]
        if activation is None:
            return
        mask = () if activation.mask is None else (activation.mask,)
        inputs, outputs = (first.inputs, (result, *first.outputs[1:], *mask)) if activation.makes else ((*first.inputs, *mask), (result, *first.outputs[1:]))
        code[i] = group, Fused(first.kernel, inputs, outputs, first.attrs, tuple(parts), activation, places=places(first))
        for j in sorted(taken, reverse=True):
            del code[j]

    @staticmethod
    def _as_activation(instr: Instruction, result: Ref) -> Activation | None:
        slope = instr.attrs.get("slope")
        if instr.outputs[0] is None:
            return None
        if instr.kernel in ("relu_fwd", "leaky_relu_fwd"):
            return Activation(instr.outputs[1], True, slope)
        if instr.kernel in MASKED:
            value, mask = (instr.inputs[k] for k in MASKED[instr.kernel])
            return Activation(mask, False, slope) if value == result and mask is not None else None
        return None

    def _moves_nothing(self, instr: Instruction) -> bool:
        if not instr.kernel.startswith("reshape_"):
            return False
        x, y = (self.buffers[ref.buffer] for ref in (instr.inputs[0], instr.outputs[0]))
        return x.rows is not None and same_order(x.shape, y.shape)

    # ------------------------------------------------------------------------------------------------- gradient, update
    def _updates(self, name: str, i: int) -> None:
        if any(phase.scope != "task" for phase in self.plan.schedule if name in phase.segments):
            return
        group, first = self.code[name][i]
        outputs, updates, parts = list(first.outputs), [None] * len(first.outputs), [first]
        for which in range(len(outputs)):
            plus = None
            while found := self._take_update(name, i, outputs[which], plus):
                part, updates[which] = found
                parts.append(part)
                outputs[which] = part.outputs[0]
                if plus is not None or part.kernel != "add_fwd" or first.kernel not in SHARES:
                    break
                plus = updates[which].base
        if len(parts) > 1:
            more = tuple(ref for update in updates if update for ref in update.operands)
            self.code[name][i] = group, Fused(first.kernel, (*first.inputs, *more), tuple(outputs), first.attrs, tuple(parts), None, tuple(updates), places=places(first))

    def _take_update(self, name: str, i: int, gradient: Operand, plus: Operand) -> tuple[Instruction, Update] | None:
        """Takes the instruction away that adds ``gradient`` of instruction i, or plus + gradient, to something, if i can end in that."""
        if gradient is None or not self.uses.private(gradient) or self.buffers[gradient.buffer].steps:
            return None
        before: list[Instruction] = []
        for code, j in self._after(name, i):
            instr = code[j][1]
            if gradient in instr.inputs:
                update = self._as_update(instr, gradient, plus)
                read_whole = self._place(instr.outputs[0]) in {self._place(ref) for ref in self.code[name][i][1].reads()}  # by other programs, too
                if update is None or read_whole or not self._may_run_before(instr, before, gradient):
                    break
                del code[j]
                return instr, update
            before.append(instr)
        return None

    def _after(self, name: str, i: int) -> Iterator[tuple[list[tuple[int, Instruction]], int]]:
        """The places behind instruction i: of its segment, and of those that follow it at each step."""
        yield from ((self.code[name], j) for j in range(i + 1, len(self.code[name])))
        phases = [phase for phase in self.plan.schedule if name in phase.segments]
        if len(phases) == 1:
            segments = phases[0].segments
            for other in segments[segments.index(name) + 1 :]:
                if sum(phase.segments.count(other) for phase in self.plan.schedule) > 1:
                    return
                yield from ((self.code[other], j) for j in range(len(self.code[other])))

    def _as_update(self, instr: Instruction, gradient: Ref, plus: Operand) -> Update | None:
        """If the instruction adds the gradient to something, with a scalar factor."""
        if instr.kernel == "sgd_fwd":
            base, g, scale, sign = *instr.inputs, -1.0
        elif instr.kernel == "axpy_fwd":
            base, g, scale, sign = *instr.inputs, instr.attrs["sign"]
        elif instr.kernel == "add_fwd":
            base, g, scale, sign = *(instr.inputs if instr.inputs[1] == gradient else instr.inputs[::-1]), None, 1.0
        else:
            return None
        each = scale is not None and self.buffers[scale.buffer].numel > 1
        alike = base not in (None, gradient) and self._whole(base) == self._whole(gradient) == self._whole(instr.outputs[0])
        return Update(base, scale, sign, plus) if g == gradient and alike and not each else None

    def _whole(self, ref: Operand) -> tuple[Any, ...] | None:
        buffer: Buffer | None = ref and self.buffers[ref.buffer]
        return buffer and (buffer.shape, buffer.rows)
