"""Convolutional networks: ``python -m benchmarks.conv time | lines | memory | threads | training``, each with ``--quick``.

time       agreement, then time, of each workload beside what people run today
lines      time against tasks, inner steps and shots, on cbfinn's strided Omniglot network: how far from a straight line
memory     mini-ImageNet, 50 inner steps against 1, in fresh processes
threads    one task alone, on one thread and on two
training   Omniglot (--data): plain torch and fastmaml from the same weights on the same tasks, in turns
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm, trange

from benchmarks.engine import interleaved, machine, measure, memory, place, save, show, show_memory
from benchmarks.peers import CONV_PEERS, OURS, maml_of, plain_loop
from benchmarks.workloads import CONV_WORKLOADS, Workload, mini_imagenet, pooled, strided
from fastmaml.tasks import Omniglot
from fastmaml.training.evaluate import AT_ONCE, mean_and_interval

MOST_RESIDUAL = 0.15  # of the measured time, from the straight line
LEAST_SPEEDUP = 1.6  # of one task, by the second thread
HELD_OUT = 600  # tasks
TURN = 10  # iterations of training, of which the first such number is also held against float64


def met(good: bool) -> str:
    return "met" if good else "MISSED"


def ours(w: Workload) -> tuple[torch.nn.Module, Callable]:
    """The model, and the call that leaves its meta-gradient in .grad."""
    torch.manual_seed(0)
    model = w.model()
    return model, OURS["fastmaml meta_grad"](model, w)


# ------------------------------------------------------------------------------------------------- agreement, time
def times(args: argparse.Namespace, out: Path | None) -> None:
    workloads = list(CONV_WORKLOADS.values())
    if args.quick:
        workloads = [strided(tasks=2), pooled(tasks=1, queries=1), mini_imagenet(tasks=1, steps=1, queries=1)]
    peers = {n: p for n, p in CONV_PEERS.items() if args.compile or "compile" not in n}
    rows: list[dict] = []
    for w in tqdm([w for w in workloads if args.only in w.name], leave=False, disable=not sys.stderr.isatty()):
        rows += (mine := measure(w, peers, args.budget, most=1 if args.quick else 16))
        print(show(mine) + "\n", flush=True)
        save(out, rows)


# ------------------------------------------------------------------------------------------------- straight lines
AXES: dict[str, tuple[Callable[[int], Workload], tuple[int, ...]]] = {
    "tasks": (lambda n: strided(tasks=n), (1, 2, 4, 8, 16, 32, 64)),
    "inner steps": (lambda n: strided(steps=n), (1, 2, 5, 10, 20, 50)),
    "shots": (lambda n: strided(shots=n), (1, 2, 5, 10, 15, 20)),
}


def straight_line(x: list[float], y: list[float]) -> tuple[float, float]:
    """(a, b) of y = a + b x, by least squares of the relative residuals: a long time does not outweigh a short one."""
    columns = torch.tensor([[1 / v, u / v] for u, v in zip(x, y, strict=True)], dtype=torch.float64)
    a, b = torch.linalg.lstsq(columns, torch.ones(len(x), 1, dtype=torch.float64)).solution[:, 0].tolist()
    return a, b


def lines(args: argparse.Namespace, out: Path | None) -> None:
    rows: list[dict] = []
    for axis, (make, points) in AXES.items():
        models, steps = {}, {}
        for n in points[:3] if args.quick else points:
            w = dataclasses.replace(make(n), inner_lr=0.01)  # fifty large steps on noise would not stay finite
            models[n], step = ours(w)
            steps[n] = partial(step, w.tasks(0))
        found = interleaved({n: lambda _, step=step: step() for n, step in steps.items()}, models, None, args.budget)
        measured = {n: statistics.median(values) * 1e3 for n, values in found.items()}
        a, b = straight_line(list(measured), list(measured.values()))
        mine = [
            {"axis": axis, "at": n, "median_ms": v, "line_ms": a + b * n, "residual": (a + b * n) / v - 1, "repetitions": len(found[n])}
            for n, v in measured.items()
        ]  # fmt: skip
        worst = max(abs(r["residual"]) for r in mine)
        print(f"time against {axis}: {a:.2f} ms + {b:.2f} ms each; largest residual {worst:.1%} (at most {MOST_RESIDUAL:.0%}: {met(worst < MOST_RESIDUAL)})")
        for r in mine:
            print(f"  {r['at']:4d} {r['median_ms']:10.2f} ms, line {r['line_ms']:10.2f} ms, {r['residual']:+6.1%}")
        print(flush=True)
        rows += mine
        save(out, rows)


# ------------------------------------------------------------------------------------------------- memory, threads
def memories(args: argparse.Namespace, out: Path | None) -> None:
    name = mini_imagenet().name
    rows = memory(name, steps=(1, 3) if args.quick else (1, 50), runs=1 if args.quick else 5)
    print(show_memory(rows))
    more = rows[1]["above_mb"] / rows[0]["above_mb"]
    print(f"K={rows[1]['inner_steps']} takes {more:.2f} times what K={rows[0]['inner_steps']} takes")
    save(out, rows)


def threads(args: argparse.Namespace, out: Path | None) -> None:
    """Beside it, what the second thread gives to two tasks, each on a thread of its own: the cores of a virtual machine may be two halves of one."""
    rows = []
    for make in (strided, pooled, mini_imagenet):
        w, pair = make(tasks=1), make(tasks=2)
        (model, step), (other, both) = ours(w), ours(pair)
        two_tasks = pair.tasks(0)

        def on(count: int, call: Callable) -> Callable:
            def timed(tasks) -> None:
                torch.set_num_threads(count)
                call(tasks)

            return timed

        calls = {"one": on(1, step), "two": on(2, step), "pair": on(2, lambda _, both=both, tasks=two_tasks: both(tasks))}
        found = interleaved(calls, {"": model, "pair": other}, w.tasks(0), args.budget)
        one, two, two_of_them = (statistics.median(found[name]) * 1e3 for name in calls)
        ratio, most = one / two, 2 * one / two_of_them
        print(
            f"{w.name}: {one:.2f} ms on one thread, {two:.2f} on two: {ratio:.2f}x (at least {LEAST_SPEEDUP}x: {met(ratio >= LEAST_SPEEDUP)}); "
            f"two tasks, each on a thread of its own: {most:.2f}x",
            flush=True,
        )
        rows.append({"workload": w.name, "one_thread_ms": one, "two_threads_ms": two, "speedup": ratio, "two_tasks_speedup": most, "repetitions": len(found["one"])})
    torch.set_num_threads(args.threads)
    save(out, rows)


# ------------------------------------------------------------------------------------------------- training
def train_in_turns(sides: dict, source: Omniglot, iterations: int, bar: str) -> tuple[dict[str, list[float]], dict[str, float], float]:
    """Losses and seconds of each side, seconds of drawing the tasks. sides: name -> (model, meta-iteration)."""
    optimizers = {name: torch.optim.Adam(model.parameters(), lr=1e-3) for name, (model, _) in sides.items()}
    losses: dict[str, list[float]] = {name: [] for name in sides}
    seconds, drawing = dict.fromkeys(sides, 0.0), 0.0
    for start in trange(0, iterations, TURN, desc=bar, leave=False, disable=not sys.stderr.isatty()):
        begin = time.perf_counter()
        batches = [source.sample().stacked() for _ in range(min(TURN, iterations - start))]
        drawing += time.perf_counter() - begin
        for name, (_, step) in sides.items():
            begin = time.perf_counter()
            for tasks in batches:
                optimizers[name].zero_grad()
                loss = step(tasks)
                optimizers[name].step()
                losses[name].append(float(loss))
            seconds[name] += time.perf_counter() - begin
    return losses, seconds, drawing


def held_out(w: Workload, model: torch.nn.Module, source: Omniglot, tasks: int, stream: torch.Generator) -> tuple[float, float]:
    """Accuracy after adaptation on new tasks of ``stream``, and the standard error of this mean."""
    maml, found = maml_of(w, model), []
    with torch.no_grad():
        for start in range(0, tasks, AT_ONCE):
            found.append(maml(source.sample(min(AT_ONCE, tasks - start), stream)).task_accuracy)
    mean, interval = mean_and_interval(torch.cat(found))
    return mean, interval / 1.96


def training(args: argparse.Namespace, out: Path | None) -> None:
    """The first losses stand beside those of the same loop in float64. They agree to rounding and then part, at an iteration that chance decides: Adam's first
    step is the sign of the gradient, so that a weight whose gradient is within rounding of zero may go the other way, in plain torch as in fastmaml."""
    batch, tasks = (4, 100) if args.quick else (32, HELD_OUT)
    if args.quick:
        args.iterations, args.seeds = min(args.iterations, 2 * TURN), min(args.seeds, 2)
    w = strided(tasks=batch)
    rows: list[dict] = []
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        model = w.model()
        copies = {name: copy.deepcopy(model) for name in ("plain loop", "fastmaml", "float64")}
        plain, fast = plain_loop(copies["plain loop"], w), OURS["fastmaml meta_grad"](copies["fastmaml"], w)
        exact = plain_loop(copies["float64"].double(), w)
        source = partial(Omniglot, args.data, ways=5, shots=1, queries=1, tasks=batch)
        train, test = source("train", seed=seed), source("test", seed=1000 + seed)

        sides = {"plain loop": (copies["plain loop"], plain), "fastmaml": (copies["fastmaml"], fast)}
        losses, seconds, drawing = train_in_turns(sides, train, args.iterations, f"seed {seed}")
        double = {"float64": (copies["float64"], lambda tasks, exact=exact: exact([v.double() if v.is_floating_point() else v for v in tasks]))}
        truth = train_in_turns(double, source("train", seed=seed), min(TURN, args.iterations), "float64")[0]["float64"]
        common = {"seed": seed, "iterations": args.iterations, "characters": len(train.characters), "held_out_characters": len(test.characters)}
        for name in sides:
            stream = torch.Generator().manual_seed(1000 + seed)
            accuracy, error = held_out(w, copies[name], test, tasks, stream)
            row = common | {"who": name, "held_out_tasks": tasks, "accuracy": accuracy, "standard_error": error}
            rows.append(row | {"seconds": seconds[name] + drawing, "drawing_seconds": drawing, "first_losses": losses[name][:TURN], "float64_losses": truth})
            print(f"seed {seed}, {name:11s} {accuracy:7.2%} ± {error:.2%} (standard error over {tasks} held-out tasks), {row_seconds(rows[-1])}")
            print(f"  first losses      {_losses(losses[name][:TURN])}", flush=True)
        print(f"  those in float64  {_losses(truth)}", flush=True)
        save(out, rows)
    summary(rows)


def _losses(values: list[float]) -> str:
    return " ".join(f"{v:.6f}" for v in values)


def row_seconds(row: dict) -> str:
    return f"{row['seconds']:.0f} s, of them {row['drawing_seconds']:.1f} to draw the tasks"


def summary(rows: list[dict]) -> None:
    by = {name: [r for r in rows if r["who"] == name] for name in ("plain loop", "fastmaml")}
    seeds = len(by["fastmaml"])
    print()
    for name, own in by.items():
        print(f"{name:11s} {over_seeds([r['accuracy'] for r in own])} over {seeds} seeds, {sum(r['seconds'] for r in own):.0f} s")
    pairs = list(zip(by["fastmaml"], by["plain loop"], strict=True))
    print(f"difference  {over_seeds([a['accuracy'] - b['accuracy'] for a, b in pairs])}, seed by seed")
    for name, own in by.items():
        gaps = zip(*([abs(x / y - 1) for x, y in zip(r["first_losses"], r["float64_losses"], strict=True)] for r in own), strict=True)
        print(f"first losses, largest distance from float64 over seeds, {name:11s}" + " ".join(f"{max(gap):.0e}" for gap in gaps))
    ratio = sum(b["seconds"] for _, b in pairs) / sum(a["seconds"] for a, _ in pairs)
    print(f"the plain loop takes {ratio:.1f}x the time of fastmaml")


def over_seeds(values: list[float]) -> str:
    """Mean and its standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):7.2%} ± {error:.2%}"


WHAT = {"time": times, "lines": lines, "memory": memories, "threads": threads, "training": training}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(WHAT))
    parser.add_argument("--quick", action="store_true", help="a try, within a minute: small sizes, one turn; no file unless --out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=30.0, help="seconds of repetitions per workload and group of peers, per axis, per network")
    parser.add_argument("--only", default="", help="time: workloads whose name contains this; no file unless --out")
    parser.add_argument("--compile", action="store_true", help="time: torch.compile too (minutes for each workload)")
    parser.add_argument("--data", type=Path, help="training: the folder with Omniglot's zips")
    parser.add_argument("--iterations", type=int, default=1000, help="training: meta-iterations (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="training: how many (default %(default)s)")
    parser.add_argument("--out", type=Path, help="where all rows go as JSON (default results/<date>-cpu/conv-<what>.json)")
    args = parser.parse_args()
    if args.what == "training" and args.data is None:
        parser.error("training reads Omniglot: --data FOLDER, with the published zips")
    torch.set_num_threads(args.threads)
    if args.quick:
        args.budget = 0.0
    print(f"machine: {machine()}\n", flush=True)
    WHAT[args.what](args, place(args.out, f"conv-{args.what}", args.quick or bool(args.only)))


if __name__ == "__main__":
    main()
