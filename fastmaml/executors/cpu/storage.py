"""Where the buffers of a lowered Plan lie: sizes, strides, blocks, addresses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fastmaml.executors.cpu.fusion import Step
from fastmaml.executors.cpu.layouts import Matrix
from fastmaml.executors.cpu.native import LANE, NARROW, PLANES, Windows, is_image
from fastmaml.plan.instructions import Buffer, Group, Instruction, Phase, Plan, Ref
from fastmaml.plan.memory import arena_layout

ALIGN = 64
BLOCK_BYTES = 512 * 1024  # what one block of rows of a group may occupy: half of a small L2
HOMES = {"meta": 0, "task": 1, "run": 2, "scratch": 2, "block": 2, "nowhere": 3}


def pad(n: int, to: int = LANE) -> int:
    return -(-n // to) * to


class Storage:
    """Of a lowering for one capacity; who lowers gives it what follows.

    buffers   the Plan's, and those that native calls need besides;  alias: names that are another's memory
    packed    how each packed array lies;  windows: of each index buffer
    phases    the native calls, by groups
    """

    plan: Plan
    capacity: dict[str, int]
    block_rows: int | None
    buffers: dict[str, Buffer]
    alias: dict[str, Ref]
    packed: dict[str, Matrix]
    windows: dict[str, Windows]
    phases: list[tuple[Phase, list[tuple[str | None, list[Step]]]]]

    def _own(self, ref: Ref) -> Ref:
        """The same memory under the name that owns it."""
        while ref.buffer in self.alias:
            ref = replace(self.alias[ref.buffer], shift=self.alias[ref.buffer].shift + ref.shift)
        return ref

    def _name(self, name: str) -> str:
        return self._own(Ref(name)).buffer

    def _unpadded(self, buffer: Buffer) -> bool:
        """Arrays that lie in the caller's memory have no padding."""
        return self._outside(buffer) and buffer.kind in ("real", PLANES) and buffer.numel % LANE != 0

    def _outside(self, buffer: Buffer) -> bool:
        """In the caller's memory (recorded masks are not: they are read out of the workspace)."""
        return buffer.home == "task" and (
            buffer.name in self.plan.inputs or (buffer.name in self.plan.results and buffer.kind in ("real", PLANES))
        )

    # ------------------------------------------------------------------------------------------------- sizes
    def _stride(self, buffer: Buffer) -> int:
        """Bytes from one row to the next (of the whole array without rows)."""
        if buffer.kind == "label":
            return 8
        if self._outside(buffer) and (buffer.rows or buffer.name in self.plan.inputs or buffer.shape == ()):
            return 4 * buffer.numel
        if buffer.columns:
            return 8 * pad(self.capacity[buffer.columns], 8)  # kept in double
        return self._floats(buffer) * (1 if buffer.kind == "mask" else self.windows[buffer.name].item_bytes if buffer.kind == "index" else 4)

    def _floats(self, buffer: Buffer) -> int:
        """Elements of a row, or of the whole array without rows, with their padding."""
        if buffer.name in self.packed:
            inputs, outputs, taps = (*self.packed[buffer.name], 0)[:3]
            return outputs * pad(inputs) if outputs <= NARROW and not taps else inputs * pad(outputs)
        if is_image(buffer) and buffer.kind != PLANES:
            c, h, w = buffer.shape
            return h * w * pad(c)
        return pad(buffer.numel)

    def _block(self, rows: str | None, steps: list[Step]) -> int:
        """Rows of one block of a group; 0: all at once."""
        if rows is None:
            return 0
        if self.block_rows is not None:
            block = self.block_rows
        else:
            names = {self._name(r.buffer) for s in steps for r in s.call.operands if r is not None}
            each = sum(self._stride(self.buffers[n]) for n in names if self.buffers[n].rows)
            few = 1 if any(is_image(self.buffers[n]) for n in names) else LANE
            block = max(few, BLOCK_BYTES // max(each, 1))
        return 0 if block >= self.capacity[rows] else block

    def _blocks(self) -> dict[str, int]:
        """Of buffers that live one block long, where there are several blocks: its rows. All blocks use the same memory, which so stays in the cache."""
        rows_of = {}
        for _, groups in self.phases:
            for rows, steps in groups:
                block = self._block(rows, steps)
                for ref in (ref for step in steps for ref in step.call.operands if ref is not None and block):
                    buffer = self.buffers[self._name(ref.buffer)]
                    if buffer.home == "block" and buffer.rows:
                        rows_of[buffer.name] = block
        return rows_of

    def _bytes(self, buffer: Buffer) -> int:
        """Of one slot."""
        rows = 1 if buffer.rows is None else self.block_rows_of.get(buffer.name) or self.capacity[buffer.rows]
        return rows * self._stride(buffer)

    def _slots(self, buffer: Buffer) -> int:
        return max(buffer.steps, 1)

    # ------------------------------------------------------------------------------------------------- addresses
    def _addresses(self) -> None:
        self.at: dict[str, tuple[int, int, int]] = {}  # home, task buffer, offset
        self.task_buffers: list[str] = []
        size = {"meta": 0, "run": 0}
        used = {self._name(r.buffer) for _, gs in self.phases for _, ss in gs for s in ss for r in s.call.operands if r is not None}
        used |= {n for r in self.plan.reductions for n in (r.source.buffer, r.target)} | set(self.plan.inputs) | set(self.plan.results)
        used |= {b.first for n in used if (b := self.buffers[n]).first}
        for name, buffer in self.buffers.items():
            if name not in used or name in self.alias:
                continue
            if buffer.home == "task":
                self.at[name] = (1, len(self.task_buffers), 0)
                self.task_buffers.append(name)
            elif buffer.home == "nowhere":
                self.at[name] = (HOMES[buffer.home], 0, 0)
            elif buffer.home in size:
                skipped = 1 if buffer.first else 0  # slot 0 lies in another buffer
                self.at[name] = (HOMES[buffer.home], 0, size[buffer.home] - skipped * pad(self._bytes(buffer), ALIGN))
                size[buffer.home] += (self._slots(buffer) - skipped) * pad(self._bytes(buffer), ALIGN)
        arena = replace(self.plan, buffers={**self.plan.buffers, **{n: self.buffers[n] for n in self.plan.buffers}}, segments=self._aliased(used))
        offsets, arena_bytes = arena_layout(arena, self._bytes, ALIGN)
        for name, offset in offsets.items():
            self.at[name] = (HOMES["run"], 0, size["run"] + offset)
        self.scratch_at = size["run"]  # in the run's memory: what is kept over the steps before it, one arena behind
        self.meta_bytes, self.run_bytes = pad(size["meta"], ALIGN), pad(size["run"] + arena_bytes, ALIGN)

    def _aliased(self, used: set[str]) -> Mapping[str, object]:
        """The Plan's segments under the names that own memory, without what no call touches (fused away)."""

        def rename(refs):
            return tuple(Ref(name, r.shift) if r and (name := self._name(r.buffer)) in used else None for r in refs)

        return {
            name: replace(
                segment,
                groups=tuple(
                    Group(tuple(Instruction(i.kernel, rename(i.inputs), rename(i.outputs), i.attrs) for i in g.instructions), g.rows)
                    for g in segment.groups
                ),
            )
            for name, segment in self.plan.segments.items()
        }

    def _step_stride(self, buffer: Buffer) -> int:
        if not buffer.steps or buffer.home == "nowhere":
            return 0
        if buffer.home == "task" and buffer.name in self.plan.results and buffer.shape == () and not buffer.rows:
            return 4
        return pad(self._bytes(buffer), ALIGN)

    def _operand(self, ref: Ref | None) -> list[int]:
        if ref is None:
            return [0]
        ref = self._own(ref)
        buffer = self.buffers[ref.buffer]
        home, task_buffer, offset = self.at[buffer.name]
        if buffer.home == "task" and buffer.first:
            offset = -self._step_stride(buffer)
        shift = ref.shift if buffer.steps else 0
        by_row = int(bool(buffer.rows) and buffer.name not in self.block_rows_of)
        words = [1, home, task_buffer, by_row, shift, offset, self._step_stride(buffer), self._stride(buffer), int(bool(buffer.first))]
        if buffer.first:
            first_home, first_task, first_offset = self.at[buffer.first]
            words += [first_home, first_task, first_offset]
        return words

    def by_rows(self, name: str) -> bool:
        """Whether a kept buffer holds the rows of all tasks one after another (as batch phases need them)."""
        buffer = self.buffers[name]
        return buffer.rows in ("support", "query") and not buffer.steps

    def row_bytes(self, name: str) -> int:
        return self._stride(self.buffers[name])

    def kept_bytes(self, name: str) -> int:
        """Bytes per task of a task-home buffer that is not the caller's."""
        buffer = self.buffers[name]
        slots = self._slots(buffer) - (1 if buffer.first else 0)
        if buffer.steps:
            return slots * self._step_stride(buffer)
        return self._bytes(buffer)

    def decisions(self, name: str, rows: Tensor) -> Tensor:
        """Recorded bytes of a mask or index buffer, [rows, stride], as the torch executor has them: bool, or the index h * w of a maximum."""
        buffer = self.buffers[name]
        window = self.windows.get(name)
        if window and window.item_bytes > 1:
            rows = rows.contiguous().view(torch.int32)
        if is_image(buffer):
            c, h, w = buffer.shape
            rows = rows.view(len(rows), h, w, -1)[..., :c].permute(0, 3, 1, 2).contiguous()
        else:
            rows = rows[:, : buffer.numel].reshape(len(rows), *buffer.shape)
        return window.flat(rows.long()) if window else rows.bool()
