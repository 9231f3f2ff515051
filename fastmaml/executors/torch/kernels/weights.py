"""Sums and products: residual adds, and expressions of weights."""

from __future__ import annotations

from torch import Tensor

from fastmaml.executors.torch.kernels.registry import Attrs, kernel, times, total


@kernel("add_fwd", "add_jvp")
def add_fwd(task, attrs: Attrs, x, y):
    return total(x, y).expand(attrs["shape"]) if "shape" in attrs and (x is None or y is None) else total(x, y)


def _sum_to(v: Tensor, shape: tuple[int, ...]) -> Tensor:
    return v.sum_to_size(shape) if tuple(v.shape) != tuple(shape) else v


@kernel("add_bwd", "add_bwd_jvp")
def add_bwd(task, attrs: Attrs, dz):  # broadcast axes are summed
    return _sum_to(dz, attrs["input_shape"])


@kernel("mul_fwd")
def mul_fwd(task, attrs: Attrs, x, y):
    return x * y


@kernel("mul_jvp")
def mul_jvp(task, attrs: Attrs, x, y, xt, yt):
    return total(times(xt, y), times(x, yt))


@kernel("mul_bwd")
def mul_bwd(task, attrs: Attrs, x, y, dz):
    mine, other = (x, y) if attrs["operand"] == 0 else (y, x)
    return _sum_to(dz * other, mine.shape)


@kernel("mul_bwd_jvp")
def mul_bwd_jvp(task, attrs: Attrs, x, y, dz, other_t, dzt):
    mine, other = (x, y) if attrs["operand"] == 0 else (y, x)
    return _sum_to(total(times(dzt, other), times(dz, other_t)), mine.shape)


@kernel("matmul_fwd")
def matmul_fwd(task, attrs: Attrs, x, y):
    return x @ y


@kernel("matmul_jvp")
def matmul_jvp(task, attrs: Attrs, x, y, xt, yt):
    return total(None if xt is None else xt @ y, None if yt is None else x @ yt)


@kernel("matmul_bwd")
def matmul_bwd(task, attrs: Attrs, x, y, dz):
    return dz @ y.T if attrs["operand"] == 0 else x.T @ dz


@kernel("matmul_bwd_jvp")
def matmul_bwd_jvp(task, attrs: Attrs, x, y, dz, other_t, dzt):
    if attrs["operand"] == 0:
        return total(None if dzt is None else dzt @ y.T, None if other_t is None else dz @ other_t.T)
    return total(None if dzt is None else x.T @ dzt, None if other_t is None else other_t.T @ dz)


@kernel("transpose_fwd", "transpose_jvp", "transpose_bwd", "transpose_bwd_jvp")
def transpose_fwd(task, attrs: Attrs, x):
    return x.T


@kernel("slice_fwd", "slice_jvp")
def slice_fwd(task, attrs: Attrs, x):
    return x.narrow(attrs["dim"], attrs["start"], attrs["stop"] - attrs["start"])


@kernel("slice_bwd", "slice_bwd_jvp")
def slice_bwd(task, attrs: Attrs, dz):
    dx = dz.new_zeros(attrs["input_shape"])
    dx.narrow(attrs["dim"], attrs["start"], attrs["stop"] - attrs["start"]).copy_(dz)
    return dx
