"""Do the methods learn what they were made for? Mean squared error on new regression tasks, after the same number of meta-iterations.

    python -m benchmarks.family_learning sinusoid [--iterations N] [--seed S]     # MAML, CAVIA, T-nets, MT-nets, low rank
    python -m benchmarks.family_learning modes                                    # sinusoids, lines and parabolas: one initialisation, several, modulated

The network is 1-40-40-1 with ReLU, 10 support and 10 query points, 25 tasks per meta-iteration, 5 inner steps, Adam at 1e-3,
the meta-gradient clipped to norm 10; 600 new tasks, the same for all, so that the difference to MAML is one of pairs. Intervals are of 95 %.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable

import torch

import fastmaml
from fastmaml import MAML, TaskBatch, methods
from fastmaml.parameterisation import SetEncoder
from fastmaml.training.evaluate import mean_and_interval

OPTIONS = {"inner_lr": 0.01, "inner_steps": 5, "loss": "mse", "on_nonfinite": "skip"}


def net() -> torch.nn.Module:
    return fastmaml.nn.SinusoidMLP(init="torch")


METHODS: dict[str, dict[str, Callable[[], torch.nn.Module]]] = {
    "sinusoid": {
        "MAML": lambda: MAML(net(), **OPTIONS),
        "CAVIA, context=5, inner_lr=0.5": lambda: methods.CAVIA(net(), context=5, **OPTIONS | {"inner_lr": 0.5}),
        "TNets": lambda: methods.TNets(net(), **OPTIONS),
        "MTNets": lambda: methods.MTNets(net(), **OPTIONS),
        "LowRankMAML, rank=4": lambda: methods.LowRankMAML(net(), rank=4, **OPTIONS),
    },
    "modes": {
        "MAML": lambda: MAML(net(), **OPTIONS),
        "Mixture, components=3": lambda: methods.Mixture(net(), components=3, temperature=1.0, **OPTIONS),
        "MMAML": lambda: methods.MMAML(net(), SetEncoder(1, 1), **OPTIONS),
        "HSML": lambda: methods.HSML(net(), SetEncoder(1, 1), **OPTIONS),
    },
}


class Modes:
    """A third each of sinusoids (as Finn et al. 2017), lines and parabolas, x uniform in [-5, 5]."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def sample(self, tasks: int) -> TaskBatch:
        def uniform(low: float, high: float) -> torch.Tensor:
            return low + (high - low) * torch.rand(tasks, 1, 1, generator=self.generator)

        x = -5 + 10 * torch.rand(tasks, 20, 1, generator=self.generator)
        kinds = torch.arange(tasks).remainder(3).view(-1, 1, 1)
        sine = uniform(0.1, 5) * torch.sin(x - uniform(0, math.pi))
        line = uniform(-1, 1) * x + uniform(-3, 3)
        parabola = uniform(-0.2, 0.2) * (x - uniform(-3, 3)) ** 2 + uniform(-3, 3)
        y = torch.where(kinds == 0, sine, torch.where(kinds == 1, line, parabola))
        return TaskBatch.from_tensors(x[:, :10], y[:, :10], x[:, 10:], y[:, 10:])


def run(problem: str, name: str, iterations: int, seed: int) -> tuple[torch.Tensor, float]:
    """(errors of the new tasks, milliseconds per meta-iteration)"""
    torch.manual_seed(seed)
    maml = METHODS[problem][name]()
    source = Modes(seed) if problem == "modes" else fastmaml.tasks.Sinusoid(seed=seed)
    new = (Modes(seed + 1000) if problem == "modes" else fastmaml.tasks.Sinusoid(seed=seed + 1000)).sample(600)
    optimizer = torch.optim.Adam(maml.parameters(), lr=1e-3)
    start = time.perf_counter()
    for _ in range(iterations):
        optimizer.zero_grad()
        maml.meta_grad(source.sample(25))
        torch.nn.utils.clip_grad_norm_([p for p in maml.parameters() if p.grad is not None], 10.0)
        optimizer.step()
    took = time.perf_counter() - start
    with torch.no_grad():
        return maml(new).task_losses, 1e3 * took / iterations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("problem", choices=METHODS)
    parser.add_argument("--iterations", type=int, default=5000, help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(f"{arguments.problem}, seed {arguments.seed}, {arguments.iterations} meta-iterations\n")
    print("| method | error on 600 new tasks | less than MAML by | ms per meta-iteration |\n|---|---|---|---|")
    warnings.filterwarnings("ignore", message=".*not finite were left out")
    baseline = None
    for name in METHODS[arguments.problem]:
        errors, took = run(arguments.problem, name, arguments.iterations, arguments.seed)
        baseline = errors if baseline is None else baseline
        (mean, half), (gain, wide) = mean_and_interval(errors), mean_and_interval(baseline - errors)
        print(f"| {name} | {mean:.3f} ± {half:.3f} | {f'{gain:.3f} ± {wide:.3f}' if errors is not baseline else ''} | {took:.1f} |", flush=True)


if __name__ == "__main__":
    main()
