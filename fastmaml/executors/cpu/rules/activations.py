"""Piecewise linear and smooth activations."""

from __future__ import annotations

from fastmaml.executors.cpu.native import Buffers, Native, buffer_of, channels_of, first_of, pixels_of, rule
from fastmaml.plan.instructions import Instruction

SMOOTH = ("tanh", "sigmoid", "exp", "elu", "gelu", "silu", "softplus")


@rule("relu", "leaky_relu")
def relu(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    mode = instr.kernel.removeprefix("leaky_").removeprefix("relu_")
    kernel = {"fwd": "relu_fwd", "replay": "relu_replay"}.get(mode, "relu_bwd")
    refs = (*instr.inputs, *instr.outputs)
    first = first_of(instr)
    return Native(kernel, refs, (channels_of(first, buffers),), (instr.attrs.get("slope", 0.0),), pixels=pixels_of(first, buffers))


@rule(*SMOOTH)
def smooth(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    refs, attrs = (*instr.inputs, *instr.outputs), instr.attrs
    numbers = {"elu": ("alpha",), "softplus": ("beta", "threshold")}.get(instr.kernel.split("_")[0], ())
    first = first_of(instr)
    sizes = (channels_of(first, buffers), int(attrs.get("approximate") == "tanh"))
    numbers = tuple(float(attrs[n]) for n in numbers)
    return Native(instr.kernel, refs, sizes, numbers, plain=buffer_of(first, buffers).rows is None, pixels=pixels_of(first, buffers))
