"""The prologue of a parameterisation: leaves of each task as torch functions of what is outer-learned, and the way back through them.

The Plan takes these leaves as they are and returns the gradient of each, per task; autograd carries it on to the parameters. A penalty that the prologue
adds to the outer loss never enters the Plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmaml.engine import Runner
from fastmaml.executors.call import Call, Results
from fastmaml.executors.torch.evaluate import evaluate
from fastmaml.parameterisation import PENALTY, Tasks


class Prologue:
    """The leaves of the tasks of one call. ``leaves``: [tasks, ...] by name, without graph; ``penalty``: [tasks] with its graph, or None."""

    def __init__(self, runner: Runner, batch: Any, leaves: Mapping[str, Tensor], rates: Mapping[str, Tensor], seeds: Sequence[int], train: bool) -> None:
        view = runner.view
        given = {**view.parameters, **{name: v for name, v in leaves.items() if name in view.parameters}}
        named = {name: rates[rate.name] for name, rate in runner.given_rates.items()}
        with torch.set_grad_enabled(train):
            made = dict(view.parameterisation.prologue(Tasks(batch, given, named, seeds, lambda weight: inputs_of(runner, given, batch, weight))))
        self.penalty: Tensor | None = made.pop(PENALTY, None)
        if self.penalty is not None and tuple(self.penalty.shape) != (len(batch),):
            raise ValueError(f"the prologue of {view.parameterisation.signature} gives a penalty in shape {list(self.penalty.shape)}: expected [{len(batch)}]")
        missing = runner.own - made.keys()
        if missing:
            raise ValueError(f"the prologue of {view.parameterisation.signature} gives no {sorted(missing)[0]!r}")
        self._made = {name: made[name] for name in runner.own}
        for name, value in self._made.items():
            expected = (len(batch), *runner.plan.buffers[name].shape) if name in runner.plan.buffers else tuple(value.shape)
            if tuple(value.shape) != expected:
                raise ValueError(f"the prologue of {view.parameterisation.signature} gives {name!r} in shape {list(value.shape)}: expected {list(expected)}")
        self.leaves = {name: value.detach() for name, value in self._made.items()}

    def added(self, results: Results, call: Call) -> Tensor | float:
        """What the penalty adds to the outer loss: by the tasks' weights (to one of the user's own, its mean), without those that are not finite."""
        if self.penalty is None:
            return 0.0
        weights = 1 / len(call.batch) if call.total else self._weights(call, self.penalty)
        return (torch.where(results.finite.to(self.penalty.device), self.penalty, 0.0) * weights).sum()

    @staticmethod
    def _weights(call: Call, like: Tensor) -> Tensor:
        if call.task_weights is not None:
            return call.task_weights.to(like)
        return torch.full((len(call.batch),), call.task_weight(0), dtype=like.dtype, device=like.device)

    def pull_back(self, results: Results, call: Call, parameters: Sequence[Tensor], penalty: bool) -> list[Tensor | None]:
        """The share of the parameters' gradients that flows through the leaves of the tasks, and through the ``penalty`` where it is asked for. A task that
        is not finite gives none."""
        outputs, cotangents = [], []
        if penalty and self.penalty is not None and self.penalty.requires_grad:
            outputs.append(self.penalty)
            cotangents.append(torch.where(results.finite.to(self.penalty.device), self._weights(call, self.penalty), 0.0))
        for name, value in self._made.items():
            g = results.values.get(f"grad.{name}")
            if g is not None and value.requires_grad:
                w = self._weights(call, g).view(-1, *[1] * (g.dim() - 1))
                g = w * g if results.all_finite else torch.where(results.finite.to(g.device).view_as(w), w * g, 0.0)
                outputs.append(value)
                cotangents.append(g.reshape(value.shape))
        if not outputs:
            return [None] * len(parameters)
        return list(torch.autograd.grad(outputs, list(parameters), cotangents, allow_unused=True, retain_graph=True))


def inputs_of(runner: Runner, parameters: Mapping[str, Tensor], batch: Any, weight: str) -> Tensor:
    """What the layer with this weight reads of the support rows of all tasks, [sum n, ...], at theta_0."""
    program = runner.program
    if runner.opaque:
        raise ValueError(f"the inputs of the layer of {weight!r} are asked for, but the model cannot be traced")
    value = program.leaf(weight).value
    layer = next((op for op in program.ops if op.name == "linear" and op.inputs[1] == value), None)
    if layer is None:
        raise ValueError(f"no linear layer reads {weight!r} as its weight: its inputs are asked for")
    buffers = {name: runner.view.model.get_buffer(name) for name in runner.buffers}
    x = batch.support_x.to(runner.view.like.dtype)
    leaves = {**parameters, **runner.constants, **buffers}
    leaves |= {leaf.name: leaves[leaf.name][0] for leaf in program.leaves if leaf.per_step}  # of the first step
    return evaluate(program, leaves, [layer.inputs[0]], x, batch.support_sizes)[0]
