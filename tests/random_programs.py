"""Random Programs, Arrangements and batches, and how a run of them is judged. For the tests of Plans and executors.

Structure and numbers come from a seed: the same cases in every run. All numbers are float32 values, so that runs in float32 and in float64 see the same problem.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from random_network import Network
from reference import meta_gradient
from torch import Tensor

from fastmaml.batch import TaskBatch
from fastmaml.executors.call import Call, Results
from fastmaml.optimizers import SGD
from fastmaml.plan import Arrangement, Plan, Rate, build_plan
from fastmaml.program import CLASS_WEIGHT, Loss, Program

LOSSES = (
    Loss(),
    Loss(reduction="sum"),
    Loss(reduction=3.0, label_smoothing=0.1),
    Loss(class_weight=True),
    Loss("mse"),
    Loss("mse", reduction="sum"),
)


def randoms(count: int) -> Iterator[random.Random]:
    """Generators with the seeds 0, 1, ...; the last seed printed is that of the case that fails."""
    for seed in range(count):
        print(f"random.Random({seed})")
        yield random.Random(seed)


@dataclass(frozen=True)
class Case:
    """A Program, an Arrangement, and numbers for both. ``weights``: step weights and class weights."""

    program: Program
    arrangement: Arrangement
    leaves: Mapping[str, Tensor]
    rates: Mapping[str, Tensor]
    batch: TaskBatch
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    task_weights: Tensor | None = None

    def __str__(self) -> str:
        return f"{self.program}\n{self.arrangement}\n{self.batch}"

    __repr__ = __str__  # what pytest shows of a failing case

    def plan(self, **changes: object) -> Plan:
        return build_plan(self.program, replace(self.arrangement, **changes))

    def call(self, dtype: torch.dtype = torch.float64, **options: object) -> Call:
        def cast(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to(dtype) for name, tensor in tensors.items()}

        options.setdefault("task_weights", self.task_weights)
        scheduled = {n: torch.tensor(v, dtype=torch.float64) for n, v in self.arrangement.optimizer.numbers(self.arrangement.steps).items()}
        numbers = cast(self.leaves), cast(self.rates), cast({**self.weights, **scheduled})
        return Call(self.batch, *numbers, **options)

    def truth(self, dtype: torch.dtype = torch.float64, outer=None) -> tuple[Tensor, dict[str, Tensor]]:
        """(losses [tasks], gradients) by torch.autograd; for a leaf of each task that of its loss, [tasks, ...]."""
        own = {leaf.name for leaf in self.program.leaves if leaf.home == "task"}
        call, count = self.call(dtype), len(self.batch)
        weights = (
            torch.full((count,), 1.0 / count, dtype=torch.float64) if self.task_weights is None else self.task_weights
        )
        losses, total = [], {}
        for t in range(count):
            leaves = {name: v[t] if name in own else v for name, v in call.leaves.items()}
            numbers = {"step_weights": call.weights.get("step_weights"), "class_weight": call.weights.get(CLASS_WEIGHT)}
            one = meta_gradient(
                self.program, self.arrangement, leaves, call.rates, self.batch.select(t), outer=outer, **numbers
            )
            losses.append(one[0])
            for name, g in one[1].items():
                total.setdefault(name, []).append(g if name in own else g * weights[t].to(g))
        joined = {
            name: torch.stack(gs) if name in own else functools.reduce(Tensor.add, gs) for name, gs in total.items()
        }
        return torch.cat(losses), joined

    def moved(self, relative: float) -> Case:
        """The same case with inputs and leaves moved by rounding: as far as its truth moves, any result may be off."""
        generator = torch.Generator().manual_seed(0)

        def move(v: Tensor) -> Tensor:
            return v.double() * (1 + relative * torch.randn(v.shape, generator=generator, dtype=torch.float64).to(v.device))

        b = self.batch.to(dtype=torch.float64)
        batch = TaskBatch(
            move(b.support_x), b.support_y, move(b.query_x), b.query_y, b.support_sizes, b.query_sizes, b.ways
        )
        return replace(self, batch=batch, leaves={name: move(v) for name, v in self.leaves.items()})


# -------------------------------------------------------------------------------------------------------------- judging


def gradients(results: Results, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of a run; those that the Plan leaves out are zero."""
    return {name: results.values.get(f"grad.{name}", torch.zeros_like(t)).double() for name, t in like.items()}


def norm(tensors: Mapping[str, Tensor]) -> float:
    return float(sum((v.double() ** 2).sum() for v in tensors.values()) ** 0.5)


def error(got: Mapping[str, Tensor], truth: Mapping[str, Tensor], zero: float) -> float:
    """Norm of the difference over norm of the truth, all together (DESIGN.md, section 5).

    A truth below ``zero`` is zero to rounding, and so must the result be: its error is measured against ``zero``.
    """
    assert all(bool(torch.isfinite(got[name]).all()) for name in truth), "not finite"
    return norm({name: got[name].double() - truth[name].double() for name in truth}) / max(norm(truth), zero)


def outer_losses(case: Case, results: Results) -> Tensor:
    """[tasks]: with several query passes the weighted sum over the steps."""
    losses, weights = results.values["loss.query"], case.weights.get("step_weights")
    if case.arrangement.query_from is None:
        return losses
    return (losses * weights[-losses.shape[1] :].to(losses)).sum(1)


# ---------------------------------------------------------------------------------------------------------------- cases


def arrangement(rng: random.Random, program: Program) -> Arrangement:
    steps, kind = rng.choice([0, 1, 2, 3]), rng.choice(["one", "one", "tensor", "element"])
    per_step, learned, rates = rng.random() < 0.4, rng.random() < 0.6, {}
    for leaf in program.leaves:
        if leaf.role == "adapted":
            shape = program.values[leaf.value].shape if kind == "element" else ()
            rates[leaf.name] = Rate("lr" if kind == "one" else f"lr.{leaf.name}", shape, per_step, learned)
    return Arrangement(
        steps=steps,
        loss=rng.choice(LOSSES),
        rates=rates,
        first_order=rng.random() < 0.25,
        query_from=rng.choice([None, None, 1, 0]) if steps else None,
        memory=rng.choice(["constant", "fast"]),
    )


def numbers_for(program: Program, a: Arrangement, seed: int, sizes, ways=None, rate: float = 0.05, positive=()) -> Case:
    """A Case with random numbers; ``sizes``: (support, query) rows of each task."""
    generator = torch.Generator().manual_seed(seed)
    outputs = program.values[program.output].shape[0]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def target(n: int, t: int) -> Tensor:
        if a.loss.name == "mse":
            return normal(n, outputs)
        return torch.randint(0, ways[t] if ways else outputs, (n,), generator=generator)

    leaves = {}
    for leaf in program.leaves:
        shape = program.values[leaf.value].shape
        v = 0.7 * math.prod(shape[1:]) ** -0.5 * normal(*([len(sizes)] if leaf.home == "task" else []), *shape)
        leaves[leaf.name] = v.abs() + 0.5 if leaf.name in positive else v
    rates, rate = {}, rate / 5 if a.loss.reduction == "sum" else rate
    for r in dict.fromkeys(a.rates.values()):
        rates[r.name] = rate + 0.4 * rate * normal(*([max(a.steps, 1)] if r.per_step else []), *r.shape)
    x = program.values[program.input].shape
    tasks = [(normal(s, *x), target(s, t), normal(q, *x), target(q, t)) for t, (s, q) in enumerate(sizes)]
    step_weights = torch.rand(a.steps + 1, generator=generator)
    weights = {"step_weights": step_weights, CLASS_WEIGHT: normal(outputs).abs() + 0.3}
    return Case(program, a, leaves, rates, TaskBatch.from_tasks(tasks, None if a.loss.name == "mse" else ways), weights)


def random_optimizer(rng: random.Random) -> SGD:
    if rng.random() < 0.5:
        return SGD()
    momentum = rng.choice([0.0, 0.9, 0.5])
    nesterov = momentum > 0 and rng.random() < 0.4
    kind = rng.choice(["none", "none", "norm", "norm", "value"])
    return SGD(
        momentum=momentum,
        dampening=0.0 if nesterov else rng.choice([0.0, 0.3]),
        nesterov=nesterov,
        weight_decay=rng.choice([0.0, 0.0, 0.1]),
        max_norm=rng.choice([0.3, 3.0]) if kind == "norm" else None,
        clip_value=rng.choice([0.03, 0.3]) if kind == "value" else None,
    )


def random_case(rng: random.Random, conv: bool = False, native: bool = False, **changes: object) -> Case:
    network = Network(rng, conv, native)
    program = network.program
    if rng.random() < 0.2:
        leaves = (
            replace(leaf, home=rng.choice(["meta", "task"])) if leaf.role == "adapted" else leaf
            for leaf in program.leaves
        )
        program = replace(program, leaves=tuple(leaves))
    a = replace(arrangement(rng, program), **changes)
    supports = [1, 3, 5] if conv and native else [3, 5, 7]
    sizes = [
        (rng.choice(supports), rng.choice([2, 4, 6])) for _ in range(rng.choice([1, 3, 5] if native else [1, 2, 3]))
    ]
    a = replace(a, support_rows=rng.choice([None, max(support for support, _ in sizes)]))
    ways = [rng.choice([2, network.outputs]) for _ in sizes]
    case = numbers_for(program, a, rng.randint(0, 10**6), sizes, ways, 0.05 if native else 0.1, network.positive)
    if rng.random() < 0.3:
        generator = torch.Generator().manual_seed(len(sizes))
        case = replace(case, task_weights=torch.rand(len(sizes), dtype=torch.float64, generator=generator))
    return case if "optimizer" in changes else replace(case, arrangement=replace(a, optimizer=random_optimizer(rng)))
