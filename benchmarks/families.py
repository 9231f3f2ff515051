"""The family of meta-parameterisations beside MAML: instructions and FLOPs of their Plans, and times taken in turns.

    python -m benchmarks.families [--repeats N]      # the tables of docs/methods.md

Counted: instructions of the Plan, and floating-point operations of a whole meta-iteration (what a prologue does in plain torch is not in them, and is
marked). Timed: ``meta_grad``, each method and MAML in turns, medians; the ratio is the median of the ratios of neighbouring turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch

import fastmaml
from fastmaml import MAML, TaskBatch, methods
from fastmaml.parameterisation import SetEncoder
from fastmaml.plan.costs import costs

INNER = ("gradient", "update", "update_bwd", "hvp")
Row = tuple[str, Callable[[], MAML]]


def convolutional() -> tuple[str, TaskBatch, list[Row]]:
    """learn2learn's strided network on Omniglot's shapes, 5-way 1-shot, 5 queries, 8 tasks, 5 inner steps."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(8, 5, 1, 28, 28, generator=g), torch.arange(5).expand(8, 5)
    qx, qy = torch.rand(8, 25, 1, 28, 28, generator=g), torch.arange(25).remainder(5).expand(8, 25)
    options = {"inner_lr": 0.05, "inner_steps": 5}

    def net() -> torch.nn.Module:
        torch.manual_seed(0)
        return fastmaml.nn.OmniglotCNN(5)

    convs = "block*.conv.weight"
    rows: list[Row] = [
        ("MAML", lambda: MAML(net(), **options)),
        ("FirstOrderMAML", lambda: methods.FirstOrderMAML(net(), **options)),
        ("Reptile", lambda: methods.Reptile(net(), **options)),
        ("iMAML", lambda: methods.iMAML(net(), **options)),
        ("MetaSGD", lambda: methods.MetaSGD(net(), **options)),
        ("MAMLPlusPlus", lambda: methods.MAMLPlusPlus(net(), **options)),
        ("ANIL", lambda: methods.ANIL(net(), **options)),
        ("HeadOnly", lambda: methods.HeadOnly(net(), **options)),
        ("BOIL", lambda: methods.BOIL(net(), **options)),
        ("MTL, adapt='head'", lambda: methods.MTL(net(), **options)),
        ("MTL, adapt='both'", lambda: methods.MTL(net(), adapt="both", **options)),
        ("ChannelScaleShift", lambda: methods.ChannelScaleShift(net(), **options)),
        ("ChannelScaleShift, frozen=False", lambda: methods.ChannelScaleShift(net(), frozen=False, **options)),
        ("CAVIA, FiLM of 100", lambda: methods.CAVIA(net(), context=100, layers=convs, **options)),
        ("TNets", lambda: methods.TNets(net(), **options)),
        ("MTNets (*)", lambda: methods.MTNets(net(), **options)),
        ("LowRankMAML, rank=4", lambda: methods.LowRankMAML(net(), rank=4, **options)),
        ("ZeroHead", lambda: methods.ZeroHead(net(), **options)),
        ("ProtoMAML (*)", lambda: methods.ProtoMAML(net(), **options)),
    ]
    return "conv4-64, stride 2: 8 tasks, 5-way 1-shot, 5 queries, K = 5", TaskBatch.of((x, y, qx, qy)), rows


def sinusoids() -> tuple[str, TaskBatch, list[Row]]:
    batch = fastmaml.tasks.Sinusoid(seed=0).sample(25)
    options = {"inner_lr": 0.01, "inner_steps": 5, "loss": "mse"}

    def net() -> torch.nn.Module:
        torch.manual_seed(0)
        return fastmaml.nn.SinusoidMLP(init="torch")

    rows: list[Row] = [
        ("MAML", lambda: MAML(net(), **options)),
        ("CAVIA", lambda: methods.CAVIA(net(), context=5, **options)),
        ("TNets", lambda: methods.TNets(net(), **options)),
        ("MTNets (*)", lambda: methods.MTNets(net(), **options)),
        ("LowRankMAML, rank=4", lambda: methods.LowRankMAML(net(), rank=4, **options)),
        ("SubspaceMAML, size=8", lambda: methods.SubspaceMAML(net(), size=8, **options)),
        ("MMAML (*)", lambda: methods.MMAML(net(), SetEncoder(1, 1), **options)),
        ("HSML (*)", lambda: methods.HSML(net(), SetEncoder(1, 1), **options)),
        ("Mixture, components=3 (*)", lambda: methods.Mixture(net(), components=3, **options)),
    ]
    return "sinusoid, 1-40-40-1: 25 tasks, 10 + 10 points, K = 5", batch, rows


def counts(maml: MAML, batch: TaskBatch) -> tuple[int, int, int]:
    """Instructions, FLOPs, FLOPs of the inner loop and its reverse."""
    batch = batch.select([t for t in range(len(batch)) for _ in range(getattr(maml, "components", 1))])  # of a mixture: a row for each
    plan = maml.plan(batch)
    rows = costs(plan, batch)
    return plan.count(), sum(r.flops for r in rows), sum(r.flops for r in rows if r.segment in INNER)


def ratio(maml: MAML, full: MAML, batch: TaskBatch, repeats: int) -> tuple[float, float]:
    """(milliseconds, time over that of ``full``), in turns."""
    times: list[tuple[float, float]] = []
    for turn in range(repeats + 2):
        took = []
        for m in (maml, full):
            start = time.perf_counter()
            m.meta_grad(batch)
            took.append(time.perf_counter() - start)
        if turn > 1:
            times.append((took[0], took[1]))
    return 1e3 * statistics.median(a for a, _ in times), statistics.median(a / b for a, b in times)


def counted(maml: MAML, full: MAML, batch: TaskBatch) -> list[str]:
    """The cells that are counted; they stand in docs/methods.md, and a test counts them again."""
    (n, flops, inner), (_, all_flops, inner_flops) = counts(maml, batch), counts(full, batch)
    return [str(n), f"{flops * 1e-6:.4g}", f"{flops / all_flops:.2f}", "0" if inner / inner_flops < 5e-3 else f"{inner / inner_flops:.2f}"]


def table(title: str, batch: TaskBatch, rows: Sequence[Row], repeats: int) -> str:
    full = rows[0][1]()
    head = ["method", "instructions", "MFLOP", "MFLOP to MAML", "of the inner loop", *(["ms", "time to MAML"] if repeats else [])]
    lines = [f"**{title}**", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, make in rows:
        maml = make()
        cells = [name, *counted(maml, full, batch)]
        if repeats:
            took, share = ratio(maml, full, batch, repeats)
            cells += [f"{took:.3g}", f"{share:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=11, help="turns of the timing; 0: count only (default %(default)s)")
    repeats = parser.parse_args().repeats
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32")
    for title, batch, rows in (convolutional(), sinusoids()):
        print(f"\n{table(title, batch, rows, repeats)}")


if __name__ == "__main__":
    main()
