"""The methods that `fastmaml train` trains by: names of ``fastmaml.methods``, what they begin with, and why some of them are not among them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from fastmaml import methods
from fastmaml.maml import MAML
from fastmaml.parameterisation import SetEncoder

MADE = {"MAML": MAML} | {name: getattr(methods, name) for name in methods.__all__ if name not in ("MAMLPlusPlusSchedule", "record_statistics")}
_PRETRAINED = "its body is pretrained and frozen, and a run begins with random weights: fastmaml.methods.{0}(model, ...) takes a network that you have trained"
REFUSED = {name: _PRETRAINED.format(name) for name in ("MTL", "HeadOnly", "ChannelScaleShift")} | {
    "LEO": "it works on embeddings of a pretrained network, and these tasks are images and points: fastmaml.methods.LEO(inputs, ways)"
}
NAMES = tuple(name for name in MADE if name not in REFUSED)
CLASSIFIES = ("ProtoMAML",)
REPTILE_LR = 0.1  # epsilon of Nichol et al. 2018, on the sinusoids
EPOCH = 500  # iterations, of MAML++'s schedule: the authors'


def check(method: str, regression: bool) -> None:
    """ValueError for what no run can be trained by."""
    if method in REFUSED:
        raise ValueError(f"method={method!r} cannot be trained from nothing: {REFUSED[method]}")
    if method not in NAMES:
        raise ValueError(f"method={method!r}: expected one of {', '.join(NAMES)}")
    if method in CLASSIFIES and regression:
        raise ValueError(f"method={method!r} needs classes, and these tasks are a regression")


def defaults(method: str) -> dict[str, Any]:
    """Settings that the paper has its own of; others are the task's."""
    if method not in NAMES or method in ("MAML", "FirstOrderMAML"):
        return {}
    known = inspect.signature(MADE[method]).parameters
    found = {name: known[name].default for name in ("inner_lr", "inner_steps") if name in known}
    return found | ({"lr": REPTILE_LR} if method == "Reptile" else {})


def make(method: str, model: nn.Module, sample: tuple[int, int], **options: Any) -> MAML:
    """``sample``: numbers of one input, and classes or numbers of one target, for the encoder of those that have one."""
    encoder = (SetEncoder(*sample, decoder=method == "HSML"),) if method in ("MMAML", "HSML") else ()
    if method == "CAVIA" and any(isinstance(m, nn.Conv2d) for m in model.modules()):
        options |= {"context": 100, "layers": "block3.conv.weight"}  # the paper's, for convolutional networks
    if not options["first_order"]:
        del options["first_order"]  # some methods have an order of their own
    return MADE[method](model, *encoder, **options)


def outer_optimizer(method: str, maml: MAML, lr: float) -> torch.optim.Optimizer:
    """Adam; Reptile's "gradient" is a step, which the paper takes as it is."""
    return (torch.optim.SGD if method == "Reptile" else torch.optim.Adam)(maml.parameters(), lr=lr)


def most_steps(method: str, inner_steps: int) -> int | None:
    """Inner steps that a trained network can take; None: any number."""
    return inner_steps if method == "MAMLPlusPlus" else None


def task_seeds(method: str, seed: int, first: int, tasks: int) -> dict[str, list[int]]:
    """Of the noise that a method draws for each task: its own for each task of a run, whenever it goes on."""
    return {"task_seeds": [(seed << 40) + first + t for t in range(tasks)]} if method == "MTNets" else {}
