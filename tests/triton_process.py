"""What the cases of the triton executor share: the process that they run in, interpreted or on a GPU, and how they are judged."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import torch
import triton.language as tl
from executor_cases import masks_equal_error
from random_programs import Case

from fastmaml.executors.triton.executor import INTERPRETED, TritonExecutor


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


def judge_plan(case: Case, bound: float = 1e-5) -> None:
    """Rule (a): with equal masks within ``bound`` of float64, or of what rounding explains. "highest": what float32 can do."""
    assert masks_equal_error(on_device(case), bound, TritonExecutor, precision="highest") >= 0, "it diverges"
