"""One autograd node for a whole meta-iteration: the gradients are already there, or the Plan's reverse half makes them.

``out.loss.backward()`` then fills ``.grad`` through torch's own accumulation, so hooks, DDP and GradScaler work as with any loss. There is no second
derivative of the meta-gradient: asked for one, backward raises instead of being silently wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SECOND = "fastmaml gives the meta-gradient, not its own derivative: backward with create_graph=True is not supported"
OTHERS = "only out.loss carries gradient; for a loss of your own on the logits pass outer_loss=fn(logits, query_y) to maml(...)"


class MetaLoss(torch.autograd.Function):
    """(loss, logits) of a meta-iteration whose gradients were computed along with the loss."""

    @staticmethod
    def forward(ctx, loss: Tensor, logits: Tensor, gradients: Sequence[Tensor | None], *parameters: Tensor):
        ctx.set_materialize_grads(False)
        ctx.gradients = gradients
        return loss, logits

    @staticmethod
    def backward(ctx, dloss: Tensor | None, dlogits: Tensor | None):
        if torch.is_grad_enabled():
            raise RuntimeError(SECOND)
        if dlogits is not None:
            raise RuntimeError(OTHERS)
        if dloss is None:
            return (None,) * (3 + len(ctx.gradients))
        gradients = ctx.gradients
        if dloss.device.type != "cpu" or float(dloss) != 1.0:
            gradients = [None if g is None else g * dloss for g in gradients]
        return None, None, None, *gradients


class OuterLogits(torch.autograd.Function):
    """Logits for a torch outer loss: their gradient starts the Plan's reverse half."""

    @staticmethod
    def forward(ctx, logits: Tensor, reverse: Callable[[Tensor], Sequence[Tensor | None]], *parameters: Tensor):
        ctx.reverse = reverse
        return logits

    @staticmethod
    def backward(ctx, dlogits: Tensor):
        if torch.is_grad_enabled():
            raise RuntimeError(SECOND)
        return None, None, *ctx.reverse(dlogits)
