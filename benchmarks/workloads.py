"""The workloads, with the settings of their reference implementations: fully connected networks, convolutional ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

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
    adapt: tuple[str, ...] = ("*",)

    def adapted(self, model: nn.Module) -> list[str]:
        """Names of the parameters that the inner loop changes, for every way of computing alike."""
        return [name for name, _ in model.named_parameters() if any(fnmatchcase(name, p) for p in self.adapt)]


def sinusoid(tasks: int = 25, points: int = 10) -> Callable[[int], Tasks]:
    def sample(seed: int) -> Tasks:
        batch = fastmaml.tasks.Sinusoid(shots=points, queries=points, tasks=tasks, seed=seed).sample()
        shape = (tasks, points, 1)
        return tuple(v.view(shape) for v in (batch.support_x, batch.support_y, batch.query_x, batch.query_y))

    return sample


def images(
    tasks: int = 32, ways: int = 5, shots: int = 1, queries: int = 1, channels: int = 1, side: int = 28
) -> Callable[[int], Tasks]:
    """Noisy prototypes in the shape of a data set's images: timing does not depend on what is drawn."""

    def sample(seed: int) -> Tasks:
        g = torch.Generator().manual_seed(seed)
        shape = (channels, side, side)
        prototypes = torch.rand(tasks, ways, *shape, generator=g)

        def rows(n: int) -> tuple[Tensor, Tensor]:
            x = prototypes.repeat(1, n, 1, 1, 1) + 0.3 * torch.randn(tasks, n * ways, *shape, generator=g)
            return x, torch.arange(ways).repeat(n).expand(tasks, -1).contiguous()

        return *rows(shots), *rows(queries)

    return sample


def _named(*workloads: Workload) -> dict[str, Workload]:
    return {w.name: w for w in workloads}


WORKLOADS = _named(
    Workload("sinusoid K=1", fastmaml.nn.SinusoidMLP, sinusoid(), 0.01, 1, "mse"),
    Workload("OmniglotFC K=1, 1 query", lambda: fastmaml.nn.OmniglotFC(5), images(), 0.5, 1),
    Workload("OmniglotFC K=5, 15 queries", lambda: fastmaml.nn.OmniglotFC(5), images(queries=15), 0.1, 5),
)


def _count(tasks: int, queries: int) -> str:
    return f"{tasks} task{'' if tasks == 1 else 's'}, {queries} quer{'y' if queries == 1 else 'ies'}"


# Gamma and beta of the reference systems below are learned outside only. Their rates are taken for the mean loss, as every
# port to torch does; that of cbfinn/maml itself is 5 times as large.
NO_NORMS = ("*.conv.*", "classifier.*")


def strided(tasks: int = 32, steps: int = 1, shots: int = 1, queries: int = 1) -> Workload:
    """cbfinn/maml's Omniglot."""
    name = f"Omniglot strided, {_count(tasks, queries)}, {shots}-shot, K={steps}"
    data = images(tasks, shots=shots, queries=queries)
    return Workload(name, fastmaml.nn.CbfinnOmniglot, data, 0.4, steps, adapt=NO_NORMS)


def pooled(tasks: int = 32, queries: int = 15) -> Workload:
    """tristandeleu/pytorch-maml's Omniglot."""
    data = images(tasks, queries=queries)
    name = f"Omniglot conv4-64, {_count(tasks, queries)}, K=1"
    return Workload(name, fastmaml.nn.PyTorchMAMLConv, data, 0.4, 1, adapt=NO_NORMS)


def mini_imagenet(tasks: int = 4, steps: int = 5, queries: int = 15) -> Workload:
    """cbfinn/maml's mini-ImageNet."""
    data = images(tasks, queries=queries, channels=3, side=84)
    name = f"mini-ImageNet conv4-32, {_count(tasks, queries)}, K={steps}"
    return Workload(name, fastmaml.nn.CbfinnMiniImagenet, data, 0.01, steps, adapt=NO_NORMS)


CONV_WORKLOADS = _named(strided(), pooled(), mini_imagenet())
