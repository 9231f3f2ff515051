"""5-way 1-shot letters: trained on Latin, Greek and Cyrillic, tested on Georgian and Armenian.

A small convolutional network; the letters come from matplotlib's own fonts: nothing is downloaded.

python examples/glyphs.py [--iterations N] [--seed S] [--out FOLDER]
"""

from __future__ import annotations

from pathlib import Path

import torch
from common import mean_and_interval, parse_arguments, save, shown
from matplotlib.figure import Figure
from tqdm import trange

import fastmaml
from fastmaml.tasks.episodes import nearest_neighbour

ITERATIONS = 1500
INNER_LR = 0.1
META_LR = 0.01  # this rate was chosen with Greek held out of training, not on the test alphabets
QUERIES = 5  # per class, in training and in testing

Curve = list[tuple[int, float, float]]  # iteration, accuracy on training tasks (mean since the last), on new alphabets


def network() -> torch.nn.Module:
    """Four times [conv 3x3 of 16 filters, stride 2 -> batch normalisation -> ReLU], then a linear layer."""
    return fastmaml.nn.conv4(ways=5, filters=16, stride=2)


def train(iterations: int, seed: int) -> tuple[fastmaml.MAML, Curve]:
    torch.manual_seed(seed)
    maml = fastmaml.MAML(network(), inner_lr=INNER_LR, inner_steps=1, backend="cpu")
    optimizer = torch.optim.Adam(maml.parameters(), lr=META_LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    source = fastmaml.tasks.Glyphs("train", ways=5, shots=1, queries=QUERIES, tasks=32, seed=seed)
    new = fastmaml.tasks.Glyphs("test", ways=5, shots=1, queries=QUERIES, seed=seed + 1).sample(100)
    curve: Curve = []
    seen: list[float] = []
    with trange(1, iterations + 1, desc="   training", leave=False, disable=None) as bar:
        for i in bar:
            optimizer.zero_grad(set_to_none=False)
            out = maml.meta_grad(source.sample())
            optimizer.step()
            schedule.step()
            seen.append(float(out.accuracy))
            if i % max(1, iterations // 20) == 0:
                with torch.no_grad():
                    curve.append((i, sum(seen) / len(seen), float(maml(new).accuracy)))
                seen = []
                bar.set_postfix(new_alphabets=f"{curve[-1][2]:.1%}")
    return maml, curve


def evaluate(maml: fastmaml.MAML, seed: int, tasks: int = 600) -> dict[str, tuple[float, float]]:
    """Accuracy on tasks of unseen alphabets, with its 95 % interval."""
    batch = fastmaml.tasks.Glyphs("test", ways=5, shots=1, queries=QUERIES, seed=seed + 2).sample(tasks)
    with torch.no_grad():
        before, after = maml(batch, inner_steps=0), maml(batch)
    neighbour = torch.tensor([nearest_neighbour(batch.select(t)) for t in range(tasks)])
    return {
        "before adaptation": mean_and_interval(before.task_accuracy),
        "after adaptation": mean_and_interval(after.task_accuracy),
        "nearest neighbour of pixels": mean_and_interval(neighbour),
    }


def draw_curve(curve: Curve, results: dict[str, tuple[float, float]], path: Path) -> Path:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    iteration, seen, new = zip(*curve, strict=True)
    axes.plot(iteration, seen, "C0.-", label="training alphabets")
    axes.plot(iteration, new, "C3.-", label="new alphabets")
    neighbour = results["nearest neighbour of pixels"][0]
    axes.axhline(neighbour, color="0.4", linestyle="--", label="nearest neighbour of pixels, new alphabets")
    axes.axhline(0.2, color="0.7", linestyle=":", label="chance")
    axes.set(xlabel="meta-iteration", ylabel="accuracy after adaptation", ylim=(0, 1), xlim=(0, None))
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.18))
    return save(figure, path)


def draw_task(maml: fastmaml.MAML, seed: int, path: Path) -> Path:
    """A typical test task, of median accuracy among 101: what the network was shown, what it made of the queries."""
    source = fastmaml.tasks.Glyphs("test", ways=5, shots=1, queries=QUERIES, seed=seed + 3)
    batch, classes = source.sample(101, return_classes=True)
    with torch.no_grad():
        typical = int(maml(batch).task_accuracy.argsort(stable=True)[50])
    batch, classes = batch.select(typical), classes[typical]
    support_x, _, query_x, query_y = batch.stacked()
    guess = maml.adapt(batch)(query_x).argmax(-1)[0].view(5, QUERIES)  # [ways, queries]
    truth, images = query_y[0].view(5, QUERIES), query_x[0, :, 0].unflatten(0, (5, QUERIES))
    letters = [source.classes[c] for c in classes]

    figure = Figure(figsize=(6, 7.4), layout="constrained")
    grid = figure.subplots(1 + QUERIES, 5)
    for way in range(5):
        grid[0, way].imshow(support_x[0, way, 0], cmap="gray_r", vmin=0, vmax=1)
        grid[0, way].set_title(f"support {letters[way]}", fontsize=10)
        for q in range(QUERIES):
            axes, right = grid[1 + q, way], guess[way, q] == truth[way, q]
            axes.imshow(images[way, q], cmap="gray_r", vmin=0, vmax=1)
            color = "tab:green" if right else "tab:red"
            axes.set_title(letters[guess[way, q]], fontsize=10, color=color)
            axes.spines[:].set(color=color, linewidth=2)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    right = int((guess == truth).sum())
    title = f"A typical task of new alphabets: {right} of {truth.numel()} queries right"
    figure.suptitle(title + "\n(above each query: the letter it was taken for)", fontsize=11)
    return save(figure, path)


def main(iterations: int, seed: int, out: Path) -> tuple[fastmaml.MAML, list[Path]]:
    print(f"Glyphs: letters, 5-way 1-shot, convolutional network, 1 inner step, {iterations} iterations of 32 tasks")
    maml, curve = train(iterations, seed)
    results = evaluate(maml, seed)
    print("   accuracy on 600 tasks of alphabets never seen in training (Georgian, Armenian)")
    for name, (mean, half) in results.items():
        print(f"      {name:28s}{mean:6.1%} ± {half:.1%}")
    files = [draw_curve(curve, results, out / "glyphs-learning.png"), draw_task(maml, seed, out / "glyphs-task.png")]
    return maml, files


if __name__ == "__main__":
    arguments = parse_arguments(__doc__.splitlines()[0], ITERATIONS)
    print("\nlook at", *map(shown, main(arguments.iterations, arguments.seed, arguments.out)[1]))
