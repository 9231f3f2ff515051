"""The same meta-iteration by hand: plain torch, one task after another, keeping the inner loop's graph (create_graph).

python examples/plain_torch.py     compares it with fastmaml: agreement first, then time
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
import torch.nn.functional as F
from torch.func import functional_call

import fastmaml


def meta_grad(model: torch.nn.Module, tasks: fastmaml.TaskBatch, inner_lr: float, inner_steps: int) -> None:
    """Adds the second-order meta-gradient to .grad."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    for support_x, support_y, query_x, query_y in tasks:
        adapted = parameters
        for _ in range(inner_steps):
            loss = F.cross_entropy(functional_call(model, dict(zip(names, adapted, strict=True)), support_x), support_y)
            gradients = torch.autograd.grad(loss, adapted, create_graph=True)
            adapted = [p - inner_lr * g for p, g in zip(adapted, gradients, strict=True)]
        loss = F.cross_entropy(functional_call(model, dict(zip(names, adapted, strict=True)), query_x), query_y)
        (loss / len(tasks)).backward()


def gradient(model: torch.nn.Module, step) -> torch.Tensor:
    model.zero_grad()
    step()
    return torch.cat([p.grad.flatten() for p in model.parameters()]).double()


def seconds(steps, rounds: int = 7) -> list[float]:
    """Median time of each, taken in turn so that a disturbance hits all."""
    times = [[] for _ in steps]
    for i in range(rounds + 1):
        for step, record in zip(steps, times, strict=True):
            start = time.perf_counter()
            step()
            if i:  # the first round warms up
                record.append(time.perf_counter() - start)
    return [statistics.median(record) for record in times]


def compare(maml: fastmaml.MAML, inner_lr: float, tasks: fastmaml.TaskBatch) -> None:
    """One table: each way's error against float64, then its time."""
    model, steps = maml.model, maml.inner_steps
    exact = copy.deepcopy(model).double()
    truth = gradient(exact, lambda: meta_grad(exact, tasks.to(torch.float64), inner_lr, steps))
    ways = {
        "plain torch loop": lambda: meta_grad(model, tasks, inner_lr, steps),
        "fastmaml": lambda: maml.meta_grad(tasks),
    }
    errors = [float((gradient(model, step) - truth).norm() / truth.norm()) for step in ways.values()]
    times = seconds(list(ways.values()))
    model.zero_grad()
    print(f"   {'':20s}{'error against float64':>22s}{'time':>12s}{'speed':>10s}")
    for name, error, elapsed in zip(ways, errors, times, strict=True):
        print(f"   {name:20s}{error:22.1e}{1e3 * elapsed:9.1f} ms{times[0] / elapsed:9.1f}x")


def main(maml: fastmaml.MAML | None = None, inner_lr: float = 0.1, seed: int = 0) -> None:
    if maml is None:
        torch.manual_seed(seed)
        maml = fastmaml.MAML(fastmaml.nn.OmniglotFC(ways=5), inner_lr=inner_lr, inner_steps=1)
    tasks = fastmaml.tasks.Glyphs("train", ways=5, shots=1, queries=5, tasks=32, seed=seed + 4).sample()
    print("The same meta-iteration, 32 of these tasks, float32, gradient of all parameters")
    compare(maml, inner_lr, tasks)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    main()
