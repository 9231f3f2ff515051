"""The convolutional networks of the reference systems on the cpu executor: rules (a) and (b) of DESIGN.md on smooth images."""

from __future__ import annotations

import copy
import dataclasses
import statistics

import pytest
import torch
import torch.nn.functional as F
from executor_cases import ZERO, masks_equal_error
from random_programs import Case, error, gradients, numbers_for
from torch import Tensor, nn

import fastmaml.nn as nets
from fastmaml import MAML
from fastmaml.batch import TaskBatch
from fastmaml.executors.cpu.executor import CpuExecutor
from fastmaml.executors.torch.executor import TorchExecutor
from fastmaml.plan import Arrangement, Rate
from fastmaml.trace import trace

IMAGE, SMALL, MINI = (1, 28, 28), (3, 32, 32), (3, 84, 84)
# net, shape of a sample, whether gamma and beta stay outside the inner loop
NETS = {
    "cbfinn-omniglot": (lambda: nets.CbfinnOmniglot(filters=16), IMAGE, True),
    "dragen-omniglot": (nets.DragenOmniglot, IMAGE, False),
    "l2l-omniglot": (lambda: nets.OmniglotCNN(filters=24), IMAGE, False),
    "l2l-cnn4": (lambda: nets.CNN4(filters=17, side=32), SMALL, False),
    "l2l-mini": (lambda: nets.MiniImagenetCNN(filters=8, side=32), SMALL, False),
    "htymaml-omniglot": (lambda: nets.HTYMAMLNet(filters=16), IMAGE, True),
    "htymaml-mini": (lambda: nets.HTYMAMLNet(5, channels=3, side=32, filters=12), SMALL, True),
    "pytorch-maml-omniglot": (lambda: nets.PyTorchMAMLConv(filters=16), IMAGE, True),
    "pytorch-maml-mini": (lambda: nets.PyTorchMAMLConv(5, channels=3, side=32, filters=8), SMALL, True),
    "higher": (lambda: nets.HigherOmniglot(filters=16), IMAGE, False),
}
LARGE = {
    "cbfinn-mini": (lambda: nets.CbfinnMiniImagenet(filters=8), MINI, True),
    "dragen-mini": (lambda: nets.DragenMiniImagenet(filters=8), MINI, False),
    "l2l-mini-84": (lambda: nets.MiniImagenetCNN(filters=8), MINI, False),
    "htymaml-mini-84": (lambda: nets.HTYMAMLNet(5, channels=3, side=84, filters=8), MINI, True),
    "pytorch-maml-mini-84": (lambda: nets.PyTorchMAMLConv(5, channels=3, side=84, filters=8), MINI, True),
}
names = pytest.mark.parametrize("name", [*NETS, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])


def smooth(classes: Tensor, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Images between 0 and 1 of a few strokes' size, alike within a class, with some noise."""
    c, h, w = shape
    prototypes = torch.randn(5, c, 7, 7, generator=generator)
    coarse = prototypes[classes] + 0.6 * torch.randn(len(classes), c, 7, 7, generator=generator)
    fine = 0.5 * torch.randn(len(classes), c, h, w, generator=generator)
    return torch.sigmoid(2 * F.interpolate(coarse, (h, w), mode="bicubic") + fine)


def net_case(name: str, tasks: int, steps: int, first_order: bool = False) -> Case:
    build, shape, outer_norms = {**NETS, **LARGE}[name]
    torch.manual_seed(0)
    net = build().train()
    program = trace(net, shape).with_roles(lambda leaf: "outer" if outer_norms and ".norm." in leaf else "adapted")
    rates = {leaf.name: Rate("lr", learned=True) for leaf in program.leaves if leaf.role == "adapted"}
    a = Arrangement(steps=steps, rates=rates, first_order=first_order)
    shots = 3 if "dragen" in name else 1  # the norm comes after the ReLU: of five rows, many of them zeros, it is ill-conditioned
    case = numbers_for(program, a, 0, [(5 * shots, 10)] * tasks, rate=0.0005 if name == "dragen-mini" else 0.01)
    generator, support, query = torch.Generator().manual_seed(1), torch.arange(5 * shots) % 5, torch.arange(10) % 5
    parts = [(smooth(support, shape, generator), support, smooth(query, shape, generator), query) for _ in range(tasks)]
    parameters = dict(net.named_parameters())
    leaves = {n: parameters[n].detach() + 0.02 * torch.randn(parameters[n].shape, generator=generator) for n in case.leaves}
    return dataclasses.replace(case, leaves=leaves, batch=TaskBatch.from_tasks(parts))


@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
@pytest.mark.parametrize("steps", [0, 1, 5])
@names
def test_equal_masks(name: str, steps: int, first_order: bool) -> None:
    case = net_case(name, 2, steps, first_order)
    assert 0 <= masks_equal_error(case, 3e-5, threads=2) <= 3e-5


@names
def test_free_running_is_as_good_as_float32_torch(name: str) -> None:
    case = net_case(name, 16 if name in NETS else 4, steps=2)
    plan = case.plan(record_masks=True)
    executor = CpuExecutor(plan)
    errors: dict[str, list[float]] = {"ours": [], "torch": []}
    flips = decisions = 0
    for t in range(len(case.batch)):
        one = dataclasses.replace(case, batch=case.batch.select(t))
        exact = TorchExecutor(plan).forward(one.call())
        truth = {n.removeprefix("grad."): v for n, v in exact.values.items() if isinstance(n, str) and n.startswith("grad.")}
        _, plain = one.truth(torch.float32)
        results = executor.forward(one.call(torch.float32, record=True))
        errors["ours"].append(error(gradients(results, truth), truth, ZERO))
        errors["torch"].append(error(plain, truth, ZERO))
        for key in [key for key in exact.values if isinstance(key, tuple)]:
            flips += int((exact.values[key][0] != results.values[key][0]).sum())
            decisions += exact.values[key][0].numel()
    assert decisions and flips <= 1e-3 * decisions
    assert statistics.median(errors["ours"]) <= 2 * statistics.median(errors["torch"])


# ------------------------------------------------------------------------------------------------- odd layers, all options


def norm(channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels, track_running_stats=False)


class Tied(nn.Module):
    """One convolution twice, around a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.classifier = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv(torch.tanh(self.stem(x))))
        return self.classifier((x + torch.tanh(self.conv(x))).mean((2, 3)))


BODY = (nn.Conv2d(3, 7, 3, padding=1), norm(7), nn.ELU(), nn.MaxPool2d(2), nn.Conv2d(7, 17, 3, padding=1), norm(17), nn.ELU())
ODD = {  # layers in front of a linear one, shape of a sample
    "plain": (BODY, (3, 8, 8)),
    "kernel-larger-than-image": ((nn.Conv2d(3, 5, 11, padding=2), nn.Tanh()), (3, 8, 8)),
    "kernel-as-image": ((nn.Conv2d(3, 5, 8), nn.Tanh()), (3, 8, 8)),
    "stride-larger-than-kernel": ((nn.Conv2d(3, 5, 2, 3), nn.Tanh(), nn.Conv2d(5, 18, 1, 2), nn.Tanh()), (3, 8, 8)),
    "padding-alone": ((nn.Conv2d(3, 5, 1, padding=3), norm(5), nn.Tanh(), nn.MaxPool2d(2)), (3, 5, 5)),
    "512-channels": ((nn.Conv2d(3, 512, 3), nn.Tanh(), nn.Conv2d(512, 17, 3), nn.Tanh()), (3, 6, 6)),
    "one-pixel": ((nn.Conv2d(3, 20, 3, padding=1), norm(20), nn.Tanh(), nn.Conv2d(20, 33, 1), nn.Tanh()), (3, 1, 1)),
    "norm-first": ((norm(3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 5, 3), nn.Tanh()), (3, 8, 8)),
    "pool-first": ((nn.MaxPool2d(2), nn.Conv2d(3, 5, 3), nn.Tanh()), (3, 9, 7)),
    "unflatten": ((nn.Unflatten(1, (3, 8, 8)), norm(3), nn.Conv2d(3, 5, 3), nn.Tanh()), (192,)),
    "unflatten-relu": ((nn.Unflatten(1, (3, 8, 8)), nn.ReLU()), (192,)),
    "no-conv": ((nn.ReLU(),), (3, 8, 8)),
    "linear-first": ((nn.Linear(12, 48), nn.Tanh(), nn.Unflatten(1, (3, 4, 4)), nn.Conv2d(3, 17, 3), nn.Tanh()), (12,)),
}


def rows_of(shape: tuple[int, ...]) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [t for n in (6, 7) for t in (torch.randn(3, n, *shape, generator=g), torch.randint(0, 5, (3, n), generator=g))]


def model_of(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(0)
    if name == "tied":
        return Tied(), (3, 8, 8)
    layers, shape = ODD[name]
    body = nn.Sequential(*copy.deepcopy(layers), nn.Flatten())
    return nn.Sequential(body, nn.Linear(body(torch.zeros(2, *shape)).shape[1], 5)), shape


def meta_gradients(name: str, backend: str, dtype: torch.dtype, outer=None, **options: object) -> dict[str, Tensor]:
    model, shape = model_of(name)
    rates = options.pop("inner_lr", 0.05)
    if rates == "element":
        rates = {n: 0.05 * torch.rand(p.shape, generator=torch.Generator().manual_seed(2)).to(dtype) for n, p in model.named_parameters()}
    maml = MAML(model.to(dtype), backend=backend, inner_lr=rates, inner_steps=3, **options)
    tasks = [t.to(dtype) if t.is_floating_point() else t for t in rows_of(shape)]
    maml(tasks, **({"outer_loss": outer} if outer else {})).loss.backward()
    return {str(i): p.grad.double() for i, p in enumerate(maml.parameters()) if p.grad is not None}


@pytest.mark.parametrize("batchnorm", ["batch", "support"])
@pytest.mark.parametrize("name", [*ODD, "tied"])
def test_odd_layers(name: str, batchnorm: str) -> None:
    got, truth = (meta_gradients(name, *run, batchnorm=batchnorm) for run in (("cpu", torch.float32), ("torch", torch.float64)))
    assert error(got, truth, ZERO) <= 5e-6


def smoothed(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), y.flatten(), label_smoothing=0.3) + logits.square().mean()


OPTIONS = {
    "first": {"first_order": True},
    "fast": {"memory": "fast"},
    "every-step": {"step_loss_weights": [0.1, 0.2, 0.7]},
    "head": {"adapt": "1.*"},  # ANIL
    "body": {"adapt": "0.*"},  # BOIL
    "one-layer": {"adapt": "0.4.*"},
    "element": {"inner_lr": "element", "learn_inner_lr": True},
    "element-fast": {"inner_lr": "element", "learn_inner_lr": True, "memory": "fast"},
    "step": {"inner_lr": torch.tensor([0.05, 0.02, 0.03]), "learn_inner_lr": True},
    "outer": {"outer": smoothed},
    "outer-support": {"outer": smoothed, "batchnorm": "support"},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_on_images(option: str) -> None:
    got, truth = (meta_gradients("plain", *run, **OPTIONS[option]) for run in (("cpu", torch.float32), ("torch", torch.float64)))
    assert got.keys() == truth.keys() and error(got, truth, ZERO) <= 5e-6


@pytest.mark.parametrize("adapt", ["*", "1.*", "0.*"])
def test_what_is_adapted_comes_in_the_models_layout(adapt: str) -> None:
    found = []
    for backend, dtype in (("cpu", torch.float32), ("torch", torch.float64)):
        model, shape = model_of("plain")
        x, y, q, _ = rows_of(shape)
        adapted = MAML(model.to(dtype), backend=backend, inner_lr=0.05, inner_steps=3, adapt=adapt).adapt(x.to(dtype), y)
        parameters = {n: p.detach() for n, p in adapted.module(1).named_parameters()}
        found.append({**parameters, "logits": adapted(q.to(dtype)).detach(), "module": adapted.module(1)(q[1].to(dtype)).detach()})
    for name, truth in found[1].items():
        torch.testing.assert_close(found[0][name].double(), truth, rtol=1e-5, atol=2e-6)
