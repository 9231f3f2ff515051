"""The parameters of a MAML object and its state: those of the user's model under their own names, those of its parameterisation, and the learned rates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastmaml.engine import Engine
from fastmaml.parameterisation import Parameterisation
from fastmaml.rates import InnerRates

SIGNATURE = "parameterisation"  # entry of a state_dict: the signature as bytes; not there for "full"


class Trained(nn.Module):
    """A model with its parameterisation and its inner rates, and the engine that runs them."""

    model: nn.Module
    parameterisation: Parameterisation
    rates: InnerRates
    adapt_patterns: str | list[str]

    def _start(self) -> None:
        self._engine = Engine(self._modules, self.adapt_patterns, self.rates)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """What is outer-learned: the model's own parameters under their own names (but those that the parameterisation freezes), its own, the learned rates."""
        prefix = args[0] if args else kwargs.get("prefix", "")
        prefix = f"{prefix}." if prefix else ""
        frozen = {prefix + name for name in self.parameterisation.frozen(self.model, self.adapt_patterns)}
        yield from ((name, p) for name, p in self.model.named_parameters(*args, **kwargs) if name not in frozen)
        yield from ((prefix + name, p) for name, p in self._added().items())

    def _added(self) -> dict[str, nn.Parameter]:
        """Beside the model's."""
        return {**dict(self.parameterisation.trained()), **dict(self.rates.learned())}

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        yield from (p for _, p in self.named_parameters(recurse=recurse))

    def parameter_groups(self, lr: Mapping[str, float] | None = None) -> list[dict[str, Any]]:
        """For an outer optimizer, as ``torch.optim.Adam(maml.parameter_groups({"model": 1e-3, "scale_shift": 1e-4}))``: "model", the name of the
        parameterisation, or of each in a list (its own parameters), "inner_lr" (learned rates); of these, what there is.

        lr: outer rates by name of the group; others take the optimizer's. Raises ValueError for a name that is none."""
        own, rates = dict(self.parameterisation.trained()), dict(self.rates.learned())
        model = [p for name, p in self.named_parameters() if name not in own and name not in rates and p.requires_grad]
        groups = {"model": model, **dict(self.parameterisation.groups()), "inner_lr": list(rates.values())}
        groups = {name: found for name, found in groups.items() if found}
        unknown = [name for name in lr or () if name not in groups]
        if unknown:
            raise ValueError(f"there is no group {unknown[0]!r}; the groups are {', '.join(groups)}")
        return [{"name": name, "params": found, **({"lr": lr[name]} if lr and name in lr else {})} for name, found in groups.items()]

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The model's state_dict, plus the parameterisation with its own leaves, plus the learned rates."""
        state = self.model.state_dict(*args, **kwargs)
        prefix = args[1] if len(args) > 1 else kwargs.get("prefix", "")
        keep = kwargs.get("keep_vars", False)
        for name, value in self._stored().items():
            state[prefix + name] = value if keep else value.detach()
        if self._signature is not None:
            state[prefix + SIGNATURE] = torch.tensor(list(self._signature.encode()), dtype=torch.uint8)
        return state

    def _stored(self) -> dict[str, Tensor]:
        return {**self.parameterisation.state(), **dict(self.rates.learned())}

    @property
    def _signature(self) -> str | None:
        return None if self.parameterisation.signature == Parameterisation.name else self.parameterisation.signature

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        self._check_signature(state_dict.get(SIGNATURE))
        stored = self._stored()
        missing = [name for name in stored if name not in state_dict]
        if strict and missing:
            why = "it was saved without learn_inner_lr=True" if missing[0] in dict(self.rates.learned()) else "it is of another model"
            raise RuntimeError(f"the state has no {missing[0]!r}: {why}")
        for name in stored.keys() - missing:
            if state_dict[name].shape != stored[name].shape:
                raise RuntimeError(f"{name!r} has shape {list(state_dict[name].shape)} in the state, {list(stored[name].shape)} here")
        result = self.model.load_state_dict({n: v for n, v in state_dict.items() if n not in stored and n != SIGNATURE}, strict, assign)
        with torch.no_grad():
            for name in stored.keys() - missing:
                stored[name].copy_(state_dict[name])
        return result

    def _check_signature(self, saved: Tensor | None) -> None:
        theirs = Parameterisation.name if saved is None else bytes(saved.tolist()).decode()
        if theirs != self.parameterisation.signature:
            raise RuntimeError(
                f"the state was saved with parameterisation {theirs}, this object has {self.parameterisation.signature}: build it with the former to load it"
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As part of a larger module (DDP): torch looks for the model's entries under "model.", where state_dict did not put them."""
        stored = self._stored()
        self._check_signature(state_dict.pop(prefix + SIGNATURE, None))
        for key in [key for key in state_dict if key.startswith(prefix)]:
            name, value = key.removeprefix(prefix), state_dict.pop(key)
            if name in stored:
                with torch.no_grad():
                    stored[name].copy_(value)
                inner = self.parameterisation.place(name)
                if inner is not None:  # torch looks for the modules that a prologue calls
                    state_dict[f"{prefix}parameterisation.{inner}"] = value
            else:
                state_dict[f"{prefix}model.{name}"] = value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Trained:
        """.to(), .double(): the rates move along."""
        super()._apply(fn, recurse)
        self._engine.view()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Plans, native handles and workspaces are made anew after a copy or a load."""
        return {name: value for name, value in self.__dict__.items() if name != "_engine"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start()
