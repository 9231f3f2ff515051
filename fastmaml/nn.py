"""The networks of the reference systems: same layers, same parameter counts, same initialisation.

All are plain ``nn.Sequential`` of torch layers, so they also run without fastmaml. Images are
[n, channels, side, side].
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "CNN4",
    "MLP",
    "CbfinnMiniImagenet",
    "CbfinnOmniglot",
    "DragenMiniImagenet",
    "DragenOmniglot",
    "HTYMAMLNet",
    "HigherOmniglot",
    "MiniImagenetCNN",
    "OmniglotCNN",
    "OmniglotFC",
    "PyTorchMAMLConv",
    "SinusoidMLP",
    "StepBatchNorm",
    "batchnorm",
    "conv4",
    "per_step_batchnorm",
]

# ------------------------------------------------------------------------------------------------------ building blocks


def batchnorm(channels: int, *, dims: int = 2, affine: str = "both", eps: float = 1e-5, **options: object) -> nn.Module:
    """BatchNorm1d/2d with ``affine``: "both", "beta" (no gamma, as TensorFlow's default), "gamma" or "none"."""
    if affine not in ("both", "beta", "gamma", "none"):
        raise ValueError(f"affine={affine!r} is not one of 'both', 'beta', 'gamma', 'none'")
    kind = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}[dims]
    norm = kind(channels, eps=eps, affine=affine != "none", **options)
    if affine == "beta":
        norm.register_parameter("weight", None)
    elif affine == "gamma":
        norm.register_parameter("bias", None)
    return norm


def same_padding(side: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME padding (before, after): the odd one goes after, also at stride 2 (28 -> 14 pads 0 and 1)."""
    total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
    return total // 2, total - total // 2


def _conv_layers(
    channels: int,
    side: int,
    ways: int,
    *,
    filters: int = 64,
    blocks: int = 4,
    kernel: int | Sequence[int] = 3,
    stride: int | Sequence[int] = 1,
    padding: int | str = 1,
    pool: int | Sequence[int] = 0,
    pool_kernel: int = 2,
    order: str = "conv-bn-relu",
    affine: str = "both",
    eps: float = 1e-5,
    momentum: float = 0.1,
    track_running_stats: bool = False,
    activation: Callable[[], nn.Module] = nn.ReLU,
    head: str = "flatten",
) -> OrderedDict[str, nn.Module]:
    """The layers of ``conv4``, by name; ``side`` is followed through them to size the head."""
    if order not in ("conv-bn-relu", "conv-relu-bn") or head not in ("flatten", "mean"):
        raise ValueError(f"order={order!r} (conv-bn-relu, conv-relu-bn) or head={head!r} (flatten, mean) is unknown")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i in range(blocks):
        k, s, p = (v if isinstance(v, int) else v[i] for v in (kernel, stride, pool))
        before, after = same_padding(side, k, s) if padding == "same" else (padding, padding)
        block: OrderedDict[str, nn.Module] = OrderedDict()
        if before != after:
            block["pad"] = nn.ZeroPad2d((before, after, before, after))
        block["conv"] = nn.Conv2d(filters if i else channels, filters, k, s, before if before == after else 0)
        norm = batchnorm(filters, affine=affine, eps=eps, momentum=momentum, track_running_stats=track_running_stats)
        pair = {"norm": norm, "relu": activation()}
        block.update(pair if order == "conv-bn-relu" else reversed(list(pair.items())))
        side = (side + before + after - k) // s + 1
        if p:
            block["pool"] = nn.MaxPool2d(pool_kernel, p)
            side = (side - pool_kernel) // p + 1
        layers[f"block{i + 1}"] = nn.Sequential(block)
    if head == "mean":
        layers["mean"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["classifier"] = nn.Linear(filters * (1 if head == "mean" else side * side), ways)
    return layers


def conv4(ways: int = 5, channels: int = 1, side: int = 28, **options: object) -> nn.Sequential:
    """The few-shot convolutional network in all its variants; torch's default initialisation.

    filters=64, blocks=4, kernel=3, stride=1, padding=1 ("same": as TensorFlow, 0: none), pool=0 (stride of a max
    pooling of side ``pool_kernel``=2; 0: none): kernel, stride and pool may be one number per block.
    order="conv-bn-relu" or "conv-relu-bn"; affine, eps, momentum, track_running_stats of the batch normalisation;
    activation=nn.ReLU; head="flatten" or "mean" (over H and W) before the linear layer.
    """
    return nn.Sequential(_conv_layers(channels, side, ways, **options))


def _initialise(
    net: nn.Module, weight: Callable | None = None, *, head: Callable | None = None, gamma: Callable | None = None
) -> None:
    """Weights of linear and conv layers by ``weight``, of the last linear layer by ``head``; their biases zero."""
    layers = [m for m in net.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    for layer in layers:
        init = (head or weight) if layer is layers[-1] else weight
        init(layer.weight)
        nn.init.zeros_(layer.bias)
    for norm in net.modules():
        if gamma is not None and isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)):
            gamma(norm.weight)


def _truncated_normal(weight: nn.Parameter) -> None:
    nn.init.trunc_normal_(weight, std=0.01, a=-0.02, b=0.02)


# ------------------------------------------------------------------------------------------------- fully connected nets


class MLP(nn.Sequential):
    """Linear layers of the given sizes with an activation between them: ``MLP(1, 40, 40, 1)``. Input [n, sizes[0]]."""

    def __init__(self, *sizes: int, activation: Callable[[], nn.Module] = nn.ReLU) -> None:
        if len(sizes) < 2:
            raise ValueError(f"MLP needs an input and an output size, got {sizes}")
        layers: list[nn.Module] = []
        for inputs, outputs in zip(sizes[:-1], sizes[1:], strict=True):
            layers += [nn.Linear(inputs, outputs), activation()]
        super().__init__(*layers[:-1])


class SinusoidMLP(MLP):
    """Sinusoid regression, input [n, 1]. cbfinn/maml: 40, 40 and truncated normal weights of deviation 0.01.

    With ``init="torch"`` that of tristandeleu/pytorch-maml; learn2learn has ``SinusoidMLP(32, 32, init="torch")``.
    """

    def __init__(self, *hidden: int, init: str = "cbfinn") -> None:
        if init not in ("cbfinn", "torch"):
            raise ValueError(f"init={init!r} is not one of 'cbfinn', 'torch'")
        super().__init__(1, *(hidden or (40, 40)), 1)
        if init == "cbfinn":
            _initialise(self, _truncated_normal)


class OmniglotFC(nn.Sequential):
    """learn2learn ``OmniglotFC``: 784-256-128-64-64-ways, Linear -> BatchNorm1d(eps 1e-3) -> ReLU. [n, 1, 28, 28]."""

    def __init__(self, ways: int = 5, inputs: int = 784, sizes: Sequence[int] = (256, 128, 64, 64)) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        for i, size in enumerate(sizes):
            norm = batchnorm(size, dims=1, eps=1e-3, momentum=0.999, track_running_stats=False)
            layers[f"block{i + 1}"] = nn.Sequential(nn.Linear(inputs, size), norm, nn.ReLU())
            inputs = size
        layers["classifier"] = nn.Linear(inputs, ways)
        super().__init__(layers)
        _initialise(self, _truncated_normal)


# -------------------------------------------------------------------------------------------------- convolutional nets


class CbfinnOmniglot(nn.Sequential):
    """cbfinn/maml: 4 x [conv 3x3, 64, stride 2, SAME -> BN (beta only, eps 1e-3) -> ReLU], mean over H and W, linear.

    beta lives outside the adapted weights there: adapt all but ``*.norm.bias``. Images [n, 1, 28, 28].
    """

    def __init__(self, ways: int = 5, filters: int = 64) -> None:
        super().__init__(
            _conv_layers(1, 28, ways, filters=filters, stride=2, padding="same", affine="beta", eps=1e-3, head="mean")
        )
        _initialise(self, nn.init.xavier_uniform_, head=nn.init.normal_)


class CbfinnMiniImagenet(nn.Sequential):
    """cbfinn/maml: 4 x [conv 3x3, 32, SAME -> BN (beta only, eps 1e-3) -> ReLU -> maxpool 2], linear. [n, 3, 84, 84].

    The original flattens channels last: its head is this one with permuted columns.
    """

    def __init__(self, ways: int = 5, filters: int = 32) -> None:
        super().__init__(_conv_layers(3, 84, ways, filters=filters, padding="same", pool=2, affine="beta", eps=1e-3))
        _initialise(self, nn.init.xavier_uniform_)


class DragenOmniglot(nn.Sequential):
    """dragen1860/MAML-Pytorch: 3 x [conv 3x3, 64, stride 2 -> ReLU -> BN], conv 2x2 -> ReLU -> BN, linear; unpadded."""

    def __init__(self, ways: int = 5) -> None:
        options = dict(padding=0, kernel=(3, 3, 3, 2), stride=(2, 2, 2, 1), order="conv-relu-bn")
        super().__init__(_conv_layers(1, 28, ways, track_running_stats=True, **options))
        _initialise(self, nn.init.kaiming_normal_)


class DragenMiniImagenet(nn.Sequential):
    """dragen1860/MAML-Pytorch: 4 x [conv 3x3, 32, unpadded -> ReLU -> BN -> maxpool 2, strides 2, 2, 2, 1], linear."""

    def __init__(self, ways: int = 5, filters: int = 32) -> None:
        options = dict(padding=0, pool=(2, 2, 2, 1), order="conv-relu-bn", track_running_stats=True)
        super().__init__(_conv_layers(3, 84, ways, filters=filters, **options))
        _initialise(self, nn.init.kaiming_normal_)


class OmniglotCNN(nn.Sequential):
    """learn2learn ``OmniglotCNN``: 4 x [conv 3x3, 64, stride 2, padding 1 -> BN -> ReLU], mean over H and W, linear."""

    def __init__(self, ways: int = 5, filters: int = 64, blocks: int = 4) -> None:
        options = dict(stride=2, track_running_stats=True, head="mean")
        super().__init__(_conv_layers(1, 28, ways, filters=filters, blocks=blocks, **options))
        _initialise(self, nn.init.xavier_uniform_, head=nn.init.normal_, gamma=nn.init.uniform_)


class CNN4(nn.Sequential):
    """learn2learn ``CNN4`` (MiniImagenetCNN): 4 x [conv 3x3, 64, padding 1 -> BN -> ReLU -> maxpool 2], linear."""

    def __init__(self, ways: int = 5, filters: int = 64, channels: int = 3, side: int = 84) -> None:
        super().__init__(_conv_layers(channels, side, ways, filters=filters, pool=2, track_running_stats=True))
        _initialise(self, nn.init.xavier_uniform_, gamma=nn.init.uniform_)


MiniImagenetCNN = CNN4


class HTYMAMLNet(nn.Sequential):
    """HowToTrainYourMAMLPytorch: 4 x [conv 3x3, padding 1 -> BN -> LeakyReLU(0.01) -> maxpool 2], linear.

    Omniglot as it stands (64 filters); mini-ImageNet: ``HTYMAMLNet(5, channels=3, side=84, filters=48)``. Unless MAML++
    says otherwise gamma and beta are not adapted: adapt all but ``*.norm.*``.
    """

    def __init__(self, ways: int = 5, channels: int = 1, side: int = 28, filters: int = 64) -> None:
        super().__init__(_conv_layers(channels, side, ways, filters=filters, pool=2, activation=nn.LeakyReLU))
        _initialise(self, nn.init.xavier_uniform_)


class PyTorchMAMLConv(nn.Sequential):
    """tristandeleu/pytorch-maml ``MetaConvModel``: 4 x [conv 3x3, padding 1 -> BN -> ReLU -> maxpool 2], linear.

    Omniglot as it stands; mini-ImageNet: ``PyTorchMAMLConv(5, channels=3, side=84)``. gamma and beta are not adapted
    there: adapt all but ``*.norm.*``. torch's default initialisation.
    """

    def __init__(self, ways: int = 5, channels: int = 1, side: int = 28, filters: int = 64) -> None:
        super().__init__(_conv_layers(channels, side, ways, filters=filters, pool=2, momentum=1.0))


class HigherOmniglot(nn.Sequential):
    """higher, torchopt, functorch and torchbench: 3 x [conv 3x3, 64, no padding -> BN -> ReLU -> maxpool 2], linear.

    torch's default initialisation. Images [n, 1, 28, 28].
    """

    def __init__(self, ways: int = 5, filters: int = 64) -> None:
        options = dict(padding=0, pool=2, momentum=1.0, track_running_stats=True)
        super().__init__(_conv_layers(1, 28, ways, filters=filters, blocks=3, **options))


# -------------------------------------------------------------------------------------------------------- MAML++


class StepBatchNorm(nn.modules.batchnorm._NormBase):
    """Batch normalisation with a gamma and a beta for each inner step (MAML++: Antoniou et al. 2019), [n, channels, ...] -> the same.

    weight, bias                [steps, channels]: the support rows of step k read row k, the query rows after that step the same one. They are outer-learned
                                and never adapted, whatever ``adapt=`` says.
    running_mean, running_var   [steps, channels], buffers, with ``statistics=True``; else None
    step                        the row that is read outside of MAML; the last one at first

    The statistics are those of the batch. Running ones are read with ``batchnorm="running"`` alone, or in eval mode outside of MAML. A MAML object never
    changes them: ``fastmaml.methods.record_statistics`` does, and, as ever in torch, a forward of the module itself in train mode.
    """

    def __init__(self, channels: int, steps: int, eps: float = 1e-5, momentum: float = 0.1, statistics: bool = False) -> None:
        super().__init__(channels, eps, momentum, affine=False, track_running_stats=False)
        self.weight, self.bias = nn.Parameter(torch.ones(steps, channels)), nn.Parameter(torch.zeros(steps, channels))
        if statistics:
            self.running_mean, self.running_var = torch.zeros(steps, channels), torch.ones(steps, channels)
        self.steps, self.step = steps, steps - 1

    def reset_parameters(self) -> None:
        pass

    def _check_input_dim(self, x: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        rows = (self.running_mean, self.running_var, self.weight, self.bias)
        mean, var, weight, bias = (None if row is None else torch.select(row, 0, self.step) for row in rows)
        return F.batch_norm(x, mean, var, weight, bias, self.training or mean is None, self.momentum, self.eps)

    def extra_repr(self) -> str:
        return f"{self.num_features}, steps={self.steps}, eps={self.eps}, momentum={self.momentum}, statistics={self.running_mean is not None}"


def per_step_batchnorm(model: nn.Module, steps: int, *, statistics: bool = False) -> nn.Module:
    """Puts a StepBatchNorm in the place of each BatchNorm1d and BatchNorm2d of ``model``, which is changed and returned; each row begins as their affine
    and, with ``statistics`` (running ones for each step), as their statistics."""
    for name, child in model.named_children():
        if type(child) in (nn.BatchNorm1d, nn.BatchNorm2d):
            like = next((p for p in child.parameters()), next(model.parameters(), torch.empty(0)))
            momentum = 0.1 if child.momentum is None else child.momentum
            norm = StepBatchNorm(child.num_features, steps, child.eps, momentum, statistics).train(child.training).to(like.device, like.dtype)
            with torch.no_grad():
                for mine in ("weight", "bias", *(("running_mean", "running_var") if statistics else ())):
                    if getattr(child, mine) is not None:
                        getattr(norm, mine).copy_(getattr(child, mine))
            setattr(model, name, norm)
        else:
            per_step_batchnorm(child, steps, statistics=statistics)
    return model


def per_step_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that have a value for each inner step."""
    found = {id(p) for m in model.modules() if isinstance(m, StepBatchNorm) for p in m.parameters()}
    return {name for name, p in model.named_parameters() if id(p) in found}


def per_step_buffers(model: nn.Module) -> set[str]:
    """Names of the buffers that have a value for each inner step."""
    found = {id(b) for m in model.modules() if isinstance(m, StepBatchNorm) for b in m.buffers()}
    return {name for name, b in model.named_buffers() if id(b) in found}
