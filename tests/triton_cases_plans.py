"""Whole Plans on the triton executor: options, orders, precisions, random Programs."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from executor_cases import ZERO
from random_programs import error, gradients, random_case
from test_torch_executor import OPTIONS, option_case
from triton_networks import INNER, small
from triton_process import judge_plan, on_device

from fastmaml.executors.torch.executor import TorchExecutor
from fastmaml.executors.triton.executor import TritonExecutor

QUICK = [("conv", "support")] + [("linear", o) for o in ("multi-step-from-1", "learned-per-tensor-and-step", "mse-divisor", "one-row", "ways", "factored-learned")]


@pytest.mark.parametrize(("kind", "option"), QUICK)
def test_options(kind: str, option: str) -> None:
    judge_plan(small(kind, option))


@pytest.mark.parametrize("changes", INNER, ids=["norm", "value", "implicit"])
def test_inner_optimizers(changes: dict) -> None:
    judge_plan(small("linear", "plain", 2, **changes))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["conv", "linear"])
@pytest.mark.parametrize("option", OPTIONS)
def test_all_options(kind: str, option: str) -> None:
    judge_plan(option_case(kind, False, "constant", option))


@pytest.mark.parametrize(("steps", "first_order"), [(0, False), (1, False), (1, True)])
def test_few_steps_and_first_order(steps: int, first_order: bool) -> None:
    judge_plan(small("conv", "plain", steps, first_order=first_order, memory="fast"))


@pytest.mark.parametrize(("kind", "bounds"), [("linear", (1e-5, 5e-3, 3e-2)), ("conv", (1e-5, 5e-3, 3e-2))])
def test_precisions(kind: str, bounds: tuple[float, ...]) -> None:
    """Those of DESIGN.md, section 5. The interpreter rounds to bfloat16, and computes all other products in float32."""
    case = on_device(small(kind, "plain", 2))
    truth = gradients(TorchExecutor(case.plan()).forward(case.call()), case.leaves)
    errors = []
    for precision, bound in zip(("highest", "high", "medium"), bounds, strict=True):
        results = TritonExecutor(case.plan(), precision).forward(case.call(torch.float32))
        errors.append(error(gradients(results, case.leaves), truth, ZERO))
        assert results.precision == precision and errors[-1] <= bound
    assert errors[2] > 10 * errors[0], "medium rounds to bfloat16"


def test_a_rate_of_each_task() -> None:
    """With a factored first layer: rows of every task are scaled by its own number."""
    case = small("linear", "factored", 2)
    rates = {name: dataclasses.replace(rate, home="task") for name, rate in case.arrangement.rates.items()}
    case = dataclasses.replace(case, arrangement=dataclasses.replace(case.arrangement, rates=rates), rates={"lr": torch.tensor([0.2, 0.1])})
    case = on_device(case)
    plan = case.plan()
    truth = {}
    for t in range(2):  # a batch of one, with its rate
        one = dataclasses.replace(case, batch=case.batch.select(t), rates={"lr": case.rates["lr"][t]})
        one = dataclasses.replace(one, arrangement=dataclasses.replace(one.arrangement, rates=small("linear", "factored", 2).arrangement.rates))
        for name, g in gradients(TorchExecutor(one.plan()).forward(one.call()), case.leaves).items():
            truth[name] = truth.get(name, 0) + g / 2
    got = gradients(TritonExecutor(plan, "highest").forward(case.call(torch.float32)), case.leaves)
    assert error(got, truth, ZERO) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 112))
@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv"])
def test_random_programs(conv: bool, seed: int) -> None:
    judge_plan(random_case(random.Random(seed), conv))
