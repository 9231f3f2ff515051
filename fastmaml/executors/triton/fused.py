"""Instructions of a Plan as the Triton executor fuses them: what one launch does, and which instructions may be moved to be together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from fastmaml.executors.uses import Uses
from fastmaml.plan.instructions import Group, Instruction, Plan, Ref, Segment


@dataclass(frozen=True)
class Activation:
    """What becomes of a result y: relu(y), and ``makes``: its mask; else y where the stored mask says so. ``slope`` as in leaky_relu. The mask: a Ref, later a View."""

    mask: Any
    makes: bool
    slope: float | None


@dataclass(frozen=True)
class Update:
    """What becomes of a gradient g: base + sign scale (plus + g). Operands: Refs, later Views."""

    base: Any
    scale: Any
    sign: float
    plus: Any = None

    @property
    def operands(self) -> tuple[Any, ...]:
        return tuple(operand for operand in (self.base, self.scale, self.plus) if operand is not None)


@dataclass(frozen=True)
class Sums:
    """What batchnorm sums of a result, in the ``mode`` of the instruction that would. ``counted``: the extent whose rows are summed. Operands: Refs, later Views;
    that of the result is None. The last two outputs of the fused instruction are the sums, or what they are for."""

    mode: str
    operands: tuple[Any, ...]
    counted: str
    eps: float


@dataclass(frozen=True)
class Pool:
    """Where an ``operand`` ("x" or "xt") of a batchnorm comes from: chosen of images, by an index ("gather") or with it ("choose"). ``out``: where it is stored too,
    or None. Refs, later Views."""

    operand: str
    how: str
    images: Any
    index: Any
    out: Any


@dataclass(frozen=True)
class Fused(Instruction):
    """``parts`` in one launch, by the rule of ``kernel``. Its inputs and outputs stand first: so many of them there are ``places`` for. Behind them those of other parts.

    pools   of inputs;  activation, sums: of the first output;  updates: of each output, or None"""

    parts: tuple[Instruction, ...] = ()
    activation: Activation | None = None
    updates: tuple[Update | None, ...] = ()
    sums: Sums | None = None
    pools: tuple[Pool, ...] = ()
    places: tuple[int, int] = (0, 0)


def places(instr: Instruction) -> tuple[int, int]:
    return len(instr.inputs), len(instr.outputs)


def as_fused(instr: Instruction) -> Fused:
    if isinstance(instr, Fused):
        return instr
    return Fused(instr.kernel, instr.inputs, instr.outputs, instr.attrs, (instr,), places=places(instr))


class Moves:
    """``code``: of each segment [group, instruction], in order."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.buffers = plan, plan.buffers
        self.code = {name: [(g, i) for g, group in enumerate(s.groups) for i in group.instructions] for name, s in plan.segments.items()}
        self.uses = Uses(plan)

    def rebuilt(self) -> Plan:
        """The Plan of what is there now, with the buffers that it still uses."""
        segments = {}
        for name, segment in self.plan.segments.items():
            groups = [(group.rows, tuple(instr for g, instr in self.code[name] if g == at)) for at, group in enumerate(segment.groups)]
            segments[name] = Segment(name, tuple(Group(instructions, rows) for rows, instructions in groups if instructions))
        plan = replace(self.plan, segments=segments)
        used = {ref.buffer for _, instr in plan.instructions() for ref in (*instr.reads(), *instr.writes())}
        used |= self.uses.kept | {r.target for r in plan.reductions}
        return replace(plan, buffers={name: buffer for name, buffer in self.buffers.items() if name in used})

    def _place(self, ref: Ref) -> Ref:
        return ref if self.buffers[ref.buffer].steps else Ref(ref.buffer)

    def _may_run_before(self, instr: Instruction, others: Iterable[Instruction], result: Ref | None = None) -> bool:
        """Whether ``instr``, which waits for ``result`` alone, has nothing to do with what the others do. Then it may also run behind them."""
        reads, writes = ({self._place(ref) for ref in refs} for refs in (instr.reads(), instr.writes()))
        reads -= set() if result is None else {self._place(result)}
        for other in others:
            written = {self._place(ref) for ref in other.writes()}
            if (reads | writes) & written or writes & {self._place(ref) for ref in other.reads()}:
                return False
        return True
