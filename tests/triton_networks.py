"""Networks and tasks for the cases of the triton executor, which are small: interpreted, a launch takes milliseconds."""

from __future__ import annotations

import dataclasses
from typing import Any

from random_programs import Case, numbers_for
from test_torch_executor import option_case

from fastmaml.optimizers import SGD, ImplicitGradient
from fastmaml.plan import Arrangement, Plan, Rate
from fastmaml.program import ProgramBuilder

INNER = (  # what is not a plain step
    {"optimizer": SGD(momentum=0.5, dampening=0.3, max_norm=0.1)},
    {"optimizer": SGD(weight_decay=0.1, clip_value=0.01)},
    {"meta_gradient": ImplicitGradient(cg_steps=2)},
)


def small(kind: str, option: str, steps: int = 2, tasks: tuple[int, ...] = (0, 2), **changes: Any) -> Case:
    """An option of test_torch_executor.py with fewer steps and tasks."""
    case = option_case(kind, False, "constant", option)
    rates = {r.name: case.rates[r.name][:steps] if r.per_step else case.rates[r.name] for r in case.arrangement.rates.values()}
    weights = case.weights | {"step_weights": case.weights["step_weights"][: steps + 1]}
    batch = case.batch.select([t for t in tasks if t < len(case.batch)])
    arrangement = dataclasses.replace(case.arrangement, steps=steps, **changes)
    return dataclasses.replace(case, arrangement=arrangement, rates=rates, weights=weights, batch=batch)


def matrices() -> tuple[Case, Plan]:
    """What random Programs leave out: layers over samples that are matrices or images, in every mode."""
    b = ProgramBuilder((3, 4, 5))
    v = b.op("layernorm", 0, b.leaf("ln.g", (4, 5), "adapted"), b.leaf("ln.b", (4, 5), "adapted"), eps=1e-3, dims=2)
    v = b.op("linear", v, b.leaf("w0", (6, 5), "adapted"), b.leaf("b0", (6,), "adapted"))
    v = b.op("groupnorm", v, b.leaf("gn.g", (3,), "adapted"), b.leaf("gn.b", (3,), "adapted"), eps=1e-3, groups=1)
    v = b.op("reshape", v, shape=(4, 18))
    v = b.op("batchnorm", v, b.leaf("bn.g", (4,), "adapted"), b.leaf("bn.b", (4,), "adapted"), eps=1e-3, statistics="batch")
    v = b.op("linear", b.op("tanh", v), b.op("transpose", b.leaf("w1", (18, 3), "adapted")), None)
    v = b.op("layernorm", v, b.leaf("l2.g", (3,), "adapted"), None, eps=1e-3, dims=1)
    v = b.op("linear", b.op("reshape", v, shape=(12,)), b.op("slice", b.leaf("w2", (6, 12), "adapted"), dim=0, start=1, stop=5), b.leaf("b2", (4,), "adapted"))
    program = b.build(v)
    a = Arrangement(steps=2, rates={leaf.name: Rate("lr") for leaf in program.leaves})
    case = numbers_for(program, a, 0, [(3, 2), (5, 4)])
    return case, case.plan()


def patches() -> tuple[Case, Plan]:
    """A convolution of the samples of which so many outputs are normalised that their statistics are made of the moments of its patches."""
    b = ProgramBuilder((2, 5, 6))
    v = b.op("conv2d", 0, b.leaf("w", (19, 2, 2, 3), "adapted"), b.leaf("b", (19,), "adapted"), stride=(2, 1), padding=(1, 0, 0, 2))
    v = b.op("relu", b.op("batchnorm", v, b.leaf("bn.g", (19,), "adapted"), b.leaf("bn.b", (19,), "adapted"), eps=1e-3, statistics="batch"))
    v = b.op("global_avgpool2d", b.op("maxpool2d", v, kernel=(2, 2), stride=(2, 2), padding=(0, 0)))
    program = b.build(b.op("linear", v, b.leaf("head", (3, 19), "adapted"), None))
    a = Arrangement(steps=1, rates={leaf.name: Rate("lr") for leaf in program.leaves})
    case = numbers_for(program, a, 0, [(3, 2), (5, 4)])
    plan = case.plan()
    assert plan.count("patch_stats")
    return case, plan


def fusible(kind: str) -> tuple[Case, Plan]:
    """relu and leaky_relu behind and before products and batchnorm, in ragged tasks of odd shapes."""
    b = ProgramBuilder((5,) if kind == "rows" else (2, 5, 7))
    names = iter(range(99))

    def leaf(*shape: int) -> int:
        return b.leaf(f"p{next(names)}", shape, "adapted")

    def batchnorm(v: int, channels: int) -> int:
        return b.op("batchnorm", v, leaf(channels), leaf(channels), eps=1e-3, statistics="batch")

    if kind == "rows":
        v = b.op("relu", b.op("linear", 0, leaf(7, 5), leaf(7)))
        v = b.op("leaky_relu", b.op("linear", v, leaf(9, 7), leaf(9)), slope=0.1)
        v = b.op("relu", batchnorm(v, 9))
        last = 9
    else:
        v = b.op("relu", b.op("conv2d", 0, leaf(3, 2, 3, 3), leaf(3), stride=(2, 1), padding=(1, 1, 0, 1)))
        v = b.op("relu", b.op("conv2d", v, leaf(4, 3, 2, 3), None, stride=(1, 2), padding=(0, 0, 1, 1)))
        v = b.op("leaky_relu", batchnorm(v, 4), slope=0.2)
        v = b.op("relu", batchnorm(b.op("conv2d", v, leaf(6, 4, 2, 3), leaf(6), stride=(1, 1), padding=(0, 0, 0, 0)), 6))
        v = b.op("reshape", v, shape=(6,))
        last = 6
    program = b.build(b.op("linear", v, leaf(3, last), leaf(3)))
    a = Arrangement(steps=2 if kind == "rows" else 1, rates={leaf.name: Rate("lr") for leaf in program.leaves})
    case = numbers_for(program, a, 0, [(3, 1), (5, 2)])
    return case, case.plan()


def summed() -> Case:
    """Batchnorm behind products whose rows are several tiles, of ragged tasks; of more channels than a tile has; behind and in front of pools; without gamma."""
    b = ProgramBuilder((2, 9, 11))
    names = iter(range(99))

    def leaf(*shape: int) -> int:
        return b.leaf(f"p{next(names)}", shape, "adapted")

    def batchnorm(v: int, gamma: int | None, beta: int | None) -> int:
        return b.op("batchnorm", v, gamma, beta, eps=1e-3, statistics="batch")

    v = b.op("conv2d", 0, leaf(3, 2, 2, 2), leaf(3), stride=(1, 1), padding=(1, 0, 0, 1))
    v = batchnorm(v, leaf(3), leaf(3))
    v = batchnorm(b.op("conv2d", v, leaf(70, 3, 1, 1), None, stride=(1, 1), padding=(0, 0, 0, 0)), None, leaf(70))
    v = b.op("relu", b.op("maxpool2d", v, kernel=(2, 1), stride=(3, 2), padding=(0, 0)))
    v = batchnorm(b.op("conv2d", v, leaf(5, 70, 3, 2), leaf(5), stride=(1, 2), padding=(0, 0, 0, 0)), leaf(5), None)
    v = b.op("reshape", b.op("maxpool2d", v, kernel=(1, 3), stride=(1, 3), padding=(0, 0)), shape=(5,))
    v = batchnorm(b.op("linear", v, leaf(6, 5), leaf(6)), leaf(6), leaf(6))
    program = b.build(b.op("linear", v, leaf(3, 6), leaf(3)))
    a = Arrangement(steps=1, rates={leaf.name: Rate("lr") for leaf in program.leaves})
    return numbers_for(program, a, 0, [(3, 1), (2, 2)])
