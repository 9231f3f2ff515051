"""The autograd nodes of a meta-iteration: the gradients are already there, or the Plan's reverse half makes them.

``out.loss.backward()`` then fills ``.grad`` through torch's own accumulation, so hooks, DDP and GradScaler work as with any loss. There is no second
derivative of the meta-gradient: asked for one, backward raises instead of being silently wrong (``once_differentiable`` does not see that case).

Each node takes its tensors in a tuple: what goes in as an argument would come out as a view, which ``out.loss /= 2`` may not change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

SECOND = "fastmaml gives the meta-gradient, not its own derivative: backward with create_graph=True is not supported"
OTHERS = "only out.loss carries gradient; for a loss of your own on the logits pass outer_loss=fn(logits, query_y) to maml(...)"


graph_is_kept: Callable[[], bool] = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)

in_transform: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


def applied(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply``. Outside of torch.func's transforms without what it does for them, which a small network feels."""
    if in_transform():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)


class MetaLoss(torch.autograd.Function):
    """The loss of a meta-iteration, with its gradients."""

    @staticmethod
    def forward(ctx: Any, loss: tuple[Tensor], gradients: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss[0]

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(SECOND)
        gradients = ctx.gradients
        if gradients is None:
            raise RuntimeError("a second backward through one meta-iteration: pass retain_graph=True to the first")
        if not graph_is_kept():
            ctx.gradients = None  # nobody else holds them, so torch makes them .grad without a copy
        if not dloss.is_cpu or dloss.item() != 1.0:  # reading it would wait for a GPU
            gradients = [g * dloss for g in gradients]
        return None, None, *gradients


class OuterLogits(torch.autograd.Function):
    """Logits for a torch outer loss: their gradient starts the Plan's reverse half."""

    @staticmethod
    def forward(ctx: Any, logits: tuple[Tensor], reverse: Callable[[Tensor], Sequence[Tensor | None]], *parameters: Tensor) -> Tensor:
        ctx.reverse = reverse
        return logits[0]

    @staticmethod
    def backward(ctx: Any, dlogits: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(SECOND)
        return None, None, *ctx.reverse(dlogits)


class NoGradient(torch.autograd.Function):
    """Tensors that are no constants, and refuse to be differentiated."""

    @staticmethod
    def forward(ctx: Any, outputs: tuple[Tensor, ...], *parameters: Tensor) -> tuple[Tensor, ...]:
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(OTHERS)
