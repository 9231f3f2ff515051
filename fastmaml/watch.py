"""What a trace of the user's model depends on, as it stands now: its modules, flags, hooks and parameters."""

from __future__ import annotations

from typing import Any

from torch import Size, Tensor, nn
from torch import device as Device
from torch import dtype as DType

from fastmaml import options

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class ModelView:
    """``model`` as it was when it was looked at; ``holds()`` is asked at every call and must cost microseconds.

    parameters   by name, a tied one once, under its first name
    adapted      names of the parameters that the inner loop changes
    like         one of the parameters: dtype and device of all of them

    Raises ValueError or TypeError for a model that cannot be trained.
    """

    def __init__(self, model: nn.Module, adapt: str | list[str]) -> None:
        self.model = options.check_model(model)
        self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        self.adapted = options.adapted_names(model, adapt)
        self.like: Tensor = next(iter(self.parameters.values()))
        modules = list(model.modules())
        # the entries of dicts and their numbers: a plain dict lookup is five times faster than nn.Module.__getattr__
        self._entries: list[tuple[dict[str, Any], str, Any]] = [(vars(m), "training", vars(m).get("training")) for m in modules]
        self._sizes: list[tuple[dict[Any, Any], int]] = []
        for m in modules:
            for table in (m._modules, m._parameters):
                self._entries += [(table, key, value) for key, value in table.items()]
            tables = (m._modules, m._parameters, m._buffers, *(getattr(m, hooks) for hooks in HOOKS))
            self._sizes += [(table, len(table)) for table in tables]
        self._kinds: list[tuple[Tensor, bool, DType, Device, Size]] = [
            (p, p.requires_grad, p.dtype, p.device, p.shape) for p in self.parameters.values()
        ]

    def holds(self) -> bool:
        """Whether a trace made of this view is still one of the model."""
        for table, key, value in self._entries:
            if table.get(key) is not value:
                return False
        for table, size in self._sizes:
            if len(table) != size:
                return False
        for p, requires_grad, dtype, device, shape in self._kinds:
            if p.requires_grad is not requires_grad or p.dtype is not dtype or p.device != device or p.shape != shape:
                return False
        return True

    def role(self, name: str) -> str:
        """Of the leaf of a Program."""
        if name in self.adapted:
            return "adapted"
        parameter = self.parameters.get(name)
        return "outer" if parameter is not None and parameter.requires_grad else "const"
