"""Weights that are rolled back: on the way back over the steps theta_k is made again from theta_{k+1}, instead of being kept.

    theta_k = theta_{k+1} + rate_k g_k,     g_k = delta_k^T x_k     (a linear layer's weight; its bias likewise, with the row sum of delta_k)

delta_k [n_support, out] is kept per step, instead of theta_k [out, in]; so is x_k, unless the HVP pass makes it again bit for bit, because no weight below
is rolled back. (Made from rolled back weights, an error of x_k would come back in those of step k - 1, larger: going back, gradient descent diverges.)
What is left is the rounding of the update and of its undoing, as any float32 trajectory has it at every step. It costs one product per layer and step
back, so a few steps are still kept whole.

With weights out of the way, what else is kept per step shows: statistics of batch norm over vectors are made again from their x, and the mask of a ReLU
whose output is a kept x is read off it (y > 0). Other masks are kept: made again from a rounded x, one might come out otherwise.
"""

from __future__ import annotations

from collections.abc import Container, Mapping

from fastmaml.plan.arrangement import Arrangement
from fastmaml.plan.instructions import Ref
from fastmaml.plan.passes import Pass
from fastmaml.program import Op, Program

KEPT = 8  # steps up to which every theta_k is kept


def rolled_back(program: Program, a: Arrangement) -> dict[int, Op]:
    """The linear layers whose weight is rolled back, by the value of the weight: where rows of input and cotangent are half as much at most.

    None with an inner optimizer beyond plain gradient descent: with a momentum theta_k follows from theta_{k+1} and v, and v of a step before would be a
    quotient by the momentum, whose error grows with every step (Maclaurin et al. 2015 keep the bits that are lost)."""
    if a.steps <= KEPT or not a.support_rows or not a.optimizer.plain:
        return {}
    uses: dict[int, int] = {}
    for v in (v for op in program.ops for v in op.inputs if v is not None):
        uses[v] = uses.get(v, 0) + 1
    scalar = {leaf.value for leaf in program.leaves if leaf.role == "adapted" and a.rates[leaf.name].shape == () and uses.get(leaf.value) == 1}
    return {op.inputs[1]: op for op in program.ops if op.name == "linear" and op.inputs[1] in scalar and _pays(program, op, a.support_rows)}


def _pays(program: Program, op: Op, support_rows: int) -> bool:
    outputs, inputs = program.values[op.inputs[1]].shape
    return len(program.values[op.inputs[0]].shape) == 1 and 2 * support_rows * (inputs + outputs) <= inputs * outputs


def biases(program: Program, a: Arrangement, layers: Mapping[int, Op]) -> set[int]:
    """The values of the biases that go along with their weights."""
    leaves = {leaf.value: leaf for leaf in program.leaves if leaf.role == "adapted" and a.rates[leaf.name].shape == ()}
    used = [v for op in program.ops for v in op.inputs]
    return {b for op in layers.values() if (b := op.inputs[2]) in leaves and used.count(b) == 1}


def inputs_to_keep(program: Program, layers: Mapping[int, Op]) -> set[int]:
    """The values x of these layers that the HVP pass would make from other rolled back weights."""
    tainted: set[int] = set()
    for op in program.ops:
        if op in layers.values() or any(v in tainted for v in op.inputs):
            tainted.add(op.output)
    return {op.inputs[0] for op in layers.values()} & tainted


def statistics_to_make_again(program: Program) -> set[int]:
    """The outputs of batch norms of which the HVP pass makes mean and rstd again: over images a pass over x costs more than it saves."""
    norms = [op for op in program.ops if op.name == "batchnorm"]
    return {op.output for op in norms if op.attrs["statistics"] == "running" or len(program.values[op.output].shape) == 1}


def masks_from_outputs(program: Program, kept: Container[int]) -> list[Op]:
    """The ReLUs whose output is kept and says the mask: y > 0 where x > 0, as long as negative x are not turned around."""
    return [op for op in program.ops if op.output in kept and op.name in ("relu", "leaky_relu") and op.attrs.get("slope", 0.0) >= 0]


def roll_back(p: Pass, op: Op, delta: Ref, leaves: Mapping[int, tuple[Ref, Ref]]) -> None:
    """Emits theta_k = theta_{k+1} + rate_k g_k for one layer. ``leaves``: by value, theta and its rate."""
    targets = [v if v in leaves else None for v in op.inputs[1:]]
    gradients = [None if v is None else p.new(f"g{v}", p.program.values[v].shape, False) for v in targets]
    p.emit("linear_bwd_weight", (p.value[op.inputs[0]], delta), gradients, **op.attrs)
    for v, g in zip(targets, gradients, strict=True):
        if g is not None:
            theta, rate = leaves[v]
            p.emit("axpy_fwd", (theta, g, rate), (theta,), sign=1.0)
