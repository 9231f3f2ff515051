"""Activations, smooth and piecewise linear."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmaml.executors.torch.kernels.registry import Attrs, kernel, times, total


def _gelu(x: Tensor, approximate: str) -> tuple[Tensor, Tensor, Tensor]:
    if approximate == "none":
        cdf, pdf = 0.5 * (1 + torch.erf(x * 0.5**0.5)), torch.exp(-0.5 * x * x) * (2 * torch.pi) ** -0.5
        return x * cdf, cdf + x * pdf, (2 - x * x) * pdf
    a, c = (2 / torch.pi) ** 0.5, 0.044715
    t = torch.tanh(a * (x + c * x**3))
    du, ddu = a * (1 + 3 * c * x * x), a * 6 * c * x
    dt, ddt = (1 - t * t) * du, (1 - t * t) * (ddu - 2 * t * du * du)
    return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * dt, dt + 0.5 * x * ddt


def _activation(name: str, attrs: Attrs, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """f(x), f'(x), f''(x) of the smooth activations."""
    if name == "tanh":
        y = torch.tanh(x)
        return y, 1 - y * y, -2 * y * (1 - y * y)
    if name == "sigmoid":
        y = torch.sigmoid(x)
        return y, y * (1 - y), y * (1 - y) * (1 - 2 * y)
    if name == "exp":
        y = torch.exp(x)
        return y, y, y
    if name == "silu":
        s = torch.sigmoid(x)
        ds = s * (1 - s)
        return x * s, s + x * ds, ds * (2 + x * (1 - 2 * s))
    if name == "elu":
        e = attrs["alpha"] * torch.expm1(torch.clamp(x, max=0))
        slope = torch.where(x > 0, torch.ones_like(x), e + attrs["alpha"])
        return torch.where(x > 0, x, e), slope, torch.where(x > 0, torch.zeros_like(x), slope)
    if name == "softplus":
        beta = attrs["beta"]
        linear = x * beta > attrs["threshold"]
        s = torch.sigmoid(beta * x)
        one, zero = torch.ones_like(x), torch.zeros_like(x)
        y = F.softplus(x, beta, attrs["threshold"])
        return y, torch.where(linear, one, s), torch.where(linear, zero, beta * s * (1 - s))
    return _gelu(x, attrs["approximate"])


def _register_smooth(name: str) -> None:
    kernel(f"{name}_fwd")(lambda task, attrs, x: _activation(name, attrs, x)[0])
    kernel(f"{name}_jvp")(lambda task, attrs, x, xt: _activation(name, attrs, x)[1] * xt)
    kernel(f"{name}_bwd")(lambda task, attrs, x, dy: _activation(name, attrs, x)[1] * dy)

    @kernel(f"{name}_bwd_jvp")
    def bwd_jvp(task, attrs: Attrs, x, xt, dy, dyt):  # f'(x) dyt + f''(x) xt dy
        _, f1, f2 = _activation(name, attrs, x)
        return total(times(f1, dyt), times(f2, xt, dy))


for _name in ("tanh", "sigmoid", "exp", "elu", "gelu", "silu", "softplus"):
    _register_smooth(_name)


def _slope(attrs: Attrs, mask: Tensor, v: Tensor) -> Tensor:
    """v where the mask is set, slope * v elsewhere (ReLU: zero)."""
    return torch.where(mask, v, v * attrs["slope"] if "slope" in attrs else torch.zeros_like(v))


@kernel("relu_fwd", "leaky_relu_fwd")
def relu_fwd(task, attrs: Attrs, x):  # also the mask x > 0, so ReLU'(0) = 0 as in torch; NaN stays NaN: it has diverged
    return F.leaky_relu(x, attrs["slope"]) if "slope" in attrs else F.relu(x), x > 0


@kernel("relu_replay", "leaky_relu_replay")
def relu_replay(task, attrs: Attrs, x, mask):
    return _slope(attrs, mask, x)


@kernel("relu_jvp", "relu_bwd", "relu_bwd_jvp", "leaky_relu_jvp", "leaky_relu_bwd", "leaky_relu_bwd_jvp")
def relu_bwd(task, attrs: Attrs, mask, v):
    return _slope(attrs, mask, v)
