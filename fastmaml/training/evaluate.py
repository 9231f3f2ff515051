"""Evaluation as in Finn et al. 2017: new tasks, every number of inner steps, mean and 95 % interval."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmaml.counts import check_count
from fastmaml.tasks.device import check_device
from fastmaml.training import checkpoint, methods
from fastmaml.training.pictures import draw_evaluation, write_csv
from fastmaml.training.settings import Settings
from fastmaml.training.trainer import model_from, quiet_about_skipped

AT_ONCE = 50  # tasks: bounds the memory that their images take
COLUMNS = ("split", "tasks", "steps", "mean", "interval95", "not_finite")


class Evaluation(NamedTuple):
    """rows: one dict of COLUMNS per number of steps; not_finite: tasks that are not in the mean."""

    settings: Settings
    iteration: int
    split: str
    tasks: int
    rows: list[dict[str, Any]]
    executor: str

    def table(self) -> str:
        settings, regression = self.settings, self.settings.regression
        lines = [
            f"{settings.describe()} after {self.iteration} iterations; {self.tasks} {self.split} tasks",
            f"{'steps':>5}{settings.measure:>{20 if regression else 10}}   95 % interval",
        ]
        for row in self.rows:
            mean = f"{row['mean']:20.4f}" if regression else f"{row['mean']:10.2%}"
            half = f"± {row['interval95']:.4f}" if regression else f"± {row['interval95']:.2%}"
            note = "  as in training" if row["steps"] == settings.inner_steps else ""
            if row["not_finite"]:
                note += f"  without {row['not_finite']} tasks that are not finite"
            lines.append(f"{row['steps']:5}{mean}   {half}{note}")
        return "\n".join(lines)


def evaluate(
    place: Path,
    *,
    tasks: int = 600,
    steps: int | None = None,
    split: str = "test",
    seed: int | None = None,
    data: str | None = None,
    device: str | torch.device = "cpu",
    bar: bool = False,
) -> Evaluation:
    """The checkpoint ``place`` (or in the folder ``place``) on new tasks after 0 .. ``steps`` inner steps.

    Accuracy on the query rows, or their mean squared error; the interval is 1.96 standard errors of the mean over tasks.
    steps: by default 10, or those of training where they are more or the network has no others (MAML++). seed: of the tasks; default: two above that of training. Writes evaluation.csv and evaluation.png beside the checkpoint.
    Raises CheckpointError, and ValueError naming the argument.
    """
    check_count("tasks", tasks)
    path = checkpoint.path_of(place)
    tensors, facts = checkpoint.load(path)
    device = check_device(device)
    settings, maml = model_from(path, tensors, facts, data, device)
    most = methods.most_steps(settings.method, settings.inner_steps)
    steps = (most or max(10, settings.inner_steps)) if steps is None else check_count("steps", steps, 0)
    if most is not None and steps > most:
        raise ValueError(f"steps={steps}: {settings.method} was trained with rates and norms for {most} inner steps")
    maml.on_nonfinite = "skip"
    seed = settings.seed + 2 if seed is None else check_count("seed", seed, 0)
    source = settings.source(split, seed, device)

    from tqdm import tqdm

    found: list[list[Tensor]] = [[] for _ in range(steps + 1)]
    with (
        torch.no_grad(),
        quiet_about_skipped(),
        tqdm(total=tasks, desc="tasks", leave=False, disable=None if bar else True) as shown,
    ):
        for start in range(0, tasks, AT_ONCE):
            batch = source.sample(min(AT_ONCE, tasks - start))
            for k, values in enumerate(found):
                out = maml(batch, inner_steps=k, **methods.task_seeds(settings.method, seed, start, len(batch)))
                value = out.task_losses if settings.regression else out.task_accuracy
                values.append(torch.where(out.finite.cpu(), value.cpu().double(), torch.nan))
            shown.update(len(batch))
    rows = []
    for k, values in enumerate(found):
        joined = torch.cat(values)
        finite = joined[joined.isfinite()]
        mean, half = mean_and_interval(finite)
        rows.append(dict(split=split, tasks=tasks, steps=k, mean=mean, interval95=half, not_finite=tasks - len(finite)))
    result = Evaluation(settings, facts["iteration"], split, tasks, rows, maml.executor)
    write_csv(path.with_name("evaluation.csv"), COLUMNS, rows)
    draw_evaluation(path.with_name("evaluation.png"), settings, result)
    return result


def mean_and_interval(per_task: Tensor) -> tuple[float, float]:
    """Mean over tasks, and half the width of its 95 % interval (NaN for a single task)."""
    per_task = per_task.double()
    if len(per_task) < 2:
        return float(per_task.mean()), float("nan")
    return float(per_task.mean()), 1.96 * float(per_task.std(correction=1)) / len(per_task) ** 0.5
