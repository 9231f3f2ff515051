"""Sinusoid regression, Finn et al. 2017: ten points of a sine of unknown amplitude and phase, and one inner step.

python examples/sinusoid.py [--iterations N] [--seed S] [--out FOLDER]
"""

from __future__ import annotations

from pathlib import Path

import torch
from common import mean_and_interval, parse_arguments, save, shown
from matplotlib.figure import Figure
from tqdm import trange

import fastmaml

ITERATIONS = 15000
STEPS = (0, 1, 10)


def train(iterations: int, seed: int) -> fastmaml.MAML:
    torch.manual_seed(seed)
    maml = fastmaml.MAML(fastmaml.nn.SinusoidMLP(), inner_lr=0.01, inner_steps=1, loss="mse")
    optimizer = torch.optim.Adam(maml.parameters(), lr=1e-3)
    source = fastmaml.tasks.Sinusoid(shots=10, tasks=25, seed=seed)
    for _ in trange(iterations, desc="   training", leave=False, disable=None):
        optimizer.zero_grad(set_to_none=False)
        maml.meta_grad(source.sample())  # as maml(tasks).loss.backward(), a little faster
        optimizer.step()
    return maml


def evaluate(maml: fastmaml.MAML, seed: int, tasks: int = 600) -> dict[int, tuple[float, float]]:
    """Mean squared error on new tasks after each number of steps, with its 95 % interval."""
    batch = fastmaml.tasks.Sinusoid(shots=10, queries=100, tasks=tasks, seed=seed + 1).sample()
    with torch.no_grad():
        return {steps: mean_and_interval(maml(batch, inner_steps=steps).task_losses) for steps in STEPS}


def draw(maml: fastmaml.MAML, seed: int, path: Path, tasks: int = 3) -> Path:
    source = fastmaml.tasks.Sinusoid(shots=10, tasks=tasks, seed=seed + 2)
    batch, amplitude, phase = source.sample(return_params=True)
    x = torch.linspace(-5, 5, 200)
    grid = x[None, :, None].expand(tasks, -1, 1)  # [tasks, n, 1]
    curves = {steps: maml.adapt(batch, inner_steps=steps)(grid) for steps in STEPS}

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for t, axes in enumerate(figure.subplots(1, tasks, sharey=True)):
        support_x, support_y, _, _ = batch.task(t)
        axes.plot(x, amplitude[t] * torch.sin(x - phase[t]), color="0.75", linewidth=5, label="truth")
        for (steps, y), style in zip(curves.items(), ("C0:", "C1--", "C3-"), strict=True):
            axes.plot(x, y[t, :, 0], style, label=f"after {steps} step{'' if steps == 1 else 's'}")
        axes.plot(support_x, support_y, "k^", markersize=7, label="the 10 support points")
        axes.set(xlabel="x", title=f"new task {t + 1}: {amplitude[t]:.1f} sin(x − {phase[t]:.1f})")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    return save(figure, path)


def main(iterations: int, seed: int, out: Path) -> Path:
    print(f"Sinusoid: regression from 10 points, 1 inner step, {iterations} iterations of 25 tasks")
    maml = train(iterations, seed)
    print("   mean squared error on 600 new tasks")
    for steps, (mean, half) in evaluate(maml, seed).items():
        print(f"      after {steps:2d} step{'s' if steps != 1 else ' '}  {mean:6.3f} ± {half:.3f}")
    return draw(maml, seed, out / "sinusoid.png")


if __name__ == "__main__":
    arguments = parse_arguments(__doc__.splitlines()[0], ITERATIONS)
    print("\nlook at", shown(main(arguments.iterations, arguments.seed, arguments.out)))
