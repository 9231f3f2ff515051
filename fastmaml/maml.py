"""MAML: what users call. Puts model, options and tasks together, chooses the Plan and the executor, and hands out loss and gradients."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastmaml import options
from fastmaml.adapted import AdaptedModel
from fastmaml.autograd import MetaLoss, OuterLogits
from fastmaml.batch import TaskBatch
from fastmaml.executors import BACKENDS, choose
from fastmaml.executors.autograd import opaque_program
from fastmaml.executors.call import Call, Results
from fastmaml.output import MetaOutput, accuracy_of
from fastmaml.plan import Arrangement, build_plan
from fastmaml.program import CLASS_WEIGHT, Program
from fastmaml.rates import InnerRates
from fastmaml.trace import TraceError, trace

PLANS = 32  # kept per object; the least recently used goes first


class NonFiniteError(FloatingPointError):
    """Tasks whose loss or gradient is not finite; ``tasks`` holds their indices."""

    def __init__(self, tasks: list[int]) -> None:
        self.tasks = tasks
        shown = ", ".join(map(str, tasks[:8])) + (" ..." if len(tasks) > 8 else "")
        super().__init__(
            f"loss or gradient of {len(tasks)} task(s) is not finite: {shown}. Look at these tasks and at inner_lr, "
            "or pass on_nonfinite='skip' to leave such tasks out of the sums. No .grad was changed."
        )


class MAML(nn.Module):
    """Model-agnostic meta-learning (Finn et al. 2017) over ``model``, second order unless told otherwise.

    model               any nn.Module taking [n, ...] and returning [n, outputs]; its own parameters are trained
    inner_lr            a number | [steps] | {name pattern: number, [steps] or tensor of the parameter's shape}
    inner_steps         K, from 0 to hundreds: activation memory does not grow with it
    loss, reduction     "cross_entropy" | "mse" | nn.CrossEntropyLoss(...) | nn.MSELoss(...); "mean" | "sum" | divisor (cbfinn: the shots)
    first_order         drop the Hessian-vector products (FOMAML)
    adapt               name pattern(s) of the parameters that the inner loop changes; other trainable ones are outer-learned only
    learn_inner_lr      make the rates parameters (Meta-SGD, LSLR), in the shape in which inner_lr is given
    step_loss_weights   multi-step loss (MAML++): one weight per inner step, or one more in front for the loss before it
    batchnorm           "batch" (the default: statistics of each batch, query included) | "support" | "running"
    memory              "constant" | "fast" (keeps the activations of the inner steps)
    backend             "auto" | "cpu" | "torch" | "autograd"; asked for by name it runs there or raises
    on_nonfinite        "raise" | "skip" tasks whose loss or gradient is not finite

    Raises ValueError or TypeError naming the argument, its value and the way out.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        inner_lr: Any = 0.01,
        inner_steps: int = 1,
        loss: Any = "cross_entropy",
        reduction: str | float = "mean",
        first_order: bool = False,
        adapt: str | list[str] = "*",
        learn_inner_lr: bool = False,
        step_loss_weights: Any = None,
        batchnorm: str | None = None,
        parameterisation: str = "full",
        precision: str = "high",
        memory: str = "constant",
        backend: str = "auto",
        on_nonfinite: str = "raise",
    ) -> None:
        super().__init__()
        self.model = options.check_model(model)
        self.inner_steps = options.count("inner_steps", inner_steps, 0)
        self.loss, self.class_weight = options.parse_loss(loss, reduction)
        self.first_order = options.flag("first_order", first_order)
        self.adapt_patterns = adapt
        adapted = options.adapted_names(model, adapt)
        parameters = dict(model.named_parameters())
        learn = options.flag("learn_inner_lr", learn_inner_lr)
        self.rates = InnerRates(inner_lr, {n: parameters[n] for n in adapted}, learn, parameters[adapted[0]])
        self.rates.check_steps(self.inner_steps)
        self.step_loss_weights = step_loss_weights
        options.check_step_weights(step_loss_weights, self.inner_steps)
        self.batchnorm = None if batchnorm is None else options.one_of("batchnorm", batchnorm, options.BATCHNORM)
        self.parameterisation = options.one_of("parameterisation", parameterisation, options.PARAMETERISATIONS)
        self.precision = options.one_of("precision", precision, options.PRECISIONS)
        self.memory = options.one_of("memory", memory, options.MEMORY)
        self.backend = options.one_of("backend", backend, BACKENDS)
        self.on_nonfinite = options.one_of("on_nonfinite", on_nonfinite, options.NONFINITE)
        self.executor: str | None = None  # what ran last
        self._forget()

    def _forget(self) -> None:
        self._programs: dict[Any, Program] = {}
        self._runners: OrderedDict[Any, Any] = OrderedDict()
        self._watch: list[tuple[dict, str, Any]] = []
        self._shapes: list[tuple[nn.Module, bool, int, int]] = []
        self._flags: list[tuple[Tensor, bool, torch.dtype]] = []
        self._version = 0
        self._override: dict[str, Tensor] | None = None  # fastmaml.functional: tensors in the parameters' place

    # ------------------------------------------------------------------------------------------------- parameters, state
    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The model's own parameters under their own names, then the learned rates."""
        yield from self.model.named_parameters(*args, **kwargs)
        yield from ((n, v) for n, v in self.rates.values.items() if isinstance(v, nn.Parameter))

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        yield from (p for _, p in self.named_parameters(recurse=recurse))

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The model's state_dict, plus the learned rates."""
        state = self.model.state_dict(*args, **kwargs)
        for name, value in self.rates.values.items():
            if isinstance(value, nn.Parameter):
                state[name] = value if kwargs.get("keep_vars") else value.detach()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        learned = {n: v for n, v in self.rates.values.items() if isinstance(v, nn.Parameter)}
        missing = [n for n in learned if n not in state]
        if strict and missing:
            raise RuntimeError(f"the state has no {missing[0]!r}: it was saved without learn_inner_lr=True")
        for name in learned:
            if name in state and state[name].shape != learned[name].shape:
                raise RuntimeError(f"{name!r} has shape {list(state[name].shape)} in the state, {list(learned[name].shape)} here")
        result = self.model.load_state_dict({n: v for n, v in state.items() if n not in learned}, strict, assign)
        with torch.no_grad():
            for name, value in learned.items():
                if name in state:
                    value.copy_(state[name])
        return result

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MAML:
        """.to(), .double(): the rates move along."""
        super()._apply(fn, recurse)
        with torch.no_grad():
            for name, value in self.rates.values.items():
                moved = fn(value.detach())
                self.rates.values[name] = nn.Parameter(moved) if isinstance(value, nn.Parameter) else moved
        if self.class_weight is not None:
            self.class_weight = fn(self.class_weight)
        self._forget()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Plans, native handles and workspaces are made anew after a copy or a load."""
        made = ("_programs", "_runners", "_watch", "_shapes", "_flags", "_names")
        return {name: value for name, value in self.__dict__.items() if name not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    # ------------------------------------------------------------------------------------------------- the model as a Program
    def _model_version(self) -> int:
        """A number that changes when the model's structure, its training flags or which parameters it has does."""
        for table, key, value in self._watch:
            if table.get(key) is not value:
                return self._rewatch()
        for module, training, children, parameters in self._shapes:
            if module.training is not training or len(module._modules) != children or len(module._parameters) != parameters:
                return self._rewatch()
        for parameter, requires_grad, dtype in self._flags:
            if parameter.requires_grad is not requires_grad or parameter.dtype is not dtype:
                return self._rewatch()
        return self._version if self._watch else self._rewatch()

    def _rewatch(self) -> int:
        modules = list(self.model.modules())
        self._watch = [(m._modules, k, v) for m in modules for k, v in m._modules.items()]
        self._watch += [(m._parameters, k, v) for m in modules for k, v in m._parameters.items()]
        self._shapes = [(m, m.training, len(m._modules), len(m._parameters)) for m in modules]
        self._flags = [(p, p.requires_grad, p.dtype) for p in self.model.parameters()]
        self._names = dict(self.model.named_parameters())
        options.check_model(self.model)
        self._adapted = frozenset(options.adapted_names(self.model, self.adapt_patterns))
        if self._adapted != set(self.rates.rates):
            raise ValueError("the set of adapted parameters changed since MAML was built (requires_grad or names): build a new MAML")
        self._version += 1
        self._programs.clear()
        return self._version

    def program(self, sample: Tensor, batchnorm: str | None = None) -> Program:
        """The model as a Program, for samples like the rows of ``sample``; one opaque op where it cannot be traced."""
        key = (self._model_version(), tuple(sample.shape[1:]), batchnorm)
        if key not in self._programs:
            self._programs[key] = self._trace(sample, batchnorm).with_roles(self._role)
        return self._programs[key]

    def _role(self, name: str) -> str:
        parameter = self._names.get(name)
        if name in self._adapted:
            return "adapted"
        return "outer" if parameter is not None and parameter.requires_grad else "const"

    def _trace(self, sample: Tensor, batchnorm: str | None) -> Program:
        if self.backend != "autograd":
            try:
                return trace(self.model, tuple(sample.shape[1:]), batchnorm=batchnorm)
            except TraceError as error:
                if self.backend != "auto":
                    raise
                warnings.warn(f"{error} Running it on the autograd executor: exact, but not fast.", stacklevel=5)
        if batchnorm in ("support", "running"):
            raise ValueError(f"batchnorm={batchnorm!r} needs a traced model: on the autograd executor the module decides itself (train or eval mode)")
        parameter = next(iter(self._names.values()))
        return opaque_program(self.model, sample[:2].to(parameter.dtype))

    # ------------------------------------------------------------------------------------------------- Plans and executors
    def _runner(self, batch: TaskBatch, entry: str, steps: int, query_from: int | None, batchnorm: str | None, record: bool = False):
        key = (self._model_version(), batch.support_x.shape[1:], entry, steps, query_from, batchnorm, record, self.backend)
        found = self._runners.get(key)
        if found is None:
            found = self._runners[key] = self._build(batch, entry, steps, query_from, batchnorm, record)
            while len(self._runners) > PLANS:
                self._runners.popitem(last=False)
        else:
            self._runners.move_to_end(key)
        return found

    def _build(self, batch: TaskBatch, entry: str, steps: int, query_from: int | None, batchnorm: str | None, record: bool):
        program = self.program(batch.support_x, batchnorm)
        arrangement = Arrangement(steps, self.loss, self.rates.rates, self.first_order, entry, query_from, self.memory, record)
        plan = build_plan(program, arrangement)
        parameter = next(iter(self._names.values()))
        return choose(self.backend, plan, parameter.dtype, parameter.device), program

    def plan(self, tasks: Any, *, inner_steps: int | None = None, entry: str = "train"):
        """The Plan that a call with these tasks runs: ``print(maml.plan(tasks))``, ``maml.explain(tasks)``."""
        batch = TaskBatch.of(tasks)
        steps = self.inner_steps if inner_steps is None else options.count("inner_steps", inner_steps, 0)
        weights = options.check_step_weights(self.step_loss_weights, steps)
        return self._runner(batch, entry, steps, weights and weights[1], self.batchnorm)[0].plan

    def explain(self, tasks: Any, *, inner_steps: int | None = None, entry: str = "train") -> str:
        """The Plan in words: segments and groups, FLOPs, bytes and homes, memory, and the floor time of this machine."""
        from fastmaml.plan.explain import explain

        batch = TaskBatch.of(tasks)
        return explain(self.plan(batch, inner_steps=inner_steps, entry=entry), batch)

    # ------------------------------------------------------------------------------------------------- running
    def forward(
        self,
        tasks: Any,
        *,
        inner_steps: int | None = None,
        inner_lr: Any = None,
        batchnorm: str | None = None,
        task_weights: Any = None,
        outer_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> MetaOutput:
        """One meta-iteration on ``tasks`` (a TaskBatch, a 4-tuple, a list of tasks, a torchmeta batch). ``out.loss.backward()`` gives the meta-gradient.

        outer_loss: fn(logits, query_y) -> scalar, any torch function; logits [tasks, n_query, ...], or a tuple of one tensor per task where tasks differ.
        """
        grad = torch.is_grad_enabled()
        if torch.is_autocast_enabled() or torch.is_autocast_enabled("cpu"):
            warnings.warn("autocast is ignored: fastmaml runs in its own precision (see precision=)", stacklevel=3)
        if outer_loss is not None:
            return self._with_outer_loss(tasks, outer_loss, inner_steps, inner_lr, batchnorm, task_weights, grad)
        entry = "train" if grad else "evaluate"
        call, results, batch = self._run(tasks, entry, inner_steps, inner_lr, batchnorm, task_weights)
        out = self._output(call, results, batch)
        if grad:
            named = dict(self.named_parameters())
            gradients = [self._gradient(results, name, p) for name, p in named.items()]
            used = [(p, g) for p, g in zip(named.values(), gradients, strict=True) if g is not None and p.requires_grad]
            if used:
                parameters, gradients = zip(*used, strict=True)
                out.loss, out.joined_logits = MetaLoss.apply(out.loss, out.joined_logits, gradients, *parameters)
        return out

    def meta_grad(self, tasks: Any, **kwargs: Any) -> MetaOutput:
        """As ``maml(tasks)`` followed by ``out.loss.backward()``, without autograd's overhead: adds to ``.grad`` directly."""
        if "outer_loss" in kwargs:
            raise TypeError("meta_grad takes no outer_loss: use maml(tasks, outer_loss=...).loss.backward()")
        unknown = set(kwargs) - {"inner_steps", "inner_lr", "batchnorm", "task_weights"}
        if unknown:
            raise TypeError(f"meta_grad got {sorted(unknown)[0]!r}: it takes inner_steps, inner_lr, batchnorm, task_weights")
        call, results, batch = self._run(
            tasks, "train", kwargs.get("inner_steps"), kwargs.get("inner_lr"), kwargs.get("batchnorm"), kwargs.get("task_weights"), sinks=True
        )
        if not call.sinks:
            for name, p in self.named_parameters():
                g = self._gradient(results, name, p) if p.requires_grad else None
                if g is not None:
                    p.grad = g if p.grad is None else p.grad.add_(g)
        return self._output(call, results, batch)

    def _sinks(self, names: list[str]) -> dict[str, Tensor]:
        """``.grad`` of the parameters, to be added to natively, if each has one that is plain; else nothing (they are set afterwards)."""
        out = {}
        named = {**self._names, **self.rates.values}
        for name in names:
            p = named[name.removeprefix("grad.")]
            g = p.grad
            if g is None or g.dtype is not torch.float32 or not g.is_contiguous() or g.shape != p.shape:
                return {}
            out[name] = g
        return out

    @staticmethod
    def _gradient(results: Results, name: str, parameter: Tensor) -> Tensor | None:
        """None where torch would give none. Rates of steps that did not run get zeros."""
        g = results.values.get(f"grad.{name}")
        if g is not None and g.shape != parameter.shape:
            whole = torch.zeros_like(parameter)
            whole[: len(g)] = g
            return whole
        return g

    def _run(self, tasks, entry, inner_steps, inner_lr, batchnorm, task_weights, sinks: bool = False, **extra):
        batch = TaskBatch.of(tasks)
        steps = self.inner_steps if inner_steps is None else options.count("inner_steps", inner_steps, 0)
        if batchnorm is not None:
            options.one_of("batchnorm", batchnorm, options.BATCHNORM)
        weights = options.check_step_weights(self.step_loss_weights, steps) if entry in ("train", "evaluate") else None
        executor, program = self._runner(batch, entry, steps, weights and weights[1], batchnorm or self.batchnorm, extra.pop("record", False))
        parameter = next(iter(self._names.values()))
        options.check_batch(batch, self.loss, program.values[program.output].shape, parameter, entry in ("halves", "adapt"))
        call = Call(
            batch,
            self._leaves(program),
            self._rates(inner_lr, steps),
            self._numbers(weights, parameter),
            options.check_task_weights(task_weights, len(batch)),
            total=entry == "halves",
            strict=self.on_nonfinite == "raise",
            **extra,
        )
        if sinks and executor.name == "cpu" and steps == self.inner_steps:
            call.sinks = self._sinks([n for n in executor.plan.results if n.startswith("grad.")])
        results = executor.forward(call)
        self.executor = results.executor
        self._check_finite(results)
        return call, results, batch

    def _leaves(self, program: Program) -> dict[str, Tensor]:
        leaves = {}
        given = self._override or self._names
        for leaf in program.leaves:
            parameter = given.get(leaf.name)
            leaves[leaf.name] = self.model.get_buffer(leaf.name) if parameter is None else parameter
        return leaves

    def _rates(self, inner_lr: Any, steps: int) -> dict[str, Tensor]:
        if inner_lr is None:
            self.rates.check_steps(steps)
            return self.rates.tensors(steps)
        if any(rate.learned for rate in self.rates.rates.values()):
            raise ValueError("inner_lr cannot be given per call with learn_inner_lr=True: change maml.rates.values instead")
        given = InnerRates(inner_lr, {n: self._names[n] for n in self.rates.rates}, False, next(iter(self._names.values())))
        if given.rates != self.rates.rates:
            raise ValueError("inner_lr of a call must have the form of the constructor's (scalar, per step, per name or per element)")
        given.check_steps(steps)
        return given.tensors(steps)

    def _numbers(self, weights: tuple[list[float], int] | None, like: Tensor) -> dict[str, Tensor]:
        out = {}
        if weights is not None:
            out["step_weights"] = torch.tensor(weights[0], dtype=like.dtype, device=like.device)
        if self.class_weight is not None:
            out[CLASS_WEIGHT] = self.class_weight.to(like)
        return out

    def _check_finite(self, results: Results) -> None:
        if not bool(results.finite.all()):
            bad = (~results.finite).nonzero().flatten().tolist()
            if self.on_nonfinite == "raise":
                raise NonFiniteError(bad)
            warnings.warn(f"{len(bad)} task(s) with a loss or gradient that is not finite were left out: {bad[:8]}", stacklevel=4)

    def _output(self, call: Call, results: Results, batch: TaskBatch) -> MetaOutput:
        values = results.values
        losses = values.get("loss.query")
        if losses is not None and losses.dim() == 2:
            losses = losses @ call.weights["step_weights"][-losses.shape[1] :]
        loss = None
        if losses is not None:
            kept = losses if self.on_nonfinite == "raise" else torch.where(results.finite.to(losses.device), losses, 0.0)
            loss = kept.mean() if call.task_weights is None else (kept * call.task_weights.to(kept)).sum()
        support = values.get("loss.support")
        if support is None:
            support = values["logits"].new_zeros(len(batch), 0)
        precision = "highest" if values["logits"].dtype == torch.float32 else "float64"
        return MetaOutput(loss, values["logits"], losses, support, results.finite, results.executor, precision, batch, values.get("correct"))

    def _with_outer_loss(self, tasks, outer_loss, inner_steps, inner_lr, batchnorm, task_weights, grad: bool) -> MetaOutput:
        if not callable(outer_loss):
            raise TypeError(f"outer_loss={outer_loss!r}: expected a function of (logits, query_y)")
        if task_weights is not None:
            raise ValueError("task_weights and outer_loss together: weigh the tasks inside outer_loss")
        if self.step_loss_weights is not None:
            raise ValueError("step_loss_weights and outer_loss together: the multi-step loss needs one of the built-in losses")
        entry = "halves" if grad else "evaluate"
        call, results, batch = self._run(tasks, entry, inner_steps, inner_lr, batchnorm, None)
        out = self._output(call, results, batch)
        if grad:
            named = {n: p for n, p in self.named_parameters() if p.requires_grad}
            executor = self._runner(batch, entry, self.inner_steps if inner_steps is None else inner_steps, None, batchnorm or self.batchnorm)[0]

            def reverse(dlogits: Tensor) -> list[Tensor | None]:
                gradients = executor.reverse(results.state, list(dlogits.split(list(batch.query_sizes))))
                self._check_finite(gradients)
                return [self._gradient(gradients, name, p) for name, p in named.items()]

            out.joined_logits = OuterLogits.apply(out.joined_logits, reverse, *named.values())
        query_y = batch.query_y.unflatten(0, (len(batch), batch.query_sizes[0])) if batch.uniform else batch.query_y.split(list(batch.query_sizes))
        loss = outer_loss(out.logits, query_y)
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            got = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise ValueError(f"outer_loss returned {got}: expected a scalar tensor")
        out.loss, out.joined_logits, out.task_losses = loss, out.joined_logits.detach(), None
        if self.loss.name == "cross_entropy" and out.correct is None and not batch.query_y.is_floating_point() and batch.query_y.dim() == 1:
            out.correct = accuracy_of(out.joined_logits, batch)
        return out

    # ------------------------------------------------------------------------------------------------- adapting
    def adapt(self, support_x: Any, support_y: Any = None, *, inner_steps=None, inner_lr=None, batchnorm=None, ways=None) -> AdaptedModel:
        """The networks after the inner loop, without gradients. support_x [tasks, n, ...], support_y [tasks, n], or a TaskBatch (its support rows).

        ``adapted(x)`` gives logits [tasks, n, ...], ``adapted.module(t)`` a plain nn.Module for task t.
        """
        if isinstance(support_x, TaskBatch):
            batch = support_x
        elif support_y is None:
            raise TypeError("adapt needs support_y: maml.adapt(support_x [tasks, n, ...], support_y [tasks, n])")
        else:
            batch = TaskBatch.from_tensors(support_x, support_y, support_x, support_y, ways)
        mode = batchnorm or self.batchnorm
        _, results, batch = self._run(batch, "adapt", inner_steps, inner_lr, batchnorm, None)
        weights = {name: results.values[f"adapted.{name}"] for name in self.rates.rates if f"adapted.{name}" in results.values}
        program = self.program(batch.support_x, mode)
        others = {n: v.detach().clone() for n, v in self._leaves(program).items() if n not in weights}
        return AdaptedModel(self.model, program, weights, others, batch, self.backend, results.values.get("loss.support"))

    def verify(self, tasks: Any, **kwargs: Any):
        """Agreement with float64 autograd on the user's own model, mask flips, both times. See ``fastmaml.diagnostics.verify``."""
        from fastmaml.diagnostics import verify

        return verify(self, tasks, **kwargs)
