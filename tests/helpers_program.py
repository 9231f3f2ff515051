"""The forward of a Program with plain torch functions: a second, independent reading of what the ops mean."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmaml.program import Op, Program
from fastmaml.trace import trace


def evaluate(program: Program, x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """The output of ``program`` for samples ``x`` [n, ...]; ``tensors`` by leaf name."""
    values: dict[int, Tensor] = {program.input: x}
    values |= {leaf.value: tensors[leaf.name] for leaf in program.leaves}
    for op in program.ops:
        values[op.output] = _forward(op, [None if v is None else values[v] for v in op.inputs], program)
        declared = program.values[op.output]
        shape = tuple(values[op.output].shape)
        assert (shape[1:] if declared.rows else shape) == declared.shape, f"{op.name}: {shape} is not {declared}"
    return values[program.output]


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _forward(op: Op, inputs: list[Tensor | None], program: Program) -> Tensor:
    x, *rest = inputs
    a = op.attrs
    match op.name:
        case "linear":
            return F.linear(x, *rest)
        case "conv2d":
            return F.conv2d(_pad(x, a["padding"]), *rest, stride=a["stride"])
        case "batchnorm":
            gamma, beta, mean, var = rest
            running = a["statistics"] == "running"
            return F.batch_norm(x, mean, var, gamma, beta, training=not running, eps=a["eps"])
        case "layernorm":
            return F.layer_norm(x, x.shape[-a["dims"] :], *rest, eps=a["eps"])
        case "groupnorm":
            return F.group_norm(x, a["groups"], *rest, eps=a["eps"])
        case "relu" | "tanh" | "sigmoid" | "exp":
            return getattr(torch, op.name)(x)
        case "leaky_relu":
            return F.leaky_relu(x, a["slope"])
        case "silu" | "elu" | "gelu" | "softplus":
            return getattr(F, op.name)(x, **a)
        case "maxpool2d":
            return F.max_pool2d(x, a["kernel"], a["stride"], a["padding"])
        case "avgpool2d":
            return F.avg_pool2d(x, a["kernel"], a["stride"], a["padding"], count_include_pad=a["count_include_pad"])
        case "global_avgpool2d":
            return x.mean((2, 3))
        case "pad2d":
            return _pad(x, a["padding"])
        case "reshape":
            rows = program.values[op.output].rows
            return x.reshape(*([len(x)] if rows else []), *a["shape"])
        case "add":
            return x + rest[0]
        case "mul":
            return x * rest[0]
        case "matmul":
            return x @ rest[0]
        case "transpose":
            return x.mT
        case "slice":
            return x.narrow(a["dim"], a["start"], a["stop"] - a["start"])
    raise NotImplementedError(op.name)


def _pad(x: Tensor, padding: tuple[int, ...]) -> Tensor:
    top, bottom, left, right = padding
    return F.pad(x, (left, right, top, bottom))


class Fn(nn.Module):
    """A forward given as a function of (module, x); keyword arguments become parameters, buffers or submodules."""

    def __init__(self, function: Callable, **members: object) -> None:
        super().__init__()
        self.function = function
        for name, member in members.items():
            if isinstance(member, tuple):  # the shape of a parameter
                member = nn.Parameter(torch.randn(*member))
            if type(member) is Tensor:
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)

    def forward(self, x: Tensor, scale: float | None = None, flag: bool = True) -> Tensor:
        return self.function(self, x)


def agrees(model: nn.Module, shape: tuple[int, ...], samples: int = 6, **options: object) -> Program:
    """Traces ``model`` and compares the Program's forward with the model's own, in float64."""
    model.double()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # gamma=1, beta=0 would hide an operand in the wrong place
            parameter.add_(0.3 * torch.randn_like(parameter))
    program = trace(model, shape, **options)
    x = torch.randn(samples, *shape, dtype=torch.float64)
    got = evaluate(program, x, tensors_of(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: padding="same" with even kernels copies
        expected = model(x)
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    return program


def op_names(program: Program) -> list[str]:
    return [op.name for op in program.ops]
