"""Where buffers live, and how many bytes a Plan needs: known before it runs.

Homes left open by the sweep follow from use: one group -> block, one segment -> scratch, more -> run; what a Plan with two entries carries from its
forward to its reverse half is kept for every task. Scratch and block buffers share one arena, laid out by lifetime.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from fastmaml.plan.instructions import Buffer, Phase, Plan, Segment


def assign_homes(
    buffers: Mapping[str, Buffer], segments: Mapping[str, Segment], schedule: Iterable[Phase], results: Iterable[str]
) -> dict[str, Buffer]:
    scope = {name: phase.scope for phase in schedule for name in phase.segments}
    half = {name: phase.half for phase in schedule for name in phase.segments}
    used: dict[str, set[tuple[str, int]]] = {name: set() for name in buffers}
    made_once, together = set(), set()
    for name, segment in segments.items():
        for g, group in enumerate(segment.groups):
            for instr in group.instructions:
                for ref in (*instr.reads(), *instr.writes()):
                    used[ref.buffer].add((name, g))
                if scope[name] == "meta":
                    made_once.update(ref.buffer for ref in instr.writes())
                if scope[name] == "batch":
                    made_once.update(ref.buffer for ref in instr.writes() if not buffers[ref.buffer].rows)
                    together.update(ref.buffer for ref in (*instr.reads(), *instr.writes()) if buffers[ref.buffer].rows)
    kept = set(results)
    out = {}
    for name, buffer in buffers.items():
        places = used[name]
        home = buffer.home
        if name in made_once:
            home = "meta"
        if not home:
            whole = len({segment for segment, _ in places}) == 1
            home = "block" if len(places) == 1 and buffer.rows else "scratch" if whole else "run"
        if home in ("run", "scratch", "block") and (name in together or name in kept or len({half[segment] for segment, _ in places}) > 1):
            home = "task"
        out[name] = replace(buffer, home=home)
    return out


def arena_layout(plan: Plan, bytes_of: Callable[[Buffer], int], align: int = 64) -> tuple[dict[str, int], int]:
    """Byte offsets of the scratch and block buffers in one arena, by lifetime: (offsets, size).

    The segments run one after another, so each starts from an empty arena. First fit, longest-lived first within a segment."""
    offsets: dict[str, int] = {}
    size = 0
    for segment in plan.segments.values():
        span: dict[str, tuple[int, int]] = {}
        for g, group in enumerate(segment.groups):  # a whole group is one moment: its blocks run through all its instructions
            for instr in group.instructions:
                for ref in (*instr.reads(), *instr.writes()):
                    if plan.buffers[ref.buffer].home in ("scratch", "block"):
                        first, _ = span.get(ref.buffer, (g, g))
                        span[ref.buffer] = (first, g)
        placed: list[tuple[int, int, int, int]] = []  # offset, end, first, last
        for name, (first, last) in sorted(span.items(), key=lambda item: item[1][0] - item[1][1]):
            need = -(-bytes_of(plan.buffers[name]) // align) * align
            offset = 0
            for other, end, f, e in sorted(placed):
                if first <= e and f <= last and offset + need > other and end > offset:
                    offset = end
            offsets[name] = offset
            placed.append((offset, offset + need, first, last))
            size = max(size, offset + need)
    return offsets, size


def plan_bytes(plan: Plan, rows: Mapping[str, int], tasks: int, in_flight: int, itemsize: int = 4) -> dict[str, int]:
    """Bytes by home for ``tasks`` tasks of which ``in_flight`` run at once; ``rows`` gives the largest extent of each kind.

    "task" counts what the Plan keeps, not the caller's own data."""

    def bytes_of(buffer: Buffer) -> int:
        size = {"mask": 1, "index": 4, "label": 8, "handle": 0}.get(buffer.kind, itemsize)
        stored = buffer.steps - 1 if buffer.first else max(buffer.steps, 1)
        width = rows[buffer.columns] if buffer.columns else buffer.numel
        return width * (rows[buffer.rows] if buffer.rows else 1) * stored * size

    total = dict.fromkeys(("meta", "task", "run", "scratch"), 0)
    for name, buffer in plan.buffers.items():
        if name not in plan.inputs and buffer.home in total and buffer.home != "scratch":
            copies = {"meta": 1, "task": tasks, "run": in_flight}[buffer.home]
            total[buffer.home] += copies * bytes_of(buffer)
    total["scratch"] = in_flight * arena_layout(plan, bytes_of)[1]
    return total
