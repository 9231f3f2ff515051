"""Cutting a segment into groups: what may run block by block over the samples.

A group holds instructions over the same rows, none of which reads a reduction (BN sums, a weight gradient, a loss) that another of the same group
has not finished. Instructions without rows (updates, sums of cotangents) form groups of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fastmaml.plan.instructions import Buffer, Group, Instruction

# They read other rows than they write, or all rows of an array at once
WHOLE = {
    *("join_rows_fwd", "support_rows_fwd", "query_rows_fwd", "query_rows_bwd", "sgd_bwd_rate"),
    *("patch_moments_fwd", "gram_fwd", "factored_linear_fwd", "factored_linear_bwd", "factored_linear_bwd_jvp"),
}


def rows_of(instr: Instruction, buffers: Mapping[str, Buffer]) -> str | None:
    """The extent that an instruction walks; None if it has no rows, or changes them (then it runs whole)."""
    extents = {buffers[ref.buffer].rows for ref in (*instr.reads(), *instr.writes())} - {None}
    whole = instr.kernel in WHOLE or instr.kernel.startswith("module")
    return extents.pop() if len(extents) == 1 and not whole else None


class _Open:
    """A group that is being filled."""

    def __init__(self, rows: str | None) -> None:
        self.rows = rows
        self.members: list[Instruction] = []
        self.unfinished: set[str] = set()  # reductions, finished when the group is
        self.touched: set[str] = set()
        self.written: set[str] = set()

    def takes(self, instr: Instruction, rows: str | None) -> bool:
        return self.rows == rows and not any(ref.buffer in self.unfinished for ref in instr.reads())

    def is_free_of(self, instr: Instruction) -> bool:
        """Whether ``instr`` may as well run before this group."""
        reads, writes = ({ref.buffer for ref in refs} for refs in (instr.reads(), instr.writes()))
        return not (reads & self.written or writes & self.touched)

    def add(self, instr: Instruction, buffers: Mapping[str, Buffer]) -> None:
        self.members.append(instr)
        writes = {ref.buffer for ref in instr.writes()}
        self.written |= writes
        self.touched |= writes | {ref.buffer for ref in instr.reads()}
        if self.rows is not None:
            self.unfinished |= {name for name in writes if buffers[name].rows is None}


def make_groups(instructions: Iterable[Instruction], buffers: Mapping[str, Buffer]) -> tuple[Group, ...]:
    """In the order given, but a reduction over rows joins the group before the last one where it may: what waits for it need not begin another walk
    over the rows."""
    groups: list[_Open] = []
    for instr in instructions:
        rows = rows_of(instr, buffers)
        reduces = rows and any(buffers[ref.buffer].rows is None for ref in instr.writes())
        if reduces and len(groups) > 1 and groups[-2].takes(instr, rows) and groups[-1].is_free_of(instr):
            groups[-2].add(instr, buffers)
            continue
        if not groups or not groups[-1].takes(instr, rows):
            groups.append(_Open(rows))
        groups[-1].add(instr, buffers)
    return tuple(Group(tuple(group.members), group.rows) for group in groups)
