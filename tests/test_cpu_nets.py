"""The convolutional networks of the reference systems on the cpu executor: rules (a) and (b) of DESIGN.md on smooth images."""

from __future__ import annotations

import dataclasses
import statistics

import pytest
import torch
import torch.nn.functional as F
from random_programs import Case, error, gradients, numbers_for
from test_cpu_executor import ZERO, masks_equal_error
from torch import Tensor

import fastmaml.nn as nets
from fastmaml.batch import TaskBatch
from fastmaml.executors.cpu import CpuExecutor
from fastmaml.executors.torch import TorchExecutor
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
    case = numbers_for(program, a, 0, [(5 * shots, 10)] * tasks, rate=0.002 if name == "dragen-mini" else 0.01)
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
