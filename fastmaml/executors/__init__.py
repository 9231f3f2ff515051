"""Executors: each runs a Plan, none knows of meta-learning. This is their registry, the choice among them, and the reasons against."""

from __future__ import annotations

import functools
import os
from typing import Any, NamedTuple

from torch import device as Device  # `torch` itself is this package's submodule
from torch import dtype as DType
from torch import float32
from torch.cuda import is_available as sees_a_gpu

from fastmaml.executors.autograd.executor import AutogradExecutor
from fastmaml.executors.autograd.opaque import is_opaque
from fastmaml.executors.cpu.executor import CpuExecutor
from fastmaml.executors.cuda.executor import CudaExecutor
from fastmaml.executors.mixed import MixedExecutor
from fastmaml.executors.torch.executor import TorchExecutor
from fastmaml.plan.instructions import Plan
from fastmaml.plan.parts import Parts, divide

Executor = CpuExecutor | CudaExecutor | MixedExecutor | TorchExecutor
BACKENDS = ("auto", "cpu", "cuda", "triton", "torch", "autograd")
NATIVE = {"cpu": CpuExecutor, "cuda": CudaExecutor}
CLASSES = {**NATIVE, "torch": TorchExecutor, "autograd": AutogradExecutor}
OLDEST_TRITON = (3, 6)
SMALL = 2**20  # bytes of a task's weights, their gradients and directions, that the one thread block of a task is to walk at every step


class BackendError(RuntimeError):
    """A backend asked for by name cannot run the model; the message says why, and what can."""


class Choice(NamedTuple):
    """What "auto" takes: one executor, or (with ``parts``) what runs around the inner loop and what runs that. ``passed``: why not what it would rather have."""

    names: tuple[str, ...]
    parts: Parts | None
    passed: dict[str, str]


def why_not_here(backend: str, dtype: DType, device: Device) -> str | None:
    """Why a backend can run no Plan at all on tensors of this dtype and device, or None."""
    if backend in ("torch", "autograd"):
        return None
    if backend == "triton":
        return why_not_triton(dtype, device)
    if device.type != backend:
        return f"the parameters are on {device}"
    if dtype != float32:
        return f"the parameters are {str(dtype).removeprefix('torch.')}, the kernels are float32"
    if backend == "cuda":
        return CudaExecutor.unavailable(index=device.index or 0)
    return CpuExecutor.unavailable()


def why_not(backend: str, plan: Plan, dtype: DType, device: Device) -> str | None:
    """Why a backend cannot run a Plan on tensors of this dtype and device, or None."""
    opaque = is_opaque(plan)
    if backend == "autograd":
        return None if opaque else "the model was traced"
    if opaque:
        return "the model could not be traced"
    reason = why_not_here(backend, dtype, device)
    if reason is not None or backend == "torch":
        return reason
    return triton_executor()[0].why_not(plan, device) if backend == "triton" else NATIVE[backend].why_not(plan)


@functools.cache
def triton_executor() -> tuple[Any, str]:
    """(TritonExecutor, "") or (None, why it could not be imported). Imported when first asked for: importing Triton takes a while."""
    try:
        import triton

        if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST_TRITON:
            return None, f"Triton {triton.__version__} is too old for the Triton kernels: pip install 'triton>={'.'.join(map(str, OLDEST_TRITON))}'"
        from fastmaml.executors.triton.executor import TritonExecutor
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
    """The executor for a Plan. "auto" takes the best that can run it, or the best for each part; any other name is that backend or a BackendError."""
    if backend == "auto":
        names, parts, _ = automatic(plan, dtype, device)
        if parts is None:
            return _made(names[0], plan, precision)
        return MixedExecutor(plan, parts, _made(names[0], parts.around, precision), _made(names[1], parts.inside, precision))
    reason = why_not(backend, plan, dtype, device)
    if reason is None:
        return _made(backend, plan, precision)
    able = [name for name in ("cpu", "cuda", "triton", "torch", "autograd") if why_not(name, plan, dtype, device) is None]
    raise BackendError(f"backend={backend!r} cannot run this model: {reason}. Able to: {', '.join(map(repr, able))}, or backend='auto'.")


def _made(name: str, plan: Plan, precision: str) -> Executor:
    return triton_executor()[0](plan, precision) if name == "triton" else CLASSES[name](plan)


def automatic(plan: Plan, dtype: DType, device: Device) -> Choice:
    """One native executor for the whole Plan; if that lacks something, for the inner loop alone and another around it; else the next."""
    native, *others = (*(("cuda", "triton") if device.type == "cuda" else ("cpu",)), "torch", "autograd")
    passed: dict[str, str] = {}
    for name in (native, *others):
        reason = why_not(name, plan, dtype, device)
        if reason is None:
            return Choice((name,), None, passed)
        passed[name] = reason
        if name == native and why_not_here(native, dtype, device) is None and not is_opaque(plan):
            try:
                return _divided(native, others, plan, dtype, device, passed)
            except NotImplementedError as error:
                passed[name] = f"{reason}. Nor the inner loop alone: {error}"
    raise BackendError(f"nothing can run this model: {passed}")  # not reached: torch runs any Plan, autograd any other


def _divided(native: str, others: list[str], plan: Plan, dtype: DType, device: Device, passed: dict[str, str]) -> Choice:
    """The inner loop on ``native``, the rest on the first other that can. Raises NotImplementedError, saying why not."""
    parts = divide(plan, lambda segment: NATIVE[native].why_not_segment(plan, segment))
    weights = 4 * sum(b.numel for b in parts.inside.buffers.values() if b.rows is None and b.home != "meta")
    if native == "cuda" and weights > SMALL:
        raise NotImplementedError(f"it has {weights / 2**20:.1f} MB of weights and their gradients for each task, too many for one thread block")
    reason = why_not(native, parts.inside, dtype, device)
    if reason is not None:
        raise NotImplementedError(reason)
    passed = dict(passed)
    for name in others:
        reason = why_not(name, parts.around, dtype, device)
        if reason is None:
            return Choice((name, native), parts, passed)
        passed[name] = reason
    raise NotImplementedError("nothing else can run what is around it")


def explained(executor: Executor, backend: str, dtype: DType, device: Device) -> str:
    """Which segments run where, and why not on what "auto" would rather have taken."""
    if isinstance(executor, MixedExecutor):
        parts = [(part, ", ".join(part.plan.segments)) for part in (executor.around, executor.inside)]
    else:
        parts = [(executor, "all segments")]
    ran = [f"{part.name}: {segments}{f' ({part.how})' if part.name == 'cuda' else ''}" for part, segments in parts]
    passed = automatic(executor.plan, dtype, device).passed if backend == "auto" else {}
    return "\n".join([*ran, *(f"  why not {name}: {reason}" for name, reason in passed.items())])
