"""Problems that the methods were made for, each with the methods that are held against each other on it: for ``benchmarks.family_learning``.

A method is a function () -> MAML object (or LEO). What comes first in a problem's methods is what the others are compared with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import fastmaml
from fastmaml import MAML, TaskBatch, methods
from fastmaml.parameterisation import SetEncoder

Methods = dict[str, Callable[[], nn.Module]]


class Problem(Protocol):
    tasks: int  # of a meta-iteration
    measure: str  # what is measured on new tasks: "error", the mean squared one, or "accuracy"
    methods: Methods

    def source(self, split: str, seed: int) -> Any:
        """With ``sample(tasks) -> TaskBatch``. What is drawn from "test" was never seen in "train"."""
        ...


# ------------------------------------------------------------------------------------------------- regression
REGRESSION = {"inner_lr": 0.01, "inner_steps": 5, "loss": "mse", "on_nonfinite": "skip"}


def mlp() -> nn.Module:
    return fastmaml.nn.SinusoidMLP(init="torch")


class Sinusoids:
    """Finn et al. 2017: 10 support and 10 query points."""

    tasks, measure = 25, "error"
    methods: Methods = {
        "MAML": lambda: MAML(mlp(), **REGRESSION),
        "CAVIA, context=5, inner_lr=0.5": lambda: methods.CAVIA(mlp(), context=5, **REGRESSION | {"inner_lr": 0.5}),
        "TNets": lambda: methods.TNets(mlp(), **REGRESSION),
        "MTNets": lambda: methods.MTNets(mlp(), **REGRESSION),
        "LowRankMAML, rank=4": lambda: methods.LowRankMAML(mlp(), rank=4, **REGRESSION),
        "SubspaceMAML, size=8, learned": lambda: methods.SubspaceMAML(mlp(), size=8, basis="learned", **REGRESSION),
        "Reptile, inner_lr=0.02": lambda: methods.Reptile(mlp(), **REGRESSION | {"inner_lr": 0.02}),
    }

    def source(self, split: str, seed: int) -> Any:
        return fastmaml.tasks.Sinusoid(seed=seed + 1000 * (split == "test"))  # any sinusoid is a new one


class Rates:
    """Lee & Choi 2018 (experiments/sine.sh of their code): sinusoids of frequencies in [0.8, 1.2], 4 tasks, one inner step, at each of three inner rates."""

    tasks, measure = 4, "error"

    def __init__(self) -> None:
        def made(method: Callable[..., nn.Module], rate: float) -> Callable[[], nn.Module]:
            return lambda: method(mlp(), **REGRESSION | {"inner_lr": rate, "inner_steps": 1})

        kinds = {"MAML": MAML, "TNets": methods.TNets, "MTNets": methods.MTNets}
        self.methods: Methods = {f"{name}, inner_lr={rate}": made(method, rate) for rate in (0.01, 0.04, 0.1) for name, method in kinds.items()}

    def source(self, split: str, seed: int) -> Rates:
        self.generator = torch.Generator().manual_seed(seed + 1000 * (split == "test"))
        return self

    def sample(self, tasks: int) -> TaskBatch:
        amplitude, phase, frequency = (a + (b - a) * torch.rand(tasks, 1, 1, generator=self.generator) for a, b in ((0.1, 5), (0, math.pi), (0.8, 1.2)))
        x = -5 + 10 * torch.rand(tasks, 20, 1, generator=self.generator)
        y = amplitude * torch.sin(frequency * x - phase)
        return TaskBatch.from_tensors(x[:, :10], y[:, :10], x[:, 10:], y[:, 10:])


class Modes:
    """A third each of sinusoids (as Finn et al. 2017), lines and parabolas, x uniform in [-5, 5]: one initialisation has to serve three modes."""

    tasks, measure = 25, "error"
    methods: Methods = {
        "MAML": lambda: MAML(mlp(), **REGRESSION),
        "Mixture, components=3": lambda: methods.Mixture(mlp(), components=3, temperature=1.0, **REGRESSION),
        "MMAML": lambda: methods.MMAML(mlp(), SetEncoder(1, 1), **REGRESSION),
        "HSML": lambda: methods.HSML(mlp(), SetEncoder(1, 1), **REGRESSION),
    }

    def source(self, split: str, seed: int) -> Modes:
        self.generator = torch.Generator().manual_seed(seed + 1000 * (split == "test"))
        return self

    def sample(self, tasks: int) -> TaskBatch:
        def uniform(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(tasks, 1, 1, generator=self.generator)

        x = -5 + 10 * torch.rand(tasks, 20, 1, generator=self.generator)
        kinds = torch.arange(tasks).remainder(3).view(-1, 1, 1)
        sine = uniform(0.1, 5) * torch.sin(x - uniform(0, math.pi))
        line = uniform(-1, 1) * x + uniform(-3, 3)
        parabola = uniform(-0.2, 0.2) * (x - uniform(-3, 3)) ** 2 + uniform(-3, 3)
        y = torch.where(kinds == 0, sine, torch.where(kinds == 1, line, parabola))
        return TaskBatch.from_tensors(x[:, :10], y[:, :10], x[:, 10:], y[:, 10:])


# ------------------------------------------------------------------------------------------------- characters
def strided(ways: int) -> nn.Module:
    return fastmaml.nn.OmniglotCNN(ways)


class Characters:
    """Omniglot, 1-shot, 1 query of each class: a network of four strided convolutions, trained from nothing."""

    tasks, measure, ways = 32, "accuracy", 5

    def __init__(self, data: Path) -> None:
        def made(method: Callable[..., nn.Module], **options: Any) -> Callable[[], nn.Module]:
            return lambda: method(strided(self.ways), **{"inner_lr": 0.4, "inner_steps": 3, "on_nonfinite": "skip"} | options)

        self.data = data
        self.methods: Methods = {
            "MAML": made(MAML),
            "FirstOrderMAML": made(methods.FirstOrderMAML),
            "iMAML, 16 steps at 0.1": made(methods.iMAML, inner_lr=0.1, inner_steps=16),
            "MetaSGD, inner_lr=0.4": made(methods.MetaSGD),
            "MAMLPlusPlus": made(methods.MAMLPlusPlus, inner_lr=0.1),
            "ANIL": made(methods.ANIL),
            "BOIL": made(methods.BOIL),
            "ChannelScaleShift, adapt='both', frozen=False": made(methods.ChannelScaleShift, adapt="both", frozen=False),
            "ProtoMAML, inner_lr=0.1": made(methods.ProtoMAML, inner_lr=0.1),
        }

    def source(self, split: str, seed: int) -> Any:
        return fastmaml.tasks.Omniglot(self.data, split, ways=self.ways, seed=seed + 1000 * (split == "test"))


class Pretrained(Characters):
    """The same, 20-way, with a body that was trained to tell all characters of the training split apart, upright and turned."""

    tasks, ways = 16, 20

    def __init__(self, data: Path) -> None:
        self.data = data

        options = {"inner_lr": 1.0, "inner_steps": 10, "batchnorm": "running", "on_nonfinite": "skip"}

        def mtl() -> nn.Module:
            return methods.MTL(self.network(), pretrained=self.trained(), **options)

        def head() -> nn.Module:
            network = self.network()
            network.load_state_dict(self.trained(), strict=False)
            return methods.HeadOnly(network, **options)

        self.methods: Methods = {"HeadOnly": head, "MTL": mtl}

    def network(self) -> nn.Module:
        """Its head begins at zero: drawn as for training from nothing it would drown what the features say."""
        network = strided(self.ways)
        nn.init.zeros_(network.classifier.weight)
        return network

    def trained(self) -> dict[str, Tensor]:
        return pretrain(self.data)


class Embeddings(Pretrained):
    """Fixed embeddings of the characters, [n, 64], by the same body: a linear classifier is all there is to adapt."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.methods: Methods = {
            "MAML, a linear classifier": lambda: MAML(nn.Linear(64, self.ways), inner_lr=1.0, inner_steps=10),
            "ZeroHead": lambda: methods.ZeroHead(nn.Linear(64, self.ways), inner_lr=1.0, inner_steps=10),
            "LEO": lambda: methods.LEO(64, self.ways, latent=64, weight_lr=0.1),
        }

    def source(self, split: str, seed: int) -> Any:
        return Embedded(super().source(split, seed), self.trained())


class Embedded:
    """The tasks of a source, through a frozen body."""

    def __init__(self, source: Any, weights: dict[str, Tensor]) -> None:
        network = strided(20)
        network.load_state_dict(weights, strict=False)
        self.images, self.body = source, nn.Sequential(*list(network)[:-1]).eval()  # all but the classifier

    @torch.no_grad()
    def sample(self, tasks: int) -> TaskBatch:
        support_x, support_y, query_x, query_y = self.images.sample(tasks).stacked()
        embedded = [self.body(x.flatten(0, 1)).unflatten(0, x.shape[:2]) for x in (support_x, query_x)]
        return TaskBatch.from_tensors(embedded[0], support_y, embedded[1], query_y)


@cache
def pretrain(data: Path, batches: int = 1000, seed: int = 0) -> dict[str, Tensor]:
    """Entries of a body that tells the classes of the training split apart, by plain torch: each batch has two drawings of one turn of each character."""
    torch.manual_seed(seed)
    first = fastmaml.tasks.Omniglot(data, "train", seed=seed)
    source = fastmaml.tasks.Omniglot(data, "train", ways=len(first.characters), tasks=1, seed=seed)
    network = strided(len(source.classes))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(batches):
        batch, classes = source.sample(return_classes=True)
        support_x, _, query_x, _ = batch.stacked()
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(torch.cat([support_x[0], query_x[0]])), classes[0].repeat(2)).backward()
        optimizer.step()
    return {name: value for name, value in network.state_dict().items() if not name.startswith("classifier.")}


def problem(name: str, data: Path | None) -> Problem:
    """Of this name. ValueError where it needs files and there is no ``data``."""
    made = PROBLEMS[name]
    if made in (Sinusoids, Rates, Modes):
        return made()
    if data is None:
        raise ValueError(f"{name} is read from files you have: --data FOLDER, with Omniglot's published zips")
    return made(data)


PROBLEMS: dict[str, Any] = {
    "sinusoid": Sinusoids,
    "rates": Rates,
    "modes": Modes,
    "omniglot": Characters,
    "pretrained": Pretrained,
    "embeddings": Embeddings,
}
