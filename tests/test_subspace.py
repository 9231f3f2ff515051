"""subspace: T-nets, MT-nets, low rank, a dense basis, against their equations."""

from __future__ import annotations

import families
import pytest
import torch
from families import small_conv
from helpers_families import IMAGES, NAMES, OPTIONS, agrees, backends, moved, options
from plain_loop import classify, mlp, one_thread  # noqa: F401

import fastmaml
from fastmaml import methods


def with_t(w, phi, name: str):
    """Lee & Choi 2018, eq. 3: y = T (W x + b)."""
    w = {**w, **phi}
    for layer in ("0", "2", "4"):
        t = w[f"{name}.T.{layer}.weight"]
        w[f"{layer}.weight"], w[f"{layer}.bias"] = t @ w[f"{layer}.weight"], t @ w[f"{layer}.bias"]
    return w


@backends
def test_t_net(how) -> None:
    maml = methods.TNets(mlp().to(how[1]), **options(how))
    moved(maml)
    agrees(maml, classify(), lambda w, phi, x: families.mlp(with_t(w, phi, "t_net"), x), lambda w, t: {n: w[n] for n in NAMES})
    maml = methods.TNets(small_conv().to(how[1]), layers="[048].weight", adapt="[08].*", **options(how))
    moved(maml)

    def forward(w, phi, x):
        w = {**w, **phi}
        for n in ("0", "4"):
            y = lambda v, n=n: torch.einsum("oi,nihw->nohw", w[f"t_net.T.{n}.weight"], v)  # noqa: E731
            w[f"y{n}"] = y
        head = {"8.weight": w["t_net.T.8.weight"] @ w["8.weight"], "8.bias": w["t_net.T.8.weight"] @ w["8.bias"]}
        return families.conv({**w, **head}, x, film=lambda n, v: w[f"y{n}"](v))

    agrees(maml, classify(**IMAGES), forward, lambda w, t: {n: w[n] for n in ("0.weight", "0.bias", "8.weight", "8.bias")})


@backends
@pytest.mark.parametrize("mask", ["unit", "weight"])
def test_mt_net(how, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """W <- W - alpha M * dL/dW, M a straight-through Gumbel-softmax of [zeta, 0]."""
    maml = methods.MTNets(mlp().to(how[1]), mask=mask, temperature=0.7, logit=0.2, **options(how))
    moved(maml)
    drawn: dict = {}
    original = fastmaml.parameterisation.Tasks.noise

    def noise(self, name, shape):
        return drawn.setdefault(name, original(self, name, shape))

    monkeypatch.setattr(fastmaml.parameterisation.Tasks, "noise", noise)
    tasks = classify()
    maml(tasks, task_seeds=[7, 8, 9])

    def lr(w, t, name):
        key = f"logits.{name.split('.')[0] if mask == 'unit' else name}"
        u = drawn[key][t]
        z = w[f"mt_net.{key}"] + (u / (1 - u)).log()  # of two Gumbel variables the difference is logistic
        soft = torch.softmax(torch.stack([z, torch.zeros_like(z)]) / 0.7, 0)[0]
        m = soft + ((z > 0).double() - soft).detach()
        return 0.3 * (m[:, None] if mask == "unit" and name.endswith("weight") else m)

    agrees(maml, tasks, lambda w, phi, x: families.mlp(with_t(w, phi, "mt_net"), x), lambda w, t: {n: w[n] for n in NAMES}, lr=lr)


def test_masks_belong_to_the_seed_of_a_task() -> None:
    maml, tasks = methods.MTNets(mlp(), **OPTIONS), classify()
    first = maml(tasks, task_seeds=[1, 2, 3]).task_losses
    turned = maml([v.flip(0) for v in tasks], task_seeds=[3, 2, 1]).task_losses
    assert torch.equal(first.detach(), turned.detach().flip(0))
    assert not torch.equal(first.detach(), maml(tasks, task_seeds=[4, 5, 6]).task_losses.detach())
    torch.manual_seed(3)
    loss = maml(tasks).loss
    torch.manual_seed(3)
    assert torch.equal(loss, maml(tasks).loss)
    with pytest.raises(ValueError, match="task_seeds=.*expected 3 whole numbers"):
        maml(tasks, task_seeds=[1, 2])


@pytest.mark.parametrize("mask", ["unit", "weight"])
def test_masks_of_all_tasks_at_once_are_those_of_each(mask: str) -> None:
    """P(M = 1) = sigmoid(zeta); a task has in a batch of many what it has alone, whatever stands beside it."""
    maml = methods.MTNets(mlp(), mask=mask, logit=0.8)
    parameters = {**dict(maml.model.named_parameters()), **maml.parameterisation.values()}
    rates = {n: torch.tensor(1.0) for n in NAMES}

    def made(seeds):
        tasks = fastmaml.parameterisation.Tasks([None] * len(seeds), parameters, rates, seeds, torch.empty)
        return {name: masks.detach() for name, masks in maml.parameterisation.prologue(tasks).items()}

    seeds = [7 * t + 2**40 for t in range(200)]
    together, alone = made(seeds), [made([seed]) for seed in seeds[:5]]
    for name, masks in together.items():
        assert torch.equal(masks[:5], torch.cat([m[name] for m in alone])), name
    flat = torch.cat([m.reshape(200, -1) for m in together.values()], 1)
    assert not torch.equal(flat[0], flat[1])
    assert set(flat.unique().tolist()) == {0.0, 1.0}
    assert float(flat.mean()) == pytest.approx(float(torch.tensor(0.8).sigmoid()), abs=0.03)
    if mask == "unit":  # one for each unit, with its bias
        assert torch.equal(together["rate.0.weight"], together["rate.0.bias"][:, :, None].expand(-1, -1, 3))


@backends
@pytest.mark.parametrize("adapt", ["both", "A", "B"])
@pytest.mark.parametrize("learned", [True, False])
def test_low_rank(how, adapt: str, learned: bool) -> None:
    maml = methods.LowRankMAML(mlp().to(how[1]), rank=2, adapt=adapt, learned=learned, **options(how))
    moved(maml)

    def forward(w, phi, x):
        w = {**w, **phi}
        return families.mlp({**w, **{f"{n}.weight": w[f"{n}.weight"] + w[f"low_rank.B.{n}.weight"] @ w[f"low_rank.A.{n}.weight"] for n in "024"}}, x)

    factors = [f"low_rank.{f}.{n}.weight" for n in "024" for f in ("A", "B") if adapt in (f, "both")]
    agrees(maml, classify(), forward, lambda w, t: {n: w[n].clone() if not learned else w[n] for n in factors})


@backends
@pytest.mark.parametrize("basis", ["random", "learned", "given"])
def test_basis(how, basis: str) -> None:
    if basis == "given":
        basis = {n: torch.randn(p.numel(), 5) / 10 for n, p in mlp().named_parameters()}
    maml = methods.SubspaceMAML(mlp().to(how[1]), size=5, basis=basis, **options(how, inner_lr=3.0))

    def forward(w, phi, x):
        return families.mlp({**w, **{n: w[n] + (w[f"basis.U.{n}"] @ phi["basis.a"]).view_as(w[n]) for n in NAMES}}, x)

    agrees(maml, classify(), forward, lambda w, t: {"basis.a": torch.zeros(5, 1, dtype=torch.float64)}, lr=3.0)
