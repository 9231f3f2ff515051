"""The cpu executor: the same bits with any threads, teams, blocks, tasks beside a task, and order of tasks."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from executor_cases import NETS, ZERO, masks_equal_error, net_case, ragged, ragged_case, same
from random_programs import Case, error, gradients

import fastmaml
import fastmaml.nn as nets
from fastmaml.executors.call import Results
from fastmaml.executors.cpu.executor import CpuExecutor


def test_rows_of_all_tasks_in_pieces() -> None:
    case = net_case("omniglot-fc-factored", steps=1, rows=(20, 20))
    assert case.plan().count("factored") and sum(case.batch.support_sizes) > 252  # of 4,160 bytes, in and out: more than a piece
    assert 0 <= masks_equal_error(case, 3e-5) <= 3e-5


OPTIONS = ("second", "first", "fast", "steps", "factored", "wide", *(f"images-{o}" for o in ("second", "first", "fast", "steps", "support")))


@pytest.mark.parametrize("option", OPTIONS)
def test_bits_do_not_depend_on_threads_or_runs(option: str) -> None:
    case = ragged(option)
    call, plan = case.call(torch.float32), case.plan()
    first = CpuExecutor(plan, threads=1).forward(call)
    for threads in (1, 2, 3, 16, 40):  # 40: teams share a task
        executor = CpuExecutor(plan, threads=threads)
        for _ in range(3):
            same(first, executor.forward(call))


@pytest.mark.parametrize("tasks", [1, 2, 3])
@pytest.mark.parametrize("name", NETS)
def test_teams_give_the_same_bits(name: str, tasks: int) -> None:
    case = net_case(name, tasks=tasks, steps=2)
    results = [CpuExecutor(case.plan(), threads=threads).forward(case.call(torch.float32)) for threads in (1, 2, 5, 8)]
    for other in results[1:]:
        same(results[0], other)


@pytest.mark.parametrize("steps", [1, 11])
def test_nothing_is_laid_out_that_no_call_touches(steps: int) -> None:
    """A weight gradient that is added where it belongs as it is made has no place of its own."""
    maml = fastmaml.MAML(nets.OmniglotFC(5), inner_lr=0.01, inner_steps=steps, backend="cpu")
    x, y = torch.randn(2, 5, 1, 28, 28), torch.arange(5).expand(2, -1)
    plan = maml.plan((x, y, x, y))
    low = CpuExecutor(plan).prepared(5, 5).lowering
    touched = {low._name(ref.buffer) for _, groups in low.phases for _, steps in groups for s in steps for ref in s.call.operands if ref is not None}
    touched |= {name for r in plan.reductions for name in (r.source.buffer, r.target)} | {*plan.inputs, *plan.results, *low.turned.values()}
    assert set(low.at) <= touched
    gradients = {n for n, b in plan.buffers.items() if b.home == "scratch" and len(b.shape) == 2 and not b.rows}
    assert gradients and not gradients & set(low.at)


@pytest.mark.parametrize("block_rows", [1, 4])
@pytest.mark.parametrize("option", OPTIONS)
def test_blocks_of_rows(option: str, block_rows: int) -> None:
    """Reductions over blocks round differently, but each size of block has its own bits for any number of threads."""
    case = ragged(option)
    plan, call = case.plan(), case.call(torch.float32)
    whole, blocks = CpuExecutor(plan).forward(call), CpuExecutor(plan, threads=1, block_rows=block_rows).forward(call)
    same(blocks, CpuExecutor(plan, threads=3, block_rows=block_rows).forward(call))
    names = [n for n in whole.values if n.startswith("grad.")]
    truth = {n: whole.values[n] for n in names}
    assert error(blocks.values, truth, ZERO) <= 1e-4


def alone(case: Case, executor: CpuExecutor, t: int) -> Results:
    return executor.forward(dataclasses.replace(case, batch=case.batch.select(t)).call(torch.float32))


@pytest.mark.parametrize("option", OPTIONS)
def test_a_task_of_a_ragged_batch_is_that_task_alone(option: str) -> None:
    """Bit for bit: losses, logits, and its gradient (all other tasks weigh nothing)."""
    case = ragged(option)
    executor, together = CpuExecutor(case.plan()), CpuExecutor(case.plan(), threads=2).forward(case.call(torch.float32))
    logits = together.values["logits"].split(case.batch.query_sizes)
    for t in range(0, len(case.batch), 3):
        one = alone(case, executor, t)
        assert torch.equal(one.values["logits"], logits[t])
        for name in ("loss.query", "loss.support", "correct"):
            assert torch.equal(one.values[name][0], together.values[name][t]), name
        weights = torch.zeros(len(case.batch), dtype=torch.float64)
        weights[t] = 1.0
        picked = CpuExecutor(case.plan(), threads=2).forward(case.call(torch.float32, task_weights=weights))
        for name in one.values:
            if option in ("factored", "wide") and name == "grad.0.0.weight":  # one product over the rows of all tasks
                assert torch.allclose(one.values[name], picked.values[name], rtol=1e-5, atol=1e-6)
            elif name.startswith("grad."):
                assert torch.equal(one.values[name], picked.values[name]), name


@pytest.mark.parametrize("option", ["second", "factored", "wide", "images-second", "images-support"])
def test_order_of_the_tasks_does_not_matter_to_any_of_them(option: str) -> None:
    case = ragged(option)
    order = torch.randperm(len(case.batch), generator=torch.Generator().manual_seed(0)).tolist()
    executor = CpuExecutor(case.plan(), threads=2)
    first = executor.forward(case.call(torch.float32))
    mixed = executor.forward(dataclasses.replace(case, batch=case.batch.select(order)).call(torch.float32))
    for name in ("loss.query", "loss.support", "correct"):
        assert torch.equal(first.values[name][order], mixed.values[name])
    logits = first.values["logits"].split(case.batch.query_sizes)
    assert torch.equal(torch.cat([logits[t] for t in order]), mixed.values["logits"])
    names = {n: v for n, v in first.values.items() if n.startswith("grad.")}
    assert error(mixed.values, names, ZERO) <= 1e-5


@pytest.mark.parametrize("name", ["sinusoid", "omniglot-fc"])
def test_calls_that_are_linked_are_those_of_the_walk(name: str) -> None:
    """Tasks of one size and one step are linked; beside a task of another size the same tasks are walked."""
    case = net_case(name, tasks=6, steps=1, rows=(5, 5))
    *most, last = [case.batch.task(t) for t in range(6)]
    ragged = fastmaml.TaskBatch.from_tasks([*most, tuple(x[:4] for x in last)])
    weights = torch.tensor([1.0] * 5 + [0.0], dtype=torch.float64)
    results = []
    for batch in (fastmaml.TaskBatch.from_tasks([*most, last]), ragged):
        call = dataclasses.replace(case, batch=batch).call(torch.float32, task_weights=weights)
        results.append(CpuExecutor(case.plan(), threads=2).forward(call))
    linked, walked = results
    assert torch.equal(linked.values["logits"][:25], walked.values["logits"][:25])
    for key, value in linked.values.items():
        other = walked.values[key]
        assert torch.equal(value, other) if key.startswith("grad.") else torch.equal(value[:5], other[:5]), key


@pytest.mark.parametrize("tasks", [1, 2, 7, 16, 17, 33, 100])
def test_sum_over_tasks(tasks: int) -> None:
    case = net_case("sinusoid", tasks=tasks, steps=1, rows=(3, 2))
    _, truth = case.truth()
    results = CpuExecutor(case.plan(), threads=2).forward(case.call(torch.float32))
    assert error(gradients(results, truth), truth, ZERO) <= 1e-4  # free-running: a flip may happen


def test_gradients_are_added_to_sinks() -> None:
    case = ragged_case()
    executor = CpuExecutor(case.plan())
    plain = executor.forward(case.call(torch.float32))
    sinks = {
        n: torch.full_like(v, 2.0) for n, v in plain.values.items() if n.startswith("grad.") and n != "grad.2.bias"
    }
    executor.forward(case.call(torch.float32, sinks=sinks))
    for name, sink in sinks.items():
        assert torch.equal(sink, 2.0 + plain.values[name]), name
