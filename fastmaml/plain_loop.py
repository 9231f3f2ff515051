"""MAML as one writes it in torch: what the fast paths are held against, in agreement (diagnostics.py) and in time."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fastmaml import options
from fastmaml.batch import TaskBatch

Theta = Mapping[str, Tensor]


class PlainLoop:
    """What a MAML object does, as a loop of functional_call and autograd.grad with create_graph, on its own copy."""

    def __init__(self, maml: Any, batch: TaskBatch) -> None:
        self.maml, self.batch, self.steps = maml, batch, maml.inner_steps
        self.model = copy.deepcopy(maml.model)
        self.parameters = dict(self.model.named_parameters())
        trained = {name for name, _ in maml.named_parameters()}
        self.wanted = {name: p for name, p in self.parameters.items() if p.requires_grad and name in trained}
        self.wanted |= {name: v for name, v in maml.rates.values.items() if isinstance(v, nn.Parameter)}
        self.dtype = next(iter(self.parameters.values())).dtype
        self.support_rows: int | None = None  # while query rows run behind support rows
        for norm in self.model.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.weight is None and norm.bias is not None:
                del norm._parameters["weight"]  # torch's double backward fails for a beta without a gamma
                norm.weight = torch.ones_like(norm.bias)
            if isinstance(norm, nn.modules.batchnorm._BatchNorm) and maml.batchnorm:
                norm.train(maml.batchnorm != "running")
                if maml.batchnorm == "support":
                    norm.forward = functools.partial(self._support_norm, norm)

    def task(self, t: int) -> tuple[float, dict[str, Tensor]]:
        """(outer loss, its gradient for each trained parameter and learned rate) of one task."""
        sx, sy, qx, qy = (self._cast(v) for v in self.batch.task(t))
        weights = [0.0] * self.steps + [1.0]
        if self.maml.step_loss_weights is not None:
            weights, _ = options.check_step_weights(self.maml.step_loss_weights, self.steps)
        theta: Theta = self.parameters
        outer: Any = 0.0
        for k in range(self.steps + 1):
            if weights[k]:
                outer = outer + weights[k] * self._loss(self._query(theta, sx, qx), qy, t)
            if k < self.steps:
                theta = self._step(theta, self._loss(self._logits(theta, sx), sy, t), k)
        found = torch.autograd.grad(outer, list(self.wanted.values()), allow_unused=True)
        named = zip(self.wanted.items(), found, strict=True)
        return outer.item(), {name: torch.zeros_like(p) if g is None else g for (name, p), g in named}

    def _cast(self, v: Tensor) -> Tensor:
        return v.to(self.dtype) if v.is_floating_point() or v.dtype is torch.uint8 else v

    def _step(self, theta: Theta, loss: Tensor, k: int) -> Theta:
        rates, values = self.maml.rates.rates, self.maml.rates.tensors(self.steps)
        inputs = [theta[name] for name in rates]
        grads = torch.autograd.grad(loss, inputs, create_graph=not self.maml.first_order, allow_unused=True)
        moved = {}
        for (name, rate), g in zip(rates.items(), grads, strict=True):
            if g is not None:
                value = values[rate.name]
                moved[name] = theta[name] - (value[k] if rate.per_step else value) * g
        return {**theta, **moved}

    def _logits(self, theta: Theta, x: Tensor) -> Tensor:
        buffers = {name: b.clone() for name, b in self.model.named_buffers()}  # running statistics stay as they are
        return functional_call(self.model, (dict(theta), buffers), (x,))

    def _query(self, theta: Theta, support_x: Tensor, query_x: Tensor) -> Tensor:
        if self.maml.batchnorm != "support":
            return self._logits(theta, query_x)
        self.support_rows = len(support_x)
        logits = self._logits(theta, torch.cat([support_x, query_x]))[self.support_rows :]
        self.support_rows = None
        return logits

    def _support_norm(self, norm: nn.Module, x: Tensor) -> Tensor:
        """batchnorm="support": all rows, normalised by the statistics of the support rows."""
        var, mean = torch.var_mean(x[: self.support_rows], (0, *range(2, x.dim())), correction=0, keepdim=True)
        out, shape = (x - mean) * (var + norm.eps).rsqrt(), (-1, *[1] * (x.dim() - 2))
        out = out if norm.weight is None else out * norm.weight.view(shape)
        return out if norm.bias is None else out + norm.bias.view(shape)

    def _loss(self, logits: Tensor, y: Tensor, t: int) -> Tensor:
        loss, ways = self.maml.loss, self.batch.ways
        reduction = loss.reduction if isinstance(loss.reduction, str) else "sum"
        if loss.name == "mse":
            out = F.mse_loss(logits, y, reduction=reduction)
        else:
            logits = logits if ways is None else logits[:, : int(ways[t])]
            weight = None if self.maml.class_weight is None else self.maml.class_weight[: logits.shape[1]].to(logits)
            smoothing = loss.label_smoothing
            out = F.cross_entropy(logits, y.long(), weight, reduction=reduction, label_smoothing=smoothing)
        return out if isinstance(loss.reduction, str) else out / loss.reduction
