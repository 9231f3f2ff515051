"""modulation: an encoder of the support set says how the task's network begins, or how its layers are modulated. MMAML, HSML."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from fastmaml.parameterisation.base import PENALTY, Kind, Network, Parameterisation, Tasks
from fastmaml.parameterisation.rewriter import Rewriter


class SetEncoder(nn.Module):
    """A support set as a vector: each row with its target through two layers, then their mean, then a layer.

    x [n, ...] with ``inputs`` numbers per row, y [n] labels of ``targets`` classes or [n, targets] numbers -> [size]; with ``sizes``, the rows of several
    sets one after another and how many each has -> [sets, size].

    decoder   two more layers that make each row and its target again from what the first two made of them (HSML's pooling autoencoder):
              ``autoencode(x, y)`` -> (the vector, half the mean squared error of the rows and targets made again)
    """

    def __init__(self, inputs: int, targets: int, size: int = 32, hidden: int = 64, decoder: bool = False) -> None:
        super().__init__()
        self.inputs, self.targets, self.size = inputs, targets, size
        self.rows = nn.Sequential(nn.Linear(inputs + targets, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.out = nn.Linear(hidden, size)
        self.back = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, inputs + targets)) if decoder else None

    def forward(self, x: Tensor, y: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        return self.out(mean_of_sets(self.rows(self._joined(x, y)), sizes))

    def autoencode(self, x: Tensor, y: Tensor, sizes: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        if self.back is None:
            raise ValueError("this SetEncoder has no decoder: build it with SetEncoder(..., decoder=True)")
        joined = self._joined(x, y)
        rows = self.rows(joined)
        errors = (joined - self.back(rows)).square().mean(1) / 2
        return self.out(mean_of_sets(rows, sizes)), mean_of_sets(errors, sizes)

    def _joined(self, x: Tensor, y: Tensor) -> Tensor:
        x, labels = x.flatten(1), not y.is_floating_point()
        if labels and int(y.max()) >= self.targets:
            raise ValueError(f"a label is {int(y.max())}: this SetEncoder was built for targets={self.targets} classes")
        y = nn.functional.one_hot(y.long(), self.targets) if labels else y.flatten(1)
        if (x.shape[1], y.shape[1]) != (self.inputs, self.targets):
            raise ValueError(f"support rows have {x.shape[1]} numbers and {y.shape[1]} targets: this SetEncoder was built with inputs={self.inputs}, targets={self.targets}")
        return torch.cat([x, y.to(x)], 1)


def mean_of_sets(rows: Tensor, sizes: Sequence[int] | None) -> Tensor:
    """[sum n, ...] -> [sets, ...]; sizes None: one set -> [...]"""
    if sizes is None:
        return rows.mean(0)
    return torch.segment_reduce(rows, "mean", lengths=torch.tensor(sizes, device=rows.device))


class Encoded(Parameterisation):
    """What has an encoder: encoder(support_x [n, ...], support_y) -> [size], an nn.Module of the user's or a ``SetEncoder``, outer-learned."""

    def __init__(self, encoder: nn.Module, size: int | None = None) -> None:
        super().__init__()
        if not isinstance(encoder, nn.Module):
            raise TypeError(f"encoder is {type(encoder).__name__}: expected an nn.Module of (support_x [n, ...], support_y [n, ...]) -> [size]")
        size = getattr(encoder, "size", None) if size is None else size
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"size={size!r}: expected the number of features that encoder(x, y) returns")
        self.encoder, self.size = encoder, size

    def embeddings(self, tasks: Tasks) -> Tensor:
        """[tasks, size]"""
        return self._checked(self._of_tasks(self.encoder, tasks))

    def _of_tasks(self, encode: Callable[..., Any], tasks: Tasks) -> Any:
        """What ``encode`` gives for the support sets: a SetEncoder takes them all at once, an encoder of the user's one by one."""
        like, batch = next(self.encoder.parameters()), tasks.batch
        x, y = batch.support_x.to(like), batch.support_y
        y = y.to(like) if y.is_floating_point() else y
        if type(self.encoder) is SetEncoder:  # one of the user's may be made of it, and read one set
            return encode(x, y, batch.support_sizes)
        found = [encode(*rows) for rows in zip(x.split(batch.support_sizes), y.split(batch.support_sizes), strict=True)]
        return tuple(map(list, zip(*found, strict=True))) if isinstance(found[0], tuple) else found

    def _checked(self, out: Tensor | Sequence[Tensor]) -> Tensor:
        if any(tuple(e.shape) != (self.size,) for e in out):
            raise ValueError(f"encoder returns {list(out[0].shape)} for the support set of a task: expected [{self.size}]")
        return out if isinstance(out, Tensor) else torch.stack(list(out))


class Modulation(Encoded):
    """MMAML (Vuorio et al. 2019): FiLM of layers, y -> (1 + gamma) y + beta, gamma and beta linear in the embedding of the task's support set and fixed
    while the inner loop adapts what ``adapt=`` names.

    layers   name pattern(s) of the weights whose layers are modulated (after the normalisation that follows, where one does); None: all but the head
    """

    name = "mmaml"

    def __init__(self, encoder: nn.Module, size: int | None = None, layers: str | Sequence[str] | None = None) -> None:
        super().__init__(encoder, size)
        self.layers = layers

    def settings(self) -> Mapping[str, Any]:
        return {"size": self.size, "layers": self.layers}

    def declare(self, network: Network) -> None:
        weights = network.weights()
        head = network.head() if self.layers is None else None
        self._names = [n for n in weights if n != head] if self.layers is None else network.matching(self.layers, "layers", list(weights))
        self.outer_module("encoder", self.encoder)
        self.maps = nn.ModuleList(nn.Linear(self.size, 2 * weights[n].shape[0]) for n in self._names)
        self.outer_module("maps", self.maps)
        for name in self._names:
            for part in ("gamma", "beta"):
                self.per_task(f"{part}.{name}", weights[name].shape[:1])

    def rewrite(self, r: Rewriter) -> None:
        for name in (n for n in self._names if n in r):
            r.film(name, r.own(f"gamma.{name}"), r.own(f"beta.{name}"), after_norm=True)

    def prologue(self, tasks: Tasks) -> Mapping[str, Tensor]:
        embedded, out = self.embeddings(tasks), {}
        for name, linear in zip(self._names, self.maps, strict=True):
            gamma, beta = linear(embedded).chunk(2, 1)
            out |= {f"{self.name}.gamma.{name}": 1 + gamma, f"{self.name}.beta.{name}": beta}
        return out


class Gated(Encoded):
    """HSML (Yao et al. 2019): every adapted parameter begins at theta_0 * eta(task), eta = sigmoid of a linear map of the task's embedding g and of its
    place h in a hierarchy of soft clusters; the inner loop then adapts theta.

    clusters   of the two levels above the task: p_k = softmax_k(-|g - c_k|^2 / 2), h_k = p_k tanh(W_k g + b_k), and again from these to the second level,
               whose sum goes to the root
    reconstruction   xi: the outer loss of each task is L_Q + xi L_r, L_r the reconstruction loss that ``encoder.autoencode(x, y) -> ([size], L_r)`` returns
                     beside the embedding (``SetEncoder(..., decoder=True)`` has one). None: the authors' 0.01 where the encoder can, else 0
    """

    name = "hsml"

    def __init__(self, encoder: nn.Module, size: int | None = None, clusters: tuple[int, int] = (4, 2), reconstruction: float | None = None) -> None:
        super().__init__(encoder, size)
        can = callable(getattr(encoder, "autoencode", None)) and not (isinstance(encoder, SetEncoder) and encoder.back is None)
        if reconstruction is not None and (not isinstance(reconstruction, Real) or isinstance(reconstruction, bool) or not 0 <= reconstruction < float("inf")):
            raise ValueError(f"reconstruction={reconstruction!r}: expected a finite number of at least 0, or None")
        if reconstruction and not can:
            raise ValueError(
                f"reconstruction={reconstruction!r} needs an encoder with autoencode(x, y) -> ([size], loss), as SetEncoder(..., decoder=True): {type(encoder).__name__} has none"
            )
        self.reconstruction = float((0.01 if can else 0.0) if reconstruction is None else reconstruction)
        if not isinstance(clusters, (tuple, list)) or len(clusters) != 2 or not all(isinstance(k, int) and k >= 1 for k in clusters):
            raise ValueError(f"clusters={clusters!r}: expected two whole numbers of at least 1, for the two levels")
        self.clusters = tuple(clusters)

    def settings(self) -> Mapping[str, Any]:
        return {"size": self.size, "clusters": self.clusters, **({"reconstruction": self.reconstruction} if self.reconstruction else {})}

    def declare(self, network: Network) -> None:
        self._names = network.matched
        self.outer_module("encoder", self.encoder)
        self.levels = nn.ModuleList(_Level(self.size, k) for k in self.clusters)
        self.root = nn.Linear(self.size, self.size)
        self.gates = nn.ModuleList(nn.Linear(2 * self.size, network.parameters[n].numel()) for n in self._names)
        for name in ("levels", "root", "gates"):
            self.outer_module(name, getattr(self, name))
        for name in self._names:
            self.per_task(name, network.parameters[name].shape, "adapted")

    def roles(self, network: Network) -> dict[str, Kind]:
        """theta_0 is outer-learned; what is adapted is each task's own."""
        return {name: Kind("outer" if p.requires_grad else "const") for name, p in network.parameters.items()}

    def rewrite(self, r: Rewriter) -> None:
        for name in (n for n in self._names if n in r):
            r.substitute(name, r.own(name))

    def prologue(self, tasks: Tasks) -> Mapping[str, Tensor]:
        penalty = {}
        if self.reconstruction:
            found, losses = self._of_tasks(self.encoder.autoencode, tasks)
            losses = losses if isinstance(losses, Tensor) else torch.stack(losses)
            g, penalty = self._checked(found), {PENALTY: self.reconstruction * losses}
        else:
            g = self.embeddings(tasks)
        h = g[:, None]
        for level in self.levels:
            h = level(h)
        both, out = torch.cat([g, torch.tanh(self.root(h.sum(1)))], 1), {}
        for name, gate in zip(self._names, self.gates, strict=True):
            p = tasks.parameters[name]
            out[f"{self.name}.{name}"] = p * torch.sigmoid(gate(both)).view(len(tasks), *p.shape)
        return out | penalty


class _Level(nn.Module):
    """h [tasks, below, size] -> [tasks, clusters, size]: each cluster's share of what is below, through a map of its own."""

    def __init__(self, size: int, clusters: int) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(clusters, size) / size**0.5)
        self.maps = nn.ModuleList(nn.Linear(size, size) for _ in range(clusters))

    def forward(self, h: Tensor) -> Tensor:
        near = torch.softmax(-(h[:, :, None] - self.centres).square().sum(-1) / 2, 2)
        return torch.stack([(near[:, :, k, None] * torch.tanh(linear(h))).sum(1) for k, linear in enumerate(self.maps)], 1)
