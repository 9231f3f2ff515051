"""What is wrong with tasks, in words: checks of shapes, counts and devices, which read no data.

ValueError or TypeError names the argument, what it is and what is expected."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

Shape = torch.Size
NAMES = ("support_x", "support_y", "query_x", "query_y")
ACCEPTED = (
    "a TaskBatch, a tuple (support_x, support_y, query_x, query_y) of tensors [tasks, n, ...], a list of such tuples"
    " with one task each, or a dict {'support': (x, y), 'query': (x, y)} ('train' and 'test' are accepted too)"
)


def check_part(part: str, x: Tensor, y: Tensor, sizes: tuple[int, ...]) -> None:
    if min(sizes) <= 0:
        raise ValueError(f"task {sizes.index(min(sizes))} has {min(sizes)} {part} rows: every task needs at least one")
    rows = sum(sizes)
    if not x.ndim or not y.ndim or x.shape[0] != rows or y.shape[0] != rows:
        raise ValueError(
            f"{part}_x has shape {list(x.shape)} and {part}_y {list(y.shape)}: expected {rows} rows in each,"
            f" the sum of the sizes of the {len(sizes)} tasks"
        )


def check_rows(name: str, support: torch.Size, query: torch.Size) -> None:
    if support != query:
        raise ValueError(
            f"query_{name} has rows of shape {list(query)} but support_{name} has rows of shape {list(support)}:"
            " they must agree"
        )


def check_device(sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> None:
    if sx.is_cpu and sy.is_cpu and qx.is_cpu and qy.is_cpu:  # asked at every call, and cheaper than comparing
        return
    device = sx.device
    if sy.device != device or qx.device != device or qy.device != device:
        where = ", ".join(f"{name} on {x.device}" for name, x in zip(NAMES, (sx, sy, qx, qy), strict=True))
        raise ValueError(f"all tensors of a batch must be on one device, got {where}: move them first, x.to(device)")


def as_tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biufc":
            raise TypeError(f"{name} is {describe(value)}: expected numbers")
        # torch shares the memory of an array, which it can neither do with a read-only one nor with negative strides
        shareable = value.flags.writeable and value.dtype.isnative and min(value.strides, default=0) >= 0
        return torch.from_numpy(value if shareable else np.array(value, dtype=value.dtype.newbyteorder("=")))
    raise TypeError(f"{name} is {describe(value)}: expected a torch.Tensor or a NumPy array")


def part_of(tasks: Mapping, name: str, torchmeta_name: str) -> tuple[Any, Any]:
    key = name if name in tasks else torchmeta_name
    if key not in tasks:
        raise TypeError(f"the dict of tasks has the keys {list(tasks)} but neither {name!r} nor {torchmeta_name!r}")
    pair = tasks[key]
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"tasks[{key!r}] is {describe(pair)}: expected a pair (x, y)")
    return pair[0], pair[1]


def checked_ways(ways: Any, tasks: int) -> Tensor:
    if isinstance(ways, int):
        ways = [ways] * tasks
    ways = torch.as_tensor(ways)
    if ways.is_floating_point() or ways.is_complex() or ways.dtype == torch.bool:
        raise TypeError(f"ways is {describe(ways)}: expected integers")
    if ways.shape != (tasks,):
        raise ValueError(
            f"ways has shape {list(ways.shape)} but the batch has {tasks} tasks: expected one int, or [{tasks}]"
        )
    ways = ways.to("cpu", torch.int64)
    if int(ways.min()) < 1:
        raise ValueError(f"ways of task {int(ways.argmin())} is {int(ways.min())}: expected at least 1")
    return ways


def sizes_of(name: str, offsets: Any) -> tuple[int, ...]:
    offsets = torch.as_tensor(offsets)
    if offsets.ndim != 1 or len(offsets) < 1 or offsets.is_floating_point():
        raise ValueError(f"{name} is {describe(offsets)}: expected integers [tasks + 1]")
    if int(offsets[0]) != 0:
        raise ValueError(f"{name}[0] is {int(offsets[0])}: offsets begin with 0")
    return tuple(offsets.diff().tolist())


@lru_cache(maxsize=64)  # every meta-iteration comes with the same shapes
def equal_sizes(sx: Shape, sy: Shape, qx: Shape, qy: Shape) -> tuple[tuple[int, ...], tuple[int, ...], tuple[Shape, Shape]]:
    """support_sizes, query_sizes and row_shapes of tensors [tasks, n, ...] of these shapes; ValueError where they do not fit together."""
    for name, shape in zip(NAMES, (sx, sy, qx, qy), strict=True):
        if len(shape) < 2:
            raise ValueError(
                f"{name} has shape {list(shape)}: expected [tasks, n, ...]. For one task add the axis: {name}[None]"
            )
    for name, shape in zip(NAMES[1:], (sy, qx, qy), strict=True):
        if shape[0] != sx[0]:
            raise ValueError(
                f"{name} has {shape[0]} tasks but support_x has {sx[0]}"
                f" (shapes {list(shape)} and {list(sx)}; the first axis is the task)"
            )
    for part, x, y in (("support", sx, sy), ("query", qx, qy)):
        if y[1] != x[1]:
            raise ValueError(
                f"{part}_y has {y[1]} rows per task but {part}_x has {x[1]}"
                f" (shapes {list(y)} and {list(x)}; the second axis is the example)"
            )
    check_rows("x", sx[2:], qx[2:])
    check_rows("y", sy[2:], qy[2:])
    if sx[0] == 0:
        raise ValueError("the batch has 0 tasks: a meta-batch needs at least one")
    for part, x in (("support", sx), ("query", qx)):
        if x[1] == 0:
            raise ValueError(f"task 0 has 0 {part} rows: every task needs at least one")
    return (sx[1],) * sx[0], (qx[1],) * qx[0], (sx[2:], sy[2:])


def describe(value: Any) -> str:
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{str(value.dtype).removeprefix('torch.')} with shape {list(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)} ({', '.join(sorted({type(v).__name__ for v in value}))})"
    return f"a {type(value).__name__}"
