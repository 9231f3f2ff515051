"""fastmaml.nn: parameter counts of the reference systems, initialisation, and that every net traces."""

from __future__ import annotations

import pytest
import torch
from helpers_program import agrees, op_names
from torch import nn

import fastmaml.nn as nets
from fastmaml.trace import trace

OMNIGLOT, MINI, LINE = (1, 28, 28), (3, 84, 84), (1,)

# net, shape of a sample, adapted parameters, parameters that are only outer-learned (gamma, beta of some systems)
NETS = {
    "cbfinn sinusoid": (lambda: nets.SinusoidMLP(), LINE, 1761, 0),
    "learn2learn sinusoid": (lambda: nets.SinusoidMLP(32, 32, init="torch"), LINE, 1153, 0),
    "cbfinn omniglot": (lambda: nets.CbfinnOmniglot(), OMNIGLOT, 111_749, 256),
    "cbfinn omniglot 20-way": (lambda: nets.CbfinnOmniglot(20), OMNIGLOT, 112_724, 256),
    "cbfinn mini": (lambda: nets.CbfinnMiniImagenet(), MINI, 32_645, 128),
    "dragen omniglot": (lambda: nets.DragenOmniglot(), OMNIGLOT, 91_781, 0),
    "dragen mini": (lambda: nets.DragenMiniImagenet(), MINI, 32_901, 0),
    "learn2learn fc": (lambda: nets.OmniglotFC(), OMNIGLOT, 247_621, 0),
    "learn2learn cnn": (lambda: nets.OmniglotCNN(), OMNIGLOT, 112_261, 0),
    "learn2learn cnn4": (lambda: nets.CNN4(), MINI, 121_093, 0),
    "htymaml omniglot": (lambda: nets.HTYMAMLNet(), OMNIGLOT, 111_749, 512),
    "htymaml mini": (lambda: nets.HTYMAMLNet(channels=3, side=84, filters=48), MINI, 69_701, 384),
    "pytorch-maml omniglot": (lambda: nets.PyTorchMAMLConv(), OMNIGLOT, 111_749, 512),
    "pytorch-maml mini": (lambda: nets.PyTorchMAMLConv(channels=3, side=84), MINI, 120_581, 512),
    "higher omniglot": (lambda: nets.HigherOmniglot(), OMNIGLOT, 75_205, 0),
}


@pytest.mark.parametrize("name", NETS)
def test_parameter_count(name: str) -> None:
    build, _, adapted, outer_only = NETS[name]
    net = build()
    norm = sum(p.numel() for name, p in net.named_parameters() if ".norm." in name)
    total = sum(p.numel() for p in net.parameters())
    assert total == adapted + outer_only
    assert not outer_only or norm == outer_only


@pytest.mark.parametrize("name", NETS)
def test_traces_to_its_own_forward(name: str) -> None:
    build, shape, _, _ = NETS[name]
    net = build()
    program = agrees(net, shape, samples=3)
    assert {leaf.name for leaf in program.leaves} == {name for name, _ in net.named_parameters()}
    assert not {"pad2d", "avgpool2d"} & set(op_names(program))


def conv_sides(net: nn.Module, shape: tuple[int, ...]) -> list[int]:
    program = trace(net, shape)
    return [program.values[op.output].shape[1] for op in program.ops if op.name in ("conv2d", "maxpool2d")]


def test_image_sides_are_those_of_the_references() -> None:
    assert conv_sides(nets.CbfinnOmniglot(), OMNIGLOT) == [14, 7, 4, 2]
    assert conv_sides(nets.CbfinnMiniImagenet(), MINI) == [84, 42, 42, 21, 21, 10, 10, 5]
    assert conv_sides(nets.DragenOmniglot(), OMNIGLOT) == [13, 6, 2, 1]
    assert conv_sides(nets.DragenMiniImagenet(), MINI) == [82, 41, 39, 19, 17, 8, 6, 5]
    assert conv_sides(nets.HTYMAMLNet(), OMNIGLOT) == [28, 14, 14, 7, 7, 3, 3, 1]
    assert conv_sides(nets.HigherOmniglot(), OMNIGLOT) == [26, 13, 11, 5, 3, 1]


def test_tensorflows_same_padding_is_asymmetric_at_stride_2() -> None:
    paddings = [op.attrs["padding"] for op in trace(nets.CbfinnOmniglot(), OMNIGLOT).ops if op.name == "conv2d"]
    assert paddings == [(0, 1, 0, 1), (0, 1, 0, 1), (1, 1, 1, 1), (0, 1, 0, 1)]


def test_batch_normalisations_of_the_references() -> None:
    for net, eps in ((nets.CbfinnOmniglot(), 1e-3), (nets.OmniglotFC(), 1e-3), (nets.CNN4(), 1e-5)):
        norms = [m for m in net.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
        assert len(norms) == 4 and {norm.eps for norm in norms} == {eps}
    assert all(m.weight is None for m in nets.CbfinnOmniglot().modules() if isinstance(m, nn.BatchNorm2d))
    order = op_names(trace(nets.DragenOmniglot(), OMNIGLOT))[:3]
    assert order == ["conv2d", "relu", "batchnorm"]


def test_initialisation() -> None:
    torch.manual_seed(0)
    net = nets.CbfinnOmniglot()
    assert 0.9 < net.classifier.weight.std() < 1.1 and not net.classifier.bias.any() and not net.block1.conv.bias.any()
    assert nets.SinusoidMLP()[2].weight.abs().max() <= 0.02
    assert nets.OmniglotFC().classifier.weight.abs().max() <= 0.02
    gammas = nets.CNN4().block1.norm.weight
    assert 0 <= gammas.min() < 0.3 and 0.7 < gammas.max() <= 1
    assert 0.9 < nets.OmniglotCNN().classifier.weight.std() < 1.1
    assert abs(nets.DragenOmniglot().block2.conv.weight.std() - (2 / 576) ** 0.5) < 0.002


@pytest.mark.parametrize("affine", ["both", "beta", "gamma", "none"])
@pytest.mark.parametrize("order", ["conv-bn-relu", "conv-relu-bn"])
@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2, "head": "mean"},
        {"pool": 2, "padding": 0, "blocks": 2},
        {"stride": 2, "padding": "same", "activation": nn.Tanh},
    ],
    ids=["stride", "pool", "same"],
)
def test_conv4_options(affine: str, order: str, options: dict) -> None:
    agrees(nets.conv4(3, 2, 15, filters=4, affine=affine, order=order, eps=1e-2, **options), (2, 15, 15))


def test_wrong_options_are_named() -> None:
    for build in (
        lambda: nets.conv4(order="relu-conv"),
        lambda: nets.conv4(head="max"),
        lambda: nets.conv4(affine="all"),
        lambda: nets.SinusoidMLP(init="zeros"),
        lambda: nets.MLP(3),
    ):
        with pytest.raises(ValueError):
            build()


def test_learn2learns_own_classes() -> None:
    models = pytest.importorskip("learn2learn.vision.models")
    agrees(models.OmniglotFC(28 * 28, 5), OMNIGLOT, samples=3)
    agrees(models.OmniglotCNN(5), OMNIGLOT, samples=3)
    agrees(models.CNN4(5), MINI, samples=3)
