"""Inner learning rates: what users write, as Rates of the Plan and tensors of a call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from numbers import Real

import torch
from torch import Tensor, nn

from fastmaml.options import matches
from fastmaml.plan import Rate
from fastmaml.watch import ModelView

HELP = "pass a number, a [steps] list or tensor, or a dict from parameter names (patterns such as 'head.*', names of modules) to numbers or tensors"


class InnerRates:
    """The rates of the adapted parameters.

    ``inner_lr``: a number (one for all) | [steps] numbers (one per step) | {name pattern: value}, where a value is a number, a list or tensor [steps], a
    tensor of the parameter's shape (per element; a list is always one per step) or [steps, *shape]. Under the name of a module all parameters in it have
    one rate, [] or [steps], together; under any other pattern each has its own. With ``learn`` they become parameters (Meta-SGD: Li et al. 2017; LSLR:
    Antoniou et al. 2019).

    values   the tensors, by rate name
    rates    the Rate of each adapted parameter, by its name
    """

    def __init__(self, inner_lr: object, adapted: Mapping[str, Tensor], learn: bool) -> None:
        self.learn, self.shared = learn, not isinstance(inner_lr, Mapping)
        given = {"*": inner_lr} if self.shared else dict(inner_lr)
        wrong = [pattern for pattern in given if not isinstance(pattern, str)]
        if wrong:
            raise TypeError(f"inner_lr has the key {wrong[0]!r}: {HELP}")
        self.given = {pattern: _tensor(value, "" if self.shared else f"[{pattern!r}]", learn) for pattern, value in given.items()}
        self.listed = {pattern for pattern, value in given.items() if not isinstance(value, Tensor)}
        self.values: dict[str, Tensor] = {}
        self.rates: dict[str, Rate] = {}
        self.bind(adapted)

    def bind(self, adapted: Mapping[str, Tensor]) -> None:
        """For these parameters, in their dtype and on their device. Learned rates stay the same objects."""
        unused = [p for p in self.given if not any(matches(name, p) for name in adapted)]
        if unused:
            raise ValueError(f"inner_lr has {unused[0]!r}, which matches no adapted parameter; they are {', '.join(adapted)}")
        values: dict[str, Tensor] = {}
        rates = {}
        for name, parameter in adapted.items():
            pattern = self._pattern(name)
            given = self.given[pattern]
            together = not fnmatchcase(name, pattern)  # a module
            key = "inner_lr" if self.shared else f"inner_lr.{pattern if together else name}"
            if together and given.dim() > 1:
                raise ValueError(f"inner_lr has shape {list(given.shape)} for the module {pattern!r}, all of whose parameters it serves: expected a number or [steps]")
            per_element, per_step = (False, given.dim() == 1) if self.shared or together else _form(given, pattern in self.listed, parameter, name)
            rates[name] = Rate(key, tuple(parameter.shape) if per_element else (), per_step, self.learn)
            if key not in values:
                values[key] = self._value(key, given, parameter)
        self.values = values | {key: value for key, value in self.values.items() if self.learn and key not in values}
        self.rates = rates
        self._per_step = {rate.name for rate in rates.values() if rate.per_step}
        self.steps = min((len(values[key]) for key in self._per_step), default=None)  # that there are rates for

    def _pattern(self, name: str) -> str:
        """The one that fits best: the name itself, else the longest."""
        found = [p for p in self.given if matches(name, p)]
        if not found:
            raise ValueError(f"inner_lr names no rate for the adapted parameter {name!r}: add it, or a '*' entry")
        return max(found, key=lambda p: (p == name, len(p.replace("*", ""))))

    def _value(self, key: str, given: Tensor, parameter: Tensor) -> Tensor:
        old = self.values.get(key)
        if not self.learn:
            return given.to(parameter)
        if old is None:
            if self.values:
                raise ValueError(f"there is no learned rate {key!r}: the adapted parameters changed since MAML was built, so build a new one")
            return nn.Parameter(given.to(parameter, copy=True))
        if old.dtype != parameter.dtype or old.device != parameter.device:  # as nn.Module.to: the optimizer holds this object
            old.data = old.data.to(parameter)
            if old.grad is not None:
                old.grad.data = old.grad.data.to(parameter)
        return old

    def check_steps(self, steps: int) -> None:
        if self.steps is not None and self.steps < steps:
            short = next(name for name, rate in self.rates.items() if rate.per_step and len(self.values[rate.name]) < steps)
            raise ValueError(f"inner_lr has {self.steps} steps for {short!r}, but inner_steps is {steps}: give one rate per step")

    def tensors(self, steps: int) -> dict[str, Tensor]:
        """The values for the first ``steps`` steps, by rate name."""
        if not self._per_step:
            return self.values
        return {n: v[:steps] if n in self._per_step and len(v) != steps else v for n, v in self.values.items()}

    def at(self, steps: int, inner_lr: object, view: ModelView) -> dict[str, Tensor]:
        """The values of one call, which may give its own ``inner_lr``."""
        if inner_lr is None:
            self.check_steps(steps)
            return self.tensors(steps)
        if self.learn:
            raise ValueError("inner_lr cannot be given per call with learn_inner_lr=True: change the parameters in maml.rates.values instead")
        given = InnerRates(inner_lr, {name: view.parameters[name] for name in view.adapted}, False)
        if given.rates != self.rates:
            raise ValueError("inner_lr of a call must have the form of the constructor's (one number, per step, per name, per element), of which the Plan is made")
        given.check_steps(steps)
        return given.tensors(steps)

    def learned(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The rates that are parameters."""
        if self.learn:
            yield from self.values.items()


def _tensor(value: object, where: str, learn: bool) -> Tensor:
    """float64 on the device where it is: an exact copy of what was written."""
    shown = f"inner_lr{where} is {f'a tensor of shape {list(value.shape)}' if isinstance(value, Tensor) else repr(value)}"
    if isinstance(value, (bool, str)) or not isinstance(value, (Real, Tensor, Sequence)):
        raise TypeError(f"{shown}: {HELP}")
    if isinstance(value, Tensor) and value.requires_grad and not learn:
        raise ValueError(f"{shown} that requires grad: pass learn_inner_lr=True to learn the rates, or value.detach() not to")
    try:
        out = torch.as_tensor(value, dtype=torch.float64).detach().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{shown}: {HELP}") from error
    if not bool(torch.isfinite(out).all()):
        raise ValueError(f"{shown}: rates must be finite")
    if out.numel() == 0 or (not where and out.dim() > 1):
        raise ValueError(f"{shown}{'' if out.numel() else ' (empty)'}: {HELP}")
    return out


def _form(value: Tensor, listed: bool, parameter: Tensor, name: str) -> tuple[bool, bool]:
    """(per element, per step) of the rate of one parameter."""
    shape, given = tuple(parameter.shape), tuple(value.shape)
    if given == shape and shape != () and not (listed and len(given) == 1):
        return True, False
    if len(given) == len(shape) + 1 and given[1:] == shape:
        return shape != (), True
    if len(given) > 1:
        raise ValueError(f"inner_lr has shape {list(given)} for {name!r} (shape {list(shape)}): {HELP}")
    return False, len(given) == 1
