"""Tables and pictures of a run, each written whole or not at all."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmaml.files import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fastmaml.training.evaluate import Evaluation
    from fastmaml.training.settings import Settings


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Path:
    """With a header; numbers as Python prints them, in full."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with whole_file(path) as file:
        file.write(text.getvalue().encode())
    return path


def draw_curve(path: Path, settings: Settings, log: Sequence[Mapping[str, Any]], unseen: str) -> Path:
    """The learning curve from the rows of log.csv."""
    figure, axes = _figure()
    key = "loss" if settings.regression else "accuracy"
    iterations = [row["iteration"] for row in log]
    axes.plot(iterations, [row[key] for row in log], "C0.-", label="training tasks")
    if log and log[0][f"validation_{key}"] is not None:
        axes.plot(iterations, [row[f"validation_{key}"] for row in log], "C3.-", label=unseen)
    _measure(axes, settings)
    axes.set(xlabel="meta-iteration", xlim=(0, None), title=settings.describe())
    axes.legend(frameon=False)
    return save_figure(figure, path)


def draw_evaluation(path: Path, settings: Settings, result: Evaluation) -> Path:
    """The measure after each number of inner steps, with its interval."""
    figure, axes = _figure()
    steps = [row["steps"] for row in result.rows]
    means, halves = ([row[name] for row in result.rows] for name in ("mean", "interval95"))
    axes.errorbar(steps, means, halves, fmt="C0.-", capsize=3)
    if settings.inner_steps in steps:
        axes.plot(settings.inner_steps, means[steps.index(settings.inner_steps)], "C3o", label="steps in training")
    _measure(axes, settings)
    axes.set(xlabel="inner steps", xticks=steps if len(steps) < 25 else steps[:: len(steps) // 10])
    axes.set_title(f"{settings.describe()}\n{result.tasks} {result.split} tasks, mean and 95 % interval", fontsize=11)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    return save_figure(figure, path)


def _figure() -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure  # without pyplot: no window, no state of its own

    figure = Figure(figsize=(6, 4), layout="constrained")
    return figure, figure.subplots()


def _measure(axes: Axes, settings: Settings) -> None:
    if settings.regression:
        axes.set(ylabel=settings.measure, ylim=(0, None))
        return
    axes.axhline(1 / settings.ways, color="0.7", linestyle=":", label="chance")
    axes.set(ylabel="accuracy on queries", ylim=(0, 1))


def save_figure(figure: Figure, path: Path) -> Path:
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=150)
    return path
