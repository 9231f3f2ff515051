"""The table of the functions, and sums and products of operands that may be absent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

Attrs = Mapping[str, Any]
KERNELS: dict[str, Callable[..., Any]] = {}


def kernel(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            KERNELS[name] = function
        return function

    return register


def total(*terms: Tensor | None) -> Tensor | None:
    """Sum of the terms that are there."""
    given = [term for term in terms if term is not None]
    return sum(given[1:], given[0]) if given else None


def times(*factors: Tensor | None) -> Tensor | None:
    """Product, zero (None) if any factor is."""
    if any(factor is None for factor in factors):
        return None
    out = factors[0]
    for factor in factors[1:]:
        out = out * factor
    return out
