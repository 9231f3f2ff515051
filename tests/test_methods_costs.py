"""The table of docs/methods.md: what each method's Plan costs, counted. Run this file to print it anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

import fastmaml.nn as nets
from fastmaml import MAML, SGD, TaskBatch, methods
from fastmaml.plan.costs import costs

METHODS: dict[str, Callable[[nn.Module], MAML]] = {
    "MAML": lambda net: MAML(net, inner_steps=5),
    "`inner_optimizer=SGD(momentum=0.9)`": lambda net: MAML(net, inner_steps=5, inner_optimizer=SGD(momentum=0.9)),
    "`inner_optimizer=SGD(momentum=0.9, nesterov=True)`": lambda net: MAML(net, inner_steps=5, inner_optimizer=SGD(momentum=0.9, nesterov=True)),
    "`inner_optimizer=SGD(weight_decay=0.1)`": lambda net: MAML(net, inner_steps=5, inner_optimizer=SGD(weight_decay=0.1)),
    "`inner_optimizer=SGD(clip_value=1.0)`": lambda net: MAML(net, inner_steps=5, inner_optimizer=SGD(clip_value=1.0)),
    "`inner_optimizer=SGD(max_norm=10.0)`": lambda net: MAML(net, inner_steps=5, inner_optimizer=SGD(max_norm=10.0)),
    "`FirstOrderMAML`": lambda net: methods.FirstOrderMAML(net, inner_steps=5),
    "`Reptile`": lambda net: methods.Reptile(net, inner_steps=5),
    "`MetaSGD`": lambda net: methods.MetaSGD(net, inner_lr=0.05, inner_steps=5),
    "`iMAML`": lambda net: methods.iMAML(net, inner_steps=5),
    "MAML, 16 steps": lambda net: MAML(net, inner_steps=16),
    "`iMAML`, 16 steps": lambda net: methods.iMAML(net, inner_steps=16),
    "`MAMLPlusPlus`": lambda net: methods.MAMLPlusPlus(net),
    "`MAMLPlusPlus`, its first epochs": lambda net: methods.MAMLPlusPlus(net, step_loss_weights=[0.2] * 5),
}


def images() -> TaskBatch:
    """32 tasks, 5-way 1-shot, 15 queries of each class."""
    x = [torch.zeros(32, n, 1, 28, 28) for n in (5, 75)]
    y = [torch.zeros(32, n, dtype=torch.int64) for n in (5, 75)]
    return TaskBatch.of((x[0], y[0], x[1], y[1]))


def rows() -> Iterator[str]:
    batch, first = images(), {}
    for name, method in METHODS.items():
        cells = []
        for net in (nets.OmniglotFC, nets.OmniglotCNN):
            plan = method(net(5)).plan(batch)
            flops = sum(cost.flops for cost in costs(plan, batch))
            ratio = flops / first.setdefault(net, flops)
            cells += [str(plan.count()), f"{flops / 1e9:.1f}", f"{ratio:.2f}"]
        yield f"| {name} | {' | '.join(cells)} |"


def test_the_table() -> None:
    text = (Path(__file__).parent.parent / "docs" / "methods.md").read_text()
    missing = [row for row in rows() if row not in text]
    assert not missing, "counted, and not so in docs/methods.md:\n" + "\n".join(missing)


if __name__ == "__main__":
    print("\n".join(rows()))
