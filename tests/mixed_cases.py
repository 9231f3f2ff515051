"""What the tests of Plans on two executors share: models with a frozen body, and the parts of their Plans."""

from __future__ import annotations

import dataclasses
import functools

import pytest
from random_programs import Case
from test_torch_executor import OPTIONS, option_case, small_program

from fastmaml.executors.cpu.executor import CpuExecutor
from fastmaml.executors.cuda.executor import CudaExecutor
from fastmaml.executors.mixed import MixedExecutor
from fastmaml.executors.torch.executor import TorchExecutor
from fastmaml.plan import Plan, Segment
from fastmaml.plan.parts import Parts, divide, split

try:
    from fastmaml import _cuda_host as host
except ImportError:
    host = None


MAKE = {"torch": TorchExecutor, "cpu": CpuExecutor, "cuda": functools.partial(CudaExecutor, native=host, threads=64)}
needs_host = pytest.mark.skipif(host is None, reason="fastmaml._cuda_host is not built")


def frozen(segment: Segment) -> str | None:
    return f"{segment.name} runs elsewhere" if segment.name.startswith(("prologue", "epilogue")) else None


def parts_of(plan: Plan) -> Parts:
    """Also without an inner loop: the query rows by themselves."""
    if plan.steps:
        return divide(plan, frozen)
    names = [phase.segments[0] for phase in plan.schedule]
    return split(plan, names.index("query"), names.index("epilogue"))


def mixed(plan: Plan, inside: str = "torch", around: str = "torch") -> MixedExecutor:
    parts = parts_of(plan)
    return MixedExecutor(plan, parts, MAKE[around](parts.around), MAKE[inside](parts.inside))


def anil_case(option: str = "plain", kind: str = "conv", first_order: bool = False, memory: str = "constant", steps: int = 3) -> Case:
    """A frozen body and an adapted head, ragged tasks."""
    case = option_case(kind, first_order, memory, option)
    program = small_program(kind, OPTIONS[option].get("statistics", "batch"), ("body", "norm"))
    rates = {n: r for n, r in case.arrangement.rates.items() if n.startswith("head")}
    return dataclasses.replace(case, program=program, arrangement=dataclasses.replace(case.arrangement, rates=rates, steps=steps))
