"""Gradients that nobody reads but the sum over tasks: the last weight gradients of a meta-iteration, at its first step or, with first order, of its query.

A product looks itself whether they are finite. Where a launch has more programs than run at once, one of them sums a few tasks in its accumulator, and what a task adds is
never stored: [chunks, numbers] are left to add up. That is right while all tasks are finite. Where one is not, the sum over the others is made again, number by
number (conv2d.weight_numbers), from operands that are kept until then.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from fastmaml.executors.triton.fused import Fused
from fastmaml.executors.triton.rules import products
from fastmaml.executors.triton.site import blocks, pointer
from fastmaml.executors.triton.storage import Bucket, View, channels_last, key_of
from fastmaml.plan.instructions import Instruction, Plan

WEIGHTS = {f"{op}_bwd_weight{jvp}" for op in ("linear", "conv2d") for jvp in ("", "_jvp")}
PROGRAMS = 256  # two for each multiprocessor, which is what their registers leave room for: with more there are tasks to sum
Use = tuple[Instruction, int, bool]  # at a step; whether it is done for each task, and its launches come with those of the sums over tasks


@dataclass
class Sum:
    """Of the gradient in ``source``. ``group``: how many tasks a program sums; with 1 each task's own is stored.

    partial   [chunks, numbers] that are left to add up;   again   what makes them again (conv2d.weight_numbers): both from the rule"""

    source: str
    group: int
    partial: View | None = None
    again: Sequence[int] = ()


def find(plan: Plan, bucket: Bucket, uses: Sequence[Use]) -> dict[tuple[int, int], Sum]:
    """By (id of an instruction, step). ``uses``: all of them, in order."""
    reduced = Counter(reduction.source.buffer for reduction in plan.reductions)
    sources = {name for name, n in reduced.items() if n == 1 and not plan.buffers[name].steps and name not in plan.results}
    touched: set[str] = set()
    written: set[tuple[str, int]] = set()
    found = {}
    for instr, step, each in reversed(uses):
        if sources <= touched:
            break
        reads, writes = ({key_of(plan, ref, step) for ref in refs} for refs in (instr.reads(), instr.writes()))
        dw = instr.outputs[0] if instr.kernel in WEIGHTS and each else None
        if dw is not None and dw.buffer in sources - touched and _rows(plan, bucket, instr) <= products.CHUNK:
            found[id(instr), step] = Sum(dw.buffer, 1 if reads & written else _group(plan, bucket, instr))
        touched |= {name for name, _ in reads | writes}
        written |= writes
    return found


def keeping(plan: Plan, instructions: Iterable[Instruction]) -> Plan:
    """The same, but that nothing else is laid out where operands of these are."""
    names = {ref.buffer for instr in instructions for ref in instr.reads()}
    return replace(plan, buffers={n: replace(b, home="run") if n in names and b.home in ("scratch", "block") else b for n, b in plan.buffers.items()})


def row(x: View, y: View, summed: Sum | None) -> list[int]:
    """Of ``tasks.sum_tasks``."""
    if summed is None or summed.group == 1:
        return [pointer(x), pointer(y), y.numel, x.task, *[0] * 26]
    return [pointer(summed.partial), pointer(y), y.numel, y.numel, summed.partial.data.numel() // y.numel, *summed.again]


def _rows(plan: Plan, bucket: Bucket, instr: Instruction) -> int:
    """Of the product: a task's rows times their pixels, at most."""
    _, dy, *tangents = (ref and plan.buffers[ref.buffer] for ref in _operands(instr))
    dy = dy or tangents[1]
    return bucket.rows(dy.rows) * dy.numel // plan.buffers[instr.outputs[0].buffer].shape[0]


def _group(plan: Plan, bucket: Bucket, instr: Instruction) -> int:
    shapes = [plan.buffers[ref.buffer].shape for ref in _operands(instr) if ref]
    moved = instr.kernel.startswith("linear") and any(channels_last(shape) not in (1, math.prod(shape)) for shape in shapes)  # into a temporary
    signs = [u.sign for u in instr.updates if u] if isinstance(instr, Fused) else []
    if moved or any(sign not in (1.0, -1.0) for sign in signs):
        return 1
    outputs, *inputs = plan.buffers[instr.outputs[0].buffer].shape
    k, n = products.weight_tile(math.prod(inputs), outputs)
    return min(bucket.tasks, max(1, blocks(math.prod(inputs), k) * blocks(outputs, n) * bucket.tasks // PROGRAMS))


def _operands(instr: Instruction) -> tuple:
    """x, dy and, of a tangent, xt, dyt."""
    return instr.parts[0].inputs if isinstance(instr, Fused) else instr.inputs
