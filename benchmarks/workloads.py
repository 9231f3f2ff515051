"""The first workloads: fully connected networks, with the settings of their reference implementations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fastmaml

Tasks = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Workload:
    """One meta-iteration: ``model()`` and ``tasks(seed)`` make it, the rest are the arguments of fastmaml.MAML."""

    name: str
    model: Callable[[], nn.Module]
    tasks: Callable[[int], Tasks]
    inner_lr: float
    inner_steps: int
    loss: str = "cross_entropy"


def sinusoid(tasks: int = 25, points: int = 10) -> Callable[[int], Tasks]:
    def sample(seed: int) -> Tasks:
        batch = fastmaml.tasks.Sinusoid(shots=points, queries=points, tasks=tasks, seed=seed).sample()
        shape = (tasks, points, 1)
        return tuple(v.view(shape) for v in (batch.support_x, batch.support_y, batch.query_x, batch.query_y))

    return sample


def images(tasks: int = 32, ways: int = 5, shots: int = 1, queries: int = 1) -> Callable[[int], Tasks]:
    """Noisy prototypes in the shape of Omniglot: timing does not depend on what is drawn."""

    def sample(seed: int) -> Tasks:
        g = torch.Generator().manual_seed(seed)
        prototypes = torch.rand(tasks, ways, 1, 28, 28, generator=g)

        def rows(n: int) -> tuple[Tensor, Tensor]:
            x = prototypes.repeat(1, n, 1, 1, 1) + 0.3 * torch.randn(tasks, n * ways, 1, 28, 28, generator=g)
            return x, torch.arange(ways).repeat(n).expand(tasks, -1).contiguous()

        return *rows(shots), *rows(queries)

    return sample


WORKLOADS = {
    w.name: w
    for w in (
        Workload("sinusoid K=1", fastmaml.nn.SinusoidMLP, sinusoid(), 0.01, 1, "mse"),
        Workload("OmniglotFC K=1, 1 query", lambda: fastmaml.nn.OmniglotFC(5), images(), 0.5, 1),
        Workload("OmniglotFC K=5, 15 queries", lambda: fastmaml.nn.OmniglotFC(5), images(queries=15), 0.1, 5),
    )
}
