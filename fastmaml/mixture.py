"""A mixture of initialisations: every task adapts all of them, in one batch whose rows are tasks x components."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastmaml import options as checks
from fastmaml.adapted import AdaptedModel
from fastmaml.batch import TaskBatch
from fastmaml.maml import MAML
from fastmaml.output import MetaOutput
from fastmaml.parameterisation.mixture import Mixture


class MixtureMAML(MAML):
    """M initialisations (Jerfel et al. 2019, "Reconciling meta-learning and continual learning with online mixtures of tasks", with a fixed uniform prior).

    Task t adapts each of them to phi_tm. Their responsibilities r_tm = softmax_m(-temperature * rows * L_S(phi_tm)), of the mean support loss of the
    adapted networks (the log-likelihood of ``rows`` support rows), are constants of the M step as in EM, and
    the outer loss is sum_m r_tm L_Q(phi_tm). Predictions are sum_m r_tm p(y | phi_tm), in regression sum_m r_tm f(x; phi_tm).
    """

    mixes = True

    def __init__(self, model: nn.Module, *, components: int = 3, temperature: float = 1.0, **options: Any) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature={temperature!r}: expected a number above 0")
        if "parameterisation" in options or options.get("step_loss_weights") is not None:
            raise ValueError("a mixture is a parameterisation of its own, and its outer loss is that of the last step: leave parameterisation and step_loss_weights out")
        super().__init__(model, parameterisation=Mixture(components), **options)
        self.components, self.temperature = components, float(temperature)

    def forward(self, tasks: Any, *, task_weights: Any = None, outer_loss: Callable | None = None, **settings: Any) -> MixtureOutput:
        """As MAML's; with ``out.responsibilities`` [tasks, components]."""
        return self._both(super().forward, tasks, task_weights, outer_loss, settings)

    def meta_grad(self, tasks: Any, *, task_weights: Any = None, outer_loss: Callable | None = None, **settings: Any) -> MixtureOutput:
        return self._both(super().meta_grad, tasks, task_weights, outer_loss, settings)

    def adapt(self, support_x: Any, support_y: Any = None, *, ways: Any = None, **settings: Any) -> MixtureAdapted:
        """``adapted(x)``: probabilities' logarithms of the mixture, in regression its mean; ``adapted.module(t, m)``: one component."""
        batch = checks.support_batch(support_x, support_y, ways)
        r = self.responsibilities(batch, **settings)
        return MixtureAdapted(super().adapt(self._rows(batch), **settings), r, self.loss.name)

    def explain(self, tasks: Any, **settings: Any) -> str:
        return super().explain(self._rows(TaskBatch.of(tasks)), **settings)

    def memory_bytes(self, tasks: Any, **settings: Any) -> dict[str, int]:
        return super().memory_bytes(self._rows(TaskBatch.of(tasks)), **settings)

    @torch.no_grad()
    def responsibilities(self, tasks: Any, **settings: Any) -> Tensor:
        """[tasks, components], from the support rows alone."""
        batch = TaskBatch.of(tasks)
        again = TaskBatch.from_tasks([(x, y, x, y) for x, y, _, _ in batch], None if batch.ways is None else batch.ways.tolist())
        losses = super().forward(self._rows(again), **settings).task_losses.view(len(batch), self.components)
        reduction, rows = self.loss.reduction, torch.tensor(batch.support_sizes).to(losses)[:, None]
        total = losses * rows if reduction == "mean" else losses if reduction == "sum" else losses * reduction
        return torch.softmax(-self.temperature * total, 1)

    def _rows(self, batch: TaskBatch) -> TaskBatch:
        return batch.select([t for t in range(len(batch)) for _ in range(self.components)])

    def _both(self, call: Callable, tasks: Any, task_weights: Any, outer_loss: Any, settings: Mapping[str, Any]) -> MixtureOutput:
        if outer_loss is not None:
            raise ValueError("outer_loss and a mixture together: the components' losses are weighed by their responsibilities")
        batch = TaskBatch.of(tasks)
        given = checks.check_task_weights(task_weights, len(batch))
        r = self.responsibilities(batch, **settings)
        weights = torch.full((len(batch),), 1 / len(batch), dtype=torch.float64) if given is None else given
        out = call(self._rows(batch), task_weights=(weights[:, None] * r.double().cpu()).flatten(), **settings)
        return MixtureOutput(out, r, batch, self.loss.name)


class MixtureOutput:
    """loss: carries gradient; responsibilities [tasks, components]; components: the MetaOutput of all rows, task by task; task_losses [tasks]."""

    def __init__(self, out: MetaOutput, r: Tensor, batch: TaskBatch, loss: str) -> None:
        self.components, self.responsibilities, self.loss, self.batch, self._name = out, r, out.loss, batch, loss
        self.executor, self.finite = out.executor, out.finite.view(r.shape).all(1)

    @property
    def task_losses(self) -> Tensor:
        return (self.components.task_losses.detach().view(self.responsibilities.shape) * self.responsibilities).sum(1)

    @property
    def logits(self) -> tuple[Tensor, ...]:
        """Of each task the logarithms of the mixture's probabilities [n_query, classes]; in regression its mean."""
        rows = self.components.joined_logits.detach().split([n for n in self.batch.query_sizes for _ in range(self.responsibilities.shape[1])])
        return mixed(rows, self.responsibilities, self._name, self.batch.ways)

    @property
    def task_accuracy(self) -> Tensor:
        """[tasks], the share of right predictions of the mixture (classification)."""
        if self._name != "cross_entropy":
            raise AttributeError("task_accuracy exists for loss='cross_entropy'")
        right = [(z.argmax(1) == y).float().mean() for z, (_, _, _, y) in zip(self.logits, self.batch, strict=True)]
        return torch.stack(right)

    @property
    def accuracy(self) -> Tensor:
        """Mean of task_accuracy over tasks."""
        return self.task_accuracy.mean()


class MixtureAdapted:
    """The adapted components of each task. ``components``: their AdaptedModel, rows tasks x components."""

    def __init__(self, components: AdaptedModel, responsibilities: Tensor, loss: str) -> None:
        self.components, self.responsibilities, self._name = components, responsibilities, loss

    def __len__(self) -> int:
        return len(self.responsibilities)

    def __call__(self, x: Any) -> Any:
        many = self.responsibilities.shape[1]
        rows = self.components([r for r in x for _ in range(many)])
        out = mixed(rows, self.responsibilities, self._name, None)
        return torch.stack(out) if isinstance(x, Tensor) else out

    def module(self, t: int, m: int | None = None) -> nn.Module:
        """Component m of task t; None: the one that is most responsible."""
        if not -len(self) <= t < len(self):
            raise IndexError(f"task {t} of {len(self)}")
        many, t = self.responsibilities.shape[1], t % len(self)
        m = int(self.responsibilities[t].argmax()) if m is None else m
        if not 0 <= m < many:
            raise IndexError(f"component {m} of {many}")
        return self.components.module(t * many + m)


def mixed(rows: Any, r: Tensor, loss: str, ways: Tensor | None) -> tuple[Tensor, ...]:
    """The predictions of ``rows``, tasks x components, each task's by its responsibilities."""
    tasks, many = r.shape
    out = []
    for t in range(tasks):
        z = torch.stack(list(rows[t * many : (t + 1) * many]))
        if loss == "cross_entropy":
            z = z if ways is None else z[..., : int(ways[t])]
            out.append(torch.logsumexp(z.log_softmax(-1) + r[t].log().view(-1, 1, 1).to(z), 0))
        else:
            out.append((z * r[t].view(-1, *[1] * (z.dim() - 1)).to(z)).sum(0))
    return tuple(out)
