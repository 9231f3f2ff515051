"""What goes into an executor and what comes out: plain tensors under the Plan's names. And the memory of a device, of which executors share what there is."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastmaml.batch import TaskBatch

Made = TypeVar("Made")
KEEPERS: weakref.WeakSet[Any] = weakref.WeakSet()  # executors that keep device memory for their next calls; they have ``let_go``


@dataclass(slots=True)
class Call:
    """One run of a Plan.

    leaves        by name, in the model's own layout (home "task": stacked [tasks, ...]); of a part of a Plan (mixed.py) also what another part has made,
                  where it has rows those of all tasks one after another
    rates         inner rates, [steps, ...] where they have a step axis
    weights       other run-time numbers (step_weights, class weights)
    task_weights  [tasks] float64 on the CPU, or None for 1 / tasks each; ``total``: plain sums (a torch outer loss carries its own)
    replay        discrete decisions to take from another run: (buffer, step) -> one tensor per task (the torch executor)
    record        bring the discrete decisions out (Plans with record_masks)
    strict        leave sinks alone if any task is not finite
    sinks         gradients are ADDED to these contiguous float32 tensors, by result name, instead of being returned (the cpu executor)
    """

    batch: TaskBatch
    leaves: Mapping[str, Tensor]
    rates: Mapping[str, Tensor] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    task_weights: Tensor | None = None
    total: bool = False
    replay: Mapping[tuple[str, int], list[Tensor]] = field(default_factory=dict)
    record: bool = False
    strict: bool = True
    sinks: Mapping[str, Tensor] = field(default_factory=dict)

    def task_weight(self, t: int) -> float:
        if self.task_weights is not None:
            return float(self.task_weights[t])
        return 1.0 if self.total else 1.0 / len(self.batch)


@dataclass(slots=True)
class Results:
    """``values``: results by name. loss.query [tasks] or [tasks, steps + 1], loss.support [tasks, steps], logits [sum n_query, ...], correct
    [tasks], grad.<leaf>, adapted.<leaf> [tasks, ...]; masks under (name, step) as one tensor per task. ``finite`` [tasks]: tasks that are
    in the sums (``all_finite``: whether that is all of them). ``state`` goes back into ``reverse``."""

    values: dict[Any, Any]
    finite: Tensor
    state: Any
    executor: str
    all_finite: bool
    precision: str = ""  # as it ran, where the executor has several


class DeviceResults(Results):
    """Whose ``all_finite`` is read from the device when it is asked for. While a graph is captured nothing can be read: it is True then, and with
    ``strict`` the gradients of a replay that finds a task not finite stay as they were."""

    __slots__ = ("_known",)

    @property
    def all_finite(self) -> bool:
        if self._known is None:
            self._known = bool(self.finite.all())
        return self._known

    @all_finite.setter
    def all_finite(self, known: bool | None) -> None:
        self._known = known


def capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def with_room(make: Callable[[], Made], tasks: int, device: torch.device, parts: Callable[[], Mapping[str, int]]) -> Made:
    """What ``make`` makes on ``device``. Where there is no room, the executors of all objects let go of what they keep first; where there is none then, the error
    says what was asked for (``parts``: bytes by purpose), and holds on to nothing that was made on the way."""
    with contextlib.suppress(torch.cuda.OutOfMemoryError):
        return make()
    for keeper in list(KEEPERS):
        keeper.let_go()
    if device.type == "cuda" and not capturing(device):
        torch.cuda.empty_cache()
    with contextlib.suppress(torch.cuda.OutOfMemoryError):
        return make()
    sizes = parts()
    listed = ", ".join(f"{words} {size:,}" for words, size in sizes.items())
    message = f"the Plan of {tasks} tasks needs {sum(sizes.values()):,} bytes on {device} ({listed}), which are not free: pass fewer tasks at once"
    raise torch.cuda.OutOfMemoryError(message)
