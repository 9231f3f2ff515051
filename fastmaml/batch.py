"""TaskBatch: one meta-batch of tasks, of equal or of different sizes, without padding.

Rows of all tasks lie one after another; offsets say where a task begins:

    support_x        [sum n_support, ...]       query_x        [sum n_query, ...]
    support_y        [sum n_support, ...]       query_y        [sum n_query, ...]
    support_offsets  [tasks + 1]                query_offsets  [tasks + 1]        (int64, on the CPU)

Only shapes, counts and devices are checked here; whether the labels suit the loss is the loss's question.
Construction reads shapes and no data: it never waits for a GPU.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmaml.batch_checks import (
    ACCEPTED,
    NAMES,
    Shape,
    as_tensor,
    check_device,
    check_part,
    check_rows,
    checked_ways,
    describe,
    equal_sizes,
    part_of,
    sizes_of,
)

_set = object.__setattr__  # past the frozen dataclass, while one is being built
TaskTensors = tuple[Tensor, Tensor, Tensor, Tensor]  # support_x, support_y, query_x, query_y


@lru_cache(maxsize=256)  # loaders yield batch after batch of the same sizes; nobody writes to offsets
def offsets_of(sizes: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *accumulate(sizes)], dtype=torch.int64)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class TaskBatch:
    """A meta-batch. Build it with `from_tensors`, `from_tasks`, `from_offsets`, or `of`, which takes any of these.

    support_x [sum n_support, ...], support_y [sum n_support] labels or [sum n_support, ...] targets, query_x and
    query_y likewise; support_sizes, query_sizes: rows of each task; ways: int64 [tasks] on the CPU, or None.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor
    support_sizes: tuple[int, ...]
    query_sizes: tuple[int, ...]
    ways: Tensor | None = None
    row_shapes: tuple[Shape, Shape] = field(init=False)  # of one row of x and of y
    _cache: dict[str, Tensor] = field(default_factory=dict, init=False)
    _given: TaskTensors | None = field(default=None, init=False)  # [tasks, n, ...], where the rows have not been joined yet

    def __post_init__(self) -> None:
        tasks = len(self.support_sizes)
        if tasks == 0:
            raise ValueError("the batch has 0 tasks: a meta-batch needs at least one")
        if len(self.query_sizes) != tasks:
            raise ValueError(f"query has {len(self.query_sizes)} tasks but support has {tasks}")
        check_part("support", self.support_x, self.support_y, self.support_sizes)
        check_part("query", self.query_x, self.query_y, self.query_sizes)
        check_rows("x", self.support_x.shape[1:], self.query_x.shape[1:])
        check_rows("y", self.support_y.shape[1:], self.query_y.shape[1:])
        check_device(self.support_x, self.support_y, self.query_x, self.query_y)
        if self.ways is not None:
            _set(self, "ways", checked_ways(self.ways, tasks))
        _set(self, "row_shapes", (self.support_x.shape[1:], self.support_y.shape[1:]))

    def __getattr__(self, name: str) -> Tensor:
        """Joins the rows of what came as [tasks, n, ...], the first time they are asked for."""
        if name not in NAMES:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        joined = self._given[NAMES.index(name)].flatten(0, 1)
        _set(self, name, joined)
        return joined

    def __reduce__(self) -> tuple:
        """Copies and pickles carry the rows once, joined."""
        return type(self), (self.support_x, self.support_y, self.query_x, self.query_y, self.support_sizes, self.query_sizes, self.ways)

    def stored(self) -> TaskTensors:
        """support_x, support_y, query_x, query_y as they lie in memory: rows joined, or still [tasks, n, ...]."""
        return self._given or (self.support_x, self.support_y, self.query_x, self.query_y)

    # -- building ------------------------------------------------------------------------------------------------------

    @classmethod
    def from_tensors(
        cls, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor, ways=None
    ) -> TaskBatch:
        """Tasks of equal size: x [tasks, n, ...], y [tasks, n] or [tasks, n, ...]. Views of contiguous tensors.

        ways: None, one int for all tasks, or one per task. Raises ValueError or TypeError naming the argument.
        """
        sx, sy = as_tensor("support_x", support_x), as_tensor("support_y", support_y)
        qx, qy = as_tensor("query_x", query_x), as_tensor("query_y", query_y)
        support_sizes, query_sizes, row_shapes = equal_sizes(sx.shape, sy.shape, qx.shape, qy.shape)
        check_device(sx, sy, qx, qy)
        batch = object.__new__(cls)  # all is checked, and every meta-iteration comes through here: rows are joined when asked for
        _set(batch, "_given", (sx, sy, qx, qy))
        _set(batch, "support_sizes", support_sizes)
        _set(batch, "query_sizes", query_sizes)
        _set(batch, "row_shapes", row_shapes)
        _set(batch, "ways", None if ways is None else checked_ways(ways, len(support_sizes)))
        _set(batch, "_cache", {})
        return batch

    @classmethod
    def from_tasks(cls, tasks: Iterable[Sequence[Tensor]], ways=None) -> TaskBatch:
        """Tasks of any sizes, each (support_x [n, ...], support_y [n, ...], query_x, query_y). Copies the rows."""
        parts: list[list[Tensor]] = [[], [], [], []]
        for t, task in enumerate(tasks):
            if not isinstance(task, (tuple, list)) or len(task) != 4:
                raise TypeError(f"task {t} is {describe(task)}: expected (support_x, support_y, query_x, query_y)")
            for name, column, value in zip(NAMES, parts, task, strict=True):
                value = as_tensor(f"{name} of task {t}", value)
                if value.ndim == 0:
                    raise ValueError(f"{name} of task {t} is a scalar: expected [n, ...]")
                first = column[0] if column else value
                # torch.cat would promote dtypes silently and name neither argument nor task otherwise
                if (value.shape[1:], value.dtype, value.device) != (first.shape[1:], first.dtype, first.device):
                    raise ValueError(
                        f"{name} of task {t} is {describe(value)} on {value.device}, that of task 0"
                        f" {describe(first)} on {first.device}: only the first axis may differ between tasks"
                    )
                column.append(value)
            for x, y, part in ((0, 1, "support"), (2, 3, "query")):
                if len(parts[x][-1]) != len(parts[y][-1]):
                    raise ValueError(
                        f"task {t}: {part}_y has {len(parts[y][-1])} rows but {part}_x has {len(parts[x][-1])}"
                    )
        if not parts[0]:
            raise ValueError("the list of tasks is empty: a meta-batch needs at least one")
        sizes = tuple(map(len, parts[0])), tuple(map(len, parts[2]))
        return cls(*(torch.cat(column) for column in parts), *sizes, ways)

    @classmethod
    def from_offsets(
        cls, support_x, support_y, query_x, query_y, support_offsets, query_offsets, ways=None
    ) -> TaskBatch:
        """Rows already joined: task t owns rows offsets[t] to offsets[t + 1]. Offsets [tasks + 1], 0 first, rising."""
        data = (as_tensor(n, x) for n, x in zip(NAMES, (support_x, support_y, query_x, query_y), strict=True))
        sizes = sizes_of("support_offsets", support_offsets), sizes_of("query_offsets", query_offsets)
        return cls(*data, *sizes, ways)

    @classmethod
    def of(cls, tasks: Any) -> TaskBatch:
        """Whatever a loader yields, as a TaskBatch: see `ACCEPTED`. Writable NumPy arrays are not copied."""
        if isinstance(tasks, (tuple, list)):
            if len(tasks) == 4 and isinstance(tasks[0], (Tensor, np.ndarray)):
                return cls.from_tensors(*tasks)
            if all(isinstance(task, (tuple, list)) for task in tasks):
                return cls.from_tasks(tasks)
        if isinstance(tasks, TaskBatch):
            return tasks
        if isinstance(tasks, Mapping):
            return cls.from_tensors(
                *part_of(tasks, "support", "train"), *part_of(tasks, "query", "test"), tasks.get("ways")
            )
        raise TypeError(f"cannot read tasks from {describe(tasks)}: pass {ACCEPTED}")

    # -- reading -------------------------------------------------------------------------------------------------------

    @property
    def tasks(self) -> int:
        return len(self.support_sizes)

    def __len__(self) -> int:
        return len(self.support_sizes)

    @property
    def uniform(self) -> bool:
        """Whether all tasks have the same sizes."""
        support, query = self.support_sizes, self.query_sizes
        return support.count(support[0]) == len(support) and query.count(query[0]) == len(query)

    @property
    def device(self) -> torch.device:
        return self.stored()[0].device

    @property
    def form(self) -> tuple:
        """All of a batch but its numbers: what is equal in this needs one check."""
        sx, sy, qx, qy = self.stored()
        return self.support_sizes, self.query_sizes, self.row_shapes, sx.dtype, sy.dtype, qx.dtype, qy.dtype, sx.device

    @property
    def support_offsets(self) -> Tensor:
        """int64 [tasks + 1] on the CPU: support rows of task t are support_offsets[t] to support_offsets[t + 1]."""
        return self._offsets("support", self.support_sizes)

    @property
    def query_offsets(self) -> Tensor:
        """int64 [tasks + 1] on the CPU."""
        return self._offsets("query", self.query_sizes)

    def _offsets(self, part: str, sizes: tuple[int, ...]) -> Tensor:
        offsets = self._cache.get(part)
        if offsets is None:
            offsets = self._cache[part] = offsets_of(sizes)
        return offsets

    def task(self, t: int) -> TaskTensors:
        """Task t (negative: from the end) as views (support_x, support_y, query_x, query_y)."""
        tasks = len(self)
        if not -tasks <= t < tasks:
            raise IndexError(f"task {t} of a batch of {tasks}")
        s, q = (slice(*offsets[t % tasks :][:2].tolist()) for offsets in (self.support_offsets, self.query_offsets))
        return self.support_x[s], self.support_y[s], self.query_x[q], self.query_y[q]

    def __iter__(self) -> Iterator[TaskTensors]:
        """Over the tasks, as `task(t)`."""
        s, q = self.support_sizes, self.query_sizes
        return zip(
            self.support_x.split(s), self.support_y.split(s), self.query_x.split(q), self.query_y.split(q), strict=True
        )

    def stacked(self) -> TaskTensors:
        """Views [tasks, n, ...] of (support_x, support_y, query_x, query_y); ValueError where sizes differ."""
        if not self.uniform:
            raise ValueError("tasks have different sizes and cannot be stacked: use task(t) or the offsets")
        shape = (len(self), -1)
        return tuple(x.unflatten(0, shape) for x in (self.support_x, self.support_y, self.query_x, self.query_y))

    def __repr__(self) -> str:
        def rows(sizes: tuple[int, ...]) -> str:
            return str(min(sizes)) if min(sizes) == max(sizes) else f"{min(sizes)}..{max(sizes)}"

        x, y = self.support_x, self.support_y
        return (
            f"TaskBatch({len(self)} tasks, support {rows(self.support_sizes)}, query {rows(self.query_sizes)} rows,"
            f" x {describe(x[0])}, y {describe(y[0])}, {self.device})"
        )

    # -- changing (a new batch each time) ------------------------------------------------------------------------------

    def _map(self, fn) -> TaskBatch:
        data = (fn(x) for x in (self.support_x, self.support_y, self.query_x, self.query_y))
        return TaskBatch(*data, self.support_sizes, self.query_sizes, self.ways)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None, non_blocking=False
    ) -> TaskBatch:
        """On another device; dtype applies to floating-point inputs and targets, never to labels or offsets."""
        if isinstance(device, torch.dtype):  # batch.to(torch.float64), as a tensor takes it
            device, dtype = None, device
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype={dtype}: expected a floating-point type; it applies to x and float targets only")
        return self._map(lambda x: x.to(device, dtype if x.is_floating_point() else None, non_blocking=non_blocking))

    def pin_memory(self) -> TaskBatch:
        """In page-locked memory, for `to(device, non_blocking=True)`. DataLoader(pin_memory=True) calls this."""
        return self._map(Tensor.pin_memory)

    def select(self, indices: int | slice | Sequence[int] | Tensor) -> TaskBatch:
        """The tasks with these indices, in this order (repeats allowed): views for neighbours in order, else copies."""
        tasks = len(self)
        if isinstance(indices, slice):
            chosen = list(range(tasks)[indices])
        else:
            if isinstance(indices, (Tensor, np.ndarray)):
                indices = indices.tolist()
            if isinstance(indices, int):
                indices = [indices]
            if any(isinstance(i, bool) for i in indices):
                raise TypeError("indices are booleans: pass task numbers, e.g. mask.nonzero()[:, 0]")
            chosen = [operator.index(i) for i in indices]
        wrong = [i for i in chosen if not -tasks <= i < tasks]
        if wrong:
            raise IndexError(f"indices {wrong[:5]} of a batch of {tasks} tasks")
        if not chosen:
            raise ValueError("indices select 0 tasks: a meta-batch needs at least one")
        chosen = [i % tasks for i in chosen]
        support = _row_picker(self.support_offsets.tolist(), chosen, self.device)
        query = _row_picker(self.query_offsets.tolist(), chosen, self.device)
        return TaskBatch(
            support(self.support_x), support(self.support_y), query(self.query_x), query(self.query_y),
            tuple(self.support_sizes[i] for i in chosen), tuple(self.query_sizes[i] for i in chosen),
            None if self.ways is None else self.ways[chosen],
        )  # fmt: skip


def _row_picker(offsets: list[int], chosen: list[int], device: torch.device):
    if chosen == list(range(chosen[0], chosen[0] + len(chosen))):
        rows = slice(offsets[chosen[0]], offsets[chosen[-1] + 1])
        return lambda x: x[rows]
    index = torch.cat([torch.arange(offsets[t], offsets[t + 1]) for t in chosen]).to(device)
    return lambda x: x.index_select(0, index)
