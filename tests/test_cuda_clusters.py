"""A cluster of blocks that runs a task as one block does: on the host's threads the bits of one block, however many blocks, in any order; a barrier that is only
the block's shows; when clusters are chosen, and what nvcc makes of them. On a device: test_cuda_device.py."""

from __future__ import annotations

import functools
import statistics
from pathlib import Path

import pytest
import torch
from cuda_host import ORDERS, host, on_host, plan_of, small_net, small_tasks
from executor_cases import left_out_of, masks_equal_error, net_case, ragged_case, same
from random_programs import random_case, randoms
from test_cuda_straight import COMPILED, compiled_within_limits, compiler, needs_compiler, needs_nvcc, source_of  # noqa: F401  (compiler: a fixture)

import fastmaml
from fastmaml import engine

H100 = {"name": "a card", "shared_bytes": 232448, "multiprocessors": 132, "capability": (9, 0)}


class Card:
    """The host's threads, said to be a device on which so many blocks or clusters run at once."""

    def __init__(self, **changes: object) -> None:
        self.properties = {**H100, **changes}

    def __getattr__(self, name: str) -> object:
        return getattr(host, name)

    def device(self, index: int) -> dict:
        return self.properties

    def resident_blocks(self, native: object, index: int, ranks: int) -> int:
        return self.properties["multiprocessors"] // ranks


# ------------------------------------------------------------------------------------------------------------------ bits
@pytest.mark.parametrize(("ranks", "threads", "order"), [(2, 64, "forward"), (4, 64, "reversed"), (8, 32, "shuffled3"), (2, 256, "shuffled1")])
@pytest.mark.parametrize("name", ["second", "steps", "factored", "sinusoid", "random"])
def test_the_bits_of_a_block(name: str, ranks: int, threads: int, order: str) -> None:
    case, plan, first = plan_of(name)
    executor = on_host(plan, ranks=ranks, threads=threads, order=order)
    same(first, executor.forward(case.call(torch.float32)))
    same(first, executor.forward(case.call(torch.float32)))  # counters are zeros again
    same(first, on_host(plan, ranks=ranks, threads=threads, order=order, blocks=1).forward(case.call(torch.float32)))


@needs_compiler
@pytest.mark.parametrize("name", ["second, ragged", "sinusoid"])
def test_the_bits_of_a_block_by_a_source_of_its_own(name: str, compiler) -> None:  # noqa: F811
    case = ragged_case("second") if "ragged" in name else net_case("sinusoid", tasks=4, steps=3)
    plan, call = case.plan(), case.call(torch.float32)
    first = on_host(plan).forward(call)
    for order in ORDERS:
        executor = on_host(plan, ranks=2, order=order, compiler=compiler)
        same(first, executor.forward(call))
        assert executor.how.endswith("1 so far; a task on a cluster of 2 blocks")


def test_random_programs() -> None:
    errors = []
    for n, rng in enumerate(randoms(16)):
        errors.append(masks_equal_error(random_case(rng, native=True), 1e-5, on_host, ranks=(2, 4)[n % 2], threads=32, order=ORDERS[n % 3]))
    judged = [e for e in errors if e >= 0]
    assert len(judged) >= 14 and statistics.median(judged) <= 1e-6


@pytest.mark.parametrize("option", ["second", "factored"])
def test_non_finite_tasks_are_named_and_left_out(option: str) -> None:
    left_out_of(ragged_case(option), {3: float("nan"), 16: float("inf")}, functools.partial(on_host, ranks=2))


@pytest.mark.parametrize("name", ["second", "factored", "sinusoid"])
def test_a_barrier_that_is_only_the_blocks_shows(name: str) -> None:
    case, plan, first = plan_of(name)
    with pytest.raises((AssertionError, RuntimeError)):
        same(first, on_host(plan, ranks=2, order="forward-apart").forward(case.call(torch.float32)))


# ---------------------------------------------------------------------------------------------------------------- choice
def ranks_of(tasks: int, shared_limit: int = 1, **card: object) -> int:
    case = net_case("sinusoid", tasks=tasks, steps=1, rows=(3, 2))
    return on_host(case.plan(), native=Card(**card), shared_limit=shared_limit).prepared(case.batch).ranks


@pytest.mark.parametrize(("tasks", "ranks"), [(1, 8), (16, 8), (17, 4), (33, 4), (34, 2), (66, 2), (67, 1), (200, 1)])
def test_as_large_as_all_tasks_can_have_at_once(tasks: int, ranks: int) -> None:
    assert ranks_of(tasks) == ranks


def test_what_has_shared_memory_or_a_device_without_clusters_keeps_to_blocks() -> None:
    assert ranks_of(4, shared_limit=0) == ranks_of(4, shared_limit=24000) == 1  # all of it; its scratch
    assert ranks_of(4, capability=(8, 0)) == 1 and ranks_of(4, capability=(10, 0)) == 8


def test_one_object_serves_many_tasks_and_few() -> None:
    """And a task has the same bits in both."""
    few, many = (net_case("sinusoid", tasks=tasks, steps=1, rows=(3, 2)) for tasks in (2, 12))
    executor = on_host(many.plan(), native=Card(multiprocessors=16), shared_limit=1, threads=32)
    for case in (few, many):
        same(on_host(case.plan()).forward(case.call(torch.float32)), executor.forward(case.call(torch.float32)))
    assert executor.prepared(few.batch).ranks == 8 and executor.prepared(many.batch).ranks == 1
    assert executor.how.endswith("; a task on a cluster of 8 blocks")


def test_nothing_of_a_cluster_lies_in_shared_memory() -> None:
    case, plan, _ = plan_of("second")
    block, cluster = (on_host(plan, ranks=ranks, shared_limit=1).prepared(case.batch).native for ranks in (1, 4))
    assert cluster.shared_arena_bytes == block.shared_arena_bytes == 0
    assert cluster.arena_bytes > block.arena_bytes and cluster.arena_bytes % 64 == 0  # beside it what a block has in shared memory


@pytest.mark.parametrize("ranks", [3, 16])
def test_a_cluster_of_other_sizes_is_refused(ranks: int) -> None:
    case, plan, _ = plan_of("sinusoid")
    with pytest.raises(RuntimeError, match=f"clusters of {ranks} blocks: must be of 1, 2, 4 or 8"):
        on_host(plan, ranks=ranks).forward(case.call(torch.float32))


def test_explain_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "choose", lambda backend, plan, *_: on_host(plan, native=Card(), shared_limit=1, threads=32))
    maml = fastmaml.MAML(small_net(), inner_lr=0.1)
    text = maml.explain(small_tasks())
    assert "; a task on a cluster of 8 blocks" in text and "shared memory of a block" in text


# ------------------------------------------------------------------------------------------------------ what is compiled
@needs_nvcc
@pytest.mark.parametrize(("name", "arch"), [("sinusoid", "sm_90"), ("ragged", "sm_90")])
def test_registers_stack_and_spills(name: str, arch: str, tmp_path: Path) -> None:
    compiled_within_limits(source_of(COMPILED[name](), ranks=4), arch, tmp_path, "--keep")
    (made,) = tmp_path.glob("*.ptx")
    ptx = made.read_text()
    assert "barrier.cluster.arrive.release" in ptx and "barrier.cluster.wait.acquire" in ptx
    assert "bar.sync" not in ptx and "barrier.sync" not in ptx and ".shared" not in ptx  # no barrier is only the block's, no memory either
