"""The ``autograd`` executor: any nn.Module, as the torch executor on a Program with one opaque op ``module``. Not a second sweep.

    module_fwd       z = f(x; leaves), with torch's graph of this one step
    module_bwd       J^T dz
    module_jvp       J u, and with it the second-order term d<J^T dz, u>/d(leaves): both from ONE backward pass of s = <J^T c, u> at c = dz
    module_bwd_jvp   J^T dzt + that term: with the above the exact Hessian-vector product, by double backward of one recomputed step

Double backward, not forward-mode AD: it exists for every module that the plain training loop already runs. Buffers (running statistics) are cloned, the
state of the random generator is replayed, attention goes through its math kernel, tasks run one after another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastmaml.executors.torch import TorchExecutor
from fastmaml.executors.torch_kernels import Attrs, kernel
from fastmaml.plan.instructions import Plan
from fastmaml.program import Program, ProgramBuilder


class AutogradExecutor(TorchExecutor):
    """Runs Plans whose Program is one opaque module."""

    name = "autograd"


def is_opaque(plan: Plan) -> bool:
    return any(instr.kernel.startswith("module_") for _, instr in plan.instructions())


def opaque_program(model: nn.Module, sample: Tensor) -> Program:
    """A Program with one op for the whole ``model``. ``sample`` [n, ...]: a few rows, to learn the shape of the output."""
    names = [name for name, _ in model.named_parameters()]
    function = _caller(model)
    with torch.no_grad():
        y = function(dict(model.named_parameters()), sample)
    if not isinstance(y, Tensor) or y.dim() < 1 or len(y) != len(sample):
        shape = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"the model returns {shape} for {len(sample)} samples: expected a tensor [n, ...] of logits")
    builder = ProgramBuilder(tuple(sample.shape[1:]))
    leaves = [builder.leaf(n, tuple(p.shape), "outer" if p.requires_grad else "const") for n, p in model.named_parameters()]
    return builder.build(builder.op("module", 0, *leaves, function=function, leaves=tuple(names), shape=tuple(y.shape[1:])))


def _caller(model: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    """(parameters, x) -> logits, leaving the module's own state alone."""
    rnn = any(isinstance(m, nn.RNNBase) for m in model.modules())
    attention = any(isinstance(m, (nn.MultiheadAttention, nn.Transformer)) for m in model.modules())

    def call(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        with contextlib.ExitStack() as stack:
            if attention or hasattr(torch.nn.functional, "scaled_dot_product_attention"):
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # the others have no double backward
            if rnn:  # oneDNN's fused layer has no double backward
                stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
            return functional_call(model, (parameters, buffers), (x,))

    return call


@dataclass
class Graph:
    """One forward of the module with torch's graph."""

    parameters: list[Tensor]
    y: Tensor


@contextlib.contextmanager
def _random_state(state: Any) -> Iterator[None]:
    """Runs under a saved state of the generators, and puts the present one back."""
    cpu, cuda = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state_all(state[1])
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def _forward(attrs: Attrs, x: Tensor, leaves: tuple[Tensor, ...]) -> tuple[Tensor, Graph]:
    parameters = [leaf.detach().requires_grad_(leaf.is_floating_point()) for leaf in leaves]
    with torch.enable_grad():
        y = attrs["function"](dict(zip(attrs["leaves"], parameters, strict=True)), x)
    return y.detach(), Graph(parameters, y)


@kernel("module_fwd")
def module_fwd(task, attrs: Attrs, x, *leaves):
    state = (torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None)
    return *_forward(attrs, x, leaves), state


@kernel("module_replay")
def module_replay(task, attrs: Attrs, x, *leaves_and_state):
    *leaves, state = leaves_and_state
    with _random_state(state):
        return _forward(attrs, x, tuple(leaves))


def _vjp(graph: Graph, cotangent: Tensor) -> tuple[Tensor, ...]:
    grads = torch.autograd.grad(graph.y, graph.parameters, cotangent, retain_graph=True, allow_unused=True)
    return tuple(torch.zeros_like(p) if g is None else g for p, g in zip(graph.parameters, grads, strict=True))


@kernel("module_bwd")
def module_bwd(task, attrs: Attrs, graph, dy):
    return _vjp(graph, dy)


@kernel("module_jvp")
def module_jvp(task, attrs: Attrs, graph, dy, *dots):
    chosen = [(p, u) for p, u in zip(graph.parameters, dots, strict=True) if u is not None]
    with torch.enable_grad():
        c = dy.detach().requires_grad_()
        grads = torch.autograd.grad(graph.y, [p for p, _ in chosen], c, create_graph=True, allow_unused=True)
        s = sum((g * u).sum() for g, (_, u) in zip(grads, chosen, strict=True) if g is not None)
    out = torch.autograd.grad(s, [c, *graph.parameters], retain_graph=True, allow_unused=True)
    zero = (torch.zeros_like(v) if g is None else g for v, g in zip([c, *graph.parameters], out, strict=True))
    return tuple(zero)


@kernel("module_bwd_jvp")
def module_bwd_jvp(task, attrs: Attrs, graph, dyt, *second):
    first = _vjp(graph, dyt)
    return tuple(a if b is None else a + b for a, b in zip(first, second, strict=True))
