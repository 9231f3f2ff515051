"""The same meta-gradient by the means that people have today. Each is made once per workload and called with the tasks: it adds gradients to ``.grad``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import fastmaml
from benchmarks.workloads import Tasks, Workload

Step = Callable[[Tasks], Tensor]  # one meta-iteration; returns the loss


@dataclass(frozen=True)
class Peer:
    """A way of computing a meta-gradient.

    make      (model, workload) -> its meta-iteration
    absent    why it cannot run a workload here, or None: a library that is not installed, a layer that it does not know
    compiles  compiles for one shape of the batch: it is held against float64 on whole batches, and its first call has a column of its own
    lower     (what it computes in, the error that this allows) where that is less than float32
    """

    name: str
    make: Callable[[nn.Module, Workload], Step]
    absent: Callable[[Workload], str | None] = lambda w: None
    compiles: bool = False
    lower: tuple[str, float] | None = None


def loss_of(w: Workload) -> Callable[[Tensor, Tensor], Tensor]:
    """(output, target) -> loss, as the workload reduces it."""
    of = F.mse_loss if w.loss == "mse" else F.cross_entropy
    if w.reduction == "mean":
        return of
    return lambda output, target: of(output, target, reduction="sum") / w.reduction


# ------------------------------------------------------------------------------------------------- torch.autograd
def plain_loop(model: nn.Module, w: Workload) -> Step:
    """Task by task, torch.autograd.grad with create_graph: what a loop of one's own, higher or learn2learn do."""
    loss_fn, adapted = loss_of(w), w.adapted(model)

    def step(tasks: Tasks) -> Tensor:
        params = dict(model.named_parameters())
        total = 0.0
        for sx, sy, qx, qy in zip(*tasks, strict=True):
            fast = params
            for _ in range(w.inner_steps):
                inner = loss_fn(functional_call(model, fast, (sx,)), sy)
                grads = torch.autograd.grad(inner, [fast[n] for n in adapted], create_graph=not w.first_order)
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


# ------------------------------------------------------------------------------------------------- torch.func
def _task_loss(model: nn.Module, w: Workload) -> Callable[..., Tensor]:
    loss_fn, adapted = loss_of(w), w.adapted(model)

    def task_loss(params: dict[str, Tensor], sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        fast = {n: params[n] for n in adapted}
        for _ in range(w.inner_steps):
            g = grad(lambda p: loss_fn(functional_call(model, params | p, (sx,)), sy))(fast)
            fast = {n: fast[n] - w.inner_lr * (g[n].detach() if w.first_order else g[n]) for n in fast}
        return loss_fn(functional_call(model, params | fast, (qx,)), qy)

    return task_loss


def _meta_gradient(model: nn.Module, w: Workload) -> Callable[..., tuple[dict[str, Tensor], Tensor]]:
    per_task = vmap(_task_loss(model, w), in_dims=(None, 0, 0, 0, 0))

    def mean(params: dict[str, Tensor], *tasks: Tensor) -> tuple[Tensor, Tensor]:
        value = per_task(params, *tasks).mean()
        return value, value

    return grad(mean, has_aux=True)


def store(model: nn.Module, grads: dict[str, Tensor]) -> None:
    """Adds to ``.grad``."""
    for name, p in model.named_parameters():
        p.grad = grads[name] if p.grad is None else p.grad + grads[name]


def _detached(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in model.named_parameters()}


def func_vmap(model: nn.Module, w: Workload, gradient: Callable | None = None) -> Step:
    """torch.func: vmap over tasks of grad of grad."""
    prepare_norms(model, w)
    gradient = gradient or _meta_gradient(model, w)

    def step(tasks: Tasks) -> Tensor:
        grads, loss = gradient(_detached(model), *tasks)
        store(model, grads)
        return loss

    return step


def func_loop(model: nn.Module, w: Workload) -> Step:
    """torch.func: grad of grad, task by task."""
    prepare_norms(model, w)
    return _looped(model, grad(lambda p, *t: (lambda v: (v, v))(_task_loss(model, w)(p, *t)), has_aux=True))


def _looped(model: nn.Module, gradient: Callable) -> Step:
    def step(tasks: Tasks) -> Tensor:
        params = _detached(model)
        n, total = len(tasks[0]), 0.0
        for task in zip(*tasks, strict=True):
            grads, loss = gradient(params, *task)
            store(model, {k: g / n for k, g in grads.items()})
            total = total + loss / n
        return total

    return step


def compiled_vmap(model: nn.Module, w: Workload) -> Step:
    """torch.compile of func_vmap."""
    prepare_norms(model, w)
    return func_vmap(model, w, torch.compile(_meta_gradient(model, w)))


def compiled_loop(model: nn.Module, w: Workload) -> Step:
    """torch.compile of the meta-gradient of one task, called task by task."""
    prepare_norms(model, w)
    return _looped(model, torch.compile(grad(lambda p, *t: (lambda v: (v, v))(_task_loss(model, w)(p, *t)), has_aux=True)))


class WrittenOut(nn.Module):
    """Batch normalisation from primitive operations, with the parameters of ``norm``."""

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__()
        self.eps, self.weight, self.bias = norm.eps, norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        axes, shape = (0, *range(2, x.dim())), (1, -1, *[1] * (x.dim() - 2))
        variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
        y = (x - mean) * torch.rsqrt(variance + self.eps)
        y = y if self.weight is None else y * self.weight.view(shape)
        return y if self.bias is None else y + self.bias.view(shape)


def prepare_norms(model: nn.Module, w: Workload) -> None:
    """For torch.func. Statistics are of the batch in every workload; those that are only counted along would stop it. Where the inner loop changes gamma or
    beta, vmap of F.batch_norm gives a wrong second derivative (functorch issue 534; with torch 2.13 up to 1 %): such norms are written out."""
    adapted = {name.rsplit(".", 1)[0] for name in w.adapted(model)}
    for name, norm in list(model.named_modules()):
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
            continue
        if name in adapted:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, WrittenOut(norm))
        norm.track_running_stats, norm.running_mean, norm.running_var, norm.num_batches_tracked = False, None, None, None


# ------------------------------------------------------------------------------------------------- fastmaml
def maml_of(w: Workload, model: nn.Module | None = None, precision: str = "highest", **options: object) -> fastmaml.MAML:
    """In float32 throughout, as its peers: speeds are compared at one precision."""
    model = w.model() if model is None else model
    order = {"first_order": True} if w.first_order else {}
    return fastmaml.MAML(
        model, inner_lr=w.inner_lr, inner_steps=w.inner_steps, loss=w.loss, reduction=w.reduction, adapt=list(w.adapt), batchnorm="batch",
        precision=precision, **order, **options
    )  # fmt: skip


def fastmaml_meta_grad(model: nn.Module, w: Workload, precision: str = "highest") -> Step:
    maml = maml_of(w, model, precision)
    return lambda tasks: maml.meta_grad(tasks).loss


def fastmaml_backward(model: nn.Module, w: Workload) -> Step:
    maml = maml_of(w, model)

    def step(tasks: Tasks) -> Tensor:
        out = maml(tasks)
        out.loss.backward()
        return out.loss.detach()

    return step


def is_mine(name: str) -> bool:
    """Whether a row is fastmaml's, in whatever precision, in a graph or not."""
    return name.startswith("fastmaml ")


def has_convolutions(w: Workload) -> bool:
    return any(p.dim() == 4 for p in w.model().parameters())


def _needs_images(w: Workload) -> str | None:
    return None if has_convolutions(w) else "a layout of images, and the network has no convolution"


META_GRAD, BACKWARD, PLAIN = "fastmaml meta_grad", "fastmaml backward()", "plain loop"
OURS = {p.name: p for p in (Peer(META_GRAD, fastmaml_meta_grad), Peer(BACKWARD, fastmaml_backward))}
LOWER = {  # of a GPU, held to their own bounds: fastmaml's default, and less
    p.name: p
    for p in (
        Peer(f"{META_GRAD}, high", partial(fastmaml_meta_grad, precision="high"), lower=("float32, HVP products in TF32", 5e-3)),
        Peer(f"{META_GRAD}, medium", partial(fastmaml_meta_grad, precision="medium"), lower=("HVP products in bfloat16, others in three of it", 3e-2)),
    )
}
PEERS = {
    p.name: p
    for p in (
        Peer(PLAIN, plain_loop),
        Peer("plain loop, channels last", channels_last_loop, _needs_images),
        Peer("torch.func loop", func_loop),
        Peer("torch.func vmap", func_vmap),
        Peer("torch.compile(loop)", compiled_loop),
        Peer("torch.compile(vmap)", compiled_vmap, compiles=True),
    )
}
