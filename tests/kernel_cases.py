"""Runs one CPU kernel on torch tensors, laid out as the executor does it, and judges it by rule (c) of DESIGN.md.

Rows lie in padded strides with a gap behind them; what a kernel must not read or write is poisoned (bytes 255: a NaN),
and so are outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmaml import _cpu
from fastmaml.executors.cpu.rules import native
from fastmaml.executors.torch.kernels import KERNELS
from fastmaml.plan.instructions import Buffer, Instruction, Ref

TIERS = _cpu.tiers()  # and "device forward", "device reversed", "device shuffled7": the CUDA device functions as host code
LANE, PANEL, NARROW = 16, 64, 8  # as in plan.h
DTYPES = {"mask": torch.uint8, "bytes": torch.uint8, "ints": torch.int32, "label": torch.int64, "double": torch.float64}
Tensors = list[Tensor | None]
CHANNELS, ROWS = (1, 7, 16, 63, 65), (1, 5, 23)
SHAPES = [(n, c) for n in ROWS for c in CHANNELS]
IMAGES = [(1, 1, 1, 1), (5, 7, 6, 5), (2, 16, 1, 7), (3, 63, 5, 4), (1, 33, 9, 8)]  # n, c, h, w
worst: dict[str, float] = {}  # kernel -> largest error / allowed error of this run


def pad(n: int) -> int:
    return -(-n // LANE) * LANE


@cache
def packed(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """Where the elements of a packed [out, in] weight lie (plan.h), and where its padding does."""
    o, i = torch.arange(outputs)[:, None], torch.arange(inputs)
    if outputs <= NARROW:
        at, floats = o * pad(inputs) + i, outputs * pad(inputs)
    else:
        width = (pad(outputs) - o // PANEL * PANEL).clamp(max=PANEL)
        at, floats = o // PANEL * PANEL * inputs + i * width + o % PANEL, inputs * pad(outputs)
    rest = torch.ones(floats, dtype=torch.bool)
    rest[at] = False
    return at.flatten(), rest.nonzero().flatten()


@cache
def packed_conv(outputs: int, inputs: int, taps: int) -> tuple[Tensor, Tensor]:
    """The same for a [out, in, *taps] weight of a convolution."""
    o, i, t = torch.arange(outputs)[:, None, None], torch.arange(inputs)[:, None], torch.arange(taps)
    width = (pad(outputs) - o // PANEL * PANEL).clamp(max=PANEL)
    at = o // PANEL * PANEL * inputs * taps + (t * inputs + i) * width + o % PANEL
    rest = torch.ones(taps * inputs * pad(outputs), dtype=torch.bool)
    rest[at] = False
    return at.flatten(), rest.nonzero().flatten()


@cache
def pixels(c: int, h: int, w: int) -> tuple[Tensor, Tensor]:
    """Where the elements (c, h, w) of an image lie in [h][w][channels padded], and where its padding does."""
    positions = torch.arange(h * w * pad(c)).view(h, w, pad(c)).permute(2, 0, 1)
    return positions[:c].flatten(), positions[c:].flatten()


class Operand:
    """``value`` None: an output of ``shape``; ``over``: written in place of that operand.

    Kinds: rows [n, c] (padded), dense [n, c] (padded, nothing between them), plain [n, c] (the user's array: no
    padding), mask [n, c], label [n], double [n, m] (padding that nobody reads or writes), image [n, c, h, w] (channels
    last, padded), bytes and ints [n, c, h, w] (positions in windows; nobody cares for their padding), vector [...] (an
    array padded as a whole), packed [out, in] and conv [out, in, kh, kw] (packed weights), scalar
    [].
    """

    def __init__(self, kind: str, value: Tensor | None = None, shape: Sequence[int] = (), over: int | None = None):
        self.kind, self.value, self.over = kind, value, over
        self.shape = tuple(shape if value is None else value.shape)
        self.dtype = DTYPES.get(kind, torch.float32)
        self.by_row = kind not in ("vector", "packed", "conv", "scalar")
        self.padded = self.width = math.prod(self.shape[1:] if self.by_row else self.shape)
        if kind in ("rows", "dense", "mask", "vector"):
            self.padded = pad(self.width)
        self.used, self.rest = slice(self.width), slice(self.width, self.padded)
        if kind == "packed":
            self.used, self.rest = packed(*self.shape)
            self.padded = self.width + len(self.rest)
        if kind == "conv":
            self.used, self.rest = packed_conv(*self.shape[:2], math.prod(self.shape[2:]))
            self.padded = self.width + len(self.rest)
        if kind in ("image", "bytes", "ints"):
            self.used, self.rest = pixels(*self.shape[1:])
            self.padded = self.width + len(self.rest)
            self.rest = self.rest if kind == "image" else self.rest[:0]
        gap = 0 if kind in ("dense", "plain", "label", "scalar") else LANE
        self.stride = self.dtype.itemsize * (self.padded + gap)
        self.bytes: Tensor | None = None

    def pack(self) -> None:
        rows = self.shape[0] if self.by_row else 1
        self.bytes = torch.full((rows + 2, self.stride), 255, dtype=torch.uint8)  # a row of poison before and behind
        if self.value is not None:
            self.data()[:, self.rest] = 0
            self.data()[:, self.used] = self.value.reshape(rows, self.width).to(self.dtype)
        self.before = self.bytes.clone()

    def data(self) -> Tensor:
        return self.bytes[1:-1].view(self.dtype)

    def pointer(self, row0: int) -> int:
        return self.bytes.data_ptr() + self.stride * (1 + (row0 if self.by_row else 0))

    def unpack(self) -> Tensor:
        assert not self.data()[:, self.rest].any(), "the padding must stay zero"  # NaN is true
        end = self.padded * self.dtype.itemsize
        assert torch.equal(self.bytes[1:-1, end:], self.before[1:-1, end:]), "written behind a row"
        assert torch.equal(self.bytes[[0, -1]], self.before[[0, -1]]), "written outside"
        return self.data()[:, self.used].reshape(self.shape).clone()


def operand(kind: str, value: Tensor | None) -> Operand | None:
    return None if value is None else Operand(kind, value)


def rows(value: Tensor | None) -> Operand | None:
    return operand("rows", value)


def image(value: Tensor | None) -> Operand | None:
    return operand("image", value)


def vector(value: Tensor | None) -> Operand | None:
    return operand("vector", value)


def scalar(value: float | None) -> Operand | None:
    return None if value is None else Operand("scalar", torch.tensor(value))


def out(kind: str, *shape: int, over: int | None = None) -> Operand:
    return Operand(kind, None, shape, over)


def judge(what: tuple[str, int, str], norms: Sequence[float], slack: float = 0.0) -> None:
    error, own, truth = norms
    allowed = 2 * own + 2.0**-21 * truth + slack
    if allowed > 0:
        worst[what[0]] = max(worst.get(what[0], 0.0), error / allowed)
    assert error <= allowed, f"{what[0]} output {what[1]} {what[2]}: error {error:.3g}, allowed {allowed:.3g}"


class Pool:
    """Results of a few numbers, judged together: where terms cancel in one sum, float32 torch may be right by luck.

    Used as ``with Pool() as pool``: judges at the end.
    """

    def __enter__(self) -> Pool:
        self.squares: dict[tuple[str, int, str], list[float]] = {}
        return self

    def add(self, what: tuple[str, int, str], norms: Sequence[float]) -> None:
        self.squares[what] = [a + b * b for a, b in zip(self.squares.get(what, (0, 0, 0)), norms, strict=True)]

    def __exit__(self, kind: object, *_: object) -> None:
        for what, squares in self.squares.items() if kind is None else ():
            judge(what, [s**0.5 for s in squares])


@dataclass
class Case:
    """One call: operands in the order of kernels.h, and what the reference needs to know: the function of the torch executor
    of the same name, or ``formula``; it gets the inputs, also those that come ``after`` the outputs."""

    kernel: str
    inputs: Sequence[Operand | None]
    outputs: Sequence[Operand | None]
    n: int
    sizes: list[int]
    numbers: list[float] = field(default_factory=list)
    attrs: dict[str, Any] = field(default_factory=dict)
    support: int = 0  # rows of the support; the others of n are the query's
    ways: int = 0
    after: Sequence[Operand | None] = ()
    formula: Callable[..., Any] | None = None
    references: tuple[Any, ...] = ()  # float64's and float32's results, once they are asked for

    def run(self, tier: str, block: int | None = None, parts: int = 1) -> Tensors:
        """The outputs, computed in blocks of that many rows by a team of that many members, one after another."""
        operands = [*self.inputs, *self.outputs, *self.after]
        given = [operand for operand in operands if operand is not None]
        home = [o if o is None or o.over is None else operands[o.over] for o in operands]
        overwritten = {id(x) for i, o in enumerate(operands) if o is not None and o.value is None for x in (o, home[i])}
        for operand in given:
            if operand.bytes is None:  # an input of an earlier run is as it was
                operand.pack()
        if tier.startswith("device"):
            self._on_device(tier.split()[1], home, threads=64 if parts == 1 else 32 * min(parts, 4))
        else:
            self._in_blocks(tier, home, block, parts)
        for operand in given:
            assert id(operand) in overwritten or torch.equal(operand.bytes, operand.before), "an input was written"
        first = len(self.inputs)
        got = [None if o is None else home[first + i].unpack() for i, o in enumerate(self.outputs)]
        for operand in given:
            operand.bytes = None if id(operand) in overwritten else operand.bytes
        return got

    def _task(self) -> tuple[int, int, int, int]:
        return 0, self.support, self.n - self.support, self.ways

    def _in_blocks(self, tier: str, home: list[Operand | None], block: int | None, parts: int) -> None:
        end = max(self.n, 1)
        for row0 in range(0, end, block or end):
            count = min(block or end, self.n - row0)
            pointers = [0 if o is None else o.pointer(row0) for o in home]
            strides = [0 if o is None else o.stride for o in home]
            where = count, row0, self.n, row0 == 0, row0 + count == self.n, parts
            _cpu.call_kernel(tier, self.kernel, pointers, strides, *where, self.sizes, self.numbers, self._task())

    def _on_device(self, order: str, home: list[Operand | None], threads: int) -> None:
        """All rows at once: what is a team to the CPU is a number of threads here."""
        device = pytest.importorskip("fastmaml._cuda_host")
        images = any(o is not None and o.kind in ("image", "conv", "bytes", "ints") for o in home)
        if self.kernel not in device.kernels() or images:
            pytest.skip("not of vectors")
        pointers = [0 if o is None else o.pointer(0) for o in home]
        strides = [0 if o is None else o.stride for o in home]
        device.call_kernel(order, threads, self.kernel, pointers, strides, self.n, self.sizes, self.numbers, self._task())

    def reference(self, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        def cast(operand: Operand | None) -> Tensor | None:
            if operand is None:
                return None
            real = operand.value.is_floating_point() and operand.kind != "double"
            return operand.value.to(dtype) if real else operand.value

        task = SimpleNamespace(
            rows={"support": self.support, "query": self.n - self.support, "joint": self.n}, ways=self.ways
        )
        function = self.formula or KERNELS[self.kernel]
        result = function(task, self.attrs, *map(cast, [*self.inputs, *self.after]))
        return result if isinstance(result, tuple) else (result,)

    def judge(self, got: Tensors, where: str = "", pool: Pool | None = None, slack: float = 0.0) -> None:
        """Rule (c): at most twice float32 torch's own error plus 2^-21 of the result's norm. ``slack``: float64's own
        rounding."""
        self.references = self.references or (self.reference(torch.float64), self.reference(torch.float32))
        for i, (mine, truth, plain) in enumerate(zip(got, *self.references, strict=True)):
            if mine is None:
                continue
            truth = torch.zeros(mine.shape, dtype=torch.float64) if truth is None else truth.double()
            plain = truth if plain is None else plain.double()
            norms = [float(v.norm()) for v in (mine.double() - truth, plain - truth, truth)]
            if pool is not None and mine.numel() < LANE:
                pool.add((self.kernel, i, where), norms)
            else:
                judge((self.kernel, i, f"{where} n={self.n} sizes={self.sizes}"), norms, slack)

    def check(
        self, tier: str, blocks: Sequence[int | None] = (1, 4), elementwise: bool = False, pool: Pool | None = None
    ) -> Tensors:
        """In blocks and by teams. ``elementwise``: blocks must not even change a bit."""
        done = {}
        for block in dict.fromkeys(None if block is None or block >= self.n else block for block in (None, *blocks)):
            done[block] = got = self.run(tier, block)
            self.judge(got, f"{tier} block={block}", pool)
            if elementwise:
                assert same_bits(got, done[None]), f"{self.kernel}: blocks of {block} change bits"
        for parts, block in ((2, None), (3, list(done)[-1])):
            assert same_bits(self.run(tier, block, parts), done[block]), f"{self.kernel}: {parts} parts change bits"
        return done[None]


def check_activation(tier: str, plain: Case, outputs: Callable[[], list[Operand]], slope: float) -> None:
    """A kernel with an activation inside: the bits of the plain one with a relu kernel after it."""
    results = plain.run(tier)
    shape, n, c = results[0].shape, len(results[0]), results[0][0].numel()
    kind, given = "mask" if len(shape) == 2 else "bytes", normal(*shape, seed=3) > 0

    def relu(kernel: str, inputs: list, *made: Operand) -> Tensors:  # an image as one long row
        return [v.reshape(shape) for v in Case(kernel, inputs, made, n, [c], [slope]).run(tier)]

    def fused(gate: float, made: list[Operand], given: list[Operand], expected: Tensors) -> None:
        operands, after = [*outputs(), *made], [*given, *([] if made or given else [None]), *plain.after[1:]]
        one = Case(plain.kernel, plain.inputs, operands, n, plain.sizes, [gate, slope], support=plain.support, after=after)
        for block, parts in ((None, 1), (3, 3)):
            assert same_bits(one.run(tier, block, parts), expected[: len(operands)])

    row, mask = out("rows", n, c), Operand("mask", given.flatten(1))
    fused(2.0, [], [Operand(kind, given)], [relu("relu_bwd", [mask, rows(z.flatten(1))], row)[0] for z in results])
    if len(results) == 1:
        expected = relu("relu_fwd", [rows(results[0].flatten(1))], row, out("mask", n, c))
        fused(1.0, [out(kind, *shape)], [], expected)
        fused(1.0, [], [], expected)


def lowered(
    name: str, inputs: Sequence[Operand | None], outputs: Sequence[Operand | None], n: int, attrs: dict
) -> Case:
    """The call that an instruction of the Plan becomes, to be held against the function of the torch executor of its name."""
    given = {f"b{i}": o for i, o in enumerate((*inputs, *outputs)) if o is not None}
    names = {id(o): Ref(b) for b, o in given.items()}
    buffers = {
        b: Buffer(b, o.shape[1:] if o.by_row else o.shape, rows="joint" if o.by_row else None) for b, o in given.items()
    }
    refs = [tuple(None if o is None else names[id(o)] for o in side) for side in (inputs, outputs)]
    call = native(Instruction(name, *refs, attrs), buffers, "joint")
    assert call.operands == (*refs[0], *refs[1])
    case = Case(call.kernel, inputs, outputs, n, list(call.sizes), list(call.numbers), attrs)
    case.formula = KERNELS[name]
    return case


def same_bits(a: Tensors, b: Tensors) -> bool:
    def bits(x: Tensor | None) -> Tensor:
        return torch.empty(0) if x is None else x.reshape(-1).view(torch.uint8)

    return all(torch.equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True))


def normal(*shape: int, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1009 + sum(shape))
    return torch.randn(shape, generator=generator) * scale + shift


def exact(number: float) -> float:
    """The float32 nearest to a number: what a kernel is given."""
    return float(torch.tensor(number, dtype=torch.float32))
