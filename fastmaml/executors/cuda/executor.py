"""The ``cuda`` executor: networks whose tasks are small (fully connected ones, with all that may come around them) in float32, one launch for each half
of a meta-iteration.

The Plan is lowered as for the ``cpu`` executor (the same numbers, with device functions of the same names behind them) and flattened into one piece of
device memory per capacity (the largest task). A thread block runs a task, on sm_90 a cluster of blocks where that pays (``CudaPrepared.ranks_for``): by a
kernel of the Plan's own, straight-line source that NVRTC compiles at the first call (nvrtc.py), or, where that cannot be, by the one that walks any Plan
(``how`` says which, and why). All other memory comes from torch's allocator at each call and goes back behind it, so that streams, threads and captured
graphs need no care; a launch waits for nothing, and nothing is read back but the tasks' finite flags, when somebody asks for them.

``CudaExecutor(plan, native=fastmaml._cuda_host)`` runs the same device functions as host code on CPU tensors: that is how they are tested.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastmaml.batch import TaskBatch
from fastmaml.executors.call import Call, Results
from fastmaml.executors.cpu.executor import LOWERINGS, Prepared
from fastmaml.executors.cpu.lowering import Lowering, rows_capacity
from fastmaml.executors.cpu.rules import native as native_call
from fastmaml.executors.cpu.storage import pad
from fastmaml.executors.cuda import nvrtc
from fastmaml.executors.device import DeviceResults, capturing, keep_for_graph, with_room
from fastmaml.plan.instructions import Plan, Segment

try:
    from fastmaml import _cuda

    IMPORT_ERROR: str | None = None
except ImportError as error:  # kept, and shown when the executor is asked for
    _cuda = None
    IMPORT_ERROR = str(error)

WHOLE = 1 << 30  # rows of a block: all of them, nothing is gained by fewer
KERNELS = 8  # compiled for one Plan: halves, and sizes of tasks
CLUSTERS = (2, 4, 8)  # blocks of one: what every GPU that has clusters can run
UPLOADS = 64  # small arrays kept on each device: offsets, ways, task weights
_REAL = torch.float32


@dataclass
class State:
    """Between the halves: what a call has laid out, and what it was given."""

    call: Call
    prepared: CudaPrepared
    memory: Tensor
    at: dict[str, int]
    given: dict[int, Tensor]
    versions: dict[int, int]
    finite: Tensor


class CudaPrepared(Prepared):
    """A lowering for one capacity and device, flattened; its bytes on the device are uploaded once."""

    turn = False  # its kernels read a weight by columns where it lies

    def __init__(self, plan: Plan, support: int, query: int, executor: CudaExecutor, device: torch.device, ranks: int) -> None:
        self.module, self.device = executor.native, device
        self.shared_limit, self.threads, self.ranks = executor.shared_limit, executor.threads, ranks
        super().__init__(plan, support, query, WHOLE)
        index = device.index or 0
        self.resident = self.module.resident_blocks(self.native, index, ranks)
        spread = ranks == 1 and not self.native.shared_arena_bytes and self.module.device(index)["capability"] >= (9, 0)
        self.clusters = {n: self.module.resident_blocks(self.native, index, n) for n in CLUSTERS if spread}  # how many run at once
        self.kernels: dict[tuple, int] = {}  # compiled, by half, rows of a task (-1: tasks differ), whether ways are given; 0: the walk
        self.on_device = torch.frombuffer(bytearray(self.native.bytes), dtype=torch.uint8).to(device)

    def kernel_ids(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.module.all_kernels())}

    def build(self) -> Any:
        limit = self.shared_limit or self.module.device(self.device.index or 0)["shared_bytes"]
        return self.module.Plan(self.lowering.words, self.lowering.scratch_at, limit, self.threads, self.ranks)

    def blocks(self, tasks: int) -> int:
        """Or clusters."""
        return min(tasks, self.resident)

    def ranks_for(self, tasks: int) -> int:
        """Blocks of the cluster that runs a task, 1: a block does. What a cluster works on lies in L2: it is for tasks of which nothing fits into the shared
        memory of a block, and so few of them that all have one at once."""
        return max((n for n, at_once in self.clusters.items() if tasks <= at_once), default=1)

    def layout(self, batch: TaskBatch) -> dict[str, int]:
        """Bytes by purpose, in the order in which they lie."""
        tasks, rows, low = len(batch), {"support": sum(batch.support_sizes), "query": sum(batch.query_sizes)}, self.lowering
        sizes = {"meta": self.native.meta_bytes, "arenas": self.blocks(tasks) * self.native.arena_bytes, "sums": 4 * tasks * self.native.sums_floats}
        for _, name in self.kept:
            sizes[name] = rows[low.buffers[name].rows] * low.row_bytes(name) if low.by_rows(name) else tasks * low.kept_bytes(name)
        return sizes


class CudaExecutor:
    """Runs ``plan`` on the GPU where the call's tensors are, on torch's current stream. For tests: ``native`` the module of device functions,
    ``threads`` of a block, ``ranks`` blocks of a cluster (0: chosen), ``shared_limit`` bytes of a block's shared memory, ``order`` of the host's threads
    ("forward", "reversed", "shuffled7"), ``compiler`` that makes a kernel of (source, native, device), None to walk the Plan."""

    name = "cuda"

    def __init__(
        self,
        plan: Plan,
        native: ModuleType | None = None,
        threads: int = 0,
        ranks: int = 0,
        shared_limit: int = 0,
        order: str = "forward",
        blocks: int = 0,
        compiler: Callable[[str, ModuleType, torch.device], int] | None = nvrtc.kernel,
    ) -> None:
        self.native = native or _cuda
        if self.native is None:
            raise RuntimeError(IMPORT_ERROR)
        self.plan, self.threads, self.ranks, self.shared_limit, self.order, self.most_blocks = plan, threads, ranks, shared_limit, order, blocks
        self._compiler = None if native is not None and compiler is nvrtc.kernel else compiler
        self._compiled, self._walks = 0, "no compiler was given"
        self._prepared: dict[tuple, CudaPrepared] = {}
        self._uploaded: dict[tuple, Tensor] = {}
        self._counters: dict[tuple, Tensor] = {}

    @staticmethod
    def unavailable(native: ModuleType | None = None, index: int | None = None) -> str | None:
        """Why it can run nothing here, or nothing on the device of this number, or None."""
        module = native or _cuda
        if module is None:
            return f"fastmaml._cuda could not be imported ({IMPORT_ERROR}): it is built where nvcc is"
        count, why = module.devices()
        if not count:
            return f"CUDA finds no device: {why}"
        why = module.why_not(index) if index is not None else ""
        return f"fastmaml._cuda was not built for this device ({why}): build it with FASTMAML_CUDA_ARCHS" if why else None

    @staticmethod
    def why_not_segment(plan: Plan, segment: Segment, native: ModuleType | None = None) -> str | None:
        """What the executor has no device function for, or None."""
        known = set((native or _cuda).kernels())
        for group in segment.groups:
            for instr in group.instructions:
                if instr.kernel == "reshape_fwd" and instr.inputs[0].buffer in plan.inputs:  # of the caller's data: the same memory
                    continue
                try:
                    call = native_call(instr, plan.buffers, group.rows)
                except NotImplementedError as error:
                    return str(error)
                if call.kernel not in known or call.pixels != 1:
                    return f"{instr.kernel} has no device function: it runs networks of vectors, not of images"
        return None

    @staticmethod
    def why_not(plan: Plan, native: ModuleType | None = None) -> str | None:
        """Why the executor cannot run a Plan, or None."""
        module, segments = native or _cuda, (CudaExecutor.why_not_segment(plan, segment, native) for segment in plan.segments.values())
        why = CudaExecutor.unavailable(native) or next(filter(None, segments), None)
        if why:
            return why
        try:
            ids = {name: i for i, name in enumerate(module.all_kernels())}
            lowering = Lowering(plan, rows_capacity(1, 1), ids, WHOLE)
            module.Plan(lowering.words, lowering.scratch_at, 48 * 1024, 0)
        except RuntimeError as error:  # a limit, named
            return str(error)
        known = set(module.kernels())
        lowered = (step.call.kernel for _, groups in lowering.phases for _, steps in groups for step in steps)
        return next((f"{kernel} has no device function" for kernel in lowered if kernel not in known), None)

    def prepared(self, batch: TaskBatch) -> CudaPrepared:
        plain = self._prepare(batch, self.ranks or 1)
        ranks = self.ranks or plain.ranks_for(len(batch))
        return plain if ranks == plain.ranks else self._prepare(batch, ranks)

    def _prepare(self, batch: TaskBatch, ranks: int) -> CudaPrepared:
        device = batch.support_x.device
        key = (max(batch.support_sizes), max(batch.query_sizes), device, ranks)
        found = self._prepared.get(key)
        if found is None:
            self._not_while_capturing(device)
            if len(self._prepared) >= LOWERINGS:
                self._forget(self._prepared, device)
            found = self._prepared[key] = CudaPrepared(self.plan, *key[:2], self, device, ranks)
        return found

    def memory(self, batch: TaskBatch) -> dict[str, int]:
        """Bytes that a call lays out, beside the caller's tensors and the results, and the shared memory of a block."""
        prepared = self.prepared(batch)
        return {**self._bytes(prepared, batch), "shared memory of a block": prepared.native.shared_arena_bytes}

    @staticmethod
    def _bytes(prepared: CudaPrepared, batch: TaskBatch) -> dict[str, int]:
        """Of the device's memory."""
        sizes = prepared.layout(batch)
        meta, arenas, sums = (sizes.pop(name) for name in ("meta", "arenas", "sums"))
        words = "parameters and gradients, packed", "tasks in flight", "gradients of every task", "kept for every task"
        return dict(zip(words, (meta, arenas, sums, sum(sizes.values())), strict=True))

    @property
    def how(self) -> str:
        """Whether the Plan has kernels of its own, or why it is walked; whether clusters ran tasks."""
        ranks = sorted({n for *_, n in self._prepared} - {1})
        clusters = f"; a task on a cluster of {' or '.join(map(str, ranks))} blocks" if ranks else ""
        if self._compiler is None:
            return f"one kernel that walks any Plan: {self._walks}{clusters}"
        full = ", other sizes are walked" if self._compiled == KERNELS else ""
        return f"kernels of this Plan's own, compiled at the first call with tasks of a size: {self._compiled} so far{full}{clusters}"

    # ------------------------------------------------------------------------------------------------------- running
    def forward(self, call: Call) -> Results:
        batch, prepared = call.batch, self.prepared(call.batch)
        memory, at = self._lay_out(prepared, batch)
        stored = batch.stored()
        given = {i: _as(stored[part], dtype) for i, part, dtype in prepared.data}
        given |= {i: _as(call.leaves[name], _REAL) for i, name in prepared.leaves}
        pointers = self._kept(prepared, at)
        for i, tensor in given.items():
            pointers[i] = tensor.data_ptr()
        values = self._values(prepared, batch, 0, pointers)
        finite = torch.empty(len(batch), dtype=torch.bool, device=prepared.device)
        gradients = self._gradients(prepared, call) if self.plan.entries == 1 else {}
        self._execute(prepared, call, 0, pointers, gradients, at, finite)
        if call.record:
            values.update(prepared.masks(batch, {name: memory[at[name] - memory.data_ptr() :] for _, name in prepared.kept}))
        state = None
        if self.plan.entries == 2:
            state = State(call, prepared, memory, at, given, {i: tensor._version for i, tensor in given.items()}, finite)
        return self._results(prepared, values, gradients, finite, state)

    def reverse(self, state: State, given: Mapping[str, Tensor]) -> Results:
        prepared, call = state.prepared, state.call
        for i, tensor in state.given.items():
            if tensor._version != state.versions[i]:
                raise RuntimeError(f"{prepared.task_buffers[i]} was changed in place between forward and backward: pass a copy to maml(...)")
        pointers, late = self._kept(prepared, state.at), {i: _as(given[name], _REAL) for i, name in prepared.late}
        late = {i: v.clone() if v.data_ptr() % 16 else v for i, v in late.items()}  # a view may begin anywhere, and is read four floats at a time
        for i, tensor in (*state.given.items(), *late.items()):
            pointers[i] = tensor.data_ptr()
        values = self._values(prepared, call.batch, 1, pointers)
        gradients, finite = self._gradients(prepared, call), state.finite.clone()
        self._execute(prepared, call, 1, pointers, gradients, state.at, finite)
        return self._results(prepared, values, gradients, finite, None)

    def _results(self, prepared: CudaPrepared, values: dict, gradients: dict, finite: Tensor, state: State | None) -> Results:
        known = True if capturing(prepared.device) else None
        return DeviceResults({**prepared.shaped(values), **gradients}, finite, state, self.name, known)

    def _execute(self, prepared: CudaPrepared, call: Call, half: int, pointers: list[int], gradients: dict, at: dict[str, int], finite: Tensor) -> None:
        batch, device = call.batch, prepared.device
        tables = [self._upload(table, device) for table in (batch.support_offsets, batch.query_offsets, batch.ways, call.task_weights)]
        given = {**call.weights, **call.rates, **call.leaves}
        inputs = [_as(given[name], _REAL) for name in prepared.inputs]
        outputs = [gradients[name].data_ptr() if name in gradients else 0 for name in prepared.outputs]
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        counters = self._counters_of(device, stream)
        keep_for_graph(device, prepared, tables, inputs)
        blocks = min(prepared.blocks(len(batch)), self.most_blocks or WHOLE)
        self.native.execute(
            *(prepared.native, self._kernel(prepared, half, batch), device.index or 0, stream, self.order, prepared.on_device.data_ptr(), len(batch), half, blocks),
            *(0 if table is None else table.data_ptr() for table in tables),
            call.task_weight(0) if call.task_weights is None else 1.0,
            [*pointers, *(tensor.data_ptr() for tensor in inputs), *outputs],
            *(bool(call.sinks), bool(call.sinks) and call.strict),
            *(at[name] for name in ("meta", "arenas", "sums")),
            *(counters.data_ptr(), finite.data_ptr()),
        )

    def _kernel(self, prepared: CudaPrepared, half: int, batch: TaskBatch) -> int:
        """What was compiled of one half for batches like this one; 0: the walk."""
        rows = (sizes[0] if min(sizes) == max(sizes) else -1 for sizes in (batch.support_sizes, batch.query_sizes))
        key = (half, *rows, batch.ways is not None)
        if key not in prepared.kernels:
            prepared.kernels[key] = self._compile(prepared, key)
        return prepared.kernels[key]

    def _compile(self, prepared: CudaPrepared, key: tuple) -> int:
        if self._compiler is None or self._compiled == KERNELS:  # the next sizes may be others again: compiling takes longer than many a call
            return 0
        self._not_while_capturing(prepared.device)
        try:
            found = self._compiler(prepared.native.source(*key), self.native, prepared.device)
        except Exception as error:  # whatever it is: the walk needs nothing of it
            self._compiler, self._walks = None, str(error)
            if not isinstance(error, nvrtc.Absent):
                warnings.warn(f"no kernel could be compiled for this Plan alone; the one that walks any Plan runs it: {error}", stacklevel=2)
            return 0
        self._compiled += 1
        return found

    # ------------------------------------------------------------------------------------------------------- memory
    def _lay_out(self, prepared: CudaPrepared, batch: TaskBatch) -> tuple[Tensor, dict[str, int]]:
        """One piece of memory, and the address of each part of it."""
        sizes = prepared.layout(batch)
        total = sum(pad(size, 64) for size in sizes.values())
        memory = with_room(lambda: torch.empty(total + 64, dtype=torch.uint8, device=prepared.device), len(batch), prepared.device, lambda: self._bytes(prepared, batch))
        at, end = {}, pad(memory.data_ptr(), 64)
        for name, size in sizes.items():
            at[name], end = end, end + pad(size, 64)
        return memory, at

    def _kept(self, prepared: CudaPrepared, at: dict[str, int]) -> list[int]:
        """Pointers of the task buffers, those of what is kept filled in."""
        pointers = [0] * len(prepared.task_buffers)
        for i, name in prepared.kept:
            pointers[i] = at[name]
        return pointers

    @staticmethod
    def _values(prepared: CudaPrepared, batch: TaskBatch, half: int, pointers: list[int]) -> dict[str, Tensor]:
        """Room for what one half leaves behind, but for the gradients."""
        values, sizes = {}, (len(batch), sum(batch.support_sizes), sum(batch.query_sizes))
        for i, name in prepared.results:
            if prepared.half_of[name] == half:
                values[name] = torch.empty(prepared.shape_of(name, *sizes), dtype=_REAL, device=prepared.device)
                pointers[i] = values[name].data_ptr()
        return values

    def _gradients(self, prepared: CudaPrepared, call: Call) -> dict[str, Tensor]:
        """Where the gradients go: the caller's own arrays (added to), or new ones."""
        if call.sinks:
            return {name: call.sinks[name] for name in prepared.outputs if name in call.sinks}
        return {name: torch.empty_like(template, device=prepared.device) for name, template in prepared.gradients.items()}

    def _upload(self, table: Tensor | None, device: torch.device) -> Tensor | None:
        """A small array of the host on the device, kept by its contents: the next batch has the same sizes."""
        if table is None or device.type != "cuda":
            return table
        key = (device, table.dtype, tuple(table.tolist()))
        found = self._uploaded.get(key)
        if found is None:
            self._not_while_capturing(device)
            if len(self._uploaded) >= UPLOADS:
                self._forget(self._uploaded, device)
            found = self._uploaded[key] = table.to(device)
        return found

    def _counters_of(self, device: torch.device, stream: int) -> Tensor:
        """Zeros, which every launch leaves as zeros: one set for each stream, and one for each captured launch."""
        if capturing(device):
            return torch.zeros(self.native.counters, dtype=torch.int32, device=device)
        key = (device, stream)
        if key not in self._counters:
            self._counters[key] = torch.zeros(self.native.counters, dtype=torch.int32, device=device)
        return self._counters[key]

    @staticmethod
    def _forget(kept: dict, device: torch.device) -> None:
        """All of what a launch on any stream may still read."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        kept.clear()

    @staticmethod
    def _not_while_capturing(device: torch.device) -> None:
        if capturing(device):
            raise RuntimeError("the cuda executor has not run tasks of these sizes yet: call it once before the graph is captured")


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype is dtype and tensor.is_contiguous() else tensor.detach().to(dtype).contiguous()
