"""A Program, or a part of it, as plain torch functions of its leaves, which autograd can follow. Forward only: for prologues, and for the weights that
an expression comes to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmaml.executors.torch.executor import Task
from fastmaml.executors.torch.kernels import KERNELS
from fastmaml.program import Op, Program


def evaluate(program: Program, leaves: Mapping[str, Tensor], wanted: Iterable[int], x: Tensor | None = None, sizes: Sequence[int] | None = None) -> list[Tensor]:
    """The values ``wanted``. ``x`` [n, ...]: the samples, where one of them depends on samples; they make the statistics of batch normalisations: all together,
    or, with ``sizes``, the rows of each set by themselves."""
    wanted, needed, ops = list(wanted), set(wanted), []
    for op in reversed(program.ops):
        if op.output in needed:
            needed.update(v for v in op.inputs if v is not None)
            ops.append(op)
    values = {leaf.value: leaves[leaf.name] for leaf in program.leaves if leaf.value in needed}
    if program.input in needed:
        values[program.input] = x
    sizes = [] if x is None else [len(x)] if sizes is None else list(sizes)
    task = Task(0, {}, 0, {})
    for op in reversed(ops):
        inputs = [None if v is None else values[v] for v in op.inputs]
        values[op.output] = _run(op, program, task, inputs, sizes)
    return [values[v] for v in wanted]


def _run(op: Op, program: Program, task: Task, inputs: list[Any], sizes: list[int]) -> Tensor:
    if op.name == "module":
        raise NotImplementedError("a model that cannot be traced runs as a whole")
    if op.name == "batchnorm":
        x, gamma, beta, mean, var = inputs
        if op.attrs["statistics"] == "running":
            return KERNELS["batchnorm_fwd"](task, op.attrs, x, *KERNELS["batchnorm_running_fwd"](task, op.attrs, mean, var), gamma, beta)
        return torch.cat([torch.batch_norm(rows, gamma, beta, None, None, True, 0.0, op.attrs["eps"], False) for rows in x.split(sizes)])
    out = KERNELS[f"{op.name}_fwd"](task, {**op.attrs, "rows": program.values[op.inputs[0]].rows}, *inputs)
    return out[0] if isinstance(out, tuple) else out
