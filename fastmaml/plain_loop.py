"""MAML as one writes it in torch: what the fast paths are held against, in agreement (diagnostics.py) and in time."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fastmaml import options
from fastmaml.batch import TaskBatch
from fastmaml.nn import StepBatchNorm
from fastmaml.optimizers import ImplicitGradient

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
        self.penalty: Any = 0.0  # what the parameterisation adds to the outer loss of the task
        self.support_rows: int | None = None  # while query rows run behind support rows
        for norm in self.model.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.weight is None and norm.bias is not None:
                del norm._parameters["weight"]  # torch's double backward fails for a beta without a gamma
                norm.weight = torch.ones_like(norm.bias)
            if isinstance(norm, (nn.modules.batchnorm._BatchNorm, StepBatchNorm)) and maml.batchnorm:
                norm.train(maml.batchnorm != "running")
                if maml.batchnorm == "support":
                    norm.forward = functools.partial(self._support_norm, norm)

    def task(self, t: int) -> tuple[float, dict[str, Tensor]]:
        """(outer loss, its gradient for each trained parameter and learned rate) of one task."""
        sx, sy, qx, qy = (self._cast(v) for v in self.batch.task(t))
        weights = [0.0] * self.steps + [1.0]
        if self.maml.step_loss_weights is not None:
            weights, _ = options.check_step_weights(self.maml.step_loss_weights, self.steps)
        theta = start = self._start(t)
        velocity: dict[str, Tensor] = {}
        outer: Any = self.penalty
        for k in range(self.steps + 1):
            if weights[k]:
                self._at_step(max(k - 1, 0))
                outer = outer + weights[k] * self._loss(self._query(theta, sx, qx), qy, t)
            if k < self.steps:
                self._at_step(k)
                theta = self._step(theta, start, self._loss(self._logits(theta, sx), sy, t), k, velocity)
        if isinstance(self.maml.meta_gradient, ImplicitGradient) and self.steps:
            return self._implicit(theta, (sx, sy, qx, qy), t)
        if self.maml.meta_gradient == "reptile":
            moved = {name: p - theta[name] for name, p in self.parameters.items() if name in self.wanted}
            return outer.item(), {name: m.detach() for name, m in moved.items()}
        found = torch.autograd.grad(outer, list(self.wanted.values()), allow_unused=True)
        named = zip(self.wanted.items(), found, strict=True)
        return outer.item(), {name: torch.zeros_like(p) if g is None else g for (name, p), g in named}

    def _implicit(self, theta: Theta, task: tuple[Tensor, ...], t: int) -> tuple[float, dict[str, Tensor]]:
        """Conjugate gradient at the last theta: see ImplicitGradient."""
        rule, (sx, sy, qx, qy) = self.maml.meta_gradient, task
        theta = {name: v.detach().requires_grad_(name in self.wanted) for name, v in theta.items()}
        names = list(self.wanted)
        leaves = [theta[name] for name in names]
        outer = self._loss(self._query(theta, sx, qx), qy, t)
        r = torch.autograd.grad(outer, leaves)
        inner = torch.autograd.grad(self._loss(self._logits(theta, sx), sy, t), leaves, create_graph=True)
        x, p = [torch.zeros_like(v) for v in r], list(r)
        for _ in range(rule.cg_steps):
            found = torch.autograd.grad(inner, leaves, p, retain_graph=True)
            a = [(1 + rule.cg_damping) * v + h / (rule.lam + rule.lam_damping) for v, h in zip(p, found, strict=True)]
            rr, curvature = _dot(r, r), _dot(p, a)
            alpha = rr / curvature if curvature else 0 * rr
            x = [v + alpha * w for v, w in zip(x, p, strict=True)]
            r = [v - alpha * w for v, w in zip(r, a, strict=True)]
            beta = _dot(r, r) / rr if rr else 0 * rr
            p = [v + beta * w for v, w in zip(r, p, strict=True)]
        return outer.item(), dict(zip(names, x, strict=True))

    def _start(self, t: int) -> Theta:
        """theta_0 of a task."""
        return self.parameters

    def _at_step(self, k: int) -> None:
        for norm in self.model.modules():
            if isinstance(norm, StepBatchNorm):
                norm.step = k

    def _cast(self, v: Tensor) -> Tensor:
        return v.to(self.dtype) if v.is_floating_point() or v.dtype is torch.uint8 else v

    def _step(self, theta: Theta, start: Theta, loss: Tensor, k: int, velocity: dict[str, Tensor]) -> Theta:
        rates = self.maml.rates.rates
        inputs = [theta[name] for name in rates]
        found = torch.autograd.grad(loss, inputs, create_graph=not self.maml.first_order, allow_unused=True)
        grads = {name: g for name, g in zip(rates, found, strict=True) if g is not None}
        if isinstance(self.maml.meta_gradient, ImplicitGradient):
            grads = {name: g + self.maml.meta_gradient.lam * (theta[name] - start[name]) for name, g in grads.items()}
        moves = self._moves(theta, grads, velocity)
        return {**theta, **{name: theta[name] - self._rate(theta, name, k) * s for name, s in moves.items()}}

    def _rate(self, theta: Theta, name: str, k: int) -> Tensor:
        rate = self.maml.rates.rates[name]
        value = self.maml.rates.tensors(self.steps)[rate.name]
        return value[k] if rate.per_step else value

    def _moves(self, theta: Theta, grads: Theta, velocity: dict[str, Tensor]) -> Theta:
        """The gradients as the inner optimizer has them: clipped, with weight decay and momentum."""
        rule, out = options.check_optimizer(self.maml.inner_optimizer), {}
        if rule.max_norm is not None:
            norm = torch.stack([g.norm() for g in grads.values()]).norm()
            scale = (rule.max_norm / (norm + 1e-6)).clamp(max=1.0)
            grads = {name: scale * g for name, g in grads.items()}
        for name, g in grads.items():
            if rule.clip_value is not None:
                g = g.clamp(-rule.clip_value, rule.clip_value)
            g = g + rule.weight_decay * theta[name] if rule.weight_decay else g
            if rule.momentum:
                v = rule.momentum * velocity[name] + (1 - rule.dampening) * g if name in velocity else g
                velocity[name] = v
                g = g + rule.momentum * v if rule.nesterov else v
            out[name] = g
        return out

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
        weight, bias = (p[norm.step] if isinstance(norm, StepBatchNorm) else p for p in (norm.weight, norm.bias))
        out = out if weight is None else out * weight.view(shape)
        return out if bias is None else out + bias.view(shape)

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


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return sum((x * y).sum() for x, y in zip(a, b, strict=True))
