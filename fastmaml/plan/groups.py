"""Cutting a segment into groups: what may run block by block over the samples.

A group holds instructions over the same rows, none of which reads a reduction (BN sums, a weight gradient, a loss) that another of the same group
has not finished. Instructions without rows (updates, sums of cotangents) form groups of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fastmaml.plan.instructions import Buffer, Group, Instruction

# They read other rows than they write, or all rows of an array at once
WHOLE = {
    *("join_rows_fwd", "query_rows_fwd", "query_rows_bwd", "sgd_bwd_rate"),
    *("gram_fwd", "factored_linear_fwd", "factored_linear_bwd", "factored_linear_bwd_jvp"),
}


def rows_of(instr: Instruction, buffers: Mapping[str, Buffer]) -> str | None:
    """The extent that an instruction walks; None if it has no rows, or changes them (then it runs whole)."""
    extents = {buffers[ref.buffer].rows for ref in (*instr.reads(), *instr.writes())} - {None}
    whole = instr.kernel in WHOLE or instr.kernel.startswith("module")
    return extents.pop() if len(extents) == 1 and not whole else None


def make_groups(instructions: Iterable[Instruction], buffers: Mapping[str, Buffer]) -> tuple[Group, ...]:
    groups: list[tuple[str | None, list[Instruction]]] = []
    unfinished: set[str] = set()
    for instr in instructions:
        rows = rows_of(instr, buffers)
        same = bool(groups) and groups[-1][0] == rows
        if not same or any(ref.buffer in unfinished for ref in instr.reads()):
            groups.append((rows, []))
            unfinished = set()
        groups[-1][1].append(instr)
        if rows is not None:
            unfinished.update(ref.buffer for ref in instr.writes() if buffers[ref.buffer].rows is None)
    return tuple(Group(tuple(members), rows) for rows, members in groups)
