"""Meta-parameterisations: what the inner loop adapts, what is outer-learned, how the network's weights follow. Each is a rewrite of the Program.

``MAML(model, parameterisation=...)`` takes an object of these classes, a name where one needs no more (those of ``NAMES``), or a list of both.
"""

from __future__ import annotations

from collections.abc import Callable

from fastmaml.parameterisation.base import PENALTY, Kind, Network, Parameterisation, Tasks
from fastmaml.parameterisation.composed import Composed
from fastmaml.parameterisation.heads import Head
from fastmaml.parameterisation.layerwise import Layerwise
from fastmaml.parameterisation.mixture import Mixture
from fastmaml.parameterisation.modulation import Gated, Modulation, SetEncoder
from fastmaml.parameterisation.rewriter import Rewriter, Rewritten, rewritten
from fastmaml.parameterisation.scale_shift import Context, ScaleShift
from fastmaml.parameterisation.subspace import Basis, LowRank, TNet

NAMES: dict[str, Callable[[], Parameterisation]] = {
    "full": Parameterisation,
    "anil": lambda: Layerwise("head"),
    "boil": lambda: Layerwise("body"),
    "head_only": lambda: Layerwise("head", frozen="body"),
}

__all__ = [
    "NAMES",
    "PENALTY",
    "Basis",
    "Composed",
    "Context",
    "Gated",
    "Head",
    "Kind",
    "Layerwise",
    "LowRank",
    "Mixture",
    "Modulation",
    "Network",
    "Parameterisation",
    "Rewriter",
    "Rewritten",
    "ScaleShift",
    "SetEncoder",
    "TNet",
    "Tasks",
    "made",
    "rewritten",
]


def made(given: object) -> Parameterisation:
    """The object that ``parameterisation=`` means."""
    if isinstance(given, Parameterisation):
        return given
    if isinstance(given, str) and given in NAMES:
        return NAMES[given]()
    if isinstance(given, (list, tuple)):
        return Composed([made(part) for part in given])
    classes = ", ".join(name for name in __all__ if name[0].isupper() and name in globals() and _is_family(globals()[name]))
    raise ValueError(
        f"parameterisation={given!r}: choose one of {', '.join(map(repr, NAMES))}, or an object of fastmaml.parameterisation ({classes}); "
        "fastmaml.methods has a constructor for each method"
    )


def _is_family(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Parameterisation)
