"""For code that carries its parameters itself (higher, torchopt, torch.func): the same engine, as functions of a dict of tensors."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastmaml.autograd import MetaLoss
from fastmaml.maml import MAML
from fastmaml.output import MetaOutput

_cache: weakref.WeakKeyDictionary[nn.Module, dict[Any, MAML]] = weakref.WeakKeyDictionary()


def meta_loss(model: nn.Module, params: Mapping[str, Tensor], tasks: Any, **options: Any) -> MetaOutput:
    """One meta-iteration of ``model`` with ``params`` {name: tensor} in place of its own parameters.

    ``out.loss`` is differentiable with respect to the tensors of ``params``. ``options``: those of MAML (not learn_inner_lr). Raises ValueError if
    names or shapes differ from the model's.
    """
    maml = _maml(model, options)
    with _Using(maml, params) as given:
        wanted = torch.is_grad_enabled()
        call, results, batch = maml._run(tasks, "train" if wanted else "evaluate", None, None, None, None)
        out = maml._output(call, results, batch)
    if wanted:
        pairs = [(p, results.values.get(f"grad.{n}")) for n, p in given.items() if p.requires_grad]
        pairs = [(p, g) for p, g in pairs if g is not None]
        if pairs:
            tensors, gradients = zip(*pairs, strict=True)
            out.loss, out.joined_logits = MetaLoss.apply(out.loss, out.joined_logits, gradients, *tensors)
    return out


def adapt(model: nn.Module, params: Mapping[str, Tensor], support_x: Tensor, support_y: Tensor, **options: Any) -> dict[str, Tensor]:
    """{name: [tasks, *shape]}: the adapted parameters of each task, without gradient."""
    maml = _maml(model, options)
    with _Using(maml, params):
        return maml.adapt(support_x, support_y).weights


def _maml(model: nn.Module, options: dict[str, Any]) -> MAML:
    if options.get("learn_inner_lr"):
        raise ValueError("learn_inner_lr=True needs an object that holds the rates: use fastmaml.MAML")
    key = tuple(sorted((name, repr(value)) for name, value in options.items()))
    per_model = _cache.setdefault(model, {})
    if key not in per_model:
        per_model[key] = MAML(model, **options)
    return per_model[key]


class _Using:
    """Puts tensors in the place of the model's parameters while a MAML object runs."""

    def __init__(self, maml: MAML, params: Mapping[str, Tensor]) -> None:
        own = dict(maml.model.named_parameters())
        missing, unknown = own.keys() - params.keys(), params.keys() - own.keys()
        if missing or unknown:
            what = f"lacks {sorted(missing)[0]!r}" if missing else f"has {sorted(unknown)[0]!r}, which the model has not"
            raise ValueError(f"params {what}: expected exactly the names of model.named_parameters()")
        for name, value in params.items():
            if value.shape != own[name].shape or value.dtype != own[name].dtype:
                raise ValueError(f"params[{name!r}] is {value.dtype} {list(value.shape)}, the model's {own[name].dtype} {list(own[name].shape)}")
        self.maml, self.params = maml, dict(params)

    def __enter__(self) -> dict[str, Tensor]:
        self.maml._override = {name: value.detach() for name, value in self.params.items()}
        return self.params

    def __exit__(self, *error: object) -> None:
        self.maml._override = None
