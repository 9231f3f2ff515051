"""The plain loop of a network that a parameterisation rewrites, for ``verify``: its Program as a plain torch function, and autograd through everything.

It shares the rewriting, the prologue and the formulas of the forward ops with what it is held against, and nothing else: no derivative, no Plan, no kernel of
an executor. That the rewriting is the paper's is shown by tests, in plain torch that shares no line with fastmaml.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastmaml.batch import TaskBatch
from fastmaml.executors.torch.evaluate import evaluate
from fastmaml.parameterisation import PENALTY, Tasks
from fastmaml.plain_loop import PlainLoop, Theta
from fastmaml.prologue import inputs_of


class RewrittenLoop(PlainLoop):
    """``seeds``: one per task, of the noise in the prologue. NotImplementedError for a model that cannot be traced."""

    def __init__(self, maml: Any, batch: TaskBatch, seeds: Sequence[int]) -> None:
        super().__init__(maml, batch)
        self.runner, self.seeds, self.k = maml.runner(batch), seeds, 0
        if self.runner.opaque:
            raise NotImplementedError(f"verify knows parameterisation {maml.parameterisation.signature} for models that can be traced, and this one cannot")
        self.parameters = self.runner.view.parameters  # of maml, which is a copy already
        self.wanted = {name: p for name, p in maml.named_parameters() if p.requires_grad}
        self.per_step = {leaf.name for leaf in self.runner.program.leaves if leaf.per_step}

    def _start(self, t: int) -> Theta:
        runner, made = self.runner, {}
        if self.maml.parameterisation.has_prologue:
            one, values = self.batch.select([t]), self.maml.rates.tensors(self.steps)
            rates = {name: values[rate.name] for name, rate in self.maml.rates.rates.items()}
            tasks = Tasks(one, self.parameters, rates, [self.seeds[t]], lambda weight: inputs_of(runner, self.parameters, one, weight))
            found = dict(self.maml.parameterisation.prologue(tasks))
            self.penalty = found.pop(PENALTY)[0] if PENALTY in found else 0.0
            made = {name: found[name][0] for name in runner.own}
        theta = {**runner.leaf_values(None), **made}
        adapted = {name: theta[name] for name in self.maml.rates.rates}  # cloned: the inner gradient goes not through what the prologue made of them
        return {**theta, **{name: v.clone() if v.requires_grad else v.detach().requires_grad_() for name, v in adapted.items()}}

    def _rate(self, theta: Theta, name: str, k: int) -> Tensor:
        own = f"rate.{name}"  # of each task
        return theta[own] if own in theta else super()._rate(theta, name, k)

    def _at_step(self, k: int) -> None:
        self.k = k

    def _logits(self, theta: Theta, x: Tensor) -> Tensor:
        program = self.runner.program
        leaves = {name: v[self.k] if name in self.per_step else v for name, v in theta.items()}
        return evaluate(program, leaves, [program.output], x)[0]
