"""Where the rules of the Triton executor put what they launch: memory that lasts for an instruction, tables, elementwise walks, and layouts of rows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastmaml.executors.triton.fused import Activation, Update
from fastmaml.executors.triton.storage import Arrivals, Storage, Temp, View, channels_last
from fastmaml.kernels import reshape, tiles, update

Attrs = Mapping[str, Any]
Views = Sequence[View | None]
RULES: dict[str, Callable[..., None]] = {}
BLOCK = 1024  # numbers of an elementwise program
CHUNK = 4096  # rows (of samples times pixels) that one program sums
SUMMED = 64  # of these, rows of a tile


def rule(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def register(function: Callable[..., None]) -> Callable[..., None]:
        for name in names:
            RULES[name] = function
        return function

    return register


def activating(attrs: Attrs, mask: str = "mask") -> dict[str, Any]:
    """Arguments of a kernel that ends in an activation; ``mask``: its name there."""
    activation: Activation | None = attrs.get("activation")
    if activation is None:
        return {mask: None, "ACTIVATION": None, "SLOPE": None}
    return {mask: data(activation.mask), "ACTIVATION": "make" if activation.makes else "apply", "SLOPE": activation.slope}


def updating(prefix: str, update: Update | None) -> dict[str, Any]:
    """Arguments of a kernel that ends in an update."""
    base, scale, sign = (None, None, 1.0) if update is None else (update.base, update.scale, update.sign)
    args = dict(base=data(base), scale=data(scale), sign=sign, base_task=step(base), scale_task=step(scale))
    return {prefix + name: value for name, value in args.items()}


@dataclass
class Launch:
    """``kernel[grid](**arguments, **options)``; a Temp among the arguments stands for its place."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)

    def __call__(self) -> None:
        self.kernel[self.grid](**self.arguments, **self.options)


def power(n: int, least: int = 1, most: int = 1 << 30) -> int:
    """The power of two that n fits into, between bounds."""
    return min(max(1 << (n - 1).bit_length(), least), most)


def blocks(n: int, size: int) -> int:
    return -(-n // size)


def data(view: View | None) -> Any:
    return None if view is None else view.data


def step(view: View | None) -> int:
    return 0 if view is None else view.task


def pointer(view: View | None) -> int:
    """Where the numbers lie, for a table of addresses (storage does not move); 0: nowhere."""
    return 0 if view is None else view.data.data_ptr()


class Site:
    """What a rule needs besides its operands. ``tasks`` 1 where a phase runs once for all."""

    def __init__(self, storage: Storage) -> None:
        self.storage, self.bucket = storage, storage.bucket
        self.tasks, self.precision = storage.bucket.tasks, "tf32x3"
        self.launches: list[Launch] = []
        self.constants: dict[tuple[int, ...], Tensor] = {}
        self.terms: list[tuple[Any, ...]] | None = None
        self.temp_bytes = self._top = self.arrivals = 0

    def begin(self) -> None:
        """A new instruction: its temporaries may lie where the last one's did."""
        self._top = 0

    def temp(self, numel: int, dtype: torch.dtype = torch.float32) -> Temp:
        out = Temp(self._top, numel, dtype)
        self._top += out.bytes
        self.temp_bytes = max(self.temp_bytes, self._top)
        return out

    def counts(self, numel: int) -> Arrivals:
        self.arrivals = max(self.arrivals, numel)
        return Arrivals(numel)

    def table(self, numbers: Sequence[int]) -> Tensor:
        """Constants on the device, kept as long as the launches."""
        key = tuple(numbers)
        if key not in self.constants:
            self.constants[key] = torch.tensor(key, dtype=torch.int32, device=self.storage.device)
        return self.constants[key]

    def launch(self, kernel: Any, grid: tuple[int, ...], options: dict[str, int] | None = None, /, **arguments: Any) -> None:
        self.launches.append(Launch(kernel, grid, arguments, {"enable_fp_fusion": True, **(options or {})}))  # Triton's default is about to change

    def span(self, view: View) -> tuple[Tensor, int, int]:
        """(count, numbers in all, copies) of an elementwise walk: all rows at once, or each copy of a weight."""
        if view.rows:
            return self.storage.joined[view.rows][1:], self.bucket.tasks * self.bucket.rows(view.rows) * view.numel, 1
        return self.storage.one[1:], view.numel, self.tasks if view.task else 1

    def offsets(self, extent: str, *operands: View | None) -> tuple[Tensor, int, int]:
        """(offsets, most rows of a task, tasks); the rows of all tasks as one task's where no operand is a task's own."""
        if any(step(v) for v in operands):
            return self.storage.offsets[extent], self.bucket.rows(extent), self.tasks
        return self.storage.joined[extent], self.bucket.tasks * self.bucket.rows(extent), 1

    def own(self, extent: str) -> tuple[Tensor, int, int]:
        """The same, always by task."""
        return self.storage.offsets[extent], self.bucket.rows(extent), self.tasks

    def like(self, view: View) -> View:
        """A temporary in the shape of some rows."""
        return replace(view, data=self.temp(self.bucket.tasks * self.bucket.rows(view.rows) * view.numel))

    def arrays(self, rows: Sequence[Sequence[int]], programs: Sequence[int]) -> tuple[int, dict[str, Tensor]]:
        """(programs, arguments) of a kernel over several arrays (tiles.array_of): of each what it has to know, and its number of blocks.

        ``rows`` may hold addresses, of what lives as long as the launches: storage."""
        blocks = [number for a, n in enumerate(programs) for block in range(n) for number in (a, block)]
        return sum(programs), dict(blocks=self.table(blocks), arrays=torch.tensor(rows, dtype=torch.int64, device=self.storage.device))

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What is added to arrays in here, none of which has to do with another, is one launch."""
        self.terms = []
        yield
        terms, self.terms = self.terms, None
        alike: dict[tuple[float, int], list[tuple[View | None, ...]]] = {}
        for *operands, sign in terms:
            alike.setdefault((sign, self.span(operands[0])[2]), []).append(tuple(operands))
        for (sign, copies), some in alike.items():
            if len(some) == 1:
                self.axpy(*some[0], sign)
                continue
            rows = [[*map(pointer, operands), operands[0].numel, *map(step, operands)] for operands in some]
            programs, args = self.arrays(rows, [blocks(operands[0].numel, BLOCK) for operands in some])
            self.launch(update.axpys, (programs, copies), **args, sign=sign, BLOCK=BLOCK)

    def axpy(self, y: View, a: View | None, s: View | None, b: View | None, sign: float = 1.0) -> None:
        """y = a + sign s b."""
        if self.terms is not None and not y.rows and (s is None or s.numel == 1):
            self.terms.append((y, a, s, b, sign))
            return
        offsets, (count, n, copies) = None, self.span(y)
        if y.rows and step(s):  # each task's rows by a number of its own
            offsets, most, copies = self.own(y.rows)
            n = most * y.numel
        args = dict(count=count, offsets=offsets, a=data(a), s=data(s), b=data(b), y=y.data, sign=sign, per=y.numel)
        args |= dict(a_task=step(a), s_task=step(s), b_task=step(b), y_task=y.task)
        self.launch(update.axpy, (blocks(n, BLOCK), copies), **args, EACH=s is not None and s.numel > 1, BLOCK=BLOCK)

    def dot(self, y: View, acc: View | None, a: View, b: View, sign: float) -> None:
        """y = acc + sign <a, b> of each task."""
        table = self.storage.offsets[a.rows] if a.rows else None
        args = dict(offsets=table, a=a.data, b=b.data, acc=data(acc), y=y.data, sign=sign, per=a.numel)
        self.launch(update.dot, (self.tasks,), **args, a_task=a.task, b_task=b.task, acc_task=step(acc), y_task=y.task, BLOCK=BLOCK)

    def reshape(self, x: View, y: View, xc: int, yc: int) -> None:
        """Rows of x, of xc channels behind the pixels, as rows of y."""
        count, n, _ = self.span(y)
        self.launch(reshape.reshape, (blocks(n, BLOCK),), count=count, x=x.data, y=y.data, NUMEL=y.numel, XC=xc, YC=yc, BLOCK=BLOCK)

    def sum_chunks(self, table: Tensor, x: Temp, y: View, chunk: int, per_row: int, chunks: int, n: int, update: Update | None = None) -> None:
        size = power(n, 16, 256)
        args = dict(offsets=table, x=x, y=y.data, chunk=chunk, per_row=per_row, chunks=chunks, n=n, y_task=y.task, **updating("", update))
        self.launch(tiles.sum_chunks, (blocks(n, size), self.tasks), **args, BS=16, BN=size)



# ---------------------------------------------------------------------------------------------------------------- layouts
def plain(s: Site, view: View | None) -> View | None:
    """Rows in the Plan's order."""
    if view is None or channels_last(view.shape) in (1, view.numel):
        return view
    out = s.like(view)
    s.reshape(view, out, channels_last(view.shape), 1)
    return out


def by_channel(s: Site, view: View | None) -> View | None:
    """Rows with channels last, whatever they are."""
    if view is None or len(view.shape) in (1, 3) or view.shape[0] in (1, view.numel):
        return view
    out = s.like(view)
    s.reshape(view, out, 1, view.shape[0])
    return out


def delivered(s: Site, y: View, channels: int) -> tuple[View, Callable[[], None]]:
    """Where a kernel may write rows with that many channels behind the pixels, and what then brings them to ``y``."""
    if channels == channels_last(y.shape) or {channels, channels_last(y.shape)} <= {1, y.numel}:
        return y, lambda: None
    out = s.like(y)
    return out, lambda: s.reshape(out, y, channels, channels_last(y.shape))
