"""The cpu executor in several Python threads, in a forked child, and on every tier."""

from __future__ import annotations

import dataclasses
import multiprocessing
import threading

import pytest
import torch
from executor_cases import ragged_case, same, subprocess_with
from random_programs import Case

from fastmaml import _cpu
from fastmaml.executors.cpu.executor import CpuExecutor


def test_one_object_in_several_python_threads() -> None:
    case, other = (
        ragged_case(),
        dataclasses.replace(ragged_case(), batch=ragged_case().batch.select(list(range(5, 12)))),
    )
    executor = CpuExecutor(case.plan(), threads=2)
    expected = [executor.forward(c.call(torch.float32)) for c in (case, other)]
    failures: list[BaseException] = []

    def work(i: int) -> None:
        try:
            for n in range(12):
                which = (i + n) % 2
                same(expected[which], executor.forward((case, other)[which].call(torch.float32)))
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def _child(pipe, executor: CpuExecutor, case: Case) -> None:
    values = executor.forward(case.call(torch.float32)).values
    pipe.send({n: v.numpy() for n, v in values.items()})


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning", "ignore:Exception ignored in.*at_fork")  # of JAX, where tests of the benchmark came before
def test_a_forked_child_gives_the_same_bits_and_does_not_hang() -> None:
    case = ragged_case()
    executor = CpuExecutor(case.plan(), threads=2)
    expected = executor.forward(case.call(torch.float32)).values  # a parallel region has run
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(send, executor, case), daemon=True)
    child.start()
    hangs = not receive.poll(60)
    got = {} if hangs else receive.recv()
    child.join(0 if hangs else 10)
    child.kill()
    assert not hangs, "the child hangs"
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert torch.equal(value, torch.from_numpy(got[name])), name


TIER_SCRIPT = """
import random, sys
from fastmaml import _cpu
import executor_cases as t
from random_programs import random_case
from test_cpu_bits import test_a_task_of_a_ragged_batch_is_that_task_alone, test_bits_do_not_depend_on_threads_or_runs
assert _cpu.active_tier() == sys.argv[1], _cpu.active_tier()
for seed in range(24):
    case = random_case(random.Random(seed), conv=seed % 2 == 1, native=True)
    t.masks_equal_error(case, 1e-5, threads=seed % 3 + 1, block_rows=(None, 1, 4)[seed % 3])
for name in t.NETS:
    assert 0 <= t.masks_equal_error(t.net_case(name, tasks=2), 3e-5) <= 3e-5, name
test_bits_do_not_depend_on_threads_or_runs("second")
test_bits_do_not_depend_on_threads_or_runs("images-second")
test_a_task_of_a_ragged_batch_is_that_task_alone("second")
print("passed")
"""


@pytest.mark.parametrize("tier", _cpu.tiers()[1:] or ["baseline"])
def test_every_tier(tier: str) -> None:
    """The best tier is what every other test here runs."""
    done = subprocess_with(tier, TIER_SCRIPT, tier)
    assert done.returncode == 0 and done.stdout.strip() == "passed", done.stdout + done.stderr


def test_a_tier_that_is_not_there_is_an_error_that_lists_those_that_are() -> None:
    done = subprocess_with("neon", "from fastmaml import _cpu; _cpu.active_tier()")
    assert done.returncode != 0
    assert f"FASTMAML_ISA=neon: this machine has {', '.join(_cpu.tiers())}" in done.stderr
