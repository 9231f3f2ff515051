"""What a run is: its settings, and the task sources and the MAML that follow from them."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields
from typing import Any

import torch

from fastmaml import nn
from fastmaml.counts import check_count
from fastmaml.maml import MAML
from fastmaml.tasks import Glyphs, Omniglot, Sinusoid
from fastmaml.training import methods

# Sinusoid: cbfinn/maml. Glyphs, Omniglot: learn2learn's fully connected network.
DEFAULTS: dict[str, dict[str, Any]] = {
    "sinusoid": dict(iterations=15000, shots=10, queries=10, tasks=25, inner_lr=0.01, lr=1e-3),
    "glyphs": dict(iterations=2000, ways=5, shots=1, queries=5, tasks=32, inner_lr=0.1, lr=3e-3),
    "omniglot": dict(iterations=5000, ways=5, shots=1, queries=5, tasks=32, inner_lr=0.5, lr=3e-3),
}
NETS = {
    ("sinusoid", "fc"): nn.SinusoidMLP,
    ("glyphs", "fc"): nn.OmniglotFC,
    ("glyphs", "cnn"): nn.OmniglotCNN,
    ("omniglot", "fc"): nn.OmniglotFC,
    ("omniglot", "cnn"): nn.OmniglotCNN,
}
UNSEEN = {"sinusoid": "new sinusoids", "glyphs": "new alphabets", "omniglot": "validation characters"}
SPLITS = {"sinusoid": ("test",), "glyphs": ("train", "test"), "omniglot": ("train", "validation", "test")}
CHANGEABLE = ("iterations", "data", "on_nonfinite")  # when a run goes on; anything else would make it another run


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One run. ``Settings.of(task, **given)`` fills in the defaults of the method, then of the task; the rest is checked by what it is for.

    method: one of training.methods.NAMES; inner_lr=None: MetaSGD draws its own. data, split_by, rotations are Omniglot's; sinusoid has no ways. validation: how many tasks of unseen classes the
    learning curve is measured on (0: none).
    """

    task: str
    iterations: int
    shots: int
    queries: int
    tasks: int
    inner_lr: float | None
    lr: float
    ways: int | None = None
    inner_steps: int = 1
    net: str = "fc"
    method: str = "MAML"
    first_order: bool = False
    seed: int = 0
    backend: str = "auto"
    on_nonfinite: str = "raise"
    validation: int = 100
    data: str | None = None
    split_by: str = "class"
    rotations: bool = True

    @classmethod
    def of(cls, task: str, **given: Any) -> Settings:
        if task not in DEFAULTS:
            raise ValueError(f"task={task!r}: expected one of {', '.join(DEFAULTS)}")
        return cls(task=task, **{**DEFAULTS[task], **methods.defaults(given.get("method", "MAML")), **given})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Settings:
        """Of ``asdict``; ValueError for anything else."""
        known = {field.name for field in fields(cls)}
        values = {"method": "MAML", **values} if isinstance(values, dict) else values  # that of runs before there was another
        if not isinstance(values, dict) or set(values) != known:
            raise ValueError("these are not the settings of a run of this version")
        return cls(**values)

    def __post_init__(self) -> None:
        if self.task not in DEFAULTS:
            raise ValueError(f"task={self.task!r}: expected one of {', '.join(DEFAULTS)}")
        if (self.task, self.net) not in NETS:
            known = ", ".join(net for task, net in NETS if task == self.task)
            raise ValueError(f"net={self.net!r}: {self.task} has {known}")
        methods.check(self.method, self.regression)
        if self.method == "MAMLPlusPlus" and self.first_order:
            raise ValueError("first_order=True: MAMLPlusPlus has a schedule that sets the order")
        if self.task == "sinusoid" and self.ways is not None:
            raise ValueError(f"ways={self.ways}: sinusoid is a regression and has none")
        if self.task == "omniglot" and self.data is None:
            raise ValueError(
                "data is missing: omniglot is read from files you have, in the folder that holds images_background.zip"
                " and its like, published at https://github.com/brendenlake/omniglot"
            )
        if self.data is not None:
            object.__setattr__(self, "data", os.fspath(self.data))  # as JSON has it
        for name, default in (("data", None), ("split_by", "class"), ("rotations", True)):
            if self.task != "omniglot" and getattr(self, name) != default:
                raise ValueError(f"{name}={getattr(self, name)!r} is for omniglot, not for {self.task}")
        for name, least in (("iterations", 1), ("inner_steps", 0), ("validation", 0), ("seed", 0)):
            check_count(name, getattr(self, name), least)
        for name in ("inner_lr", "lr"):
            value = getattr(self, name)
            if value is None and name == "inner_lr" and self.method == "MetaSGD":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"{name}={value!r}: expected a finite number above 0")

    @property
    def regression(self) -> bool:
        return self.task == "sinusoid"

    @property
    def measure(self) -> str:
        return "mean squared error" if self.regression else "accuracy"

    def describe(self) -> str:
        """'omniglot, 5-way 1-shot, OmniglotFC'"""
        ways = f"{self.shots}-shot" if self.ways is None else f"{self.ways}-way {self.shots}-shot"
        method = "" if self.method == "MAML" else f", {self.method}"
        return f"{self.task}, {ways}, {NETS[self.task, self.net].__name__}{method}{', first order' if self.first_order else ''}"

    def source(self, split: str, seed: int, device: str | torch.device = "cpu") -> Sinusoid | Glyphs | Omniglot:
        """Tasks of ``split``, one of SPLITS[task], on ``device``."""
        if split not in SPLITS[self.task]:
            raise ValueError(f"split={split!r}: {self.task} has {', '.join(SPLITS[self.task])}")
        sizes = dict(shots=self.shots, queries=self.queries, tasks=self.tasks, seed=seed, device=device)
        if self.task == "sinusoid":
            return Sinusoid(**sizes)
        if self.task == "glyphs":
            return Glyphs(split, ways=self.ways, **sizes)
        return Omniglot(self.data, split, ways=self.ways, split_by=self.split_by, rotations=self.rotations, **sizes)

    def training_source(self, device: str | torch.device = "cpu") -> Sinusoid | Glyphs | Omniglot:
        return self.source("test" if self.task == "sinusoid" else "train", self.seed, device)

    def unseen_source(self, device: str | torch.device = "cpu") -> Sinusoid | Glyphs | Omniglot:
        """For the learning curve: nothing is chosen by it."""
        return self.source("validation" if self.task == "omniglot" else "test", self.seed + 1, device)

    def maml(self, device: str | torch.device = "cpu") -> MAML:
        """On ``device``, with weights drawn with ``seed``: the same on any device; torch's global stream stays where it is."""
        net = NETS[self.task, self.net]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = net() if self.ways is None else net(ways=self.ways)
            return methods.make(
                self.method,
                model.to(device),
                (1, 1) if self.regression else (28 * 28, self.ways),
                inner_lr=self.inner_lr,
                inner_steps=self.inner_steps,
                loss="mse" if self.regression else "cross_entropy",
                first_order=self.first_order,
                backend=self.backend,
                on_nonfinite=self.on_nonfinite,
            )
