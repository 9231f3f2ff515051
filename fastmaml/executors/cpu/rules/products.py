"""linear, conv2d, and what stands for them: native calls of products."""

from __future__ import annotations

from fastmaml.executors.cpu.native import PLANES, Buffers, Native, buffer_of, rule, width_of
from fastmaml.plan.instructions import Instruction

BASES = (None,) * 4  # base, scale, bbase, bscale: where a weight gradient is not added to anything
MOST_TAPS, MOST_TAPS_IN_A_ROW = 2048, 96  # of a convolution: what a strip and the weights of a row of taps have room for


@rule("linear")
def linear(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    mode = instr.kernel.removeprefix("linear_")
    refs, ins, outs = (*instr.inputs, *instr.outputs), instr.inputs, instr.outputs
    packed = {"fwd": (1,), "jvp": (1, 3), "bwd_input": (1,), "bwd_input_jvp": (1, 3), "bwd_weight": (2,), "bwd_weight_jvp": (4,)}[mode]
    if mode in ("fwd", "jvp"):
        x, y = ins[0], outs[0]
        refs, unpadded = (*refs, None), (0,) if mode == "fwd" else (0, 2)  # None: no activation's mask
    elif mode in ("bwd_input", "bwd_input_jvp"):
        x, y = outs[0], next(ref for ref in (ins[0], ins[2] if mode == "bwd_input_jvp" else None) if ref)
        refs, unpadded = (*refs, None, None), ()  # nor a transposed weight
    else:
        x, y = ins[0], next(ref for ref in (ins[1], *ins[3:]) if ref)
        unpadded = (0,) if mode == "bwd_weight" else (0, 2)
        refs = (*refs, *BASES)
    if len(buffer_of(x, buffers).shape) != 1:
        raise NotImplementedError(f"linear over samples of shape {list(buffer_of(x, buffers).shape)} has no native kernel yet")
    return Native(instr.kernel, refs, (width_of(x, buffers), width_of(y, buffers)), packed=packed, unpadded=unpadded)


@rule("conv2d")
def conv2d(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    mode = instr.kernel.removeprefix("conv2d_")
    ins, outs = instr.inputs, instr.outputs
    refs, attrs = (*ins, *outs), instr.attrs
    packed = {"fwd": (1,), "jvp": (1, 3), "bwd_input": (1,), "bwd_input_jvp": (1, 3), "bwd_weight": (2,), "bwd_weight_jvp": (4,)}[mode]
    unpadded: tuple[int, ...] = ()
    if mode in ("fwd", "jvp"):
        x, w, y, unpadded = buffer_of(ins[0], buffers).shape, buffer_of(ins[1], buffers).shape, buffer_of(outs[0], buffers).shape, (0,)
    else:
        x, w = attrs["input_shape"], attrs.get("weight_shape") or buffer_of(ins[1], buffers).shape
        slots = {"bwd_input": (0,), "bwd_input_jvp": (0, 2), "bwd_weight": (1,), "bwd_weight_jvp": (1, 3)}[mode]
        y = next(buffer_of(ins[i], buffers).shape for i in slots if ins[i])
        unpadded = (0,) if "weight" in mode else ()
    taps_h, taps_w = w[2:]
    if taps_h * taps_w > MOST_TAPS or taps_w > MOST_TAPS_IN_A_ROW:
        raise NotImplementedError(f"conv2d with a kernel of {taps_h} x {taps_w} has no native kernel")
    (top, _, left, _), planes = attrs["padding"], int(ins[0] is not None and buffer_of(ins[0], buffers).kind == PLANES)
    sizes = (*x, w[0], taps_h, taps_w, *attrs["stride"], top, left, *y[1:], planes)
    refs = refs if "weight" in mode else (*refs, None)  # no activation's mask
    return Native(instr.kernel, refs, sizes, packed=packed, unpadded=unpadded)


@rule("gram", "factored_linear")
def factored(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    refs = (*instr.inputs, *instr.outputs)
    rows = {"support": 1, "query": 2, "joint": 3}
    if instr.kernel == "gram_fwd":
        x, _, g = refs
        return Native("gram_fwd", refs, (width_of(x, buffers), rows[buffers[g.buffer].rows]), unpadded=(0, 1))
    width = width_of(instr.outputs[0], buffers)
    kernel = instr.kernel.removesuffix("_jvp") if "bwd" in instr.kernel else instr.kernel
    return Native(kernel, refs, (width, rows[buffers[refs[0].buffer].rows] if refs[0] else 1))


@rule("row_sum")
def row_sum(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    return Native("row_sum_bwd", (*instr.inputs, *instr.outputs), (0, width_of(instr.outputs[0], buffers)))
