"""One Plan on two executors: its inner loop on one, what is around it on the other. When "auto" takes two: test_mixed_choice.py."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from executor_cases import ZERO, masks_equal_error
from mixed_cases import anil_case, host, mixed
from random_programs import Case, error, gradients, numbers_for, outer_losses, random_case, randoms
from test_torch_executor import OPTIONS, focal, run_halves

from fastmaml.executors.cpu.executor import CpuExecutor
from fastmaml.executors.torch.executor import TorchExecutor
from fastmaml.plan import Arrangement, Rate
from fastmaml.program import Loss, ProgramBuilder

INSIDE = ["torch", "cpu", pytest.param("cuda", marks=pytest.mark.skipif(host is None, reason="fastmaml._cuda_host is not built"))]


# ------------------------------------------------------------------------------------------- against float64 autograd
CROSSING = [option for option in OPTIONS if "support" not in option and not option.startswith(("outer", "factored"))]


@pytest.mark.parametrize("kind", ["conv", "linear"])
@pytest.mark.parametrize("option", CROSSING)
def test_options(option: str, kind: str) -> None:
    for first_order, memory in ((False, "constant"), (True, "constant"), (False, "fast")):
        case = anil_case(option, kind, first_order, memory)
        losses, truth = case.truth()
        results = mixed(case.plan()).forward(case.call())
        assert results.executor == "torch + torch" and results.all_finite
        assert error({"loss": outer_losses(case, results)}, {"loss": losses}, ZERO) <= 1e-11
        assert error(gradients(results, truth), truth, ZERO) <= 1e-11


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
@pytest.mark.parametrize("steps", [0, 1, 5, 10])
def test_the_native_inner_loop_of_anil(steps: int, first_order: bool, inside: str) -> None:
    """The body in float64, so that its decisions are the truth's."""
    options = ["plain", "ways", "task-weights"] + ["learned-rate", "multi-step"] * (steps == 3)
    for option in options:
        case = anil_case(option, first_order=first_order, steps=steps)
        losses, truth = case.truth()
        results = mixed(case.plan(), inside).forward(case.call())
        assert error({"loss": outer_losses(case, results)}, {"loss": losses}, ZERO) <= 1e-5
        assert error(gradients(results, truth), truth, ZERO) <= 1e-5


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("option", ["learned-rate", "learned-per-tensor-and-step", "learned-per-element-and-step", "learned-multi-step", "mse-sum", "class-weight"])
def test_native_options(option: str, inside: str) -> None:
    case = anil_case(option)
    _, truth = case.truth()
    results = mixed(case.plan(), inside).forward(case.call())
    assert error(gradients(results, truth), truth, ZERO) <= 1e-5


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
def test_two_halves_around_a_torch_loss(first_order: bool, steps: int, inside: str) -> None:
    for option in ("plain", "learned-rate", "learned-per-element-and-step"):
        case = anil_case(option, first_order=first_order, steps=steps)
        case.rates.update({name: v[:steps] for name, v in case.rates.items() if "step" in option and steps})
        if "learned" in option and not steps:
            continue  # no rate is read
        losses, truth = case.truth(outer=focal)
        executor = mixed(case.plan(entry="halves"), inside)
        got, values = run_halves(executor, case, focal)
        assert executor.inside.plan.entries == executor.around.plan.entries == 2
        assert error({"loss": got}, {"loss": losses}, ZERO) <= 1e-5
        assert error({n: values[f"grad.{n}"] for n in truth}, truth, ZERO) <= (1e-11 if inside == "torch" else 1e-5)


@pytest.mark.parametrize("inside", ["cpu", INSIDE[-1]])
def test_equal_masks(inside: str) -> None:
    """The decisions of both parts come out under the whole Plan's names, and can be replayed."""
    for option in ("plain", "learned-per-tensor", "task-weights"):
        case = anil_case(option)
        plan = case.plan(record_masks=True)
        kinds = {key[0].split(".")[0] for key in mixed(plan, inside).forward(case.call(torch.float32, record=True)).values if isinstance(key, tuple)}
        assert kinds == {"prologue"}
        assert 0 <= masks_equal_error(case, 1e-5, functools.partial(mixed, inside=inside)) <= 1e-5


@pytest.mark.parametrize("entry", ["train", "halves", "evaluate", "adapt"])
def test_random_programs_have_the_bits_of_the_whole(entry: str) -> None:
    """Whatever can be cut, in float64: no number is missing, or read from the wrong place."""
    crossed = set()
    for n, rng in enumerate(randoms(120)):
        case = random_case(rng, conv=n % 2 == 0, **({} if entry == "train" else {"query_from": None}))
        plan = case.plan(entry=entry)
        try:
            executor = mixed(plan) if plan.steps else None
        except NotImplementedError:
            executor = None
        if executor is None:
            continue
        crossed |= {name.split(".")[0] for name in (*executor.parts.into, *executor.parts.back)}
        torch_executor = TorchExecutor(plan)
        whole, found = torch_executor.forward(case.call()), executor.forward(case.call())
        results = [(whole, found)]
        if entry == "halves":
            given = {"dlogits": torch.tanh(whole.values["logits"])}
            results.append((torch_executor.reverse(whole.state, given), executor.reverse(found.state, given)))
            results[1][0].values = {k: v for k, v in results[1][0].values.items() if k in results[1][1].values}
            assert {r.target for r in plan.reductions if r.target in plan.results} <= results[1][1].values.keys()
        for one, other in results:
            assert one.values.keys() == other.values.keys() and torch.equal(one.finite, other.finite)
            for name, value in one.values.items():
                assert torch.equal(value.nan_to_num(7.0), other.values[name].nan_to_num(7.0)), name
    assert len(crossed) >= (5 if entry in ("train", "halves") else 1), crossed


# ------------------------------------------------------------------------------------------------ tasks that are not finite
def spoiled(case: Case, task: int, what: str, value: float) -> Case:
    batch = case.batch.to(torch.float64)
    rows = getattr(batch, what).clone()
    rows.split(list(batch.support_sizes if "support" in what else batch.query_sizes))[task].fill_(value)
    return dataclasses.replace(case, batch=dataclasses.replace(batch, **{what: rows}))


def without(case: Case, task: int) -> Case:
    weights = torch.full((len(case.batch),), 1 / len(case.batch), dtype=torch.float64)
    weights[task] = 0.0
    return dataclasses.replace(case, task_weights=weights)


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("entry", ["train", "halves"])
def test_a_task_is_left_out_by_both_parts(entry: str, inside: str) -> None:
    case = anil_case("learned-rate")
    bad = spoiled(case, 1, "support_x", float("nan"))
    found = []
    for c in (without(case, 1), bad):
        executor = mixed(c.plan(entry=entry), inside)
        results = executor.forward(c.call(torch.float32))
        if entry == "halves":
            assert results.finite.tolist() == [True, c is not bad, True]
            results = executor.reverse(results.state, {"dlogits": torch.ones_like(results.values["logits"])})
        found.append(results)
    clean, results = found
    assert results.finite.tolist() == [True, False, True] and not results.all_finite
    for name in (n for n in clean.values if n.startswith("grad.")):
        assert torch.allclose(clean.values[name], results.values[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("inside", ["cpu", INSIDE[-1]])
def test_what_only_the_inner_loop_knows(inside: str) -> None:
    """A loss that is infinite in float32 while every gradient is finite: known to the inner loop alone, the sums are made around it."""
    case = anil_case("mse", steps=1)
    bad = spoiled(case, 2, "query_y", 1e20)
    whole, results = CpuExecutor(case.plan()).forward(bad.call(torch.float32)), mixed(case.plan(), inside).forward(bad.call(torch.float32))
    assert whole.finite.tolist() == results.finite.tolist() == [True, True, False]
    for name in (n for n in whole.values if n.startswith("grad.")):
        assert torch.allclose(whole.values[name], results.values[name], rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("inside", INSIDE)
def test_what_only_the_reverse_of_the_body_knows(inside: str) -> None:
    """A gradient of the body that overflows: the head's are finite, and must not be in the sums either."""
    b = ProgramBuilder((2,))
    v = b.op("tanh", b.op("linear", 0, b.leaf("body", (3, 2), "outer")))
    program = b.build(b.op("linear", v, b.leaf("head", (2, 3), "adapted")))
    a = Arrangement(steps=1, loss=Loss("mse", "sum"), rates={"head": Rate("lr")}, first_order=True)
    case = numbers_for(program, a, 0, [(3, 2)] * 3)
    x = case.batch.query_x.clone()
    x[2:4] = torch.tensor([1.0, 3e38])  # of task 1; the body gives it no weight
    leaves = {**case.leaves, "body": case.leaves["body"] * torch.tensor([1.0, 0.0]), "head": 30 * case.leaves["head"]}
    case = dataclasses.replace(case, batch=dataclasses.replace(case.batch, query_x=x), leaves=leaves)
    plan = case.plan()
    results = mixed(plan, inside).forward(case.call(torch.float32))
    whole = TorchExecutor(plan).forward(case.call(torch.float32))
    assert whole.finite.tolist() == results.finite.tolist() == [True, False, True]
    assert torch.allclose(whole.values["grad.head"], results.values["grad.head"], rtol=1e-5)
    assert torch.allclose(whole.values["grad.body"], results.values["grad.body"], rtol=1e-5)
