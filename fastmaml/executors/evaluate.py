"""A Program, or a part of it, as plain torch functions of its leaves, which autograd can follow. Forward only: for prologues, and for the weights that
an expression comes to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from fastmaml.executors.torch import Task
from fastmaml.executors.torch_kernels import KERNELS
from fastmaml.program import Op, Program


def evaluate(program: Program, leaves: Mapping[str, Tensor], wanted: Iterable[int], x: Tensor | None = None) -> list[Tensor]:
    """The values ``wanted``. ``x`` [n, ...]: the samples, where one of them depends on samples; they make the statistics of batch normalisations."""
    wanted, needed, ops = list(wanted), set(wanted), []
    for op in reversed(program.ops):
        if op.output in needed:
            needed.update(v for v in op.inputs if v is not None)
            ops.append(op)
    values = {leaf.value: leaves[leaf.name] for leaf in program.leaves if leaf.value in needed}
    if program.input in needed:
        values[program.input] = x
    task = Task(0, {} if x is None else {"support": len(x)}, 0, {})
    for op in reversed(ops):
        inputs = [None if v is None else values[v] for v in op.inputs]
        values[op.output] = _run(op, program, task, inputs)
    return [values[v] for v in wanted]


def _run(op: Op, program: Program, task: Task, inputs: list[Any]) -> Tensor:
    if op.name == "module":
        raise NotImplementedError("a model that cannot be traced runs as a whole")
    if op.name == "batchnorm":
        x, gamma, beta, mean, var = inputs
        running = op.attrs["statistics"] == "running"
        attrs = {"eps": op.attrs["eps"], "stat_rows": None if running else "support"}
        kind, given = ("batchnorm_running_fwd", (mean, var)) if running else ("batchnorm_stats_fwd", (x,))
        return KERNELS["batchnorm_fwd"](task, attrs, x, *KERNELS[kind](task, attrs, *given), gamma, beta)
    out = KERNELS[f"{op.name}_fwd"](task, {**op.attrs, "rows": program.values[op.inputs[0]].rows}, *inputs)
    return out[0] if isinstance(out, tuple) else out
