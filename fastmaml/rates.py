"""Inner learning rates: what users write, as Rates of the Plan and tensors of a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from numbers import Real

import torch
from torch import Tensor, nn

from fastmaml.plan import Rate

HELP = "pass a number, a [steps] list or tensor, or a dict from parameter names (or patterns such as 'head.*') to numbers or tensors"


class InnerRates:
    """The rates of the adapted parameters.

    ``inner_lr``: a number (one for all) | [steps] numbers (one per step) | {name pattern: value}, where a value is a number, [steps] numbers, a tensor of
    the parameter's shape (per element) or [steps, *shape]. With ``learn`` they become parameters (Meta-SGD: Li et al. 2017; LSLR: Antoniou et al. 2019).
    """

    def __init__(self, inner_lr: object, adapted: Mapping[str, Tensor], learn: bool, like: Tensor) -> None:
        self.values: dict[str, Tensor] = {}
        self.rates: dict[str, Rate] = {}  # by adapted parameter
        shared = not isinstance(inner_lr, Mapping)
        patterns = {"*": inner_lr} if shared else inner_lr
        unused = [p for p in patterns if not any(fnmatchcase(name, p) for name in adapted)]
        if unused:
            raise ValueError(f"inner_lr has {unused[0]!r}, which matches no adapted parameter; they are {', '.join(adapted)}")
        for name, parameter in adapted.items():
            found = [p for p in patterns if fnmatchcase(name, p)]
            if not found:
                raise ValueError(f"inner_lr names no rate for the adapted parameter {name!r}: add it, or a '*' entry")
            best = max(found, key=lambda p: (p == name, len(p.replace("*", ""))))
            key = "inner_lr" if shared else f"inner_lr.{name}"
            if key not in self.values:
                self.values[key] = _tensor(patterns[best], None if shared else parameter, name, like)
            shape = tuple(parameter.shape)
            value = self.values[key]
            per_element = not shared and tuple(value.shape[-len(shape) :] if shape else ()) == shape and value.dim() >= len(shape) > 0
            per_element = per_element and not (value.dim() == 1 and shape == (1,))
            per_step = value.dim() == (len(shape) if per_element else 0) + 1
            self.rates[name] = Rate(key, shape if per_element else (), per_step, learn)
        if learn:
            self.values = {key: nn.Parameter(value.clone()) for key, value in self.values.items()}

    def check_steps(self, steps: int) -> None:
        for name, rate in self.rates.items():
            if rate.per_step and len(self.values[rate.name]) < steps:
                have = len(self.values[rate.name])
                raise ValueError(f"inner_lr has {have} steps for {name!r}, but inner_steps is {steps}: give one rate per step")

    def tensors(self, steps: int) -> dict[str, Tensor]:
        """The values for the first ``steps`` steps, by rate name."""
        per_step = {rate.name for rate in self.rates.values() if rate.per_step}
        return {name: value[:steps] if name in per_step else value for name, value in self.values.items()}


def _tensor(value: object, parameter: Tensor | None, name: str, like: Tensor) -> Tensor:
    if isinstance(value, bool) or not isinstance(value, (Real, Tensor, Sequence)) or isinstance(value, str):
        raise TypeError(f"inner_lr is {value!r} for {name!r}: {HELP}")
    try:
        out = torch.as_tensor(value, dtype=like.dtype, device=like.device).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"inner_lr is {value!r} for {name!r}: {HELP}") from error
    shape = () if parameter is None else tuple(parameter.shape)
    fits = out.dim() <= 1 if parameter is None else out.dim() <= 1 or shape in (tuple(out.shape), tuple(out.shape[1:]))
    if not fits:
        of = "" if parameter is None else f" (shape {list(shape)})"
        raise ValueError(f"inner_lr has shape {list(out.shape)} for {name!r}{of}: {HELP}")
    if not bool(torch.isfinite(out).all()):
        raise ValueError(f"inner_lr is {value!r} for {name!r}: rates must be finite")
    return out
