"""Which native kernel of ``csrc/include/fastmaml/kernels.h`` runs an instruction of the Plan, with which operands and sizes: one rule for each op.

A rule takes (instruction, buffers, extent of the group's rows) and returns one Native call; where there is no kernel it raises NotImplementedError, saying
what has none.
"""

from fastmaml.executors.cpu.native import RULES, Buffers, Native
from fastmaml.executors.cpu.rules import activations, images, losses, norms, patches, products, rows, updates, weights
from fastmaml.plan.instructions import Instruction

__all__ = ["activations", "images", "losses", "native", "norms", "patches", "products", "rows", "updates", "weights"]


def native(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    """The native call of an instruction. Raises NotImplementedError, saying what, where there is no kernel."""
    op = next((op for op in sorted(RULES, key=len, reverse=True) if instr.kernel.startswith(op + "_")), None)
    if op is None:
        raise NotImplementedError(f"{instr.kernel} has no native kernel yet")
    return RULES[op](instr, buffers, extent)
