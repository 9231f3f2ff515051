"""The table of trace rules: one per torch function, found by its name, and what every rule needs of its operands.

A rule has the signature of its function (defaults included) with the recorder in front, and returns the number of the
resulting value. It raises ``Refusal`` with the reason where a Program cannot express the call; ``trace`` adds the
layer. In-place forms are the recorder's work.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastmaml._trace.recorder import Recorder


class Refusal(Exception):
    """A Program cannot express this; the text is the reason."""


class Misuse(Exception):
    """The user must decide; unlike a Refusal no other backend may hide it."""


def _words(*lines: str) -> frozenset[str]:
    return frozenset(word for line in lines for word in line.split())


# Read natively: they tell shapes and types, or change torch's state around the ops.
QUERIES = _words(
    "size dim ndimension numel nelement __len__ is_floating_point is_complex is_signed is_contiguous get_device",
    "stride element_size __hash__ is_tensor is_same_size broadcast_shapes result_type can_cast promote_types",
    "get_default_dtype _set_grad_enabled _enter_autocast _exit_autocast is_autocast_enabled",
)
# Attributes of a tensor that are ops or data, and so need a rule or are refused; all others are read natively.
UNREAD_GETTERS = _words("T mT H mH data real imag grad")
# Results that share memory with their first operand.
VIEWS = _words(
    "view reshape flatten unflatten ravel view_as reshape_as squeeze unsqueeze permute",
    "transpose swapaxes swapdims t T mT __getitem__ contiguous",
)
_CREATES = _words(
    "zeros ones empty full tensor as_tensor scalar_tensor from_numpy rand randn randint arange linspace eye normal"
)
DROPOUT = "dropout is random inside the inner loop"
_REASONS = {
    **dict.fromkeys(
        _words("__bool__ item __float__ __int__ __index__ tolist numpy __array__ __contains__ equal allclose nonzero"),
        "it reads the values of a tensor (Python control flow on data, or numpy)",
    ),
    **dict.fromkeys(
        _words("detach detach_ data requires_grad_ grad"), "it cuts the gradient, which the inner loop needs"
    ),
    **dict.fromkeys(
        _words("max_pool2d_with_indices adaptive_max_pool2d_with_indices"), "return_indices is not supported"
    ),
    **dict.fromkeys(_words("unbind index_select gather chunk split"), "it takes samples or features apart"),
    "rrelu": "RReLU is random inside the inner loop",
    "instance_norm": "InstanceNorm is not supported (GroupNorm with one group per channel is the same)",
}

_RULES: dict[str, tuple[Callable[..., int], inspect.Signature]] = {}


def rule_of(name: str) -> Callable[[Recorder, tuple, dict], int] | None:
    """The rule of a torch function, in-place names included, as ``f(recorder, args, kwargs) -> value``."""
    found = _RULES.get(name) or _RULES.get({"__iadd__": "add", "__imul__": "mul"}.get(name, name.removesuffix("_")))
    if found is None:
        return None
    rule, signature = found

    def bound(r: Recorder, args: tuple, kwargs: dict) -> int:
        try:
            signature.bind(r, *args, **kwargs)
        except TypeError as error:
            raise Refusal(f"{name} with these arguments ({error})") from error
        return rule(r, *args, **kwargs)

    return bound


def refusal_of(name: str) -> str:
    """Why a function without a rule is refused."""
    if name in _REASONS:
        return _REASONS[name]
    if name in _CREATES or name.endswith("_like") or name.startswith("new_"):
        return f"torch.{name} creates a tensor inside forward; make it a buffer or a parameter"
    return f"{name} is not supported"


def rule(*names: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    def register(function: Callable[..., int]) -> Callable[..., int]:
        _RULES.update(dict.fromkeys(names, (function, inspect.signature(function))))
        return function

    return register


def rows_of(r: Recorder, tensor: Any, what: str) -> int:
    value = r.use(tensor)
    if not r.is_rows(value):
        raise Refusal(f"{what} of a parameter; samples are expected")
    return value


def weight_of(r: Recorder, tensor: Any, what: str, shape: tuple[int, ...] | None = None) -> int | None:
    """A weight operand, or None; ``shape`` is checked where torch would check it."""
    if tensor is None:
        return None
    value = r.use(tensor)
    if r.is_rows(value):
        raise Refusal(f"the {what} is computed from samples; weights are parameters or expressions of them")
    if shape is not None and r.shape(value) != shape:
        raise Refusal(f"the {what} has shape {list(r.shape(value))}, not {list(shape)}")
    return value


def pair_of(value: Any) -> tuple[int, int]:
    items = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    items = tuple(operator.index(item) for item in items)
    return (items * 2 if len(items) == 1 else items)[:2]


def dims_of(dims: Any, rank: int) -> list[int]:
    dims = tuple(dims) if isinstance(dims, (tuple, list)) else (dims,)
    if any(not -rank <= d < rank for d in dims):
        raise Refusal(f"axes {list(dims)} of a tensor with {rank} axes")
    return sorted(d % rank for d in dims)
