"""The ``cpu`` executor: fully connected networks in float32, one native call per half of a meta-iteration.

The Plan is lowered once per capacity (the largest task) to flat numbers; a call fills in pointers. Workspaces are kept and reused, one for each
caller at a time, so that several threads may run one object.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmaml.batch import TaskBatch
from fastmaml.executors.call import Call, Results
from fastmaml.executors.cpu_kernels import native
from fastmaml.executors.cpu_lowering import Lowering, rows_capacity
from fastmaml.plan.instructions import Buffer, Plan

try:
    from fastmaml import _cpu

    IMPORT_ERROR: str | None = None
except ImportError as error:  # kept, and shown when the executor is asked for
    _cpu = None
    IMPORT_ERROR = str(error)

LOWERINGS = 16  # capacities kept per Plan


@dataclass
class Workspace:
    """Memory of one caller: the packed leaves and gradients, the arenas of the workers, what is kept per task."""

    meta: Tensor
    work: Tensor
    kept: dict[str, Tensor]


@dataclass
class State:
    """Between the halves."""

    call: Call
    lowering: Prepared
    workspace: Workspace
    data: dict[str, Tensor]
    versions: dict[str, int]
    finite: Tensor


class Prepared:
    """A lowering with its native Plan and its idle workspaces."""

    def __init__(self, plan: Plan, support: int, query: int, block_rows: int | None) -> None:
        ids = {name: i for i, name in enumerate(_cpu.kernels())}
        self.plan = plan
        self.capacity = rows_capacity(support, query)
        self.lowering = Lowering(plan, self.capacity, ids, block_rows)
        self.native = _cpu.Plan(self.lowering.words)
        self.inputs, self.outputs = self.lowering.inputs, self.lowering.outputs
        self.task_buffers = self.lowering.task_buffers
        data = ("x.support", "y.support", "x.query", "y.query")
        self.data = [name for name in self.task_buffers if name in data]
        self.leaves = [name for name in self.task_buffers if name in plan.inputs and name not in data and name != "dlogits"]
        masks = [name for name in plan.results if plan.buffers[name].kind == "mask"]
        self.results = [n for n in self.task_buffers if n in plan.results and n not in masks]
        self.kept = [n for n in self.task_buffers if n not in (*self.data, *self.leaves, *self.results, "dlogits")]
        self.idle: dict[tuple[int, ...], list[Workspace]] = {}

    def key(self, batch: TaskBatch, threads: int) -> tuple[int, ...]:
        return len(batch), threads, batch.support_x.shape[0], batch.query_x.shape[0]

    def take(self, key: tuple[int, ...]) -> Workspace:
        idle = self.idle.setdefault(key, [])
        try:
            return idle.pop()  # atomic: two threads never get the same one
        except IndexError:
            pass
        meta = torch.empty(self.lowering.meta_bytes + 64, dtype=torch.uint8)
        tasks, threads, support, query = key
        rows, low = {"support": support, "query": query}, self.lowering
        kept = {}
        for name in self.kept:
            size = rows[low.buffers[name].rows] * low.row_bytes(name) if low.by_rows(name) else tasks * low.kept_bytes(name)
            kept[name] = torch.empty(size + 64, dtype=torch.uint8)
        work = torch.empty(_cpu.work_bytes(self.native, tasks, threads) + 64, dtype=torch.uint8)
        return Workspace(meta, work, kept)

    def give_back(self, key: tuple[int, ...], workspace: Workspace) -> None:
        if len(self.idle) > 4:  # batches of ever new sizes must not pile up
            self.idle.clear()
        self.idle.setdefault(key, []).append(workspace)


def _aligned(tensor: Tensor) -> int:
    return (tensor.data_ptr() + 63) // 64 * 64


class CpuExecutor:
    """Runs ``plan`` on the CPU in float32. ``threads`` None: torch.get_num_threads(). ``block_rows``: rows per block, for tests."""

    name = "cpu"

    def __init__(self, plan: Plan, threads: int | None = None, block_rows: int | None = None) -> None:
        if _cpu is None:
            raise RuntimeError(IMPORT_ERROR)
        self.plan, self.threads, self.block_rows = plan, threads, block_rows
        self._prepared: OrderedDict[tuple[int, int], Prepared] = OrderedDict()

    @staticmethod
    def why_not(plan: Plan) -> str | None:
        """Why the executor cannot run a Plan, or None."""
        if _cpu is None:
            return f"fastmaml._cpu could not be imported: {IMPORT_ERROR}"
        for segment in plan.segments.values():
            for group in segment.groups:
                for instr in group.instructions:
                    try:
                        native(instr, plan.buffers, group.rows)
                    except NotImplementedError as error:
                        return str(error)
        return None

    def prepared(self, support: int, query: int) -> Prepared:
        key = (support, query)
        found = self._prepared.get(key)
        if found is None:
            found = self._prepared[key] = Prepared(self.plan, support, query, self.block_rows)
            if len(self._prepared) > LOWERINGS:
                self._prepared.popitem(last=False)
        return found

    # ------------------------------------------------------------------------------------------------------- running
    def forward(self, call: Call) -> Results:
        batch = call.batch
        prepared = self.prepared(max(batch.support_sizes), max(batch.query_sizes))
        threads = self.threads or torch.get_num_threads()
        workspace = prepared.take(prepared.key(batch, threads))
        data = {name: _floats(getattr(batch, _FIELD[name]), self.plan.buffers[name]) for name in prepared.data}
        values = {name: self._result(name, prepared, call) for name in prepared.results}
        pointers = {name: tensor.data_ptr() for name, tensor in (*data.items(), *values.items())}
        for name in prepared.leaves:
            data[name] = call.leaves[name].detach().to(torch.float32).contiguous()
            pointers[name] = data[name].data_ptr()
        pointers.update({name: _aligned(tensor) for name, tensor in workspace.kept.items()})
        finite = torch.empty(len(batch), dtype=torch.bool)
        gradients = self._gradients(prepared, call) if self.plan.entries == 1 else {}
        self._execute(prepared, call, 0, threads, workspace, pointers, gradients, finite)
        if call.record:
            values.update(self._masks(prepared, workspace, batch))
        state = None
        if self.plan.entries == 1:
            prepared.give_back(prepared.key(batch, threads), workspace)
        else:
            versions = {name: tensor._version for name, tensor in data.items()}
            state = State(call, prepared, workspace, data, versions, finite)
        return Results(self._shaped(prepared, values, gradients), finite, state, self.name)

    def reverse(self, state: State, dlogits: list[Tensor]) -> Results:
        for name, tensor in state.data.items():
            if tensor._version != state.versions[name]:
                raise RuntimeError(f"{name} was changed in place between forward and backward: pass a copy to maml(...)")
        prepared, call = state.lowering, state.call
        threads = self.threads or torch.get_num_threads()
        joined = torch.cat([d.to(torch.float32) for d in dlogits]).contiguous()
        pointers = {name: tensor.data_ptr() for name, tensor in state.data.items()}
        pointers.update({name: _aligned(tensor) for name, tensor in state.workspace.kept.items()})
        pointers["dlogits"] = joined.data_ptr()
        gradients, finite = self._gradients(prepared, call), state.finite.clone()
        values = {name: self._result(name, prepared, call) for name in prepared.results if name.startswith("grad.")}  # of a task's own leaves
        pointers.update({name: tensor.data_ptr() for name, tensor in values.items()})
        # the workspace was laid out for the forward half's threads; kept and packed arrays do not depend on them
        work = torch.empty(_cpu.work_bytes(prepared.native, len(call.batch), threads) + 64, dtype=torch.uint8)
        workspace = Workspace(state.workspace.meta, work, state.workspace.kept)
        self._execute(prepared, call, 1, threads, workspace, pointers, gradients, finite)
        return Results(self._shaped(prepared, values, gradients), finite, None, self.name)

    def _execute(self, prepared: Prepared, call: Call, half: int, threads: int, w: Workspace, pointers, gradients, finite) -> None:
        batch, weights = call.batch, call.task_weights
        given = {**call.leaves, **call.rates, **call.weights}
        keep = [_float32(given[name]) for name in prepared.inputs]
        ways = 0 if batch.ways is None else batch.ways.data_ptr()
        arguments = (
            batch.support_offsets.data_ptr(),
            batch.query_offsets.data_ptr(),
            ways,
            0 if weights is None else weights.data_ptr(),
            call.task_weight(0) if weights is None else 1.0,
            [pointers.get(name, 0) for name in prepared.task_buffers],
            [tensor.data_ptr() for tensor in keep],
            [gradients[name].data_ptr() if name in gradients else 0 for name in prepared.outputs],
            bool(call.sinks),
            bool(call.sinks) and call.strict,
            _aligned(w.meta),
            _aligned(w.work),
            finite.data_ptr(),
        )
        for attempt in range(3):  # see csrc/cpu/executor.h: only sums that are not finite need more than one
            if _cpu.execute(prepared.native, len(batch), half, threads, attempt, *arguments):
                break

    # ------------------------------------------------------------------------------------------------------- arrays
    def _result(self, name: str, prepared: Prepared, call: Call) -> Tensor:
        buffer, tasks = self.plan.buffers[name], len(call.batch)
        if buffer.rows:
            return torch.empty((call.batch.query_x.shape[0], *buffer.shape))
        if buffer.shape == ():
            return torch.empty((tasks, buffer.steps)) if buffer.steps else torch.empty(tasks)
        return torch.empty((tasks, prepared.lowering.kept_bytes(name) // 4))  # padded: cut in _shaped

    def _gradients(self, prepared: Prepared, call: Call) -> dict[str, Tensor]:
        """Where the gradients go: the caller's own arrays (added to), or new ones."""
        out = {}
        for name in prepared.outputs:
            if call.sinks:
                if name in call.sinks:
                    out[name] = call.sinks[name]
            else:
                buffer = self.plan.buffers[name]
                out[name] = torch.empty((buffer.steps, *buffer.shape) if buffer.steps else buffer.shape)
        return out

    def _shaped(self, prepared: Prepared, values: dict, gradients: dict[str, Tensor]) -> dict:
        for name, tensor in values.items():
            if isinstance(name, str) and (buffer := self.plan.buffers[name]).shape and not buffer.rows:
                values[name] = tensor[:, : buffer.numel].reshape(len(tensor), *buffer.shape)
        for name, first in prepared.lowering.first_slot.items():
            if first and name in values:
                values[name] = values[name][:, first:]
        values.update(gradients)
        return values

    def _masks(self, prepared: Prepared, workspace: Workspace, batch) -> dict:
        """The recorded masks: (buffer, step) -> one bool tensor per task."""
        out = {}
        for name in prepared.kept:
            buffer = self.plan.buffers[name]
            if buffer.kind != "mask" or name not in self.plan.results:
                continue
            lowering = prepared.lowering
            stride, step_stride = lowering._stride(buffer), lowering._step_stride(buffer)
            start = _aligned(workspace.kept[name]) - workspace.kept[name].data_ptr()
            sizes = {"support": batch.support_sizes, "query": batch.query_sizes}
            for slot in range(max(buffer.steps, 1)):
                tasks = []
                for t in range(len(batch)):
                    rows = sizes[buffer.rows][t] if buffer.rows in sizes else batch.support_sizes[t] + batch.query_sizes[t]
                    if lowering.by_rows(name):
                        at = start + sum(sizes[buffer.rows][:t]) * stride
                    else:
                        at = start + t * lowering.kept_bytes(name) + slot * step_stride
                    block = workspace.kept[name][at : at + rows * stride].view(rows, stride)[:, : buffer.numel]
                    tasks.append(block.clone().bool().view(rows, *buffer.shape))
                out[name, slot] = tasks
        return out


_FIELD = {"x.support": "support_x", "y.support": "support_y", "x.query": "query_x", "y.query": "query_y"}


def _float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype is torch.float32 and tensor.is_contiguous() else tensor.detach().to(torch.float32).contiguous()


def _floats(tensor: Tensor, buffer: Buffer) -> Tensor:
    dtype = torch.int64 if buffer.kind == "label" else torch.float32
    return tensor if tensor.dtype is dtype and tensor.is_contiguous() else tensor.to(dtype).contiguous()
