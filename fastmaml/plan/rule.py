"""What a rule of differentiation is, and what rules share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastmaml.plan.instructions import Operand
from fastmaml.plan.passes import Pass
from fastmaml.program import Op


@dataclass(frozen=True)
class Rule:
    """How an op becomes instructions. ``jvp`` returns the tangent's Ref, or None where it vanishes."""

    fwd: Callable[[Pass, Op], None]
    jvp: Callable[[Pass, Op], Operand]
    bwd: Callable[[Pass, Op], None]
    bwd_jvp: Callable[[Pass, Op], None]


def values_of(p: Pass, op: Op) -> list[Operand]:
    return [None if v is None else p.value[v] for v in op.inputs]


def dots_of(p: Pass, op: Op) -> list[Operand]:
    return [None if v is None else p.dot.get(v) for v in op.inputs]


def attrs_of(op: Op) -> dict[str, Any]:
    return dict(op.attrs)


def add_weight_and_bias(
    p: Pass, vw: int | None, vb: int | None, kernel: str, inputs: tuple[Operand, ...], dot: bool, attrs: dict[str, Any]
) -> None:
    """One instruction for dw and db, either of which may be unwanted."""
    targets = [v if v is not None and v in p.wanted else None for v in (vw, vb)]
    refs = [None if v is None else p.like("dd" if dot else "d", v, keep=not dot) for v in targets]
    if any(refs):
        p.emit(kernel, inputs, refs, **attrs)
        for v, ref in zip(targets, refs, strict=True):
            p.alias_bar(v, ref, dot)
