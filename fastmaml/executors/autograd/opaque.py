"""A module that cannot be traced, as one op of a Program: what the autograd executor runs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastmaml.nn import per_step_parameters
from fastmaml.plan.instructions import Plan
from fastmaml.program import Program, ProgramBuilder

turn = threading.RLock()  # who has a module's parameters in its hands


class Opaque:
    """A module as a function of its parameters, which leaves the module's own state alone. ``batchnorm``: see ``trace``."""

    def __init__(self, model: nn.Module, batchnorm: str | None) -> None:
        self.model = model
        index = {id(p): i for i, p in enumerate(model.parameters())}
        tables = [m._parameters for m in model.modules()]
        self.places = [(table, key, index[id(p)]) for table in tables for key, p in table.items() if p is not None]
        self.buffers = [m._buffers for m in model.modules() if m._buffers]
        self.norms = _norms(model, batchnorm)
        self.recurrent = any(isinstance(m, nn.RNNBase) for m in model.modules())

    def __call__(self, parameters: Sequence[Tensor], x: Tensor) -> Tensor:
        own = [(table, key, table[key]) for table, key, _ in self.places]  # functional_call does the same, ten times slower
        own += [(table, key, b) for table in self.buffers for key, b in table.items()]
        own += [(vars(norm), "training", norm.training) for norm, _ in self.norms]
        try:
            for table, key, i in self.places:
                table[key] = parameters[i]
            for table in self.buffers:
                table.update({key: b.clone() for key, b in table.items() if b is not None})
            for norm, training in self.norms:
                norm.training = training
            return self.model(x)
        finally:
            for table, key, value in own:
                table[key] = value

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """What the module needs to have a double backward, and to be alone."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(turn)
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if self.recurrent:  # the fused layers of oneDNN and cuDNN have none
                for library in ("mkldnn", "cudnn"):  # torch.backends.*.flags would set TF32 as well
                    switch = getattr(torch._C, f"_set_{library}_enabled")
                    stack.callback(switch, getattr(torch._C, f"_get_{library}_enabled")())
                    switch(False)
            yield


def opaque_program(model: nn.Module, sample: Tensor, batchnorm: str | None) -> Program:
    """A Program with one op for the whole ``model``. ``sample`` [n, ...]: a row of it is run, to learn the shape of the output."""
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("a scripted module hides its parameters: pass the nn.Module that it was made from")
    per_step = per_step_parameters(model)
    if per_step:
        raise ValueError(f"{sorted(per_step)[0]!r} has a value per inner step, which needs a model that can be traced; this one runs on the autograd executor")
    function, parameters = Opaque(model, batchnorm), dict(model.named_parameters())
    rows = inputs_of(sample[[0, -1]], next(iter(parameters.values())).dtype)
    try:
        with function.running(), torch.random.fork_rng([rows.device] if rows.is_cuda else []):
            y = function(list(parameters.values()), rows)
    except Exception as error:
        shape = list(sample.shape[1:])
        raise ValueError(f"the model cannot run on samples of shape {shape} ({sample.dtype}): {type(error).__name__}: {error}") from error
    if not isinstance(y, Tensor) or y.dim() < 2 or len(y) != 2 or not y.is_floating_point():
        got = f"{y.dtype} {list(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"the model returns {got} for 2 samples: expected a tensor [n, outputs] of floating-point numbers")
    builder = ProgramBuilder(tuple(sample.shape[1:]))
    leaves = [builder.leaf(n, tuple(p.shape), "outer") for n, p in parameters.items()]
    return builder.build(builder.op("module", 0, *leaves, function=function, leaves=tuple(parameters), shape=tuple(y.shape[1:])))


def _norms(model: nn.Module, batchnorm: str | None) -> list[tuple[nn.Module, bool]]:
    """The batch normalisations, and whether each takes the statistics of its batch."""
    out = []
    for name, m in model.named_modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            layer, tracked = f"layer {name!r} ({type(m).__name__})", m.running_mean is not None
            if batchnorm in ("support", "joint"):
                raise ValueError(
                    f"batchnorm={batchnorm!r} needs a model that can be traced; here {layer} runs on the autograd executor: choose 'batch' or 'running'"
                )
            if batchnorm == "running" and not tracked:
                raise ValueError(
                    f"batchnorm='running', but {layer} has no running statistics: say batchnorm='batch', or build it with track_running_stats=True"
                )
            if batchnorm is None and tracked and not m.training:
                raise ValueError(
                    f"{layer} is in eval mode and has running statistics: say batchnorm='batch' or batchnorm='running', or call model.train()"
                )
            out.append((m, batchnorm == "batch" or (batchnorm is None and m.training)))
    return out


def inputs_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Images of bytes become floats; other integers are the model's business (tokens of an embedding)."""
    return x.to(dtype) if x.is_floating_point() or x.dtype is torch.uint8 else x


def is_opaque(plan: Plan) -> bool:
    """Whether a Plan is of a whole module."""
    return any(instr.kernel.startswith("module_") for _, instr in plan.instructions())
