"""The Plan as pure data: buffers, instructions, groups, segments, schedule. No torch, no numbers that depend on the batch.

Everything an executor needs is here and nothing of meta-learning is: it walks the schedule, and for each instruction looks up the
kernel ``<op>_<mode>`` in its table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

HOMES = ("meta", "task", "run", "scratch", "block")
EXTENTS = ("support", "query", "joint")  # joint: the support rows, then the query rows
KINDS = ("real", "mask", "index", "label", "handle")  # handle: an object of the executor's own (the opaque module's graph)


@dataclass(frozen=True)
class Buffer:
    """A named array.

    home      meta: one copy | task: one per task, kept | run: one per task in flight | scratch: one segment long | block: one group long
    rows      the extent of its leading sample axis, or None
    shape     of one row if ``rows``, else of the whole buffer
    columns   the extent of the row itself, for a Gram matrix [rows, columns]; None: the row has ``shape``
    steps     slots on its step axis (0: it has none); slot 0 is ``first`` where that is given (theta_0 is the leaf itself)
    """

    name: str
    shape: tuple[int, ...] = ()
    rows: str | None = None
    kind: str = "real"
    home: str = ""  # filled by memory.assign_homes where the sweep leaves it open
    steps: int = 0
    first: str | None = None
    columns: str | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Ref:
    """A use of a buffer; where the buffer has a step axis, its slot is the schedule's step + ``shift``."""

    buffer: str
    shift: int = 0

    def __str__(self) -> str:
        return self.buffer if self.shift == 0 else f"{self.buffer}[k{self.shift:+d}]"


Operand = Ref | None


@dataclass(frozen=True)
class Instruction:
    """``outputs = kernel(inputs)``. An absent optional operand is None: a tangent that is zero, a bias that is not there."""

    kernel: str
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    attrs: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def reads(self) -> Iterator[Ref]:
        return (ref for ref in self.inputs if ref is not None)

    def writes(self) -> Iterator[Ref]:
        return (ref for ref in self.outputs if ref is not None)

    def __str__(self) -> str:
        def show(refs: tuple[Operand, ...]) -> str:
            return ", ".join("-" if ref is None else str(ref) for ref in refs)

        attrs = "".join(f" {k}={v}" for k, v in self.attrs.items() if not callable(v))
        return f"{show(self.outputs)} = {self.kernel}({show(self.inputs)}){attrs}"


@dataclass(frozen=True)
class Group:
    """Instructions that may run one after another for one block of samples before the next block begins."""

    instructions: tuple[Instruction, ...]
    rows: str | None  # the extent that is cut into blocks


@dataclass(frozen=True)
class Segment:
    name: str
    groups: tuple[Group, ...]

    @property
    def instructions(self) -> tuple[Instruction, ...]:
        return tuple(instr for group in self.groups for instr in group.instructions)


@dataclass(frozen=True)
class Phase:
    """Runs ``segments`` at each step of range(start, stop, stride); scope "meta": once per meta-iteration, "task": for each task,
    "batch": once over the rows of all tasks together, where a sum over rows is the sum over tasks, each with its weight."""

    segments: tuple[str, ...]
    scope: str = "task"
    start: int = 0
    stop: int = 1
    stride: int = 1
    half: int = 0  # 1: belongs to the reverse half of a Plan with two entries

    def steps(self) -> range:
        return range(self.start, self.stop, self.stride)


@dataclass(frozen=True)
class Reduction:
    """target (home meta) = sum over tasks, in batch order, of task_weight * source."""

    source: Ref
    target: str


@dataclass(frozen=True)
class Plan:
    """A whole meta-iteration, or a part of one (parts.py). ``results``: public names (loss.query, grad.<leaf>, adapted.<leaf> ...) of buffers."""

    name: str
    steps: int
    buffers: Mapping[str, Buffer]
    segments: Mapping[str, Segment]
    schedule: tuple[Phase, ...]
    reductions: tuple[Reduction, ...]
    results: tuple[str, ...]
    inputs: tuple[str, ...]  # buffers the caller fills: leaves, rates, task data
    entries: int = 1  # 2: a forward half and a reverse half (outer_loss=)
    late: tuple[str, ...] = ()  # the inputs that come with the reverse half

    def instructions(self) -> Iterator[tuple[str, Instruction]]:
        for segment in self.segments.values():
            for instr in segment.instructions:
                yield segment.name, instr

    def count(self, kernel: str = "") -> int:
        """How many instructions have a kernel of this name, or starting with it (all by default)."""
        return sum(instr.kernel.startswith(kernel) for _, instr in self.instructions())
