"""A Plan in words: its segments, groups and instructions with FLOPs, bytes and homes, its memory, its least time.

    print(fastmaml.plan.explain.explain(maml.plan(tasks), tasks, **fastmaml.machine.peaks()))

How FLOPs and bytes are counted: ``costs.py``.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping
from typing import Any

from fastmaml.plan.costs import ITEM_BYTES, SUM, Cost, compulsory_bytes, costs, counters
from fastmaml.plan.instructions import Buffer, Group, Instruction, Phase, Plan, Ref
from fastmaml.plan.memory import plan_bytes

__all__ = ["Cost", "costs", "explain"]

WIDTH, NAME, SHAPES = 100, 26, 47  # of the page, of the columns of kernels and of shapes
SHORT = {"scratch": "scr", "block": "blk"}


def explain(
    plan: Plan,
    batch: Any,
    peak_gflops: float | None = None,
    bandwidth: float | None = None,
    in_flight: int = 1,
    itemsize: int = 4,
    laid_out: Mapping[str, int] | None = None,
) -> str:
    """A table for the terminal. ``batch``: a TaskBatch, of which the sizes are read.

    peak_gflops, bandwidth   of the machine, in GFLOP/s and GB/s, for the floor time; None: unknown
    in_flight                how many tasks run at once (the cpu executor: threads; the torch executor: all)
    itemsize                 bytes of a real number
    laid_out                 bytes by purpose that the executor lays out, padding and partial sums included
    """
    rows = costs(plan, batch, itemsize)
    total = {name: sum(getattr(row, name) for row in rows) for name in ("flops", "products", "bytes", "block_bytes")}
    lines = [*_head(plan, batch), "", _row("", "operands -> results", "FLOP", "bytes", "home")]
    lines += _segments(plan, batch, rows, itemsize)
    lines += [_total(f"{r.segment} of {r.instructions} arrays", [r]) + " meta" for r in rows if r.segment == SUM]
    lines.append(_row("total", "", _si(total["flops"]), _si(total["bytes"], "B")))
    unknown = sorted({kernel for row in rows for kernel in row.uncounted})
    if unknown:
        lines.append(f"Not counted: {', '.join(unknown)}")
        lines.append("  (module_*: a whole module under torch's autograd; the FLOPs above are a lower bound)")
    lines += ["", *_memory(plan, batch, in_flight, itemsize)]
    if laid_out:
        parts = "; ".join(f"{words} {_si(size, 'B')}" for words, size in laid_out.items())
        lines += [f"  {'laid out':<29} {_si(sum(laid_out.values()), 'B'):>7}  by the executor", f"           ({parts})"]
    lines += ["", *_floor(total, sum(compulsory_bytes(plan, batch, itemsize)), peak_gflops, bandwidth, bool(unknown))]
    return "\n".join(lines)


# -- the table ---------------------------------------------------------------------------------------------------------


def _head(plan: Plan, batch: Any) -> list[str]:
    def sizes(values: tuple[int, ...]) -> str:
        return str(min(values)) if min(values) == max(values) else f"{min(values)}..{max(values)}"

    tasks = _count(len(batch.support_sizes), "task")
    rows = f"{sizes(batch.support_sizes)} support and {sizes(batch.query_sizes)} query rows"
    groups = _count(sum(len(segment.groups) for segment in plan.segments.values()), "group")
    return [
        f"Plan {plan.name!r}: {tasks} of {rows}, {_count(plan.steps, 'inner step')}",
        f"{_count(plan.count(), 'instruction')} in {groups}; FLOPs and bytes of all tasks and steps",
        "n: rows of a task; home: where results live (see memory below), /k: one slot for each step",
    ]


def _segments(plan: Plan, batch: Any, rows: list[Cost], itemsize: int) -> Iterable[str]:
    table, seen = counters(plan, batch, itemsize), set()
    for phase in plan.schedule:
        yield from ("", f"{_when(plan, phase)}{' (reverse half)' if phase.half else ''}:")
        for name in phase.segments:
            own, (times, counter) = [row for row in rows if row.segment == name], table[name]
            title = f"{name} x {times}" if times > 1 else name
            if name in seen:
                yield f"{title}: counted above"
                continue
            seen.add(name)
            yield _total(title, own)
            for row, group in zip(own, plan.segments[name].groups, strict=True):
                over = f"blocks of {row.rows} rows" if row.rows else "whole arrays"
                yield _total(f" group {row.group + 1}, {over}", [row])
                for (kernel, shapes, homes, _), alike in _alike(plan, group).items():
                    counted = counter.flops(alike[0])
                    flops = "?" if counted is None else _si(times * len(alike) * sum(counted))
                    moved = times * sum(counter.bytes(instr) for instr in alike)
                    many = f" x {len(alike)}" if len(alike) > 1 else ""
                    yield _row(f"  {kernel}{many}", shapes, flops, _si(moved, "B"), homes)


def _when(plan: Plan, phase: Phase) -> str:
    if phase.scope != "task":
        return "once" if phase.scope == "meta" else "all tasks together"
    refs = (ref for s in phase.segments for i in plan.segments[s].instructions for ref in (*i.reads(), *i.writes()))
    if not any(plan.buffers[ref.buffer].steps for ref in refs):
        return "each task, once"
    steps = phase.steps()
    return f"each task, k = {steps[0]}" + (f" .. {steps[-1]}" if len(steps) > 1 else "")


def _alike(plan: Plan, group: Group) -> dict[tuple[str, str, str, int], list[Instruction]]:
    """Instructions by what their line says; only those over whole arrays are joined, the others keep their order."""
    out: dict[tuple[str, str, str, int], list[Instruction]] = {}
    for i, instr in enumerate(group.instructions):
        buffers = [plan.buffers[ref.buffer] for ref in instr.writes()]
        slots = {b.home for b in buffers if b.steps}
        homes = dict.fromkeys(SHORT.get(b.home, b.home) + ("/k" if b.home in slots else "") for b in buffers)
        key = (instr.kernel, _shapes(plan, instr, SHAPES - max(len(instr.kernel) + 2 - NAME, 0)), ",".join(homes), i if group.rows else -1)
        out.setdefault(key, []).append(instr)
    return out


def _shapes(plan: Plan, instr: Instruction, room: int) -> str:
    """Shapes of the operands -> of the results, equal ones counted; vectors give way where the line gets too long."""

    def show(refs: Iterable[Ref], brief: bool) -> str:
        buffers = [plan.buffers[ref.buffer] for ref in refs]
        kept = [b for b in buffers if not (brief and len(b.shape) == 1 and not b.rows)]
        shapes = collections.Counter(_shape(b) for b in kept)
        words = [shape if times == 1 else f"{shape}x{times}" for shape, times in shapes.items()]
        return " ".join(words if len(kept) == len(buffers) else [*words, ".."])

    for brief in (False, True):
        text = f"{show(instr.reads(), brief)} -> {show(instr.writes(), brief)}".strip()
        if len(text) <= room:
            return text
    return text[: room - 3] + "..."


def _shape(buffer: Buffer) -> str:
    rows = ["n" for extent in (buffer.rows, buffer.columns) if extent]  # two: a Gram matrix
    return f"[{','.join([*rows, *map(str, buffer.shape)])}]"


def _total(what: str, rows: list[Cost]) -> str:
    return _row(what, "", _si(sum(row.flops for row in rows)), _si(sum(row.bytes for row in rows), "B"))


def _row(what: str, shapes: str, flops: str, size: str, home: str = "") -> str:
    left = f"{what:<{NAME}} {shapes}" if shapes else what
    return f"{left:<{NAME + 1 + SHAPES}} {flops:>6} {size:>7} {home}".rstrip()


# -- memory and time ---------------------------------------------------------------------------------------------------


def _memory(plan: Plan, batch: Any, in_flight: int, itemsize: int) -> list[str]:
    tasks = len(batch.support_sizes)
    in_flight = min(in_flight, tasks)
    support, query = max(batch.support_sizes), max(batch.query_sizes)
    rows = {"support": support, "query": query, "joint": support + query}
    total = plan_bytes(plan, rows, tasks, in_flight, itemsize)
    running = in_flight, f"{_count(in_flight, 'task')} in flight"
    kept = {"meta": (1, "one copy"), "task": (tasks, f"kept for {_count(tasks, 'task')}")}
    lines = ["memory"]
    for home, (copies, words) in {**kept, "run": running, "scratch": running}.items():
        line = f"  {home:<8} {words:<20} {_si(total[home], 'B'):>7}  "
        lines.append((line + _largest(plan, home, copies, rows, itemsize, WIDTH - len(line))).rstrip())
    given = _si(compulsory_bytes(plan, batch, itemsize)[0], "B")
    whole = _si(sum(total.values()), "B")
    return [*lines, f"  {'total':<29} {whole:>7}  beside the caller's data and parameters: {given}"]


def _largest(plan: Plan, home: str, copies: int, rows: Mapping[str, int], itemsize: int, room: int) -> str:
    """The largest buffers of a home, as many as there is room for."""
    if home == "scratch":
        return "one arena for scratch (scr) and block (blk) buffers"
    own = [(copies * stored_bytes(b, rows, itemsize), b) for b in plan.buffers.values() if b.home == home]
    own = sorted(((size, b) for size, b in own if b.name not in plan.inputs), key=lambda pair: -pair[0])
    out = ""
    for size, buffer in own:
        slots = f" ({_count(buffer.steps - bool(buffer.first), 'step')})" if buffer.steps else ""
        word = f"{', ' if out else ''}{buffer.name} {_si(size, 'B')}{slots}"
        if len(out) + len(word) > room - 5:
            return out + ", ..." if out else ""
        out += word
    return out


def stored_bytes(buffer: Buffer, rows: Mapping[str, int], itemsize: int = 4) -> int:
    """Bytes of one copy of a buffer with all its steps (slot 0 that is the leaf itself is not stored)."""
    slots = buffer.steps - 1 if buffer.first else max(buffer.steps, 1)
    width = rows[buffer.columns] if buffer.columns else buffer.numel
    return width * (rows[buffer.rows] if buffer.rows else 1) * slots * ITEM_BYTES.get(buffer.kind, itemsize)


def _floor(
    total: Mapping[str, int], compulsory: int, peak: float | None, bandwidth: float | None, partial: bool
) -> list[str]:
    if not peak and not bandwidth:
        return ["floor: no peaks of the machine were given (fastmaml.machine.peaks() measures them)"]
    lines, least = ["floor"], 0.0
    if peak:
        compute = total["flops"] / peak * 1e-9
        share = f"{total['products'] / max(total['flops'], 1):.0%} of them in products"
        lines.append(f"  compute  {_si(total['flops'])}FLOP at {peak:.0f} GFLOP/s: {_time(compute)} ({share})")
        least = compute
    if bandwidth:
        memory, all_of_it = compulsory / bandwidth * 1e-9, total["bytes"] / bandwidth * 1e-9
        what = f"{_si(compulsory, 'B')} of data, parameters and results"
        block = f"{total['block_bytes'] / max(total['bytes'], 1):.0%} of those bytes live one block long"
        lines.append(f"  memory   {what} at {bandwidth:.1f} GB/s: {_time(memory)}")
        lines.append(f"           ({_time(all_of_it)} if every operand went to memory; {block})")
        least = max(least, memory)
    return [*lines, f"  at least {_time(least)}{', without what is not counted' if partial else ''}"]


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _si(value: float, unit: str = "") -> str:
    for prefix, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.0f} {unit}".strip()


def _time(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= 0.9995 * factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
