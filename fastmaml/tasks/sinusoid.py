"""Sinusoid regression, Finn et al. 2017 (MAML), section 5.1: each task is y = amplitude * sin(x - phase)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fastmaml.batch import TaskBatch
from fastmaml.counts import check_count
from fastmaml.tasks.device import check_device

Range = tuple[float, float]


class Sinusoid:
    """Tasks y = amplitude * sin(x - phase); amplitude, phase and x uniform in the given ranges (low, high).

    Yields TaskBatch with support_x, support_y [tasks, shots, 1] and query_x, query_y [tasks, queries, 1], float32, on ``device``.
    Raises ValueError or TypeError for counts below one and for ranges that are not finite (low, high) pairs in order.
    """

    def __init__(
        self,
        shots: int = 10,
        queries: int = 10,
        tasks: int = 25,
        seed: int = 0,
        amplitude: Range = (0.1, 5.0),
        phase: Range = (0.0, math.pi),
        x: Range = (-5.0, 5.0),
        device: str | torch.device = "cpu",
    ) -> None:
        self.shots = check_count("shots", shots)
        self.queries = check_count("queries", queries)
        self.tasks = check_count("tasks", tasks)
        self.amplitude = _range("amplitude", amplitude)
        self.phase = _range("phase", phase)
        self.x = _range("x", x)
        self.device = check_device(device)
        self.generator = torch.Generator().manual_seed(check_count("seed", seed, minimum=0))

    def sample(
        self, tasks: int | None = None, generator: torch.Generator | None = None, *, return_params: bool = False
    ) -> TaskBatch | tuple[TaskBatch, Tensor, Tensor]:
        """One meta-batch from the source's own stream, or from `generator` (on the CPU).

        With return_params: (batch, amplitude [tasks], phase [tasks]), the truth behind the batch.
        """
        tasks = self.tasks if tasks is None else check_count("tasks", tasks)
        generator = self.generator if generator is None else generator
        amplitude = _uniform((tasks, 1, 1), self.amplitude, generator)
        phase = _uniform((tasks, 1, 1), self.phase, generator)
        xs = [_uniform((tasks, n, 1), self.x, generator) for n in (self.shots, self.queries)]
        # The sine in double, rounded once: the last bit of a float32 sine may depend on how threads split the work
        ys = [(amplitude.double() * torch.sin(x.double() - phase.double())).float() for x in xs]
        batch = TaskBatch.from_tensors(*(v.to(self.device) for v in (xs[0], ys[0], xs[1], ys[1])))
        return (batch, amplitude.flatten(), phase.flatten()) if return_params else batch

    def __iter__(self) -> Iterator[TaskBatch]:
        """Endless; goes on where the source's stream stands."""
        while True:
            yield self.sample()


def _uniform(shape: tuple[int, ...], bounds: Range, generator: torch.Generator) -> Tensor:
    low, high = bounds
    return torch.rand(shape, generator=generator, dtype=torch.float32).mul_(high - low).add_(low)


def _range(name: str, value: Range) -> Range:
    try:
        low, high = (float(v) for v in value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}={value!r}: expected a pair (low, high)") from None
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"{name}={value!r}: expected finite numbers with low <= high")
    return low, high
