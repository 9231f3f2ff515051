"""The parameters of a MAML object and its state: those of the user's model under their own names, and the learned rates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastmaml.engine import Engine
from fastmaml.rates import InnerRates


class Trained(nn.Module):
    """A model with its inner rates, and the engine that runs them."""

    model: nn.Module
    rates: InnerRates
    adapt_patterns: str | list[str]

    def _start(self) -> None:
        self._engine = Engine(self._modules, self.adapt_patterns, self.rates)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The model's own parameters under their own names, then the learned rates."""
        yield from self.model.named_parameters(*args, **kwargs)
        prefix = args[0] if args else kwargs.get("prefix", "")
        yield from ((f"{prefix}.{name}" if prefix else name, rate) for name, rate in self.rates.learned())

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        yield from (p for _, p in self.named_parameters(recurse=recurse))

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The model's state_dict, plus the learned rates."""
        state = self.model.state_dict(*args, **kwargs)
        prefix = args[1] if len(args) > 1 else kwargs.get("prefix", "")
        for name, rate in self.rates.learned():
            state[prefix + name] = rate if kwargs.get("keep_vars") else rate.detach()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        learned = dict(self.rates.learned())
        missing = [name for name in learned if name not in state_dict]
        if strict and missing:
            raise RuntimeError(f"the state has no {missing[0]!r}: it was saved without learn_inner_lr=True")
        for name in learned.keys() - missing:
            if state_dict[name].shape != learned[name].shape:
                raise RuntimeError(f"{name!r} has shape {list(state_dict[name].shape)} in the state, {list(learned[name].shape)} here")
        result = self.model.load_state_dict({n: v for n, v in state_dict.items() if n not in learned}, strict, assign)
        with torch.no_grad():
            for name in learned.keys() - missing:
                learned[name].copy_(state_dict[name])
        return result

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As part of a larger module (DDP): torch looks for the model's entries under "model.", where state_dict did not put them."""
        learned = dict(self.rates.learned())
        for key in [key for key in state_dict if key.startswith(prefix)]:
            name, value = key.removeprefix(prefix), state_dict.pop(key)
            if name in learned:
                with torch.no_grad():
                    learned[name].copy_(value)
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
