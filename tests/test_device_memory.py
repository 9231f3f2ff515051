"""A device without room: executors let go of what they keep, then the error says how many bytes the Plan needs, and nothing is left behind. The allocator is
made to fail; with a real one: test_cuda_device.py."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from mixed_cases import anil_case, mixed, needs_host

from fastmaml.executors.cuda.executor import CudaExecutor
from fastmaml.executors.device import KEEPERS, with_room

CPU = torch.device("cpu")


class Keeper:
    def __init__(self) -> None:
        self.kept: torch.Tensor | None = torch.zeros(4)
        KEEPERS.add(self)

    def let_go(self) -> None:
        self.kept = None


def failing(times: int, made: list[weakref.ref]) -> Callable[[], torch.Tensor]:
    """Makes something twice; the second part fails so many times."""

    def make() -> torch.Tensor:
        first = torch.zeros(8)
        made.append(weakref.ref(first))
        if len(made) <= times:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return first

    return make


def test_executors_of_all_objects_make_room() -> None:
    keepers, made = [Keeper(), Keeper()], []
    with_room(failing(0, made), 3, CPU, dict)
    assert all(keeper.kept is not None for keeper in keepers)
    made.clear()
    assert with_room(failing(1, made), 3, CPU, dict).shape == (8,) and all(keeper.kept is None for keeper in keepers)


def test_the_error_holds_on_to_nothing() -> None:
    made: list[weakref.ref] = []
    gc.disable()
    try:
        with pytest.raises(torch.cuda.OutOfMemoryError, match=r"the Plan of 3 tasks needs 1,250 bytes on cpu \(run 1,000, task 250\).*fewer tasks") as raised:
            with_room(failing(2, made), 3, CPU, lambda: {"run": 1000, "task": 250})
        assert len(made) == 2 and all(ref() is None for ref in made), "freed while the error is in hand"
        assert raised.value.__context__ is None
    finally:
        gc.enable()


@needs_host
def test_the_inner_loop_has_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message is of the part that failed; afterwards everything runs."""
    case, empty = anil_case(), torch.empty
    executor, call = mixed(case.plan(), "cuda"), case.call(torch.float32)
    before = executor.forward(call)
    assert isinstance(executor.inside, CudaExecutor)
    total = sum(size for words, size in executor.inside.memory(case.batch).items() if not words.startswith("shared"))

    def full(*sizes: int, dtype: torch.dtype | None = None, **options: object) -> torch.Tensor:
        if dtype is torch.uint8:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return empty(*sizes, dtype=dtype, **options)

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(torch.cuda.OutOfMemoryError, match=rf"the Plan of 3 tasks needs {total:,} bytes on cpu \(parameters and gradients, packed"):
        executor.forward(call)
    monkeypatch.undo()
    after = executor.forward(call)
    assert all(torch.equal(v, after.values[name]) for name, v in before.values.items())
