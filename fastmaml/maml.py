"""MAML: what users call. Checks what it is given, has the engine run it, and hands out loss and gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmaml import options
from fastmaml import parameterisation as families
from fastmaml.adapted import AdaptedModel
from fastmaml.autograd import MetaLoss, OuterLogits, applied
from fastmaml.batch import TaskBatch
from fastmaml.counts import check_count
from fastmaml.engine import TASK_RATE, Runner, Spec, support_bucket, warn_user, without_autocast
from fastmaml.executors import BACKENDS, NATIVE, Executor, explained
from fastmaml.executors.call import Call, Results
from fastmaml.executors.device import capturing
from fastmaml.optimizers import SGD, ImplicitGradient
from fastmaml.output import MetaOutput, NonFiniteError, correct_of, of_all_steps, per_task
from fastmaml.program import CLASS_WEIGHT
from fastmaml.prologue import Prologue
from fastmaml.rates import InnerRates
from fastmaml.state import Trained
from fastmaml.watch import ModelView


class Ran(NamedTuple):
    """A call that has run. ``parameters``: what the gradients belong to, by name."""

    spec: Spec
    runner: Runner
    call: Call
    results: Results
    parameters: Mapping[str, Tensor]
    prologue: Prologue | None


class MAML(Trained):
    """Model-agnostic meta-learning (Finn et al. 2017) over ``model``, second order unless told otherwise.

    model               any nn.Module taking [n, ...] and returning [n, outputs]; its own parameters are trained
    inner_lr            a number | [steps] | {name pattern: number, [steps] or tensor of the parameter's shape}; under a module's name one rate for all in it
    inner_steps         K, from 0 to hundreds: activation memory does not grow with it
    loss, reduction     "cross_entropy" | "mse" | nn.CrossEntropyLoss(...) | nn.MSELoss(...); "mean" | "sum" | divisor (cbfinn: the shots)
    first_order         drop the Hessian-vector products (FOMAML)
    meta_gradient       "unrolled" (through the inner steps) | "reptile" (theta - theta_K) | ``fastmaml.ImplicitGradient(lam=2.0, cg_steps=5)`` (iMAML)
    adapt               name pattern(s), or module(s), of the parameters that the inner loop changes; other trainable ones are outer-learned only
    learn_inner_lr      make the rates parameters (Meta-SGD, LSLR), in the shape in which inner_lr is given
    inner_optimizer     what turns gradients into steps, besides inner_lr: ``fastmaml.SGD(momentum=0.9, weight_decay=1e-4, max_norm=10.0)``; plain by default
    step_loss_weights   multi-step loss (MAML++): one weight per inner step, or one more in front for the loss before it
    batchnorm           "batch" (the default: statistics of each batch, query included) | "support" | "running" | "joint" (of support and query rows together,
                        for a body that is not adapted: learn2learn's ANIL; ``adapt`` has no query, and takes the support rows')
    parameterisation    "full" | "anil" | "boil" | "head_only" | an object of ``fastmaml.parameterisation`` (see ``fastmaml.methods``) | a list of these
    precision           "high" (on `triton`: HVP passes in TF32, with stored masks) | "highest" (float32 throughout) | "medium" (HVP passes in bfloat16, other
                        products in three of bfloat16); the other executors have one, float32
    memory              "constant" (of one inner step alone up to 8 MB of activations per task in flight are kept) | "fast" (keeps those of all steps)
    backend             "auto" | "cpu" | "cuda" | "triton" | "torch" | "autograd"; asked for by name it runs there or raises
    on_nonfinite        "raise" | "skip" tasks whose loss or gradient is not finite

    Raises ValueError or TypeError naming the argument, its value and the way out.
    """

    mixes = False  # whether a task has a row for each of several initialisations

    def __init__(
        self,
        model: nn.Module,
        *,
        inner_lr: Any = 0.01,
        inner_steps: int = 1,
        loss: Any = "cross_entropy",
        reduction: str | float = "mean",
        first_order: bool = False,
        meta_gradient: str | ImplicitGradient = "unrolled",
        adapt: Any = "*",
        learn_inner_lr: bool = False,
        inner_optimizer: SGD | None = None,
        step_loss_weights: Any = None,
        batchnorm: str | None = None,
        parameterisation: str | families.Parameterisation = "full",
        precision: str = "high",
        memory: str = "constant",
        backend: str = "auto",
        on_nonfinite: str = "raise",
    ) -> None:
        super().__init__()
        self.model = options.check_model(model)
        self.inner_steps = check_count("inner_steps", inner_steps, 0)
        self.loss, self.class_weight = options.parse_loss(loss, reduction)
        self.first_order = options.flag("first_order", first_order)
        self.adapt_patterns = adapt = options.named(model, adapt, "adapt")
        self.parameterisation = families.made(parameterisation)
        if self.parameterisation.name == "mixture" and not self.mixes:
            raise ValueError(f"parameterisation={self.parameterisation.signature}: what a mixture makes of each task is fastmaml.methods.Mixture(model, components=...)")
        self.parameterisation.start(model, adapt)
        view = ModelView(model, adapt, self.parameterisation)
        self.rates = InnerRates(inner_lr, {name: view.parameters[name] for name in view.adapted}, options.flag("learn_inner_lr", learn_inner_lr))
        self.rates.check_steps(self.inner_steps)
        self.inner_optimizer = options.check_optimizer(inner_optimizer)
        self.step_loss_weights = step_loss_weights
        options.check_step_weights(step_loss_weights, self.inner_steps)
        self.batchnorm = None if batchnorm is None else options.one_of("batchnorm", batchnorm, options.BATCHNORM)
        self.precision = options.one_of("precision", precision, options.PRECISIONS)
        self.memory = options.one_of("memory", memory, options.MEMORY)
        self.backend = options.one_of("backend", backend, BACKENDS)
        self.on_nonfinite = options.one_of("on_nonfinite", on_nonfinite, options.NONFINITE)
        self.meta_gradient = meta_gradient
        options.check_meta_gradient(self)
        self._start()
        self.parameterisation.belongs = True

    @property
    def executor(self) -> str | None:
        """Name of the executor that ran last; "triton + cuda" where the second ran the inner loop and the first what is around it."""
        return self._engine.ran

    # ------------------------------------------------------------------------------------------------- calls
    def forward(
        self,
        tasks: Any,
        *,
        inner_steps: int | None = None,
        inner_lr: Any = None,
        batchnorm: str | None = None,
        task_weights: Any = None,
        task_seeds: Any = None,
        outer_loss: Callable[[Any, Any], Tensor] | None = None,
    ) -> MetaOutput:
        """One meta-iteration on ``tasks`` (a TaskBatch, a 4-tuple, a list of tasks, a torchmeta batch). ``out.loss.backward()`` gives the meta-gradient.

        outer_loss: fn(logits, query_y) -> scalar, any torch function; logits and query_y [tasks, n_query, ...], or tuples of one tensor per task where
        tasks differ in size.
        task_seeds: [tasks] whole numbers, for parameterisations that draw noise for each task (MT-net's masks); else they come from torch's generator.
        """
        settings = {"inner_steps": inner_steps, "inner_lr": inner_lr, "batchnorm": batchnorm, "task_weights": task_weights, "task_seeds": task_seeds}
        return self._call(tasks, settings, outer_loss, None)

    def meta_grad(
        self,
        tasks: Any,
        *,
        inner_steps: int | None = None,
        inner_lr: Any = None,
        batchnorm: str | None = None,
        task_weights: Any = None,
        task_seeds: Any = None,
        outer_loss: Callable[[Any, Any], Tensor] | None = None,
    ) -> MetaOutput:
        """As ``maml(tasks)`` and ``out.loss.backward()``, without autograd's overhead: adds to ``.grad`` directly, so that hooks on parameters do not run."""
        settings = {"inner_steps": inner_steps, "inner_lr": inner_lr, "batchnorm": batchnorm, "task_weights": task_weights, "task_seeds": task_seeds}
        if outer_loss is not None:
            with torch.enable_grad():
                out = self._call(tasks, settings, outer_loss, None)
                out.loss.backward()
            return out
        ran = self._run(tasks, "train", sinks=True, **settings)
        if not ran.call.sinks:
            for p, g in self._gradients(ran, ran.results, self._trained(ran)):
                if g is not None:
                    p.grad = g if p.grad is None else p.grad.add_(g)
        return self._output(ran)

    def adapt(
        self,
        support_x: Any,
        support_y: Any = None,
        *,
        inner_steps: int | None = None,
        inner_lr: Any = None,
        batchnorm: str | None = None,
        ways: Any = None,
        task_seeds: Any = None,
    ) -> AdaptedModel:
        """The networks after the inner loop, without gradients. support_x [tasks, n, ...], support_y [tasks, n]; lists of one tensor per task where
        tasks differ in size; or a TaskBatch (its support rows).

        ``adapted(x)`` gives logits [tasks, n, ...], ``adapted.module(t)`` a plain nn.Module for task t.
        """
        batch = options.support_batch(support_x, support_y, ways)
        return self._adapt(batch, {"inner_steps": inner_steps, "inner_lr": inner_lr, "batchnorm": batchnorm, "task_seeds": task_seeds}, None)

    def verify(self, tasks: Any, **kwargs: Any) -> Any:
        """Agreement with float64 autograd on the user's own model, mask flips, both times. See ``fastmaml.diagnostics.verify``."""
        from fastmaml.diagnostics import verify

        return verify(self, tasks, **kwargs)

    def plan(self, tasks: Any, *, inner_steps: int | None = None, batchnorm: str | None = None, entry: str = "train") -> Any:
        """The Plan that a call with these tasks runs."""
        return self._executor(self._batch(tasks), inner_steps, batchnorm, entry).plan

    def memory_bytes(self, tasks: Any, *, inner_steps: int | None = None, batchnorm: str | None = None, entry: str = "train") -> dict[str, int]:
        """Bytes by purpose that a call with these tasks lays out, beside the caller's tensors and the results: known before it runs."""
        batch = self._batch(tasks)
        return self._executor(batch, inner_steps, batchnorm, entry).memory(batch)

    def explain(self, tasks: Any, *, inner_steps: int | None = None, batchnorm: str | None = None, entry: str = "train") -> str:
        """Which executor runs which segments and why, and the Plan in words: segments and groups, FLOPs, bytes and homes, memory, the floor time of this machine."""
        from fastmaml import machine
        from fastmaml.plan.explain import explain

        batch = self._batch(tasks)
        executor = self._executor(batch, inner_steps, batchnorm, entry)
        in_flight = torch.get_num_threads() if executor.name == "cpu" else len(batch)
        laid_out = None if executor.name in ("torch", "autograd") else executor.memory(batch)  # before it says how it runs: this decides it
        like = self._engine.view().like
        head = f"parameterisation {self.parameterisation.signature}: {self._describe()}\n{explained(executor, self.backend, like.dtype, like.device)}\n"
        return head + explain(executor.plan, batch, **machine.peaks(), in_flight=in_flight, laid_out=laid_out)

    def _describe(self) -> str:
        """What is adapted, what is outer-learned only, what is constant."""
        kinds = self._engine.view().kinds
        found = {role: [name for name, kind in kinds.items() if kind.role == role] for role in ("adapted", "outer", "const")}
        words = {"adapted": "adapted", "outer": "outer-learned only", "const": "constant"}
        return "; ".join(f"{words[role]}: {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}" for role, names in found.items() if names)

    def _batch(self, tasks: Any) -> TaskBatch:
        """Reptile wants no query rows: of (support_x, support_y) the support rows stand in for them, to report a loss."""
        if self.meta_gradient == "reptile" and isinstance(tasks, (tuple, list)) and len(tasks) == 2 and all(isinstance(v, Tensor) for v in tasks):
            return options.support_batch(*tasks, None)
        return TaskBatch.of(tasks)

    def runner(self, batch: TaskBatch, inner_steps: Any = None, batchnorm: Any = None, entry: str = "train") -> Runner:
        """What a call with these tasks runs on."""
        chosen = self._chosen(entry, inner_steps, batchnorm)[0]
        return self._engine.runner(self._engine.view(), batch, Spec(*chosen, support_bucket(batch.support_sizes)))

    def _executor(self, batch: TaskBatch, inner_steps: Any, batchnorm: Any, entry: str) -> Executor:
        return self.runner(batch, inner_steps, batchnorm, entry).executor

    # ------------------------------------------------------------------------------------------------- running
    def _chosen(self, entry: str, inner_steps: Any, batchnorm: Any, record: bool = False) -> tuple[tuple, list[float] | None]:
        """What a Spec is made of besides tasks, and the weights of the multi-step loss at theta_0 .. theta_K."""
        steps = self.inner_steps if inner_steps is None else check_count("inner_steps", inner_steps, 0)
        batchnorm = self.batchnorm if batchnorm is None else options.one_of("batchnorm", batchnorm, options.BATCHNORM)
        weights, query_from = None, None
        if self.step_loss_weights is not None and entry in ("train", "evaluate"):
            weights, query_from = options.check_step_weights(self.step_loss_weights, steps)
        optimizer = options.check_optimizer(self.inner_optimizer)
        options.check_meta_gradient(self)
        like = (entry, steps, self.loss, batchnorm, query_from, self.first_order, self.memory, self.backend, record)
        return (*like, optimizer, self.meta_gradient, self.precision), weights

    def _run(
        self,
        tasks: Any,
        entry: str,
        *,
        inner_steps: Any = None,
        inner_lr: Any = None,
        batchnorm: Any = None,
        task_weights: Any = None,
        task_seeds: Any = None,
        given: Mapping[str, Tensor] | None = None,
        sinks: bool = False,
        record: bool = False,
        replay: Mapping | None = None,
    ) -> Ran:
        """``given``: tensors in the parameters' place. ``sinks``: add to ``.grad`` where the executor can. ``record``, ``replay``: see Call."""
        batch, view = self._batch(tasks), self._engine.view()
        chosen, step_weights = self._chosen(entry, inner_steps, batchnorm, record)
        weights = None if task_weights is None else options.check_task_weights(task_weights, len(batch))
        _, spec, runner = self._engine.bound(view, batch, chosen)
        if spec.loss.name != "mse" and not capturing(view.like.device):  # while a graph is captured nothing can be read; the call before it has
            options.check_labels(batch, runner.output[0], entry in ("halves", "adapt"))
        rates = self.rates.at(spec.steps, inner_lr, view)
        plain = step_weights is None and self.class_weight is None and not spec.optimizer.dampens
        numbers = {} if plain else self._numbers(step_weights, spec, runner)
        strict = self.on_nonfinite == "raise"
        leaves, prologue = runner.leaf_values(given), None
        if runner.own:
            seeds = options.task_seeds(task_seeds, len(batch))
            prologue = Prologue(runner, batch, leaves, rates, seeds, entry in ("train", "halves"))
            leaves = {**leaves, **prologue.leaves}
        call = Call(batch, leaves, rates, numbers, weights, entry == "halves", replay or {}, record, strict)
        if sinks and prologue is None:
            call.sinks = self._sinks(runner)
        results = without_autocast(view.like.device, runner.executor.forward, call)
        self._engine.ran = results.executor
        self._check_finite(results)
        return Ran(spec, runner, call, results, view.parameters if given is None else given, prologue)

    def _numbers(self, step_weights: list[float] | None, spec: Spec, runner: Runner) -> dict[str, Tensor]:
        like, numbers = runner.view.like, spec.optimizer.numbers(spec.steps)
        if step_weights is not None:
            numbers = {**numbers, "step_weights": step_weights}
        out = {name: runner.number(name, values) for name, values in numbers.items()}
        if self.class_weight is not None:
            options.check_class_weight(self.class_weight, runner.output)
            with torch.inference_mode(False):
                self.class_weight = self.class_weight.to(like.device)  # moved once
            out[CLASS_WEIGHT] = self.class_weight.to(like.dtype)
        return out

    def _sinks(self, runner: Runner) -> dict[str, Tensor]:
        """``.grad`` of the parameters, to be added to natively, if each has one that is plain; else nothing (they are set afterwards)."""
        if runner.executor.name not in NATIVE or self.rates.steps not in (None, runner.plan.steps):
            return {}
        out, leaves = {}, runner.leaves
        for key, name in runner.gradients:
            g = (leaves[name] if name in leaves else self.rates.values[name]).grad
            if g is None or g.dtype is not torch.float32 or not g.is_contiguous():
                return {}
            out[key] = g
        return out

    def _trained(self, ran: Ran) -> list[tuple[str, Tensor]]:
        """(name of its gradient, parameter or rate) of what is trained."""
        given, runner = ran.parameters, ran.runner
        own = given is runner.view.parameters
        named = runner.trained if own else [(key, given[name]) for key, name in runner.gradients if name in given]
        if runner.of_rates:
            named = [*named, *((key, self.rates.values[name]) for key, name in runner.of_rates)]
        if ran.prologue is not None:  # it may reach any of them
            known = {name for _, name in runner.gradients}
            named = [*named, *((f"grad.{name}", p) for name, p in {**given, **dict(self.rates.learned())}.items() if name not in known)]
            named += [("", source) for source in self.parameterisation.sources()]
        return [(key, p) for key, p in named if p.requires_grad]

    @staticmethod
    def _output(ran: Ran) -> MetaOutput:
        out = MetaOutput(ran.call, ran.results)
        if ran.prologue is not None and ran.prologue.penalty is not None and out.loss is not None:
            out.penalty = ran.prologue.penalty.detach()
            out.loss = out.loss + ran.prologue.added(ran.results, ran.call).detach()
        return out

    def _gradients(self, ran: Ran, results: Results, trained: list[tuple[str, Tensor]], penalty: bool = True) -> list[tuple[Tensor, Tensor | None]]:
        """(parameter or rate, its gradient) of what is trained; None where torch would give none."""
        values = results.values
        found = [(p, values.get(key)) for key, p in trained]
        if self.rates.steps is not None:
            found = [(p, of_all_steps(g, p)) for p, g in found]
        if ran.prologue is None:
            return found
        more = ran.prologue.pull_back(results, ran.call, [p for _, p in trained], penalty)
        return [(p, h if g is None else g if h is None else g + h) for (p, g), h in zip(found, more, strict=True)]

    def _check_finite(self, results: Results) -> None:
        if not results.all_finite:
            bad = (~results.finite).nonzero().flatten().tolist()
            if self.on_nonfinite == "raise":
                raise NonFiniteError(bad)
            warn_user(f"{len(bad)} task(s) with a loss or gradient that is not finite were left out: {bad[:8]}")

    # ------------------------------------------------------------------------------------------------- what carries gradient
    def _call(self, tasks: Any, settings: dict[str, Any], outer_loss: Any, given: Mapping[str, Tensor] | None) -> MetaOutput:
        grad = torch.is_grad_enabled()
        if outer_loss is not None:
            return self._call_outer(tasks, settings, outer_loss, given, grad)
        ran = self._run(tasks, "train" if grad else "evaluate", given=given, **settings)
        out = self._output(ran)
        pairs = [(p, g) for p, g in self._gradients(ran, ran.results, self._trained(ran)) if g is not None] if grad else []
        if pairs:
            parameters, gradients = zip(*pairs, strict=True)
            out.loss, out.parameters = applied(MetaLoss, (out.loss,), gradients, *parameters), parameters
            for key, _ in ran.runner.gradients:  # held by the loss alone, so that torch makes them .grad without a copy
                ran.results.values.pop(key, None)
        return out

    def _call_outer(self, tasks: Any, settings: dict[str, Any], outer_loss: Any, given: Mapping[str, Tensor] | None, grad: bool) -> MetaOutput:
        options.check_outer_loss(outer_loss, settings["task_weights"], self.step_loss_weights, self.meta_gradient)
        ran = self._run(tasks, "halves" if grad else "evaluate", given=given, **settings)
        ran.results.values.pop("loss.query", None)  # of the built-in loss, which is not asked for
        batch, out = ran.call.batch, MetaOutput(ran.call, ran.results)
        trained = self._trained(ran) if grad else []
        parameters = [p for _, p in trained]
        used = {**ran.call.leaves, **ran.call.rates, "support_x": batch.support_x, "support_y": batch.support_y, "query_x": batch.query_x}
        versions = {name: v._version for name, v in used.items() if not v.is_inference()}

        def reverse(dlogits: Tensor) -> list[Tensor | None]:
            changed = [name for name, version in versions.items() if used[name]._version != version]
            if changed:
                raise RuntimeError(f"{changed[0]} was changed in place between forward and backward: call backward first, or pass a copy to maml(...)")
            results = without_autocast(dlogits.device, ran.runner.executor.reverse, ran.results.state, {"dlogits": dlogits})
            self._check_finite(results)
            return [g for _, g in self._gradients(ran, results, trained, penalty=False)]

        logits = applied(OuterLogits, (out.joined_logits,), reverse, *parameters) if parameters else out.joined_logits
        loss = outer_loss(per_task(logits, batch.query_sizes), per_task(batch.query_y, batch.query_sizes))
        options.check_scalar(loss)
        if ran.prologue is not None and ran.prologue.penalty is not None:  # autograd takes its gradient, as that of the user's loss
            out.penalty, loss = ran.prologue.penalty.detach(), loss + ran.prologue.added(ran.results, ran.call)
        out.loss = loss
        if self.loss.name == "cross_entropy" and out.correct is None and options.are_labels(batch.query_y):
            out.correct = correct_of(logits.detach(), batch)
        out.parameters = tuple(parameters)
        return out

    def _adapt(self, batch: TaskBatch, settings: dict[str, Any], given: Mapping[str, Tensor] | None) -> AdaptedModel:
        ran = self._run(batch, "adapt", given=given, **settings)
        view, values = ran.runner.view, ran.results.values
        spec = Spec("predict", 0, self.loss, ran.spec.batchnorm, backend=self.backend, precision=self.precision)
        predict = self._engine.runner(view, batch, spec)
        support_losses = values.get("loss.support")
        if support_losses is None:
            support_losses = torch.zeros(len(batch), 0).to(view.like)
        weights = {name: values[f"adapted.{name}"] for name in view.adapted if f"adapted.{name}" in values}
        others = {name: v.detach().clone() for name, v in ran.call.leaves.items() if name not in weights and not (name in ran.runner.own and name.startswith(TASK_RATE))}
        for leaf in (leaf for leaf in ran.runner.program.leaves if leaf.per_step):  # the network after the last step
            others[leaf.name] = others[leaf.name][max(ran.runner.plan.steps, 1) - 1]
        return AdaptedModel(predict, weights, others, batch, support_losses)
