"""layerwise: the inner loop changes some of the network's own parameters, the others are outer-learned or frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fastmaml import options
from fastmaml.parameterisation.base import Kind, Network, Parameterisation

Which = str | nn.Module | Sequence[str | nn.Module]


class Layerwise(Parameterisation):
    """ANIL (Raghu et al. 2020), BOIL (Oh et al. 2021), and any other subset.

    adapt    "head" (the last Linear layer: ANIL), "body" (everything else: BOIL), name pattern(s), or module(s) of the model, by name or themselves
    frozen   what nobody trains: likewise, or None. What is neither adapted nor frozen is outer-learned only.

    What no adapted parameter reaches, such as ANIL's body, runs once per task and has no Hessian-vector product. A frozen body has no gradient at all.
    """

    name = "layerwise"
    takes_adapt = False

    def __init__(self, adapt: Which = "head", frozen: Which | None = None) -> None:
        super().__init__()
        self.adapt, self.freeze = ([which] if isinstance(which, nn.Module) else which for which in (adapt, frozen))  # no modules of this one

    def settings(self) -> Mapping[str, Any]:
        return {"adapt": self.adapt, **({} if self.freeze is None else {"frozen": self.freeze})}

    def declare(self, network: Network) -> None:
        if network.adapt != "*":
            raise ValueError(f"adapt={network.adapt!r} and parameterisation={self.signature}: say what is adapted in one of them")
        self.adapt, self.freeze = (options.named(network.model, which, what) for what, which in (("adapt", self.adapt), ("frozen", self.freeze)))
        self.roles(network)

    def roles(self, network: Network) -> dict[str, Kind]:
        adapted, frozen = set(self._names(network, self.adapt, "adapt")), set(self._names(network, self.freeze, "frozen"))
        frozen = frozen - adapted if self.freeze in ("head", "body") else frozen
        both, trainable = adapted & frozen, {name for name, p in network.parameters.items() if p.requires_grad}
        if both:
            raise ValueError(f"{sorted(both)[0]!r} is both adapted and frozen in {self.signature}")
        if not adapted:
            raise ValueError(f"adapt={self.adapt!r} in {self.signature}: the model has nothing but its head, {network.head()!r}")
        if not adapted & trainable:
            raise ValueError(f"adapt={self.adapt!r} matches only parameters that do not require grad: {', '.join(sorted(adapted))}")
        return {n: Kind("const" if n in frozen or n not in trainable else "adapted" if n in adapted else "outer") for n in network.parameters}

    def _names(self, network: Network, patterns: str | Sequence[str] | None, what: str) -> list[str]:
        if patterns is None:
            return []
        if patterns not in ("head", "body"):
            return network.matching(patterns, what)
        module = network.head().removesuffix("weight")
        head = [name for name in network.parameters if name.rpartition(".")[0] + "." == module or (not module and "." not in name)]
        return head if patterns == "head" else [name for name in network.parameters if name not in head]
