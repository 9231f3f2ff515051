"""trace: what a Program cannot express is refused, naming the innermost layer and the reason."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers_program import Fn
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm

from fastmaml.trace import TraceError, trace


def hooked(register: str) -> nn.Module:
    layer = nn.Linear(4, 4)
    getattr(layer, register)(lambda *args: None)
    return layer


class Straight(torch.autograd.Function):
    """A quantiser with a straight-through gradient: its forward alone would be a wrong Program."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return torch.relu(x)

    @staticmethod
    def backward(ctx: object, dy: Tensor) -> Tensor:
        return dy


class Reversal(torch.autograd.Function):
    """A forward that does nothing at all."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: object, dy: Tensor) -> Tensor:
        return -dy


def view_then_in_place(m: nn.Module, x: Tensor) -> Tensor:
    y = m.a(x)
    z = y.view(-1, 2, 2)
    z.relu_()
    return y.tanh()


def no_grad(m: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return m.a(x)


def image(layer: nn.Module) -> tuple[nn.Module, tuple[int, ...]]:
    return layer, (4, 8, 8)


# name: (layer, shape of a sample, kind, fragment of the reason)
REFUSED = {
    "groups": (*image(nn.Conv2d(4, 4, 3, groups=2)), "Conv2d", "groups=2 is not supported"),
    "dilation": (*image(nn.Conv2d(4, 4, 3, dilation=2)), "Conv2d", "dilation=(2, 2) is not supported"),
    "padding mode": (*image(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")), "Conv2d", "padding_mode='reflect'"),
    "constant pad": (*image(nn.ConstantPad2d(1, 2.0)), "ConstantPad2d", "padding with 2.0, not zeros"),
    "cropping": (*image(nn.ZeroPad2d((0, -1, 0, 0))), "ZeroPad2d", "only zeros around H and W"),
    "max ceil": (*image(nn.MaxPool2d(3, ceil_mode=True)), "MaxPool2d", "ceil_mode=True is not supported"),
    "avg ceil": (*image(nn.AvgPool2d(3, ceil_mode=True)), "AvgPool2d", "ceil_mode=True is not supported"),
    "pool dilation": (*image(nn.MaxPool2d(2, dilation=2)), "MaxPool2d", "dilation=2 is not supported"),
    "indices": (*image(nn.MaxPool2d(2, return_indices=True)), "MaxPool2d", "return_indices is not supported"),
    "divisor": (*image(nn.AvgPool2d(2, divisor_override=3)), "AvgPool2d", "divisor_override is not supported"),
    "adaptive": (*image(nn.AdaptiveAvgPool2d(3)), "AdaptiveAvgPool2d", "the windows are unequal"),
    "adaptive max": (*image(nn.AdaptiveMaxPool2d(1)), "AdaptiveMaxPool2d", "is not supported"),
    "pool padding": (*image(Fn(lambda m, x: F.max_pool2d(x, 2, padding=2))), "Fn", "more than half the kernel"),
    "too small": (*image(nn.Conv2d(4, 4, 9)), "Conv2d", "does not fit"),
    "wrong channels": (*image(nn.Conv2d(3, 4, 3)), "Conv2d", "does not fit weight"),
    "dropout": (nn.Dropout(0.1), (4,), "Dropout", "dropout is random inside the inner loop"),
    "dropout 2d": (*image(nn.Dropout2d(0.1)), "Dropout2d", "dropout is random inside the inner loop"),
    "alpha dropout": (nn.AlphaDropout(0.1), (4,), "AlphaDropout", "dropout is random inside the inner loop"),
    "functional dropout": (Fn(lambda m, x: F.dropout(x)), (4,), "Fn", "dropout is random"),
    "instance norm": (*image(nn.InstanceNorm2d(4)), "InstanceNorm2d", "InstanceNorm is not supported"),
    "wrong batchnorm": (nn.BatchNorm2d(4), (4,), "BatchNorm2d", "expected 4D input"),
    "prelu": (nn.PReLU(), (4,), "PReLU", "prelu is not supported"),
    "softmax": (nn.Softmax(1), (4,), "Softmax", "softmax is not supported"),
    "transposed conv": (*image(nn.ConvTranspose2d(4, 4, 3)), "ConvTranspose2d", "conv_transpose2d is not supported"),
    "conv 1d": (nn.Conv1d(4, 4, 3), (4, 8), "Conv1d", "conv1d is not supported"),
    "lstm": (nn.LSTM(4, 4), (3, 4), "LSTM", ""),
    "attention": (Fn(lambda m, x: m.a(x, x, x)[0], a=nn.MultiheadAttention(4, 2)), (3, 4), "MultiheadAttention", ""),
    "forward hook": (hooked("register_forward_hook"), (4,), "Linear", "it has a forward hook"),
    "pre hook": (hooked("register_forward_pre_hook"), (4,), "Linear", "it has a forward pre hook"),
    "backward hook": (hooked("register_full_backward_hook"), (4,), "Linear", "it has a backward hook"),
    "backward pre hook": (hooked("register_full_backward_pre_hook"), (4,), "Linear", "it has a backward pre hook"),
    "weight norm": (
        parametrizations.weight_norm(nn.Linear(4, 4)),
        (4,),
        "ParametrizedLinear",
        "parametrizations on weight",
    ),
    "old spectral norm": (spectral_norm(nn.Linear(4, 4)), (4,), "Linear", "pre hook (SpectralNorm)"),
    "lazy": (nn.LazyLinear(4), (4,), "LazyLinear", "pre hook"),
    "no gradient": (Fn(no_grad, a=nn.Linear(4, 4)), (4,), "Linear", "linear runs without gradient"),
    "autograd function": (Fn(lambda m, x: Straight.apply(x)), (4,), "Fn", "without gradient"),
    "silent autograd function": (Fn(lambda m, x: Reversal.apply(m.a(x)), a=nn.Linear(4, 4)), (4,), "Fn", ""),
    "detach": (Fn(lambda m, x: x.detach()), (4,), "Fn", "it cuts the gradient"),
    "data": (Fn(lambda m, x: x @ m.w.data, w=(4, 4)), (4,), "Fn", "it cuts the gradient"),
    "control flow": (Fn(lambda m, x: x if x.tanh() else -x), (4,), "Fn", "it reads the values of a tensor"),
    "item": (Fn(lambda m, x: x.item()), (4,), "Fn", "it reads the values of a tensor"),
    "loop over samples": (Fn(lambda m, x: torch.stack([m.a(s) for s in x]), a=nn.Linear(4, 2)), (4,), "Fn", "apart"),
    "constant": (Fn(lambda m, x: x + torch.zeros(4)), (4,), "Fn", "torch.zeros creates a tensor inside forward"),
    "noise": (Fn(lambda m, x: x + torch.randn_like(x)), (4,), "Fn", "torch.randn_like creates a tensor"),
    "scaling": (Fn(lambda m, x: x * 2), (4,), "Fn", "2 as an operand"),
    "gating": (Fn(lambda m, x: x * x.sigmoid()), (4,), "Fn", "multiplying samples is not supported"),
    "broadcast add": (Fn(lambda m, x: x + x.mean(1, keepdim=True)), (4,), "Fn", "samples need equal shapes"),
    "no bias": (Fn(lambda m, x: x.relu() + m.b, b=(4,)), (4,), "Fn", "as the bias of a linear or conv2d alone"),
    "relu of a weight": (Fn(lambda m, x: F.linear(x, m.w.relu()), w=(4, 4)), (4,), "Fn", "relu of a parameter"),
    "weights from samples": (Fn(lambda m, x: x @ x.t()), (4,), "Fn", "changes the order"),
    "permute": (*image(Fn(lambda m, x: x.permute(0, 2, 3, 1))), "Fn", "changes the order of the elements"),
    "sample mean": (Fn(lambda m, x: x.mean(0)), (4,), "Fn", "a mean over the samples"),
    "channel mean": (*image(Fn(lambda m, x: x.mean(1))), "Fn", "only trailing axes"),
    "mixing view": (Fn(lambda m, x: x.view(-1, 2)), (4,), "Fn", "[n, 4] to [n*2, 2] mixes samples"),
    "flattening all": (Fn(lambda m, x: x.flatten()), (4,), "Fn", "mixes samples"),
    "fixed batch": (Fn(lambda m, x: x.view(32, -1)), (4,), "Fn", "reshape"),
    "first sample": (Fn(lambda m, x: x[0]), (4,), "Fn", "takes a part of the samples"),
    "half the channels": (*image(Fn(lambda m, x: x[:, :2])), "Fn", "takes a part of the samples or of their features"),
    "fancy index": (Fn(lambda m, x: x[:, [0, 1]]), (4,), "Fn", "only slices of step 1"),
    "count of samples": (
        Fn(lambda m, x: x.relu() if len(x) > 100 else x),
        (4,),
        "Fn",
        "depends on the number of samples",
    ),
    "chance": (Fn(lambda m, x: F.leaky_relu(x, random.random())), (4,), "Fn", "or on chance"),
    "in place on the input": (nn.ReLU(inplace=True), (4,), "ReLU", "changes the input in place"),
    "in place on a view": (Fn(view_then_in_place, a=nn.Linear(4, 4)), (4,), "Fn", "after an in-place op on a view"),
    "in place on a weight": (
        Fn(lambda m, x: x @ m.w.mul_(m.w), w=(4, 4)),
        (4,),
        "Fn",
        "a parameter or buffer in place",
    ),
    "another dtype": (Fn(lambda m, x: x.double()), (4,), "Fn", "a conversion to torch.float64"),
    "two outputs": (Fn(lambda m, x: (x, x)), (4,), "Fn", "forward returns tuple"),
    "a parameter as output": (Fn(lambda m, x: m.w.exp(), w=(4, 4)), (4,), "Fn", "not one tensor [n, ...]"),
    "own exception": (Fn(lambda m, x: {}[len(x.shape)]), (4,), "Fn", "its forward raised KeyError: 2"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_refused(name: str) -> None:
    layer, shape, kind, reason = REFUSED[name]
    model = nn.Sequential(nn.Sequential(nn.Identity(), layer))
    with pytest.raises(TraceError) as caught:
        trace(model, shape)
    error = caught.value
    assert reason in error.reason
    if "depends on" in reason or reason == "or on chance":
        assert error.layer == ""  # no single layer shows it
    elif "forward returns" not in error.reason:
        assert error.layer.startswith("0.1") and error.kind == kind
    assert "Supported are Linear, Conv2d, " in str(error) and "backend='autograd' runs any module." in str(error)


def test_the_message_reads_as_a_sentence() -> None:
    features = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Dropout(0.5))
    with pytest.raises(ValueError, match="^fastmaml cannot trace layer 'features.3' \\(Dropout\\): dropout is random"):
        trace(Fn(lambda m, x: m.features(x), features=features), (4,))


def test_the_model_itself_has_no_layer_name() -> None:
    with pytest.raises(TraceError, match=r"cannot trace the model itself \(Softmax\)"):
        trace(nn.Softmax(1), (4,))


def test_a_tensor_that_is_no_member_of_the_model() -> None:
    outside = nn.Linear(4, 4)
    reason = r"a tensor \[4, 4\] of torch.float32 is no parameter .* of the model \(register_buffer\)"
    with pytest.raises(TraceError, match=reason):
        trace(Fn(lambda m, x: outside(x)), (4,))


def test_global_hooks() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        with pytest.raises(TraceError, match="global module hooks"):
            trace(nn.Linear(4, 4), (4,))
    finally:
        handle.remove()
    trace(nn.Linear(4, 4), (4,))


def test_a_failed_trace_leaves_torch_as_it_was() -> None:
    with pytest.raises(TraceError):
        trace(nn.Dropout(0.5), (4,))
    assert torch.is_grad_enabled()
    assert torch.ones(2).add(1).tolist() == [2.0, 2.0]


def test_the_cause_is_kept() -> None:
    def broken(m: nn.Module, x: Tensor) -> Tensor:
        raise RuntimeError("out of cheese")

    model: Callable = Fn(broken)
    with pytest.raises(TraceError, match="RuntimeError: out of cheese") as caught:
        trace(model, (4,))
    assert isinstance(caught.value.__cause__, RuntimeError)
