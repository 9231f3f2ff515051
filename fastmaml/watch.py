"""What a trace of the user's model depends on, as it stands now: its modules, flags, hooks and parameters."""

from __future__ import annotations

from itertools import chain
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from fastmaml import options

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
training = attrgetter("training")
kind, kind_on_cpu = (attrgetter("requires_grad", "dtype", where, "shape") for where in ("device", "is_cpu"))  # is_cpu is faster to read and to compare


class ModelView:
    """``model`` as it was when it was looked at. ``holds()`` is asked at every call: its loops are in C.

    parameters   by name, a tied one once, under its first name; then the leaves that the parameterisation brings
    kinds        what each of them is in the inner and the outer loop
    adapted      names of those that the inner loop changes
    like         one of the parameters: dtype and device of all of them

    Raises ValueError or TypeError for a model that cannot be trained.
    """

    def __init__(self, model: nn.Module, adapt: str | list[str], parameterisation: Any) -> None:
        self.model, self.parameterisation = options.check_model(model), parameterisation
        self.parameters, self.kinds = parameterisation.looked_at(model, adapt)
        self.adapted = [name for name, kind in self.kinds.items() if kind.role == "adapted"]
        self.like: Tensor = next(iter(self.parameters.values()))
        self._kind = kind_on_cpu if self.like.is_cpu else kind
        self._modules, self._own = list(model.modules()), list(model.parameters())
        members = [getattr(m, name).values() for m in self._modules for name in ("_modules", "_parameters", *HOOKS)]  # views: they show what is there now
        self._filled, self._empty = [v for v in members if v], [v for v in members if not v]  # most are empty, and stay so
        self._buffers = [m._buffers for m in self._modules]  # may be replaced: read anew at each call
        self._kept_alive = list(chain.from_iterable(self._filled))  # no id below can come to mean another object
        self._state = self._now()

    def _now(self) -> tuple[list, list, list, list]:
        ids = list(map(id, chain.from_iterable(self._filled)))
        return ids, list(map(training, self._modules)), list(map(self._kind, self._own)), list(map(len, self._buffers))

    def holds(self) -> bool:
        """Whether a trace made of this view is still one of the model."""
        return not any(self._empty) and self._now() == self._state
