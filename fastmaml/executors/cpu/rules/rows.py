"""Rows that are joined, taken apart or seen in another shape."""

from __future__ import annotations

from fastmaml.executors.cpu.native import Buffers, Native, is_flat, is_image, rule, width_of
from fastmaml.plan.instructions import Instruction


@rule("join_rows", "support_rows", "query_rows")
def move(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    refs, out = (*instr.inputs, *instr.outputs), instr.outputs[0]
    if is_image(buffers[out.buffer]) and instr.kernel in ("support_rows_fwd", "query_rows_fwd"):
        raise NotImplementedError("features that are images, of which batchnorm='joint' takes the support rows, have no native kernel yet")
    return Native(instr.kernel, refs, (width_of(out, buffers),), unpadded=(0, 1, 2) if instr.kernel == "join_rows_fwd" else (0,))


@rule("reshape")
def reshape(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    """Rows keep their memory; the lowering makes them aliases where it may, this copies."""
    x, y = instr.inputs[0], instr.outputs[0]
    if not buffers[y.buffer].rows:
        return Native("copy_fwd", (x, y), (width_of(y, buffers),))
    a, b = buffers[x.buffer].shape, buffers[y.buffer].shape
    if is_flat(a) and is_flat(b):
        return Native("copy_rows_fwd", (x, y), (width_of(y, buffers),), unpadded=(0, 1))
    if is_flat(b):
        return Native("flatten_image_fwd", (x, y), a)
    if is_flat(a):
        return Native("unflatten_image_fwd", (x, y), b, unpadded=(0,))
    return Native("reshape_image_fwd", (x, y), (*a, *b))
