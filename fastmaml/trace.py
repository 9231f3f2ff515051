"""Any ``nn.Module`` -> Program: run its forward on a tensor without data and write down every torch function it calls.

Not ``torch.fx``: a ``TorchFunctionMode`` sees the same calls while forward is plain Python on tensors with real
shapes. So ``isinstance``, ``x.view(x.size(0), -1)``, ``if x.shape[2] > 1`` and ``dict(self.named_parameters())`` work;
functions of bare parameters are seen too; nothing is patched (fx replaces ``nn.Module.__call__`` for every thread).
Layers are seen through the functions they call, so one table (``_trace/rules.py``) serves layers, subclasses with a
forward of their own, and functional code alike.

The number of samples is not part of a Program. forward runs twice, with two numbers that occur nowhere else in the
network, and a module whose Program depends on the number is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrize

from fastmaml._trace.recorder import Missing, Recorder, Tracked
from fastmaml._trace.rules import Misuse, Refusal
from fastmaml.program import Program

SUPPORTED = (
    "Linear, Conv2d, BatchNorm1d, BatchNorm2d, LayerNorm, GroupNorm, ReLU, LeakyReLU, Tanh, Sigmoid, ELU, GELU, SiLU, "
    "Softplus, MaxPool2d, AvgPool2d, AdaptiveAvgPool2d, mean over H and W, ZeroPad2d, Flatten, view, reshape, "
    "residual add, and their functional forms"
)
BATCHNORM = ("batch", "support", "running", "joint")
_SAMPLES = 1_000_003  # a prime that no network has as a size


class TraceError(ValueError):
    """A module cannot become a Program.

    ``layer``: its name in the model ("" is the model itself); ``kind``: its class; ``reason``: why.
    """

    def __init__(self, layer: str, kind: str, reason: str) -> None:
        self.layer, self.kind, self.reason = layer, kind, reason
        super().__init__(
            f"fastmaml cannot trace {_called(layer, kind)}: {reason}. Supported are {SUPPORTED}. "
            "backend='autograd' runs any module."
        )


def trace(model: nn.Module, input_shape: tuple[int, ...], *, batchnorm: str | None = None) -> Program:
    """The network of ``model`` for samples of shape ``input_shape`` (without the sample axis).

    Leaves carry the names of ``model.named_parameters()`` (role "outer", or "const" without requires_grad) and
    ``named_buffers()`` ("const"); a tied parameter appears once, under its first name. Arguments of forward beyond the
    first take their defaults. ``batchnorm`` sets the statistics of all batch normalisations ("batch", "support" or
    "running"); with None, layers in train mode or without running statistics take those of the batch. The model is not
    changed.

    Raises ``TraceError``, naming the layer, for what a Program cannot express, and ``ValueError`` where the statistics
    need the user's decision.
    """
    if batchnorm is not None and batchnorm not in BATCHNORM:
        raise ValueError(f"batchnorm={batchnorm!r} is not one of {', '.join(map(repr, BATCHNORM))}, or None")
    names = {id(module): name for name, module in model.named_modules()}
    _refuse_wrapped_layers(model)
    with _unchanged(model):
        program = _record(model, tuple(input_shape), _SAMPLES, batchnorm, names)
        again = _record(model, tuple(input_shape), _other_count(program), batchnorm, names)
    if program != again:
        raise TraceError(
            "", type(model).__name__, "what its forward computes depends on the number of samples, or on chance"
        )
    return program


def _record(
    model: nn.Module, input_shape: tuple[int, ...], samples: int, batchnorm: str | None, names: dict[int, str]
) -> Program:
    recorder = Recorder(model, input_shape, samples, batchnorm)
    args, kwargs = _constants(model)
    try:
        with torch.enable_grad(), recorder:
            output = model(recorder.input, *args, **kwargs)
        if not isinstance(output, Tracked) or not recorder.is_rows(recorder.use(output)):
            raise Refusal(f"forward returns {type(output).__name__}, not one tensor [n, ...] computed from the input")
    except Misuse as error:
        raise ValueError(f"{_called(*_innermost(model, error.__traceback__, names))}: {error}") from None
    except Refusal as error:
        raise TraceError(*_innermost(model, error.__traceback__, names), str(error)) from error
    except Exception as error:
        layer, kind = _innermost(model, error.__traceback__, names)
        first_line = str(error).partition("\n")[0]
        raise TraceError(layer, kind, f"its forward raised {type(error).__name__}: {first_line}") from error
    return recorder.builder.build(output.value)


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Undoes what forward assigns to attributes (a cached activation would be a tensor without data)."""
    before = [
        (members, dict(members))
        for module in model.modules()
        for members in (vars(module), module._buffers, module._parameters, module._modules)
    ]
    try:
        yield
    finally:
        for now, then in before:
            for name in [name for name, value in now.items() if name not in then or value is not then[name]]:
                if name in then:
                    now[name] = then[name]
                else:
                    del now[name]


def _constants(model: nn.Module) -> tuple[list[Any], dict[str, Any]]:
    """What to pass to forward beyond its first argument: nothing where there is a default."""
    parameters = list(inspect.signature(model.forward).parameters.values())[1:]
    required = [p for p in parameters if p.default is p.empty]
    args: list[Any] = [Missing(p.name) for p in required if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return args, {p.name: Missing(p.name) for p in required if p.kind is p.KEYWORD_ONLY}


def _innermost(model: nn.Module, tb: TracebackType | None, names: dict[int, str]) -> tuple[str, str]:
    """Name and class of the innermost layer whose code was running when the exception arose."""
    found: nn.Module = model
    while tb is not None:
        owner = tb.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in names:
            found = owner
        tb = tb.tb_next
    return names.get(id(found), ""), type(found).__name__


def _called(layer: str, kind: str) -> str:
    return f"layer {layer!r} ({kind})" if layer else f"the model itself ({kind})"


def _other_count(program: Program) -> int:
    """A small number of samples that is no size in the network, so that it cannot be mistaken for one."""
    sizes = {size for value in program.values for size in (*value.shape, value.numel)}
    return next(n for n in range(3, _SAMPLES) if n not in sizes)


def _refuse_wrapped_layers(model: nn.Module) -> None:
    """Code that runs around a layer's forward, and that the user may change or that acts in the backward pass."""
    kinds = ("forward", "forward_pre", "backward", "backward_pre")
    if any(getattr(nn_module, f"_global_{kind}_hooks") for kind in kinds):
        reason = "global module hooks are registered (torch.nn.modules.module.register_module_*_hook)"
        raise TraceError("", type(model).__name__, reason)
    for name, module in model.named_modules():
        reason = None
        if isinstance(module, torch.jit.ScriptModule):
            reason = "a scripted module hides its forward; pass the module it was made from"
        elif parametrize.is_parametrized(module):
            reason = f"it has parametrizations on {', '.join(module.parametrizations)} (torch.nn.utils.parametrize)"
        else:
            for kind in kinds:
                for hook in getattr(module, f"_{kind}_hooks").values():
                    label = getattr(hook, "__qualname__", type(hook).__name__)
                    reason = f"it has a {kind.replace('_', ' ')} hook ({label})"
        if reason is not None:
            raise TraceError(name, type(module).__name__, reason)
