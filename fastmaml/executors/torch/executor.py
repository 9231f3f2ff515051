"""The ``torch`` executor: any Plan, any dtype, any device. Slow and readable: it walks the schedule for one task after another.

It can replay the discrete decisions (ReLU masks, pooling indices) of another run, which is how a float32 gradient is judged in float64
with equal masks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastmaml.batch import TaskBatch
from fastmaml.executors.call import Call, Results
from fastmaml.executors.torch.kernels import KERNELS
from fastmaml.plan.instructions import Buffer, Instruction, Phase, Plan, Ref
from fastmaml.plan.memory import plan_bytes

Key = tuple[str, int]  # buffer, slot on its step axis


@dataclass
class Task:
    """What kernels know of the task they run for, and its buffers."""

    index: int
    rows: Mapping[str, int]
    ways: int
    env: dict[Key, Any]
    zeros: Callable[[], Tensor] = field(default=lambda: torch.zeros(()))


class TorchExecutor:
    """Runs ``plan``; ``forward`` the first entry, ``reverse`` the second (Plans with two)."""

    name = "torch"

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    @staticmethod
    def why_not(plan: Plan, call: Call) -> str | None:
        return None

    def memory(self, batch: TaskBatch, itemsize: int = 4) -> dict[str, int]:
        """Bytes of the Plan's buffers with all tasks in flight (nothing is ever put in another's place)."""
        support, query = max(batch.support_sizes), max(batch.query_sizes)
        return plan_bytes(self.plan, {"support": support, "query": query, "joint": support + query}, len(batch), len(batch), itemsize)

    @torch.no_grad()
    def forward(self, call: Call) -> Results:
        first = next(iter(call.leaves.values()))
        self.dtype, self.device = first.dtype, first.device
        meta: dict[Key, Any] = {}
        for name, value in {**call.leaves, **call.rates, **call.weights}.items():
            self._fill(meta, name, value)
        tasks = [self._task(call, meta, t) for t in range(len(call.batch))]
        return self._half(call, meta, tasks, half=0)

    @torch.no_grad()
    def reverse(self, state: Any, given: Mapping[str, Tensor]) -> Results:
        call, meta, tasks = state
        for task in tasks:
            for name in self.plan.late:
                task.env.update(self._share(name, given[name], task.index, call.batch))
        return self._half(call, meta, tasks, half=1)

    # ------------------------------------------------------------------------------------------------------- filling in
    def _fill(self, env: dict[Key, Any], name: str, value: Tensor) -> None:
        buffer = self.plan.buffers.get(name)
        if buffer is None or buffer.home == "task":
            return
        value = value.detach()
        for slot in range(max(buffer.steps, 1)):
            env[name, slot] = value[slot] if buffer.steps else value

    def _task(self, call: Call, meta: dict[Key, Any], t: int) -> Task:
        support_x, support_y, query_x, query_y = call.batch.task(t)
        env = dict(meta)
        data = {"x.support": support_x, "y.support": support_y, "x.query": query_x, "y.query": query_y}
        for name, value in data.items():
            if name in self.plan.buffers:
                env[name, 0] = value if self.plan.buffers[name].kind == "label" else value.to(self.dtype)
        for name, value in call.leaves.items():
            if name in self.plan.buffers and self.plan.buffers[name].home == "task":
                env.update(self._share(name, value, t, call.batch))
        rows = {"support": len(support_x), "query": len(query_x), "joint": len(support_x) + len(query_x)}
        ways = 0 if call.batch.ways is None else int(call.batch.ways[t])
        return Task(t, rows, ways, env)

    def _share(self, name: str, value: Tensor, t: int, batch: TaskBatch) -> dict[Key, Tensor]:
        """What one task has of an array of all tasks."""
        buffer = self.plan.buffers[name]
        if buffer.rows:
            offsets = {"support": batch.support_offsets, "query": batch.query_offsets}[buffer.rows]
            own = value[offsets[t] : offsets[t + 1]]
        else:
            own = value[t]
        own = own.detach().to(self.dtype)
        return {(name, slot): own[slot] if buffer.steps else own for slot in range(max(buffer.steps, 1))}

    # ------------------------------------------------------------------------------------------------------- running
    def _half(self, call: Call, meta: dict[Key, Any], tasks: list[Task], half: int) -> Results:
        phases = [phase for phase in self.plan.schedule if phase.half == half]
        task_phases = [phase for phase in phases if phase.scope == "task"]
        first = phases.index(task_phases[0]) if task_phases else len(phases)
        outer = Task(-1, {}, 0, meta)
        for phase in phases[:first]:
            if phase.scope == "meta":
                self._phase(outer, phase, call)
            for task in tasks:
                task.env.update(meta)
            if phase.scope == "batch":
                self._each(tasks, phase, call)
        for task in tasks:
            task.env.update(meta)
            for phase in task_phases:
                self._phase(task, phase, call)
        after = phases[first:] if half == self.plan.entries - 1 else []
        for phase in after:
            if phase.scope == "batch":
                self._each(tasks, phase, call)
        finite = torch.tensor([self._finite(task) for task in tasks])
        if half == self.plan.entries - 1:
            good = [task for task in tasks if finite[task.index]]
            self._reduce(call, meta, good)
            for phase in after:
                if phase.scope == "batch":
                    self._sum(call, outer, good, phase)
                elif phase.scope == "meta":
                    self._phase(outer, phase, call)
        return Results(self._collect(meta, tasks), finite, (call, meta, tasks), self.name, bool(finite.all()))

    def _each(self, tasks: list[Task], phase: Phase, call: Call) -> None:
        """A phase of scope "batch", task by task; sums over rows are each task's own share."""
        for task in tasks:
            self._phase(task, phase, call)

    def _sum(self, call: Call, outer: Task, tasks: list[Task], phase: Phase) -> None:
        """The weighted sums over the tasks of what a "batch" phase sums over rows."""
        for name in self._summed(phase):
            zero = self._zeros(outer, self.plan.buffers[name])
            outer.env[name, 0] = sum((call.task_weight(t.index) * t.env[name, 0] for t in tasks), zero)

    def _summed(self, phase: Phase) -> list[str]:
        writes = (ref.buffer for s in phase.segments for i in self.plan.segments[s].instructions for ref in i.writes())
        return [name for name in writes if self.plan.buffers[name].rows is None]

    def _phase(self, task: Task, phase: Phase, call: Call) -> None:
        for step in phase.steps():
            for name in phase.segments:
                for instr in self.plan.segments[name].instructions:
                    self._run(task, instr, step, call.replay)

    def _key(self, ref: Ref, step: int) -> Key:
        buffer = self.plan.buffers[ref.buffer]
        if not buffer.steps:
            return ref.buffer, 0
        slot = step + ref.shift
        return (buffer.first, 0) if buffer.first and slot == 0 else (ref.buffer, slot)

    def _run(self, task: Task, instr: Instruction, step: int, replay: Mapping[Key, list[Tensor]]) -> None:
        inputs = [None if ref is None else task.env[self._key(ref, step)] for ref in instr.inputs]
        keys = [None if ref is None else self._key(ref, step) for ref in instr.outputs]
        kernel = instr.kernel
        if replay and len(keys) == 2 and keys[1] in replay:  # the discrete decision is given
            task.env[keys[1]] = decided = replay[keys[1]][task.index].to(self.device)
            kernel, inputs, keys = kernel.replace("_fwd", "_replay"), [*inputs, decided], keys[:1]
        if kernel == "zero_fwd":
            task.zeros = lambda buffer=self.plan.buffers[instr.outputs[0].buffer]: self._zeros(task, buffer)
        outputs = KERNELS[kernel](task, instr.attrs, *inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        for key, value in zip(keys, outputs, strict=False):
            if key is not None:
                task.env[key] = value

    def _zeros(self, task: Task, buffer: Buffer) -> Tensor:
        rows = () if buffer.rows is None else (task.rows[buffer.rows],)
        return torch.zeros((*rows, *buffer.shape), dtype=self.dtype, device=self.device)

    # ------------------------------------------------------------------------------------------------------- results
    def _finite(self, task: Task) -> bool:
        names = [n for n in self.plan.results if n.startswith(("loss", "logits"))] + [r.source.buffer for r in self.plan.reductions]
        names += [n for phase in self.plan.schedule if phase.scope == "batch" for n in self._summed(phase)]
        keys = [(n, slot) for n in names for slot in range(max(self.plan.buffers[n].steps, 1))]
        return all(bool(torch.isfinite(task.env[key]).all()) for key in keys if key in task.env)

    def _reduce(self, call: Call, meta: dict[Key, Any], tasks: list[Task]) -> None:
        for reduction in self.plan.reductions:
            buffer = self.plan.buffers[reduction.source.buffer]
            for slot in range(max(buffer.steps, 1)):
                total = self._zeros(Task(-1, {}, 0, {}), buffer)
                for task in tasks:  # in batch order
                    total = total + call.task_weight(task.index) * task.env[reduction.source.buffer, slot]
                meta[reduction.target, slot] = total

    def _collect(self, meta: dict[Key, Any], tasks: list[Task]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for name in self.plan.results:
            buffer = self.plan.buffers[name]
            slots = [s for s in range(max(buffer.steps, 1)) if (name, s) in (meta if buffer.home == "meta" else tasks[0].env)]
            if not slots:
                continue
            if buffer.home == "meta":
                out[name] = torch.stack([meta[name, s] for s in slots]) if buffer.steps else meta[name, 0]
            elif buffer.kind in ("mask", "index"):
                for s in slots:
                    out[name, s] = [task.env[name, s] for task in tasks]
            elif buffer.rows:
                out[name] = torch.cat([task.env[name, 0] for task in tasks])
            elif buffer.steps:
                out[name] = torch.stack([torch.stack([task.env[name, s] for s in slots]) for task in tasks])
            else:
                out[name] = torch.stack([task.env[name, 0] for task in tasks])
        return out
