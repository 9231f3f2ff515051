"""A Plan and a bucket become lists of launches: the schedule unrolled over its steps, one or a few launches for each instruction.

What triton/fusion.py has put together is an instruction here. Sums of weights that follow one another are one launch, as are those over tasks of all gradients.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch

from fastmaml.executors.triton import last_gradients
from fastmaml.executors.triton.fused import Fused
from fastmaml.executors.triton.rules import RULES
from fastmaml.executors.triton.site import BLOCK, Launch, Site, blocks, pointer
from fastmaml.executors.triton.storage import Arrivals, Bucket, Storage, Temp, View
from fastmaml.kernels import tasks
from fastmaml.plan.instructions import Instruction, Operand, Phase, Plan

# How products are computed, by precision: in HVP passes, whose ReLU masks and maxima are stored, and in all others. Three products in TF32 have the error of
# float32, three in bfloat16 that of 16 bits.
PRODUCTS = {"highest": ("tf32x3", "tf32x3"), "high": ("tf32", "tf32x3"), "medium": ("bf16", "bf16x3")}
SUMS = {"sgd_fwd", "sgd_bwd", "axpy_fwd", "scale_fwd", "copy_fwd", "zero_fwd"}  # all of them axpy


class Lowering:
    """The launches of ``plan`` for batches of a bucket, and the storage that they work on. On the device "meta" nothing can run.

    halves   of each entry of the Plan, its launches
    written  by each half, the (buffer, slot) that it fills
    """

    def __init__(self, plan: Plan, bucket: Bucket, device: torch.device | str, precision: str = "high") -> None:
        self.bucket, self.precision = bucket, precision
        self.sums = last_gradients.find(plan, bucket, list(_uses(plan)))
        self.plan = plan = last_gradients.keeping(plan, [instr for instr, step, _ in _uses(plan) if (id(instr), step) in self.sums and self.sums[id(instr), step].group > 1])
        self.storage = Storage(plan, bucket, device, _shares(plan))
        self.site = Site(self.storage)
        self.halves, self.written, done = [], [], {}
        for half in range(plan.entries):
            before = set(done)
            self._half(half, done)
            self.halves.append(self.site.launches)
            self.written.append(tuple(key for key in done if key not in before))
            self.site.launches = []
        self._place([launch for half in self.halves for launch in half])

    @property
    def bytes(self) -> dict[str, int]:
        """By the home of what lies there."""
        return self.storage.bytes | {"sums of chunks": self.site.temp_bytes + 4 * self.site.arrivals}

    def _half(self, half: int, done: dict[tuple[str, int], None]) -> None:
        if half:
            done.update(((name, slot), None) for name in self.plan.late for slot in range(max(self.plan.buffers[name].steps, 1)))
        before, behind = _phases(self.plan, half)
        for i, phase in enumerate(before):
            self._phase(phase, done, shared=phase.scope == "batch" and any(p.scope == "task" for p in before[:i]))
        self._finite(done)
        if half == self.plan.entries - 1:
            self._sums(done)
            for phase in behind:
                self._phase(phase, done, shared=False)

    def _phase(self, phase: Phase, done: dict[tuple[str, int], None], shared: bool) -> None:
        self.site.tasks = 1 if phase.scope == "meta" else self.bucket.tasks
        for step in phase.steps():
            for name in phase.segments:
                self.site.precision = PRODUCTS[self.precision][name != "hvp"]
                for instructions in self._together(self.plan.segments[name].instructions, step):
                    with self.site.together() if len(instructions) > 1 else contextlib.nullcontext():
                        for instr in instructions:
                            self._instruction(instr, step, done, shared)
        self.site.tasks = self.bucket.tasks

    def _together(self, instructions: Iterable[Instruction], step: int) -> Iterator[list[Instruction]]:
        """The same in order; sums of weights that follow one another, and have nothing to do with each other, at once."""
        found: list[Instruction] = []
        read: set[tuple[str, int]] = set()
        written: set[tuple[str, int]] = set()
        for instr in instructions:
            reads, writes = ({self.storage.key(ref, step) for ref in refs} for refs in (instr.reads(), instr.writes()))
            sums = instr.kernel in SUMS and not any(self.plan.buffers[name].rows for name, _ in reads | writes)
            if found and not (sums and found[-1].kernel in SUMS and not (writes & (read | written) or reads & written)):
                yield found
                found, read, written = [], set(), set()
            found.append(instr)
            read |= reads
            written |= writes
        if found:
            yield found

    def _instruction(self, instr: Instruction, step: int, done: dict[tuple[str, int], None], shared: bool) -> None:
        keys = [None if ref is None else self.storage.key(ref, step) for ref in instr.outputs]
        inputs = [None if ref is None else self.storage.view(*self.storage.key(ref, step)) for ref in instr.inputs]
        outputs = [None if key is None else self._share(key[0]) if shared and key[0] in self.storage.shares else self.storage.view(*key) for key in keys]
        self.site.begin()
        attrs = instr.attrs
        if isinstance(instr, Fused):
            attrs = {**attrs, **self._epilogue(instr, step), "sum_outputs": outputs[-2:]}
            inputs, outputs = inputs[: instr.places[0]], outputs[: instr.places[1]]
        if (id(instr), step) in self.sums:
            attrs = {**attrs, "summed": self.sums[id(instr), step]}
        if any(key is not None for key in keys):
            RULES[instr.kernel](self.site, attrs, inputs, outputs)
        done.update(dict.fromkeys(key for key in keys if key is not None))

    def _epilogue(self, instr: Fused, step: int) -> dict[str, Any]:
        """What a fused instruction ends in, with Views for Refs."""

        def view(ref: Operand) -> View | None:
            return ref and self.storage.view(*self.storage.key(ref, step))

        activation, sums = instr.activation, instr.sums
        return {
            "pools": tuple(replace(p, images=view(p.images), index=view(p.index), out=view(p.out)) for p in instr.pools),
            "activation": activation and replace(activation, mask=view(activation.mask)),
            "sums": sums and replace(sums, operands=tuple(map(view, sums.operands))),
            "updates": tuple(u and replace(u, base=view(u.base), scale=view(u.scale), plus=view(u.plus)) for u in instr.updates) or (None, None),
        }

    def _share(self, name: str) -> View:
        """What one task adds to a sum over tasks."""
        buffer = self.plan.buffers[name]
        return View(self.storage.shares[name], buffer.shape, None, buffer.numel)

    # ------------------------------------------------------------------------------------------------------- over tasks
    def _finite(self, done: dict[tuple[str, int], None]) -> None:
        """Marks the tasks with a loss, logits, or a part of a gradient that is not finite."""
        names = [n for n in self.plan.results if n.startswith(("loss", "logits"))] + [r.source.buffer for r in self.plan.reductions]
        names = set(names) - {summed.source for summed in self.sums.values()}  # the products look themselves
        views = [self.storage.view(name, slot) for name, slot in done if name in names]
        views += [self._share(name) for name, _ in done if name in self.storage.shares]
        rows = [[pointer(v), self.storage.offsets[v.rows].data_ptr() if v.rows else 0, v.numel, v.task] for v in views]
        programs, args = self.site.arrays(rows, [blocks(v.numel * (self.bucket.rows(v.rows) if v.rows else 1), BLOCK) for v in views])
        if views:
            self.site.launch(tasks.all_finite, (programs, self.bucket.tasks), **args, finite=self.storage.finite, BLOCK=BLOCK)

    def _sums(self, done: dict[tuple[str, int], None]) -> None:
        pairs, sums = [], {summed.source: summed for summed in self.sums.values()}
        for reduction in self.plan.reductions:
            source = self.plan.buffers[reduction.source.buffer]
            for slot in range(max(source.steps, 1)):
                pairs.append((self.storage.view(source.name, slot), self.storage.view(reduction.target, slot), sums.get(source.name)))
                done[reduction.target, slot] = None
        pairs += [(self._share(name), self.storage.view(name, 0), None) for name in self.storage.shares]
        rows = [last_gradients.row(x, y, summed) for x, y, summed in pairs]
        programs, args = self.site.arrays(rows, [blocks(y.numel, 128) for _, y, _ in pairs])
        args |= dict(weights=self.storage.task_weights, finite=self.storage.finite, tasks=self.bucket.tasks, BLOCK=128)
        if pairs:
            self.site.launch(tasks.sum_tasks, (programs,), **args)

    def _place(self, launches: list[Launch]) -> None:
        """Gives temporaries their place: all instructions share one array."""
        room = torch.empty(self.site.temp_bytes, dtype=torch.uint8, device=self.storage.device)
        arrivals = torch.zeros(self.site.arrivals, dtype=torch.int32, device=self.storage.device)  # and zero again behind every launch

        def placed(value: Any) -> Any:
            if isinstance(value, Arrivals):
                return arrivals[: value.numel]
            if not isinstance(value, Temp):
                return value
            return room[value.offset :][: value.numel * value.dtype.itemsize].view(value.dtype)

        for launch in launches:
            launch.arguments = {name: placed(value) for name, value in launch.arguments.items()}


def _phases(plan: Plan, half: int) -> tuple[list[Phase], list[Phase]]:
    """Of a half, in order: what comes before the sums over tasks, and what reads them."""
    phases = [phase for phase in plan.schedule if phase.half == half]
    first = next((i for i, phase in enumerate(phases) if phase.scope == "task"), len(phases))
    after = phases[first:] if half == plan.entries - 1 else []
    before = [*phases[:first], *(p for p in phases[first:] if p.scope == "task"), *(p for p in after if p.scope == "batch")]
    return before, [p for p in after if p.scope == "meta"]


def _uses(plan: Plan) -> Iterator[last_gradients.Use]:
    """All instructions in order, with their steps."""
    for half in range(plan.entries):
        for phase in itertools.chain(*_phases(plan, half)):
            each = phase.scope == "task" and half == plan.entries - 1
            yield from ((instr, step, each) for step in phase.steps() for name in phase.segments for instr in plan.segments[name].instructions)


def _shares(plan: Plan) -> dict[str, int]:
    """Sums over the rows of all tasks: made for each task, weighted and summed once it is known which tasks are finite."""
    names = (ref.buffer for p in plan.schedule if p.scope == "batch" for s in p.segments for i in plan.segments[s].instructions for ref in i.writes())
    return {name: plan.buffers[name].numel for name in names if plan.buffers[name].rows is None}
