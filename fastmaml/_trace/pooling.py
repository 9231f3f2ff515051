"""Trace rules for pooling and means over the image."""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Any

from fastmaml._trace.rules import Refusal, dims_of, pair_of, rows_of, rule
from fastmaml._trace.shapes import reshaped, without_reshape

if TYPE_CHECKING:
    from fastmaml._trace.recorder import Recorder


def _windows(
    r: Recorder, x: int, kernel_size: Any, stride: Any, padding: Any, ceil_mode: bool
) -> dict[str, tuple[int, int]]:
    if ceil_mode:
        raise Refusal("ceil_mode=True is not supported")
    if len(r.shape(x)) != 3:
        raise Refusal(f"2d pooling of samples {list(r.shape(x))}, not [c, h, w]")
    kernel, pads = pair_of(kernel_size), pair_of(padding)
    if any(2 * p > k for p, k in zip(pads, kernel, strict=True)):
        raise Refusal(f"pooling with padding {pads}, more than half the kernel {kernel}")
    return {"kernel": kernel, "stride": pair_of(stride) if stride not in (None, [], ()) else kernel, "padding": pads}


@rule("max_pool2d")
def max_pool2d(
    r: Recorder,
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> int:
    if pair_of(dilation) != (1, 1):
        raise Refusal(f"dilation={dilation} is not supported")
    if return_indices:
        raise Refusal("return_indices is not supported")
    x = rows_of(r, input, "max_pool2d")
    return r.op("maxpool2d", x, **_windows(r, x, kernel_size, stride, padding, ceil_mode))


@rule("avg_pool2d")
def avg_pool2d(
    r: Recorder,
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> int:
    if divisor_override is not None:
        raise Refusal("divisor_override is not supported")
    x = rows_of(r, input, "avg_pool2d")
    return r.op(
        "avgpool2d",
        x,
        **_windows(r, x, kernel_size, stride, padding, ceil_mode),
        count_include_pad=bool(count_include_pad),
    )


def _average(r: Recorder, x: int, kernel: tuple[int, int]) -> int:
    """Plain averages over windows that tile the image."""
    return r.op("avgpool2d", x, kernel=kernel, stride=kernel, padding=(0, 0), count_include_pad=True)


@rule("adaptive_avg_pool2d")
def adaptive_avg_pool2d(r: Recorder, input: Any, output_size: Any) -> int:
    x = rows_of(r, input, "adaptive_avg_pool2d")
    if len(r.shape(x)) != 3:
        raise Refusal(f"2d pooling of samples {list(r.shape(x))}, not [c, h, w]")
    c, h, w = r.shape(x)
    wanted = output_size if isinstance(output_size, (tuple, list)) else (output_size, output_size)
    out = tuple(size if want is None else operator.index(want) for want, size in zip(wanted, (h, w), strict=True))
    if out == (1, 1):
        return reshaped(r, r.op("global_avgpool2d", x), (r.samples, c, 1, 1))
    if out == (h, w):
        return x
    if h % out[0] or w % out[1]:
        raise Refusal(f"AdaptiveAvgPool2d from {h}x{w} to {out[0]}x{out[1]}: the windows are unequal")
    return _average(r, x, (h // out[0], w // out[1]))


@rule("mean")
def mean(
    r: Recorder, input: Any, dim: Any = None, keepdim: bool = False, *, axis: Any = None, keepdims: bool = False
) -> int:
    """Over trailing axes of the sample, or over H or W alone (``x.mean(3).mean(2)``)."""
    x = rows_of(r, input, "mean")
    full = r.full_shape(x)
    axes = axis if dim is None else dim
    dims = list(range(len(full))) if axes in (None, (), []) else dims_of(axes, len(full))
    if 0 in dims:
        raise Refusal("a mean over the samples")
    if not (dims == list(range(dims[0], len(full))) or (len(full) == 4 and dims == [2])):
        raise Refusal(f"mean over axes {dims} of {len(full)}: only trailing axes, or H and W, are supported")
    kept = [1 if i in dims else size for i, size in enumerate(full)]
    if not (keepdim or keepdims):
        kept = [size for i, size in enumerate(full) if i not in dims]
    return reshaped(r, _mean_value(r, x, dims), tuple(kept))


def _mean_value(r: Recorder, x: int, dims: list[int]) -> int:
    shape = r.shape(x)
    if len(shape) == 3 and len(dims) == 1 and dims[0] > 1:
        return _average(r, x, (shape[1], 1) if dims == [2] else (1, shape[2]))
    if len(shape) == 2 and dims == [2]:
        image = _averaged_image(r, x)
        if image is not None:
            return r.op("global_avgpool2d", image)
    if not (len(shape) == 3 and dims == [2, 3]):
        lead = math.prod(shape[: dims[0] - 1])
        x = reshaped(r, x, (r.samples, lead, math.prod(shape[dims[0] - 1 :]), 1))
    return r.op("global_avgpool2d", x)


def _averaged_image(r: Recorder, x: int) -> int | None:
    """The image [c, h, w] of which ``x`` [c, h] or [c, w] is the mean over one axis, if it is such a mean."""
    made = r.producer(without_reshape(r, x))
    if made is None or made.name != "avgpool2d" or made.attrs["kernel"] != made.attrs["stride"]:
        return None
    c, h, w = r.shape(made.inputs[0])
    kept = {(1, w): (c, h), (h, 1): (c, w)}.get(made.attrs["kernel"])
    return made.inputs[0] if kept == r.shape(x) else None
