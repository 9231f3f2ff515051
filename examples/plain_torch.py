"""The same meta-iteration by hand: plain torch, one task after another, keeping the inner loop's graph (create_graph).

python examples/plain_torch.py     compares it with fastmaml: agreement first, then time
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from glyphs import INNER_LR, network
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


@contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compare(maml: fastmaml.MAML, inner_lr: float, tasks: fastmaml.TaskBatch, rounds: int = 8, patience: float = 20):
    """One table: each way's error against float64, then its best time; in turns, so that a disturbance hits all.

    The error is the median of the tasks' own: in some task a ReLU input may be so close to zero that float32 puts it on
    the other side. That happens to plain torch and to fastmaml, to each in tasks of its own, and hides the rounding.
    """
    model, steps = maml.model, maml.inner_steps
    exact = copy.deepcopy(model).double()
    single = [tasks.select(t) for t in range(len(tasks))]
    truth = [gradient(exact, lambda t=t: meta_grad(exact, t.to(torch.float64), inner_lr, steps)) for t in single]

    def plain(batch: fastmaml.TaskBatch) -> None:
        meta_grad(model, batch, inner_lr, steps)

    def fast(batch: fastmaml.TaskBatch) -> None:
        maml.meta_grad(batch)

    def error(step) -> float:
        found = [gradient(model, lambda t=t: step(t)) for t in single]
        return statistics.median(float((g - w).norm() / w.norm()) for g, w in zip(found, truth, strict=True))

    most = torch.get_num_threads()
    ways = [("plain torch loop", plain, n) for n in sorted({1, most})]  # small layers: one thread may be its best
    ways.append(("fastmaml", fast, most))
    errors, times = [], [float("inf")] * len(ways)
    end = time.perf_counter() + patience
    for turn in range(rounds):
        for i, (_, step, count) in enumerate(ways):
            with threads(count):
                if turn == 0:
                    errors.append(error(step))
                start = time.perf_counter()
                step(tasks)
                times[i] = min(times[i], time.perf_counter() - start)
        if time.perf_counter() > end:
            break
    model.zero_grad()

    peer = min(t for (_, step, _), t in zip(ways, times, strict=True) if step is plain)
    print(f"   {'':30s}{'error against float64':>22s}{'time':>13s}{'speed':>9s}")
    for (name, _, count), error, elapsed in zip(ways, errors, times, strict=True):
        label = f"{name}, {count} thread{'s' if count > 1 else ''}"
        print(f"   {label:30s}{error:22.1e}{1e3 * elapsed:10.1f} ms{peer / elapsed:8.1f}x")


def main(maml: fastmaml.MAML | None = None, inner_lr: float = INNER_LR, seed: int = 0) -> None:
    if maml is None:
        torch.manual_seed(seed)
        maml = fastmaml.MAML(network(), inner_lr=inner_lr, inner_steps=1, backend="cpu")
    tasks = fastmaml.tasks.Glyphs("train", ways=5, shots=1, queries=5, tasks=32, seed=seed + 4).sample()
    print("The same meta-iteration, 32 tasks: error of the meta-gradient (median task), then time")
    compare(maml, inner_lr, tasks)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    main()
