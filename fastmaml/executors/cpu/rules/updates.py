"""Updates and whole arrays; row by row where a factor's state is rows."""

from __future__ import annotations

from fastmaml.executors.cpu.native import Buffers, Native, buffer_of, channels_of, has_rows, pixels_of, rule, width_of
from fastmaml.plan.instructions import Instruction


@rule("sgd")
def sgd(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    if buffer_of(instr.inputs[0], buffers).rows:
        return _sgd_rows(instr, buffers)
    per_element = instr.attrs.get("per_element", False)
    if instr.kernel != "sgd_bwd_rate":
        per_element = buffer_of(instr.inputs[-1], buffers).shape != () and buffer_of(instr.inputs[0], buffers).shape != ()
    return Native(instr.kernel, (*instr.inputs, *instr.outputs), (width_of(instr.inputs[0], buffers), int(per_element)))


def _sgd_rows(instr: Instruction, buffers: Buffers) -> Native:
    """A factor's state: rows of the support set."""
    refs, width = (*instr.inputs, *instr.outputs), width_of(instr.inputs[0], buffers)
    if instr.kernel == "sgd_bwd_rate":
        return Native("sgd_bwd_rate", refs, (width, 0, 1))
    return Native(instr.kernel.replace("sgd_", "sgd_rows_"), refs, (width,))


@rule("clip_value")
def clip_value(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    return Native(instr.kernel, (*instr.inputs, *instr.outputs), (width_of(instr.inputs[0], buffers),), (instr.attrs["bound"],))


@rule("clip_norm")
def clip_norm(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    return Native(instr.kernel, (*instr.inputs, *instr.outputs), (), (instr.attrs["max_norm"],))


@rule("ratio")
def ratio(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    return Native(instr.kernel, (*instr.inputs, *instr.outputs))


@rule("dot")
def dot(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    return Native(instr.kernel, (*instr.inputs, *instr.outputs), (width_of(instr.inputs[0], buffers),))


@rule("axpy", "scale", "zero", "copy")
def array(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    """axpy, scale, zero, copy: over whole arrays, or row by row."""
    refs, out = (*instr.inputs, *instr.outputs), instr.outputs[0]
    numbers = (instr.attrs["sign"],) if "sign" in instr.attrs else ()
    if not has_rows(instr, buffers):
        return Native(instr.kernel, refs, (width_of(out, buffers),), numbers)
    stem, pixels = instr.kernel.removesuffix("_fwd"), pixels_of(out, buffers)
    return Native(f"{stem}_rows_fwd", refs, (channels_of(out, buffers),), numbers, unpadded=(0, 1) if stem == "copy" and pixels == 1 else (), pixels=pixels)
