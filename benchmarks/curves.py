"""The same training through a plain torch loop and through fastmaml: ``python -m benchmarks.curves sinusoid | glyphs | omniglot``, each with ``--quick``.

Both sides start from the same weights and see the same tasks, in turns of TURN iterations, so that the machine's noise hits both. Held-out accuracy (sinusoid:
mean squared error) after adaptation, against iterations and against seconds, goes to curves-<what>.json and, as a picture, to curves-<what>.png.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from benchmarks.peers import META_GRAD, OURS, PLAIN, Step, maml_of, plain_loop
from benchmarks.protocol import folder_of, machine
from benchmarks.workloads import WORKLOADS, Tasks, Workload
from fastmaml.batch import TaskBatch
from fastmaml.files import whole_file
from fastmaml.tasks import Glyphs, Omniglot, Sinusoid
from fastmaml.training.evaluate import AT_ONCE, mean_and_interval
from fastmaml.training.pictures import save_figure

Source = Sinusoid | Glyphs | Omniglot
NETWORK = {"sinusoid": "sinusoid, cbfinn", "glyphs": "Omniglot strided, mean loss", "omniglot": "Omniglot strided, mean loss"}
FAST = "fastmaml"
SIDES = {PLAIN: plain_loop, FAST: OURS[META_GRAD].make}
STYLE = {PLAIN: {"color": "#9a9a9a", "linewidth": 4}, FAST: {"color": "#1f6feb", "linewidth": 1.2, "marker": "."}}  # each is seen where they lie on each other
ITERATIONS = {"sinusoid": 5000, "glyphs": 1000, "omniglot": 1000}
OUTER_LR = 1e-3  # of Adam
TURN = 10  # iterations, of which the first such number is also held against float64
HELD_OUT, CURVE = 600, 100  # tasks at the end, and the first of them for every point of a curve


def source_of(what: str, w: Workload, data: Path | None, split: str, seed: int) -> Source:
    sizes = {"shots": w.shots, "queries": w.queries, "tasks": w.tasks, "seed": seed}
    if what == "sinusoid":  # any sinusoid is a new one
        return Sinusoid(**sizes)
    return Glyphs(split, ways=w.ways, **sizes) if what == "glyphs" else Omniglot(data, split, ways=w.ways, **sizes)


def measure_of(w: Workload) -> str:
    """What is measured on held-out tasks: the name of its column."""
    return "mse" if w.loss == "mse" else "accuracy"


# ------------------------------------------------------------------------------------------------- training
class Side:
    """One of the two ways of training, with what it has shown so far."""

    def __init__(self, model: nn.Module, make: Callable[[nn.Module, Workload], Step], w: Workload) -> None:
        self.model, self.step = model, make(model, w)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=OUTER_LR)
        self.losses: list[float] = []
        self.points: list[tuple[int, float, float]] = []  # iteration, seconds, value
        self.seconds = 0.0

    def train(self, batches: list[Tasks]) -> None:
        begin = time.perf_counter()
        for tasks in batches:
            self.optimizer.zero_grad()
            loss = self.step(tasks)
            self.optimizer.step()
            self.losses.append(float(loss))
        self.seconds += time.perf_counter() - begin


def held_out(w: Workload, model: nn.Module, batches: list[TaskBatch]) -> tuple[float, float]:
    """Mean after adaptation and its standard error over tasks. fastmaml measures both sides alike: what may differ is the weights."""
    maml = maml_of(w, model)
    with torch.no_grad():
        outs = [maml(batch) for batch in batches]
    mean, interval = mean_and_interval(torch.cat([o.task_losses if w.loss == "mse" else o.task_accuracy for o in outs]))
    return mean, interval / 1.96


def train_in_turns(sides: dict[str, Side], w: Workload, source: Source, args: argparse.Namespace, curve: list[TaskBatch], bar: str) -> float:
    """Trains both, with a point of each curve every ``args.every`` iterations. Returns the seconds of drawing the tasks."""
    done, drawing = 0, 0.0
    with tqdm(total=args.iterations, desc=bar, leave=False, disable=not sys.stderr.isatty()) as shown:
        while done < args.iterations:
            turn = min(TURN, args.every - done % args.every, args.iterations - done)  # it ends where a point is due
            begin = time.perf_counter()
            batches = [source.sample().stacked() for _ in range(turn)]
            drawing += time.perf_counter() - begin
            for side in sides.values():
                side.train(batches)
            done += turn
            shown.update(turn)
            if done % args.every == 0 or done == args.iterations:
                for side in sides.values():
                    side.points.append((done, side.seconds + drawing, held_out(w, side.model, curve)[0]))
    return drawing


def in_float64(w: Workload, model: nn.Module, source: Source, iterations: int) -> list[float]:
    """Losses of the plain loop from the same weights. Both sides agree with them to rounding and then part, at an iteration that chance decides: Adam's first
    step is the sign of the gradient, so that a weight whose gradient is within rounding of zero may go the other way, in plain torch as in fastmaml."""
    side = Side(copy.deepcopy(model).double(), plain_loop, w)
    batches = [source.sample().stacked() for _ in range(iterations)]
    side.train([tuple(v.double() if v.is_floating_point() else v for v in tasks) for tasks in batches])
    return side.losses


def one_seed(what: str, w: Workload, args: argparse.Namespace, seed: int) -> list[dict]:
    """A row of each side."""
    torch.manual_seed(seed)
    model = w.model()
    sides = {name: Side(copy.deepcopy(model), make, w) for name, make in SIDES.items()}
    train, test = source_of(what, w, args.data, "train", seed), source_of(what, w, args.data, "test", 1000 + seed)
    unseen = [test.sample(min(AT_ONCE, args.held_out - start)) for start in range(0, args.held_out, AT_ONCE)]
    curve = unseen[: args.curve // AT_ONCE]
    drawing = train_in_turns(sides, w, train, args, curve, f"seed {seed}")
    start, _ = held_out(w, model, curve)  # only now: fastmaml's first call is a part of its training
    exact = in_float64(w, model, source_of(what, w, args.data, "train", seed), min(TURN, args.iterations))
    classes = {} if what == "sinusoid" else {"classes": len(train.classes), "held_out_classes": len(test.classes)}
    common = {"workload": w.name, "seed": seed, "iterations": args.iterations, "held_out_tasks": args.held_out, "curve_tasks": args.curve} | classes
    rows = []
    for name, side in sides.items():
        value, error = held_out(w, side.model, unseen)
        row = {"who": name} | common | {measure_of(w): value, "standard_error": error, "points": [(0, 0.0, start), *side.points]}
        rows.append(row | {"seconds": side.seconds + drawing, "drawing_seconds": drawing, "first_losses": side.losses[:TURN], "float64_losses": exact})
    return rows


# ------------------------------------------------------------------------------------------------- what is said
def say(measure: str, value: float, width: int = 0) -> str:
    return f"{value:{width}.2%}" if measure == "accuracy" else f"{value:{width}.4f}"


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Over seeds; the standard error of a single one is not known."""
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def ratio(values: list[float]) -> float:
    """Sum of the first half over that of the second."""
    half = len(values) // 2
    return sum(values[:half]) / sum(values[half:])


def by_side(rows: list[dict]) -> dict[str, list[dict]]:
    return {name: [r for r in rows if r["who"] == name] for name in SIDES}


def show_seed(rows: list[dict], measure: str) -> str:
    lines = [
        f"seed {r['seed']}, {r['who']:11s}{say(measure, r[measure], 8)} ± {say(measure, r['standard_error'])} (standard error over {r['held_out_tasks']}"
        f" held-out tasks), {r['seconds']:.1f} s, of them {r['drawing_seconds']:.1f} to draw the tasks"
        for r in rows
    ]
    first = {r["who"]: r["first_losses"] for r in rows} | {"float64": rows[0]["float64_losses"]}
    return "\n".join(lines + [f"  first losses, {name:11s}" + " ".join(f"{v:.6f}" for v in values) for name, values in first.items()])


def summary(rows: list[dict], measure: str) -> str:
    by, seeds = by_side(rows), len({r["seed"] for r in rows})
    lines = []
    for name, own in by.items():
        mean, error = mean_and_error([r[measure] for r in own])
        took = sum(r["seconds"] for r in own)
        spread = f" ± {say(measure, error)}" if seeds > 1 else ""
        lines.append(f"{name:11s}{say(measure, mean, 8)}{spread} {measure} over {seeds} seed{'s' * (seeds > 1)}, {took:.1f} s")
    mean, error = mean_and_error([a[measure] - b[measure] for a, b in zip(by[FAST], by[PLAIN], strict=True)])
    shown = [f"{v:.1e}" if measure == "mse" else say(measure, v) for v in (mean, error)]
    verdict = f" ± {shown[1]}, seed by seed: {'within' if abs(mean) <= 2 * error else 'MORE THAN'} two standard errors"
    lines.append(f"difference {shown[0]:>8s}{verdict if seeds > 1 else '; with one seed there is no standard error'}")
    for name, own in by.items():
        gaps = zip(*([abs(x / y - 1) for x, y in zip(r["first_losses"], r["float64_losses"], strict=True)] for r in own), strict=True)
        lines.append(f"first losses, largest distance from float64 over seeds, {name:11s}" + " ".join(f"{max(gap):.0e}" for gap in gaps))
    whole, own = (ratio([r["seconds"] - share * r["drawing_seconds"] for r in by[PLAIN] + by[FAST]]) for share in (0, 1))
    lines.append(f"the plain loop takes {whole:.1f}x the time of fastmaml ({own:.1f}x without drawing the tasks)")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------- what is written
def draw(path: Path, title: str, rows: list[dict], measure: str, chance: float | None) -> None:
    """Both curves against iterations and against seconds: mean over seeds, with a band of one standard error."""
    from matplotlib.figure import Figure  # without pyplot: no window, and Agg writes the file
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    seeds = len({r["seed"] for r in rows})
    for name, own in by_side(rows).items():
        points = torch.tensor([r["points"] for r in own], dtype=torch.float64)  # [seeds, points, 3]
        iterations, seconds, mean = points.mean(0).unbind(1)
        error = points[..., 2].std(0) / seeds**0.5 if seeds > 1 else torch.zeros_like(mean)
        for axes, x, label in ((left, iterations, name), (right, seconds, f"{name}: {seconds[-1]:.3g} s")):
            axes.plot(x, mean, label=label, **STYLE[name])
            axes.fill_between(x, mean - error, mean + error, color=STYLE[name]["color"], alpha=0.2, linewidth=0)
    unit = "mean squared error" if measure == "mse" else measure
    left.set(ylabel=f"{unit} on {rows[0]['curve_tasks']} held-out tasks", ylim=(0, None if measure == "mse" else 1))
    for axes, label in ((left, "meta-iterations"), (right, "seconds, without evaluation")):
        if chance is not None:
            axes.axhline(chance, color="0.6", linestyle=":", label="chance")
        axes.set(xlabel=label, xlim=(0, None))
        axes.grid(alpha=0.2)
        axes.legend(frameon=False)
    left.set_xlim(0, rows[0]["iterations"] * 1.02)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(f"{title}; {f'mean and standard error of {seeds} seeds' if seeds > 1 else 'one seed'}", fontsize=11)
    save_figure(figure, path)


def write(folder: Path, what: str, w: Workload, machine: dict, rows: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / f"curves-{what}.json") as file:
        file.write(json.dumps({"machine": machine, "rows": rows}, indent=1).encode())
    ways = f"{w.ways}-way " if w.image else ""
    title = f"{what}, {ways}{w.shots}-shot, {w.tasks} tasks an iteration"
    draw(folder / f"curves-{what}.png", title, rows, measure_of(w), 1 / w.ways if w.image else None)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(NETWORK))
    parser.add_argument("--data", type=Path, help="omniglot: the folder with its zips")
    parser.add_argument("--iterations", type=int, help=f"default {', '.join(f'{n} {what}' for what, n in ITERATIONS.items())}")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default %(default)s)")
    parser.add_argument("--every", type=int, help="iterations between two points of a curve (default a tenth of all)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a try: 2 seeds, 20 iterations, few tasks; no file unless --out")
    parser.add_argument("--out", type=Path, help="folder of the JSON and the picture (default benchmarks/results/<date>-<machine>)")
    args = parser.parse_args()
    if args.what == "omniglot" and args.data is None:
        parser.error("omniglot is read from files you have: --data FOLDER, with the published zips")
    for name in ("iterations", "seeds", "every", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: expected at least 1")
    args.iterations, args.held_out, args.curve = args.iterations or ITERATIONS[args.what], HELD_OUT, CURVE
    if args.quick:
        args.iterations, args.seeds, args.held_out, args.curve = min(args.iterations, 2 * TURN), min(args.seeds, 2), 100, AT_ONCE
    args.every = args.every or max(1, args.iterations // 10)
    return args


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    w = WORKLOADS[NETWORK[args.what]]
    w = w.varied(tasks=4) if args.quick else w
    here = machine()
    args.out = args.out or (None if args.quick else folder_of(here))
    print(f"machine: {here}\n{args.what}: {w.name}, {args.iterations} iterations, Adam {OUTER_LR}\n", flush=True)
    rows: list[dict] = []
    for seed in range(args.seeds):
        rows += (new := one_seed(args.what, w, args, seed))
        print(show_seed(new, measure_of(w)), flush=True)
        if args.out:
            write(args.out, args.what, w, here, rows)
    print("\n" + summary(rows, measure_of(w)))


if __name__ == "__main__":
    main()
