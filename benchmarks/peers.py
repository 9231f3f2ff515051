"""The same meta-gradient by the means people have today. Each peer is made once per workload and called with the tasks: it leaves gradients in ``.grad``."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import fastmaml
from benchmarks.workloads import Tasks, Workload

Step = Callable[[Tasks], Tensor]  # one meta-iteration; returns the loss


def _loss(w: Workload) -> Callable[[Tensor, Tensor], Tensor]:
    return F.mse_loss if w.loss == "mse" else F.cross_entropy


def plain_loop(model: nn.Module, w: Workload) -> Step:
    """Task by task, torch.autograd.grad with create_graph: what a loop of one's own, higher or learn2learn do."""
    loss_fn, adapted = _loss(w), w.adapted(model)

    def step(tasks: Tasks) -> Tensor:
        params = dict(model.named_parameters())
        total = 0.0
        for sx, sy, qx, qy in zip(*tasks, strict=True):
            fast = params
            for _ in range(w.inner_steps):
                inner = loss_fn(functional_call(model, fast, (sx,)), sy)
                grads = torch.autograd.grad(inner, [fast[n] for n in adapted], create_graph=True)
                fast = fast | {n: fast[n] - w.inner_lr * g for n, g in zip(adapted, grads, strict=True)}
            total = total + loss_fn(functional_call(model, fast, (qx,)), qy) / len(tasks[0])
        total.backward()
        return total.detach()

    return step


def channels_last_loop(model: nn.Module, w: Workload) -> Step:
    """plain_loop with weights and images in torch's channels-last layout."""
    loop = plain_loop(model.to(memory_format=torch.channels_last), w)

    def images(x: Tensor) -> list[Tensor]:  # of each task: a fifth dimension has no such layout
        return [v.contiguous(memory_format=torch.channels_last) for v in x]

    def step(tasks: Tasks) -> Tensor:
        sx, sy, qx, qy = tasks
        return loop((images(sx), sy, images(qx), qy))

    return step


def _task_loss(model: nn.Module, w: Workload) -> Callable[..., Tensor]:
    loss_fn, adapted = _loss(w), w.adapted(model)

    def task_loss(params: dict[str, Tensor], sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        fast = {n: params[n] for n in adapted}
        for _ in range(w.inner_steps):
            g = grad(lambda p: loss_fn(functional_call(model, params | p, (sx,)), sy))(fast)
            fast = {n: fast[n] - w.inner_lr * g[n] for n in fast}
        return loss_fn(functional_call(model, params | fast, (qx,)), qy)

    return task_loss


def _meta_gradient(model: nn.Module, w: Workload) -> Callable[..., tuple[dict[str, Tensor], Tensor]]:
    per_task = vmap(_task_loss(model, w), in_dims=(None, 0, 0, 0, 0))

    def mean(params: dict[str, Tensor], *tasks: Tensor) -> tuple[Tensor, Tensor]:
        value = per_task(params, *tasks).mean()
        return value, value

    return grad(mean, has_aux=True)


def _store(model: nn.Module, grads: dict[str, Tensor]) -> None:
    for name, p in model.named_parameters():
        p.grad = grads[name] if p.grad is None else p.grad + grads[name]


def func_vmap(model: nn.Module, w: Workload) -> Step:
    """torch.func: vmap over tasks of grad of grad."""
    gradient = _meta_gradient(model, w)

    def step(tasks: Tasks) -> Tensor:
        grads, loss = gradient({n: p.detach() for n, p in model.named_parameters()}, *tasks)
        _store(model, grads)
        return loss

    return step


def func_loop(model: nn.Module, w: Workload) -> Step:
    """torch.func: grad of grad, task by task."""
    gradient = grad(lambda p, *t: (lambda v: (v, v))(_task_loss(model, w)(p, *t)), has_aux=True)

    def step(tasks: Tasks) -> Tensor:
        params = {n: p.detach() for n, p in model.named_parameters()}
        n, total = len(tasks[0]), 0.0
        for task in zip(*tasks, strict=True):
            grads, loss = gradient(params, *task)
            _store(model, {k: g / n for k, g in grads.items()})
            total = total + loss / n
        return total

    return step


def compiled_vmap(model: nn.Module, w: Workload) -> Step:
    """torch.compile of func_vmap."""
    gradient = torch.compile(_meta_gradient(model, w))

    def step(tasks: Tasks) -> Tensor:
        grads, loss = gradient({n: p.detach() for n, p in model.named_parameters()}, *tasks)
        _store(model, grads)
        return loss

    return step


def maml_of(w: Workload, model: nn.Module | None = None) -> fastmaml.MAML:
    model = w.model() if model is None else model
    return fastmaml.MAML(model, inner_lr=w.inner_lr, inner_steps=w.inner_steps, loss=w.loss, adapt=list(w.adapt))


def fastmaml_meta_grad(model: nn.Module, w: Workload) -> Step:
    maml = maml_of(w, model)
    return lambda tasks: maml.meta_grad(tasks).loss


def fastmaml_backward(model: nn.Module, w: Workload) -> Step:
    maml = maml_of(w, model)

    def step(tasks: Tasks) -> Tensor:
        out = maml(tasks)
        out.loss.backward()
        return out.loss.detach()

    return step


OURS = {"fastmaml meta_grad": fastmaml_meta_grad, "fastmaml backward()": fastmaml_backward}
PEERS = {"plain loop": plain_loop, "torch.func loop": func_loop, "torch.func vmap": func_vmap, "torch.compile(vmap)": compiled_vmap}
CONV_PEERS = {"plain loop": plain_loop, "loop, channels last": channels_last_loop} | PEERS
