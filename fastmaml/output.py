"""What a call of MAML returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmaml.batch import TaskBatch


@dataclass(slots=True)
class MetaOutput:
    """One meta-iteration.

    loss            scalar; ``loss.backward()`` fills ``.grad`` of the model's own parameters. Only it carries gradient.
    logits          [tasks, n_query, ...] of the adapted networks; a tuple of [n_query, ...], one per task, where tasks differ in size
    task_losses     [tasks] outer losses (multi-step: the weighted sums)
    support_losses  [tasks, inner_steps] inner losses before each step
    finite          [tasks] bool: tasks that are in the sums
    executor, precision   what ran
    """

    loss: Tensor
    joined_logits: Tensor
    task_losses: Tensor | None
    support_losses: Tensor
    finite: Tensor
    executor: str
    precision: str
    batch: TaskBatch
    correct: Tensor | None = None

    @property
    def logits(self) -> Tensor | tuple[Tensor, ...]:
        sizes = self.batch.query_sizes
        if all(n == sizes[0] for n in sizes):
            return self.joined_logits.unflatten(0, (len(sizes), sizes[0]))
        return self.joined_logits.split(list(sizes))

    @property
    def task_accuracy(self) -> Tensor:
        """[tasks] share of right predictions on the query rows (classification only)."""
        if self.correct is None:
            raise AttributeError("accuracy exists for loss='cross_entropy'")
        return self.correct / torch.tensor(self.batch.query_sizes, dtype=self.correct.dtype, device=self.correct.device)

    @property
    def accuracy(self) -> Tensor:
        """Mean of ``task_accuracy``, a scalar tensor."""
        return self.task_accuracy.mean()


def accuracy_of(logits: Tensor, batch: TaskBatch) -> Tensor:
    """[tasks] numbers of right predictions, for outer losses of the user's own."""
    ways: Any = batch.ways
    right = []
    for t, z in enumerate(logits.split(list(batch.query_sizes))):
        z = z if ways is None else z[:, : int(ways[t])]
        right.append((z.argmax(1) == batch.task(t)[3]).sum())
    return torch.stack(right).to(logits.dtype)
