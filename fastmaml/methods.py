"""The methods of the field by name: each a function that returns a MAML object with the paper's arrangement and defaults.

``options`` go to ``fastmaml.MAML``: inner_lr, inner_steps, loss, first_order, learn_inner_lr, backend ... What is adapted, what is outer-learned and how the
weights follow: the classes of ``fastmaml.parameterisation``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastmaml.full import FirstOrderMAML, MAMLPlusPlus, MAMLPlusPlusSchedule, MetaSGD, Reptile, iMAML, record_statistics
from fastmaml.leo import LEO
from fastmaml.maml import MAML
from fastmaml.mixture import MixtureMAML
from fastmaml.parameterisation import Basis, Context, Gated, Head, Layerwise, LowRank, Modulation, ScaleShift, TNet
from fastmaml.parameterisation.layerwise import Which

__all__ = [
    "ANIL",
    "BOIL",
    "CAVIA",
    "HSML",
    "LEO",
    "MMAML",
    "MTL",
    "ChannelScaleShift",
    "FirstOrderMAML",
    "HeadOnly",
    "LowRankMAML",
    "MAMLPlusPlus",
    "MAMLPlusPlusSchedule",
    "MTNets",
    "MetaSGD",
    "Mixture",
    "ProtoMAML",
    "Reptile",
    "SubspaceMAML",
    "TNets",
    "ZeroHead",
    "iMAML",
    "record_statistics",
]

Patterns = str | Sequence[str]


def ANIL(model: nn.Module, *, head: Which = "head", **options: Any) -> MAML:
    """Almost No Inner Loop (Raghu et al. 2020): the inner loop changes the head alone; the body is outer-learned and runs once per task.

    head   the last Linear layer, or name pattern(s), or module(s) of the model, by name or themselves
    """
    return MAML(model, parameterisation=Layerwise(head), **options)


def BOIL(model: nn.Module, *, body: Which = "body", **options: Any) -> MAML:
    """Body Only update in Inner Loop (Oh et al. 2021): the inner loop changes all but the head, which is outer-learned."""
    return MAML(model, parameterisation=Layerwise(body), **options)


def HeadOnly(model: nn.Module, *, head: Which = "head", body: Which = "body", **options: Any) -> MAML:
    """A head that is adapted and outer-learned over features that nobody trains."""
    return MAML(model, parameterisation=Layerwise(head, frozen=body), **options)


def MTL(
    model: nn.Module,
    *,
    pretrained: Mapping[str, Tensor] | None = None,
    adapt: str = "head",
    layers: Patterns | None = None,
    inner_lr: Any = 0.01,
    inner_steps: int = 20,
    **options: Any,
) -> MAML:
    """Meta-Transfer Learning (Sun et al. 2019): a pretrained body is frozen, a scale for each of its kernels and a shift of each bias are outer-learned,
    the head is adapted (or, with ``adapt``, "scale_shift", or "both"). The published PyTorch code is first order: ``first_order=True``.

    pretrained: a state_dict that is loaded into ``model`` first; entries of the head, whose classes are others, may be missing.
    ``maml.parameter_groups({"scale_shift": 1e-4, "model": 1e-3})`` for the paper's two outer rates.
    """
    if pretrained is not None:
        _load(model, pretrained)
    return MAML(model, parameterisation=ScaleShift(adapt, layers=layers), inner_lr=inner_lr, inner_steps=inner_steps, **options)


def ChannelScaleShift(model: nn.Module, *, adapt: str = "scale_shift", layers: Patterns | None = None, frozen: bool = True, **options: Any) -> MAML:
    """A scale and a shift of each channel, after each layer but the head (as FiLM's, Perez et al. 2018), adapted and outer-learned over a frozen body, or
    (``frozen=False``) one that is outer-learned too. The inner loop has no product for a weight's gradient below the head."""
    return MAML(model, parameterisation=ScaleShift(adapt, kernel=False, layers=layers, frozen=frozen), **options)


def CAVIA(model: nn.Module, *, context: int = 5, layers: Patterns | None = None, inner_lr: Any = 1.0, **options: Any) -> MAML:
    """Fast Context Adaptation via Meta-Learning (Zintgraf et al. 2019): only a context that begins at zero is adapted. It joins the input of the first
    Linear layer, or (``layers``) modulates the layers with these weights through FiLM."""
    return MAML(model, parameterisation=Context(context, layers), inner_lr=inner_lr, **options)


def TNets(model: nn.Module, *, layers: Patterns | None = None, **options: Any) -> MAML:
    """T-nets (Lee & Choi 2018): y = T (W x + b), T outer-learned: a metric T T^t of the inner loop's steps."""
    return MAML(model, parameterisation=TNet(layers=layers), **options)


def MTNets(
    model: nn.Module, *, mask: str = "unit", temperature: float = 1.0, logit: float = 0.0, layers: Patterns | None = None, **options: Any
) -> MAML:
    """MT-nets (Lee & Choi 2018): a T-net in which a mask, drawn for each task with outer-learned probabilities, chooses what moves."""
    return MAML(model, parameterisation=TNet(mask, temperature, logit, layers), **options)


def LowRankMAML(model: nn.Module, *, rank: int = 4, adapt: str = "both", learned: bool = True, layers: Patterns | None = None, **options: Any) -> MAML:
    """W = W_0 + B A: the inner loop changes the factors (Hu et al. 2022)."""
    return MAML(model, parameterisation=LowRank(rank, adapt, learned, layers), **options)


def SubspaceMAML(model: nn.Module, *, size: int = 8, basis: str | Mapping[str, Tensor] = "random", **options: Any) -> MAML:
    """theta = theta_0 + U a: the inner loop changes a, of ``size`` numbers."""
    return MAML(model, parameterisation=Basis(size, basis), **options)


def ZeroHead(model: nn.Module, *, body: str = "adapted", **options: Any) -> MAML:
    """MAML whose head begins at zero in every task: no order of classes is learned by it (UNICORN-MAML, Ye & Chao 2022, and Meta-Dataset's zero head)."""
    return MAML(model, parameterisation=Head("zero", body), **options)


def ProtoMAML(model: nn.Module, *, body: str = "adapted", **options: Any) -> MAML:
    """ProtoMAML (Triantafillou et al. 2020): the head begins at the prototypes of the task's support rows, differentiably."""
    return MAML(model, parameterisation=Head("prototypes", body), **options)


def MMAML(model: nn.Module, encoder: nn.Module, *, size: int | None = None, layers: Patterns | None = None, **options: Any) -> MAML:
    """Multimodal MAML (Vuorio et al. 2019): ``encoder(support_x, support_y) -> [size]`` modulates the layers through FiLM, then the inner loop adapts.
    ``fastmaml.parameterisation.SetEncoder`` is one."""
    return MAML(model, parameterisation=Modulation(encoder, size, layers), **options)


def HSML(model: nn.Module, encoder: nn.Module, *, size: int | None = None, clusters: tuple[int, int] = (4, 2), reconstruction: float | None = None, **options: Any) -> MAML:
    """Hierarchically Structured Meta-Learning (Yao et al. 2019): the task's place in a hierarchy of clusters gates the initialisation, theta_0 * eta(task).
    An encoder with a decoder, as ``fastmaml.parameterisation.SetEncoder(inputs, targets, decoder=True)``, adds ``reconstruction`` (the authors: 0.01) times
    its reconstruction loss to the outer loss."""
    return MAML(model, parameterisation=Gated(encoder, size, clusters, reconstruction), **options)


def Mixture(model: nn.Module, *, components: int = 3, temperature: float = 1.0, **options: Any) -> MixtureMAML:
    """Several initialisations, weighed by how well each explains the support set (Jerfel et al. 2019)."""
    return MixtureMAML(model, components=components, temperature=temperature, **options)


def _load(model: nn.Module, pretrained: Mapping[str, Tensor]) -> None:
    known = model.state_dict()
    unknown = [name for name in pretrained if name not in known]
    wrong = [n for n, v in pretrained.items() if n in known and known[n].shape != v.shape]
    if unknown or wrong:
        what = f"{unknown[0]!r}, which the model has not" if unknown else f"{wrong[0]!r} in another shape than the model's"
        raise ValueError(f"pretrained has {what}: leave entries of the old head out")
    model.load_state_dict(pretrained, strict=False)
