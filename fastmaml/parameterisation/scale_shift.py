"""scale_shift: the layers of a network are scaled and shifted. MTL, channel-wise scale and shift, FiLM, CAVIA's contexts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fastmaml.counts import check_count
from fastmaml.parameterisation.base import Kind, Network, Parameterisation
from fastmaml.parameterisation.rewriter import Rewriter

ADAPT = ("head", "scale_shift", "both")


class ScaleShift(Parameterisation):
    """SS(x) = (W * scale) x + (b + shift) in every layer but the head (Sun et al. 2019, "Meta-Transfer Learning for Few-Shot Learning", eq. 4 and 5).

    adapt    what the inner loop changes: "head" (MTL), "scale_shift", or "both". Scale, shift and head are outer-learned in any case.
    kernel   True: a scale for each kernel, [out, in, 1, 1] (MTL). False: one for each channel of the output, y -> scale y + shift, which needs no
             product for the gradient of a weight
    layers   name pattern(s) of the weights that are scaled; None: those of all Linear and Conv2d layers but the head
    frozen   whether W and b stay as they are (pretrained), or are outer-learned
    """

    name = "scale_shift"
    takes_adapt = False

    def __init__(self, adapt: str = "head", kernel: bool = True, layers: str | Sequence[str] | None = None, frozen: bool = True) -> None:
        super().__init__()
        if adapt not in ADAPT:
            raise ValueError(f"adapt={adapt!r}: choose one of {', '.join(map(repr, ADAPT))}")
        self.adapt, self.kernel, self.layers, self.freeze = adapt, bool(kernel), layers, bool(frozen)

    def settings(self) -> Mapping[str, Any]:
        return {"adapt": self.adapt, "kernel": self.kernel, "layers": self.layers, "frozen": self.freeze}

    def _scaled(self, network: Network) -> list[str]:
        head, weights = network.head(), network.weights()
        names = [n for n in weights if n != head] if self.layers is None else network.matching(self.layers, "layers", list(weights))
        if not names:
            raise ValueError(f"parameterisation {self.signature}: the model has no Linear or Conv2d layer below its head to scale")
        return names

    def declare(self, network: Network) -> None:
        only_own(self, network)
        self._names = self._scaled(network)
        add = self.outer if self.adapt == "head" else self.adapted
        for name in self._names:
            p = network.parameters[name]
            shape = (*p.shape[:2], *[1] * (p.dim() - 2)) if self.kernel else (p.shape[0],)
            add(f"scale.{name}", torch.ones(shape))
            if not self.kernel or _bias(name) in network.parameters:  # MTL shifts the biases that are there
                add(f"shift.{name}", torch.zeros(p.shape[0]))

    def roles(self, network: Network) -> dict[str, Kind]:
        """The head is adapted or outer-learned; all else is frozen with W and b, or outer-learned with them."""
        head, out = network.head(), {}
        for name, p in network.parameters.items():
            if not p.requires_grad:
                out[name] = Kind("const")
            elif name in (head, _bias(head)):
                out[name] = Kind("outer" if self.adapt == "scale_shift" else "adapted")
            else:
                out[name] = Kind("const" if self.freeze else "outer")
        return out

    def rewrite(self, r: Rewriter) -> None:
        for name in (n for n in self._names if n in r):
            scale = r.own(f"scale.{name}")
            if not self.kernel:
                r.film(name, scale, r.own(f"shift.{name}"), after_norm=False)
                continue
            r.substitute(name, r.mul(r.leaf(name), scale))
            if _bias(name) in r:
                r.substitute(_bias(name), r.add(r.leaf(_bias(name)), r.own(f"shift.{name}")))


class Context(Parameterisation):
    """CAVIA (Zintgraf et al. 2019): the inner loop changes a small context vector alone, which begins at zero for every task.

    size     of the context
    layers   FiLM: name pattern(s) of the weights whose layers the context modulates (after the normalisation that follows, where one does):
             y -> gamma y + beta, with gamma and beta linear in the context. None: the context is concatenated to the input of the first layer, a Linear
    """

    name = "cavia"
    takes_adapt = False

    def __init__(self, size: int = 5, layers: str | Sequence[str] | None = None) -> None:
        super().__init__()
        size = check_count("size", size)
        self.size, self.layers = size, layers

    def settings(self) -> Mapping[str, Any]:
        return {"size": self.size, "layers": self.layers}

    def declare(self, network: Network) -> None:
        only_own(self, network)
        weights = network.weights()
        self.adapted("context", torch.zeros(self.size, 1), learned=False)
        if self.layers is None:
            self._names = [next(iter(weights), "")]
            p = weights.get(self._names[0])
            if p is None or p.dim() != 2 or _bias(self._names[0]) not in network.parameters:
                raise ValueError("a context joins the input of a first layer that is a Linear with a bias; this model begins otherwise: name layers=, for FiLM")
            maps = {f"weight.{self._names[0]}": nn.Linear(p.shape[1] + self.size, p.shape[0]).weight[:, p.shape[1] :]}  # as if they had been built together
        else:
            self._names, maps = network.matching(self.layers, "layers", list(weights)), {}
            for name in self._names:
                film = nn.Linear(self.size, 2 * weights[name].shape[0])
                maps |= {f"weight.{name}": film.weight, f"bias.{name}": film.bias}
        for name, value in maps.items():
            self.outer(name, value)

    def roles(self, network: Network) -> dict[str, Kind]:
        return {name: Kind("outer" if p.requires_grad else "const") for name, p in network.parameters.items()}

    def rewrite(self, r: Rewriter) -> None:
        context = r.own("context")
        for name in (n for n in self._names if n in r):
            out = r.matmul(r.own(f"weight.{name}"), context)
            if self.layers is None:  # W [x, c] + b = W_x x + (W_c c + b)
                r.substitute(_bias(name), r.add(r.leaf(_bias(name)), r.reshape(out, r.shape(out)[0])))
                continue
            both = r.add(r.reshape(out, r.shape(out)[0]), r.own(f"bias.{name}"))
            c = r.shape(both)[0] // 2
            gamma, beta = (r.op("slice", both, dim=0, start=i * c, stop=(i + 1) * c) for i in (0, 1))
            r.film(name, gamma, beta, after_norm=True)


def only_own(parameterisation: Parameterisation, network: Network) -> None:
    """Refuses ``adapt=`` where the parameterisation itself says what is adapted."""
    if network.adapt != "*":
        raise ValueError(f"adapt={network.adapt!r} and parameterisation={parameterisation.signature}: the parameterisation says what is adapted")


def _bias(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"
