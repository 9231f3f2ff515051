"""For code that carries its parameters itself (higher, torchopt, torch.func): the same engine, as functions of a dict of tensors.

The engine of a model and its options is kept for the next call: the last few, and with them their models, stay alive.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fastmaml import options as checks
from fastmaml.executors.autograd.opaque import turn
from fastmaml.maml import MAML
from fastmaml.optimizers import SGD, ImplicitGradient
from fastmaml.output import MetaOutput

KEPT = 8
PER_CALL = {"inner_lr": 0.01, "batchnorm": None, "task_weights": None}  # and what they are when not given
_kept: dict[Any, tuple[MAML, Any]] = {}


def meta_loss(model: nn.Module, params: Mapping[str, Tensor], tasks: Any, *, outer_loss: Any = None, **options: Any) -> MetaOutput:
    """One meta-iteration of ``model`` with ``params`` {name: tensor} in place of its own parameters.

    ``out.loss`` is differentiable with respect to the tensors of ``params``. ``options``: those of MAML (not learn_inner_lr) and of its call. Raises
    ValueError if names or shapes differ from the model's.
    """
    maml, settings = _prepared(model, options)
    return maml._call(tasks, settings, outer_loss, _checked(maml, params))


def adapt(model: nn.Module, params: Mapping[str, Tensor], support_x: Any, support_y: Any = None, *, ways: Any = None, **options: Any) -> dict[str, Tensor]:
    """{name: [tasks, *shape]}: the adapted parameters of each task, without gradient."""
    maml, settings = _prepared(model, options)
    if settings.pop("task_weights") is not None:
        raise TypeError("adapt takes no task_weights: nothing is summed over tasks")
    return maml._adapt(checks.support_batch(support_x, support_y, ways), settings, _checked(maml, params)).weights


def _prepared(model: nn.Module, options: dict[str, Any]) -> tuple[MAML, dict[str, Any]]:
    """A MAML object with these options, and the settings of its call."""
    if options.get("learn_inner_lr"):
        raise ValueError("learn_inner_lr=True needs an object that holds the rates: use fastmaml.MAML")
    if not isinstance(options.get("parameterisation", "full"), str):
        raise ValueError("a parameterisation may have parameters of its own, and needs an object that holds them: use fastmaml.MAML (here only its names, such as 'anil')")
    settings = {name: options.get(name, value) for name, value in PER_CALL.items()}
    constant = tuple(sorted((name, _key(value)) for name, value in options.items() if name not in PER_CALL))
    key = (id(model), _form(settings["inner_lr"]), constant)
    with turn:
        if key not in _kept:
            made = MAML(model, inner_lr=settings["inner_lr"], **{n: v for n, v in options.items() if n not in PER_CALL})
            _kept[key] = made, options  # what has its id in the key must stay alive
            while len(_kept) > KEPT:
                del _kept[next(iter(_kept))]
        return _kept[key][0], settings


def _key(value: Any) -> Any:
    """Equal for equal options. Objects (a loss module) are equal to themselves."""
    if isinstance(value, Tensor):
        return Tensor, tuple(value.shape), tuple(value.flatten().tolist())
    if isinstance(value, (list, tuple)):
        return list, tuple(map(_key, value))
    return (type(value), value) if value is None or isinstance(value, (str, int, float, SGD, ImplicitGradient)) else (type(value), id(value))


def _form(inner_lr: Any) -> Any:
    """Equal where the same Plan serves: rates themselves are run-time numbers."""
    if isinstance(inner_lr, Mapping):
        return tuple((name, _form(value)) for name, value in inner_lr.items())
    return (Tensor, tuple(inner_lr.shape)) if isinstance(inner_lr, Tensor) else isinstance(inner_lr, (list, tuple))


def _checked(maml: MAML, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    own = maml._engine.view().parameters
    if not isinstance(params, Mapping):
        raise TypeError(f"params is {type(params).__name__}: expected {{name: tensor}}, as dict(model.named_parameters())")
    missing, unknown = own.keys() - params.keys(), params.keys() - own.keys()
    if missing or unknown:
        what = f"lacks {sorted(missing)[0]!r}" if missing else f"has {sorted(unknown)[0]!r}, which the model has not"
        raise ValueError(f"params {what}: expected exactly the names of model.named_parameters()")
    for name, value in params.items():
        p = own[name]
        if not isinstance(value, Tensor):
            raise TypeError(f"params[{name!r}] is {type(value).__name__}: expected a tensor")
        if value.shape != p.shape or value.dtype != p.dtype or value.device != p.device:
            kinds = [f"{v.dtype} {list(v.shape)} on {v.device}" for v in (value, p)]
            raise ValueError(f"params[{name!r}] is {kinds[0]}, the model's {kinds[1]}: they must agree")
        if value.requires_grad and not p.requires_grad:
            raise ValueError(f"params[{name!r}] requires grad, the model's own does not, so it would get none: call requires_grad_() on it too")
    return dict(params)
