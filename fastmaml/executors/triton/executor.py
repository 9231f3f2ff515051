"""The ``triton`` executor: any Plan in float32 on an NVIDIA GPU, all tasks of a batch in each launch, a meta-iteration as one CUDA graph.

Instructions that follow one another are fused where a kernel can end in the next (triton/fusion.py). For each bucket of batches (tasks, most rows) the Plan is
then lowered once to a list of launches on static buffers. The second batch of a bucket captures the list as a
CUDA graph, which later ones replay: a call copies its tensors, rates and weights in, and copies of the results out. Workspaces are kept and reused, one for each
caller and stream at a time; one that goes into a graph that the caller captures stays there. On CPU tensors the kernels run in Triton's interpreter (TRITON_INTERPRET=1), which is how they are tested without a GPU.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastmaml.batch import TaskBatch
from fastmaml.executors.call import Call, Results
from fastmaml.executors.device import KEEPERS, DeviceResults, capturing, keep_for_graph, with_room
from fastmaml.executors.triton.fusion import fuse
from fastmaml.executors.triton.lowering import Lowering
from fastmaml.executors.triton.rules import RULES
from fastmaml.executors.triton.site import Launch
from fastmaml.executors.triton.storage import Bucket
from fastmaml.kernels import update
from fastmaml.plan.instructions import EXTENTS, Plan

INTERPRETED = type(update.axpy).__name__ == "InterpretedFunction"  # decided when the kernels were imported
CAPTURING = threading.Lock()  # whoever begins waits for the whole device, which ends the captures of other threads
WORKSPACES = 8  # kept per Plan: each holds the memory of a bucket
_DATA = ("x.support", "y.support", "x.query", "y.query")  # in the order of TaskBatch.stored


class Workspace:
    """Memory of one caller: the static buffers of a bucket, the launches on them, and their graphs."""

    def __init__(self, plan: Plan, bucket: Bucket, device: torch.device, precision: str) -> None:
        self.lowering = Lowering(plan, bucket, device, precision)
        self.storage, self.device = self.lowering.storage, device
        self.ran = [0] * plan.entries
        self.graphs: list[Any] = [None] * plan.entries
        self._sizes: Any = None
        self._task_weights: Any = None
        self.storage.one.copy_(torch.tensor([0, 1], dtype=torch.int32))

    def describe(self, call: Call) -> None:
        """Fills the tables of rows, ways and weights of the tasks."""
        batch, sizes, weights = call.batch, *_described(call)
        if weights != self._task_weights:
            self.storage.task_weights.copy_(torch.tensor(weights, dtype=torch.float32))
            self._task_weights = weights
        if sizes == self._sizes:
            return
        support, query = batch.support_offsets, batch.query_offsets
        offsets = dict(zip(EXTENTS, (support, query, support + query), strict=True))
        ways = torch.zeros(len(batch), dtype=torch.int64) if batch.ways is None else batch.ways
        joined = [torch.stack([o[0], o[-1]]) for o in offsets.values()]
        self.storage.table.copy_(torch.cat([*offsets.values(), *joined, torch.tensor([0, 1]), ways]).to(torch.int32))
        self._sizes = sizes

    def is_for(self, call: Call) -> bool:
        """Whether its tables are those of a call already."""
        return (self._sizes, self._task_weights) == _described(call)

    def run(self, half: int) -> None:
        """First launch by launch (which compiles the kernels), later as a graph."""
        launches, graph = self.lowering.halves[half], self.graphs[half]
        if self.device.type != "cuda" or INTERPRETED or torch.cuda.is_current_stream_capturing():
            self._launch(launches)
        elif graph is not None:
            graph.replay()
        elif self.ran[half] == 0:
            self._launch(launches)
        else:
            graph = torch.cuda.CUDAGraph()
            stream = torch.cuda.Stream(self.device)  # torch's own is on the device that captured first
            with CAPTURING, torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self._launch(launches)
            self.graphs[half] = graph
            graph.replay()
        self.ran[half] += 1

    def _launch(self, launches: list[Launch]) -> None:
        self.storage.finite.fill_(1)
        for launch in launches:
            launch()


class State:
    """Between the halves: the workspace goes back when nobody can ask for the reverse half any more."""

    def __init__(self, call: Call, workspace: Workspace) -> None:
        self.call, self.workspace = call, workspace


class TritonExecutor:
    """Runs ``plan`` in float32. ``precision``: "highest" (products with the error of float32) | "high" (HVP passes in TF32) | "medium"
    (products in three of bfloat16, HVP passes in bfloat16)."""

    name = "triton"

    def __init__(self, plan: Plan, precision: str = "high") -> None:
        self.plan, self.fused, self.precision = plan, fuse(plan), precision
        self._idle: OrderedDict[Any, list[Workspace]] = OrderedDict()
        KEEPERS.add(self)

    @staticmethod
    def why_not(plan: Plan, device: torch.device) -> str | None:
        """Why the executor cannot run a Plan on a device, or None."""
        if device.type == "cpu" and not INTERPRETED:
            return "the Triton kernels were imported to be compiled; the interpreter needs TRITON_INTERPRET=1 from the start"
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
            return f"{torch.cuda.get_device_name(device)} has compute capability {torch.cuda.get_device_capability(device)}, the kernels need 8.0"
        missing = next((instr.kernel for _, instr in plan.instructions() if instr.kernel not in RULES), None)
        if missing is not None:
            return f"there is no Triton kernel for {missing}"
        try:
            Lowering(plan, Bucket(1, 1, 1), "meta")
        except NotImplementedError as error:
            return str(error)
        return None

    def memory(self, batch: TaskBatch) -> dict[str, int]:
        """Bytes that a call lays out on the device and keeps for the next one, beside the caller's tensors and the results."""
        return Lowering(self.fused, Bucket.of(batch.support_sizes, batch.query_sizes), "meta", self.precision).bytes

    # ------------------------------------------------------------------------------------------------------- running
    @torch.no_grad()
    def forward(self, call: Call) -> Results:
        batch, device = call.batch, call.batch.device
        with _on(device):
            key, workspace = self._take(call, device)
            workspace.describe(call)
            stored = zip(_DATA, (batch.support_x, batch.support_y, batch.query_x, batch.query_y), strict=True)
            given = {**call.weights, **call.rates, **call.leaves, **dict(stored)}
            for name in self.plan.inputs:
                if name not in self.plan.late:
                    workspace.storage.write(name, given[name])
            workspace.run(0)
            results = self._results(workspace, call, 0)
            if self.plan.entries == 1:
                self._give_back(key, workspace)
            else:
                results.state = state = State(call, workspace)
                weakref.finalize(state, self._give_back, key, workspace)
        return results

    @torch.no_grad()
    def reverse(self, state: State, given: Mapping[str, Tensor]) -> Results:
        with _on(state.workspace.device):
            for name in self.plan.late:
                state.workspace.storage.write(name, given[name])
            state.workspace.run(1)
            return self._results(state.workspace, state.call, 1)

    def _results(self, workspace: Workspace, call: Call, half: int) -> Results:
        """Copies of everything that leaves with this half. Nothing waits for the device until somebody asks whether all tasks are finite."""
        storage, written = workspace.storage, workspace.lowering.written[half]
        values: dict[Any, Any] = {}
        for name in self.plan.results:
            buffer = self.plan.buffers[name]
            slots = sorted(slot for n, slot in written if n == name)
            rows = self._rows(call.batch, buffer.rows)
            if not slots:
                continue
            if buffer.kind in ("mask", "index"):
                for slot in slots if call.record else ():
                    values[name, slot] = self._decisions(storage.read(name, slot, sum(rows)), buffer.kind, rows)
            elif buffer.steps:
                values[name] = torch.stack([storage.read(name, slot) for slot in slots], 0 if buffer.home == "meta" else 1)
            else:
                values[name] = storage.read(name, 0, sum(rows))
        return DeviceResults(values, storage.finite.bool(), None, self.name, True if capturing(workspace.device) else None, self.precision)

    @staticmethod
    def _decisions(rows: Tensor, kind: str, sizes: list[int]) -> list[Tensor]:
        return list((rows.bool() if kind == "mask" else rows.long()).split(sizes))

    @staticmethod
    def _rows(batch: TaskBatch, extent: str | None) -> list[int]:
        sizes = {"support": batch.support_sizes, "query": batch.query_sizes}
        return [s + q for s, q in zip(*sizes.values(), strict=True)] if extent == "joint" else list(sizes.get(extent, ()))

    # ------------------------------------------------------------------------------------------------------- workspaces
    def _take(self, call: Call, device: torch.device) -> tuple[Any, Workspace]:
        batch, bucket = call.batch, Bucket.of(call.batch.support_sizes, call.batch.query_sizes)
        if capturing(device):
            return None, self._take_for_good(call, bucket, device)
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        key = (bucket, device, stream)
        idle = self._idle.setdefault(key, [])
        self._idle.move_to_end(key)
        try:
            return key, idle.pop()  # atomic: two threads never get the same one
        except IndexError:
            pass
        with torch.inference_mode(False):  # later calls write to what this one lays out
            return key, with_room(lambda: Workspace(self.fused, bucket, device, self.precision), len(batch), device, lambda: self.memory(batch))

    def _take_for_good(self, call: Call, bucket: Bucket, device: torch.device) -> Workspace:
        """For a graph that the caller captures: one that is laid out, with tables filled, as nothing can be copied from the host meanwhile."""
        for (of, on, _), idle in self._idle.items():
            found = next((w for w in idle if w.is_for(call) and all(w.ran)), None) if (of, on) == (bucket, device) else None
            if found is not None:
                idle.remove(found)
                keep_for_graph(device, found, call)
                return found
        raise RuntimeError("the triton executor has no memory laid out for tasks of these sizes and weights: call it once (and backward) before each capture of a graph")

    def let_go(self) -> None:
        """Of the workspaces that nobody uses."""
        for idle in list(self._idle.values()):
            idle.clear()

    def _give_back(self, key: Any, workspace: Workspace) -> None:
        if key is None:
            return
        self._idle.setdefault(key, []).append(workspace)
        while sum(map(len, self._idle.values())) > WORKSPACES:
            oldest = next((k for k, kept in self._idle.items() if kept), key)
            del self._idle[oldest]


def _described(call: Call) -> tuple[Any, list[float]]:
    """Sizes and ways, and weights, of the tasks of a call."""
    batch = call.batch
    sizes = (batch.support_sizes, batch.query_sizes, None if batch.ways is None else tuple(batch.ways.tolist()))
    return sizes, [call.task_weight(t) for t in range(len(batch))]


def _on(device: torch.device) -> Any:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
