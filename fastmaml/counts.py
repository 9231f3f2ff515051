"""Whole numbers that callers give."""

from __future__ import annotations

import operator
from typing import Any


def check_count(name: str, value: Any, minimum: int = 1) -> int:
    """``value`` as an int of at least ``minimum``. TypeError: it is no integer (True is none); ValueError: it is smaller. Both name the argument."""
    wanted = f"{name}={value!r}: expected a whole number of at least {minimum}"
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(wanted)
    if operator.index(value) < minimum:
        raise ValueError(wanted)
    return operator.index(value)
