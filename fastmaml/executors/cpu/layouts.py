"""How the weights of a Plan lie: which are packed (csrc/include/fastmaml/plan.h), and which reshaped ones are the same memory under another name.

Packed is every array that is, or is elementwise with, the weight of a linear or conv2d layer. Of a convolution's also the matrices [out, channels * taps] that
they are made of, for whatever multiplies these from the left mixes rows alone, and the factors [out, channels, 1, 1] of its kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from fastmaml.executors.cpu.fusion import Groups
from fastmaml.executors.cpu.native import NARROW, Buffers, same_layout
from fastmaml.executors.cpu.rules import native
from fastmaml.plan.instructions import Buffer, Instruction, Operand, Phase, Plan, Ref

Matrix = tuple[int, ...]  # sizes of pack_fwd and unpack_fwd: (in, out), of a convolution (taps * channels, out, taps)


class Classes:
    """Names that belong together."""

    def __init__(self) -> None:
        self.parent: dict[str, str] = {}

    def of(self, name: str) -> str:
        while self.parent.setdefault(name, name) != name:
            name = self.parent[name]
        return name

    def join(self, names: Iterable[str]) -> None:
        names = list(names)
        for name in names[1:]:
            self.parent[self.of(name)] = self.of(names[0])


def matrix(buffer: Buffer) -> Matrix:
    """Of a weight as a layer reads it."""
    if len(buffer.shape) == 2:
        return buffer.shape[1], buffer.shape[0]
    outputs, inputs, h, w = buffer.shape
    return inputs * h * w, outputs, h * w


def is_reshaped_weight(instr: Instruction, buffers: Buffers) -> bool:
    """A reshape between [out, in] and [out, channels, h, w]."""
    if not instr.kernel.startswith("reshape_"):
        return False
    x, y = (buffers[refs[0].buffer] for refs in (instr.inputs, instr.outputs))
    return not x.rows and not y.rows and {len(x.shape), len(y.shape)} == {2, 4} and x.shape[0] == y.shape[0]


def packed_weights(plan: Plan, buffers: Buffers, excluded: Callable[[str], bool]) -> dict[str, Matrix]:
    """Of each packed array how it lies. ``excluded``: names that are plain in any case."""
    alike, columns, weights, kernels = Classes(), Classes(), set(), []

    def usable(refs: Iterable[Operand]) -> list[str]:
        return [ref.buffer for ref in refs if ref and buffers[ref.buffer].rows is None and not excluded(ref.buffer)]

    pairs = [[Ref(b.name), Ref(b.first)] for b in buffers.values() if b.first]
    pairs += [[r.source, Ref(r.target)] for r in plan.reductions]
    for _, instr in plan.instructions():
        pairs.append(same_layout(instr, buffers))
        if is_reshaped_weight(instr, buffers):
            columns.join(usable((*instr.inputs, *instr.outputs)))
        if not instr.kernel.startswith(("linear_", "conv2d_", "matmul_", "mul_", "patch_stats_")):
            continue
        call = native(instr, buffers, None)
        weights.update(call.operands[i].buffer for i in call.packed if call.operands[i])
        together = usable(call.operands[i] for i in call.together)
        whole = max((buffers[name].numel for name in together), default=0)
        columns.join(name for name in together if buffers[name].numel == whole or call.kernel == "matmul_fwd")
        kernels += [(name, together) for name in together if call.kernel != "matmul_fwd"]
    for refs in pairs:
        alike.join(usable(refs))
        columns.join(usable(refs))
    layers: dict[str, set[Matrix]] = {}  # the layouts that the layers ask for
    for name in weights:
        inputs, _, *taps = matrix(buffers[name])
        layers.setdefault(columns.of(name), set()).add((inputs, *taps))

    def of_a_convolution(name: str) -> Matrix | None:
        """Where all layers of its class agree."""
        inputs, outputs, *taps = matrix(buffers[name])
        asked = layers.get(columns.of(name), set())
        fits = len(asked) == 1 and all(len(a) == 2 and a[0] == inputs and taps in ([], [a[1]]) for a in asked)
        return (inputs, outputs, *(taps or [next(iter(asked))[1]])) if fits else None

    candidates = [name for name, b in buffers.items() if b.rows is None and len(b.shape) in (2, 4)]
    out = {name: lies for name in candidates if (lies := of_a_convolution(name))}
    roots = {alike.of(name) for name in weights} | {alike.of(name) for name, others in kernels if any(other in out for other in others)}
    return {**{name: matrix(buffers[name]) for name in candidates if alike.of(name) in roots}, **out}


BOTH_WAYS = ("linear_bwd_input", "linear_bwd_input_jvp", "linear_bwd_input_both")  # operand 1 is the weight, the last one its transpose


def turned_weights(phases: Iterable[tuple[Phase, Groups]], buffers: dict[str, Buffer], packed: dict[str, Matrix], own: Callable[[Ref], Ref], inputs: Iterable[str]) -> dict[str, str]:
    """Leaves whose transpose is packed once for all tasks: name -> name of that. What multiplies by a leaf from the other side, at every step or at
    theta_0, is given it, and does not transpose the weight anew for each task."""
    found: dict[str, str] = {}

    def transpose_of(ref: Ref) -> Operand:
        weight = buffers[ref.buffer]
        leaf = weight.first or weight.name
        inner, outer, *taps = packed[weight.name]
        there = leaf in inputs and buffers[leaf].home == "meta" and not buffers[leaf].steps
        if not there or taps or min(inner, outer) <= NARROW:
            return None
        turned = found[leaf] = f"{leaf}.turned"
        buffers[turned], packed[turned] = replace(buffers[leaf], name=turned, shape=buffers[leaf].shape[::-1]), (outer, inner)
        if leaf == weight.name:
            return Ref(turned)
        name = f"{weight.name}.turned"  # nowhere, but at theta_0
        buffers[name] = replace(weight, name=name, home="nowhere", first=turned)
        return Ref(name, ref.shift)

    for _, groups in phases:
        for step in (step for _, steps in groups for step in steps if step.call.kernel in BOTH_WAYS):
            step.call = replace(step.call, operands=(*step.call.operands[:-1], transpose_of(own(step.call.operands[1]))))
    return found


def views(plan: Plan, packed: Mapping[str, Matrix]) -> dict[str, Ref]:
    """The results of reshapes that are their argument's memory under another name, and arguments that are their result's: what lies alike and is not
    written again while it is needed."""
    found: dict[str, Ref] = {}
    writers, readers = {}, {}
    for _, instr in plan.instructions():
        for table, refs in ((writers, instr.writes()), (readers, instr.reads())):
            for ref in refs:
                table.setdefault(ref.buffer, []).append(instr)
    kept = {*plan.results, *plan.inputs, *(n for r in plan.reductions for n in (r.source.buffer, r.target)), *(b.first for b in plan.buffers.values())}

    def owner(name: str) -> str:
        while name in found:
            name = found[name].buffer
        return name

    def private(name: str, last: Instruction | None = None) -> bool:
        """Written once, and (if ``last``) read by that instruction alone."""
        buffer = plan.buffers[name]
        once = len(writers.get(name, ())) == 1 and (last is None or [id(i) for i in readers[name]] == [id(last)])
        return once and name not in kept and not buffer.steps and not buffer.first and name not in found

    def touches(instrs: Iterable[Instruction], name: str, reads: bool) -> bool:
        refs = (ref for i in instrs for ref in (*i.writes(), *(i.reads() if reads else ())))
        return any(owner(ref.buffer) == owner(name) for ref in refs)

    for segment in plan.segments.values():
        instrs = segment.instructions
        at = {id(instr): i for i, instr in enumerate(instrs)}
        for i, instr in enumerate(instrs):
            if not is_reshaped_weight(instr, plan.buffers):
                continue
            (x,), (y,) = instr.inputs, instr.outputs
            lie_alike = x.buffer in packed and packed[x.buffer] == packed.get(y.buffer)
            if not lie_alike or "task" in (plan.buffers[x.buffer].home, plan.buffers[y.buffer].home):
                continue
            reads = [at.get(id(reader), -1) for reader in readers.get(y.buffer, ())]
            made = next((j for j in range(i) if touches(instrs[j : j + 1], x.buffer, reads=False)), i)
            if private(y.buffer) and min(reads, default=i) > i and not touches(instrs[i + 1 : max(reads) + 1], x.buffer, reads=False):
                found[y.buffer] = x
            elif private(x.buffer, instr) and made < i and not touches(instrs[made:i], y.buffer, reads=True):
                found[x.buffer] = y
    return found
