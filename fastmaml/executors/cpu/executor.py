"""The ``cpu`` executor: fully connected and convolutional networks in float32, one native call per half of a meta-iteration.

The Plan is lowered once per capacity (the largest task) to flat numbers; a call fills in pointers. Workspaces are kept and reused, one for each
caller at a time, so that several threads may run one object.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmaml.batch import TaskBatch, offsets_of
from fastmaml.executors.call import Call, Results
from fastmaml.executors.cpu.lowering import Lowering, rows_capacity
from fastmaml.executors.cpu.rules import native
from fastmaml.plan.instructions import Plan, Segment

try:
    from fastmaml import _cpu

    IMPORT_ERROR: str | None = None
except ImportError as error:  # kept, and shown when the executor is asked for
    _cpu = None
    IMPORT_ERROR = str(error)

_REAL, _INT = torch.float32, torch.int64
_DATA = ("x.support", "y.support", "x.query", "y.query")  # in the order of TaskBatch.stored
LOWERINGS = 16  # capacities kept per Plan


@dataclass
class Workspace:
    """Memory of one caller: the packed leaves and gradients, the arenas of the workers, what is kept per task.

    pointers   of the task buffers; those of one call's data and results are filled in anew
    results    (task buffer, its name, template) of what a call leaves behind
    finite     template of the flags of the tasks
    starts     addresses of ``meta`` and ``work``
    """

    meta: Tensor
    work: Tensor
    kept: dict[str, Tensor]
    pointers: list[int]
    results: list[tuple[int, str, Tensor]]
    finite: Tensor
    starts: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        self.starts = _aligned(self.meta), _aligned(self.work)


@dataclass
class State:
    """Between the halves."""

    call: Call
    lowering: Prepared
    workspace: Workspace
    data: dict[int, Tensor]
    versions: dict[int, int]
    finite: Tensor


class Prepared:
    """A lowering with its native Plan and its idle workspaces."""

    turn = True  # its kernels read transposed weights where there are any

    def __init__(self, plan: Plan, support: int, query: int, block_rows: int | None) -> None:
        self.plan = plan
        self.capacity = rows_capacity(support, query)
        self.lowering = Lowering(plan, self.capacity, self.kernel_ids(), block_rows, turn=self.turn)
        self.native = self.build()
        self.inputs, self.outputs = self.lowering.inputs, self.lowering.outputs
        self.task_buffers = self.lowering.task_buffers
        at = {name: i for i, name in enumerate(self.task_buffers)}
        self.data = [(at[name], i, _INT if plan.buffers[name].kind == "label" else _REAL) for i, name in enumerate(_DATA) if name in at]
        self.leaves = [(at[name], name) for name in self.task_buffers if name in plan.inputs and name not in (*_DATA, *plan.late)]
        self.late = [(at[name], name) for name in plan.late]
        masks = [name for name in plan.results if plan.buffers[name].kind in ("mask", "index")]
        self.results = [(at[name], name) for name in self.task_buffers if name in plan.results and name not in masks]
        self.half_of = {ref.buffer: p.half for p in plan.schedule for s in p.segments for i in plan.segments[s].instructions for ref in i.writes()}
        found = {name: plan.buffers[name] for _, name in self.results}
        self.arrays = {name: buffer for name, buffer in found.items() if buffer.shape and not buffer.rows}  # of each task, padded
        known = {*_DATA, *(name for _, name in (*self.leaves, *self.late, *self.results))}
        self.kept = [(at[name], name) for name in self.task_buffers if name not in known]
        shapes = {name: ((b.steps,) if b.steps else ()) + b.shape for name in self.outputs for b in (plan.buffers[name],)}
        self.gradients = {name: _template(shape) for name, shape in shapes.items()}
        self.idle: dict[tuple[int, ...], list[Workspace]] = {}

    def kernel_ids(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(_cpu.kernels())}

    def build(self) -> Any:
        return _cpu.Plan(self.lowering.words)

    def sizes(self, key: tuple[int, ...]) -> tuple[int, int, dict[str, int]]:
        """Bytes of the parts of a workspace for key = tasks, threads, support rows, query rows: meta, work, what is kept per task."""
        tasks, threads, support, query = key
        rows, low, kept = {"support": support, "query": query}, self.lowering, {}
        for _, name in self.kept:
            kept[name] = rows[low.buffers[name].rows] * low.row_bytes(name) if low.by_rows(name) else tasks * low.kept_bytes(name)
        return low.meta_bytes, _cpu.work_bytes(self.native, tasks, threads), kept

    def take(self, key: tuple[int, ...]) -> Workspace:
        idle = self.idle.setdefault(key, [])
        try:
            return idle.pop()  # atomic: two threads never get the same one
        except IndexError:
            pass
        meta, work, kept = self.sizes(key)
        arrays = {name: _bytes(size) for name, size in kept.items()}
        pointers = [0] * len(self.task_buffers)
        for i, name in self.kept:
            pointers[i] = _aligned(arrays[name])
        results = [(i, name, _template(self.shape_of(name, key[0], *key[2:]))) for i, name in self.results]
        return Workspace(_bytes(meta), _bytes(work), arrays, pointers, results, _template((key[0],), torch.bool))

    def shape_of(self, name: str, tasks: int, support: int, query: int) -> tuple[int, ...]:
        """Of a result, its rows padded where it is an array of each task (see ``shaped``)."""
        buffer = self.plan.buffers[name]
        if buffer.rows:
            return {"support": support, "query": query}[buffer.rows], *buffer.shape
        if buffer.shape == ():
            return (tasks, buffer.steps) if buffer.steps else (tasks,)
        return tasks, self.lowering.kept_bytes(name) // 4

    def shaped(self, values: dict) -> dict:
        """Cuts off padding, and slots of steps that did not run."""
        for name, buffer in self.arrays.items():
            if name in values:
                tasks, steps = len(values[name]), (buffer.steps,) if buffer.steps else ()
                values[name] = values[name].view(tasks, *steps, -1)[..., : buffer.numel].reshape(tasks, *steps, *buffer.shape)
        for name, first in self.lowering.first_slot.items():
            if first and name in values:
                values[name] = values[name][:, first:]
        return values

    def masks(self, batch: TaskBatch, kept: Mapping[str, Tensor]) -> dict:
        """The recorded decisions out of the bytes that are kept for the tasks: (buffer, step) -> one tensor per task, bool of a ReLU, int64 of a pooling."""
        out, sizes, lowering = {}, {"support": batch.support_sizes, "query": batch.query_sizes}, self.lowering
        for _, name in self.kept:
            buffer = self.plan.buffers[name]
            if buffer.kind not in ("mask", "index") or name not in self.plan.results:
                continue
            stride, step_stride = lowering._stride(buffer), lowering._step_stride(buffer)
            for slot in range(max(buffer.steps, 1)):
                tasks = []
                for t in range(len(batch)):
                    rows = sizes[buffer.rows][t] if buffer.rows in sizes else batch.support_sizes[t] + batch.query_sizes[t]
                    if lowering.by_rows(name):
                        at = sum(sizes[buffer.rows][:t]) * stride
                    else:
                        at = t * lowering.kept_bytes(name) + slot * step_stride
                    tasks.append(lowering.decisions(name, kept[name][at : at + rows * stride].view(rows, stride)))
                out[name, slot] = tasks
        return out

    def give_back(self, key: tuple[int, ...], workspace: Workspace) -> None:
        if len(self.idle) > 4:  # batches of ever new sizes must not pile up
            self.idle.clear()
        self.idle.setdefault(key, []).append(workspace)


def _bytes(size: int) -> Tensor:
    return torch.empty(size + 64, dtype=torch.uint8)  # room to align


def _aligned(tensor: Tensor) -> int:
    return (tensor.data_ptr() + 63) // 64 * 64


def _offset(tensor: Tensor) -> int:
    return _aligned(tensor) - tensor.data_ptr()


def _template(shape: tuple[int, ...], dtype: torch.dtype = _REAL) -> Tensor:
    """Of one element. torch.empty_like of it takes half of torch.empty's time, and a small network feels that."""
    strides, step = [], 1
    for n in reversed(shape):  # an axis of one keeps its stride in the copy: autograd warns of a gradient whose strides are not the parameter's
        strides.append(step if n == 1 else 0)
        step *= n
    return torch.empty((), dtype=dtype).as_strided(shape, strides[::-1])


class Sized(NamedTuple):
    """What batches of the same sizes share.

    capacity   support and query rows of the largest task: key of the lowering
    key        of the workspace: tasks, threads, rows
    offsets    support's and query's; ``rows``: their addresses
    """

    capacity: tuple[int, int]
    key: tuple[int, ...]
    offsets: tuple[Tensor, Tensor]
    rows: tuple[int, int]


@lru_cache(maxsize=256)
def _sized(support: tuple[int, ...], query: tuple[int, ...], threads: int) -> Sized:
    offsets = offsets_of(support), offsets_of(query)
    key = (len(support), threads, sum(support), sum(query))
    return Sized((max(support), max(query)), key, offsets, (offsets[0].data_ptr(), offsets[1].data_ptr()))


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In this type and contiguous, itself if it may be."""
    return tensor if tensor.dtype is dtype and tensor.is_contiguous() else tensor.detach().to(dtype).contiguous()


class CpuExecutor:
    """Runs ``plan`` on the CPU in float32. ``threads`` None: torch.get_num_threads(). ``block_rows``: rows per block, for tests."""

    name = "cpu"

    def __init__(self, plan: Plan, threads: int | None = None, block_rows: int | None = None) -> None:
        if _cpu is None:
            raise RuntimeError(IMPORT_ERROR)
        self.plan, self.threads, self.block_rows = plan, threads, block_rows
        self._prepared: OrderedDict[tuple[int, int], Prepared] = OrderedDict()

    @staticmethod
    def unavailable() -> str | None:
        """Why it can run nothing here, or None."""
        return None if _cpu is not None else f"fastmaml._cpu could not be imported: {IMPORT_ERROR}"

    @staticmethod
    def why_not_segment(plan: Plan, segment: Segment) -> str | None:
        """What the executor has no kernel for, or None."""
        for group in segment.groups:
            for instr in group.instructions:
                try:
                    native(instr, plan.buffers, group.rows)
                except NotImplementedError as error:
                    return str(error)
        return None

    @staticmethod
    def why_not(plan: Plan) -> str | None:
        """Why the executor cannot run a Plan, or None."""
        segments = (CpuExecutor.why_not_segment(plan, segment) for segment in plan.segments.values())
        return CpuExecutor.unavailable() or next(filter(None, segments), None)

    def prepared(self, support: int, query: int) -> Prepared:
        key = (support, query)
        found = self._prepared.get(key)
        if found is None:
            found = self._prepared[key] = Prepared(self.plan, support, query, self.block_rows)
            if len(self._prepared) > LOWERINGS:
                self._prepared.popitem(last=False)
        return found

    def _sized(self, batch: TaskBatch) -> Sized:
        return _sized(batch.support_sizes, batch.query_sizes, self.threads or torch.get_num_threads())

    def memory(self, batch: TaskBatch) -> dict[str, int]:
        """Bytes that a call lays out and keeps for the next one, beside the caller's tensors and the results."""
        sized = self._sized(batch)
        meta, work, kept = self.prepared(*sized.capacity).sizes(sized.key)
        return {"parameters and gradients, packed": meta, "tasks in flight, and partial sums": work, "kept for every task": sum(kept.values())}

    # ------------------------------------------------------------------------------------------------------- running
    def forward(self, call: Call) -> Results:
        batch = call.batch
        sized = self._sized(batch)
        prepared = self.prepared(*sized.capacity)
        workspace = prepared.take(sized.key)
        pointers, stored, data, values = workspace.pointers, batch.stored(), {}, {}
        for i, part, dtype in prepared.data:
            data[i] = tensor = _as(stored[part], dtype)
            pointers[i] = tensor.data_ptr()
        for i, name, template in workspace.results:
            if prepared.half_of[name] == 0:
                values[name] = tensor = torch.empty_like(template)
                pointers[i] = tensor.data_ptr()
        for i, name in prepared.leaves:
            data[i] = tensor = _as(call.leaves[name], _REAL)
            pointers[i] = tensor.data_ptr()
        finite = torch.empty_like(workspace.finite)
        gradients = self._gradients(prepared, call) if self.plan.entries == 1 else {}
        all_finite = self._execute(prepared, call, 0, sized, workspace, gradients, finite)
        if call.record:
            values.update(prepared.masks(batch, {name: bytes[_offset(bytes) :] for name, bytes in workspace.kept.items()}))
        state = None
        if self.plan.entries == 1:
            prepared.give_back(sized.key, workspace)
        else:
            versions = {i: tensor._version for i, tensor in data.items()}
            state = State(call, prepared, workspace, data, versions, finite)
        values = prepared.shaped(values)
        values.update(gradients)
        return Results(values, finite, state, self.name, all_finite)

    def reverse(self, state: State, given: Mapping[str, Tensor]) -> Results:
        prepared, call, kept = state.lowering, state.call, state.workspace
        for i, tensor in state.data.items():
            if tensor._version != state.versions[i]:
                name = prepared.task_buffers[i]
                raise RuntimeError(f"{name} was changed in place between forward and backward: pass a copy to maml(...)")
        sized = self._sized(call.batch)
        late = {i: _as(given[name], _REAL) for i, name in prepared.late}
        values = {name: torch.empty_like(template) for _, name, template in kept.results if prepared.half_of[name] == 1}
        pointers = kept.pointers.copy()
        for i, name, _ in kept.results:
            pointers[i] = values[name].data_ptr() if name in values else 0
        for i, tensor in late.items():
            pointers[i] = tensor.data_ptr()
        gradients, finite = self._gradients(prepared, call), state.finite.clone()
        # the workspace was laid out for the forward half's threads; kept and packed arrays do not depend on them
        work = _bytes(prepared.sizes(sized.key)[1])
        workspace = Workspace(kept.meta, work, kept.kept, pointers, kept.results, kept.finite)
        all_finite = self._execute(prepared, call, 1, sized, workspace, gradients, finite)
        return Results({**prepared.shaped(values), **gradients}, finite, None, self.name, all_finite)

    def _execute(self, prepared: Prepared, call: Call, half: int, sized: Sized, w: Workspace, gradients: Mapping, finite: Tensor) -> bool:
        """Whether all tasks are finite."""
        ways, weights, sinks = call.batch.ways, call.task_weights, bool(call.sinks)
        given = {**call.weights, **call.rates, **call.leaves}
        inputs = [_as(given[name], _REAL) for name in prepared.inputs]  # those that had to be made anew live here
        arguments = (
            *sized.rows,
            0 if ways is None else ways.data_ptr(),
            0 if weights is None else weights.data_ptr(),
            call.task_weight(0) if weights is None else 1.0,
            w.pointers,
            [tensor.data_ptr() for tensor in inputs],
            [gradients[name].data_ptr() if name in gradients else 0 for name in prepared.outputs],
            sinks,
            sinks and call.strict,
            *w.starts,
            finite.data_ptr(),
        )
        tasks, threads = sized.key[:2]
        for attempt in range(3):  # see csrc/cpu/executor.h: only sums that are not finite need more than one
            written, all_finite = _cpu.execute(prepared.native, tasks, half, threads, attempt, *arguments)
            if written:
                break
        return all_finite

    # ------------------------------------------------------------------------------------------------------- arrays
    def _gradients(self, prepared: Prepared, call: Call) -> Mapping[str, Tensor]:
        """Where the gradients go: the caller's own arrays (added to), or new ones."""
        return call.sinks or {name: torch.empty_like(template) for name, template in prepared.gradients.items()}
