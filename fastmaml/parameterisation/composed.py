"""Several parameterisations of one network: channels scaled and shifted under a head that begins at zero, T-nets under prototypes, ..."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastmaml.parameterisation.base import Kind, Network, Parameterisation, Tasks
from fastmaml.parameterisation.rewriter import Rewriter
from fastmaml.plan import Rate


class Composed(Parameterisation):
    """What ``MAML(model, parameterisation=[a, b, ...])`` means. Each brings its leaves and rewrites the parameters and layers that are its own.

    Of a parameter of the network's, the last of them that says anything else than ``full`` would says whether it is adapted, outer-learned or constant: in
    [ScaleShift("scale_shift"), Head("zero")] the body is frozen by the former and the model's own head put aside by the latter.

    ValueError: two that rewrite one parameter, that have one name, or that both make leaves of each task (a prologue).
    """

    name = "composed"

    def __init__(self, parts: Sequence[Parameterisation]) -> None:
        super().__init__()
        names = [p.name for p in parts]
        if len(parts) < 2:
            raise ValueError(f"parameterisation={[*parts]!r}: a list needs at least two of them")
        for name in names:
            if names.count(name) > 1 or name in ("mixture", "composed"):
                why = f"there are {names.count(name)} of {name!r}" if names.count(name) > 1 else f"{name!r} is no part of a list"
                raise ValueError(f"parameterisation=[{', '.join(names)}]: {why}")
        makers = [p.name for p in parts if p.has_prologue]
        if len(makers) > 1:
            raise ValueError(f"parameterisation=[{', '.join(names)}]: {' and '.join(makers)} both make something for each task: only one may")
        self.parts = nn.ModuleList(parts)

    @property
    def signature(self) -> str:
        return " + ".join(p.signature for p in self.parts)

    @property
    def belongs(self) -> bool:
        return any(p.belongs for p in self._parts())

    @belongs.setter
    def belongs(self, value: bool) -> None:
        for p in self._parts():
            p.belongs = value

    def _parts(self) -> Sequence[Any]:
        return self._modules.get("parts", ())

    @property
    def takes_adapt(self) -> bool:
        return all(p.takes_adapt for p in self.parts)

    @property
    def is_identity(self) -> bool:
        return all(p.is_identity for p in self.parts)

    @property
    def has_prologue(self) -> bool:
        return any(p.has_prologue for p in self.parts)

    # ------------------------------------------------------------------------------------------------- what they say
    def start(self, model: nn.Module, adapt: str | Sequence[str]) -> None:
        for p in self.parts:
            p.start(model, adapt)
        self.kinds = {full: kind for p in self.parts for full, kind in p.kinds.items()}

    def roles(self, network: Network) -> dict[str, Kind]:
        plain = Parameterisation.roles(self, network)
        roles = dict(plain)
        for p in self.parts:
            roles |= {name: kind for name, kind in p.roles(network).items() if kind != plain[name]}
        return roles

    def rewrite(self, r: Rewriter) -> None:
        for p in self.parts:
            r.prefix = p.name
            p.rewrite(r)

    def prologue(self, tasks: Tasks) -> Mapping[str, Tensor]:
        return {full: value for p in self.parts if p.has_prologue for full, value in p.prologue(tasks).items()}

    def sources(self) -> list[Tensor]:
        return [source for p in self.parts for source in p.sources()]

    def task_rates(self, rates: Mapping[str, Rate]) -> Mapping[str, Rate]:
        for p in self.parts:
            rates = p.task_rates(rates)
        return rates

    # ------------------------------------------------------------------------------------------------- leaves
    def values(self) -> dict[str, Tensor]:
        return {full: value for p in self.parts for full, value in p.values().items()}

    def place(self, full: str) -> str | None:
        found = ((i, p.place(full)) for i, p in enumerate(self.parts))
        return next((f"parts.{i}.{place}" for i, place in found if place is not None), None)

    def groups(self) -> Iterator[tuple[str, list[nn.Parameter]]]:
        for p in self.parts:
            yield from p.groups()
