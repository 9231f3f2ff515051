"""From the user's model to something that runs: trace it, build its Plans, choose their executors, and keep them for the next call.

Caches are keyed by everything a Plan depends on. When the model is edited, all of them are dropped and the model is looked at again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from sys import _getframe
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import device as Device

from fastmaml import options
from fastmaml.batch import TaskBatch
from fastmaml.executors import Executor, choose
from fastmaml.executors.autograd.opaque import opaque_program, turn
from fastmaml.executors.call import Results
from fastmaml.executors.device import keep_for_graph
from fastmaml.optimizers import SGD, ImplicitGradient
from fastmaml.parameterisation import Rewritten, rewritten
from fastmaml.plan import Arrangement, Plan, Rate, build_plan
from fastmaml.program import Loss, Program
from fastmaml.rates import InnerRates
from fastmaml.trace import TraceError, trace
from fastmaml.watch import ModelView

TASK_RATE = "rate."  # the rate of an adapted leaf <name> that each task has for itself is called rate.<name>
PLANS = 32  # kept per object; the oldest goes first
NUMBERS = 64  # kept per Plan: the weights of a multi-step loss are others in each epoch
PACKAGE, TORCH = (str(Path(file).parent) for file in (__file__, torch.__file__))


class Spec(NamedTuple):
    """What the Plans of one object may differ in, besides the shape of a sample. Numbers that change from call to call are not here."""

    entry: str
    steps: int
    loss: Loss
    batchnorm: str | None = None
    query_from: int | None = None
    first_order: bool = False
    memory: str = "constant"
    backend: str = "auto"
    record: bool = False
    optimizer: SGD = SGD()
    meta_gradient: str | ImplicitGradient = "unrolled"
    precision: str = "high"
    support_rows: int | None = None


@lru_cache(maxsize=256)
def support_bucket(sizes: tuple[int, ...]) -> int:
    """Rows of the largest support set, rounded up to a power of two: a layer with more inputs than that is factored (plan/rewrite.py)."""
    return 1 << (max(sizes) - 1).bit_length()


class Runner:
    """A Plan on its executor, with what every call of it needs, looked up once.

    leaves     the parameters that the Program reads, by name; ``buffers``: names of the model's buffers that it reads
    own        names of the leaves, and rates, of each task: the prologue gives them
    gradients  (name of the result, name of the parameter or rate) of every gradient that the Plan computes, but of each task's own
    trained    (name of the result, parameter) of those that are of a parameter; ``of_rates``: (name of the result, name) of the others
    """

    def __init__(self, view: ModelView, rewritten: Rewritten, rates: Mapping[str, Rate], executor: Executor) -> None:
        self.view, self.rewritten, self.program = view, rewritten, rewritten.program
        self.executor, self.plan, program = executor, executor.plan, rewritten.program
        self.given_rates = rates
        self.opaque = any(op.name == "module" for op in program.ops)
        self.output = program.values[program.output].shape
        self.own = {leaf.name for leaf in program.leaves if leaf.home == "task"}
        self.own |= {n for n in self.plan.inputs if self.plan.buffers[n].home == "task" and n.startswith(TASK_RATE)}
        self.constants = {name: make(view.like.detach()) for name, make in rewritten.constants.items()}
        read = [leaf.name for leaf in program.leaves if leaf.name not in self.own and leaf.name not in self.constants]
        self.leaves = {name: view.parameters[name] for name in read if name in view.parameters}
        self.buffers = [name for name in read if name not in view.parameters]
        found = [(name, name.removeprefix("grad.")) for name in self.plan.results if name.startswith("grad.")]
        self.gradients = [(key, name) for key, name in found if name not in self.own]
        self.trained = [(key, view.parameters[name]) for key, name in self.gradients if name in view.parameters]
        self.of_rates = [(key, name) for key, name in self.gradients if name not in view.parameters]
        self._numbers: dict[tuple[str, tuple[float, ...]], Tensor] = {}

    def number(self, name: str, values: Sequence[float]) -> Tensor:
        """Numbers of a call as a tensor beside the parameters: kept, as nothing can be copied to a GPU while a graph is captured."""
        key = (name, tuple(values))
        if key not in self._numbers:
            if len(self._numbers) >= NUMBERS:
                self._numbers.clear()
            with torch.inference_mode(False):
                self._numbers[key] = torch.tensor(values, dtype=self.view.like.dtype, device=self.view.like.device)
        found = self._numbers[key]
        keep_for_graph(found.device, found)
        return found

    def leaf_values(self, given: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
        """Of one call: the model's own, or ``given`` in their place."""
        leaves = self.leaves if given is None else {name: given[name] for name in self.leaves}
        if not self.buffers and not self.constants:
            return leaves
        return {**leaves, **self.constants, **{name: self.view.model.get_buffer(name) for name in self.buffers}}


class Bound(NamedTuple):
    """What calls run on that ask for the same (``asked``: view, form of the tasks, options): all was checked and looked up that does not depend on numbers."""

    asked: tuple
    spec: Spec
    runner: Runner


class Engine:
    """Programs, Plans and executors of ``owner["model"]`` (the table of submodules of a MAML object, whose model may be replaced)."""

    def __init__(self, owner: Mapping[str, nn.Module | None], adapt: str | list[str], rates: InnerRates) -> None:
        self.owner, self.adapt, self.rates = owner, adapt, rates
        self._view: ModelView | None = None
        self._programs: dict[Any, Rewritten] = {}
        self._runners: dict[Any, Runner] = {}
        self._bound: dict[str, Bound] = {}  # the last one of each entry
        self._warned: set[str] = set()
        self.ran: str | None = None  # name of the executor that ran last

    def view(self) -> ModelView:
        """The model as it is now."""
        view = self._view
        if view is not None and self.owner["model"] is view.model and view.holds():
            return view
        with turn:  # an autograd executor in another thread may have the model's parameters in its hands
            view = self._view
            if view is not None and self.owner["model"] is view.model and view.holds():
                return view
            view = ModelView(self.owner["model"], self.adapt, self.owner["parameterisation"])
            self.rates.bind({name: view.parameters[name] for name in view.adapted})
            self._programs, self._runners, self._bound, self._view = {}, {}, {}, view
            return view

    def bound(self, view: ModelView, batch: TaskBatch, chosen: tuple) -> Bound:
        """``chosen``: a Spec without its support_rows. Raises ValueError or TypeError for tasks that suit neither model nor loss."""
        asked = (view, batch.form, chosen)
        found = self._bound.get(chosen[0])
        if found is None or found.asked != asked:
            options.check_device(batch, view.like)
            spec = Spec(*chosen, support_bucket(batch.support_sizes))
            runner = self.runner(view, batch, spec)
            options.check_inputs(batch, view.like, runner.opaque)
            options.check_targets(batch, spec.loss, runner.output, spec.entry in ("halves", "adapt"))
            found = self._bound[spec.entry] = Bound(asked, spec, runner)
        return found

    def runner(self, view: ModelView, batch: TaskBatch, spec: Spec) -> Runner:
        """For samples like those of ``batch``."""
        key = (batch.row_shapes[0], spec)
        found = self._runners.get(key)
        if found is not None and found.view is view:
            return found
        with turn:
            found = self.program(view, batch.support_x, spec)
            program, query_from = found.program, spec.query_from
            rates = view.parameterisation.task_rates(self.rates.rates)
            memory = "constant" if any(op.name == "module" for op in program.ops) else spec.memory  # nobody but torch knows a module's activations
            a = Arrangement(spec.steps, spec.loss, rates, spec.first_order, spec.entry, query_from, memory, spec.record, spec.support_rows, spec.optimizer, spec.meta_gradient)
            _check_steps(program, view, spec)
            plan = build_plan(_adapted_as_given(program) if spec.entry == "predict" else program, a)
            _check_plan(plan, program)
            executor = choose(spec.backend, plan, view.like.dtype, view.like.device, spec.precision)
            runner = Runner(view, found, self.rates.rates, executor)
            self._runners[key] = runner
            while len(self._runners) > PLANS:
                del self._runners[next(iter(self._runners))]
            return runner

    def program(self, view: ModelView, sample: Tensor, spec: Spec) -> Rewritten:
        """The model as a Program, rewritten by its parameterisation; one opaque op where it cannot be traced."""
        key = (view, sample.shape[1:], spec.batchnorm, spec.backend)
        if key not in self._programs:
            self._programs[key] = rewritten(view.parameterisation, self._trace(view, sample, spec), view.kinds)
        return self._programs[key]

    def _trace(self, view: ModelView, sample: Tensor, spec: Spec) -> Program:
        if spec.backend == "autograd":
            return opaque_program(view.model, sample, spec.batchnorm)
        try:
            return trace(view.model, tuple(sample.shape[1:]), batchnorm=spec.batchnorm)
        except TraceError as error:
            if spec.backend != "auto":
                raise
            program = opaque_program(view.model, sample, spec.batchnorm)
            message = f"{error} It runs on the autograd executor: exact, but not fast."
            if message not in self._warned:
                self._warned.add(message)
                warn_user(message)
            return program


def _check_plan(plan: Plan, program: Program) -> None:
    """A parameter whose name the Plan uses for something else, or that it forgets, would be silently wrong."""
    written = {ref.buffer for _, instr in plan.instructions() for ref in instr.writes()} | {r.target for r in plan.reductions}
    for leaf in program.leaves:
        if leaf.name in written:
            raise ValueError(f"the parameter {leaf.name!r} of the model has a name that fastmaml uses in its Plans: rename it, or its module")
        if plan.reductions and leaf.role != "const" and leaf.learned and f"grad.{leaf.name}" not in plan.results:
            raise NotImplementedError(f"the Plan of this model has no gradient of {leaf.name!r}: use backend='autograd', and please report the model")


def _check_steps(program: Program, view: ModelView, spec: Spec) -> None:
    for leaf in program.leaves:
        if leaf.per_step and leaf.role == "adapted":
            raise ValueError(f"{leaf.name!r} has a value per inner step and cannot be adapted: leave it out of what the parameterisation adapts")
        if leaf.per_step and spec.entry != "predict":
            rows = len(view.parameters[leaf.name] if leaf.name in view.parameters else view.model.get_buffer(leaf.name))
            if rows < spec.steps:
                raise ValueError(f"{leaf.name!r} has {rows} steps, inner_steps is {spec.steps}: give it one row per inner step")
            if spec.query_from == 0 and spec.steps:
                raise ValueError(f"step_loss_weights has a loss before the first inner step, where {leaf.name!r} has no row: give one weight per inner step")


def _adapted_as_given(program: Program) -> Program:
    """The adapted leaves hold one value per task, and nothing is trained."""
    leaves = (replace(leaf, role="const", home="task" if leaf.role == "adapted" else leaf.home, per_step=False) for leaf in program.leaves)
    return replace(program, leaves=tuple(leaves))


def warn_user(message: str) -> None:
    """A warning that points at the line that called into fastmaml, through however many frames of torch and fastmaml."""
    level, frame = 1, _getframe(0)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((PACKAGE, TORCH)):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def without_autocast(device: Device, run: Callable[..., Results], *args: Any) -> Results:
    if not torch.is_autocast_enabled(device.type):
        return run(*args)
    warn_user("autocast is ignored: fastmaml runs in its own precision (see precision=)")
    with torch.autocast(device.type, enabled=False):
        return run(*args)
