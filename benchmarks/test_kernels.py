"""Every kernel alone, beside torch's own function: ``pytest benchmarks/test_kernels.py [-k "mini and bwd_weight"] [--workload TEXT] [--benchmark-json FILE]``.

For each distinct instruction (kernel, rows and shapes of its operands, attributes) of a workload's Plan there are two records, both of one thread:

native   the kernel as the ``cpu`` executor calls it, operands laid out as the executor lays them out, all rows of a task in one call (the executor may cut them
         into blocks, and fuses neighbours). A round is one native call that runs a Plan of this one instruction so often that it takes half a millisecond:
         Python's share is below one percent, the executor's own tens of nanoseconds are in it. What is updated in place goes to an array of its own here.
torch    the function of ``executors/torch/kernels/`` on plain tensors, called from Python: torch's dispatch is in it, as in any code that uses torch. Its
         copy and reshape are views and move nothing.

Times are of one call, and rounds follow one another: the operands are as warm as the caches are large. An instruction of a batch phase gets the rows of all
tasks, as the executor gives it. FLOPs and bytes (each operand once) are those of ``fastmaml.plan.costs``, whatever a layout adds; the peak is measured once, in
the same session. The native results are held against torch's first, and a kernel that disagrees fails.
"""

from __future__ import annotations

import math
import re
import statistics
import struct
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from timeit import timeit
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.peers import maml_of
from benchmarks.workloads import DEFAULT, WORKLOADS, Workload
from fastmaml import _cpu
from fastmaml.executors.cpu.lowering import ROWS, Lowering
from fastmaml.executors.cpu.native import PLANES, is_image
from fastmaml.executors.cpu.rules import native
from fastmaml.executors.torch.kernels import KERNELS
from fastmaml.machine import peak_gflops
from fastmaml.plan.costs import Counter
from fastmaml.plan.instructions import Instruction, Plan, Ref

sys.path.append(str(Path(__file__).parent.parent / "tests"))  # its packing is written apart from the executor's

from kernel_cases import Operand  # noqa: E402

ROUND, BUDGET, ROUNDS = 5e-4, 0.04, 5  # seconds at least of a round, and of all rounds of a record unless it needs more for this many
TOLERANCE = 1e-4
CONVERSIONS = ("unflatten_image_fwd", "copy_rows_fwd", "pack_fwd", "unpack_fwd")  # what the lowering puts around a call
IDS = {name: i for i, name in enumerate(_cpu.kernels())}
WHO = ("torch", "native")  # in this order: the second record has the ratio


class Clock:
    """Makes pytest-benchmark's seconds those of one call where a round makes ``calls`` of them behind one Python call."""

    __name__ = "CLOCK"  # what a JSON file calls it
    calls = 1

    def __call__(self) -> float:
        return time.perf_counter() / self.calls


CLOCK = Clock()
pytestmark = [pytest.mark.benchmark(timer=CLOCK), pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")]  # where a kernel has failed


# ------------------------------------------------------------------------------------------------- what there is to measure
@dataclass(frozen=True, eq=False)
class Kernel:
    """One distinct instruction; ``extent``: of its group; ``rows``: of each extent."""

    workload: str
    instr: Instruction
    extent: str | None
    plan: Plan
    low: Lowering
    rows: dict[str, int]

    def __repr__(self) -> str:  # a part of every record of a JSON file
        return f"{self.workload}: {self.instr}"

    def shape(self, ref: Ref | None) -> tuple[int, ...] | None:
        if ref is None:
            return None
        buffer = self.plan.buffers[ref.buffer]
        rows = () if buffer.rows is None else (self.rows[buffer.rows],)
        return (*rows, *(buffer.shape if buffer.columns is None else (self.rows[buffer.columns],)))

    @property
    def shapes(self) -> tuple[tuple[int, ...] | None, ...]:
        return tuple(map(self.shape, (*self.instr.inputs, *self.instr.outputs)))

    @property
    def text(self) -> str:
        """The distinct shapes, and how many operands are absent: what tells variants of a kernel apart."""
        absent = self.shapes.count(None)
        return " ".join("x".join(map(str, s)) for s in dict.fromkeys(self.shapes) if s) + (f" -{absent}" if absent else "")

    @property
    def key(self) -> tuple:
        attrs = {name: self.rows.get(v, v) if isinstance(v, str) else v for name, v in self.instr.attrs.items()}
        return self.instr.kernel, self.rows.get(self.extent), self.shapes, str(attrs)

    def cost(self) -> tuple[float, float]:
        """GFLOP and GB of one call."""
        counter = Counter(self.plan, SimpleNamespace(support_sizes=[self.rows["support"]], query_sizes=[self.rows["query"]]), tasks=1)
        return sum(counter.flops(self.instr) or (0,)) * 1e-9, counter.bytes(self.instr) * 1e-9


def kernels_of(w: Workload) -> list[Kernel]:
    tasks = w.sample(0)
    plan, found = maml_of(w).plan(tasks), {}
    support, query = tasks[0].shape[1], tasks[2].shape[1]
    low = Lowering(plan, {"support": support, "query": query, "joint": support + query}, IDS)
    for phase in plan.schedule:
        times = w.tasks if phase.scope == "batch" else 1
        rows = {name: n * times for name, n in low.capacity.items()}
        for group in (group for name in phase.segments for group in plan.segments[name].groups):
            for instr in group.instructions:
                kernel = Kernel(w.name, instr, group.rows, plan, low, rows)
                found.setdefault(kernel.key, kernel)
    return list(found.values())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    text = metafunc.config.getoption("workload")
    names = DEFAULT if text is None else [name for name in WORKLOADS if text.lower() in name.lower()]
    if not names:
        raise pytest.UsageError(f"--workload {text}: no workload's name contains it; there are {'; '.join(WORKLOADS)}")
    cases = [(kernel, who) for name in names for kernel in kernels_of(WORKLOADS[name]) for who in WHO]
    ids = ["-".join((re.sub(r"\W+", "_", k.workload), k.instr.kernel, k.text.replace(" ", "_"), who)) for k, who in cases]
    metafunc.parametrize("kernel,who", cases, ids=ids)


# ------------------------------------------------------------------------------------------------- operands, and the two ways to call
def kind_of(kernel: Kernel, name: str) -> str:
    """How the cpu executor stores a buffer, as a kind of ``kernel_cases.Operand``."""
    low = kernel.low
    buffer, stored = low.buffers[name], low.buffers[low._name(name)]
    if buffer.kind == "label":
        return "label"
    if buffer.columns:
        return "double"
    if buffer.kind == PLANES or (stored.rows and low._unpadded(stored)):
        return "plain"
    if buffer.kind == "index":
        return "ints" if low.windows[name].item_bytes > 1 else "bytes"
    if buffer.kind == "mask":
        return "bytes" if is_image(buffer) else "mask"
    if buffer.rows:
        return "image" if is_image(buffer) else "rows"
    if name in low.packed:
        return "packed" if len(buffer.shape) == 2 else "conv"
    return "vector" if buffer.shape else "scalar"


@dataclass
class Prepared:
    """An instruction with its operands, for both: ``run(times)`` natively, ``torch()``."""

    kernel: Kernel
    given: dict[Ref, Tensor] = field(default_factory=dict)  # as torch has them
    torch_seconds: float | None = None

    def __post_init__(self) -> None:
        kernel, instr, low = self.kernel, self.kernel.instr, self.kernel.low
        if instr.kernel.startswith("reshape_") and low._name(instr.outputs[0].buffer) == low._name(instr.inputs[0].buffer):
            pytest.skip("no call: the same memory under another name")
        try:
            refs = native(instr, low.buffers, kernel.extent).operands
        except NotImplementedError as error:
            pytest.skip(str(error))
        steps = [step.call for step in low._convert(instr, kernel.extent, "run")]
        self.call = next((call for call in steps if call.kernel not in CONVERSIONS), steps[0])
        last = {id(ref): i for i, ref in enumerate(refs)}  # what is updated in place stands twice
        self.outputs = {id(ref): last[id(ref)] for ref in instr.outputs if ref is not None}
        self.operands = [None if ref is None else self.operand(i, ref) for i, ref in enumerate(refs)]
        self.finite, self.offsets = torch.ones(1, dtype=torch.bool), [torch.tensor([0, kernel.rows[name]]) for name in ("support", "query")]
        self.work = torch.empty(_cpu.work_bytes(self.plan(1), 1, 1) + 128, dtype=torch.uint8)

    def operand(self, i: int, ref: Ref) -> Operand:
        kind, shape = kind_of(self.kernel, self.call.operands[i].buffer), self.kernel.shape(ref)
        value = None if i in self.outputs.values() else self.value(ref, shape)
        out = Operand(kind, value, shape)
        out.stride = 8 * -(-out.width // 8) * 8 if kind == "double" else out.dtype.itemsize * out.padded  # as in the executor: no gap for poison between rows
        out.pack()
        return out

    def value(self, ref: Ref, shape: tuple[int, ...]) -> Tensor:
        """Drawn once per Ref; torch's, too, is put down. Of a max pooling's choices the native form is the position in the window, torch's that in the image."""
        g, kind = torch.Generator().manual_seed(len(self.given)), self.kernel.plan.buffers[ref.buffer].kind
        if kind == "index":  # no instruction has the same one twice
            windows = self.kernel.low.windows[ref.buffer]
            if any(windows.padding):
                pytest.skip("positions in windows that reach over the edge are not drawn here")
            value = torch.randint(math.prod(windows.kernel), shape, generator=g)
            self.given[ref] = windows.flat(value)
            return value
        if ref not in self.given and kind in ("label", "mask"):
            drawn = torch.randint(self.kernel.shapes[0][-1] if kind == "label" else 2, shape, generator=g)  # a loss's first operand are its logits
            self.given[ref] = drawn.bool() if kind == "mask" else drawn
        elif ref not in self.given:
            gram = self.kernel.plan.buffers[ref.buffer].columns is not None
            self.given[ref] = torch.randn(shape, generator=g, dtype=torch.double if gram else torch.float)
        return self.given[ref]

    def plan(self, times: int) -> _cpu.Plan:
        """One task, in which this instruction runs ``times`` times (see ``read_plan`` in csrc/cpu/bindings.cpp); every operand is a task buffer."""
        call, count = self.call, len(self.operands)
        buffers, nothing_else, phase, group = [count, *[0, 0] * count], [0] * 5, [1, 0, 0, 0, times, 1], [1, ROWS[self.kernel.extent], 0, 1]
        words = [64, 64, 1, 0, 1, *buffers, *nothing_else, *phase, *group, IDS[call.kernel], 0, call.pixels, count]
        for i, operand in enumerate(self.operands):
            words += [0] if operand is None else [1, 1, i, 0, 0, 0, 0, operand.stride, 0]
        numbers = [struct.unpack("<i", struct.pack("<f", number))[0] for number in call.numbers]
        return _cpu.Plan([*words, len(call.sizes), *call.sizes, len(numbers), *numbers])

    def run(self, times: int) -> Callable[[], Any]:
        """A function without arguments that calls the kernel so often."""
        plan, work = self.plan(times), (self.work.data_ptr() + 63) // 64 * 64
        pointers = [0 if operand is None else operand.pointer(0) for operand in self.operands]
        offsets = [offset.data_ptr() for offset in self.offsets]
        arguments = (plan, 1, 0, 1, 0, *offsets, 0, 0, 1.0, pointers, [], [], False, False, work, work, self.finite.data_ptr())
        return lambda: _cpu.execute(*arguments)

    def torch(self) -> Any:
        instr, zeros = self.kernel.instr, lambda: torch.zeros(self.kernel.shapes[-1])
        task, function = SimpleNamespace(rows=self.kernel.rows, ways=0, zeros=zeros), KERNELS[instr.kernel]
        inputs = [None if ref is None else self.given[ref] for ref in instr.inputs]
        return lambda: function(task, instr.attrs, *inputs)

    def error(self) -> float:
        """The largest relative error of an output against torch's."""
        self.run(1)()
        expected, worst = self.torch()(), 0.0
        pairs = zip(self.kernel.instr.outputs, expected if isinstance(expected, tuple) else (expected,), strict=True)
        for ref, want in (pair for pair in pairs if pair[0] is not None):
            got = self.operands[self.outputs[id(ref)]].unpack()  # also asserts that the padding is zero
            if self.kernel.plan.buffers[ref.buffer].kind == "index":
                got = self.kernel.low.windows[ref.buffer].flat(got.long())
            want = torch.zeros(got.shape) if want is None else want
            assert got.shape == want.shape, f"{ref}: {list(got.shape)}, torch has {list(want.shape)}"
            difference, norm = float((got.double() - want.double()).norm()), float(want.double().norm())
            worst = max(worst, difference / norm if norm else difference, key=lambda e: math.inf if math.isnan(e) else e)
        return worst


@lru_cache(maxsize=1)
def prepared(kernel: Kernel) -> Prepared:
    return Prepared(kernel)


# ------------------------------------------------------------------------------------------------- measuring
@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)
    prepared.cache_clear()


def calls_of(timed: Callable[[int], float]) -> tuple[int, float]:
    """How many calls make a round, and the seconds it takes; the first try warms up."""
    calls = 1
    timed(calls)
    while (took := timed(calls)) < ROUND:
        calls = math.ceil(calls * min(max(1.2 * ROUND / took, 1.2), 10))
    return calls, took


def test_kernel(kernel: Kernel, who: str, benchmark: Any, records: list[dict[str, Any]]) -> None:
    made = prepared(kernel)
    info = {"workload": kernel.workload, "kernel": kernel.instr.kernel, "shape": kernel.text, "operands": kernel.shapes, "who": who}
    if who == "native":
        info["error"] = made.error()
        assert info["error"] <= TOLERANCE, f"{kernel.instr}: differs from torch by {info['error']:.2g}"
        calls, took = calls_of(lambda calls: timeit(made.run(calls), number=1))
        CLOCK.calls, iterations, target = calls, 1, made.run(calls)
    else:
        target = made.torch()
        calls, took = calls_of(lambda calls: timeit(target, number=calls))
        CLOCK.calls, iterations = 1, calls
    benchmark.pedantic(target, rounds=max(ROUNDS, math.ceil(BUDGET / took)), iterations=iterations)
    if not benchmark.stats:  # --benchmark-disable
        return
    median = statistics.median(benchmark.stats.stats.data)
    (gflop, gigabytes), peak = kernel.cost(), peak_gflops(1)
    speed = gflop / median
    info |= {"calls": calls, "us": median * 1e6, "gflop": gflop, "gflops": speed, "gbs": gigabytes / median, "share_of_peak": speed / peak}
    if who == "torch":
        made.torch_seconds = median
    elif made.torch_seconds:
        info |= {"torch_us": made.torch_seconds * 1e6, "ratio": made.torch_seconds / median}
    benchmark.extra_info.update(info, peak_gflops=peak)
    records.append(info)
