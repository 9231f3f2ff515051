"""Patterns of native calls that become one: what the next call would do to a result is done where the result is made.

    linear, conv2d, batchnorm + relu   any of their modes: the activation, its reverse or its tangent, while the result is at hand
    bwd_input + bwd_input_jvp          with the same dy and w: w is read once
    bwd_weight + sgd or axpy           the gradient is added to what it is for, and is never stored itself
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from fastmaml.executors.cpu.native import Native
from fastmaml.executors.uses import Uses
from fastmaml.plan.instructions import Buffer, Operand, Plan, Ref

RESULT = {  # operand of the result; the mask is the next
    **{"linear_fwd": 3, "linear_jvp": 5, "linear_bwd_input": 2, "linear_bwd_input_jvp": 4},
    **{"conv2d_fwd": 3, "conv2d_jvp": 5, "conv2d_bwd_input": 2, "conv2d_bwd_input_jvp": 4},
    **{"batchnorm_fwd": 5, "batchnorm_jvp": 9, "batchnorm_bwd_input": 7, "batchnorm_bwd_input_jvp": 14},
}
RELU = {"relu_fwd": (0, 1, 2), "relu_replay": (0, 2, 1), "relu_bwd": (1, 2, 0)}  # operands: in, out, mask
MAKE, APPLY = 1.0, 2.0  # kernels.h: what the kernel does with the mask
GRADIENTS = {"linear_bwd_weight": (2, 3), "linear_bwd_weight_jvp": (4, 5)}  # operands dw, db; their base and scale are the last four


@dataclass
class Step:
    """A native call inside a group, before addresses are known."""

    call: Native
    rows: str | None


Groups = list[tuple[str | None, list[Step]]]


DEEP = 96  # rows; as in csrc/cpu/kernels/linear.cpp: longer sums are made in pieces, with the first of them in the place of the result


class Fusion:
    """Over one phase at a time. ``pieces(rows, steps)``: whether a group's sums over rows are made in pieces: block by block, or over more than DEEP."""

    def __init__(self, plan: Plan, buffers: Mapping[str, Buffer], pieces: Callable[[str | None, list[Step]], bool]) -> None:
        self.uses, self.buffers, self.pieces = Uses(plan), buffers, pieces

    def run(self, groups: Groups, weights: bool) -> None:
        """``weights``: also the weight gradients (sums of one task, not of all)."""
        if weights:
            self._updates(groups)
        for _, steps in groups:
            self._activations(steps)
            self._pairs(steps)

    # ------------------------------------------------------------------------------------------------- relu
    def _activations(self, steps: list[Step]) -> None:
        for i in range(len(steps) - 2, -1, -1):
            at = RESULT.get(steps[i].call.kernel)
            if at is None or not self.uses.private(product := steps[i].call.operands[at]):
                continue
            j = next((j for j in range(i + 1, len(steps)) if product in steps[j].call.operands), None)
            if j is None or steps[j].call.kernel not in RELU:
                continue
            taken, out, mask = (steps[j].call.operands[n] for n in RELU[steps[j].call.kernel])
            makes = steps[j].call.kernel == "relu_fwd"
            touched = {ref for step in steps[i + 1 : j] for ref in step.call.operands}
            if taken != product or out is None or out in touched or (mask in touched and (makes or self._writes(mask, steps[i + 1 : j]))):
                continue
            operands = list(steps[i].call.operands)
            operands[at], operands[at + 1] = out, mask
            steps[i].call = replace(steps[i].call, operands=tuple(operands), numbers=(MAKE if makes else APPLY, steps[j].call.numbers[0]))
            del steps[j]

    @staticmethod
    def _writes(mask: Operand, steps: list[Step]) -> bool:
        return any(step.call.kernel == "relu_fwd" and step.call.operands[2] == mask for step in steps)

    # ------------------------------------------------------------------------------------------------- dx and its tangent
    @staticmethod
    def _pairs(steps: list[Step]) -> None:
        for i in range(len(steps) - 2, -1, -1):
            first, second = steps[i].call, steps[i + 1].call
            if first.kernel == "linear_bwd_input" and second.kernel == "linear_bwd_input_jvp" and second.operands[2] is not None:
                dy, w, dx, mask, _ = first.operands
                if second.operands[:2] == (dy, w) and second.operands[5] == mask and second.numbers == first.numbers:
                    call = Native("linear_bwd_input_both", (*second.operands[:4], dx, second.operands[4], mask, None), first.sizes, first.numbers)
                    steps[i : i + 2] = [Step(call, steps[i].rows)]

    # ------------------------------------------------------------------------------------------------- gradient, update
    def _updates(self, groups: Groups) -> None:
        for g, (rows, steps) in enumerate(groups):
            for i, step in enumerate(steps):
                for which, slot in enumerate(GRADIENTS.get(step.call.kernel, ())):
                    gradient = step.call.operands[slot]
                    if gradient is None or not self.uses.private(gradient) or self.buffers[gradient.buffer].steps or self.pieces(rows, steps):
                        continue
                    later = [(members, s) for members, s in _after(groups, g, i) if gradient in s.call.operands]
                    target = _update(later[0][1].call, gradient) if len(later) == 1 else None
                    if target is None or self._in_the_way(groups, g, i, later[0][1], target):
                        continue
                    self._add(step, which, slot, target)
                    later[0][0].remove(later[0][1])

    @staticmethod
    def _in_the_way(groups: Groups, g: int, i: int, consumer: Step, target: Target) -> bool:
        """Whether a call between the two has to do with what would be written, or writes what would be read."""
        for _, step in _after(groups, g, i):
            if step is consumer:
                return False
            touched = [ref.buffer for ref in step.call.operands if ref is not None]
            if target.out.buffer in touched or (target.base != target.out and target.base in step.call.operands):
                return True
        return True

    @staticmethod
    def _add(step: Step, which: int, slot: int, target: Target) -> None:
        operands, numbers = list(step.call.operands), list(step.call.numbers or (1.0, 1.0))
        at = len(operands) - 4 + 2 * which
        operands[slot], operands[at], operands[at + 1], numbers[which] = target.out, target.base, target.scale, target.sign
        step.call = replace(step.call, operands=tuple(operands), numbers=tuple(numbers))


@dataclass(frozen=True)
class Target:
    """out = base + sign scale gradient."""

    base: Ref
    scale: Operand
    out: Ref
    sign: float


def _after(groups: Groups, g: int, i: int) -> list[tuple[list[Step], Step]]:
    """The steps after step i of group g, each with the list that holds it."""
    rest = [(groups[g][1], step) for step in groups[g][1][i + 1 :]]
    return rest + [(steps, step) for _, steps in groups[g + 1 :] for step in steps]


def _update(call: Native, gradient: Ref) -> Target | None:
    """If the call adds ``gradient`` to something, with a scalar factor."""
    if call.kernel == "sgd_fwd" and not call.sizes[1] and call.operands[1] == gradient:
        theta, _, rate, out = call.operands
        return Target(theta, rate, out, -1.0)
    if call.kernel == "axpy_fwd" and call.operands[1] == gradient and call.operands[0] == call.operands[3]:
        acc, _, scale, out = call.operands
        return Target(acc, scale, out, call.numbers[0])
    return None
