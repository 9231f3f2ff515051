"""What a call of MAML returns."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from fastmaml.autograd import NoGradient
from fastmaml.batch import TaskBatch
from fastmaml.executors.call import Call, Results
from fastmaml.executors.device import keep_for_graph


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


@lru_cache(maxsize=64)
def _uniform(tasks: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((tasks,), 1.0 / tasks, dtype=dtype, device=device)


@lru_cache(maxsize=64)
def _weights(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


class MetaOutput:
    """One meta-iteration.

    loss            scalar; ``loss.backward()`` fills ``.grad`` of the model's own parameters. Only it carries gradient.
    logits          [tasks, n_query, ...] of the adapted networks; a tuple of [n_query, ...], one per task, where tasks differ in size
    task_losses     [tasks] outer losses (multi-step: the weighted sums); None with outer_loss=
    support_losses  [tasks, inner_steps] inner losses before each step
    penalty         [tasks] what the parameterisation adds to the outer loss, in ``loss`` and not in ``task_losses`` (HSML's reconstruction), or None
    finite          [tasks] bool: tasks that are in the sums
    correct         [tasks] right predictions (classification), or None
    executor, precision   what ran
    """

    __slots__ = ("_guarded", "_values", "batch", "correct", "executor", "finite", "loss", "parameters", "penalty", "precision")

    def __init__(self, call: Call, results: Results) -> None:
        self._values, self._guarded = results.values, {}
        self.finite, self.executor, self.batch = results.finite, results.executor, call.batch
        self.precision = results.precision or ("highest" if results.values["logits"].dtype is torch.float32 else "float64")
        self.penalty: Tensor | None = None
        self.parameters: tuple[Tensor, ...] = ()  # of which the outputs are no constants: they refuse to be differentiated
        self.correct = results.values.get("correct")
        self.loss = self._loss(call, results.all_finite)

    def _loss(self, call: Call, all_finite: bool) -> Tensor | None:
        losses = self._values.get("loss.query")
        if losses is None:
            return None
        if losses.dim() == 2:  # [tasks, steps + 1]: the multi-step loss
            self._values["loss.query"] = losses = losses @ call.weights["step_weights"][-losses.shape[1] :]
        kept = losses if call.strict or all_finite else torch.where(self.finite.to(losses.device), losses, 0.0)
        like = kept.dtype, kept.device
        weights = _uniform(kept.shape[0], *like) if call.task_weights is None else _weights(tuple(call.task_weights.tolist()), *like)
        if kept.is_cuda:
            keep_for_graph(kept.device, weights)
        return torch.dot(kept, weights)

    def _guard(self, name: str) -> Tensor | None:
        value = self._guarded.get(name, self._values.get(name))
        if self.parameters and value is not None and name not in self._guarded:
            with torch.enable_grad():
                value = self._guarded[name] = NoGradient.apply((value,), *self.parameters)[0]
        return value

    @property
    def joined_logits(self) -> Tensor:
        """[sum n_query, ...]"""
        return self._guard("logits")

    @property
    def task_losses(self) -> Tensor | None:
        return self._guard("loss.query")

    @property
    def support_losses(self) -> Tensor:
        if "loss.support" not in self._values:
            self._values["loss.support"] = self._values["logits"].new_zeros(len(self.batch), 0)
        return self._guard("loss.support")

    @property
    def logits(self) -> Tensor | tuple[Tensor, ...]:
        return per_task(self.joined_logits, self.batch.query_sizes)

    @property
    def task_accuracy(self) -> Tensor:
        """[tasks] share of right predictions on the query rows (classification only)."""
        if self.correct is None:
            raise AttributeError("accuracy exists for loss='cross_entropy'")
        sizes = self.batch.query_sizes
        return self.correct / (sizes[0] if min(sizes) == max(sizes) else torch.tensor(sizes, dtype=self.correct.dtype, device=self.correct.device))

    @property
    def accuracy(self) -> Tensor:
        """Mean of ``task_accuracy``, a scalar tensor."""
        return self.task_accuracy.mean()


def per_task(rows: Tensor, sizes: Sequence[int]) -> Tensor | tuple[Tensor, ...]:
    """[sum n, ...] as [tasks, n, ...]; where the sizes differ a tuple of [n, ...]. Views."""
    if all(n == sizes[0] for n in sizes):
        return rows.unflatten(0, (len(sizes), sizes[0]))
    return rows.split(list(sizes))


def of_all_steps(g: Tensor | None, parameter: Tensor) -> Tensor | None:
    """A gradient, with zeros for the rates of steps that did not run."""
    if g is not None and g.numel() != parameter.numel():
        g = torch.cat([g, torch.zeros_like(parameter[len(g) :])])
    return g


def correct_of(logits: Tensor, batch: TaskBatch) -> Tensor:
    """[tasks] numbers of right predictions, for outer losses of the user's own."""
    right = []
    for t, (z, (_, _, _, y)) in enumerate(zip(logits.split(list(batch.query_sizes)), batch, strict=True)):
        z = z if batch.ways is None else z[:, : int(batch.ways[t])]
        right.append((z.argmax(1) == y).sum())
    return torch.stack(right).to(logits.dtype)
