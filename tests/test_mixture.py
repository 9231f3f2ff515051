"""MMAML, HSML and mixtures of initialisations, against their equations."""

from __future__ import annotations

import families
import pytest
import torch
import torch.nn.functional as F
from families import truth
from helpers_families import NAMES, agrees, backends, encoder, grads, options
from maml_cases import BOUND
from plain_loop import classify, mlp, one_thread, regress  # noqa: F401
from torch import nn

from fastmaml import TaskBatch, methods
from fastmaml.parameterisation import SetEncoder


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


def gated(tasks):
    """Yao et al. 2019: theta begins at theta_0 * sigmoid(W [g, h] + b)."""

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

    return lambda w, phi, x: families.mlp({**w, **{n: phi[f"hsml.{n}"] for n in NAMES}}, x), start


@backends
def test_hsml(how) -> None:
    maml = methods.HSML(mlp().to(how[1]), encoder(), clusters=(3, 2), **options(how))
    assert maml.parameterisation.reconstruction == 0
    agrees(maml, classify(), *gated(classify()))


def decoded(w, x, y):
    """The pooling autoencoder of the authors' code: half the mean squared error of rows and targets."""
    p = lambda n: w[f"hsml.encoder.{n}"]  # noqa: E731
    rows = torch.cat([x, y if y.is_floating_point() else F.one_hot(y, 4).double()], 1)
    h = torch.relu(F.linear(torch.relu(F.linear(rows, p("rows.0.weight"), p("rows.0.bias"))), p("rows.2.weight"), p("rows.2.bias")))
    back = F.linear(torch.relu(F.linear(h, p("back.0.weight"), p("back.0.bias"))), p("back.2.weight"), p("back.2.bias"))
    return ((rows - back) ** 2).mean() / 2


@backends
@pytest.mark.parametrize("weights", [None, [0.5, 0.2, 1.1]], ids=["mean", "weights"])
def test_hsml_with_its_reconstruction_loss(how, weights) -> None:
    """L_Q + xi L_r, in every way of calling; xi large, so that neither hides the other."""
    torch.manual_seed(3)
    auto = SetEncoder(3, 4, size=6, hidden=10, decoder=True)
    maml = methods.HSML(mlp().to(how[1]), auto, clusters=(3, 2), reconstruction=2.0, **options(how))
    tasks = classify()
    forward, start = gated(tasks)
    penalties = []

    def start_and_penalty(w, t):
        penalties.append((weights[t] if weights else 1 / 3) * 2.0 * decoded(w, tasks[0][t].double(), tasks[1][t]))
        return start(w, t)

    w = {}
    loss, expected, _ = truth(maml, tasks, forward, lambda v, t: (w.update(v), start_and_penalty(v, t))[1], lr=0.3, steps=3, weights=weights)
    names = list(expected)
    of_penalty = torch.autograd.grad(sum(penalties), [w[n] for n in names], allow_unused=True)
    expected = {n: h if g is None else g if h is None else g + h for (n, g), h in zip(expected.items(), of_penalty, strict=True)}
    whole = float(loss + sum(penalties).detach())

    def outer(logits, y):
        return sum((weights[t] if weights else 1 / 3) * F.cross_entropy(logits[t], y[t]) for t in range(3))

    calls = {
        "backward": lambda: maml(tasks, task_weights=weights),
        "scaled": lambda: maml(tasks, task_weights=weights),
        "meta_grad": lambda: maml.meta_grad(tasks, task_weights=weights),
    }
    if weights is None:
        calls |= {"outer_loss": lambda: maml(tasks, outer_loss=outer), "outer_loss scaled": lambda: maml(tasks, outer_loss=outer)}
    for name, call in calls.items():
        out = call()
        assert float(out.loss.detach()) == pytest.approx(whole, rel=1e-5), name
        assert out.penalty.shape == (3,) and not out.penalty.requires_grad
        times = 3.0 if "scaled" in name else 1.0
        if name != "meta_grad":
            (times * out.loss).backward()
        found = {n: None if g is None else g / times for n, g in grads(maml).items()}
        assert families.distance(found, expected) <= BOUND[how[1]], name
    with torch.no_grad():
        out = maml(tasks, task_weights=weights)
    assert float(out.loss) == pytest.approx(whole, rel=1e-5)
    shares = torch.tensor(weights or [1 / 3] * 3).to(out.task_losses)
    assert float(out.task_losses @ shares) == pytest.approx(float(loss), rel=1e-5)


def test_reconstruction_is_verified_kept_and_refused() -> None:
    def auto() -> SetEncoder:
        return SetEncoder(3, 4, size=6, hidden=10, decoder=True)

    maml = methods.HSML(mlp(), auto(), **options(["cpu"]))
    assert maml.parameterisation.signature == "hsml(size=6, clusters=(4, 2), reconstruction=0.01)"  # the authors' weight
    assert methods.HSML(mlp(), auto(), reconstruction=0).parameterisation.signature == "hsml(size=6, clusters=(4, 2))"
    said = methods.HSML(mlp(), auto(), reconstruction=5.0, **options(["cpu"])).verify(classify(), repeats=1)
    assert said.ok and said.plan_error <= 1e-11
    with pytest.raises(RuntimeError, match="was saved with parameterisation hsml.*reconstruction=0.01"):
        methods.HSML(mlp(), auto(), reconstruction=0.5).load_state_dict(maml.state_dict())
    with pytest.raises(ValueError, match=r"reconstruction=0.01 needs an encoder with autoencode.*SetEncoder has none"):
        methods.HSML(mlp(), encoder(), reconstruction=0.01)
    for wrong in (-1, "yes", True, float("inf")):
        with pytest.raises(ValueError, match=f"reconstruction={wrong!r}: expected a finite number of at least 0"):
            methods.HSML(mlp(), auto(), reconstruction=wrong)
    with pytest.raises(ValueError, match="this SetEncoder has no decoder"):
        encoder().autoencode(*classify()[0][:1], classify()[1][0])


def test_a_task_that_is_not_finite_adds_no_penalty() -> None:
    torch.manual_seed(3)
    maml = methods.HSML(mlp(), SetEncoder(3, 4, size=6, hidden=10, decoder=True), reconstruction=2.0, on_nonfinite="skip", **options(["cpu"]))
    tasks = classify()
    broken = [v.clone() for v in tasks]
    broken[2][1] = float("nan")  # its query rows
    share = 2 / 3
    with pytest.warns(UserWarning, match="not finite"):
        maml.meta_grad(broken)
    found = {n: None if g is None else g / share for n, g in grads(maml).items()}
    maml.meta_grad([v[[0, 2]] for v in tasks])
    assert families.distance(found, {n: None if g is None else g.double() for n, g in grads(maml).items()}) <= 1e-5


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
    if loss == "cross_entropy":
        right = torch.stack([z.argmax(1) == y for z, y in zip(predictions, tasks[3], strict=True)]).float().mean(1)
        torch.testing.assert_close(out.task_accuracy, right, check_dtype=False)


def test_mixture_explained_and_kept() -> None:
    """A row for each component: so many tasks, and a state of its own."""
    maml, tasks = methods.Mixture(mlp(), components=2), classify()
    assert maml.explain(tasks).startswith("parameterisation mixture(components=2): adapted: mixture.0.weight")
    assert maml.explain(tasks) == super(type(maml), maml).explain(TaskBatch.of([v.repeat_interleave(2, 0) for v in tasks]))
    assert maml.memory_bytes(tasks).keys() == methods.ANIL(mlp()).memory_bytes(tasks).keys()
    other = methods.Mixture(mlp(), components=2)
    other.load_state_dict(maml.state_dict())
    assert torch.equal(other(tasks).loss, maml(tasks).loss)
    with pytest.raises(RuntimeError, match=r"saved with parameterisation mixture\(components=2\), this object has mixture\(components=3\)"):
        methods.Mixture(mlp(), components=3).load_state_dict(maml.state_dict())


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


@pytest.mark.parametrize("floats", [True, False])
def test_sets_at_once(floats: bool) -> None:
    """A SetEncoder reads sets of different sizes as it reads them one by one."""
    encode, sizes = SetEncoder(3, 4, size=6, hidden=10, decoder=True).double(), (5, 1, 8)
    x = torch.randn(14, 3, dtype=torch.float64)
    y = torch.randn(14, 4, dtype=torch.float64) if floats else torch.randint(4, (14,))
    one_by_one = [encode.autoencode(*rows) for rows in zip(x.split(sizes), y.split(sizes), strict=True)]
    vectors, losses = encode.autoencode(x, y, sizes)
    torch.testing.assert_close(vectors, torch.stack([v for v, _ in one_by_one]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(losses, torch.stack([loss for _, loss in one_by_one]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(encode(x, y, sizes), vectors)
