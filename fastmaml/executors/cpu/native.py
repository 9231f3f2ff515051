"""What a native call is, and what those who write one ask of an instruction's operands (cpu/rules/ has one rule for each op)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmaml.plan.instructions import Buffer, Instruction, Operand, Plan

LANE, NARROW = 16, 8  # floats, outputs; as in csrc/include/fastmaml/plan.h
PLANES = "planes"  # kind of an image that lies as the caller has it: [c, h, w]


@dataclass(frozen=True)
class Native:
    """One native call. ``packed``: operands that must be packed weights; ``plain``: that must not, but for ``together``, which all may;
    ``unpadded``: row operands that may lie as the caller has them; ``pixels``: of an image, each of which is a row to the kernel."""

    kernel: str
    operands: tuple[Operand, ...]
    sizes: tuple[int, ...] = ()
    numbers: tuple[float, ...] = ()
    packed: tuple[int, ...] = ()
    plain: bool = False
    together: tuple[int, ...] = ()
    unpadded: tuple[int, ...] = ()
    pixels: int = 1


Buffers = Mapping[str, Buffer]
Rule = Callable[[Instruction, Buffers, str | None], Native]  # the last: the extent of the group's rows
RULES: dict[str, Rule] = {}


def rule(*ops: str) -> Callable[[Rule], Rule]:
    """The native calls of all modes of these ops."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(ops, function))
        return function

    return register


@dataclass(frozen=True)
class Windows:
    """Of a max pooling, whose index buffer holds positions inside of a window."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    width: int  # of the image

    @property
    def item_bytes(self) -> int:
        return 4 if wide_index(self.kernel) else 1

    def flat(self, position: Tensor) -> Tensor:
        """[n, c, h, w] positions as indices into the image."""
        rows, columns = (torch.arange(n) * s - p for n, s, p in zip(position.shape[2:], self.stride, self.padding, strict=True))
        return (rows[:, None] + position // self.kernel[1]) * self.width + columns + position % self.kernel[1]


def windows(plan: Plan) -> dict[str, Windows]:
    """Of each index buffer."""
    out = {}
    for _, instr in plan.instructions():
        if instr.kernel in ("maxpool2d_fwd", "batchnorm_maxpool2d_fwd") and instr.outputs[1]:
            attrs = [instr.attrs[name] for name in ("kernel", "stride", "padding")]
            out[instr.outputs[1].buffer] = Windows(*attrs, plan.buffers[instr.inputs[0].buffer].shape[2])
    return out


def same_layout(instr: Instruction, buffers: Buffers) -> list[Operand]:
    """Operands of an elementwise instruction over whole arrays, which must share one memory layout."""
    if instr.kernel in ("sgd_fwd", "sgd_bwd"):
        rate = instr.inputs[-1]
        return [*instr.inputs[:-1], *instr.outputs, *([rate] if buffers[rate.buffer].shape else [])]
    if instr.kernel == "sgd_bwd_rate":
        return [*instr.inputs[:2], *(([instr.inputs[2], *instr.outputs]) if instr.attrs["per_element"] else [])]
    if instr.kernel == "axpy_fwd":
        return [instr.inputs[0], instr.inputs[1], *instr.outputs]
    if instr.kernel == "scale_fwd":
        return [instr.inputs[0], *instr.outputs]
    if instr.kernel in ("add_fwd", "add_jvp"):
        return one_shape([*instr.inputs, *instr.outputs], buffers)
    if instr.kernel == "copy_fwd" or instr.kernel.startswith("clip_value_"):
        return [*instr.inputs, *instr.outputs]
    if instr.kernel == "dot_fwd":
        return [*instr.inputs[:2]]
    return []


# ------------------------------------------------------------------------------------------------------------------- operands
def buffer_of(ref: Operand, buffers: Buffers) -> Buffer:
    return buffers[ref.buffer]


def one_shape(refs: list[Operand], buffers: Buffers) -> list[Operand]:
    """Those of them that are there, if they agree in shape, else none."""
    there = [ref for ref in refs if ref is not None]
    return there if len({buffer_of(ref, buffers).shape for ref in there}) == 1 else []


def width_of(ref: Operand, buffers: Buffers) -> int:
    return buffer_of(ref, buffers).numel


def is_image(buffer: Buffer) -> bool:
    """Rows of [c, h, w]: in memory [h][w][c padded]."""
    return buffer.rows is not None and len(buffer.shape) == 3


def is_flat(shape: tuple[int, ...]) -> bool:
    """Whether a sample lies in torch's order: an image's channels come last."""
    return len(shape) != 3 or shape[1] * shape[2] == 1


def channels_of(ref: Operand, buffers: Buffers) -> int:
    """What lies together, and is padded."""
    buffer = buffer_of(ref, buffers)
    return buffer.shape[0] if is_image(buffer) else buffer.numel


def pixels_of(ref: Operand, buffers: Buffers) -> int:
    buffer = buffer_of(ref, buffers)
    return buffer.shape[1] * buffer.shape[2] if is_image(buffer) else 1


def first_of(instr: Instruction) -> Operand:
    return next(ref for ref in (*instr.outputs, *instr.inputs) if ref is not None)


def has_rows(instr: Instruction, buffers: Buffers) -> bool:
    return buffer_of(first_of(instr), buffers).rows is not None


def image_shape(ref: Operand, buffers: Buffers, op: str) -> tuple[int, int, int]:
    shape = buffer_of(ref, buffers).shape
    if len(shape) != 3:
        raise NotImplementedError(f"{op} over samples of shape {list(shape)} has no native kernel yet")
    return shape


def wide_index(kernel: tuple[int, int]) -> bool:
    """Whether the positions in the windows of a maxpool2d need int32: there are more than a byte can tell apart."""
    return kernel[0] * kernel[1] > 256
