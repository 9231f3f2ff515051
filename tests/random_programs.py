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
from reference import meta_gradient
from torch import Tensor

from fastmaml.batch import TaskBatch
from fastmaml.executors.call import Call, Results
from fastmaml.optimizers import SGD
from fastmaml.plan import Arrangement, Plan, Rate, build_plan
from fastmaml.program import CLASS_WEIGHT, Loss, Program, ProgramBuilder

ROLES = ("adapted", "adapted", "outer", "const")
ACTIVATIONS = {
    "relu": ({},),
    "leaky_relu": ({"slope": 0.1},),
    "tanh": ({},),
    "sigmoid": ({},),
    "elu": ({"alpha": 1.3},),
    "gelu": ({"approximate": "none"}, {"approximate": "tanh"}),
    "silu": ({},),
    "softplus": ({"beta": 1.5, "threshold": 20.0},),
    "exp": ({},),
}
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
            return v.double() * (1 + relative * torch.randn(v.shape, generator=generator, dtype=torch.float64))

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


# ------------------------------------------------------------------------------------------------------------- Programs


class Network:
    """Builds one random Program. ``native``: only what the cpu executor runs."""

    def __init__(self, rng: random.Random, conv: bool, native: bool, roles: tuple[str, ...] = ROLES) -> None:
        self.rng, self.roles, self.native = rng, roles, native
        self.statistics = rng.choice(["batch", "support", "running"])
        self.norms = ["batchnorm", "none"] if native and not conv else ["batchnorm", "layernorm", "groupnorm", "none"]
        self.positive: set[str] = set()
        shape = (
            (rng.choice([1, 3]), rng.choice([6, 7]), rng.choice([6, 8])) if conv else (rng.choice([1, 5, 7, 17, 33]),)
        )
        if conv and native:
            sides = [3, 5, 8, 9, 13]
            shape = (rng.choice([1, 2, 3, 16, 17]), rng.choice(sides), rng.choice(sides))
        flat = conv and native and self.chance(0.15)
        self.builder = ProgramBuilder((math.prod(shape),) if flat else shape)
        v = self.builder.op("reshape", 0, shape=shape) if flat else 0
        if conv:
            if native and self.chance(0.15):
                v = self.rng.choice([self.norm, self.activation, self.native_pool])(v)
            v = self.native_images(v) if native else self.images(v)
        for _ in range(rng.randint(0 if conv and native else 1, 3)):
            v = self.layer(v)
        self.outputs = rng.choice([4, 4, 2, 7])
        head = self.leaf((self.outputs, self.shape(v)[0]), "adapted" if self.chance(0.7) else None)
        program = self.builder.build(self.builder.op("linear", v, head, self.leaf((self.outputs,))))
        if all(leaf.role != "adapted" for leaf in program.leaves):
            name = next(leaf.name for leaf in program.leaves if leaf.value == head)
            roles_of = {leaf.name: leaf.role for leaf in program.leaves} | {name: "adapted"}
            program = program.with_roles(roles_of.__getitem__)
        self.program = program

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def shape(self, v: int) -> tuple[int, ...]:
        return self.builder.values[v].shape

    def leaf(self, shape: tuple[int, ...], role: str | None = None) -> int:
        return self.builder.leaf(f"p{len(self.builder.leaves)}", shape, role or self.rng.choice(self.roles))

    def optional(self, shape: tuple[int, ...], p: float) -> int | None:
        return self.leaf(shape) if self.chance(p) else None

    def activation(self, v: int) -> int:
        name = self.rng.choice(list(ACTIVATIONS))
        if name == "exp":
            v = self.builder.op("tanh", v)
        return self.builder.op(name, v, **self.rng.choice(ACTIVATIONS[name]))

    def norm(self, v: int) -> int:
        name, shape, b = self.rng.choice(self.norms), self.shape(v), self.builder
        if name == "batchnorm":
            affine = self.optional(shape[:1], 0.7), self.optional(shape[:1], 0.7)
            running = ()
            if self.statistics == "running":
                running = self.leaf(shape[:1], "const"), self.leaf(shape[:1], "const")
                self.positive.add(b.leaves[-1].name)
            return b.op(name, v, *affine, *running, eps=1e-3, statistics=self.statistics)
        if name == "layernorm":
            dims = self.rng.randint(1, len(shape))
            affine = self.optional(shape[-dims:], 0.7), self.optional(shape[-dims:], 0.7)
            return b.op(name, v, *affine, eps=1e-3, dims=dims)
        if name == "groupnorm":  # a group of one number has no gradient
            groups = [
                g for g in range(1, shape[0] + 1) if shape[0] % g == 0 and (len(shape) > 1 or g < shape[0] or g == 1)
            ]
            affine = self.optional(shape[:1], 0.7), self.optional(shape[:1], 0.7)
            return b.op(name, v, *affine, eps=1e-3, groups=self.rng.choice(groups))
        return v

    def images(self, v: int) -> int:
        b, rng = self.builder, self.rng
        for _ in range(rng.randint(1, 2)):
            out, kernel = rng.choice([2, 3, 4]), (rng.choice([1, 2, 3]), rng.choice([1, 3]))
            w, bias = self.leaf((out, self.shape(v)[0], *kernel)), self.optional((out,), 0.6)
            padding = tuple(rng.choice([0, 1]) for _ in range(4))
            v = b.op("conv2d", v, w, bias, stride=(rng.choice([1, 2]), rng.choice([1, 2])), padding=padding)
            v = self.activation(self.norm(v))
            if min(self.shape(v)[1:]) >= 2:
                v = self.pool(v)
        if rng.random() < 0.2:  # samples that are matrices
            v = b.op("reshape", v, shape=(self.shape(v)[0], self.shape(v)[1] * self.shape(v)[2]))
            v = self.activation(b.op("linear", v, self.leaf((3, self.shape(v)[1])), self.optional((3,), 0.5)))
            return b.op("reshape", v, shape=(self.builder.values[v].numel,))
        if rng.random() < 0.4:
            return b.op("global_avgpool2d", v)
        return b.op("reshape", v, shape=(b.values[v].numel,))

    def pool(self, v: int) -> int:
        b, rng = self.builder, self.rng
        choice = rng.randint(0, 3)
        if choice == 0:
            v = b.op("maxpool2d", v, kernel=(2, 2), stride=(rng.choice([1, 2]), 2), padding=(0, 1))
        if choice == 1:
            v = b.op("avgpool2d", v, kernel=(2, 2), stride=(2, 1), padding=(1, 0), count_include_pad=self.chance(0.5))
        if choice == 2:
            v = b.op("pad2d", v, padding=(1, 0, 0, 2))
        return v if min(self.shape(v)[1:]) >= 3 else b.op("pad2d", v, padding=(1, 1, 1, 1))

    def native_images(self, v: int) -> int:
        """Convolutions of odd sizes, with what comes around them in any order."""
        b, rng = self.builder, self.rng
        for _ in range(rng.randint(1, 3)):
            (c, h, w), before = self.shape(v), v
            if self.chance(0.25) and min(h, w) >= 2:  # as it was, for a residual
                out, kernel, stride, padding = c, *rng.choice([((3, 3), (1, 1), (1, 1, 1, 1)), ((1, 1), (1, 1), (0,) * 4)])
            else:
                out, stride = rng.choice([1, 2, 3, 4, 7, 16, 17, rng.choice([63, 64, 65])]), (rng.choice([1, 1, 2, 3]), rng.choice([1, 1, 2]))
                padding = tuple(rng.choice([0, 1, 1, 2]) for _ in range(4))
                kernel = (
                    min(rng.choice([1, 2, 3, 3, 5]), h + padding[0] + padding[1]),
                    min(rng.choice([1, 2, 3, 3, 4]), w + padding[2] + padding[3]),
                )
            v = b.op("conv2d", v, self.filters(out, c, kernel), self.optional((out,), 0.6), stride=stride, padding=padding)
            after = [self.norm, self.images_activation]
            rng.shuffle(after)
            if min(self.shape(v)[1:]) >= 2:
                after.insert(rng.randint(0, 2), self.native_pool)
            for layer in after:
                v = layer(v)
            if self.shape(v) == self.shape(before) and self.chance(0.6):
                v = b.op("add", v, before)
        if self.chance(0.1):  # the same numbers as other images, which nobody would do
            c, h, w = self.shape(v)
            v = b.op("reshape", v, shape=(w, c, h))
        if rng.random() < 0.35 or b.values[v].numel > 600:
            return b.op("global_avgpool2d", v)
        return b.op("reshape", v, shape=(b.values[v].numel,))

    def images_activation(self, v: int) -> int:
        name = self.rng.choice(["relu", "relu", "leaky_relu", "none", "other"])
        if name == "other":
            return self.activation(v)
        return v if name == "none" else self.builder.op(name, v, **ACTIVATIONS[name][0])

    def native_pool(self, v: int) -> int:
        """Windows that tile, that overlap, that leave the last rows out."""
        b, rng = self.builder, self.rng
        choice, size = rng.randint(0, 8), self.shape(v)[1:]
        whole = {"padding": (0, 0), "kernel": tuple(min(3, n) for n in size)}
        if choice in (0, 1, 2):
            return b.op("maxpool2d", v, kernel=(2, 2), stride=(2, 2), padding=(0, 0))
        if choice == 3:
            return b.op("maxpool2d", v, stride=(rng.choice([1, 2, 4]), rng.choice([2, 3])), **whole)
        if choice == 4:
            return b.op("maxpool2d", v, kernel=(2, 2), stride=(rng.choice([1, 2]), 2), padding=(rng.choice([0, 1]), 1))
        if choice == 5:
            return b.op("maxpool2d", v, kernel=size, stride=size, padding=(0, 0))  # 1 x 1 is left
        if choice == 6:
            return b.op("avgpool2d", v, kernel=(2, 2), stride=(2, rng.choice([1, 2])), padding=(rng.choice([0, 1]), 0), count_include_pad=self.chance(0.5))
        if choice == 7:
            return b.op("pad2d", v, padding=tuple(rng.choice([0, 1, 2]) for _ in range(4)))
        return v

    def filters(self, out: int, into: int, kernel: tuple[int, int]) -> int:
        """A weight of a convolution, a leaf or made of leaves."""
        b, shape = self.builder, (out, into, *kernel)
        kind = self.rng.choice(["leaf"] * 8 + ["mul", "matmul", "reshape", "slice", "add", "tied", "tied"])
        tied = [op.inputs[1] for op in b.ops if op.name == "conv2d" and self.shape(op.inputs[1]) == shape]
        if kind == "tied" and tied:
            return tied[0]
        if kind == "mul":
            return b.op("mul", self.leaf(shape), self.leaf((out, 1, 1, 1)))
        if kind == "matmul":
            return b.op("reshape", b.op("matmul", self.leaf((out, 2)), self.leaf((2, math.prod(shape[1:])))), shape=shape)
        if kind == "reshape":
            return b.op("reshape", self.leaf((out, math.prod(shape[1:]))), shape=shape)
        if kind == "slice":
            return b.op("slice", self.leaf((out, into + 2, *kernel)), dim=1, start=1, stop=into + 1)
        if kind == "add":
            return b.op("add", self.leaf(shape), b.op("exp", self.leaf(kernel)))
        return self.leaf(shape)

    def weight(self, out: int, into: int) -> int:
        b = self.builder
        tied = [op.inputs[1] for op in b.ops if op.name == "linear" and self.shape(op.inputs[1]) == (out, into)]
        kind = self.rng.choice(
            ["leaf", "leaf", "leaf", "leaf", "mul", "matmul", "transpose", "slice", "add", "tied", "tied"]
        )
        if kind == "tied" and tied:
            return tied[0]
        if kind == "mul":
            return b.op("mul", self.leaf((out, into)), self.leaf((out, 1)))
        if kind == "matmul":
            return b.op("matmul", self.leaf((out, 2)), self.leaf((2, into)))
        if kind == "transpose":
            return b.op("transpose", self.leaf((into, out)))
        if kind == "slice":
            return b.op("slice", self.leaf((out + 2, into)), dim=0, start=1, stop=out + 1)
        if kind == "add":
            return b.op("add", self.leaf((out, into)), b.op("exp", self.leaf((into,))))
        return self.leaf((out, into))

    def layer(self, v: int) -> int:
        into = self.shape(v)[0]
        out = self.rng.choice([3, 4, 6, into] if not self.native else [1, 3, 7, 17, 65, into])
        u = self.builder.op("linear", v, self.weight(out, into), self.optional((out,), 0.6))
        u = self.activation(self.norm(u))
        return self.builder.op("add", u, v) if out == into and self.chance(0.5) else u


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
