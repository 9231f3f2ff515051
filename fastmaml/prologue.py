"""The prologue of a parameterisation: leaves of each task as torch functions of what is outer-learned, and the way back through them.

The Plan takes these leaves as they are and returns the gradient of each, per task; autograd carries it on to the parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmaml.engine import Runner
from fastmaml.executors.call import Call, Results
from fastmaml.executors.evaluate import evaluate
from fastmaml.parameterisation import Tasks


class Prologue:
    """The leaves of the tasks of one call. ``leaves``: [tasks, ...] by name, without graph."""

    def __init__(self, runner: Runner, batch: Any, leaves: Mapping[str, Tensor], rates: Mapping[str, Tensor], seeds: Sequence[int], train: bool) -> None:
        view = runner.view
        given = {**view.parameters, **{name: v for name, v in leaves.items() if name in view.parameters}}
        named = {name: rates[rate.name] for name, rate in runner.given_rates.items()}
        with torch.set_grad_enabled(train):
            made = dict(view.parameterisation.prologue(Tasks(batch, given, named, seeds, lambda t, weight: inputs_of(runner, given, batch, t, weight))))
        missing = runner.own - made.keys()
        if missing:
            raise ValueError(f"the prologue of {view.parameterisation.signature} gives no {sorted(missing)[0]!r}")
        self._made = {name: made[name] for name in runner.own}
        for name, value in self._made.items():
            expected = (len(batch), *runner.plan.buffers[name].shape) if name in runner.plan.buffers else tuple(value.shape)
            if tuple(value.shape) != expected:
                raise ValueError(f"the prologue of {view.parameterisation.signature} gives {name!r} in shape {list(value.shape)}: expected {list(expected)}")
        self.leaves = {name: value.detach() for name, value in self._made.items()}

    def pull_back(self, results: Results, call: Call, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """The share of the parameters' gradients that flows through the leaves of the tasks. A task that is not finite gives none."""
        weights = [call.task_weight(t) for t in range(len(call.batch))]
        outputs, cotangents = [], []
        for name, value in self._made.items():
            g = results.values.get(f"grad.{name}")
            if g is not None and value.requires_grad:
                w = torch.tensor(weights, dtype=g.dtype, device=g.device).view(-1, *[1] * (g.dim() - 1))
                finite = results.finite.to(g.device).view_as(w)
                outputs.append(value)
                cotangents.append(torch.where(finite, w * g, 0.0).reshape(value.shape))
        if not outputs:
            return [None] * len(parameters)
        return list(torch.autograd.grad(outputs, list(parameters), cotangents, allow_unused=True, retain_graph=True))


def inputs_of(runner: Runner, parameters: Mapping[str, Tensor], batch: Any, t: int, weight: str) -> Tensor:
    """What the layer with this weight reads of the support rows of task t, at theta_0."""
    program = runner.program
    if runner.opaque:
        raise ValueError(f"the inputs of the layer of {weight!r} are asked for, but the model cannot be traced")
    value = program.leaf(weight).value
    layer = next((op for op in program.ops if op.name == "linear" and op.inputs[1] == value), None)
    if layer is None:
        raise ValueError(f"no linear layer reads {weight!r} as its weight: its inputs are asked for")
    buffers = {name: runner.view.model.get_buffer(name) for name in runner.buffers}
    x = batch.task(t)[0].to(runner.view.like.dtype)
    return evaluate(program, {**parameters, **runner.constants, **buffers}, [layer.inputs[0]], x)[0]
