"""scale_shift: MTL, channel-wise scale and shift, CAVIA, against their equations."""

from __future__ import annotations

import families
import pytest
import torch
import torch.nn.functional as F
from families import small_conv
from helpers_families import IMAGES, agrees, backends, moved, options
from plain_loop import classify, mlp, one_thread, regress  # noqa: F401

from fastmaml import methods


def scaled(w, phi, kernel: bool):
    """MTL, eq. 4 and 5."""
    out, w = {}, {**w, **phi}
    for n in (n for n in w if n.endswith("weight") and f"scale_shift.scale.{n}" in w):
        s, b = w[f"scale_shift.scale.{n}"], n.replace("weight", "bias")
        out[n] = w[n] * s
        if f"scale_shift.shift.{b.replace('bias', 'weight')}" in w:
            out[b] = w[b] + w[f"scale_shift.shift.{n}"]
    return {**w, **out}


HEAD, SCALES = ("8.weight", "8.bias"), ("scale_shift.scale.0.weight", "scale_shift.shift.0.weight", "scale_shift.scale.4.weight")


@backends
@pytest.mark.parametrize("adapt", ["head", "scale_shift", "both"])
def test_mtl(how, adapt: str) -> None:
    names = {"head": HEAD, "scale_shift": SCALES, "both": HEAD + SCALES}[adapt]
    maml = methods.MTL(small_conv().to(how[1]), adapt=adapt, **options(how))
    moved(maml)
    agrees(maml, classify(**IMAGES), lambda w, phi, x: families.conv(scaled(w, phi, True), x), lambda w, t: {n: w[n] for n in names})
    assert not any(n in dict(maml.named_parameters()) for n in ("0.weight", "1.weight", "4.weight"))


@backends
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("adapt", ["head", "scale_shift", "both"])
def test_scales_of_the_head_too(how, adapt: str, steps: int) -> None:
    """The head's bias and its shift are terms of one sum: they have one gradient, and each its own step."""
    maml = methods.MTL(mlp().to(how[1]), adapt=adapt, layers="*.weight", **options(how, inner_steps=steps))
    moved(maml)
    own, head = list(maml.parameterisation.kinds), ["4.weight", "4.bias"]
    names = {"head": head, "scale_shift": own, "both": [*head, *own]}[adapt]
    agrees(maml, classify(), lambda w, phi, x: families.mlp(scaled({**w, **phi}, {}, True), x), lambda w, t: {n: w[n] for n in names}, steps=steps)


@backends
@pytest.mark.parametrize(("adapt", "frozen"), [("scale_shift", True), ("scale_shift", False), ("both", True), ("head", False)])
def test_channelwise_scale_shift(how, adapt: str, frozen: bool) -> None:
    maml = methods.ChannelScaleShift(small_conv().to(how[1]), adapt=adapt, frozen=frozen, **options(how, inner_lr=0.1))
    moved(maml)
    own = [n for n in maml.parameterisation.kinds]
    names = {"head": list(HEAD), "scale_shift": own, "both": [*HEAD, *own]}[adapt]

    def forward(w, phi, x):
        w = {**w, **phi}
        return families.conv(w, x, lambda n, y: y * w[f"scale_shift.scale.{n}.weight"].view(-1, 1, 1) + w[f"scale_shift.shift.{n}.weight"].view(-1, 1, 1))

    agrees(maml, classify(**IMAGES), forward, lambda w, t: {n: w[n] for n in names}, lr=0.1)


@backends
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_cavia_joins_the_input(how, loss: str) -> None:
    """Zintgraf et al. 2019, eq. 4: phi_0 = 0."""
    maml = methods.CAVIA(mlp().to(how[1]), context=3, **options(how, loss=loss))

    def forward(w, phi, x):
        joined = torch.cat([x, phi["cavia.context"].T.expand(len(x), -1)], 1)
        return families.mlp({**w, "0.weight": torch.cat([w["0.weight"], w["cavia.weight.0.weight"]], 1)}, joined)

    tasks = regress() if loss == "mse" else classify()
    agrees(maml, tasks, forward, lambda w, t: {"cavia.context": torch.zeros(3, 1, dtype=torch.float64)}, loss={"mse": F.mse_loss}.get(loss, F.cross_entropy))
    assert "cavia.context" not in dict(maml.named_parameters()) and "cavia.context" in maml.state_dict()


@backends
def test_cavia_by_film(how) -> None:
    maml = methods.CAVIA(small_conv().to(how[1]), context=3, layers=["0.weight", "4.weight"], **options(how, inner_lr=0.1))
    moved(maml)

    def forward(w, phi, x):
        def film(n, y):
            gamma, beta = F.linear(phi["cavia.context"].T, w[f"cavia.weight.{n}.weight"], w[f"cavia.bias.{n}.weight"])[0].chunk(2)
            return y * gamma.view(-1, 1, 1) + beta.view(-1, 1, 1)

        return families.conv(w, x, film_norm=film)

    agrees(maml, classify(**IMAGES), forward, lambda w, t: {"cavia.context": torch.zeros(3, 1, dtype=torch.float64)}, lr=0.1)
