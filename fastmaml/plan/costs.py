"""A Plan in numbers: FLOPs and bytes of every group, and the bytes that have to come in and go out.

FLOPs: a multiply-add is 2. Products (linear, conv2d, matmul) count every tap, padded ones too. Everything else counts a
fixed number for each element of its largest operand (ELEMENTWISE); a transcendental function is about ten.
Bytes: each operand of an instruction read once and written once. A kernel that is blocked or fused moves less: what
lives one block long stays in cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fastmaml.plan.instructions import Buffer, Group, Instruction, Operand, Plan

ITEM_BYTES = {"mask": 1, "index": 4, "label": 8, "handle": 0}  # as in memory.plan_bytes; the others: the Plan's dtype
SUM = "sum over tasks"

_ROWNORM = {"fwd": 8, "jvp": 14, "bwd_input": 12, "bwd_weight": 4, "bwd_input_jvp": 24, "bwd_weight_jvp": 10}

ELEMENTWISE: Mapping[str, int] = {  # by kernel, or by op for all its modes
    "batchnorm_stats_fwd": 4,  # the sum, and the sum of squared differences
    "batchnorm_running_fwd": 3,
    "batchnorm_fwd": 2,  # statistics and affine folded: one multiply-add
    "batchnorm_stats_jvp": 4,
    "batchnorm_jvp": 4,
    "batchnorm_bwd_stats": 4,
    "batchnorm_bwd_input": 4,
    "batchnorm_bwd_stats_jvp": 10,
    "batchnorm_bwd_input_jvp": 8,
    "batchnorm_maxpool2d_fwd": 1,
    "batchnorm_maxpool2d_replay": 0,
    "batchnorm_maxpool2d_bwd_input": 5,
    "batchnorm_maxpool2d_bwd_input_jvp": 10,
    **{f"{op}_{mode}": n for op in ("layernorm", "groupnorm") for mode, n in _ROWNORM.items()},
    "relu": 1,
    "leaky_relu": 1,
    **dict.fromkeys(("tanh", "sigmoid", "exp", "elu", "gelu", "silu", "softplus"), 12),
    "maxpool2d": 1,
    "maxpool2d_replay": 0,  # a gather
    "maxpool2d_jvp": 0,
    "avgpool2d": 1,
    "global_avgpool2d": 1,
    "cross_entropy": 14,
    "mse": 3,
    "add": 1,
    "mul": 1,
    "mul_jvp": 3,
    "mul_bwd": 2,
    "mul_bwd_jvp": 4,
    "sgd_fwd": 2,
    "sgd_bwd": 1,
    "sgd_bwd_rate": 2,
    "clip_value": 2,
    "clip_norm": 6,
    "dot": 2,
    "ratio": 1,
    "axpy": 2,
    "scale": 1,
    "factored_linear_jvp": 1,
    "row_sum": 1,
    **dict.fromkeys(("reshape", "pad2d", "transpose", "slice", "copy", "zero", "join_rows", "support_rows", "query_rows"), 0),
}
# where the Gram matrix and an operand as wide as its product stand among inputs and outputs
GRAM = {"gram_fwd": (2, 0), "factored_linear_fwd": (1, 4)}
GRAM |= {"factored_linear_bwd": (0, 1), "factored_linear_bwd_jvp": (0, 1)}


@dataclass(frozen=True)
class Cost:
    """One group of a segment over all tasks and steps; ``group`` counts from 0. The sum over tasks is a row of its own.

    times         how many steps run it
    flops         all of them; products: those of linear, conv2d and matmul among them
    bytes         read and written; block_bytes: those among them of buffers that live one block long
    uncounted     kernels whose FLOPs are not known (an opaque module)
    """

    segment: str
    group: int
    rows: str | None
    times: int
    instructions: int
    flops: int
    products: int
    bytes: int
    block_bytes: int
    uncounted: tuple[str, ...] = ()


def costs(plan: Plan, batch: Any, itemsize: int = 4) -> list[Cost]:
    """What each group costs for ``batch`` (a TaskBatch: its sizes are read), in the schedule's order."""
    out = []
    for name, (times, counter) in counters(plan, batch, itemsize).items():
        out += [counter.group(name, g, group, times) for g, group in enumerate(plan.segments[name].groups)]
    if plan.reductions:
        sources = [plan.buffers[r.source.buffer] for r in plan.reductions]
        n = sum(b.numel * max(b.steps, 1) for b in sources)
        tasks = len(batch.support_sizes)
        out.append(Cost(SUM, 0, None, 1, len(sources), 2 * n * tasks, 0, (tasks + 1) * n * itemsize, 0))
    return out


def counters(plan: Plan, batch: Any, itemsize: int = 4) -> dict[str, tuple[int, Counter]]:
    """For each scheduled segment: how many steps run it, and what counts one of them."""
    out: dict[str, tuple[int, Counter]] = {}
    for phase in plan.schedule:
        counter = Counter(plan, batch, len(batch.support_sizes) if phase.scope == "task" else 1, itemsize)
        for name in phase.segments:
            out[name] = (out[name][0] if name in out else 0) + len(phase.steps()), counter
    return out


def compulsory_bytes(plan: Plan, batch: Any, itemsize: int = 4) -> tuple[int, int]:
    """Bytes of the caller's data and parameters, and bytes of the results: what must come and go at the very least."""

    def size(names: Iterable[str]) -> int:
        out = 0
        for buffer in (plan.buffers[name] for name in names):
            counter = Counter(plan, batch, len(batch.support_sizes) if buffer.home == "task" else 1, itemsize)
            out += counter.bytes_of(buffer) * max(buffer.steps, 1)
        return out

    return size(plan.inputs), size(plan.results)


class Counter:
    """Counts one step of an instruction for all tasks together; ``tasks``: how often whole arrays are used in it."""

    def __init__(self, plan: Plan, batch: Any, tasks: int, itemsize: int = 4) -> None:
        joint = [s + q for s, q in zip(batch.support_sizes, batch.query_sizes, strict=True)]
        self.buffers, self.tasks, self.itemsize = plan.buffers, tasks, itemsize
        self.sizes = {"support": batch.support_sizes, "query": batch.query_sizes, "joint": joint}

    def elements(self, ref: Operand) -> int:
        return 0 if ref is None else self._elements(self.buffers[ref.buffer])

    def _elements(self, buffer: Buffer) -> int:
        if buffer.rows is None:
            return buffer.numel * self.tasks
        if buffer.columns is None:
            return buffer.numel * sum(self.sizes[buffer.rows])
        return sum(n * m for n, m in zip(self.sizes[buffer.rows], self.sizes[buffer.columns], strict=True))

    def bytes_of(self, buffer: Buffer) -> int:
        return self._elements(buffer) * ITEM_BYTES.get(buffer.kind, self.itemsize)

    def group(self, segment: str, index: int, group: Group, times: int) -> Cost:
        flops = products = moved = block = 0
        uncounted: dict[str, None] = {}
        for instr in group.instructions:
            counted = self.flops(instr)
            if counted is None:
                uncounted[instr.kernel] = None
            else:
                flops, products = flops + times * sum(counted), products + times * counted[0]
            moved, block = moved + times * self.bytes(instr), block + times * self.bytes(instr, "block")
        n = len(group.instructions)
        return Cost(segment, index, group.rows, times, n, flops, products, moved, block, tuple(uncounted))

    def bytes(self, instr: Instruction, home: str | None = None) -> int:
        """Bytes read and written; ``home``: only those of buffers that live there."""
        if instr.kernel.startswith("reshape_") and self.buffers[instr.outputs[0].buffer].rows:
            return 0  # the same memory under another name
        operands = [self.buffers[ref.buffer] for ref in (*set(instr.reads()), *set(instr.writes()))]
        return sum(self.bytes_of(b) for b in operands if home in (None, b.home))

    def flops(self, instr: Instruction) -> tuple[int, int] | None:
        """(of products, of the rest), or None where they are not known."""
        op, _, mode = instr.kernel.partition("_")
        if op in ("linear", "conv2d"):
            return self._contraction(mode, instr)
        if op == "matmul":
            return self._matmul(mode, instr), 0
        if instr.kernel in GRAM:  # products of the Gram matrix with rows, or of rows that make it
            gram, x = ((*instr.inputs, *instr.outputs)[i] for i in GRAM[instr.kernel])
            return 2 * self.elements(gram) * self.buffers[x.buffer].numel, self.elements(instr.outputs[0])
        if op == "patch":
            return self._patches(instr), 0
        words = instr.kernel.split("_")
        for n in range(len(words), 0, -1):
            each = ELEMENTWISE.get("_".join(words[:n]))
            if each is not None:
                return 0, each * max(self.elements(ref) for ref in (*instr.reads(), *instr.writes()))
        return None

    def _contraction(self, mode: str, instr: Instruction) -> tuple[int, int]:
        """linear, conv2d: 2 * elements of y * taps for each product that is there, and the bias."""
        a, out = instr.inputs, instr.outputs
        bias: Operand = None
        if mode in ("fwd", "jvp"):  # x, w, b -> y | x, w, xt, wt, bt -> yt
            y, bias = out[0], a[-1]
            products = 1 if mode == "fwd" else sum(ref is not None for ref in a[2:4])
        elif mode in ("bwd_input", "bwd_input_jvp"):  # dy, w -> dx | dy, w, dyt, wt -> dxt
            y = a[0] if mode == "bwd_input" or a[2] is None else a[2]
            products = 1 if mode == "bwd_input" else _pairs((a[2], a[1]), (a[0], a[3]))
        else:  # x, dy -> dw, db | x, dy, xt, dyt -> dwt, dbt
            y, bias = a[1] if mode == "bwd_weight" or a[3] is None else a[3], out[1]
            products = 1 if mode == "bwd_weight" else _pairs((a[0], a[3]), (a[2], a[1]))
            products = 0 if out[0] is None else products
        if "weight" in mode:
            taps = math.prod(instr.attrs.get("weight_shape", (1, *self.buffers[a[0].buffer].shape[-1:]))[1:])
        else:
            taps = math.prod(self.buffers[a[1].buffer].shape[1:])
        return 2 * products * self.elements(y) * taps, 0 if bias is None else self.elements(y)

    def _patches(self, instr: Instruction) -> int:
        """patch_moments: C is symmetric; patch_stats: C w, and in the tangent of its gradient C wt."""
        first, second = (self.buffers[ref.buffer] for ref in (*instr.inputs, *instr.outputs)[:2])
        if instr.kernel.startswith("patch_moments"):
            size, pixels = second.shape[-1], math.prod(instr.attrs.get("pixels", ()))
            return size * (size + 1) * pixels * sum(self.sizes[first.rows])
        products = 1 + (instr.kernel.endswith("bwd_jvp") and any(instr.inputs[6:7]))
        return 2 * products * first.shape[-1] * self._elements(second)

    def _matmul(self, mode: str, instr: Instruction) -> int:
        x, y, *rest = instr.inputs
        (m, k), n = self.buffers[x.buffer].shape, self.buffers[y.buffer].shape[1]
        products = 1
        if mode == "jvp":
            products = sum(ref is not None for ref in rest)
        elif mode == "bwd_jvp":  # dz, tangent of the other operand, dzt
            products = _pairs((rest[2], x), (rest[0], rest[1]))
        return 2 * products * m * k * n * self.tasks


def _pairs(*pairs: tuple[Operand, Operand]) -> int:
    """How many products have both operands."""
    return sum(a is not None and b is not None for a, b in pairs)
