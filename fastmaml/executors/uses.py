"""Who uses the buffers of a Plan: what an executor asks before it fuses two instructions."""

from __future__ import annotations

from collections import Counter

from fastmaml.plan.instructions import Plan, Ref


class Uses:
    """readers, writers: of each buffer, how many instructions. kept: what is asked for from outside, or as the first slot of another."""

    def __init__(self, plan: Plan) -> None:
        self.readers = Counter(ref.buffer for _, instr in plan.instructions() for ref in set(instr.reads()))
        self.writers = Counter(ref.buffer for _, instr in plan.instructions() for ref in set(instr.writes()))
        self.kept = {*plan.results, *plan.inputs, *(r.source.buffer for r in plan.reductions)}
        self.kept |= {buffer.first for buffer in plan.buffers.values() if buffer.first}

    def private(self, ref: Ref) -> bool:
        """Written once, read once: nobody misses it."""
        return self.readers[ref.buffer] == 1 and self.writers[ref.buffer] == 1 and ref.buffer not in self.kept
