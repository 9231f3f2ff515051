"""Executors: each runs a Plan, none knows of meta-learning. This is their registry, the choice among them, and the reasons against."""

from __future__ import annotations

from torch import device as Device  # `torch` itself is this package's submodule
from torch import dtype as DType
from torch import float32

from fastmaml.executors.autograd import AutogradExecutor
from fastmaml.executors.cpu import CpuExecutor
from fastmaml.executors.opaque import is_opaque
from fastmaml.executors.torch import TorchExecutor
from fastmaml.plan.instructions import Plan

Executor = CpuExecutor | TorchExecutor
BACKENDS = ("auto", "cpu", "torch", "autograd", "cuda", "triton")
NOT_YET = {
    "cuda": "fastmaml._cuda is not part of this version",
    "triton": "the Triton kernels are not part of this version",
}


class BackendError(RuntimeError):
    """A backend asked for by name cannot run the model; the message says why, and what can."""


def why_not(backend: str, plan: Plan, dtype: DType, device: Device) -> str | None:
    """Why a backend cannot run a Plan on tensors of this dtype and device, or None."""
    if backend in NOT_YET:
        return NOT_YET[backend]
    opaque = is_opaque(plan)
    if backend == "autograd":
        return None if opaque else "the model was traced"
    if opaque:
        return "the model could not be traced"
    if backend == "torch":
        return None
    if device.type != "cpu":
        return f"the parameters are on {device}"
    if dtype != float32:
        return f"the parameters are {str(dtype).removeprefix('torch.')}, the kernels are float32"
    return CpuExecutor.why_not(plan)


def choose(backend: str, plan: Plan, dtype: DType, device: Device) -> Executor:
    """The executor for a Plan. "auto" takes the best that can run it; any other name is that backend or a BackendError."""
    classes = {"cpu": CpuExecutor, "torch": TorchExecutor, "autograd": AutogradExecutor}
    order = ("cpu", "torch", "autograd") if backend == "auto" else (backend,)
    for name in order:
        reason = why_not(name, plan, dtype, device)
        if reason is None:
            return classes[name](plan)
    able = [name for name in classes if why_not(name, plan, dtype, device) is None]
    raise BackendError(f"backend={backend!r} cannot run this model: {reason}. Able to: {', '.join(map(repr, able))}, or backend='auto'.")
