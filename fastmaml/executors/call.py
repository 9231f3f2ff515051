"""What goes into an executor and what comes out: plain tensors under the Plan's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fastmaml.batch import TaskBatch


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
