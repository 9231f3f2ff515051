"""How the segments of a Plan are put together, and the inner rates: what a Plan depends on besides the Program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fastmaml.optimizers import SGD, ImplicitGradient
from fastmaml.program import Loss

ENTRIES = ("train", "halves", "evaluate", "adapt", "predict")


@dataclass(frozen=True)
class Rate:
    """An inner learning rate: scalar (shape ()) or per element, one for all steps or one per step, fixed or learned; home "task": each task has its own."""

    name: str
    shape: tuple[int, ...] = ()
    per_step: bool = False
    learned: bool = False
    home: str = "meta"


@dataclass(frozen=True)
class Arrangement:
    """How the segments are put together.

    entry         train: loss and gradients | halves: the same around a torch outer loss | evaluate: no gradients | adapt: theta_K | predict: logits of theta
    rates         the Rate of each adapted leaf, by name
    query_from    None: the outer loss reads theta_K alone; k: it is the weighted sum of the losses of theta_k .. theta_K (multi-step loss)
    support_rows  rows of the largest support set, where known: layers with more inputs are factored (see rewrite.py)
    optimizer     what turns gradients into steps
    meta_gradient unrolled: through every inner step | reptile: theta_0 - theta_K | an ImplicitGradient
    record_masks  keep ReLU masks and pooling indices of every task, to replay them in float64
    """

    steps: int
    loss: Loss = Loss()
    rates: Mapping[str, Rate] = field(default_factory=dict)
    first_order: bool = False
    entry: str = "train"
    query_from: int | None = None
    memory: str = "constant"
    record_masks: bool = False
    support_rows: int | None = None
    optimizer: SGD = SGD()
    meta_gradient: str | ImplicitGradient = "unrolled"
