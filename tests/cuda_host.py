"""The cuda executor as host code, for its tests: orders of its threads, small networks, the limits of what nvcc makes of it."""

from __future__ import annotations

import functools
import random
import sys
from pathlib import Path

import pytest
import torch
from executor_cases import net_case, ragged_case
from random_programs import Case, random_case

import fastmaml
from fastmaml.executors.call import Results
from fastmaml.executors.cuda.executor import CudaExecutor
from fastmaml.plan import Plan

host = pytest.importorskip("fastmaml._cuda_host", reason="fastmaml._cuda_host is built in a source tree: python setup.py build_ext --inplace")
on_host = functools.partial(CudaExecutor, native=host, threads=64)
ORDERS = ("forward", "reversed", "shuffled1")
CASES = {
    **{option: functools.partial(ragged_case, option) for option in ("second", "first", "fast", "steps", "factored")},
    "sinusoid": functools.partial(net_case, "sinusoid", tasks=5, steps=3),
    "random": lambda: random_case(random.Random(5), native=True),
}


@functools.cache
def plan_of(name: str) -> tuple[Case, Plan, Results]:
    case = CASES[name]()
    plan = case.plan()
    return case, plan, on_host(plan).forward(case.call(torch.float32))


def small_net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 20), torch.nn.LayerNorm(20), torch.nn.GELU(), torch.nn.Linear(20, 4))


def small_tasks() -> tuple:
    torch.manual_seed(1)
    return torch.randn(5, 8, 6), torch.randint(4, (5, 8)), torch.randn(5, 7, 6), torch.randint(4, (5, 7))


def use(model: torch.nn.Module, backend: str, to=lambda v: v) -> list[torch.Tensor]:
    """Gradients by meta_grad (twice: the second one into the first one's), backward, an outer loss; adapted logits."""
    maml = fastmaml.MAML(model, inner_lr=0.1, inner_steps=2, backend=backend, learn_inner_lr=True)
    tasks, found = tuple(to(v) for v in small_tasks()), []

    def collect() -> None:
        found.extend(p.grad.clone() for p in maml.parameters())
        maml.zero_grad()

    maml.meta_grad(tasks), maml.meta_grad(tasks)
    collect()
    out = maml(tasks)
    out.loss.backward()
    collect()
    maml(tasks, outer_loss=lambda logits, y: torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())).loss.backward()
    collect()
    adapted = maml.adapt(*tasks[:2])
    return [*found, out.logits.detach(), out.correct, out.support_losses.detach(), adapted(tasks[2])]


def conv_plan() -> Plan:
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 5))
    x, y = torch.randn(2, 5, 1, 8, 8), torch.arange(5).expand(2, -1)
    return fastmaml.MAML(model, backend="torch").plan((x, y, x, y))


# Of each function, by architecture: registers (512 threads have 128 each), bytes of its stack, bytes spilled, static shared memory. More needs a reason.
LIMITS = {"sm_80": (128, 256, 0, 0), "sm_90": (128, 256, 0, 0)}


PTXAS = Path(__file__).parent.parent / "build" / sys.implementation.cache_tag / "cuda/executor.cu.o.log"  # what it said as _cuda was built
