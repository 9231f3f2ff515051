"""What depends on what in a Program: decides what is computed once per meta-iteration, once per task, or at every inner step."""

from __future__ import annotations

from fastmaml.program import Program

RANK = {"meta": 0, "task": 1, "step": 2}


def levels(program: Program, entry: str) -> dict[int, str]:
    """"step" where an adapted leaf is involved, else "task" where samples (or leaves of a task) are, else "meta"."""
    level = {program.input: "task"}
    for leaf in program.leaves:
        level[leaf.value] = "step" if leaf.role == "adapted" or leaf.per_step else leaf.home
    for op in program.ops:
        level[op.output] = max((level[v] for v in op.inputs if v is not None), key=RANK.__getitem__)
    if entry != "predict" and level[program.output] != "step":
        raise ValueError("no adapted parameter reaches the model's output: nothing to adapt in the inner loop")
    if entry == "predict":  # nothing is differentiated: everything runs in one pass
        level |= {op.output: "step" for op in program.ops}
    return level


def differentiable_values(program: Program) -> set[int]:
    """Values that depend on a trained leaf."""
    found = {leaf.value for leaf in program.leaves if leaf.role != "const"}
    for op in program.ops:
        if any(v in found for v in op.inputs):
            found.add(op.output)
    return found
