"""Batch statistics of a first convolution from the moments of its patches."""

from __future__ import annotations

from fastmaml.executors.cpu.native import PLANES, Buffers, Native, buffer_of, rule
from fastmaml.plan.instructions import Instruction

MOST_PATCH = 160  # kMostPatch in csrc/cpu/kernels/patch_stats.cpp


@rule("patch_moments")
def patch_moments(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    x, attrs = buffer_of(instr.inputs[0], buffers), instr.attrs
    channels, *kernel = attrs["patch"]
    if (size := channels * kernel[0] * kernel[1]) > MOST_PATCH:
        raise NotImplementedError(f"the moments of patches of {size} numbers have no native kernel, only of {MOST_PATCH}")
    top, _, left, _ = attrs["padding"]
    sizes = (*x.shape, 0, *kernel, *attrs["stride"], top, left, *attrs["pixels"], int(x.kind == PLANES))
    return Native(instr.kernel, (*instr.inputs, *instr.outputs), sizes, unpadded=(0,))


@rule("patch_stats")
def patch_stats(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    outputs, channels, h, w = buffer_of(instr.inputs[1], buffers).shape
    packed = {"fwd": (1,), "jvp": (1, 3), "bwd": (1, 6), "bwd_jvp": (1, 6, 11)}[instr.kernel.removeprefix("patch_stats_")]
    numbers = (instr.attrs["eps"],) if "eps" in instr.attrs else ()
    return Native(instr.kernel, (*instr.inputs, *instr.outputs), (channels, h * w, outputs), numbers, packed=packed)
