"""Where the buffers of a Plan lie on the device: all tasks of a batch at once, rows of all tasks one after another.

Images are stored channels last, weights of convolutions [kh][kw][in][out]; everything else as the Plan has it. A Storage is laid out for a bucket: a number of tasks
and the most rows that one of them may have. On the device "meta" it is a layout without memory, from which bytes are counted and kernels compiled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastmaml.plan.instructions import EXTENTS, Buffer, Plan, Ref
from fastmaml.plan.memory import arena_layout

DTYPES = {"mask": torch.uint8, "index": torch.int32, "label": torch.int64}
ALIGN = 64  # numbers: slots begin at multiples, so that kernels may read them in large pieces
MOST_TASKS = 65535  # the second and third dimension of a grid
LARGEST = 2**31  # numbers of an array: offsets within the rows of all tasks are 32 bits


@dataclass(frozen=True)
class Bucket:
    """Batches that share a layout and a captured graph: how many tasks, and the most rows of one of them."""

    tasks: int
    support: int
    query: int

    def rows(self, extent: str) -> int:
        return {"support": self.support, "query": self.query, "joint": self.support + self.query}[extent]

    @staticmethod
    def of(support_sizes: tuple[int, ...], query_sizes: tuple[int, ...]) -> Bucket:
        """Of tasks of one size exactly theirs; else rounded up to powers of two, so that ever new sizes share few buckets."""
        support, query = max(support_sizes), max(query_sizes)
        if min(support_sizes) != support or min(query_sizes) != query:
            support, query = (1 << (n - 1).bit_length() for n in (support, query))
        return Bucket(len(support_sizes), support, query)


@dataclass(frozen=True)
class View:
    """An operand of a launch: one slot of a buffer.

    data    its numbers; rows: the extent of its samples, or None
    shape   of a sample, or of the whole, in the Plan's order; task: numbers from one task's copy to the next, 0 where all share it
    """

    data: Any
    shape: tuple[int, ...]
    rows: str | None = None
    task: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def strides(self) -> tuple[int, ...]:
        """Of a weight, as it is stored."""
        if len(self.shape) == 4:
            out, into, h, w = self.shape
            return 1, out, w * into * out, into * out
        return tuple(math.prod(self.shape[i + 1 :]) for i in range(len(self.shape)))


@dataclass(frozen=True)
class Temp:
    """Numbers that live as long as one instruction; they get a place when all launches are known."""

    offset: int
    numel: int
    dtype: torch.dtype = torch.float32

    @property
    def bytes(self) -> int:
        return -(-self.numel * self.dtype.itemsize // 256) * 256


@dataclass(frozen=True)
class Arrivals:
    """Counts of the programs of a launch that are through with something; all launches use the same, which are zero between them."""

    numel: int


def _turned(buffer: Buffer, back: bool = False) -> tuple[int, ...]:
    """The axes of a stored array in the Plan's order; ``back``: the other way round."""
    if buffer.rows and len(buffer.shape) == 3:
        return (2, 0, 1) if back else (1, 2, 0)
    if not buffer.rows and len(buffer.shape) == 4:
        return (3, 2, 0, 1) if back else (2, 3, 1, 0)
    return tuple(range(len(buffer.shape)))


def _permute(value: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Permutes the last axes."""
    lead = value.dim() - len(axes)
    return value.permute((*range(lead), *(lead + a for a in axes)))


def key_of(plan: Plan, ref: Ref, step: int) -> tuple[str, int]:
    """(buffer, slot) of a use at a step of the schedule."""
    buffer = plan.buffers[ref.buffer]
    if not buffer.steps:
        return ref.buffer, 0
    slot = step + ref.shift
    return (buffer.first, 0) if buffer.first and slot == 0 else (ref.buffer, slot)


class Storage:
    """The arrays of a Plan's buffers, and the tables of the rows of the tasks.

    offsets[extent] [tasks + 1], joined[extent] = [0, all rows], one = [0, 1], ways [tasks], task_weights [tasks], finite [tasks]
    """

    def __init__(self, plan: Plan, bucket: Bucket, device: torch.device | str, shares: Mapping[str, int] | None = None) -> None:
        self.plan, self.bucket, self.device = plan, bucket, torch.device(device)
        self.bytes: dict[str, int] = {}
        tasks, item = bucket.tasks, 4
        sizes = {f"offsets.{e}": tasks + 1 for e in EXTENTS} | {f"joined.{e}": 2 for e in EXTENTS} | {"one": 2, "ways": tasks}
        self.table = self._new("tables", sum(sizes.values()), torch.int32)
        parts = dict(zip(sizes, self.table.split(list(sizes.values())), strict=True))
        self.offsets, self.joined = ({e: parts[f"{kind}.{e}"] for e in EXTENTS} for kind in ("offsets", "joined"))
        self.one, self.ways = parts["one"], parts["ways"]
        self.task_weights = self._new("tables", tasks)
        self.finite = self._new("tables", tasks, torch.int32)
        offsets, arena = arena_layout(plan, lambda b: self.width(b) * (8 if b.columns else self._dtype(b).itemsize), item * ALIGN)
        whole = self._new("scratch", arena, torch.uint8)
        self.arrays: dict[str, Tensor] = {}
        if tasks > MOST_TASKS:
            raise ValueError(f"{tasks:,} tasks at once, the Triton kernels are launched for at most {MOST_TASKS:,}: pass fewer")
        for name, buffer in plan.buffers.items():
            dtype = self._dtype(buffer)
            if self.width(buffer) >= LARGEST:
                raise ValueError(f"{name} of {tasks} tasks has {self.width(buffer):,} numbers, the Triton kernels count to {LARGEST:,}: pass fewer tasks at once")
            if name in offsets:
                self.arrays[name] = whole[offsets[name] :][: self.width(buffer) * dtype.itemsize].view(dtype)[None]
            else:
                slots = max(buffer.steps - 1 if buffer.first else buffer.steps, 1)
                width = -(-self.width(buffer) // ALIGN) * ALIGN
                self.arrays[name] = self._new(buffer.home, slots * width, dtype).view(slots, width)
        self.shares = {name: self._new("task", tasks * numel) for name, numel in (shares or {}).items()}

    def _new(self, home: str, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
        self.bytes[home] = self.bytes.get(home, 0) + numel * dtype.itemsize
        return torch.empty(numel, dtype=dtype, device=self.device)

    def sums(self, numel: int) -> Tensor:
        """Room for what is summed over tasks before anybody knows which of them are finite."""
        return self._new("task", numel)

    @staticmethod
    def _dtype(buffer: Buffer) -> torch.dtype:
        return torch.float64 if buffer.columns else DTYPES.get(buffer.kind, torch.float32)

    def width(self, buffer: Buffer) -> int:
        """Numbers of one slot."""
        if buffer.rows is None:
            return buffer.numel * (1 if buffer.home == "meta" else self.bucket.tasks)
        row = self.bucket.rows(buffer.columns) if buffer.columns else buffer.numel
        return self.bucket.tasks * self.bucket.rows(buffer.rows) * row

    # ------------------------------------------------------------------------------------------------------- operands
    def key(self, ref: Ref, step: int) -> tuple[str, int]:
        return key_of(self.plan, ref, step)

    def slot(self, name: str, slot: int) -> Tensor:
        buffer = self.plan.buffers[name]
        return self.arrays[name][slot - 1 if buffer.first else slot, : self.width(buffer)]

    def view(self, name: str, slot: int) -> View:
        buffer = self.plan.buffers[name]
        shape = (self.bucket.rows(buffer.columns),) if buffer.columns else buffer.shape
        copies = buffer.rows is None and buffer.home != "meta"
        return View(self.slot(name, slot), shape, buffer.rows, buffer.numel if copies else 0)

    # ------------------------------------------------------------------------------------------------------- in and out
    def write(self, name: str, value: Tensor) -> None:
        """Fills a buffer with ``value``, in the Plan's order: [slots?, ...] of one array for all; [rows, ...]; [tasks, slots?, ...]."""
        buffer = self.plan.buffers[name]
        slots = value.unbind(0 if buffer.home == "meta" else 1) if buffer.steps else [value]
        for slot, part in enumerate(slots):
            self.write_slot(name, slot, part)

    def write_slot(self, name: str, slot: int, value: Tensor) -> None:
        turned = _permute(value.detach(), _turned(self.plan.buffers[name]))
        self.slot(name, slot)[: turned.numel()].view(turned.shape).copy_(turned)

    def read(self, name: str, slot: int, rows: int | None = None) -> Tensor:
        """A copy in the Plan's order: [tasks or rows, ...], or of one array for all."""
        buffer = self.plan.buffers[name]
        back = _turned(buffer, back=True)
        stored = [0] * len(back)
        for i, axis in enumerate(back):  # the sizes as they are stored
            stored[axis] = buffer.shape[i]
        lead = (rows,) if buffer.rows else () if buffer.home == "meta" else (self.bucket.tasks,)
        flat = self.slot(name, slot)[: math.prod((*lead, *stored))]
        return _permute(flat.view((*lead, *stored)), back).clone(memory_format=torch.contiguous_format)


def channels_last(shape: tuple[int, ...]) -> int:
    """Channels of rows as they are stored: images have them last, other rows count as one channel of themselves."""
    return shape[0] if len(shape) == 3 else 1


def same_order(x: tuple[int, ...], y: tuple[int, ...]) -> bool:
    """Whether rows of one shape are stored as the same numbers in another."""
    channels = {channels_last(x), channels_last(y)}
    return len(channels) == 1 or channels <= {1, math.prod(x)}


def with_task(view: View, data: Any, task: int) -> View:
    return replace(view, data=data, task=task)
