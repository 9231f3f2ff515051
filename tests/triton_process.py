"""What the cases of the triton executor share: the process that they run in, interpreted or on a GPU, and how they are judged."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import torch
import triton.language as tl
from random_programs import Case, error, norm
from torch import Tensor

from fastmaml.executors.call import Results
from fastmaml.executors.torch.executor import TorchExecutor
from fastmaml.executors.triton.executor import INTERPRETED, TritonExecutor
from fastmaml.plan import Plan


def patch_once() -> None:
    """The interpreter replaces the functions of triton.language at every call, which takes most of its time; in this process once is enough."""
    from triton.runtime import interpreter

    original, done = interpreter._patch_lang, set()

    def once(fn: Any) -> Any:
        names = frozenset(name for name, value in fn.__globals__.items() if value is tl or value is tl.core)
        if names not in done:
            done.add(names)
            original(fn)
            tl.tensor.__index__ = lambda self: self.handle.data.item()  # Triton 3.6 asks numpy 2.4 for what it no longer does
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = once


if INTERPRETED:
    patch_once()
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
ZERO = 1e-6  # gradients below are zero to float32's rounding


def on_device(case: Case) -> Case:
    def move(tensors: dict) -> dict:
        return {name: v.to(DEVICE) for name, v in tensors.items()}

    moved = {"leaves": move(case.leaves), "rates": move(case.rates), "weights": move(case.weights)}
    return dataclasses.replace(case, batch=case.batch.to(DEVICE), **moved)


def judge(what: str, norms: list[float]) -> None:
    """Rule (c), and what rounding the inputs would change. A result of few numbers may be right by luck: these are judged together."""
    wrong, plain, moved, size = norms
    allowed = 2 * plain + 2.0**-21 * size + 8 * moved
    assert wrong <= allowed, f"{what}: error {wrong:.3g} of {size:.3g}, allowed {allowed:.3g}"


def replayed(case: Case, plan: Plan, masks: dict, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Gradients of the torch executor with the decisions of another run."""
    values = TorchExecutor(plan).forward(case.call(dtype, replay=masks)).values
    return {name: v for name, v in values.items() if isinstance(name, str) and name.startswith("grad.")}


def judge_plan(case: Case, bound: float = 1e-5) -> Results:
    """Rule (a): with equal masks within ``bound`` of float64, or of what rounding explains. "highest": what float32 can do."""
    case = on_device(case)
    plan = case.plan(record_masks=True)
    results = TritonExecutor(plan, "highest").forward(case.call(torch.float32, record=True))
    masks = {key: value for key, value in results.values.items() if isinstance(key, tuple)}
    truth = replayed(case, plan, masks)
    assert results.finite.all() and norm(truth) > 0
    worst = error(results.values, truth, ZERO)
    if worst > bound:
        plain, moved = replayed(case, plan, masks, torch.float32), replayed(case.moved(6e-8), plan, masks)
        allowed = 8 * (error(plain, truth, ZERO) + error(moved, truth, ZERO))
        assert worst <= allowed, f"error {worst:.2g}, conditioning explains {allowed:.2g}"
    return results
