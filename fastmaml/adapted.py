"""The networks that an inner loop leaves behind, one per task."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastmaml.batch import TaskBatch
from fastmaml.engine import Runner
from fastmaml.executors.call import Call
from fastmaml.executors.torch.evaluate import evaluate
from fastmaml.nn import StepBatchNorm


class AdaptedModel:
    """``adapted(x)`` -> logits; ``adapted.module(t)`` -> a plain nn.Module; ``adapted.weights`` {name: [tasks, *shape]}, of what the inner loop changed.

    support_losses [tasks, inner_steps]: inner losses before each step. Nothing here carries gradient.
    """

    def __init__(
        self,
        predict: Runner,
        weights: Mapping[str, Tensor],
        others: Mapping[str, Tensor],
        batch: TaskBatch,
        support_losses: Tensor,
    ) -> None:
        self.weights, self.support_losses = dict(weights), support_losses
        self._predict, self._others, self._batch = predict, dict(others), batch

    def __len__(self) -> int:
        return len(self._batch)

    @torch.no_grad()
    def __call__(self, x: Any) -> Any:
        """x [tasks, n, ...] -> logits [tasks, n, ...]; a list of [n, ...], one per task, -> a tuple of logits."""
        rows = self._rows(x)
        blank = rows[0].new_zeros(max(max(self._batch.support_sizes), *map(len, rows)), dtype=torch.int64)
        support = self._batch.support_x.split(list(self._batch.support_sizes))  # batchnorm='support' reads them
        tasks = [(s, blank[: len(s)], r.to(s.dtype), blank[: len(r)]) for s, r in zip(support, rows, strict=True)]
        call = Call(TaskBatch.from_tasks(tasks), {**self.weights, **self._others})
        logits = self._predict.executor.forward(call).values["logits"].split([len(r) for r in rows])
        return torch.stack(logits) if isinstance(x, Tensor) else logits

    def _rows(self, x: Any) -> list[Tensor]:
        if not isinstance(x, (Tensor, list, tuple)) or (isinstance(x, Tensor) and x.dim() < 2):
            got = f"a tensor of shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x is {got}: expected [tasks, n, ...], or a list of one tensor [n, ...] per task")
        if len(x) != len(self):
            raise ValueError(f"x has {len(x)} tasks, the adapted model {len(self)}: expected [tasks, n, ...]")
        like = self._batch.support_x
        for t, r in enumerate(x):
            if not isinstance(r, Tensor) or r.dim() < 1 or r.shape[1:] != like.shape[1:] or r.device != like.device or len(r) == 0:
                got = f"shape {list(r.shape)} on {r.device}" if isinstance(r, Tensor) else f"type {type(r).__name__}"
                rows = ", ".join(["n", *map(str, like.shape[1:])])
                raise ValueError(f"x of task {t} has {got}: expected [{rows}] on {like.device}, rows like those of the support set")
        return list(x)

    def module(self, t: int) -> nn.Module:
        """A copy of the user's module with the weights of task ``t``, as its parameterisation makes them: expressions are evaluated, scales and shifts
        folded into their layers. Raises NotImplementedError where a plain module of this kind cannot have them."""
        if not -len(self) <= t < len(self):
            raise IndexError(f"task {t} of {len(self)}")
        found = self._predict.rewritten
        if found.unfolded is not None:
            raise NotImplementedError(f"adapted.module(t): {found.unfolded}. adapted(x) gives its outputs.")
        own = self._predict.own
        leaves = {**{n: w[t] for n, w in self.weights.items()}, **{n: v[t] if n in own else v for n, v in self._others.items()}}
        made = evaluate(found.everything, leaves, found.weights.values())
        module = copy.deepcopy(self._predict.view.model)
        for norm in (m for m in module.modules() if isinstance(m, StepBatchNorm)):
            norm.step = max(self.support_losses.shape[1], 1) - 1  # of the last step that was taken
        parameters = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        with torch.no_grad():
            for name, value in {**leaves, **dict(zip(found.weights, made, strict=True))}.items():
                if name in parameters:
                    parameters[name].copy_(value)
                elif name in found.weights:  # a bias that the layer had not
                    layer, _, last = name.rpartition(".")
                    setattr(module.get_submodule(layer), last, nn.Parameter(value.clone()))
        return module

    def __reduce__(self) -> str:
        raise TypeError("an AdaptedModel cannot be pickled: save adapted.module(t), or adapted.weights")
