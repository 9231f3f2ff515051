"""Executors: each runs a Plan, none knows of meta-learning. This is their registry, the choice among them, and the reasons against."""

from __future__ import annotations

import functools
import os
from typing import Any

from torch import device as Device  # `torch` itself is this package's submodule
from torch import dtype as DType
from torch import float32
from torch.cuda import is_available as sees_a_gpu

from fastmaml.executors.autograd import AutogradExecutor
from fastmaml.executors.cpu import CpuExecutor
from fastmaml.executors.cuda import CudaExecutor
from fastmaml.executors.opaque import is_opaque
from fastmaml.executors.torch import TorchExecutor
from fastmaml.plan.instructions import Plan

Executor = CpuExecutor | CudaExecutor | TorchExecutor
BACKENDS = ("auto", "cpu", "cuda", "triton", "torch", "autograd")


class BackendError(RuntimeError):
    """A backend asked for by name cannot run the model; the message says why, and what can."""


def why_not(backend: str, plan: Plan, dtype: DType, device: Device) -> str | None:
    """Why a backend cannot run a Plan on tensors of this dtype and device, or None."""
    opaque = is_opaque(plan)
    if backend == "autograd":
        return None if opaque else "the model was traced"
    if opaque:
        return "the model could not be traced"
    if backend == "torch":
        return None
    if backend == "triton":
        return why_not_triton(dtype, device) or triton_executor()[0].why_not(plan, device)
    if device.type != backend:
        return f"the parameters are on {device}"
    if dtype != float32:
        return f"the parameters are {str(dtype).removeprefix('torch.')}, the kernels are float32"
    return CpuExecutor.why_not(plan) if backend == "cpu" else CudaExecutor.why_not(plan)


@functools.cache
def triton_executor() -> tuple[Any, str]:
    """(TritonExecutor, "") or (None, why it could not be imported). Imported when first asked for: importing Triton takes a while."""
    try:
        from fastmaml.executors.triton import TritonExecutor
    except Exception as error:  # an installation may be broken in many ways
        return None, f"the Triton kernels could not be imported: {type(error).__name__}: {error}"
    return TritonExecutor, ""


def why_not_triton(dtype: DType, device: Device) -> str | None:
    """Why Triton cannot run anything on tensors of this dtype and device."""
    if device.type != "cuda" and (device.type != "cpu" or os.environ.get("TRITON_INTERPRET") != "1"):
        return f"the parameters are on {device}, the Triton kernels are for NVIDIA GPUs (on a CPU TRITON_INTERPRET=1 interprets them, for tests)"
    if dtype != float32:
        return f"the parameters are {str(dtype).removeprefix('torch.')}, the kernels are float32"
    if device.type == "cuda" and not sees_a_gpu():
        return "torch sees no CUDA device"
    return triton_executor()[1] or None


def choose(backend: str, plan: Plan, dtype: DType, device: Device, precision: str = "high") -> Executor:
    """The executor for a Plan. "auto" takes the best that can run it; any other name is that backend or a BackendError."""
    classes = {"cpu": CpuExecutor, "cuda": CudaExecutor, "torch": TorchExecutor, "autograd": AutogradExecutor}
    native = ("cuda", "triton") if device.type == "cuda" else ("cpu",)
    order = (*native, "torch", "autograd") if backend == "auto" else (backend,)
    for name in order:
        reason = why_not(name, plan, dtype, device)
        if reason is None:
            return triton_executor()[0](plan, precision) if name == "triton" else classes[name](plan)
    able = [name for name in ("cpu", "cuda", "triton", "torch", "autograd") if why_not(name, plan, dtype, device) is None]
    raise BackendError(f"backend={backend!r} cannot run this model: {reason}. Able to: {', '.join(map(repr, able))}, or backend='auto'.")
