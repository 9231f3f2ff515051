"""batchnorm, layernorm, groupnorm."""

from __future__ import annotations

from fastmaml.executors.cpu.native import (
    Buffers,
    Native,
    buffer_of,
    channels_of,
    image_shape,
    pixels_of,
    rule,
    wide_index,
)
from fastmaml.plan.instructions import Instruction

MAX_NORM_CHANNELS = 8192  # kMaxNormChannels in csrc/cpu/kernels/rownorm.h


@rule("batchnorm")
def batchnorm(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    x = instr.inputs[0]
    rows = instr.attrs["stat_rows"]
    stat = 0 if rows is None else -1 if rows == extent else -2
    pixels = pixels_of(x, buffers)
    sizes = (channels_of(x, buffers), stat, pixels)
    refs = (*instr.inputs, *instr.outputs)
    if "stats" in instr.kernel or "running" in instr.kernel:
        return Native(instr.kernel, refs, sizes, (instr.attrs["eps"],), pixels=pixels)
    return Native(instr.kernel, (*refs, None), sizes, pixels=pixels)


@rule("batchnorm_maxpool2d")
def batchnorm_maxpool2d(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    image = image_shape(instr.inputs[0], buffers, "batchnorm_maxpool2d")
    a, rows = instr.attrs, instr.attrs.get("stat_rows")
    stat = 0 if rows is None else -1 if rows == extent else -2
    sizes = (*image, *a["kernel"], *a["stride"], *a["padding"], int(wide_index(a["kernel"])), stat)
    return Native(instr.kernel, (*instr.inputs, *instr.outputs), sizes)


@rule("layernorm", "groupnorm")
def rownorm(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    """layernorm and groupnorm are one kernel: see csrc/cpu/kernels/rownorm.h for slabs, groups and the affine's shape."""
    op, _, mode = instr.kernel.partition("_")
    shape, attrs = buffer_of(instr.inputs[0], buffers).shape, instr.attrs
    if len(shape) not in (1, 3):
        raise NotImplementedError(f"{op} over samples of shape {list(shape)} has no native kernel yet")
    if shape[0] > MAX_NORM_CHANNELS:
        raise NotImplementedError(f"{op} over {shape[0]} channels has no native kernel, only over {MAX_NORM_CHANNELS}")
    c, h, w = (*shape, 1, 1)[:3]
    slabs, groups, affine = 1, attrs.get("groups", 1), 0
    if len(shape) == 3 and op == "layernorm":
        slabs, groups, affine = {1: (h, c, 1), 2: (1, c, 1), 3: (1, 1, 2)}[attrs["dims"]]
    sizes = (c, h * w // slabs, slabs, groups, affine)
    return Native(f"layernorm_{mode}", (*instr.inputs, *instr.outputs), sizes, (attrs["eps"],), plain=affine > 0)
