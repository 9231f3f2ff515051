"""Two executors for one Plan: what is around the inner loop on one, the inner loop on the other (plan/parts.py).

On a GPU the frozen body of ANIL is convolutions over the rows of all tasks, which is what ``triton`` is for, and its inner loop a head's few weights, which
``cuda`` runs in one launch. What crosses stays on the device, and everything is launched on torch's current stream: nothing waits in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastmaml.batch import TaskBatch
from fastmaml.executors.call import Call, Results
from fastmaml.plan.instructions import Plan
from fastmaml.plan.parts import FINITE, Parts


class MixedExecutor:
    """Runs ``plan``, of which ``parts`` are the two parts; ``around`` and ``inside`` are executors of these."""

    def __init__(self, plan: Plan, parts: Parts, around: Any, inside: Any) -> None:
        self.plan, self.parts, self.around, self.inside = plan, parts, around, inside
        self.name = f"{around.name} + {inside.name}"

    def memory(self, batch: TaskBatch) -> dict[str, int]:
        """Bytes by purpose that the parts lay out; what crosses is in neither."""
        return {f"{part.name}: {words}": size for part in (self.around, self.inside) for words, size in part.memory(batch).items()}

    def forward(self, call: Call) -> Results:
        before = self.around.forward(call)
        crossing = {name: before.values[name] for name in self.parts.into}
        results = self.inside.forward(replace(call, leaves={**call.leaves, **crossing}))
        results.values = {**before.values, **results.values}
        if self.plan.entries == 1:
            return self._after(before.state, results)
        results.state = before.state, results.state
        return self._named(results)

    def reverse(self, state: Any, given: Mapping[str, Tensor]) -> Results:
        around, inside = state
        return self._after(around, self.inside.reverse(inside, given))

    def _after(self, state: Any, inside: Results) -> Results:
        if self.around.plan.entries == 1:
            return self._named(inside)
        given = {name: inside.values[out] for name, out in self.parts.back.items()}
        lost = torch.where(inside.finite, 0.0, float("nan"))
        results = self.around.reverse(state, {**given, FINITE: lost})
        results.values = {**inside.values, **results.values}
        return self._named(results)

    def _named(self, results: Results) -> Results:
        results.values = {key: v for key, v in results.values.items() if (key if isinstance(key, str) else key[0]) in self.plan.results}
        results.executor, results.precision = self.name, getattr(self.around, "precision", "")
        return results
