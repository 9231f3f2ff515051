"""Every meta-parameterisation: its meta-gradient against the paper's equations in float64, and everything a MAML object does with it."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
import re
from functools import partial
from pathlib import Path

import families
import pytest
import torch
import torch.nn.functional as F
from families import small_conv, truth
from plain_loop import classify, mlp, one_thread, plain_loop, ragged, regress  # noqa: F401
from test_maml import BACKENDS, BOUND
from torch import nn

import fastmaml
from fastmaml import MAML, methods
from fastmaml.parameterisation import (
    Basis,
    Context,
    Gated,
    Head,
    Layerwise,
    LowRank,
    Modulation,
    Parameterisation,
    ScaleShift,
    SetEncoder,
    TNet,
)

backends = pytest.mark.parametrize("how", [BACKENDS[0], BACKENDS[2]], ids=["cpu", "torch"])  # in float32, in float64
OPTIONS = {"inner_lr": 0.3, "inner_steps": 3}
IMAGES = {"shape": (2, 6, 6), "support": 8, "query": 9}


def options(how, **more):
    return {**OPTIONS, "backend": how[0], **more}


def grads(maml: MAML) -> dict:
    found = {n: p.grad for n, p in maml.named_parameters()}
    maml.zero_grad(set_to_none=True)
    return found


def agrees(maml: MAML, tasks, forward, start, module: bool = True, **kw) -> None:
    """Meta-gradient in three ways of calling, adapted weights, predictions and plain modules, against the equations."""
    kw = {"lr": 0.3, "steps": 3, **kw}
    loss, expected, ends = truth(maml, tasks, forward, start, **kw)
    bound = BOUND[next(maml.model.parameters()).dtype]
    seeds = {} if not maml.parameterisation.has_prologue else {"task_seeds": list(range(7, 7 + len(ends)))}
    how = kw.get("loss", F.cross_entropy)

    def outer(logits, y):
        return sum(how(z, t) for z, t in zip(logits, y, strict=True)) / len(ends)

    calls = [lambda: maml(tasks, **seeds).loss.backward(), lambda: maml.meta_grad(tasks, **seeds)]
    if not isinstance(tasks, fastmaml.TaskBatch) and "weights" not in kw:
        calls.append(lambda: maml(tasks, outer_loss=outer, **seeds).loss.backward())
    for call in calls:
        call()
        assert families.distance(grads(maml), expected) <= bound
    assert float(maml(tasks, **seeds).loss.detach()) == pytest.approx(float(loss), rel=1e-5)
    if isinstance(tasks, fastmaml.TaskBatch):
        return
    adapted = maml.adapt(*tasks[:2], **seeds)
    close = {"rtol": 1e-4, "atol": 1e-5, "check_dtype": False}
    for name, value in adapted.weights.items():
        torch.testing.assert_close(value, torch.stack([end[name].reshape(value.shape[1:]) for end in ends]), **close)
    w = {n: v.detach().double() for n, v in {**dict(maml.model.named_parameters()), **maml.parameterisation.values()}.items()}
    logits = torch.stack([forward(w, end, x.double()) for end, x in zip(ends, tasks[2], strict=True)])
    torch.testing.assert_close(adapted(tasks[2]), logits.detach(), **close)
    if module:
        plain = adapted.module(1)
        assert type(plain) is type(maml.model)
        x = tasks[2][1].to(next(plain.parameters()).dtype)
        torch.testing.assert_close(plain(x), logits[1].detach(), **close)


# ---------------------------------------------------------------------------------------------------------------- layerwise
LAYERWISE = {"anil": ("4.*", "[024].*"), "boil": ("[02].*", "[024].*"), "head_only": ("4.*", "4.*")}


@backends
@pytest.mark.parametrize("name", LAYERWISE)
def test_layerwise(how, name: str) -> None:
    """Raghu et al. 2020, Oh et al. 2021: the same loop over fewer parameters."""
    patterns, trained = LAYERWISE[name]
    maml, tasks = MAML(mlp().to(how[1]), parameterisation=name, **options(how)), classify()
    maml.meta_grad(tasks)
    found, expected = grads(maml), plain_loop(maml.model, tasks, lr=0.3, steps=3, adapt=patterns).gradients
    assert sorted(found) == sorted(n for n in expected if torch.tensor([n.startswith(c) for c in trained.strip("[].*")]).any())
    assert families.distance(found, {n: expected[n] for n in found}) <= BOUND[how[1]]
    assert maml.executor == how[0]


def test_layerwise_by_pattern_and_constructor() -> None:
    for maml in (methods.ANIL(mlp(), **OPTIONS), methods.ANIL(mlp(), head="4.*", **OPTIONS), MAML(mlp(), parameterisation=Layerwise("4.*"), **OPTIONS)):
        tasks = classify()
        maml.meta_grad(tasks)
        assert families.distance(grads(maml), plain_loop(maml.model, tasks, lr=0.3, steps=3, adapt="4.*").gradients) <= 3e-6
        assert sorted(maml.adapt(*tasks[:2]).weights) == ["4.bias", "4.weight"]
    assert "parameterisation layerwise(adapt='4.*'): adapted: 4.weight, 4.bias; outer-learned only: 0.weight" in maml.explain(tasks)
    assert "constant: 0.weight" in methods.HeadOnly(mlp()).explain(tasks)
    assert methods.BOIL(mlp(), **OPTIONS).verify(classify()).ok and methods.HeadOnly(mlp(), **OPTIONS).verify(classify()).ok


def test_head_of_a_bare_layer() -> None:
    assert sorted(MAML(nn.Linear(3, 4), parameterisation="anil").adapt(*classify()[:2]).weights) == ["bias", "weight"]


@backends
@pytest.mark.parametrize("first_order", [False, True])
def test_joint_statistics(how, first_order: bool) -> None:
    """learn2learn's anil_fc100.py: features of support and query rows together, then split."""
    maml, tasks = methods.ANIL(small_conv().to(how[1]), batchnorm="joint", first_order=first_order, **options(how)), classify(**IMAGES)

    def forward(w, phi, x):
        t, part = next((t, i) for t in range(3) for i in (0, 2) if torch.equal(tasks[i][t].double(), x))
        rows = torch.cat([tasks[0][t], tasks[2][t]]).double()
        eye = {"8.weight": torch.eye(45, dtype=torch.float64), "8.bias": torch.zeros(45, dtype=torch.float64)}
        features = families.conv({**w, **eye}, rows)
        return F.linear(features[:8] if part == 0 else features[8:], phi["8.weight"], phi["8.bias"])

    loss, expected, _ = truth(maml, tasks, forward, lambda w, t: {n: w[n] for n in ("8.weight", "8.bias")}, first_order=first_order)
    for steps in (3, 0):
        for call in (lambda k=steps: maml(tasks, inner_steps=k).loss.backward(), lambda k=steps: maml.meta_grad(tasks, inner_steps=k)):
            call()
            found = grads(maml)
            if steps:
                assert families.distance(found, expected) <= BOUND[how[1]]
    with torch.no_grad():
        assert float(maml(tasks).loss) == pytest.approx(float(loss), rel=1e-5)
    assert maml.executor == how[0]
    assert maml.adapt(*tasks[:2])(tasks[2]).shape == (3, 9, 4)


def test_joint_statistics_need_a_body_that_stays() -> None:
    for wrong in (MAML(small_conv(), batchnorm="joint"), methods.BOIL(small_conv(), batchnorm="joint")):
        with pytest.raises(ValueError, match="batchnorm='joint' needs a body that the inner loop does not change"):
            wrong(classify(**IMAGES))


# ---------------------------------------------------------------------------------------------------------------- scale and shift
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


def moved(maml: MAML) -> None:
    """Away from the initial values, where some gradients vanish."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in dict(maml.parameterisation.trained()).values():
            p.add_(0.3 * torch.randn(p.shape, generator=g).to(p))


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


# ---------------------------------------------------------------------------------------------------------------- subspaces
def with_t(w, phi, name: str):
    """Lee & Choi 2018, eq. 3: y = T (W x + b)."""
    w = {**w, **phi}
    for layer in ("0", "2", "4"):
        t = w[f"{name}.T.{layer}.weight"]
        w[f"{layer}.weight"], w[f"{layer}.bias"] = t @ w[f"{layer}.weight"], t @ w[f"{layer}.bias"]
    return w


NAMES = [f"{layer}.{kind}" for layer in ("0", "2", "4") for kind in ("weight", "bias")]


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

    agrees(maml, classify(**IMAGES), forward, lambda w, t: {n: w[n] for n in ("0.weight", "0.bias", *HEAD)})


@backends
@pytest.mark.parametrize("mask", ["unit", "weight"])
def test_mt_net(how, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """W <- W - alpha M * dL/dW, M a straight-through Gumbel-softmax of [zeta, 0]."""
    maml = methods.MTNets(mlp().to(how[1]), mask=mask, temperature=0.7, logit=0.2, **options(how))
    moved(maml)
    drawn: dict = {}
    original = fastmaml.parameterisation.Tasks.noise

    def noise(self, name, draw):
        return drawn.setdefault(name, original(self, name, draw))

    monkeypatch.setattr(fastmaml.parameterisation.Tasks, "noise", noise)
    tasks = classify()
    maml(tasks, task_seeds=[7, 8, 9])

    def lr(w, t, name):
        key = f"logits.{name.split('.')[0] if mask == 'unit' else name}"
        z = w[f"mt_net.{key}"] + drawn[key][t].double()
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
@pytest.mark.parametrize("basis", ["random", "learned"])
def test_basis(how, basis: str) -> None:
    maml = methods.SubspaceMAML(mlp().to(how[1]), size=5, basis=basis, **options(how, inner_lr=3.0))

    def forward(w, phi, x):
        return families.mlp({**w, **{n: w[n] + (w[f"basis.U.{n}"] @ phi["basis.a"]).view_as(w[n]) for n in NAMES}}, x)

    agrees(maml, classify(), forward, lambda w, t: {"basis.a": torch.zeros(5, 1, dtype=torch.float64)}, lr=3.0)


# ---------------------------------------------------------------------------------------------------------------- heads
BODIES = {"adapted": NAMES[:4], "outer": [], "frozen": []}


def head_started(w, name: str, weight, bias, body: str):
    return {**{n: w[n] for n in BODIES[body]}, f"{name}.4.weight": weight, f"{name}.4.bias": bias}


def with_head(name: str):
    return lambda w, phi, x: families.mlp({**w, **phi, "4.weight": phi[f"{name}.4.weight"], "4.bias": phi[f"{name}.4.bias"]}, x)


@backends
@pytest.mark.parametrize("body", BODIES)
def test_zero_head(how, body: str) -> None:
    if body == "frozen":  # then nothing is outer-learned
        return
    maml = methods.ZeroHead(mlp().to(how[1]), body=body, **options(how))
    assert sorted(dict(maml.named_parameters())) == sorted(NAMES[:4])
    zeros = torch.zeros(4, 8, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    agrees(maml, classify(), with_head("zero_head"), lambda w, t: head_started(w, "zero_head", *(z.clone() for z in zeros), body))


@backends
@pytest.mark.parametrize("body", ["adapted", "outer"])
@pytest.mark.parametrize("even", [True, False])
def test_proto_maml(how, body: str, even: bool) -> None:
    """Triantafillou et al. 2020, eq. 4: W_n = 2 c_n, b_n = -|c_n|^2; tasks may have ways of their own."""
    maml, tasks = methods.ProtoMAML(mlp().to(how[1]), body=body, **options(how, inner_lr=0.1)), classify() if even else ragged()
    batch = fastmaml.TaskBatch.of(tasks)

    def start(w, t):
        x, y = batch.task(t)[0].double(), batch.task(t)[1]
        f = torch.tanh(F.linear(torch.tanh(F.linear(x, w["0.weight"], w["0.bias"])), w["2.weight"], w["2.bias"]))
        c = torch.stack([f[y == n].mean(0) if (y == n).any() else torch.zeros(8, dtype=torch.float64) for n in range(4)])
        return head_started(w, "proto_head", 2 * c, -(c**2).sum(1), body)

    agrees(maml, tasks, with_head("proto_head"), start, lr=0.1)


@backends
def test_prototypes_through_batch_norm_and_pooling(how) -> None:
    """The body's features at theta_0, with the statistics of the support rows of one task. (Small steps: at 0.05 rounding grows to 1e-5 here.)"""
    maml, tasks = methods.ProtoMAML(small_conv().to(how[1]), **options(how, inner_lr=0.01)), classify(**IMAGES)
    body = [n for n, _ in maml.named_parameters()]

    def start(w, t):
        eye = {"8.weight": torch.eye(45, dtype=torch.float64), "8.bias": torch.zeros(45, dtype=torch.float64)}
        f, y = families.conv({**w, **eye}, tasks[0][t].double()), tasks[1][t]
        c = torch.stack([f[y == n].mean(0) if (y == n).any() else torch.zeros(45, dtype=torch.float64) for n in range(4)])
        return {**{n: w[n] for n in body}, "proto_head.8.weight": 2 * c, "proto_head.8.bias": -(c**2).sum(1)}

    def forward(w, phi, x):
        return families.conv({**w, **phi, "8.weight": phi["proto_head.8.weight"], "8.bias": phi["proto_head.8.bias"]}, x)

    agrees(maml, tasks, forward, start, lr=0.01)


# ---------------------------------------------------------------------------------------------------------------- mixtures
def encoder() -> SetEncoder:
    torch.manual_seed(3)
    return SetEncoder(3, 4, size=6, hidden=10)


def embedded(w, name: str, x, y):
    """The encoder, written out."""
    p = lambda n: w[f"{name}.encoder.{n}"]  # noqa: E731
    y = y if y.is_floating_point() else F.one_hot(y, 4).double()
    h = torch.relu(F.linear(torch.cat([x, y], 1), p("rows.0.weight"), p("rows.0.bias")))
    return F.linear(torch.relu(F.linear(h, p("rows.2.weight"), p("rows.2.bias"))).mean(0), p("out.weight"), p("out.bias"))


@backends
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_mmaml(how, loss: str) -> None:
    """Vuorio et al. 2019: tau from the support set, FiLM of each layer, then MAML."""
    maml = methods.MMAML(mlp().to(how[1]), encoder(), **options(how, loss=loss))
    tasks = regress() if loss == "mse" else classify()
    tau: dict = {}

    def start(w, t):
        e = embedded(w, "mmaml", tasks[0][t].double(), tasks[1][t].double() if loss == "mse" else tasks[1][t])
        tau["now"] = [F.linear(e, w[f"mmaml.maps.{i}.weight"], w[f"mmaml.maps.{i}.bias"]).chunk(2) for i in range(2)]
        tau.setdefault("all", []).append(tau["now"])
        return {n: w[n] for n in NAMES}

    def forward(w, phi, x):
        (g0, b0), (g1, b1) = tau["now"]
        x = torch.tanh((1 + g0) * F.linear(x, phi["0.weight"], phi["0.bias"]) + b0)
        x = torch.tanh((1 + g1) * F.linear(x, phi["2.weight"], phi["2.bias"]) + b1)
        return F.linear(x, phi["4.weight"], phi["4.bias"])

    kw = {"lr": 0.3, "steps": 3, "loss": {"mse": F.mse_loss}.get(loss, F.cross_entropy)}
    _, expected, ends = truth(maml, tasks, forward, start, **kw)
    maml.meta_grad(tasks)
    assert families.distance(grads(maml), expected) <= BOUND[how[1]]
    adapted, close = maml.adapt(*tasks[:2]), {"rtol": 1e-4, "atol": 1e-5, "check_dtype": False}
    for t, end in enumerate(ends):
        tau["now"] = tau["all"][t]
        logits = forward({}, end, tasks[2][t].double()).detach()
        torch.testing.assert_close(adapted(tasks[2])[t], logits, **close)
        torch.testing.assert_close(adapted.module(t)(tasks[2][t].to(how[1])), logits, **close)


@backends
def test_hsml(how) -> None:
    """Yao et al. 2019: theta begins at theta_0 * sigmoid(W [g, h] + b)."""
    maml = methods.HSML(mlp().to(how[1]), encoder(), clusters=(3, 2), **options(how))
    tasks = classify()

    def start(w, t):
        p = lambda n: w[f"hsml.{n}"]  # noqa: E731
        g = embedded(w, "hsml", tasks[0][t].double(), tasks[1][t])
        below = [g]
        for level, many in enumerate((3, 2)):
            near = [torch.softmax(-((h - p(f"levels.{level}.centres")) ** 2).sum(1) / 2, 0) for h in below]
            maps = [(p(f"levels.{level}.maps.{k}.weight"), p(f"levels.{level}.maps.{k}.bias")) for k in range(many)]
            below = [sum(q[k] * torch.tanh(F.linear(h, *maps[k])) for q, h in zip(near, below, strict=True)) for k in range(many)]
        both = torch.cat([g, torch.tanh(F.linear(sum(below), p("root.weight"), p("root.bias")))])
        gates = [torch.sigmoid(F.linear(both, p(f"gates.{i}.weight"), p(f"gates.{i}.bias"))) for i in range(len(NAMES))]
        return {f"hsml.{n}": w[n] * gate.view_as(w[n]) for n, gate in zip(NAMES, gates, strict=True)}

    agrees(maml, tasks, lambda w, phi, x: families.mlp({**w, **{n: phi[f"hsml.{n}"] for n in NAMES}}, x), start)


@backends
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_mixture(how, loss: str) -> None:
    """Jerfel et al. 2019: each initialisation adapts; the outer losses are weighed by the responsibilities of the adapted ones for the support set."""
    maml = methods.Mixture(mlp().to(how[1]), components=2, temperature=0.5, **options(how, loss=loss))
    tasks, kind = (regress(), F.mse_loss) if loss == "mse" else (classify(), F.cross_entropy)
    w = {n: p.detach().double().requires_grad_() for n, p in maml.named_parameters()}
    assert sorted(w) == sorted(f"mixture.init.{n}" for n in NAMES)
    total, predictions, shares = 0.0, [], []
    for sx, sy, qx, qy in zip(*tasks, strict=True):
        sx, qx = sx.double(), qx.double()
        sy, qy = (sy.double(), qy.double()) if loss == "mse" else (sy, qy)
        support, query, outputs = [], [], []
        for m in range(2):
            phi = {n: w[f"mixture.init.{n}"][m] for n in NAMES}
            for _ in range(3):
                g = torch.autograd.grad(kind(families.mlp(phi, sx), sy), list(phi.values()), create_graph=True)
                phi = {n: v - 0.3 * d for (n, v), d in zip(phi.items(), g, strict=True)}
            support.append(kind(families.mlp(phi, sx), sy) * len(sx))
            outputs.append(families.mlp(phi, qx))
            query.append(kind(outputs[-1], qy))
        r = torch.softmax(-0.5 * torch.stack(support), 0).detach()
        total = total + (r * torch.stack(query)).sum() / 3
        shares.append(r)
        mean = sum(p * (z.softmax(1) if loss == "cross_entropy" else z) for p, z in zip(r, outputs, strict=True))
        predictions.append(mean.log() if loss == "cross_entropy" else mean)
    expected = dict(zip(w, torch.autograd.grad(total, list(w.values())), strict=True))
    for call in (lambda: maml(tasks).loss.backward(), lambda: maml.meta_grad(tasks)):
        call()
        assert families.distance(grads(maml), expected) <= BOUND[how[1]]
    close = {"rtol": 1e-4, "atol": 1e-5, "check_dtype": False}
    out, adapted = maml(tasks), maml.adapt(*tasks[:2])
    torch.testing.assert_close(out.responsibilities, torch.stack(shares), **close)
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(predictions).detach(), **close)
    torch.testing.assert_close(adapted(tasks[2]), torch.stack(predictions).detach(), **close)
    assert float(out.loss.detach()) == pytest.approx(float(total.detach()), rel=1e-5) == pytest.approx(float(out.task_losses.mean()), rel=1e-5)
    torch.testing.assert_close(adapted.module(1, 0)(tasks[2][1].to(how[1])), adapted.components([x for x in tasks[2] for _ in range(2)])[2], **close)
    assert len(adapted) == 3 and (loss == "mse" or 0 <= float(out.accuracy) <= 1)


def test_mixture_says_no() -> None:
    maml = methods.Mixture(mlp(), components=2)
    with pytest.raises(ValueError, match="outer_loss and a mixture together"):
        maml(classify(), outer_loss=lambda z, y: z.sum())
    with pytest.raises(ValueError, match="a mixture is a parameterisation of its own"):
        methods.Mixture(mlp(), parameterisation="anil")
    with pytest.raises(ValueError, match="without reset_parameters"):
        methods.Mixture(Bare())
    with pytest.raises(TypeError, match="encoder is str"):
        methods.MMAML(mlp(), "lstm")
    with pytest.raises(ValueError, match=r"encoder returns \[6\]"):
        methods.MMAML(mlp(), encoder(), size=5)(classify())


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(4, 3))

    def forward(self, x):
        return x @ self.w.T


# ---------------------------------------------------------------------------------------------------------------- the user's own
@backends
def test_own_parameterisation(how, monkeypatch: pytest.MonkeyPatch) -> None:
    """examples/own_parameterisation.py: W = U diag(s) V^t, s adapted. Under 40 lines, without the planner or an executor."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "examples")
    example = importlib.import_module("own_parameterisation")
    maml = MAML(mlp().to(how[1]), parameterisation=example.SingularValues(), **options(how))
    assert len(inspect.getsource(example.SingularValues).splitlines()) < 40

    def forward(w, phi, x):
        w, p = {**w, **phi}, "singular_values"
        return families.mlp({**w, **{f"{n}.weight": w[f"{p}.U.{n}.weight"] @ w[f"{p}.s.{n}.weight"].diag() @ w[f"{p}.V.{n}.weight"] for n in "024"}}, x)

    agrees(maml, classify(), forward, lambda w, t: {f"singular_values.s.{n}.weight": w[f"singular_values.s.{n}.weight"] for n in "024"})
    if how[0] == "cpu":
        before, after = example.main(iterations=20)
        assert after < before


def test_the_page_of_methods_runs() -> None:
    """The code of docs/methods.md."""
    text = (Path(__file__).parent.parent / "docs" / "methods.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {"fastmaml": fastmaml, "torch": torch, "model": mlp()}
    exec(code, names)
    maml, tasks = names["maml"], classify()

    def forward(w, phi, x):
        return families.mlp({**w, **{f"{n}.weight": w[f"{n}.weight"] * phi[f"gain.{n}.weight"].exp() for n in "024"}}, x)

    _, expected, _ = truth(maml, tasks, forward, lambda w, t: {f"gain.{n}.weight": w[f"gain.{n}.weight"] for n in "024"}, lr=0.1, steps=1)
    maml.meta_grad(tasks)
    assert families.distance(grads(maml), expected) <= 3e-6
    for name in re.findall(r"^\| `(\w+)\(", text, re.MULTILINE):
        assert name == "MAML" or hasattr(methods, name), name


# ---------------------------------------------------------------------------------------------------------------- what all of them do
EVERY = {
    "layerwise": lambda: methods.ANIL(mlp(), **OPTIONS),
    "scale_shift": lambda: methods.MTL(mlp(), adapt="both", **OPTIONS),
    "channel": lambda: methods.ChannelScaleShift(mlp(), **OPTIONS),
    "cavia": lambda: methods.CAVIA(mlp(), **OPTIONS),
    "t_net": lambda: methods.TNets(mlp(), **OPTIONS),
    "mt_net": lambda: methods.MTNets(mlp(), **OPTIONS),
    "low_rank": lambda: methods.LowRankMAML(mlp(), **OPTIONS),
    "basis": lambda: methods.SubspaceMAML(mlp(), **OPTIONS),
    "zero_head": lambda: methods.ZeroHead(mlp(), **OPTIONS),
    "proto_head": lambda: methods.ProtoMAML(mlp(), **OPTIONS),
    "mmaml": lambda: methods.MMAML(mlp(), encoder(), **OPTIONS),
    "hsml": lambda: methods.HSML(mlp(), encoder(), **OPTIONS),
}


def seeded(maml: MAML) -> dict:
    return {"task_seeds": [1, 2, 3]} if maml.parameterisation.has_prologue else {}


@pytest.mark.parametrize("name", EVERY)
def test_state_goes_into_its_like_alone(name: str) -> None:
    maml, tasks = EVERY[name](), classify()
    optimizer = torch.optim.SGD(maml.parameter_groups(), lr=0.1)
    maml(tasks, **seeded(maml)).loss.backward()
    optimizer.step()
    state, other = maml.state_dict(), EVERY[name]()
    other.load_state_dict(pickle.loads(pickle.dumps(state)))
    assert torch.equal(other(tasks, **seeded(maml)).loss, maml(tasks, **seeded(maml)).loss)
    for wrong in (MAML(mlp()), methods.ANIL(mlp(), head=["4.weight"])):
        with pytest.raises(RuntimeError, match="saved with parameterisation .*, this object has"):
            wrong.load_state_dict(state)
    with pytest.raises(RuntimeError, match="saved with parameterisation full, this object has"):
        maml.load_state_dict(MAML(mlp()).state_dict())
    wrapped, again = nn.ModuleDict({"maml": maml}), nn.ModuleDict({"maml": EVERY[name]()})
    again.load_state_dict(wrapped.state_dict())
    assert torch.equal(again["maml"](tasks, **seeded(maml)).loss, maml(tasks, **seeded(maml)).loss)


@pytest.mark.parametrize("name", EVERY)
def test_copies_and_dtypes(name: str) -> None:
    maml, tasks = EVERY[name](), classify()
    for other in (copy.deepcopy(maml), pickle.loads(pickle.dumps(maml))):
        assert torch.equal(other(tasks, **seeded(maml)).loss, maml(tasks, **seeded(maml)).loss)
    double = copy.deepcopy(maml).double()
    assert all(p.dtype is torch.float64 for p in double.parameters())
    assert float(double(tasks, **seeded(maml)).loss.detach()) == pytest.approx(float(maml(tasks, **seeded(maml)).loss.detach()), rel=1e-5)
    assert double.executor == "torch"


@pytest.mark.parametrize("name", EVERY)
def test_entries_and_steps(name: str) -> None:
    """Any number of steps, ragged tasks, evaluation without gradients, more steps than are kept."""
    maml, batch = EVERY[name](), ragged()
    for steps in (0, 1, 12):
        out = maml(batch, inner_steps=steps, **seeded(maml))
        out.loss.backward()
        with torch.no_grad():
            assert float(maml(batch, inner_steps=steps, **seeded(maml)).loss) == pytest.approx(float(out.loss.detach()), rel=1e-6)
        assert len(maml.adapt(batch, inner_steps=steps, **seeded(maml))) == 3
    assert f"parameterisation {maml.parameterisation.signature}" in maml.explain(batch)


@pytest.mark.parametrize("name", EVERY)
def test_same_gradient_on_every_arrangement(name: str) -> None:
    """Learned rates, one step (its activations are kept), memory="fast", first order: cpu in float32 against torch in float64."""
    for more in ({"inner_steps": 1}, {"memory": "fast"}, {"learn_inner_lr": True}, {"first_order": True}):
        maml, tasks = EVERY[name](), classify()
        torch.manual_seed(0)
        made = MAML(mlp(), parameterisation=again(maml.parameterisation), **{**OPTIONS, **more})
        moved(made)
        double = copy.deepcopy(made).double()
        for m in (made, double):
            m.meta_grad(tasks, **seeded(m))
        assert (made.executor, double.executor) == ("cpu", "torch")
        assert families.distance(grads(made), {n: None if g is None else g for n, g in grads(double).items()}) <= 3e-6, more


@pytest.mark.parametrize("name", [n for n in EVERY if n not in ("channel", "mmaml", "proto_head")])
def test_a_model_that_cannot_be_traced(name: str) -> None:
    """backend="autograd": the same expressions around one opaque module."""
    maml, tasks = EVERY[name](), classify()
    torch.manual_seed(0)
    for more in ({}, {"inner_steps": 1}, {"learn_inner_lr": True}):
        traced = MAML(mlp().double(), parameterisation=again(maml.parameterisation), **{**OPTIONS, "backend": "torch", **more})
        moved(traced)
        opaque = copy.deepcopy(traced)
        opaque.backend = "autograd"
        for m in (traced, opaque):
            m(tasks, **seeded(m)).loss.backward()
        assert opaque.executor == "autograd"
        assert families.distance(grads(opaque), {n: g for n, g in grads(traced).items()}) <= 1e-11, more
        torch.testing.assert_close(opaque.adapt(*tasks[:2], **seeded(opaque))(tasks[2]), traced.adapt(*tasks[:2], **seeded(traced))(tasks[2]))


@pytest.mark.parametrize("name", ["channel", "mmaml", "proto_head"])
def test_what_needs_a_trace(name: str) -> None:
    maml = EVERY[name]()
    maml.backend = "autograd"
    with pytest.raises(ValueError, match="cannot be traced"):
        maml(classify())


def again(p: Parameterisation) -> Parameterisation:
    given = dict(p.settings())
    kinds = {"layerwise": Layerwise, "scale_shift": ScaleShift, "cavia": Context, "t_net": TNet, "mt_net": TNet, "low_rank": LowRank, "basis": Basis}
    kinds |= {"mmaml": lambda size, layers: Modulation(encoder(), size, layers), "hsml": lambda size, clusters: Gated(encoder(), size, clusters)}
    kinds |= {"zero_head": partial(Head, "zero"), "proto_head": partial(Head, "prototypes")}
    return kinds[p.name](**given)


def test_outer_rates_by_group() -> None:
    maml = methods.MTL(mlp(), learn_inner_lr=True)
    groups = maml.parameter_groups({"scale_shift": 1e-4, "model": 1e-3})
    assert [(g["name"], g.get("lr"), len(g["params"])) for g in groups] == [("model", 1e-3, 2), ("scale_shift", 1e-4, 4), ("inner_lr", None, 1)]
    assert sorted(map(id, maml.parameters())) == sorted(id(p) for g in groups for p in g["params"])
    torch.optim.Adam(groups, lr=0.01)
    with pytest.raises(ValueError, match="no group 'head'; the groups are model, scale_shift, inner_lr"):
        maml.parameter_groups({"head": 1.0})


def test_pretrained_weights() -> None:
    body = {n: torch.randn_like(v) for n, v in mlp().state_dict().items() if not n.startswith("4")}
    maml = methods.MTL(mlp(), pretrained=body)
    assert torch.equal(maml.model[0].weight, body["0.weight"])
    with pytest.raises(ValueError, match="pretrained has 'fc.weight', which the model has not"):
        methods.MTL(mlp(), pretrained={"fc.weight": torch.ones(2)})


WRONG = {
    "name": (lambda: MAML(mlp(), parameterisation="lora"), "parameterisation='lora': choose one of 'full', 'anil', 'boil'"),
    "class": (lambda: MAML(mlp(), parameterisation=Layerwise), "choose one of"),
    "twice": (lambda: [MAML(mlp(), parameterisation=p) for p in [Layerwise()] * 2], "already belongs to a MAML object"),
    "adapt too": (lambda: MAML(mlp(), adapt="4.*", parameterisation="anil"), "say what is adapted in one of them"),
    "adapt with own": (lambda: methods.CAVIA(mlp(), adapt="4.*"), "the parameterisation says what is adapted"),
    "pattern": (lambda: methods.ANIL(mlp(), head="fc.*"), r"adapt='fc\.\*' matches none of 0.weight"),
    "both": (lambda: MAML(mlp(), parameterisation=Layerwise("4.*", frozen="*")), "both adapted and frozen"),
    "no head": (lambda: methods.ANIL(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten())), "no Linear layer that could be its head"),
    "scale_shift": (lambda: ScaleShift("fc"), "adapt='fc': choose one of 'head'"),
    "nothing to scale": (lambda: methods.MTL(nn.Linear(3, 4)), "no Linear or Conv2d layer below its head"),
    "context": (lambda: methods.CAVIA(small_conv()), "a first layer that is a Linear"),
    "mask": (lambda: TNet("units"), "mask='units': choose None"),
    "temperature": (lambda: TNet("unit", temperature=0), "expected a number above 0"),
    "rank": (lambda: LowRank(0), "rank=0: expected a whole number"),
    "basis": (lambda: methods.SubspaceMAML(mlp(), basis="pca"), "basis='pca': choose 'random'"),
    "basis shape": (lambda: methods.SubspaceMAML(mlp(), basis={"0.weight": torch.ones(3, 8)}), r"basis\['0.weight'\] has shape \[3, 8\]: expected \[24, 8\]"),
    "rates per step": (lambda: methods.MTNets(mlp(), inner_lr=[0.1])(classify()), "one rate per task, layer or element"),
    "given here": (lambda: fastmaml.functional.adapt(mlp(), dict(mlp().named_parameters()), *classify()[:2], parameterisation=LowRank()), "use fastmaml.MAML"),
    "film": (lambda: methods.ChannelScaleShift(twice(), layers="0.weight")(classify(shape=(4,))), "2 layers read it as their weight"),
}


def test_names_of_the_models_own() -> None:
    """A layer called rate is not a rate; an object whose MAML could not be built may be used again."""
    net = nn.Sequential()
    net.add_module("rate", nn.Linear(3, 8))
    net.add_module("head", nn.Linear(8, 4))
    maml, tasks = methods.ANIL(net, **OPTIONS), classify()
    assert maml.adapt(*tasks[:2])(tasks[2]).shape == (3, 7, 4)
    given = LowRank()
    with pytest.raises(TypeError, match="inner_lr is 'fast'"):
        MAML(mlp(), parameterisation=given, inner_lr="fast")
    assert MAML(mlp(), parameterisation=given)(tasks).loss.isfinite()


def twice() -> nn.Module:
    class Twice(nn.Sequential):
        def forward(self, x):
            return self[1](self[0](self[0](x)))

    return Twice(nn.Linear(4, 4), nn.Linear(4, 4))


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name: str) -> None:
    call, message = WRONG[name]
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_verify_says_what_it_knows() -> None:
    with pytest.raises(NotImplementedError, match="knows no parameterisation t_net"):
        methods.TNets(mlp()).verify(classify())


def test_module_without_a_place_for_the_shift() -> None:
    net = small_conv()
    net[1] = nn.BatchNorm2d(4, affine=False, track_running_stats=False)
    maml, tasks = methods.CAVIA(net, layers="0.weight", **OPTIONS), classify(**IMAGES)
    with pytest.raises(NotImplementedError, match="no affine that could take"):
        maml.adapt(*tasks[:2]).module(0)


