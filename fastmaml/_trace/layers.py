"""Trace rules for linear and convolutional layers, normalisation and activations."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastmaml._trace.rules import DROPOUT, Misuse, Refusal, pair_of, rows_of, rule, weight_of

if TYPE_CHECKING:
    from fastmaml._trace.recorder import Recorder


@rule("linear")
def linear(r: Recorder, input: Any, weight: Any, bias: Any = None) -> int:
    w = weight_of(r, weight, "weight of linear")
    return r.op("linear", rows_of(r, input, "linear"), w, weight_of(r, bias, "bias of linear", r.shape(w)[:1]))


@rule("conv2d")
def conv2d(
    r: Recorder,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> int:
    if groups != 1:
        raise Refusal(f"groups={groups} is not supported")
    if pair_of(dilation) != (1, 1):
        raise Refusal(f"dilation={dilation} is not supported")
    x, w = rows_of(r, input, "conv2d"), weight_of(r, weight, "weight of conv2d")
    if len(r.shape(w)) != 4:
        raise Refusal(f"conv2d with a weight {list(r.shape(w))}, not [out, in, kh, kw]")
    pads = _conv_padding(padding, r.shape(w)[2:], pair_of(stride))
    made = r.producer(x)
    if made is not None and made.name == "pad2d":  # zeros around an image are the convolution's own padding
        x, pads = made.inputs[0], tuple(p + q for p, q in zip(pads, made.attrs["padding"], strict=True))
    return r.op(
        "conv2d", x, w, weight_of(r, bias, "bias of conv2d", r.shape(w)[:1]), stride=pair_of(stride), padding=pads
    )


def _conv_padding(padding: Any, kernel: tuple[int, ...], stride: tuple[int, int]) -> tuple[int, ...]:
    """As top, bottom, left, right. "same" puts the odd one of an even kernel at the bottom and right."""
    if padding == "valid":
        return (0, 0, 0, 0)
    if padding == "same":
        if stride != (1, 1):
            raise Refusal("padding='same' with a stride is not supported (nor by torch)")
        return tuple(p for k in kernel for p in ((k - 1) // 2, k - 1 - (k - 1) // 2))
    if isinstance(padding, str):
        raise Refusal(f"padding={padding!r} is not supported")
    ph, pw = pair_of(padding)
    return (ph, ph, pw, pw)


@rule("pad")
def pad(r: Recorder, input: Any, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> int:
    if mode != "constant" or value not in (None, 0):
        raise Refusal(
            f"padding_mode={mode!r} is not supported"
            if mode != "constant"
            else f"padding with {value}, not zeros, is not supported"
        )
    sides = [operator.index(p) for p in pad]
    x = rows_of(r, input, "padding")
    if any(sides[4:]) or any(p < 0 for p in sides) or len(r.shape(x)) != 3:
        raise Refusal(f"F.pad with {tuple(pad)}: only zeros around H and W of images [n, c, h, w] are supported")
    left, right, top, bottom = (sides + [0] * 4)[:4]
    return r.op("pad2d", x, padding=(top, bottom, left, right)) if any(sides) else x


@rule("batch_norm")
def batch_norm(
    r: Recorder,
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: Any = 0.1,
    eps: float = 1e-5,
) -> int:
    x = rows_of(r, input, "batch_norm")
    if not r.shape(x):
        raise Refusal("batch_norm of samples without a channel axis")
    statistics = _statistics(r, running_mean, running_var, training)
    channels = r.shape(x)[:1]
    given = {"gamma": weight, "beta": bias}
    if statistics == "running":
        given |= {"running_mean": running_mean, "running_var": running_var}
    operands = [weight_of(r, tensor, f"{name} of batch_norm", channels) for name, tensor in given.items()]
    return r.op("batchnorm", x, *operands, eps=float(eps), statistics=statistics)


def _statistics(r: Recorder, running_mean: Any, running_var: Any, training: bool) -> str:
    statistics = r.batchnorm or ("batch" if training else "running")
    if r.batchnorm is None and not training and r.is_running(running_mean):
        raise Misuse(
            "the layer is in eval mode and has running statistics: say batchnorm='batch' (statistics of the batch, as "
            "MAML trains) or batchnorm='running', or call model.train()"
        )
    if statistics == "running" and (running_mean is None or running_var is None):
        raise Misuse(
            "batchnorm='running', but the layer has no running statistics: say batchnorm='batch', or build it with "
            "track_running_stats=True"
        )
    return statistics


@rule("layer_norm")
def layer_norm(
    r: Recorder, input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> int:
    x = rows_of(r, input, "layer_norm")
    shape = tuple(normalized_shape)
    if not shape or r.shape(x)[-len(shape) :] != shape:
        raise Refusal(f"layer_norm over {list(shape)} of samples {list(r.shape(x))}")
    gamma, beta = weight_of(r, weight, "gamma of layer_norm", shape), weight_of(r, bias, "beta of layer_norm", shape)
    return r.op("layernorm", x, gamma, beta, eps=float(eps), dims=len(shape))


@rule("group_norm")
def group_norm(
    r: Recorder, input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> int:
    x = rows_of(r, input, "group_norm")
    channels = r.shape(x)[:1]
    if not channels or channels[0] % num_groups:
        raise Refusal(f"group_norm with {num_groups} groups of samples {list(r.shape(x))}")
    gamma, beta = (
        weight_of(r, weight, "gamma of group_norm", channels),
        weight_of(r, bias, "beta of group_norm", channels),
    )
    return r.op("groupnorm", x, gamma, beta, eps=float(eps), groups=int(num_groups))


def _elementwise(name: str) -> None:
    @rule(name)
    def apply(r: Recorder, input: Any) -> int:
        return r.op(name, rows_of(r, input, name))


for _name in ("relu", "tanh", "silu"):
    _elementwise(_name)


@rule("sigmoid")
def sigmoid(r: Recorder, input: Any) -> int:
    return r.op("sigmoid", r.use(input))


@rule("exp")
def exp(r: Recorder, input: Any) -> int:
    return r.op("exp", r.use(input))


@rule("leaky_relu")
def leaky_relu(r: Recorder, input: Any, negative_slope: float = 0.01) -> int:
    return r.op("leaky_relu", rows_of(r, input, "leaky_relu"), slope=float(negative_slope))


@rule("elu")
def elu(r: Recorder, input: Any, alpha: float = 1.0) -> int:
    return r.op("elu", rows_of(r, input, "elu"), alpha=float(alpha))


@rule("gelu")
def gelu(r: Recorder, input: Any, approximate: str = "none") -> int:
    return r.op("gelu", rows_of(r, input, "gelu"), approximate=approximate)


@rule("softplus")
def softplus(r: Recorder, input: Any, beta: float = 1.0, threshold: float = 20.0) -> int:
    return r.op("softplus", rows_of(r, input, "softplus"), beta=float(beta), threshold=float(threshold))


@rule("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "feature_dropout")
def dropout(r: Recorder, input: Any, p: float = 0.5, training: bool = True) -> int:
    if training and p:
        raise Refusal(DROPOUT)
    return r.use(input)
