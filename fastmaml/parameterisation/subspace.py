"""subspace: the inner loop moves in a subspace of the weights. T-nets and MT-nets, low rank, a dense basis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fastmaml.counts import check_count
from fastmaml.parameterisation.base import Kind, Network, Parameterisation, Tasks
from fastmaml.parameterisation.rewriter import Rewriter
from fastmaml.parameterisation.scale_shift import only_own
from fastmaml.plan import Rate

MASKS = (None, "unit", "weight")


class TNet(Parameterisation):
    """T-nets and MT-nets (Lee & Choi 2018): y = T (W x + b) in every layer, T [out, out] outer-learned from the identity, W and b adapted.

    mask         None: a T-net. MT-nets: only what a mask leaves moves, W <- W - alpha M * dL/dW, one draw per task for all of its steps.
                 "unit": one for each output unit, with its bias. "weight": one for each weight and each bias
    temperature  of the Gumbel-softmax, whose reverse stands for that of the draw (straight-through; Jang et al. 2017)
    logit        P(M = 1) = sigmoid(zeta), zeta outer-learned from here
    layers       name pattern(s) of the weights that get a T; None: all Linear and Conv2d layers

    T is composed into the weight, once per step (once per meta-iteration where nothing in the layer is adapted): no 1x1 convolution is run. What noise a
    task gets depends on its seed alone (``task_seeds=``). yoonholee/MT-net draws afresh at each step for mask="weight"; here, as for units, once.
    """

    def __init__(self, mask: str | None = None, temperature: float = 1.0, logit: float = 0.0, layers: str | Sequence[str] | None = None) -> None:
        super().__init__()
        if mask not in MASKS:
            raise ValueError(f"mask={mask!r}: choose None, 'unit' or 'weight'")
        if isinstance(temperature, bool) or not isinstance(temperature, Real) or not temperature > 0:
            raise ValueError(f"temperature={temperature!r}: expected a number above 0")
        self.mask, self.temperature, self.logit, self.layers = mask, float(temperature), float(logit), layers
        self.name = "t_net" if mask is None else "mt_net"

    def settings(self) -> Mapping[str, Any]:
        masks = {} if self.mask is None else {"mask": self.mask, "temperature": self.temperature}
        return {**masks, "layers": self.layers}

    @property
    def has_prologue(self) -> bool:
        return self.mask is not None

    def declare(self, network: Network) -> None:
        weights = network.weights()
        self._names = list(weights) if self.layers is None else network.matching(self.layers, "layers", list(weights))
        for name in self._names:
            self.outer(f"T.{name}", torch.eye(weights[name].shape[0]))
        self._shapes = {n: tuple(network.parameters[n].shape) for n in network.matched} if self.mask else {}
        for name, shape in self._shapes.items():
            key = self._logits(name)
            if f"{self.name}.{key}" not in self.kinds:
                self.outer(key, torch.full(shape[:1] if self.mask == "unit" else shape, self.logit))

    def _logits(self, name: str) -> str:
        """A layer's weight and bias share the mask of their units."""
        return f"logits.{name.rpartition('.')[0] if self.mask == 'unit' else name}"

    def rewrite(self, r: Rewriter) -> None:
        for name in (n for n in self._names if n in r):
            t, w, bias = r.own(f"T.{name}"), r.leaf(name), name.removesuffix("weight") + "bias"
            r.substitute(name, r.reshape(r.matmul(t, r.matrix(w)), *r.shape(w)))
            if bias in r:
                b = r.leaf(bias)
                r.substitute(bias, r.reshape(r.matmul(t, r.reshape(b, *r.shape(b), 1)), *r.shape(b)))

    def task_rates(self, rates: Mapping[str, Rate]) -> Mapping[str, Rate]:
        """The rate of a masked leaf: alpha M, of each task."""
        if self.mask is None:
            return rates
        if any(rate.per_step for rate in rates.values()):
            raise ValueError(f"inner_lr with one rate per step and parameterisation={self.signature}, whose masks serve all steps of a task: give one rate, or one per layer or element")
        masked = {n: replace(rate, name=f"rate.{n}", shape=self._shapes[n], learned=True, home="task") for n, rate in rates.items() if n in self._shapes}
        return {**rates, **masked}

    def prologue(self, tasks: Tasks) -> Mapping[str, Tensor]:
        logits = {key: tasks.parameters[f"{self.name}.{key}"] for key in dict.fromkeys(map(self._logits, self._shapes))}
        joined = torch.cat([v.flatten() for v in logits.values()])  # those of all layers and tasks at once
        noise = logistic(torch.cat([tasks.noise(key, v.shape).flatten(1) for key, v in logits.items()], 1)).to(joined.dtype)
        parts = straight_through(joined, noise, self.temperature).split([v.numel() for v in logits.values()], 1)
        masks = {key: part.unflatten(1, v.shape) for (key, v), part in zip(logits.items(), parts, strict=True)}
        out = {}
        for name, shape in ((n, shape) for n, shape in self._shapes.items() if n in tasks.rates):  # another of a list may have put it aside
            mask, rate = masks[self._logits(name)], tasks.rates[name]
            mask = mask.reshape(len(tasks), -1, *[1] * (len(shape) - 1)) if self.mask == "unit" else mask
            out[f"rate.{name}"] = (mask * rate).expand(len(tasks), *shape)
        return out


def logistic(u: Tensor) -> Tensor:
    """The difference of two Gumbel variables, from a uniform one."""
    u = u.clamp(1e-12, 1 - 1e-12)
    return u.log() - (-u).log1p()


def straight_through(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """Forward 1 where logits + noise > 0, reverse that of softmax([logits + g1, g2] / temperature)[0]."""
    soft = torch.sigmoid((logits + noise) / temperature)
    hard = (logits + noise > 0).to(soft)
    return hard.detach() + (soft - soft.detach())


class LowRank(Parameterisation):
    """W = W_0 + B A (Hu et al. 2022, LoRA, as a subspace of the inner loop): A [rank, in], B [out, rank], in every layer of ``layers``.

    adapt    which factors the inner loop changes: "both", "A" or "B"; the other is outer-learned only, as is W_0 (or frozen, with ``frozen``)
    learned  whether the initial A and B are outer-learned; else the inner loop always begins at the same A, and B = 0
    layers   name pattern(s) of weights; None: all Linear and Conv2d layers ([out, in kh kw])

    A begins as torch draws Linear weights, B at zero, so that the network begins as it was. Biases are outer-learned only.
    """

    name = "low_rank"
    takes_adapt = False

    def __init__(self, rank: int = 4, adapt: str = "both", learned: bool = True, layers: str | Sequence[str] | None = None, frozen: bool = False) -> None:
        super().__init__()
        rank = check_count("rank", rank)
        if adapt not in ("both", "A", "B"):
            raise ValueError(f"adapt={adapt!r}: choose 'both', 'A' or 'B'")
        self.rank, self.adapt, self.learn, self.layers, self.freeze = rank, adapt, bool(learned), layers, bool(frozen)

    def settings(self) -> Mapping[str, Any]:
        return {"rank": self.rank, "adapt": self.adapt, "learned": self.learn, "layers": self.layers, "frozen": self.freeze}

    def declare(self, network: Network) -> None:
        only_own(self, network)
        weights = network.weights()
        self._names = list(weights) if self.layers is None else network.matching(self.layers, "layers", list(weights))
        for name in self._names:
            out, inputs = weights[name].shape[0], weights[name][0].numel()
            factors = {"A": torch.nn.Linear(inputs, self.rank).weight, "B": torch.zeros(out, self.rank)}
            for factor, value in factors.items():
                if self.adapt in (factor, "both"):
                    self.adapted(f"{factor}.{name}", value, self.learn)
                else:
                    (self.outer if self.learn else self.constant)(f"{factor}.{name}", value)

    def roles(self, network: Network) -> dict[str, Kind]:
        return {name: Kind("outer" if p.requires_grad and not self.freeze else "const") for name, p in network.parameters.items()}

    def rewrite(self, r: Rewriter) -> None:
        for name in (n for n in self._names if n in r):
            w = r.leaf(name)
            product = r.matmul(r.own(f"B.{name}"), r.own(f"A.{name}"))
            r.substitute(name, r.add(w, r.reshape(product, *r.shape(w))))


class Basis(Parameterisation):
    """theta = theta_0 + U a: the inner loop moves ``size`` coordinates a along the columns of U, one a for all of the network.

    basis    "random" (columns of norm about 1, fixed), "learned" (from there, outer-learned), or {name of a parameter: U [elements, size]}, fixed
    learned  whether the initial a is outer-learned; else it is zero
    The gradient of a is U^T dL/dtheta: U takes size times the memory of the network, so this is for small ones (Li et al. 2018, intrinsic dimension).
    ``adapt=`` says which parameters move; all are outer-learned, as theta_0.
    """

    name = "basis"

    def __init__(self, size: int = 8, basis: str | Mapping[str, Tensor] = "random", learned: bool = False) -> None:
        super().__init__()
        size = check_count("size", size)
        if not isinstance(basis, Mapping) and basis not in ("random", "learned"):
            raise ValueError(f"basis={basis!r}: choose 'random', 'learned', or {{name of a parameter: tensor [elements, size]}}")
        self.size, self.basis, self.learn = size, basis, bool(learned)

    def settings(self) -> Mapping[str, Any]:
        return {"size": self.size, "basis": self.basis if isinstance(self.basis, str) else "given", "learned": self.learn}

    def declare(self, network: Network) -> None:
        given = isinstance(self.basis, Mapping)
        self._names = network.matching(list(self.basis), "basis") if given else network.matched
        self.adapted("a", torch.zeros(self.size, 1), self.learn)
        total = sum(network.parameters[name].numel() for name in self._names)
        for name in self._names:
            shape = (network.parameters[name].numel(), self.size)
            u = self.basis[name] if given else torch.randn(shape) / total**0.5
            if tuple(u.shape) != shape:
                raise ValueError(f"basis[{name!r}] has shape {list(u.shape)}: expected {list(shape)}, [elements of the parameter, size]")
            (self.outer if self.basis == "learned" else self.constant)(f"U.{name}", u)

    def roles(self, network: Network) -> dict[str, Kind]:
        return {name: Kind("outer" if p.requires_grad else "const") for name, p in network.parameters.items()}

    def rewrite(self, r: Rewriter) -> None:
        a = r.own("a")
        for name in (n for n in self._names if n in r):
            p = r.leaf(name)
            r.substitute(name, r.add(p, r.reshape(r.matmul(r.own(f"U.{name}"), a), *r.shape(p))))
