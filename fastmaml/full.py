"""Methods that adapt the network's own parameters: how a step is taken, and what is made of the steps. ``fastmaml.methods`` has them by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from fastmaml import parameterisation as families
from fastmaml.batch import TaskBatch
from fastmaml.counts import check_count
from fastmaml.maml import MAML
from fastmaml.nn import StepBatchNorm, per_step_batchnorm, per_step_parameters
from fastmaml.optimizers import ImplicitGradient
from fastmaml.options import check_model, flag, named, task_seeds

WITH_STATISTICS = "build it with MAMLPlusPlus(model, per_step_statistics=True), or with fastmaml.nn.per_step_batchnorm(model, steps, statistics=True)"


def FirstOrderMAML(model: nn.Module, *, inner_lr: Any = 0.01, inner_steps: int = 1, **options: Any) -> MAML:
    """First-order MAML (Finn et al. 2017, section 5.2): the meta-gradient is that of the query loss at theta_K, as if no inner step depended on theta.

    Nothing is computed on the way back but what an inner optimizer's weight decay has of it. Raises what MAML raises.
    """
    _own("FirstOrderMAML", options, "first_order", "meta_gradient")
    return MAML(model, inner_lr=inner_lr, inner_steps=inner_steps, first_order=True, **options)


def Reptile(model: nn.Module, *, inner_lr: Any = 0.02, inner_steps: int = 5, **options: Any) -> MAML:
    """Reptile (Nichol et al. 2018): the "gradient" of a task is theta - theta_K, and its mean over the tasks goes to the outer optimizer.

        theta <- theta + epsilon mean(theta_K - theta):        torch.optim.SGD(maml.parameters(), lr=epsilon)

    The tasks may come without a query set, as (support_x [tasks, n, ...], support_y [tasks, n]); ``out.loss`` is then the support loss at theta_K, and with a
    query set the query loss, which is reported and nothing more. Defaults: the sinusoids of the paper (inner rate 0.02, 5 steps, epsilon 0.1). Every step sees
    the whole support set; the paper's minibatches within a task are not there (an executor reads the rows of a task once for a call, the same for all steps),
    nor its Adam: SGD has the momentum of ``inner_optimizer``.

    Raises ValueError for what has no meaning here (learned rates, losses of steps or of the user's own, parameters that are not adapted).
    """
    _own("Reptile", options, "first_order", "meta_gradient")
    return MAML(model, inner_lr=inner_lr, inner_steps=inner_steps, meta_gradient="reptile", **options)


def MetaSGD(model: nn.Module, *, inner_lr: float | None = None, inner_steps: int = 1, adapt: str | list[str] = "*", **options: Any) -> MAML:
    """Meta-SGD (Li et al. 2017): a learned rate for every element of every adapted parameter, theta' = theta - alpha * gradient, in one step.

    inner_lr   what all rates begin with; None: one number for all of them, drawn uniformly from [0.005, 0.1] (by torch's generator), as in the paper's
               experiments (section 4) and in ports of them (63days/Meta-SGD, meta.py)

    The rates are among ``maml.parameters()``, [shape of the parameter] each, named "inner_lr.<parameter>". Raises what MAML raises.
    """
    _own("MetaSGD", options, "learn_inner_lr")
    if inner_lr is None:
        inner_lr = float(torch.empty(()).uniform_(0.005, 0.1))
    elif isinstance(inner_lr, bool) or not isinstance(inner_lr, (int, float)):
        raise TypeError(f"inner_lr={inner_lr!r}: MetaSGD takes one number that all rates begin with, or None")
    adapt, parameterisation = named(check_model(model), adapt, "adapt"), families.made(options.pop("parameterisation", "full"))
    parameterisation.start(model, adapt)  # it says what is adapted
    leaves, kinds = parameterisation.looked_at(model, adapt)
    rates = {name: torch.full(leaves[name].shape, float(inner_lr)) for name, kind in kinds.items() if kind.role == "adapted"}
    return MAML(model, inner_lr=rates, learn_inner_lr=True, inner_steps=inner_steps, adapt=adapt, parameterisation=parameterisation, **options)


def iMAML(
    model: nn.Module,
    *,
    inner_lr: Any = 0.1,
    inner_steps: int = 16,
    lam: float = 2.0,
    cg_steps: int = 5,
    cg_damping: float = 1.0,
    lam_damping: float = 10.0,
    **options: Any,
) -> MAML:
    """Implicit MAML (Rajeswaran et al. 2019): every inner step takes the gradient of L_S + lam / 2 |theta - theta_0|^2, and the meta-gradient is that of
    the minimum, by ``cg_steps`` iterations of conjugate gradient: see ``fastmaml.ImplicitGradient``.

    Memory and the cost of the way back do not grow with inner_steps, nor does the meta-gradient depend on the path that the steps took. Defaults: the
    authors' command for Omniglot. Their code takes the proximal term in one step of its own after all others; here it is part of each, as in the paper.

    Raises ValueError for what has no meaning here (learned rates, losses of the steps, parameters that are not adapted).
    """
    _own("iMAML", options, "meta_gradient")
    implicit = ImplicitGradient(lam=lam, cg_steps=cg_steps, cg_damping=cg_damping, lam_damping=lam_damping)
    return MAML(model, inner_lr=inner_lr, inner_steps=inner_steps, meta_gradient=implicit, **options)


def MAMLPlusPlus(
    model: nn.Module,
    *,
    inner_lr: float = 0.1,
    inner_steps: int = 5,
    per_step_norms: bool = True,
    per_step_statistics: bool = False,
    learn_inner_lr: bool = True,
    adapt: str | list[str] | None = None,
    **options: Any,
) -> MAML:
    """MAML++ (Antoniou et al. 2019): a learned rate for each parameter tensor and step (LSLR), batch normalisation with an affine for each step, and, by
    ``MAMLPlusPlusSchedule``, the annealed multi-step loss and first order at the beginning.

        maml = fastmaml.methods.MAMLPlusPlus(model)
        schedule = fastmaml.methods.MAMLPlusPlusSchedule(maml)
        for epoch in range(epochs):
            schedule.begin(epoch)
            ...                                          # meta-iterations as ever

    per_step_norms        put a ``fastmaml.nn.StepBatchNorm`` in the place of each batch normalisation: ``model`` is changed
    per_step_statistics   with running statistics for each step, [steps, channels], which the authors' code records and never reads: normalisation is by the
                          batch, in training and evaluation. Here ``record_statistics(maml, tasks)`` records them, ``batchnorm="running"`` reads them
    adapt                 None: everything but the affines of normalisation layers, as the authors have it, or what a ``parameterisation`` says

    Defaults: the authors' configurations (their rate 0.1 is the one that the code reads). Raises what MAML raises, and ValueError for more inner_steps in a
    call than the rates and norms have.
    """
    steps = check_count("inner_steps", inner_steps, 1)
    if flag("per_step_statistics", per_step_statistics) and not per_step_norms:
        raise ValueError(f"per_step_statistics=True and per_step_norms=False: {WITH_STATISTICS}")
    if flag("per_step_norms", per_step_norms):
        per_step_batchnorm(check_model(model), steps, statistics=per_step_statistics)
    if adapt is None and not families.made(options.get("parameterisation", "full")).takes_adapt:
        adapt = "*"
    elif adapt is None:
        norms = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
        affine = {id(p) for m in model.modules() if isinstance(m, norms) for p in m.parameters()}
        adapt = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in affine]
    rates = {"*": [inner_lr] * steps}
    return MAML(model, inner_lr=rates, inner_steps=steps, learn_inner_lr=learn_inner_lr, adapt=adapt, **options)


@dataclass
class MAMLPlusPlusSchedule:
    """What changes in MAML++ from epoch to epoch: ``begin(epoch)`` sets it on ``maml``. Epochs count from 0; their length is the caller's (500 iterations).

    multi_step_epochs    the outer loss sums those after each step, with weights from 1 / K each to nearly all on the last; afterwards the last alone
    first_order_epochs   at the beginning the meta-gradient is of first order (the paper: 50; the authors' configurations: 0)

    The weights are numbers of a call: a run builds one Plan for the epochs with them and one for those without, and one of first order.
    """

    maml: MAML
    multi_step_epochs: int = 10
    first_order_epochs: int = 0

    def __post_init__(self) -> None:
        self.multi_step_epochs = check_count("multi_step_epochs", self.multi_step_epochs, 0)
        self.first_order_epochs = check_count("first_order_epochs", self.first_order_epochs, 0)

    def step_loss_weights(self, epoch: int) -> list[float] | None:
        """Of the losses after each of the K steps, in ``epoch``; None: the last alone."""
        steps = self.maml.inner_steps
        if check_count("epoch", epoch, 0) >= self.multi_step_epochs:
            return None
        least, decay = 0.03 / steps, epoch / (steps * self.multi_step_epochs)
        early = max(1 / steps - decay, least)
        return [early] * (steps - 1) + [min(1 / steps + (steps - 1) * decay, 1 - (steps - 1) * least)]

    def begin(self, epoch: int) -> None:
        self.maml.step_loss_weights = self.step_loss_weights(epoch)
        self.maml.first_order = epoch < self.first_order_epochs


@torch.no_grad()
def record_statistics(maml: MAML, tasks: Any) -> None:
    """Adds the batches of an inner loop over ``tasks`` to the running statistics of each ``fastmaml.nn.StepBatchNorm`` of ``maml.model``, as the authors of
    MAML++ do in training; nothing else changes.

    In their order: task by task, and in each step k by step: the support rows at theta_k go to row k, then the query rows at theta_k+1 to the same row, after
    every step with ``step_loss_weights``, else after the last. Each batch is one update by the norm's momentum (0.1), with the variance of n - 1. All
    normalise by their batch on the way, whatever ``batchnorm`` says. Recorded over a few meta-batches after training they are of the weights as they are.
    They are for predictions, of ``maml.adapt(..., batchnorm="batch").module(t).eval()``, or to go on training by: an inner loop that was trained by the
    batch overshoots with ``batchnorm="running"``.

    tasks   what ``maml(tasks)`` takes. Raises ValueError where no norm has running statistics, or the parameterisation has several networks or writes their affines anew.
    """
    model, batch, steps = maml.model, TaskBatch.of(tasks), maml.inner_steps
    norms = [m for m in model.modules() if isinstance(m, StepBatchNorm) and m.running_mean is not None]
    if not norms or not steps:
        raise ValueError("inner_steps is 0" if norms else f"no norm of the model has running statistics for each step: {WITH_STATISTICS}")
    if maml.parameterisation.name == "mixture":
        raise ValueError("a mixture has several initialisations, and its norms one set of statistics: record them for each component by itself")
    written = sorted(per_step_parameters(model) & maml.runner(batch, batchnorm="batch").rewritten.weights.keys())
    if written:
        raise ValueError(f"parameterisation {maml.parameterisation.signature} writes {written[0]!r} anew at each step: keep it off that layer (layers=)")
    seeds = task_seeds(None, len(batch))
    path = [maml.adapt(batch, inner_steps=k, batchnorm="batch", task_seeds=seeds) for k in range(steps + 1)]
    own = {id(v) for norm in norms for v in (*norm.parameters(), *norm.buffers())}
    like, before = next(model.parameters()), [(norm, norm.training, norm.step) for norm in norms]
    try:
        for t in range(len(batch)):
            x = [v.to(like.dtype) for v in batch.task(t)[:3:2]]  # support, query
            for k in range(steps):
                for norm in norms:
                    norm.training, norm.step = True, k
                for after, rows in enumerate(x):
                    if after == 0 or maml.step_loss_weights is not None or k == steps - 1:
                        functional_call(model, _but_norms(path[k + after].module(t), model, own), (rows,))
    finally:
        for norm, training, step in before:
            norm.training, norm.step = training, step


def _but_norms(adapted: nn.Module, model: nn.Module, own: set[int]) -> dict[str, torch.Tensor]:
    """Parameters and buffers of ``adapted``, but where the ``model`` has ``own`` ones."""
    mine = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    theirs = {**dict(adapted.named_parameters()), **dict(adapted.named_buffers())}
    return {name: v for name, v in theirs.items() if name not in mine or id(mine[name]) not in own}


def _own(method: str, options: dict[str, Any], *names: str) -> None:
    """Options that make the method what it is are not the caller's."""
    for name in names:
        if name in options:
            raise TypeError(f"{method} sets {name} itself: leave it out, or use fastmaml.MAML({name}={options[name]!r}, ...)")
