"""LEO (Rusu et al. 2019, "Meta-Learning with Latent Embedding Optimization"): two inner loops, over a latent code and then over the weights it decodes to.

    z_n ~ N(mu, sigma) of class n's support embeddings, through encoder and relation network
    z <- z - alpha_z dL_S/dz,  w = decode(z)          latent_steps times
    w <- w - alpha_w dL_S/dw                          weight_steps times
    L = L_Q(w) + kl_weight KL(q(z) | N(0, 1)) + encoder_weight |stop(z_K) - z_0|^2 + l2 |theta|^2 + orthogonality |corr(D) - 1|^2

Each inner loop is a MAML object of its own; the second begins at the weights of the first, which the first hands out as its outputs for the rows of the
identity matrix. So both loops, and what lies between them, are differentiated exactly.

Unlike the published code, all shots of a class share one code z_n (as in the paper), one draw of the decoder's noise serves all steps of a task, and the floor of the
decoder's deviation is left out (its sign means nothing).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmaml.batch import TaskBatch
from fastmaml.counts import check_count
from fastmaml.maml import MAML
from fastmaml.output import MetaOutput
from fastmaml.parameterisation.latent import Latent, Start


class LEOOutput(NamedTuple):
    """loss: of the paper, carries gradient. query: the MetaOutput of the last inner loop (its loss is L_Q alone); kl, encoder_penalty: mean over tasks."""

    loss: Tensor
    query: MetaOutput
    kl: Tensor
    encoder_penalty: Tensor

    @property
    def accuracy(self) -> Tensor:
        return self.query.accuracy


class LEO(nn.Module):
    """Over fixed embeddings [tasks, n, inputs]: a linear classifier of ``ways`` classes.

    latent, latent_steps, weight_steps    sizes of the code and of the two inner loops; latent_lr, weight_lr: initial alpha_z [latent], alpha_w [inputs], learned
    kl_weight, encoder_weight, l2, orthogonality    of the regularisers
    In eval mode codes and weights are the means of their distributions. ``options``: first_order, backend, on_nonfinite, memory of both loops.
    """

    def __init__(
        self,
        inputs: int = 640,
        ways: int = 5,
        *,
        latent: int = 64,
        latent_steps: int = 5,
        weight_steps: int = 5,
        latent_lr: float = 1.0,
        weight_lr: float = 1e-3,
        kl_weight: float = 1e-3,
        encoder_weight: float = 1e-2,
        l2: float = 1e-8,
        orthogonality: float = 1e-3,
        dropout: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        for name, value in (("inputs", inputs), ("ways", ways), ("latent", latent), ("latent_steps", latent_steps), ("weight_steps", weight_steps)):
            check_count(name, value)
        wrong = options.keys() - {"first_order", "backend", "on_nonfinite", "memory"}
        if wrong:
            raise TypeError(f"LEO takes no {sorted(wrong)[0]!r}: of MAML's options it has first_order, backend, on_nonfinite and memory")
        self.inputs, self.ways, self.latent = inputs, ways, latent
        self.weights = {"kl": kl_weight, "encoder": encoder_weight, "l2": l2, "orthogonality": orthogonality}
        self.dropout = nn.Dropout(dropout)
        self.encoder = nn.Linear(inputs, latent, bias=False)
        pair = 2 * latent
        self.relation = nn.Sequential(
            nn.Linear(pair, pair, bias=False), nn.ReLU(), nn.Linear(pair, pair, bias=False), nn.ReLU(), nn.Linear(pair, pair, bias=False)
        )
        self.latent_lr = nn.Parameter(torch.full((latent,), float(latent_lr)))
        self.weight_lr = nn.Parameter(torch.full((inputs,), float(weight_lr)))
        head = {"inner_lr": 1.0, **options}
        self.first = MAML(nn.Linear(inputs, ways, bias=False), parameterisation=Latent(latent, math.sqrt(2 / (ways + inputs))), inner_steps=latent_steps, **head)
        self.second = MAML(nn.Linear(inputs, ways, bias=False), parameterisation=Start(), inner_steps=weight_steps, **head)

    @property
    def decoder(self) -> nn.Parameter:
        """[2 inputs, latent]"""
        return dict(self.first.parameterisation.trained())["latent.decoder"]

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        """What is outer-learned: not the classifier that gives the two inner loops their shapes."""
        dot = f"{prefix}." if prefix else ""
        yield dot + "latent_lr", self.latent_lr
        yield dot + "weight_lr", self.weight_lr
        for name, module in (("encoder", self.encoder), ("relation", self.relation)):
            yield from module.named_parameters(dot + name)
        yield dot + "decoder", self.decoder

    def encode(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """(mu, sigma) of each class's code, [ways, latent], from the support rows x [n, inputs], y [n] of a task."""
        members = torch.nn.functional.one_hot(y.long(), self.ways).to(x)
        if not bool((members.sum(0) > 0).all()):
            raise ValueError(f"a class has no support row: LEO encodes each of its {self.ways} classes from its support rows")
        codes = self.encoder(self.dropout(x))
        n = len(codes)
        pairs = torch.cat([codes[:, None].expand(-1, n, -1), codes[None].expand(n, -1, -1)], 2)
        related = self.relation(pairs).mean(1)
        mean, scale = (members.T @ related / members.sum(0)[:, None]).chunk(2, 1)
        return mean, (scale.exp() - 1).clamp(min=1e-10)

    def forward(self, tasks: Any) -> LEOOutput:
        """One meta-iteration: ``out.loss.backward()`` gives the meta-gradient of everything in ``parameters()``."""
        batch = self._batch(tasks)
        z, noise, kl = self._codes(batch)
        penalty = (self._latents(batch, z.detach(), noise) - z).square().mean()
        found: dict[str, MetaOutput] = {}

        def rest(outputs: Tensor, _: Any) -> Tensor:
            found["query"] = self._second(batch, outputs.transpose(1, 2))
            return found["query"].loss

        self._give(z, noise)
        loss = self.first(self._identity(batch), outer_loss=rest).loss
        loss = loss + self.weights["kl"] * kl + self.weights["encoder"] * penalty + self._regulariser()
        return LEOOutput(loss, found["query"], kl.detach(), penalty.detach())

    @torch.no_grad()
    def adapt(self, support_x: Any, support_y: Any = None) -> Tensor:
        """The classifiers after both inner loops, [tasks, ways, inputs]: logits are x @ w.T."""
        batch = self._batch(TaskBatch.from_tensors(support_x, support_y, support_x, support_y) if support_y is not None else support_x)
        z, noise, _ = self._codes(batch)
        self._give(z, noise)
        start = self.first.forward(self._identity(batch), outer_loss=lambda outputs, _: outputs.sum()).logits.transpose(1, 2)
        self._give_second(start.contiguous(), len(batch))
        return self.second.adapt(batch).weights["start.weight"]

    def explain(self, tasks: Any) -> str:
        """The Plans of both inner loops in words, as ``MAML.explain``."""
        batch = self._batch(tasks)
        return f"latent steps\n\n{self.first.explain(self._identity(batch), entry='halves')}\n\nweight steps\n\n{self.second.explain(batch)}"

    # ------------------------------------------------------------------------------------------------- pieces
    def _batch(self, tasks: Any) -> TaskBatch:
        batch = TaskBatch.of(tasks)
        if tuple(batch.support_x.shape[1:]) != (self.inputs,):
            raise ValueError(f"support rows have shape {list(batch.support_x.shape[1:])}: LEO was built for embeddings [{self.inputs}]")
        return batch

    def _codes(self, batch: TaskBatch) -> tuple[Tensor, Tensor, Tensor]:
        """z_0 [tasks, ways, latent], the decoder's noise [tasks, ways, inputs] (zero in eval mode), KL(q(z) | N(0, 1)) as a mean over tasks."""
        means, sigmas = map(torch.stack, zip(*(self.encode(*batch.task(t)[:2]) for t in range(len(batch))), strict=True))
        kl = (-sigmas.log() + (sigmas.square() + means.square()) / 2 - 0.5).sum((1, 2)).mean()
        shape = (len(batch), self.ways, self.inputs)
        if not self.training:
            return means, means.new_zeros(shape), kl
        return means + sigmas * torch.randn_like(sigmas), torch.randn(shape, dtype=means.dtype, device=means.device), kl

    def _identity(self, batch: TaskBatch) -> TaskBatch:
        """The tasks with the identity's rows as queries: the outputs for them are the weight, transposed."""
        eye = torch.eye(self.inputs, dtype=batch.support_x.dtype, device=batch.device)
        blank = torch.zeros(self.inputs, dtype=torch.int64, device=batch.device)
        return TaskBatch.from_tasks([(*batch.task(t)[:2], eye, blank) for t in range(len(batch))])

    def _give(self, z: Tensor, noise: Tensor) -> None:
        rate = self.latent_lr.expand(len(z), self.ways, self.latent)
        self.first.parameterisation.given = {"latent.z": z, "latent.noise": noise, "rate.latent.z": rate}

    def _give_second(self, start: Tensor, tasks: int) -> None:
        rate = self.weight_lr.expand(tasks, self.ways, self.inputs)
        self.second.parameterisation.given = {"start.weight": start, "rate.start.weight": rate}

    def _second(self, batch: TaskBatch, start: Tensor) -> MetaOutput:
        self._give_second(start, len(batch))
        return self.second(batch)

    @torch.no_grad()
    def _latents(self, batch: TaskBatch, z: Tensor, noise: Tensor) -> Tensor:
        """z after the first inner loop."""
        self._give(z, noise)
        return self.first.adapt(batch).weights["latent.z"]

    def _regulariser(self) -> Tensor:
        weights = [self.encoder.weight, *self.relation.parameters(), self.decoder]
        l2 = sum(w.square().sum() / 2 for w in weights)
        d = self.decoder
        norms = d.norm(dim=0, keepdim=True).clamp(min=1e-12)  # of what each number of the code decodes to
        correlation = (d / norms).T @ (d / norms)
        off = (correlation - torch.eye(self.latent, dtype=d.dtype, device=d.device)).square().mean()
        return self.weights["l2"] * l2 + self.weights["orthogonality"] * off
