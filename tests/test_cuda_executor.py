"""The cuda executor as host code, its threads as fibers: against float64 with equal masks, the same bits in every order of the threads, with any number
of them, of blocks, and wherever the memory lies; ragged and non-finite tasks. What is refused, and what was built: test_cuda_limits.py; on a device: test_cuda_device.py."""

from __future__ import annotations

import dataclasses
import statistics

import pytest
import torch
from cuda_host import CASES, ORDERS, host, on_host, plan_of, small_net, small_tasks, use
from executor_cases import NETS, ZERO, left_out_of, masks_equal_error, net_case, overflowing, ragged_case, same, without
from random_programs import error, norm, random_case, randoms

import fastmaml
from fastmaml import engine
from fastmaml.executors import choose
from fastmaml.executors.cpu.executor import CpuExecutor
from fastmaml.executors.cuda.executor import CudaExecutor
from fastmaml.executors.torch.executor import TorchExecutor


# ------------------------------------------------------------------------------------- (a) against float64, masks equal
def test_random_programs() -> None:
    errors = []
    for n, rng in enumerate(randoms(60)):
        case = random_case(rng, native=True)
        assert CudaExecutor.why_not(case.plan(), host) is None
        options = {"order": ORDERS[n % 3], "shared_limit": (0, 1, 12000)[n // 3 % 3], "threads": (32, 64, 128)[n // 9 % 3]}
        errors.append(masks_equal_error(case, 1e-5, on_host, **options))
    judged = [e for e in errors if e >= 0]
    assert len(judged) >= 56 and sum(e > 1e-5 for e in judged) <= 0.04 * len(judged)
    assert statistics.median(judged) <= 1e-6


@pytest.mark.parametrize("memory", ["constant", "fast"])
@pytest.mark.parametrize(("steps", "first_order"), [(0, False), (1, False), (5, False), (2, True)])
@pytest.mark.parametrize("name", NETS)
def test_reference_nets_with_equal_masks(name: str, steps: int, first_order: bool, memory: str) -> None:
    big = "omniglot" in name
    if big and (steps == 5 or memory == "fast"):
        pytest.skip("slow on the host, and not another Plan")
    case = net_case(name, tasks=2, steps=steps, first_order=first_order, memory=memory, rows=(5, 6) if big else (10, 15))
    assert 0 <= masks_equal_error(case, 3e-5, on_host, order="shuffled2", threads=256) <= 3e-5


@pytest.mark.parametrize("entry", ["evaluate", "adapt"])
def test_random_programs_without_gradients(entry: str) -> None:
    for n, rng in enumerate(randoms(12)):
        case = random_case(rng, native=True, query_from=None)
        plan, call = case.plan(entry=entry), case.call(torch.float32)
        got = on_host(plan, order=ORDERS[n % 3]).forward(call).values
        exact, plain = TorchExecutor(plan).forward(case.call()).values, TorchExecutor(plan).forward(call).values
        assert got.keys() == exact.keys()
        for name, truth in exact.items():
            if name != "correct" and torch.isfinite(truth).all():
                allowed = 10 * error({name: plain[name]}, {name: truth}, ZERO) + 1e-5
                assert error({name: got[name]}, {name: truth}, ZERO) <= allowed, name


def test_halves() -> None:
    """Forward, a torch loss, reverse: the cpu executor's gradients."""
    for n, rng in enumerate(randoms(20)):
        case = dataclasses.replace(random_case(rng, native=True, query_from=None), task_weights=None)
        plan, found = case.plan(entry="halves"), []
        for executor in (on_host(plan, order=ORDERS[n % 3]), CpuExecutor(plan)):
            forward = executor.forward(case.call(torch.float32, total=True))
            logits = forward.values["logits"].split(case.batch.query_sizes)
            found.append((forward, executor.reverse(forward.state, {"dlogits": torch.tanh(torch.cat(logits))})))
        (mine, mine_back), (theirs, theirs_back) = found
        assert torch.equal(mine.finite, theirs.finite) and mine_back.values.keys() == theirs_back.values.keys()
        if theirs_back.all_finite and theirs_back.values and norm(theirs_back.values) < 1e3:
            assert error(mine.values, theirs.values, ZERO) <= 1e-5
            assert error(mine_back.values, theirs_back.values, ZERO) <= 1e-4


@pytest.mark.parametrize("name", CASES)
def test_the_order_of_the_threads_changes_no_bit(name: str) -> None:
    case, plan, first = plan_of(name)
    for order in ("reversed", "shuffled3", "shuffled4"):
        same(first, on_host(plan, order=order).forward(case.call(torch.float32)))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "options",
    [{"threads": 32}, {"threads": 256, "blocks": 1}, {"shared_limit": 1}, {"shared_limit": 24000}, {"shared_limit": 90000}],
    ids=lambda options: "-".join(f"{k}{v}" for k, v in options.items()),
)
def test_bits_do_not_depend_on_threads_blocks_or_places(name: str, options: dict) -> None:
    case, plan, first = plan_of(name)
    executor = on_host(plan, **{"order": "shuffled5", **options})
    same(first, executor.forward(case.call(torch.float32)))
    same(first, executor.forward(case.call(torch.float32)))  # counters are zeros again


def test_memory_is_shared_while_it_fits() -> None:
    """All of a task in flight, then its scratch, then nothing."""
    case, plan, _ = plan_of("second")
    placed = []
    for limit in (232448, 100000, 1):
        native = on_host(plan, shared_limit=limit).prepared(case.batch).native
        placed.append((native.shared_arena_bytes, native.arena_bytes))
    (whole, none), (part, rest), (nothing, all_of_it) = placed
    assert none == nothing == 0 and 0 < part < whole == all_of_it == part + rest


@pytest.mark.parametrize("option", ["second", "factored"])
def test_a_task_of_a_ragged_batch_is_that_task_alone(option: str) -> None:
    case, plan, together = plan_of(option)
    logits = together.values["logits"].split(case.batch.query_sizes)
    for t in (0, 7, 16):
        weights = torch.zeros(len(case.batch), dtype=torch.float64)
        weights[t] = 1.0
        picked = on_host(plan).forward(case.call(torch.float32, task_weights=weights))
        one = on_host(plan).forward(dataclasses.replace(case, batch=case.batch.select(t)).call(torch.float32))
        assert torch.equal(one.values["logits"], logits[t])
        for name in one.values:
            if name.startswith("grad."):
                assert torch.equal(one.values[name], picked.values[name]), name


@pytest.mark.parametrize("tasks", [1, 2, 33])
def test_sum_over_tasks(tasks: int) -> None:
    case = net_case("sinusoid", tasks=tasks, steps=1, rows=(3, 2))
    call = case.call(torch.float32)
    results, exact = on_host(case.plan()).forward(call), CpuExecutor(case.plan()).forward(call)
    assert error(results.values, exact.values, ZERO) <= 1e-5


def test_sinks_are_added_to() -> None:
    case, plan, plain = plan_of("second")
    sinks = {n: torch.full_like(v, 2.0) for n, v in plain.values.items() if n.startswith("grad.") and n != "grad.2.bias"}
    on_host(plan).forward(case.call(torch.float32, sinks=sinks))
    for name, sink in sinks.items():
        assert torch.equal(sink, 2.0 + plain.values[name]), name


# -------------------------------------------------------------------------------------------- tasks that are not finite
@pytest.mark.parametrize("bad", [{3: float("nan")}, {0: float("inf"), 16: float("-inf")}, {5: 3e38, 6: float("nan")}], ids=["nan", "inf", "two"])
@pytest.mark.parametrize("option", ["second", "factored"])
def test_non_finite_tasks_are_named_and_left_out(option: str, bad: dict[int, float]) -> None:
    left_out_of(ragged_case(option), bad, on_host)


@pytest.mark.parametrize(("inputs", "rate"), [(3, 1e30), (12, 3e38), (12, 1e30)], ids=["weight", "factored", "factored-product"])
def test_a_gradient_that_alone_is_infinite(inputs: int, rate: float) -> None:
    case = overflowing(3, inputs, rate)
    results = on_host(case.plan(), order="reversed").forward(case.call(torch.float32))
    assert not results.all_finite and (~results.finite).nonzero().flatten().tolist() == [3]
    weights = without(case, [3])
    good = dataclasses.replace(case, batch=case.batch.select([0, 1, 2, 4]))
    clean = on_host(case.plan()).forward(good.call(torch.float32, task_weights=weights[weights > 0]))
    truth = {n: v for n, v in clean.values.items() if n.startswith("grad.")}
    assert error(results.values, truth, ZERO) <= 1e-5


@pytest.mark.parametrize("strict", [True, False])
def test_strict_leaves_sinks_alone(strict: bool) -> None:
    case = overflowing(2)
    names = [n for n in on_host(case.plan()).forward(case.call(torch.float32)).values if n.startswith("grad.")]
    sinks = {n: torch.zeros(2, 3) for n in names}
    on_host(case.plan()).forward(case.call(torch.float32, sinks=sinks, strict=strict))
    assert bool(norm(sinks)) != strict and all(torch.isfinite(v).all() for v in sinks.values())


# ------------------------------------------------------------------------------------------------------- through MAML
@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Plan of MAML objects runs on the host's threads."""
    monkeypatch.setattr(engine, "choose", lambda backend, plan, *_: on_host(plan, order="reversed"))


def test_through_maml(everywhere: None) -> None:
    mine = use(small_net(), "auto")
    engine.choose = choose
    for a, b in zip(mine, use(small_net(), "cpu"), strict=True):
        assert float((a - b).norm()) <= 1e-5 * float(b.norm()) + 1e-7


def test_memory_is_known_before(everywhere: None) -> None:
    maml = fastmaml.MAML(small_net(), inner_lr=0.1, inner_steps=2)
    sizes = maml.memory_bytes(small_tasks())
    assert sizes["shared memory of a block"] > 0 and sizes["parameters and gradients, packed"] > 0
    assert "shared memory of a block" in maml.explain(small_tasks())


def test_diverging_tasks_raise_by_number(everywhere: None) -> None:
    tasks = [v.clone() for v in small_tasks()]
    tasks[0][3] = float("nan")
    maml = fastmaml.MAML(small_net(), inner_lr=0.1)
    with pytest.raises(FloatingPointError, match=r"not finite: 3\."):
        maml.meta_grad(tasks)
    assert all(p.grad is None for p in maml.parameters())
