"""Instructions to native kernels: which function of ``csrc/include/fastmaml/kernels.h`` runs an instruction, with which operands and sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmaml.plan.instructions import Buffer, Instruction, Operand, Plan

LANE, NARROW = 16, 8  # floats, outputs; as in csrc/include/fastmaml/plan.h
BASES = (None,) * 4  # base, scale, bbase, bscale: where a weight gradient is not added to anything
MOST_TAPS, MOST_TAPS_IN_A_ROW = 2048, 96  # of a convolution: what a strip and the weights of a row of taps have room for
PLANES = "planes"  # kind of an image that lies as the caller has it: [c, h, w]
SMOOTH = ("tanh", "sigmoid", "exp", "elu", "gelu", "silu", "softplus")
MOST_PATCH = 160  # kMostPatch in csrc/cpu/kernels/patch_stats.cpp
MAX_NORM_CHANNELS = 8192  # kMaxNormChannels in csrc/cpu/kernels/rownorm.h


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


def native(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    """The native call of an instruction. Raises NotImplementedError, saying what, where there is no kernel."""
    op = instr.kernel.rsplit("_", 1)[0]
    for stem in sorted(_TABLE, key=len, reverse=True):
        if instr.kernel.startswith(stem + "_"):
            op = stem
            break
    if op not in _TABLE:
        raise NotImplementedError(f"{instr.kernel} has no native kernel yet")
    return _TABLE[op](instr, buffers, extent)


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
        return _one_shape([*instr.inputs, *instr.outputs], buffers)
    if instr.kernel == "copy_fwd" or instr.kernel.startswith("clip_value_"):
        return [*instr.inputs, *instr.outputs]
    if instr.kernel == "dot_fwd":
        return [*instr.inputs[:2]]
    return []


# ------------------------------------------------------------------------------------------------------------------- helpers
def _buffer(ref: Operand, buffers: Buffers) -> Buffer:
    return buffers[ref.buffer]


def _one_shape(refs: list[Operand], buffers: Buffers) -> list[Operand]:
    """Those of them that are there, if they agree in shape, else none."""
    there = [ref for ref in refs if ref is not None]
    return there if len({_buffer(ref, buffers).shape for ref in there}) == 1 else []


def _width(ref: Operand, buffers: Buffers) -> int:
    return _buffer(ref, buffers).numel


def pad_lane(n: int) -> int:
    return -(-n // LANE) * LANE


def is_image(buffer: Buffer) -> bool:
    """Rows of [c, h, w]: in memory [h][w][c padded]."""
    return buffer.rows is not None and len(buffer.shape) == 3


def _channels(ref: Operand, buffers: Buffers) -> int:
    """What lies together, and is padded."""
    buffer = _buffer(ref, buffers)
    return buffer.shape[0] if is_image(buffer) else buffer.numel


def _pixels(ref: Operand, buffers: Buffers) -> int:
    buffer = _buffer(ref, buffers)
    return buffer.shape[1] * buffer.shape[2] if is_image(buffer) else 1


def _first(instr: Instruction) -> Operand:
    return next(ref for ref in (*instr.outputs, *instr.inputs) if ref is not None)


def _linear(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
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
    if len(_buffer(x, buffers).shape) != 1:
        raise NotImplementedError(f"linear over samples of shape {list(_buffer(x, buffers).shape)} has no native kernel yet")
    return Native(instr.kernel, refs, (_width(x, buffers), _width(y, buffers)), packed=packed, unpadded=unpadded)


def _conv2d(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    mode = instr.kernel.removeprefix("conv2d_")
    ins, outs = instr.inputs, instr.outputs
    refs, attrs = (*ins, *outs), instr.attrs
    packed = {"fwd": (1,), "jvp": (1, 3), "bwd_input": (1,), "bwd_input_jvp": (1, 3), "bwd_weight": (2,), "bwd_weight_jvp": (4,)}[mode]
    unpadded: tuple[int, ...] = ()
    if mode in ("fwd", "jvp"):
        x, w, y, unpadded = _buffer(ins[0], buffers).shape, _buffer(ins[1], buffers).shape, _buffer(outs[0], buffers).shape, (0,)
    else:
        x, w = attrs["input_shape"], attrs.get("weight_shape") or _buffer(ins[1], buffers).shape
        slots = {"bwd_input": (0,), "bwd_input_jvp": (0, 2), "bwd_weight": (1,), "bwd_weight_jvp": (1, 3)}[mode]
        y = next(_buffer(ins[i], buffers).shape for i in slots if ins[i])
        unpadded = (0,) if "weight" in mode else ()
    taps_h, taps_w = w[2:]
    if taps_h * taps_w > MOST_TAPS or taps_w > MOST_TAPS_IN_A_ROW:
        raise NotImplementedError(f"conv2d with a kernel of {taps_h} x {taps_w} has no native kernel")
    (top, _, left, _), planes = attrs["padding"], int(ins[0] is not None and _buffer(ins[0], buffers).kind == PLANES)
    sizes = (*x, w[0], taps_h, taps_w, *attrs["stride"], top, left, *y[1:], planes)
    refs = refs if "weight" in mode else (*refs, None)  # no activation's mask
    return Native(instr.kernel, refs, sizes, packed=packed, unpadded=unpadded)


def _patch_moments(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    x, attrs = _buffer(instr.inputs[0], buffers), instr.attrs
    channels, *kernel = attrs["patch"]
    if (size := channels * kernel[0] * kernel[1]) > MOST_PATCH:
        raise NotImplementedError(f"the moments of patches of {size} numbers have no native kernel, only of {MOST_PATCH}")
    top, _, left, _ = attrs["padding"]
    sizes = (*x.shape, 0, *kernel, *attrs["stride"], top, left, *attrs["pixels"], int(x.kind == PLANES))
    return Native(instr.kernel, (*instr.inputs, *instr.outputs), sizes, unpadded=(0,))


def _patch_stats(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    outputs, channels, h, w = _buffer(instr.inputs[1], buffers).shape
    packed = {"fwd": (1,), "jvp": (1, 3), "bwd": (1, 6), "bwd_jvp": (1, 6, 11)}[instr.kernel.removeprefix("patch_stats_")]
    numbers = (instr.attrs["eps"],) if "eps" in instr.attrs else ()
    return Native(instr.kernel, (*instr.inputs, *instr.outputs), (channels, h * w, outputs), numbers, packed=packed)


def _batchnorm(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    x = instr.inputs[0]
    rows = instr.attrs["stat_rows"]
    stat = 0 if rows is None else -1 if rows == extent else -2
    pixels = _pixels(x, buffers)
    sizes = (_channels(x, buffers), stat, pixels)
    refs = (*instr.inputs, *instr.outputs)
    if "stats" in instr.kernel or "running" in instr.kernel:
        return Native(instr.kernel, refs, sizes, (instr.attrs["eps"],), pixels=pixels)
    return Native(instr.kernel, (*refs, None), sizes, pixels=pixels)


def _batchnorm_maxpool2d(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    image = _image(instr.inputs[0], buffers, "batchnorm_maxpool2d")
    a, rows = instr.attrs, instr.attrs.get("stat_rows")
    stat = 0 if rows is None else -1 if rows == extent else -2
    sizes = (*image, *a["kernel"], *a["stride"], *a["padding"], int(wide_index(a["kernel"])), stat)
    return Native(instr.kernel, (*instr.inputs, *instr.outputs), sizes)


def _rownorm(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    """layernorm and groupnorm are one kernel: see csrc/cpu/kernels/rownorm.h for slabs, groups and the affine's shape."""
    op, _, mode = instr.kernel.partition("_")
    shape, attrs = _buffer(instr.inputs[0], buffers).shape, instr.attrs
    if len(shape) not in (1, 3):
        raise NotImplementedError(f"{op} over samples of shape {list(shape)} has no native kernel yet")
    if shape[0] > MAX_NORM_CHANNELS:
        raise NotImplementedError(f"{op} over {shape[0]} channels has no native kernel, only over {MAX_NORM_CHANNELS}")
    c, h, w = (*shape, 1, 1)[:3]
    slabs, groups, affine = 1, attrs.get("groups", 1), 0
    if len(shape) == 3 and op == "layernorm":
        slabs, groups, affine = {1: (h, c, 1), 2: (1, c, 1), 3: (1, 1, 2)}[attrs["dims"]]
    sizes = (c, h * w // slabs, slabs, groups, affine)
    return Native(f"layernorm_{mode}", (*instr.inputs, *instr.outputs), sizes, (attrs["eps"],), plain=affine > 0)


def _relu(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    mode = instr.kernel.removeprefix("leaky_").removeprefix("relu_")
    kernel = {"fwd": "relu_fwd", "replay": "relu_replay"}.get(mode, "relu_bwd")
    refs = (*instr.inputs, *instr.outputs)
    first = _first(instr)
    return Native(kernel, refs, (_channels(first, buffers),), (instr.attrs.get("slope", 0.0),), pixels=_pixels(first, buffers))


def _smooth(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    refs, attrs = (*instr.inputs, *instr.outputs), instr.attrs
    numbers = {"elu": ("alpha",), "softplus": ("beta", "threshold")}.get(instr.kernel.split("_")[0], ())
    first = _first(instr)
    sizes = (_channels(first, buffers), int(attrs.get("approximate") == "tanh"))
    numbers = tuple(float(attrs[n]) for n in numbers)
    return Native(instr.kernel, refs, sizes, numbers, plain=_buffer(first, buffers).rows is None, pixels=_pixels(first, buffers))


# ------------------------------------------------------------------------------------------------------------------- images
def _image(ref: Operand, buffers: Buffers, op: str) -> tuple[int, int, int]:
    shape = _buffer(ref, buffers).shape
    if len(shape) != 3:
        raise NotImplementedError(f"{op} over samples of shape {list(shape)} has no native kernel yet")
    return shape


def _pool(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    """Windows: the sizes are those of the image that is pooled, which the reverse writes."""
    op, _, mode = instr.kernel.partition("_")
    back, a = mode.startswith("bwd"), instr.attrs
    image = _image(instr.outputs[0] if back else instr.inputs[0], buffers, op)
    if op == "maxpool2d":
        mode, flag = {"fwd": "fwd", "replay": "replay", "jvp": "replay"}.get(mode, "bwd"), wide_index(a["kernel"])
    else:
        mode, flag = "bwd" if back else "fwd", a["count_include_pad"]
    sizes = (*image, *a["kernel"], *a["stride"], *a["padding"], int(flag))
    return Native(f"{op}_{mode}", (*instr.inputs, *instr.outputs), sizes)


def wide_index(kernel: tuple[int, int]) -> bool:
    """Whether the positions in the windows of a maxpool2d need int32: there are more than a byte can tell apart."""
    return kernel[0] * kernel[1] > 256


def _global_avgpool2d(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    mode = "bwd" if "_bwd" in instr.kernel else "fwd"
    image = _image(instr.outputs[0] if mode == "bwd" else instr.inputs[0], buffers, "global_avgpool2d")
    return Native(f"global_avgpool2d_{mode}", (*instr.inputs, *instr.outputs), image)


def _pad2d(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    sign = -1 if "_bwd" in instr.kernel else 1  # what was padded is cropped
    sizes = (*_image(instr.inputs[0], buffers, "pad2d"), *(sign * p for p in instr.attrs["padding"]))
    return Native("pad2d_fwd", (*instr.inputs, *instr.outputs), sizes)


# ------------------------------------------------------------------------------------------------------------------- losses, rows
def _loss(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    reduction = instr.attrs["reduction"]
    code = {"mean": 0, "sum": 1}.get(reduction, 2)
    numbers = (float(instr.attrs.get("label_smoothing", 0.0)), 1.0 if code < 2 else float(reduction))
    return Native(
        instr.kernel, (*instr.inputs, *instr.outputs), (_width(instr.inputs[0], buffers), code), numbers, unpadded=(1,)
    )


def _rows(instr: Instruction, buffers: Buffers) -> bool:
    return _buffer(_first(instr), buffers).rows is not None


def _sgd(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    if _buffer(instr.inputs[0], buffers).rows:
        return _sgd_rows(instr, buffers)
    per_element = instr.attrs.get("per_element", False)
    if instr.kernel != "sgd_bwd_rate":
        per_element = _buffer(instr.inputs[-1], buffers).shape != () and _buffer(instr.inputs[0], buffers).shape != ()
    return Native(instr.kernel, (*instr.inputs, *instr.outputs), (_width(instr.inputs[0], buffers), int(per_element)))


def _sgd_rows(instr: Instruction, buffers: Buffers) -> Native:
    """A factor's state: rows of the support set."""
    refs, width = (*instr.inputs, *instr.outputs), _width(instr.inputs[0], buffers)
    if instr.kernel == "sgd_bwd_rate":
        return Native("sgd_bwd_rate", refs, (width, 0, 1))
    return Native(instr.kernel.replace("sgd_", "sgd_rows_"), refs, (width,))


def _clip_value(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    return Native(instr.kernel, (*instr.inputs, *instr.outputs), (_width(instr.inputs[0], buffers),), (instr.attrs["bound"],))


def _clip_norm(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    return Native(instr.kernel, (*instr.inputs, *instr.outputs), (), (instr.attrs["max_norm"],))


def _ratio(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    return Native(instr.kernel, (*instr.inputs, *instr.outputs))


def _dot(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    return Native(instr.kernel, (*instr.inputs, *instr.outputs), (_width(instr.inputs[0], buffers),))


def _factored(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    refs = (*instr.inputs, *instr.outputs)
    rows = {"support": 1, "query": 2, "joint": 3}
    if instr.kernel == "gram_fwd":
        x, _, g = refs
        return Native("gram_fwd", refs, (_width(x, buffers), rows[buffers[g.buffer].rows]), unpadded=(0, 1))
    width = _width(instr.outputs[0], buffers)
    kernel = instr.kernel.removesuffix("_jvp") if "bwd" in instr.kernel else instr.kernel
    return Native(kernel, refs, (width, rows[buffers[refs[0].buffer].rows] if refs[0] else 1))


def _row_sum(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    return Native("row_sum_bwd", (*instr.inputs, *instr.outputs), (0, _width(instr.outputs[0], buffers)))


def _array(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    """axpy, scale, zero, copy: over whole arrays, or row by row."""
    refs, out = (*instr.inputs, *instr.outputs), instr.outputs[0]
    numbers = (instr.attrs["sign"],) if "sign" in instr.attrs else ()
    if not _rows(instr, buffers):
        return Native(instr.kernel, refs, (_width(out, buffers),), numbers)
    stem, pixels = instr.kernel.removesuffix("_fwd"), _pixels(out, buffers)
    return Native(f"{stem}_rows_fwd", refs, (_channels(out, buffers),), numbers, unpadded=(0, 1) if stem == "copy" and pixels == 1 else (), pixels=pixels)


def _move(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    refs, out = (*instr.inputs, *instr.outputs), instr.outputs[0]
    if is_image(buffers[out.buffer]) and instr.kernel in ("support_rows_fwd", "query_rows_fwd"):
        raise NotImplementedError("features that are images, of which batchnorm='joint' takes the support rows, have no native kernel yet")
    return Native(instr.kernel, refs, (_width(out, buffers),), unpadded=(0, 1, 2) if instr.kernel == "join_rows_fwd" else (0,))


# ------------------------------------------------------------------------------------------------------------------- expressions
def _axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) > 4:
        raise NotImplementedError(f"a weight expression over {len(shape)} axes has no native kernel yet")
    return (1,) * (4 - len(shape)) + tuple(shape)


def _bits(shape: tuple[int, ...], whole: tuple[int, ...]) -> int:
    """Axes on which ``shape`` is broadcast to ``whole``."""
    return sum(1 << a for a, (p, q) in enumerate(zip(_axes(shape), _axes(whole), strict=True)) if p == 1 and q != 1)


def _expression(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    """add and mul of weights (broadcasting), add of rows."""
    op, _, mode = instr.kernel.partition("_")
    shape = lambda ref: buffers[ref.buffer].shape  # noqa: E731
    if op == "add" and mode in ("fwd", "jvp"):
        (x, y), z = instr.inputs, instr.outputs[0]
        if _rows(instr, buffers):
            return Native("add_rows_fwd", (x, y, z), (_channels(z, buffers),), pixels=_pixels(z, buffers))
        if _one_shape([x, y, z], buffers):
            return Native("add_fwd", (x, y, z), (_width(z, buffers),))
        bits = [0 if ref is None else _bits(shape(ref), shape(z)) for ref in (x, y)]
        return Native("add_expr_fwd", (x, y, z), (*_axes(shape(z)), *bits), plain=True)
    if op == "add":
        dz, dx = instr.inputs[0], instr.outputs[0]
        return Native("sum_expr", (dz, None, None, None, dx), (*_axes(shape(dz)), _bits(shape(dx), shape(dz)), 0), plain=True)
    x, y = instr.inputs[:2]
    whole = tuple(max(p, q) for p, q in zip(_axes(shape(x)), _axes(shape(y)), strict=True))
    kernels = whole in (shape(x), shape(y)) and {shape(x), shape(y)} <= {whole, (*whole[:2], 1, 1)}  # a factor for each kernel of a convolution
    together = (0, 1, 2, 3, 4) if kernels else ()
    if mode in ("fwd", "jvp"):
        sizes = (*whole, _bits(shape(x), whole), _bits(shape(y), whole))
        return Native(f"mul_expr_{mode}", (*instr.inputs, *instr.outputs), sizes, plain=True, together=together[: len(instr.inputs) + 1])
    mine, other = (x, y) if instr.attrs["operand"] == 0 else (y, x)
    sizes = (*whole, _bits(shape(mine), whole), _bits(shape(other), whole))
    if mode == "bwd":
        terms = (instr.inputs[2], other, None, None)
    else:
        dz, other_t, dzt = instr.inputs[2:]
        terms = (*((dzt, other) if dzt else (None, None)), *((dz, other_t) if other_t else (None, None)))
    return Native("sum_expr", (*terms, instr.outputs[0]), sizes, plain=True, together=together)


def _matmul(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    """``together``: what has the columns of the product."""
    mode, z = instr.kernel.removeprefix("matmul_"), instr.outputs[0]
    x, y, *rest = instr.inputs
    (m, k), n = buffers[x.buffer].shape, buffers[y.buffer].shape[1]
    right, both = (1, 3, 4), (0, 1, 2, 3)
    if mode == "fwd":
        return Native("matmul_fwd", (x, y, None, None, z), (m, n, k, 0), plain=True, together=right)
    if mode == "jvp":
        return Native("matmul_fwd", (rest[0], y, x, rest[1], z), (m, n, k, 0), plain=True, together=right)
    dz, other_t, dzt = (rest[0], None, rest[0]) if mode == "bwd" else rest
    if instr.attrs["operand"] == 0:
        return Native("matmul_fwd", (dzt, y, dz if other_t else None, other_t, z), (m, k, n, 2), plain=True, together=both)
    return Native("matmul_fwd", (x, dzt, other_t, dz if other_t else None, z), (k, n, m, 1), plain=True, together=right)


def _transpose(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    x, y = instr.inputs[0], instr.outputs[0]
    return Native("transpose_fwd", (x, y), buffers[x.buffer].shape, plain=True)


def _slice(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    a, (x,), (y,) = instr.attrs, instr.inputs, instr.outputs
    if buffers[y.buffer].rows:
        raise NotImplementedError("a slice of samples has no native kernel yet")
    shape, dim = a["input_shape"], a["dim"]
    outer = inner = 1
    for s in shape[:dim]:
        outer *= s
    for s in shape[dim + 1 :]:
        inner *= s
    kernel = "slice_bwd" if "bwd" in instr.kernel else "slice_fwd"
    return Native(kernel, (x, y), (outer, shape[dim], a["start"], a["stop"] - a["start"], inner), plain=True)


def _reshape(instr: Instruction, buffers: Buffers, extent: str | None) -> Native:
    """Rows keep their memory; the lowering makes them aliases where it may, this copies."""
    x, y = instr.inputs[0], instr.outputs[0]
    if not buffers[y.buffer].rows:
        return Native("copy_fwd", (x, y), (_width(y, buffers),))
    a, b = buffers[x.buffer].shape, buffers[y.buffer].shape
    if is_flat(a) and is_flat(b):
        return Native("copy_rows_fwd", (x, y), (_width(y, buffers),), unpadded=(0, 1))
    if is_flat(b):
        return Native("flatten_image_fwd", (x, y), a)
    if is_flat(a):
        return Native("unflatten_image_fwd", (x, y), b, unpadded=(0,))
    return Native("reshape_image_fwd", (x, y), (*a, *b))


def is_flat(shape: tuple[int, ...]) -> bool:
    """Whether a sample lies in torch's order: an image's channels come last."""
    return len(shape) != 3 or shape[1] * shape[2] == 1


_TABLE: dict[str, Callable[[Instruction, Buffers, str | None], Native]] = {
    "linear": _linear,
    "conv2d": _conv2d,
    "patch_moments": _patch_moments,
    "patch_stats": _patch_stats,
    "gram": _factored,
    "factored_linear": _factored,
    "row_sum": _row_sum,
    "batchnorm": _batchnorm,
    "batchnorm_maxpool2d": _batchnorm_maxpool2d,
    "layernorm": _rownorm,
    "groupnorm": _rownorm,
    "relu": _relu,
    "leaky_relu": _relu,
    **{name: _smooth for name in SMOOTH},
    "maxpool2d": _pool,
    "avgpool2d": _pool,
    "global_avgpool2d": _global_avgpool2d,
    "pad2d": _pad2d,
    "cross_entropy": _loss,
    "mse": _loss,
    "sgd": _sgd,
    "clip_value": _clip_value,
    "clip_norm": _clip_norm,
    "dot": _dot,
    "ratio": _ratio,
    **{name: _array for name in ("axpy", "scale", "zero", "copy")},
    "join_rows": _move,
    "support_rows": _move,
    "query_rows": _move,
    "add": _expression,
    "mul": _expression,
    "matmul": _matmul,
    "transpose": _transpose,
    "slice": _slice,
    "reshape": _reshape,
}
