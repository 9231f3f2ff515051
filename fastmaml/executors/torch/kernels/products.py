"""linear, conv2d and factored first layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmaml.executors.torch.kernels.images import padded
from fastmaml.executors.torch.kernels.registry import Attrs, kernel, total


@kernel("linear_fwd")
def linear_fwd(task, attrs: Attrs, x, w, b):  # y = x w^T + b
    return F.linear(x, w, b)


@kernel("linear_jvp")
def linear_jvp(task, attrs: Attrs, x, w, xt, wt, bt):  # yt = xt w^T + x wt^T + bt
    yt = total(None if xt is None else F.linear(xt, w), None if wt is None else F.linear(x, wt))
    return bt.expand(*x.shape[:-1], -1) if yt is None else yt if bt is None else yt + bt


@kernel("linear_bwd_input")
def linear_bwd_input(task, attrs: Attrs, dy, w):  # dx = dy w
    return dy @ w


@kernel("linear_bwd_input_jvp")
def linear_bwd_input_jvp(task, attrs: Attrs, dy, w, dyt, wt):  # dxt = dyt w + dy wt
    return total(None if dyt is None else dyt @ w, None if wt is None else dy @ wt)


@kernel("linear_bwd_weight")
def linear_bwd_weight(task, attrs: Attrs, x, dy):  # dw = dy^T x, db = sum dy
    dy2 = dy.flatten(0, -2)
    return dy2.T @ x.flatten(0, -2), dy2.sum(0)


@kernel("linear_bwd_weight_jvp")
def linear_bwd_weight_jvp(task, attrs: Attrs, x, dy, xt, dyt):  # dwt = dyt^T x + dy^T xt, dbt = sum dyt
    first = (None, None) if dyt is None else linear_bwd_weight(task, attrs, x, dyt)
    return total(first[0], None if xt is None else linear_bwd_weight(task, attrs, xt, dy)[0]), first[1]


@kernel("gram_fwd")
def gram_fwd(task, attrs: Attrs, x, xs):  # G = x xs^T, in double: it is large where images share a mean, and D mostly cancels it
    return x.flatten(1).double() @ xs.flatten(1).double().T


@kernel("factored_linear_fwd")
def factored_linear_fwd(task, attrs: Attrs, base, gram, state, b):  # y = A + G D + b
    y = base + gram @ state.double()
    return (y if b is None else y + b).to(base.dtype)


@kernel("factored_linear_jvp")
def factored_linear_jvp(task, attrs: Attrs, direction, bt):
    return bt.expand(task.rows["support"], -1) if direction is None else direction + bt


@kernel("factored_linear_bwd", "factored_linear_bwd_jvp")
def factored_linear_bwd(task, attrs: Attrs, gram, dy):  # D_bar = G^T dy
    return (gram.T @ dy.double()).to(dy.dtype)


@kernel("row_sum_bwd", "row_sum_bwd_jvp")
def row_sum_bwd(task, attrs: Attrs, dy):  # db = sum dy
    return dy.sum(0)


@kernel("conv2d_fwd")
def conv2d_fwd(task, attrs: Attrs, x, w, b):  # y = x * w + b, zero padding (top, bottom, left, right)
    return F.conv2d(padded(x, attrs), w, b, attrs["stride"])


@kernel("conv2d_jvp")
def conv2d_jvp(task, attrs: Attrs, x, w, xt, wt, bt):  # yt = xt * w + x * wt + bt
    yt = total(
        None if xt is None else conv2d_fwd(task, attrs, xt, w, None),
        None if wt is None else conv2d_fwd(task, attrs, x, wt, None),
    )
    if yt is None:
        return torch.zeros_like(conv2d_fwd(task, attrs, x, w, None)) + bt[:, None, None]
    return yt if bt is None else yt + bt[:, None, None]


def _conv2d_bwd_input(attrs: Attrs, dy: Tensor, w: Tensor) -> Tensor:
    top, bottom, left, right = attrs["padding"]
    h, wd = attrs["input_shape"][1:]
    shape = (len(dy), w.shape[1], h + top + bottom, wd + left + right)
    dx = torch.nn.grad.conv2d_input(shape, w, dy, attrs["stride"])
    return dx[:, :, top : top + h, left : left + wd]


@kernel("conv2d_bwd_input")
def conv2d_bwd_input(task, attrs: Attrs, dy, w):  # the transposed convolution of dy with w
    return _conv2d_bwd_input(attrs, dy, w)


@kernel("conv2d_bwd_input_jvp")
def conv2d_bwd_input_jvp(task, attrs: Attrs, dy, w, dyt, wt):
    return total(
        None if dyt is None else _conv2d_bwd_input(attrs, dyt, w), None if wt is None else _conv2d_bwd_input(attrs, dy, wt)
    )


@kernel("conv2d_bwd_weight")
def conv2d_bwd_weight(task, attrs: Attrs, x, dy):  # dw[o, i] = sum over samples and pixels of dy[o] x[i] shifted by the tap
    dw = torch.nn.grad.conv2d_weight(padded(x, attrs), attrs["weight_shape"], dy, attrs["stride"])
    return dw, dy.sum((0, 2, 3))


@kernel("conv2d_bwd_weight_jvp")
def conv2d_bwd_weight_jvp(task, attrs: Attrs, x, dy, xt, dyt):
    first = (None, None) if dyt is None else conv2d_bwd_weight(task, attrs, x, dyt)
    return total(first[0], None if xt is None else conv2d_bwd_weight(task, attrs, xt, dy)[0]), first[1]
