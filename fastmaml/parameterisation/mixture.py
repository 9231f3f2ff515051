"""mixture: several initialisations, and what each task makes of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastmaml.counts import check_count
from fastmaml.parameterisation.base import Kind, Network, Parameterisation, Tasks
from fastmaml.parameterisation.rewriter import Rewriter


class Mixture(Parameterisation):
    """``components`` initialisations of what ``adapt=`` names; row r of a batch begins at initialisation r % components (``fastmaml.mixture`` lays the rows
    out and weighs them). The first is the model's own, the others are drawn anew by its layers' ``reset_parameters``. What is not adapted is shared."""

    name = "mixture"

    def __init__(self, components: int = 3) -> None:
        super().__init__()
        components = check_count("components", components)
        self.components = components

    def settings(self) -> Mapping[str, Any]:
        return {"components": self.components}

    def declare(self, network: Network) -> None:
        self._names = network.matched
        models = [network.model, *(drawn_anew(network.model, self._names) for _ in range(self.components - 1))]
        parameters = [dict(model.named_parameters()) for model in models]
        for name in self._names:
            self.outer(f"init.{name}", torch.stack([p[name].detach() for p in parameters]))
            self.per_task(name, network.parameters[name].shape, "adapted")

    def roles(self, network: Network) -> dict[str, Kind]:
        """The model's own values of what is adapted are not used after the first initialisation was taken from them."""
        mine = set(self._names)
        return {n: Kind("const" if n in mine or not p.requires_grad else "outer") for n, p in network.parameters.items()}

    def rewrite(self, r: Rewriter) -> None:
        for name in (n for n in self._names if n in r):
            r.substitute(name, r.own(name))

    def prologue(self, tasks: Tasks) -> Mapping[str, Tensor]:
        component = torch.arange(len(tasks)) % self.components
        return {f"{self.name}.{n}": tasks.parameters[f"{self.name}.init.{n}"][component] for n in self._names}


def drawn_anew(model: nn.Module, names: list[str]) -> nn.Module:
    """A copy whose layers have drawn their parameters again. Raises ValueError for a parameter that nobody draws."""
    other = copy.deepcopy(model)
    drawn: set[int] = set()
    for module in other.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
            drawn |= {id(p) for p in module.parameters(recurse=False)}
    left = [n for n, p in other.named_parameters() if n in names and id(p) not in drawn]
    if left:
        raise ValueError(f"{left[0]!r} belongs to a layer without reset_parameters: nothing can draw another initialisation of it")
    return other
