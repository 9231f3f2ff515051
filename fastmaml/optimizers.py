"""Inner optimizers: how the inner loop turns gradients into steps. The learning rate is MAML's ``inner_lr``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real

from fastmaml.counts import check_count


@dataclass(frozen=True, kw_only=True)
class SGD:
    """Stochastic gradient descent as torch.optim.SGD has it, every part of it differentiated exactly.

        g = clip(gradient) + weight_decay theta
        v = momentum v + (1 - dampening) g      at the first step v = g
        theta = theta - inner_lr s              s = v; nesterov: g + momentum v; without momentum: g

    momentum, dampening, nesterov, weight_decay   as in torch.optim.SGD (Sutskever et al. 2013 for momentum and Nesterov's)
    max_norm      as torch.nn.utils.clip_grad_norm_: gradients times min(1, max_norm / (their norm over all adapted parameters + 1e-6))
    clip_value    as torch.nn.utils.clip_grad_value_: each element between -clip_value and clip_value

    The derivative of a clip is torch's: an element at the very bound passes its gradient, and the norm's derivative counts where it clips. Numbers may be
    scheduled by giving the MAML object another one; each is a Plan of its own. Raises ValueError naming the argument.
    """

    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    max_norm: float | None = None
    clip_value: float | None = None

    def __post_init__(self) -> None:
        for name in ("momentum", "dampening", "weight_decay", "max_norm", "clip_value"):
            value, optional = getattr(self, name), name in ("max_norm", "clip_value")
            if value is None and optional:
                continue
            if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
                raise ValueError(f"{name}={value!r}: expected a finite number{' or None' if optional else ''}")
            if (value <= 0 if optional else value < 0 and name != "dampening"):
                raise ValueError(f"{name}={value!r}: expected a number {'above 0, or None not to clip' if optional else 'of at least 0'}")
            object.__setattr__(self, name, float(value))
        if not isinstance(self.nesterov, bool):
            raise ValueError(f"nesterov={self.nesterov!r}: expected True or False")
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError(f"nesterov=True with momentum={self.momentum} and dampening={self.dampening}: it needs a momentum, and no dampening")
        if self.max_norm is not None and self.clip_value is not None:
            raise ValueError(f"max_norm={self.max_norm} and clip_value={self.clip_value}: clip by the norm or by the value, not both")

    @property
    def clips(self) -> bool:
        return self.max_norm is not None or self.clip_value is not None

    @property
    def linear(self) -> bool:
        """Whether theta moves by sums of gradients alone, so that the update of a factor (plan/rewrite.py) is that of its weight."""
        return not self.clips and self.weight_decay == 0

    @property
    def plain(self) -> bool:
        """theta - inner_lr gradient, and nothing else."""
        return self.linear and self.momentum == 0

    @property
    def dampens(self) -> bool:
        return self.momentum != 0 and self.dampening != 0

    def numbers(self, steps: int) -> Mapping[str, list[float]]:
        """What a Plan of this optimizer reads at run time besides the rates, by name: one number per step."""
        return {DAMPENING: [1.0] + [1.0 - self.dampening] * (steps - 1)} if self.dampens and steps else {}


@dataclass(frozen=True, kw_only=True)
class ImplicitGradient:
    """The meta-gradient of iMAML (Rajeswaran et al. 2019): not through the inner steps, but of the minimum that they approach.

        theta_K ~ argmin L_S(theta) + lam / 2 |theta - theta_0|^2        every inner step takes the gradient of this
        meta-gradient = A^-1 grad L_Q(theta_K),   A v = (1 + cg_damping) v + H v / (lam + lam_damping),   H the Hessian of L_S at theta_K

    A^-1 by cg_steps iterations of conjugate gradient from 0. The defaults are those of the authors' code on Omniglot; the paper's equation 6 is
    cg_damping=0, lam_damping=0, and both are there to keep A positive where H is not. Raises ValueError naming the argument.
    """

    lam: float = 2.0
    cg_steps: int = 5
    cg_damping: float = 1.0
    lam_damping: float = 10.0

    def __post_init__(self) -> None:
        for name in ("lam", "cg_damping", "lam_damping"):
            value, least = getattr(self, name), "above 0" if name == "lam" else "of at least 0"
            wrong = isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value)
            if wrong or value < 0 or (name == "lam" and value == 0):
                raise ValueError(f"{name}={value!r}: expected a finite number {least}")
            object.__setattr__(self, name, float(value))
        check_count("cg_steps", self.cg_steps)


DAMPENING = "sgd.dampening"  # of each step: the factor of the new gradient
