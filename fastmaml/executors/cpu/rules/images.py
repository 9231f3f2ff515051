"""Poolings and padding of images."""

from __future__ import annotations

from fastmaml.executors.cpu.native import Buffers, Native, image_shape, rule, wide_index
from fastmaml.plan.instructions import Instruction


@rule("maxpool2d", "avgpool2d")
def pool(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    """Windows: the sizes are those of the image that is pooled, which the reverse writes."""
    op, _, mode = instr.kernel.partition("_")
    back, a = mode.startswith("bwd"), instr.attrs
    image = image_shape(instr.outputs[0] if back else instr.inputs[0], buffers, op)
    if op == "maxpool2d":
        mode, flag = {"fwd": "fwd", "replay": "replay", "jvp": "replay"}.get(mode, "bwd"), wide_index(a["kernel"])
    else:
        mode, flag = "bwd" if back else "fwd", a["count_include_pad"]
    sizes = (*image, *a["kernel"], *a["stride"], *a["padding"], int(flag))
    return Native(f"{op}_{mode}", (*instr.inputs, *instr.outputs), sizes)


@rule("global_avgpool2d")
def global_avgpool2d(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    mode = "bwd" if "_bwd" in instr.kernel else "fwd"
    image = image_shape(instr.outputs[0] if mode == "bwd" else instr.inputs[0], buffers, "global_avgpool2d")
    return Native(f"global_avgpool2d_{mode}", (*instr.inputs, *instr.outputs), image)


@rule("pad2d")
def pad2d(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    sign = -1 if "_bwd" in instr.kernel else 1  # what was padded is cropped
    sizes = (*image_shape(instr.inputs[0], buffers, "pad2d"), *(sign * p for p in instr.attrs["padding"]))
    return Native("pad2d_fwd", (*instr.inputs, *instr.outputs), sizes)
