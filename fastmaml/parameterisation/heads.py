"""Heads that do not begin at an outer-learned value: at zero for every task, or at the task's own prototypes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastmaml.parameterisation.base import Kind, Network, Parameterisation, Tasks
from fastmaml.parameterisation.rewriter import Rewriter

BODY = ("adapted", "outer", "frozen")


class Head(Parameterisation):
    """The last Linear layer begins at ``init``, and the inner loop changes it.

    init   "zero": W = 0, b = 0. "prototypes": ProtoMAML (Triantafillou et al. 2020, eq. 4): with c_n the mean feature of class n's support rows at
           theta_0, W_n = 2 c_n and b_n = -|c_n|^2, so that the logits are -|f - c_n|^2 up to a constant; the gradient flows through the prototypes
    body   "adapted" (those that ``adapt=`` names), "outer" (as ANIL) or "frozen"

    Prototypes are made by plain torch functions, of all tasks at once; with batch normalisation a task's support rows make its statistics. Classes that a task has
    no support row of, or that are beyond its ways, begin at zero.
    """

    def __init__(self, init: str = "prototypes", body: str = "adapted") -> None:
        super().__init__()
        if init not in ("zero", "prototypes"):
            raise ValueError(f"init={init!r}: choose 'zero' or 'prototypes'")
        if body not in BODY:
            raise ValueError(f"body={body!r}: choose one of {', '.join(map(repr, BODY))}")
        self.init, self.body = init, body
        self.name = "zero_head" if init == "zero" else "proto_head"

    def settings(self) -> Mapping[str, Any]:
        return {"body": self.body}

    @property
    def has_prologue(self) -> bool:
        return self.init == "prototypes"

    def declare(self, network: Network) -> None:
        self._weight = network.head()
        self._bias = self._weight.removesuffix("weight") + "bias"
        if self._bias not in network.parameters:
            raise ValueError(f"parameterisation {self.signature}: the head of {self._weight!r} has no bias")
        for name in (self._weight, self._bias):
            shape = network.parameters[name].shape
            if self.init == "zero":
                self.adapted(name, torch.zeros(shape), learned=False)
            else:
                self.per_task(name, shape, "adapted")

    def roles(self, network: Network) -> dict[str, Kind]:
        """The model's own head is not used."""
        matched = set(network.matched) if self.body == "adapted" else set()
        frozen = {self._weight, self._bias} | (set(network.parameters) if self.body == "frozen" else set())
        return {n: Kind("const" if n in frozen or not p.requires_grad else "adapted" if n in matched else "outer") for n, p in network.parameters.items()}

    def rewrite(self, r: Rewriter) -> None:
        for name in (self._weight, self._bias):
            r.substitute(name, r.own(name))

    def prologue(self, tasks: Tasks) -> Mapping[str, Tensor]:
        own = f"{self.name}.{self._weight}"
        classes = len(tasks.parameters[own])
        labels, sizes = tasks.batch.support_y, torch.tensor(tasks.batch.support_sizes)
        if labels.is_floating_point():
            raise ValueError("prototypes need class labels: this parameterisation is for loss='cross_entropy'")
        features = tasks.inputs_of(own)
        task = torch.arange(len(tasks)).repeat_interleave(sizes).to(labels.device)
        place = task * classes + labels.long()  # of a row: its task's and class's
        sums = features.new_zeros(len(tasks) * classes, features.shape[1]).index_add(0, place, features)
        many = torch.bincount(place, minlength=len(sums)).clamp(min=1).to(features)
        prototypes = (sums / many[:, None]).unflatten(0, (len(tasks), classes))
        return {own: 2 * prototypes, f"{self.name}.{self._bias}": -prototypes.square().sum(2)}
