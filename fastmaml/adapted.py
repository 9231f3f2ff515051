"""The networks that an inner loop leaves behind, one per task."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastmaml.batch import TaskBatch
from fastmaml.executors import choose
from fastmaml.executors.call import Call
from fastmaml.plan import Arrangement, build_plan
from fastmaml.program import Program


class AdaptedModel:
    """``adapted(x)`` -> logits; ``adapted.module(t)`` -> a plain nn.Module; ``adapted.weights`` {name: [tasks, *shape]}.

    support_losses [tasks, inner_steps]: inner losses before each step. Nothing here carries gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        program: Program,
        weights: Mapping[str, Tensor],
        others: Mapping[str, Tensor],
        batch: TaskBatch,
        backend: str,
        support_losses: Tensor | None,
    ) -> None:
        self.weights, self.support_losses = dict(weights), support_losses
        self._model, self._others, self._batch, self._backend = model, dict(others), batch, backend
        own = tuple(replace(leaf, role="const", home="task" if leaf.name in weights else "meta") for leaf in program.leaves)
        self._program = replace(program, leaves=own)
        self._runner: Any = None

    def __len__(self) -> int:
        return len(self._batch)

    @torch.no_grad()
    def __call__(self, x: Any) -> Any:
        """x [tasks, n, ...] -> logits [tasks, n, ...]; a list of [n, ...], one per task, -> a tuple of logits."""
        rows = list(x)
        if len(rows) != len(self):
            raise ValueError(f"x has {len(rows)} tasks, the adapted model {len(self)}: expected [tasks, n, ...]")
        for t, r in enumerate(rows):
            if not isinstance(r, Tensor) or tuple(r.shape[1:]) != tuple(self._batch.support_x.shape[1:]):
                got = f"rows of shape {list(r.shape[1:])}" if isinstance(r, Tensor) else type(r).__name__
                raise ValueError(f"x of task {t} has {got}, the support set {list(self._batch.support_x.shape[1:])}: expected [n, ...] of the same samples")
        support = [self._batch.task(t)[:2] for t in range(len(self))]
        blank = [r.new_zeros(len(r), dtype=torch.int64) for r in rows]
        marks = [sy.new_zeros(len(sx), dtype=torch.int64) for sx, sy in support]
        dtype = support[0][0].dtype
        batch = TaskBatch.from_tasks([(sx, m, r.to(dtype), b) for (sx, _), m, r, b in zip(support, marks, rows, blank, strict=True)])
        if self._runner is None:
            plan = build_plan(self._program, Arrangement(0, entry="predict"))
            first = next(iter((*self.weights.values(), *self._others.values())))
            self._runner = choose(self._backend, plan, first.dtype, first.device)
        logits = self._runner.forward(Call(batch, {**self.weights, **self._others})).values["logits"].split([len(r) for r in rows])
        return torch.stack(logits) if isinstance(x, Tensor) else logits

    def module(self, t: int) -> nn.Module:
        """A copy of the user's module with the weights of task ``t``."""
        if not -len(self) <= t < len(self):
            raise IndexError(f"task {t} of {len(self)}")
        module = copy.deepcopy(self._model)
        parameters = dict(module.named_parameters())
        with torch.no_grad():
            for name, value in {**{n: w[t] for n, w in self.weights.items()}, **self._others}.items():
                if name in parameters:
                    parameters[name].copy_(value)
        return module
