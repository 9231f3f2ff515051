"""cross_entropy and mse."""

from __future__ import annotations

from fastmaml.executors.cpu.native import Buffers, Native, rule, width_of
from fastmaml.plan.instructions import Instruction


@rule("cross_entropy", "mse")
def loss(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    reduction = instr.attrs["reduction"]
    code = {"mean": 0, "sum": 1}.get(reduction, 2)
    numbers = (float(instr.attrs.get("label_smoothing", 0.0)), 1.0 if code < 2 else float(reduction))
    return Native(
        instr.kernel, (*instr.inputs, *instr.outputs), (width_of(instr.inputs[0], buffers), code), numbers, unpadded=(1,)
    )
