"""The cpu executor: tasks that are not finite are named, and left out of every sum."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from executor_cases import ZERO, left_out, overflowing, ragged_case, ragged_images, spoiled, without
from random_programs import error, norm

from fastmaml.executors.cpu.executor import CpuExecutor


@pytest.mark.parametrize("threads", [1, 2, 40])
@pytest.mark.parametrize(
    "bad",
    [{3: float("nan")}, {0: float("inf"), 16: float("-inf")}, {5: 3e38, 6: float("nan")}],
    ids=["nan", "inf", "two"],
)
@pytest.mark.parametrize("option", ["second", "factored", "wide"])
def test_non_finite_tasks_are_named_and_left_out(option: str, bad: dict[int, float], threads: int) -> None:
    left_out(ragged_case(option), bad, threads)


@pytest.mark.parametrize("threads", [1, 2, 40])
@pytest.mark.parametrize("option", ["second", "support"])
@pytest.mark.parametrize("bad", [{3: float("nan")}, {0: float("inf"), 8: float("nan")}], ids=["nan", "two"])
def test_non_finite_images_are_named_and_left_out(option: str, bad: dict[int, float], threads: int) -> None:
    left_out(ragged_images(option), bad, threads)


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("bad", [0, 3])
@pytest.mark.parametrize(
    ("inputs", "rate"),
    [
        pytest.param(3, 1e30, id="weight"),
        pytest.param(12, 3e38, id="factored"),
        pytest.param(12, 1e30, id="factored-product"),
    ],
)
def test_a_gradient_that_alone_is_infinite(inputs: int, rate: float, bad: int, threads: int) -> None:
    case = overflowing(bad, inputs, rate)
    assert bool(case.plan().count("factored")) == (inputs == 12)
    results = CpuExecutor(case.plan(), threads=threads).forward(case.call(torch.float32))
    assert torch.isfinite(results.values["loss.query"]).all() and torch.isfinite(results.values["loss.support"]).all()
    assert (~results.finite).nonzero().flatten().tolist() == [bad]
    weights = without(case, [bad])
    good = dataclasses.replace(case, batch=case.batch.select([t for t in range(5) if t != bad]))
    clean = CpuExecutor(case.plan()).forward(good.call(torch.float32, task_weights=weights[weights > 0]))
    truth = {n: v for n, v in clean.values.items() if n.startswith("grad.")}
    assert error(results.values, truth, ZERO) <= 1e-5


@pytest.mark.parametrize("kind", ["nan", "overflow"])
def test_strict_leaves_sinks_alone(kind: str) -> None:
    case = spoiled(ragged_case(), {4: float("nan")}) if kind == "nan" else overflowing(2)
    executor = CpuExecutor(case.plan(), threads=2)
    names = [n for n in executor.forward(case.call(torch.float32)).values if n.startswith("grad.")]
    for strict in (True, False):
        sinks = {n: torch.zeros_like(executor.forward(case.call(torch.float32)).values[n]) for n in names}
        executor.forward(case.call(torch.float32, sinks=sinks, strict=strict))
        assert bool(norm(sinks)) != strict and all(torch.isfinite(v).all() for v in sinks.values())
