"""Runs one CPU kernel on torch tensors, laid out as the executor lays them out, and judges it by rule (c) of DESIGN.md, section 5.

Rows lie in padded strides with a gap behind them, everything that a kernel must not read or write is poisoned (bytes 255: a NaN), outputs too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastmaml import _cpu
from fastmaml.executors.torch_kernels import KERNELS

TIERS = _cpu.tiers()
LANE = 16
CHANNELS, ROWS = (1, 7, 16, 63, 65), (1, 5, 23)
SHAPES = [(n, c) for n in ROWS for c in CHANNELS]
worst: dict[str, float] = {}  # kernel -> largest error / allowed error of this run


class Operand:
    """``value`` None: an output of ``shape``; ``over``: written in place of that operand.

    Kinds: rows [n, c] (padded), plain [n, c] (the user's array: no padding), mask [n, c], label [n], vector [c] (padded), scalar [].
    """

    def __init__(self, kind: str, value: Tensor | None = None, shape: tuple[int, ...] = (), over: int | None = None) -> None:
        self.kind, self.value, self.over = kind, value, over
        self.shape = shape if value is None else tuple(value.shape)
        self.dtype = {"mask": torch.uint8, "label": torch.int64}.get(kind, torch.float32)
        self.by_row = kind in ("rows", "plain", "mask", "label")
        self.width = 1 if kind in ("label", "scalar") else self.shape[-1]
        padded = kind in ("rows", "mask", "vector")
        self.padded = -(-self.width // LANE) * LANE if padded else self.width
        self.stride = self.dtype.itemsize * (self.padded + (LANE if padded else 0))

    def pack(self) -> None:
        rows = self.shape[0] if self.by_row else 1
        self.bytes = torch.full((rows + 2, self.stride), 255, dtype=torch.uint8)  # a row of poison before and behind
        if self.value is not None:
            self.padding().zero_()
            self.data().copy_(self.value.reshape(rows, self.width))
        self.before = self.bytes.clone()

    def data(self) -> Tensor:
        return self.bytes[1:-1].view(self.dtype)[:, : self.width]

    def padding(self) -> Tensor:
        return self.bytes[1:-1].view(self.dtype)[:, self.width : self.padded]

    def pointer(self, row0: int) -> int:
        return self.bytes.data_ptr() + self.stride * (1 + (row0 if self.by_row else 0))

    def unpack(self) -> Tensor:
        assert not self.padding().any(), "the padding must stay zero"  # NaN is true
        used = self.padded * self.dtype.itemsize
        assert torch.equal(self.bytes[1:-1, used:], self.before[1:-1, used:]), "written behind a row"
        assert torch.equal(self.bytes[[0, -1]], self.before[[0, -1]]), "written outside"
        return self.data().reshape(self.shape).clone()


def operand(kind: str, value: Tensor | None) -> Operand | None:
    return None if value is None else Operand(kind, value)


def rows(value: Tensor | None) -> Operand | None:
    return operand("rows", value)


def vector(value: Tensor | None) -> Operand | None:
    return operand("vector", value)


def out(kind: str, *shape: int, over: int | None = None) -> Operand:
    return Operand(kind, None, shape, over)


@dataclass
class Case:
    """One call: operands in the order of kernels.h, and what the reference of torch_kernels.py needs to know."""

    kernel: str
    inputs: Sequence[Operand | None]
    outputs: Sequence[Operand | None]
    n: int
    sizes: list[int]
    numbers: list[float] = field(default_factory=list)
    attrs: dict[str, Any] = field(default_factory=dict)
    support: int = 0  # rows of the support; the others of n are the query's
    ways: int = 0

    def run(self, tier: str, block: int | None = None, parts: int = 1) -> list[Tensor | None]:
        """The outputs, computed in blocks of that many rows by a team of that many members, one after another."""
        operands = [*self.inputs, *self.outputs]
        given = [operand for operand in operands if operand is not None]
        for operand in given:
            operand.pack()
        block, task = block or self.n, (0, self.support, self.n - self.support, self.ways)
        home = [o if o is None or o.over is None else operands[o.over] for o in operands]
        for row0 in range(0, self.n, block):
            count = min(block, self.n - row0)
            pointers = [0 if o is None else o.pointer(row0) for o in home]
            strides = [0 if o is None else o.stride for o in home]
            for part in range(parts):
                edge = row0 == 0, row0 + count == self.n
                _cpu.call_kernel(
                    tier, self.kernel, pointers, strides, count, row0, self.n, *edge, part, parts, self.sizes, self.numbers, task
                )
        overwritten = {id(home[i]) for i, o in enumerate(operands) if o is not None and o.value is None}
        for operand in given:
            assert id(operand) in overwritten or torch.equal(operand.bytes, operand.before), "an input was written"
        first = len(self.inputs)
        return [None if o is None else home[first + i].unpack() for i, o in enumerate(self.outputs)]

    def reference(self, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        def cast(operand: Operand | None) -> Tensor | None:
            if operand is None:
                return None
            return operand.value.to(dtype) if operand.value.is_floating_point() else operand.value

        task = SimpleNamespace(
            rows={"support": self.support, "query": self.n - self.support, "joint": self.n}, ways=self.ways
        )
        result = KERNELS[self.kernel](task, self.attrs, *map(cast, self.inputs))
        return result if isinstance(result, tuple) else (result,)

    def judge(self, got: Sequence[Tensor | None], where: str = "") -> None:
        """Rule (c): at most twice float32 torch's own error plus 2^-21 of the result's norm."""
        for i, (mine, truth, plain) in enumerate(
            zip(got, self.reference(torch.float64), self.reference(torch.float32), strict=True)
        ):
            if mine is None:
                continue
            truth = torch.zeros(mine.shape, dtype=torch.float64) if truth is None else truth.double()
            own = 0.0 if plain is None else float((plain.double() - truth).norm())
            error, allowed = float((mine.double() - truth).norm()), 2 * own + 2.0**-21 * float(truth.norm())
            if allowed > 0:
                worst[self.kernel] = max(worst.get(self.kernel, 0.0), error / allowed)
            assert error <= allowed, f"{self.kernel} output {i} {where}: error {error:.3g}, allowed {allowed:.3g}"

    def check(self, tier: str, blocks: Sequence[int | None] = (None, 1, 4), elementwise: bool = False) -> list[Tensor | None]:
        """In blocks and by teams. ``elementwise``: blocks must not even change a bit."""
        whole = self.run(tier)
        for block in blocks:
            if block is not None and block >= self.n:
                continue
            got = self.run(tier, block)
            self.judge(got, f"{tier} n={self.n} sizes={self.sizes} block={block}")
            if elementwise:
                assert same_bits(got, whole), f"{self.kernel}: blocks of {block} change bits"
        for parts in (2, 3):
            block = None if parts == 2 else min(4, self.n)
            assert same_bits(self.run(tier, block, parts), self.run(tier, block)), f"{self.kernel}: {parts} parts change bits"
        return whole


def same_bits(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> bool:
    return all(
        (x is None) == (y is None) and (x is None or torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8)))
        for x, y in zip(a, b, strict=True)
    )


def normal(*shape: int, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1009 + sum(shape))
    return torch.randn(shape, generator=generator) * scale + shift


def exact(number: float) -> float:
    """The float32 nearest to a number: what a kernel is given."""
    return float(torch.tensor(number, dtype=torch.float32))
