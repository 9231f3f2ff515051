"""latent: the weights of a head are decoded from a code that the inner loop changes. The first of LEO's two inner loops, and the second."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastmaml.parameterisation.base import Kind, Network, Parameterisation, Tasks
from fastmaml.parameterisation.rewriter import Rewriter
from fastmaml.plan import Rate


class Given(Parameterisation):
    """Leaves of each task that somebody else has made: ``given``, {leaf: [tasks, ...]}, set before each call. Their gradients go back into their graph."""

    def __init__(self) -> None:
        super().__init__()
        self.given: dict[str, Tensor] = {}

    def task_rates(self, rates: Mapping[str, Rate]) -> Mapping[str, Rate]:
        return {n: replace(r, name=f"rate.{n}", shape=tuple(self.values()[n].shape), learned=True, home="task") for n, r in rates.items()}

    def prologue(self, tasks: Tasks) -> Mapping[str, Tensor]:
        return self.given

    def sources(self) -> list[Tensor]:
        return [v for v in self.given.values() if v.requires_grad]

    def roles(self, network: Network) -> dict[str, Kind]:
        return dict.fromkeys(network.parameters, Kind("const"))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "given": {}}


class Latent(Given):
    """w_n = mu + (exp(s) - 1 + offset) * noise with [mu, s] = D z_n, for each row w_n of a Linear layer without bias; z [outputs, size] adapted, D
    [2 inputs, size] outer-learned (Rusu et al. 2019, eq. 3 to 6)."""

    name = "latent"

    def __init__(self, size: int, offset: float) -> None:
        super().__init__()
        self.size, self.offset = size, offset

    def settings(self) -> Mapping[str, Any]:
        return {"size": self.size}

    def declare(self, network: Network) -> None:
        self._weight = network.head()
        outputs, inputs = network.parameters[self._weight].shape
        self.per_task("z", (outputs, self.size), "adapted")
        self.per_task("noise", (outputs, inputs), "const")
        self.outer("decoder", torch.nn.Linear(self.size, 2 * inputs).weight)
        self.constant("offset", torch.full((1,), self.offset - 1))

    def rewrite(self, r: Rewriter) -> None:
        d = r.shape(r.leaf(self._weight))[1]
        out = r.matmul(r.own("z"), r.op("transpose", r.own("decoder")))
        mean, scale = (r.op("slice", out, dim=1, start=i * d, stop=(i + 1) * d) for i in (0, 1))
        r.substitute(self._weight, r.add(mean, r.mul(r.add(r.op("exp", scale), r.own("offset")), r.own("noise"))))


class Start(Given):
    """A Linear layer without bias whose weight begins, for each task, where somebody else says."""

    name = "start"

    def declare(self, network: Network) -> None:
        self._weight = network.head()
        self.per_task("weight", network.parameters[self._weight].shape, "adapted")

    def rewrite(self, r: Rewriter) -> None:
        r.substitute(self._weight, r.own("weight"))
