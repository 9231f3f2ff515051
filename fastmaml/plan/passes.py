"""A Pass: one traversal of a Program's ops over one extent of rows, and the instructions that it emits.

It holds the Refs of every value's primal, tangent, adjoint and tangent of the adjoint. A tangent or an adjoint that is zero is absent and makes no
instruction. How each op becomes instructions is in ``differentiate.py``; who starts which pass, and what becomes of its results, in ``sweep.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from fastmaml.plan.instructions import Buffer, Instruction, Operand, Ref
from fastmaml.program import Op, Program


class Pass:
    """One traversal of ``ops`` over the rows ``extent``.

    value, dot, bar, bar_dot   primal, tangent, adjoint and tangent of the adjoint of each Program value, as Refs
    saved                      what one pass keeps for another of the same step (masks, indices, BN statistics), by (op, name)
    """

    def __init__(self, name: str, program: Program, ops: Iterable[Op], extent: str, buffers: dict[str, Buffer]) -> None:
        self.name, self.program, self.ops, self.extent, self.buffers = name, program, tuple(ops), extent, buffers
        self.leaf_values = {leaf.value for leaf in program.leaves}
        self.states = {leaf.value for leaf in program.leaves if program.values[leaf.value].rows}  # factors: rows of the support set
        self.instructions: list[Instruction] = []
        self.own: set[str] = set()  # buffers that this pass has made
        self.value: dict[int, Ref] = {}
        self.dot: dict[int, Ref] = {}
        self.bar: dict[int, Ref] = {}
        self.bar_dot: dict[int, Ref] = {}
        self.saved: dict[tuple[int, str], Ref] = {}
        self.wanted: set[int] = set()  # values whose adjoint somebody needs
        self.keep_steps = 0  # > 0: what is saved gets a step axis, for a pass of the same step that runs later
        self.keep_values = False  # memory="fast": values and adjoints are kept per step, too
        # what one rule hands to another of the same op: tangents of BN statistics, its channel sums, second-order terms of a module
        self.dot_stats: dict[int, tuple[Operand, Operand]] = {}
        self.chosen: dict[int, Ref] = {}  # what a pooled normalisation took of its input, and its tangent
        self.chosen_dot: dict[int, Ref] = {}
        self.bar_sums: dict[int, tuple[Operand, Operand]] = {}
        self.second: dict[int, list[Operand]] = {}
        self.support_data: Operand = None  # x of the support rows, for Gram matrices
        self.factor_gradient = False  # the gradient pass: see rewrite.py
        self.bar_sums_dot: dict[int, tuple[Operand, Operand]] = {}
        # by their output: convolutions whose statistics are made of the moments of the support rows' patches, and what makes them (see patches.py)
        self.from_patches = {op.attrs["of"]: op for op in self.ops if op.name == "patch_stats" and extent == "support"}
        self.before: dict[int, Callable[[], None]] = {}  # by the op's output: emits what the op needs first
        self.bars_given = False  # memory="fast": the adjoints came along, too

    # ------------------------------------------------------------------------------------------------------------ emission
    def new(self, tag: str, shape: tuple[int, ...], rows: bool | str, kind: str = "real", steps: int = 0) -> Ref:
        """A buffer of this pass; ``rows``: whether it has the pass's rows, or the extent of other ones."""
        name, n = f"{self.name}.{tag}", 1
        while name in self.buffers:
            n += 1
            name = f"{self.name}.{tag}.{n}"
        extent = self.extent if rows is True else rows or None
        self.buffers[name] = Buffer(name, shape, extent, kind, "run" if steps else "", steps)
        self.own.add(name)
        return Ref(name)

    def like(self, tag: str, v: int, keep: bool = False) -> Ref:
        """A buffer in the shape of value ``v``; ``keep``: with a step axis under memory="fast" (a leaf's gradient never)."""
        spec = self.program.values[v]
        keep = keep and v not in self.leaf_values
        rows = "support" if v in self.states else spec.rows
        return self.new(f"{tag}{v}", spec.shape, rows, steps=self.keep_steps if keep and self.keep_values else 0)

    def emit(self, kernel: str, inputs: Iterable[Operand], outputs: Iterable[Operand], /, **attrs: Any) -> None:
        self.instructions.append(Instruction(kernel, tuple(inputs), tuple(outputs), MappingProxyType(attrs)))

    def save(self, op: Op, tag: str, shape: tuple[int, ...], rows: bool, kind: str = "real") -> Ref:
        """A buffer for a discrete decision or a statistic of ``op``; kept per step where a later pass wants it."""
        ref = self.new(f"{tag}{op.output}", shape, rows, kind, self.keep_steps)
        self.saved[op.output, tag] = ref
        return ref

    def add_bar(self, v: int | None, make: Callable[[Ref], None], dot: bool = False) -> None:
        """Adds a contribution to the adjoint of ``v``: ``make(ref)`` emits the instruction that writes it."""
        if v is None or v not in self.wanted:
            return
        bars = self.bar_dot if dot else self.bar
        ref = self.like("dd" if dot else "d", v, keep=not dot)
        make(ref)
        self._accumulate(bars, v, ref, dot)

    def alias_bar(self, v: int | None, ref: Operand, dot: bool = False) -> None:
        """The adjoint of ``v`` gains a buffer that already stands."""
        if v is not None and v in self.wanted and ref is not None:
            self._accumulate(self.bar_dot if dot else self.bar, v, ref, dot)

    def _accumulate(self, bars: dict[int, Ref], v: int, ref: Ref, dot: bool) -> None:
        if v in bars:  # several uses: summed in the order of the reverse walk
            total = self.like("dd" if dot else "d", v, keep=not dot)
            self.emit("add_fwd", (bars[v], ref), (total,))
            ref = total
        bars[v] = ref

    def want(self, targets: Iterable[int]) -> None:
        """Marks every value from which an adjoint must flow to one of ``targets``."""
        self.wanted = set(targets)
        for op in self.ops:
            if any(v in self.wanted for v in op.inputs):
                self.wanted.add(op.output)

    def rename(self, ref: Ref, target: Ref) -> None:
        """Lets the instruction that made ``ref`` write ``target`` instead (``ref`` is this pass's own)."""

        def swap(refs: tuple[Operand, ...]) -> tuple[Operand, ...]:
            return tuple(target if r == ref else r for r in refs)

        self.instructions = [replace(i, inputs=swap(i.inputs), outputs=swap(i.outputs)) for i in self.instructions]
        for table in (self.value, self.dot, self.bar, self.bar_dot, self.saved):
            table.update({key: target for key, r in table.items() if r == ref})
        self.bar_sums = {v: tuple(target if r == ref else r for r in sums) for v, sums in self.bar_sums.items()}
        self.own.remove(ref.buffer)
        del self.buffers[ref.buffer]

    def place(self, ref: Operand, target: Ref) -> None:
        """Makes ``target`` hold ``ref`` (None: zero)."""
        if ref is None:
            self.emit("zero_fwd", (), (target,))
        elif ref.buffer in self.own and not self.buffers[ref.buffer].steps and any(ref in i.outputs for i in self.instructions):
            self.rename(ref, target)
        else:  # kept per step for another pass, made elsewhere, or in a place already: both terms of a sum have its gradient
            self.emit("copy_fwd", (ref,), (target,))
