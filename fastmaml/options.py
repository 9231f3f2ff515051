"""Checks of what users pass: every wrong argument is answered before any work starts, naming it, its value and the way out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from fastmaml.batch import TaskBatch
from fastmaml.nn import per_step_parameters
from fastmaml.optimizers import SGD, ImplicitGradient
from fastmaml.program import Loss

LOSSES = ("cross_entropy", "mse")
BATCHNORM = ("batch", "support", "running", "joint")
PRECISIONS = ("highest", "high", "medium")
MEMORY = ("constant", "fast")
NONFINITE = ("raise", "skip")
META_GRADIENTS = ("unrolled", "reptile")


def one_of(name: str, value: object, allowed: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(repr, allowed))}")
    return value


def flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: expected True or False")
    return value


def parse_loss(loss: object, reduction: object) -> tuple[Loss, Tensor | None]:
    """(Loss, class weights) from a name, or from nn.CrossEntropyLoss / nn.MSELoss (label smoothing, class weights)."""
    weight, smoothing = None, 0.0
    if type(loss) is nn.CrossEntropyLoss or type(loss) is nn.MSELoss:
        name = "cross_entropy" if type(loss) is nn.CrossEntropyLoss else "mse"
        if reduction == "mean" and loss.reduction != "mean":
            reduction = loss.reduction
        if name == "cross_entropy":
            if loss.ignore_index != -100:
                raise ValueError(f"loss=CrossEntropyLoss(ignore_index={loss.ignore_index}): ignored labels are not supported; leave those rows out")
            weight, smoothing = loss.weight, float(loss.label_smoothing)
    elif isinstance(loss, str) and loss in LOSSES:
        name = loss
    else:
        raise ValueError(
            f"loss={loss!r}: choose 'cross_entropy', 'mse', nn.CrossEntropyLoss(...) or nn.MSELoss(...). "
            "An outer loss of your own goes to maml(tasks, outer_loss=fn(logits, query_y))"
        )
    if isinstance(reduction, bool) or not (reduction in ("mean", "sum") if isinstance(reduction, str) else isinstance(reduction, Real)):
        raise ValueError(f"reduction={reduction!r}: choose 'mean', 'sum', or a number that the sum is divided by")
    if not isinstance(reduction, str):
        reduction = float(reduction)
        if not reduction > 0 or reduction == float("inf"):
            raise ValueError(f"reduction={reduction!r}: the divisor must be a positive, finite number")
    return Loss(name, reduction, smoothing, weight is not None), weight


def check_optimizer(optimizer: object) -> SGD:
    if optimizer is None:
        return SGD()
    if not isinstance(optimizer, SGD):
        shown = optimizer.__name__ if isinstance(optimizer, type) else type(optimizer).__name__
        raise TypeError(f"inner_optimizer is {shown}: expected fastmaml.SGD(momentum=..., weight_decay=..., ...), whose rate is inner_lr, or None for plain steps")
    return optimizer


def matches(name: str, pattern: str) -> bool:
    """Whether a parameter is meant: by its name, a pattern of names, or the name of a module that it lies in."""
    return fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")


def named(model: nn.Module, given: object, what: str) -> Any:
    """``given``, patterns of parameter names, with names in the place of modules of the model."""
    if isinstance(given, nn.Module):
        name = next((n for n, module in model.named_modules() if module is given), None)
        if name is None:
            raise ValueError(f"{what} has a {type(given).__name__} that is no module of the model")
        return name or "*"
    return [named(model, one, what) for one in given] if isinstance(given, (list, tuple)) else given


def adapted_names(model: nn.Module, adapt: object) -> list[str]:
    """Names of the trainable parameters that match one of the patterns."""
    patterns = [adapt] if isinstance(adapt, str) else adapt
    if not isinstance(patterns, Sequence) or not patterns or not all(isinstance(p, str) for p in patterns):
        raise TypeError(f"adapt={adapt!r}: expected a pattern of parameter names such as 'head.*', a module of the model, or a list of them")
    per_step = per_step_parameters(model)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad and name not in per_step]
    for pattern in patterns:
        if not any(matches(name, pattern) for name in trainable):
            frozen = [name for name, p in model.named_parameters() if not p.requires_grad and matches(name, pattern)]
            why = f"it matches only {frozen[0]!r}, which does not require grad" if frozen else f"the trainable parameters are {', '.join(trainable) or 'none'}"
            raise ValueError(f"adapt={pattern!r} matches no trainable parameter: {why}")
    return [name for name in trainable if any(matches(name, pattern) for pattern in patterns)]


def check_model(model: object) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}: expected an nn.Module")
    parameters = list(model.parameters())
    if not parameters:
        raise ValueError("model has no parameters: nothing to adapt or to learn")
    taken = [name for name, _ in model.named_parameters() if name == "inner_lr" or name.startswith("inner_lr.")]
    if taken:
        raise ValueError(f"the model has a parameter {taken[0]!r}, a name that fastmaml uses for the inner rates: rename it")
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in parameters):
        raise ValueError("the model has lazy parameters without a shape: run it once on a batch before MAML(model)")
    kinds = {(p.dtype, p.device) for p in parameters}
    if len(kinds) > 1:
        listed = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        raise ValueError(f"the model's parameters are of several kinds ({listed}): use one dtype and one device, as with model.to(...)")
    if not parameters[0].is_floating_point() or parameters[0].dtype in (torch.float16, torch.bfloat16):
        raise ValueError(f"the model's parameters are {parameters[0].dtype}: use float32 (or float64); half precision loses the meta-gradient")
    return model


def check_meta_gradient(maml: Any) -> None:
    """Whether what the object asks for has the meta-gradient that it asks for."""
    if maml.meta_gradient == "unrolled":
        return
    why = f"meta_gradient={maml.meta_gradient!r}"
    if isinstance(maml.meta_gradient, ImplicitGradient):
        if maml.first_order:
            raise ValueError(f"{why} and first_order=True: the implicit meta-gradient is of second order; the query gradient alone is meta_gradient='unrolled'")
    else:
        one_of("meta_gradient", maml.meta_gradient, META_GRADIENTS)
    if maml.rates.learn:
        raise ValueError(f"{why} has no gradient of the inner rates: learn_inner_lr=True needs meta_gradient='unrolled'")
    left = [name for name, p in maml.named_parameters() if p.requires_grad and name not in maml.rates.rates]
    if left:
        own = left[0] in dict(maml.model.named_parameters())
        mine = own and left[0] not in adapted_names(maml.model, maml.adapt_patterns)
        said = f"adapt={maml.adapt_patterns!r}" if mine else f"parameterisation {maml.parameterisation.signature}"
        way = "adapt it, or freeze it (requires_grad_(False))" if own else "it needs meta_gradient='unrolled'"
        raise ValueError(f"{why} trains what the inner loop adapts, and {said} leaves out {left[0]!r}: {way}")
    if maml.step_loss_weights is not None:
        raise ValueError(f"{why} does not look at the losses of the steps: step_loss_weights needs meta_gradient='unrolled'")


def check_device(batch: TaskBatch, like: Tensor) -> None:
    if batch.device != like.device:
        raise ValueError(f"the tasks are on {batch.device}, the model on {like.device}: move one of them (tasks.to(...))")


def check_inputs(batch: TaskBatch, like: Tensor, tokens: bool) -> None:
    """``tokens``: whether integers may be meant as they are, for an embedding."""
    for name, x in zip(("support_x", "query_x"), batch.stored()[::2], strict=True):
        if x.dtype is like.dtype or x.dtype in (torch.float32, torch.float64, torch.uint8):
            continue
        if not tokens or x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} is {x.dtype}: expected {like.dtype} (x.to({like.dtype}); bytes are converted as they are)")


def check_targets(batch: TaskBatch, loss: Loss, output: tuple[int, ...], outer: bool) -> None:
    """Types and shapes of targets against loss and model; ``outer``: the query's are not ours."""
    row = batch.row_shapes[1]
    if loss.name != "mse" and len(output) != 1:
        raise ValueError(f"the model's output has shape {list(output)} per sample: loss='cross_entropy' needs [classes]")
    for name, y in zip(("support_y",) if outer else ("support_y", "query_y"), batch.stored()[1::2], strict=False):
        if loss.name == "mse":
            if not y.is_floating_point():
                raise TypeError(f"{name} is {y.dtype}: loss='mse' needs float targets (y.float())")
            if row != output:
                raise ValueError(f"{name} has rows of shape {list(row)}, the model's output {list(output)}: they must be equal for loss='mse'")
            continue
        if y.is_floating_point() or y.is_complex() or y.dtype is torch.bool:
            raise TypeError(f"{name} is {y.dtype}: loss='cross_entropy' needs class labels as integers (y.long())")
        if row:
            raise ValueError(f"{name} has labels of shape {list(row)} per sample: expected one integer each, not one-hot rows (y.argmax(-1))")


def check_labels(batch: TaskBatch, classes: int, outer: bool) -> None:
    """The labels themselves, once per batch object and model size: out of range they would be read past the logits."""
    for name, y in (("support_y", batch.support_y),) if outer else (("support_y", batch.support_y), ("query_y", batch.query_y)):
        version = 0 if y.is_inference() else y._version
        if batch._cache.get(f"{name}.checked") != (version, classes):
            _check_labels(batch, name, y, classes)
            batch._cache[f"{name}.checked"] = (version, classes)


def are_labels(y: Tensor) -> bool:
    return y.dim() == 1 and not y.is_floating_point()


def _check_labels(batch: TaskBatch, name: str, y: Tensor, classes: int) -> None:
    if batch.ways is not None and int(batch.ways.max()) > classes:
        raise ValueError(f"ways of a task is {int(batch.ways.max())}, the model has {classes} outputs: tasks use the first outputs of the head")
    low, high = torch.stack(torch.aminmax(y)).tolist()  # at once: on a GPU it is waited for
    if low < 0 or high >= classes:
        wrong = low if low < 0 else high
        raise ValueError(f"{name} has the label {wrong}, the model {classes} outputs: labels are 0..{classes - 1}, numbered anew in each task")
    if batch.ways is not None:
        sizes = batch.support_sizes if name == "support_y" else batch.query_sizes
        for t, labels in enumerate(y.cpu().split(list(sizes))):
            top = int(labels.max())
            if top >= int(batch.ways[t]):
                raise ValueError(f"{name} of task {t} has the label {top}, the task {int(batch.ways[t])} ways")


def support_batch(support_x: object, support_y: object, ways: object) -> TaskBatch:
    """A TaskBatch to adapt to, whose query rows nobody reads."""
    if isinstance(support_x, TaskBatch):
        if support_y is not None or ways is not None:
            raise TypeError("adapt got a TaskBatch and support_y or ways besides: the batch holds them")
        return support_x
    if support_y is None:
        raise TypeError("adapt needs support_y: maml.adapt(support_x [tasks, n, ...], support_y [tasks, n])")
    if isinstance(support_x, (list, tuple)) and isinstance(support_y, (list, tuple)):
        if len(support_x) != len(support_y):
            raise ValueError(f"support_x has {len(support_x)} tasks, support_y {len(support_y)}: expected one tensor per task in each")
        return TaskBatch.from_tasks([(x, y, x, y) for x, y in zip(support_x, support_y, strict=True)], ways)
    return TaskBatch.from_tensors(support_x, support_y, support_x, support_y, ways)


def check_class_weight(weight: Tensor, output: tuple[int, ...]) -> None:
    if tuple(weight.shape) != output:
        raise ValueError(f"loss=CrossEntropyLoss(weight=...) has weights of shape {list(weight.shape)}, the model {output[0]} outputs: give one weight per output")


def check_outer_loss(outer_loss: object, task_weights: object, step_loss_weights: object, meta_gradient: str) -> None:
    if not callable(outer_loss):
        raise TypeError(f"outer_loss={outer_loss!r}: expected a function of (logits, query_y)")
    if task_weights is not None:
        raise ValueError("task_weights and outer_loss together: weigh the tasks inside outer_loss")
    if meta_gradient == "reptile":
        raise ValueError("meta_gradient='reptile' and outer_loss together: Reptile's gradient is theta - theta_K, whatever the outer loss")
    if step_loss_weights is not None:
        raise ValueError("step_loss_weights and outer_loss together: the multi-step loss needs one of the built-in losses")


def check_scalar(loss: object) -> None:
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        got = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise ValueError(f"outer_loss returned {got}: expected a scalar tensor")


def check_task_weights(weights: object, tasks: int) -> Tensor | None:
    """[tasks] float64 on the CPU, or None."""
    if weights is None:
        return None
    try:
        out = torch.as_tensor(weights, dtype=torch.float64).detach().cpu().contiguous()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"task_weights={weights!r}: expected {tasks} numbers") from error
    if out.shape != (tasks,):
        raise ValueError(f"task_weights has shape {list(out.shape)}: expected [{tasks}], one per task")
    if not bool(torch.isfinite(out).all()):
        raise ValueError("task_weights has a value that is not finite")
    return out


def task_seeds(seeds: object, tasks: int) -> list[int]:
    """One whole number per task; None: from torch's generator."""
    if seeds is None:
        return torch.randint(2**62, (tasks,)).tolist()
    found = seeds.tolist() if isinstance(seeds, Tensor) else list(seeds) if isinstance(seeds, Sequence) and not isinstance(seeds, str) else None
    if found is None or len(found) != tasks or not all(isinstance(s, Integral) and not isinstance(s, bool) for s in found):
        raise ValueError(f"task_seeds={seeds!r}: expected {tasks} whole numbers, one per task")
    return [int(s) for s in found]


def check_step_weights(weights: object, steps: int) -> tuple[list[float], int] | None:
    """(weights of theta_0 .. theta_K, first step with one) for the multi-step loss, or None."""
    if weights is None:
        return None
    if isinstance(weights, (str, Mapping)) or not isinstance(weights, (Sequence, Tensor)):
        raise TypeError(f"step_loss_weights={weights!r}: expected one number per inner step")
    try:
        values = [float(w) for w in weights]
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"step_loss_weights={weights!r}: expected one number per inner step") from error
    if len(values) not in (steps, steps + 1) or steps == 0:
        raise ValueError(
            f"step_loss_weights has {len(values)} entries, inner_steps is {steps}: give one per inner step (the loss after it), "
            "or one more in front for the loss before the first"
        )
    if any(w != w or abs(w) == float("inf") for w in values):
        raise ValueError(f"step_loss_weights={values}: they must be finite")
    return ([0.0, *values], 1) if len(values) == steps else (values, 0)
