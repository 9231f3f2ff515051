"""What the reference systems train, with their settings: data, networks, losses, rates. Benchmarks and tests share it.

Quirks are explicit, because they change the numbers: how a loss is reduced, which parameters of a batch normalisation there are and which of them the inner
loop changes (the networks themselves, with their strides, pools and eps, are those of ``fastmaml.nn``). All run in second order unless ``first_order``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

import fastmaml

Tasks = tuple[Tensor, Tensor, Tensor, Tensor]  # support_x, support_y, query_x, query_y


@dataclass(frozen=True)
class Workload:
    """One meta-iteration.

    net          (ways, filters) -> the network; filters 0: the reference's number
    tasks        per meta-iteration; shots and queries: rows per class, or points
    image        (channels, side); () for sinusoid regression
    reduction    of both losses: "mean", or a number by which the sum over rows is divided
    adapt        patterns of the parameters that the inner loop changes; the others are trained outside only
    """

    name: str
    net: Callable[[int, int], nn.Module]
    tasks: int
    shots: int
    queries: int
    inner_lr: float
    inner_steps: int
    image: tuple[int, ...] = (1, 28)
    ways: int = 5
    loss: str = "cross_entropy"
    reduction: str | float = "mean"
    adapt: tuple[str, ...] = ("*",)
    filters: int = 0
    first_order: bool = False

    def model(self) -> nn.Module:
        return self.net(self.ways, self.filters)

    def adapted(self, model: nn.Module) -> list[str]:
        """Names of the parameters that the inner loop changes, for every way of computing alike."""
        return [name for name, _ in model.named_parameters() if any(fnmatchcase(name, p) for p in self.adapt)]

    def sample(self, seed: int) -> Tasks:
        """A meta-batch. Images are noisy prototypes in the shape of a data set's: timing does not depend on what is drawn."""
        return self._images(seed) if self.image else self._sinusoids(seed)

    def _sinusoids(self, seed: int) -> Tasks:
        batch = fastmaml.tasks.Sinusoid(self.shots, self.queries, self.tasks, seed).sample()
        support, query = (self.tasks, self.shots, 1), (self.tasks, self.queries, 1)
        return batch.support_x.view(support), batch.support_y.view(support), batch.query_x.view(query), batch.query_y.view(query)

    def _images(self, seed: int) -> Tasks:
        g = torch.Generator().manual_seed(seed)
        channels, side = self.image
        prototypes = torch.rand(self.tasks, self.ways, channels, side, side, generator=g)

        def rows(n: int) -> tuple[Tensor, Tensor]:
            x = prototypes.repeat(1, n, 1, 1, 1)
            x += 0.3 * torch.randn(x.shape, generator=g)
            return x, torch.arange(self.ways).repeat(n).expand(self.tasks, -1).contiguous()

        return *rows(self.shots), *rows(self.queries)

    def varied(self, **changes: object) -> Workload:
        """With other settings, and a name that ``find`` understands."""
        said = "".join(f" [{key}={value}]" for key, value in changes.items())
        return replace(self, name=self.name + said, **changes)


def _sized(make: Callable[..., nn.Module], **options: object) -> Callable[[int, int], nn.Module]:
    return lambda ways, filters: make(ways, **options, **({"filters": filters} if filters else {}))


def _sinusoid(*hidden: int, init: str = "cbfinn") -> Callable[[int, int], nn.Module]:
    return lambda ways, filters: fastmaml.nn.SinusoidMLP(*(hidden or (40, 40)), init=init)


NO_NORMS = ("*.conv.*", "classifier.*")  # gamma and beta are trained outside only
MINI = (3, 84)
cbfinn, mini, fc = _sized(fastmaml.nn.CbfinnOmniglot), _sized(fastmaml.nn.CbfinnMiniImagenet), _sized(fastmaml.nn.OmniglotFC)

# cbfinn/maml (and MT-net) divide the sum over rows by the shots, so that their rates act on 5 or 20 times the mean. Its ports to torch take the mean and the
# same rates: the rows named "mean loss".
_ALL = (
    Workload("sinusoid, cbfinn", _sinusoid(), 25, 10, 10, 0.01, 1, image=(), loss="mse"),
    Workload("sinusoid, learn2learn", _sinusoid(32, 32, init="torch"), 16, 10, 10, 0.01, 5, image=(), loss="mse"),
    Workload("sinusoid, pytorch-maml", _sinusoid(init="torch"), 25, 5, 15, 0.1, 1, image=(), loss="mse"),
    Workload("Omniglot FC, learn2learn", fc, 32, 1, 1, 0.5, 1),
    Workload("Omniglot FC, 5 steps", fc, 32, 1, 15, 0.1, 5),
    Workload("Omniglot strided, cbfinn", cbfinn, 32, 1, 1, 0.4, 1, reduction=1.0, adapt=NO_NORMS),
    Workload("Omniglot strided, mean loss", cbfinn, 32, 1, 1, 0.4, 1, adapt=NO_NORMS),
    Workload("Omniglot strided 20-way, cbfinn", cbfinn, 16, 1, 1, 0.1, 5, ways=20, reduction=1.0, adapt=NO_NORMS),
    Workload("Omniglot strided, learn2learn", _sized(fastmaml.nn.OmniglotCNN), 32, 1, 1, 0.5, 1),
    Workload("Omniglot valid, dragen1860", _sized(fastmaml.nn.DragenOmniglot), 32, 1, 15, 0.4, 5),
    Workload("Omniglot conv3, higher", _sized(fastmaml.nn.HigherOmniglot), 32, 5, 15, 0.1, 5),
    Workload("Omniglot conv4-64, pytorch-maml", _sized(fastmaml.nn.PyTorchMAMLConv), 32, 1, 15, 0.4, 1, adapt=NO_NORMS),
    Workload("Omniglot conv4-64, HTYMAML", _sized(fastmaml.nn.HTYMAMLNet), 8, 1, 1, 0.1, 5, adapt=NO_NORMS),
    Workload("mini-ImageNet conv4-32, cbfinn", mini, 4, 1, 15, 0.01, 5, image=MINI, reduction=1.0, adapt=NO_NORMS),
    Workload("mini-ImageNet conv4-32, mean loss", mini, 4, 1, 15, 0.01, 5, image=MINI, adapt=NO_NORMS),
    Workload("mini-ImageNet conv4-32 5-shot, cbfinn", mini, 4, 5, 15, 0.01, 5, image=MINI, reduction=5.0, adapt=NO_NORMS),
    Workload("mini-ImageNet valid, dragen1860", _sized(fastmaml.nn.DragenMiniImagenet), 4, 1, 15, 0.01, 5, image=MINI),
    Workload("mini-ImageNet conv4-48, HTYMAML", _sized(fastmaml.nn.HTYMAMLNet, channels=3, side=84), 2, 1, 15, 0.1, 5, image=MINI, adapt=NO_NORMS, filters=48),
    Workload("mini-ImageNet conv4-64, pytorch-maml", _sized(fastmaml.nn.PyTorchMAMLConv, channels=3, side=84), 4, 1, 15, 0.1, 5, image=MINI, adapt=NO_NORMS),
    Workload("mini-ImageNet conv4-64, learn2learn", _sized(fastmaml.nn.CNN4), 32, 5, 5, 0.5, 1, image=MINI),
)  # fmt: skip
WORKLOADS = {w.name: w for w in _ALL}

DEFAULT = (  # what `make bench` measures
    "sinusoid, cbfinn",
    "Omniglot FC, learn2learn",
    "Omniglot strided, mean loss",
    "Omniglot conv4-64, pytorch-maml",
    "mini-ImageNet conv4-32, mean loss",
)
_CHANGE = re.compile(r" \[(\w+)=([^\]]*)\]")


def find(name: str) -> Workload:
    """The workload of this name, which may carry changes: ``"sinusoid, cbfinn [tasks=4] [inner_steps=10]"``. KeyError for an unknown name or setting."""
    base = WORKLOADS[name.split(" [")[0]]
    kinds = {f.name: type(getattr(base, f.name)) for f in fields(base)}
    read = {"bool": lambda text: text == "True", "int": int, "float": float, "str": str}
    changes = {key: read[kinds[key].__name__](value) for key, value in _CHANGE.findall(name)}
    return base.varied(**changes) if changes else base

