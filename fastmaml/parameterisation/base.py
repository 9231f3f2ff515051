"""What a meta-parameterisation is: which leaves the inner loop adapts, which are outer-learned, and how the network's weights follow from them.

A subclass says three things, and neither the planner nor an executor has to know of it:

    declare(network)   once, when MAML is built: the leaves it brings (``outer``, ``adapted``, ``constant``, ``per_task``), with their initial values
    roles(network)     what becomes of the network's own parameters
    rewrite(r)         for each traced Program: which expressions, or which layers, use them (see ``rewriter.py``)

What the Program cannot express, such as a mask that is drawn or an encoder of the support set, is a fourth, in plain torch:

    prologue(tasks)    {name: [tasks, ...]}, the values of the leaves declared with ``per_task``, as differentiable functions of what is outer-learned;
                       under ``PENALTY`` [tasks], where there is one, what is added to the outer loss of each task
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmaml import options
from fastmaml.batch import TaskBatch
from fastmaml.plan import Rate
from fastmaml.program import ROLES

if TYPE_CHECKING:
    from fastmaml.parameterisation.rewriter import Rewriter


PENALTY = "penalty"


class Kind(NamedTuple):
    """Of a leaf: role "adapted" | "outer" | "const"; home "meta" (one for all tasks) | "task" (the prologue gives it).

    learned: of an adapted leaf, whether its initial value is outer-learned."""

    role: str
    home: str = "meta"
    learned: bool = True


@dataclass(frozen=True)
class Network:
    """The user's model: its parameters by name (a tied one once), and the patterns of ``adapt=``."""

    model: nn.Module
    adapt: str | Sequence[str]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    @property
    def matched(self) -> list[str]:
        """Names of the trainable parameters that match ``adapt=``."""
        return options.adapted_names(self.model, self.adapt)

    def weights(self) -> dict[str, nn.Parameter]:
        """The weights of Linear and Conv2d layers."""
        layers = {id(m.weight) for m in self.model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
        return {name: p for name, p in self.parameters.items() if id(p) in layers}

    def head(self) -> str:
        """The last Linear layer: the name of its weight."""
        found = [n for n, p in self.parameters.items() if any(p is m.weight for m in self.model.modules() if isinstance(m, nn.Linear))]
        if not found:
            raise ValueError("the model has no Linear layer that could be its head: name the head's parameters, as in head='classifier.*'")
        return found[-1]

    def matching(self, patterns: str | Sequence[str], what: str, among: Sequence[str] | None = None) -> list[str]:
        """Names that match one of ``patterns``; each has to match something. ``what``: the argument, for the message."""
        names = list(self.parameters) if among is None else list(among)
        given = [patterns] if isinstance(patterns, str) else patterns
        if not isinstance(given, Sequence) or not given or not all(isinstance(p, str) for p in given):
            raise TypeError(f"{what}={patterns!r}: expected a pattern of parameter names such as 'head.*', the name of a module, or a list of them")
        for pattern in given:
            if not any(options.matches(name, pattern) for name in names):
                raise ValueError(f"{what}={pattern!r} matches none of {', '.join(names) or 'none'}")
        return [name for name in names if any(options.matches(name, pattern) for pattern in given)]


@dataclass(frozen=True)
class Tasks:
    """What a prologue may read.

    batch       the tasks
    parameters  by name: the network's parameters and the parameterisation's leaves, as autograd sees them
    rates       the inner learning rate of each adapted leaf, likewise
    seeds       one per task, for noise
    inputs_of   inputs_of(weight): what the layer with this weight reads of the support rows of all tasks, [sum n, ...], at theta_0; the rows of a task
                make the statistics of its batch normalisations
    """

    batch: TaskBatch
    parameters: Mapping[str, Tensor]
    rates: Mapping[str, Tensor]
    seeds: Sequence[int]
    inputs_of: Callable[[str], Tensor]

    def __len__(self) -> int:
        return len(self.batch)

    def noise(self, name: str, shape: Sequence[int]) -> Tensor:
        """[tasks, *shape], float64, uniform between 0 and 1: of a task always the same for its seed, wherever in the batch it stands."""
        drawn, generator = torch.empty(len(self), *shape, dtype=torch.float64), torch.Generator()
        salt = sum(ord(c) * 31**i for i, c in enumerate(name)) % 2**31
        for row, seed in zip(drawn, self.seeds, strict=True):
            row.uniform_(generator=generator.manual_seed((seed ^ salt) % 2**63))
        return drawn.to(next(iter(self.parameters.values())).device)


class Parameterisation(nn.Module):
    """The network's parameters themselves: ``full``, and the base of all others.

    name          of the family member, in ``explain()`` and in checkpoints; its leaves are called ``<name>.<leaf>``
    kinds         of the leaves it brings
    takes_adapt   whether ``adapt=`` says which of the network's parameters are adapted, or the parameterisation itself
    """

    name = "full"
    takes_adapt = True

    def __init__(self) -> None:
        super().__init__()
        self.kinds: dict[str, Kind] = {}
        self._within: dict[str, tuple[str, str]] = {}  # leaves that belong to a module: its name, theirs
        self.belongs = False  # to a MAML object

    # ------------------------------------------------------------------------------------------------- what a subclass says
    def declare(self, network: Network) -> None:
        """Brings its leaves. Raises ValueError for a network that it does not fit."""

    def roles(self, network: Network) -> dict[str, Kind]:
        """Of the network's parameters: those that ``adapt=`` names are adapted, other trainable ones outer-learned, the rest constant."""
        adapted = set(network.matched)
        return {name: Kind("adapted" if name in adapted else "outer" if p.requires_grad else "const") for name, p in network.parameters.items()}

    def rewrite(self, r: Rewriter) -> None:
        """Substitutes leaves by expressions, or inserts layers."""

    def prologue(self, tasks: Tasks) -> Mapping[str, Tensor]:
        """Values of the leaves of each task, and a penalty: see above."""
        return {}

    def sources(self) -> list[Tensor]:
        """Tensors beside the parameters that the prologue's values depend on, and that want their gradient."""
        return []

    def task_rates(self, rates: Mapping[str, Rate]) -> Mapping[str, Rate]:
        """The Rates of the Plan, from those of ``inner_lr=``. A rate with home "task" is called rate.<leaf>, and the prologue gives it."""
        return rates

    def settings(self) -> Mapping[str, Any]:
        """What it was built with: checkpoints carry it, and it must agree when one is loaded."""
        return {}

    # ------------------------------------------------------------------------------------------------- leaves
    def outer(self, name: str, value: Tensor) -> None:
        """A new outer-learned leaf, constant in the inner loop."""
        self._add(name, value, Kind("outer"))

    def adapted(self, name: str, value: Tensor, learned: bool = True) -> None:
        """A new leaf that the inner loop changes, beginning at ``value``, which is outer-learned (or, without ``learned``, always where it begins)."""
        self._add(name, value, Kind("adapted", learned=learned))

    def constant(self, name: str, value: Tensor) -> None:
        self._add(name, value, Kind("const"))

    def per_task(self, name: str, shape: Sequence[int], role: str = "outer") -> None:
        """A new leaf that the prologue gives for each task."""
        self._add(name, self._like.new_zeros(shape), Kind(role, "task"))

    def outer_module(self, name: str, module: nn.Module) -> None:
        """The parameters of a module that the prologue calls: outer-learned, under ``<name>.<parameter>``."""
        module.to(self._like)
        for parameter, _ in module.named_parameters():
            full = f"{self.name}.{name}.{parameter}"
            self.kinds[full] = Kind("outer")
            self._within[full] = (name, parameter)

    def _add(self, name: str, value: Tensor, kind: Kind) -> None:
        if kind.role not in ROLES:
            raise ValueError(f"leaf {name!r}: role {kind.role!r} is not one of {', '.join(ROLES)}")
        full = f"{self.name}.{name}"
        if full in self.kinds or full in self._taken:
            raise ValueError(f"the name {full!r} is already that of a parameter")
        self.kinds[full] = kind
        value = value.detach().to(self._like, copy=True).contiguous()
        if kind.home == "meta" and kind.role != "const" and kind.learned:
            self.register_parameter(_key(full), nn.Parameter(value))
        else:
            self.register_buffer(_key(full), value)

    def values(self) -> dict[str, Tensor]:
        """The leaves it brings, by name; of those of each task a placeholder."""
        modules = {full: getattr(self, name).get_parameter(inner) for full, (name, inner) in self._within.items()}
        return {full: modules[full] if full in modules else getattr(self, _key(full)) for full in self.kinds}

    def place(self, full: str) -> str | None:
        """Of a leaf that belongs to a module of this one: where."""
        return ".".join(self._within[full]) if full in self._within else None

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Those that are outer-learned."""
        yield from ((full, p) for full, p in self.values().items() if isinstance(p, nn.Parameter))

    def groups(self) -> Iterator[tuple[str, list[nn.Parameter]]]:
        """(name of a group for an outer optimizer, its parameters)"""
        yield self.name, [p for _, p in self.trained()]

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it, under the leaves' names: what is learned, and constants that may have been drawn."""
        return {full: value for full, value in self.values().items() if self.kinds[full].home == "meta"}

    # ------------------------------------------------------------------------------------------------- for MAML
    @property
    def is_identity(self) -> bool:
        """Whether the network's parameters are used as they are."""
        return type(self).rewrite is Parameterisation.rewrite

    @property
    def has_prologue(self) -> bool:
        return type(self).prologue is not Parameterisation.prologue

    def start(self, model: nn.Module, adapt: str | Sequence[str]) -> None:
        """Declares its leaves for ``model``: of one MAML object."""
        if self.belongs:
            raise ValueError(f"this {self.signature} already belongs to a MAML object: build a new one, or copy.deepcopy the MAML object")
        for full in self.kinds:  # of a MAML object that could not be built
            self._parameters.pop(_key(full), None), self._buffers.pop(_key(full), None)
        self.kinds, self._within = {}, {}
        network = Network(model, adapt)
        self._like, self._taken = next(iter(network.parameters.values())).detach().new_empty(0), frozenset(network.parameters)
        self.declare(network)

    def looked_at(self, model: nn.Module, adapt: str | Sequence[str]) -> tuple[dict[str, nn.Parameter | Tensor], dict[str, Kind]]:
        """(parameters and leaves by name, their kinds) for the model as it is now."""
        network = Network(model, adapt)
        roles = self.roles(network)
        kinds = {**roles, **self.kinds}
        if not any(kind.role == "adapted" for kind in kinds.values()):
            raise ValueError(f"parameterisation {self.signature} adapts nothing of this model")
        return {**network.parameters, **self.values()}, kinds

    def frozen(self, model: nn.Module, adapt: str | Sequence[str]) -> set[str]:
        """Names of the network's trainable parameters that nobody trains."""
        if type(self).roles is Parameterisation.roles:
            return set()
        kinds = self.roles(Network(model, adapt))
        return {name for name, p in model.named_parameters() if p.requires_grad and name in kinds and not _trains(kinds[name])}

    @property
    def signature(self) -> str:
        """'mt_net(mask='unit')'"""
        given = ", ".join(f"{name}={value!r}" for name, value in self.settings().items())
        return f"{self.name}({given})" if given else self.name

    def extra_repr(self) -> str:
        return self.signature

    def _load_from_state_dict(self, *args: Any) -> None:
        """MAML does it: its state_dict has the leaves under their own names."""


def _trains(kind: Kind) -> bool:
    return kind.home == "meta" and kind.role != "const" and kind.learned


def _key(full: str) -> str:
    """nn.Module wants names without dots."""
    return full.replace(".", "/")
