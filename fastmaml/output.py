"""What a call of MAML returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmaml.batch import TaskBatch
from fastmaml.executors.call import Call, Results


class NonFiniteError(FloatingPointError):
    """Tasks whose loss or gradient is not finite; ``tasks`` holds their indices."""

    def __init__(self, tasks: list[int]) -> None:
        self.tasks = tasks
        shown = ", ".join(map(str, tasks[:8])) + (" ..." if len(tasks) > 8 else "")
        super().__init__(
            f"loss or gradient of {len(tasks)} task(s) is not finite: {shown}. Look at these tasks and at inner_lr, "
            "or pass on_nonfinite='skip' to leave such tasks out of the sums. No .grad was changed."
        )

    def __reduce__(self) -> tuple:
        return type(self), (self.tasks,)


@dataclass(slots=True)
class MetaOutput:
    """One meta-iteration.

    loss            scalar; ``loss.backward()`` fills ``.grad`` of the model's own parameters. Only it carries gradient.
    logits          [tasks, n_query, ...] of the adapted networks; a tuple of [n_query, ...], one per task, where tasks differ in size
    task_losses     [tasks] outer losses (multi-step: the weighted sums); None with outer_loss=
    support_losses  [tasks, inner_steps] inner losses before each step
    finite          [tasks] bool: tasks that are in the sums
    executor, precision   what ran
    """

    loss: Tensor | None
    joined_logits: Tensor
    task_losses: Tensor | None
    support_losses: Tensor
    finite: Tensor
    executor: str
    precision: str
    batch: TaskBatch
    correct: Tensor | None = None

    @classmethod
    def of(cls, call: Call, results: Results) -> MetaOutput:
        values, finite = results.values, results.finite
        losses, logits, loss = values.get("loss.query"), values["logits"], None
        if losses is not None:
            if losses.dim() == 2:  # [tasks, steps + 1]: the multi-step loss
                losses = losses @ call.weights["step_weights"][-losses.shape[1] :]
            kept = losses if call.strict else torch.where(finite.to(losses.device), losses, 0.0)
            loss = kept.mean() if call.task_weights is None else (kept * call.task_weights.to(kept)).sum()
        support = values.get("loss.support")
        if support is None:
            support = logits.new_zeros(len(call.batch), 0)
        precision = "highest" if logits.dtype is torch.float32 else "float64"
        return cls(loss, logits, losses, support, finite, results.executor, precision, call.batch, values.get("correct"))

    @property
    def logits(self) -> Tensor | tuple[Tensor, ...]:
        return per_task(self.joined_logits, self.batch.query_sizes)

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


def per_task(rows: Tensor, sizes: Sequence[int]) -> Tensor | tuple[Tensor, ...]:
    """[sum n, ...] as [tasks, n, ...]; where the sizes differ a tuple of [n, ...]. Views."""
    if all(n == sizes[0] for n in sizes):
        return rows.unflatten(0, (len(sizes), sizes[0]))
    return rows.split(list(sizes))


def gradient_of(results: Results, key: str, parameter: Tensor) -> Tensor | None:
    """None where torch would give none. Rates of steps that did not run get zeros."""
    g = results.values.get(key)
    if g is not None and g.shape != parameter.shape:
        g = torch.cat([g, torch.zeros_like(parameter[len(g) :])])
    return g


def correct_of(logits: Tensor, batch: TaskBatch) -> Tensor:
    """[tasks] numbers of right predictions, for outer losses of the user's own."""
    right = []
    for t, (z, (_, _, _, y)) in enumerate(zip(logits.split(list(batch.query_sizes)), batch, strict=True)):
        z = z if batch.ways is None else z[:, : int(batch.ways[t])]
        right.append((z.argmax(1) == y).sum())
    return torch.stack(right).to(logits.dtype)
