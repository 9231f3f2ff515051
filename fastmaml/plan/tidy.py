"""Lists of instructions made tidy: without what nobody reads, and in an order in which everything is written before it is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from fastmaml.plan.instructions import Buffer, Instruction, Reduction, Ref, Segment


def live(
    segments: Mapping[str, list[Instruction]], results: Iterable[str], reductions: Iterable[Reduction]
) -> dict[str, list[Instruction]]:
    """Without the instructions, and the outputs of instructions, that nobody reads."""
    needed = set(results) | {r.source.buffer for r in reductions}
    everything = [instr for instructions in segments.values() for instr in instructions]
    grew, alive = True, set()
    while grew:
        grew = False
        for i, instr in reversed(list(enumerate(everything))):
            if i not in alive and any(ref.buffer in needed for ref in instr.writes()):
                alive.add(i)
                needed.update(ref.buffer for ref in instr.reads())
                grew = True
    kept = {id(everything[i]) for i in alive}

    def trim(instr: Instruction) -> Instruction:
        outputs = tuple(ref if ref is not None and ref.buffer in needed else None for ref in instr.outputs)
        return instr if outputs == instr.outputs else Instruction(instr.kernel, instr.inputs, outputs, instr.attrs)

    return {name: [trim(i) for i in instructions if id(i) in kept] for name, instructions in segments.items()}


def unkept(buffers: Mapping[str, Buffer], segments: Mapping[str, Segment], results: Iterable[str]) -> dict[str, Buffer]:
    """What the gradient pass kept for the way back, and nobody reads there, has no steps after all."""
    elsewhere = {ref.buffer for s in segments.values() if s.name != "gradient" for i in s.instructions for ref in (*i.reads(), *i.writes())}
    elsewhere |= set(results)
    made = {ref.buffer for i in segments["gradient"].instructions for ref in i.writes()} - elsewhere if "gradient" in segments else set()
    return {n: replace(b, steps=0, home="") if n in made and b.home == "run" and b.steps else b for n, b in buffers.items()}


def order(instructions: list[Instruction]) -> list[Instruction]:
    """Moves an instruction behind the ones whose outputs it reads (a module's jvp reads the loss's gradient), otherwise keeping the order.

    Buffers that are updated in place (an output that is also an input) are left where they stand."""
    writer: dict[Ref, int] = {}
    for i, instr in enumerate(instructions):
        for ref in instr.writes():
            if ref not in instr.inputs:
                writer[ref] = i
    done: set[int] = set()
    out: list[Instruction] = []

    def visit(i: int) -> None:
        if i in done:
            return
        done.add(i)
        for ref in instructions[i].reads():
            if ref in writer:
                visit(writer[ref])
        out.append(instructions[i])

    for i in range(len(instructions)):
        visit(i)
    return out
