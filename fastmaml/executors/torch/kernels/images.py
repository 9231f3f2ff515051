"""Pooling, padding, reshapes, and the rows of support and query."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmaml.executors.torch.kernels.registry import Attrs, kernel


def padded(x: Tensor, attrs: Attrs) -> Tensor:
    top, bottom, left, right = attrs["padding"]
    return F.pad(x, (left, right, top, bottom))


def pool(attrs: Attrs) -> tuple[Any, Any, Any]:
    return attrs["kernel"], attrs["stride"], attrs["padding"]


@kernel("maxpool2d_fwd")
def maxpool2d_fwd(task, attrs: Attrs, x):  # also the index (h * w) of the first maximum of each window
    return F.max_pool2d(x, *pool(attrs), return_indices=True)


@kernel("maxpool2d_replay")
def maxpool2d_replay(task, attrs: Attrs, x, index):
    return x.flatten(2).gather(2, index.flatten(2)).view(index.shape)


@kernel("maxpool2d_jvp")
def maxpool2d_jvp(task, attrs: Attrs, xt, index):
    return maxpool2d_replay(task, attrs, xt, index)


@kernel("maxpool2d_bwd", "maxpool2d_bwd_jvp")
def maxpool2d_bwd(task, attrs: Attrs, dy, index):
    c, h, w = attrs["input_shape"]
    return dy.new_zeros(len(dy), c, h * w).scatter_add_(2, index.flatten(2), dy.flatten(2)).view(-1, c, h, w)


@kernel("avgpool2d_fwd", "avgpool2d_jvp")
def avgpool2d_fwd(task, attrs: Attrs, x):
    return F.avg_pool2d(x, *pool(attrs), count_include_pad=attrs["count_include_pad"])


@kernel("avgpool2d_bwd", "avgpool2d_bwd_jvp")
def avgpool2d_bwd(task, attrs: Attrs, dy):  # every element of a window gets its share of dy
    (kh, kw), (sh, sw), (ph, pw) = pool(attrs)
    c, h, w = attrs["input_shape"]
    share = dy / (kh * kw)
    if not attrs["count_include_pad"]:
        ones = F.avg_pool2d(dy.new_ones(1, 1, h, w), *pool(attrs))  # torch divides by kh kw here: the share that is inside
        share = share / ones
    taps = share.new_ones(c, 1, kh, kw)
    dx = torch.nn.grad.conv2d_input((len(dy), c, h + 2 * ph, w + 2 * pw), taps, share.contiguous(), (sh, sw), groups=c)
    return dx[:, :, ph : ph + h, pw : pw + w]


@kernel("global_avgpool2d_fwd", "global_avgpool2d_jvp")
def global_avgpool2d_fwd(task, attrs: Attrs, x):  # mean over h and w
    return x.mean((2, 3))


@kernel("global_avgpool2d_bwd", "global_avgpool2d_bwd_jvp")
def global_avgpool2d_bwd(task, attrs: Attrs, dy):
    c, h, w = attrs["input_shape"]
    return (dy / (h * w))[:, :, None, None].expand(-1, c, h, w)


@kernel("pad2d_fwd", "pad2d_jvp")
def pad2d_fwd(task, attrs: Attrs, x):
    return padded(x, attrs)


@kernel("pad2d_bwd", "pad2d_bwd_jvp")
def pad2d_bwd(task, attrs: Attrs, dy):
    top, _, left, _ = attrs["padding"]
    _, h, w = attrs["input_shape"]
    return dy[:, :, top : top + h, left : left + w]


@kernel("reshape_fwd", "reshape_jvp")
def reshape_fwd(task, attrs: Attrs, x):
    return x.reshape(-1, *attrs["shape"]) if attrs["rows"] else x.reshape(attrs["shape"])


@kernel("reshape_bwd", "reshape_bwd_jvp")
def reshape_bwd(task, attrs: Attrs, dy):
    return dy.reshape(-1, *attrs["input_shape"]) if attrs["rows"] else dy.reshape(attrs["input_shape"])


@kernel("join_rows_fwd")
def join_rows_fwd(task, attrs: Attrs, support, query):
    return torch.cat([support, query])


@kernel("support_rows_fwd")
def support_rows_fwd(task, attrs: Attrs, joint):  # the first n_support rows
    return joint[: task.rows["support"]]


@kernel("query_rows_fwd")
def query_rows_fwd(task, attrs: Attrs, joint):  # the last n_query rows
    return joint[task.rows["support"] :]


@kernel("query_rows_bwd")
def query_rows_bwd(task, attrs: Attrs, dy):
    return torch.cat([dy.new_zeros(task.rows["support"], *dy.shape[1:]), dy])
