"""What users call, against a plain torch loop on the same nn.Module: gradients, options, and the habits of training loops."""

from __future__ import annotations

import pickle

import pytest
import torch
import torch.nn.functional as F
from maml_cases import BOUND, LOSSES, agrees, backends, made
from plain_loop import classify, distance, grads, mlp, one_thread, plain_loop, ragged, regress  # noqa: F401
from torch import nn

from fastmaml import MAML, NonFiniteError, TaskBatch


# ---------------------------------------------------------------------------------------------------------------- the gradient
@backends
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("how_called", ["backward", "meta_grad", "meta_grad twice", "outer_loss", "meta_grad outer_loss"])
def test_gradient(how, loss: str, how_called: str) -> None:
    maml, tasks = made(how, loss=loss), regress() if loss == "mse" else classify()

    def outer(logits, y):  # what the built-in losses compute: the mean over tasks
        y = y if loss == "cross_entropy" else y.to(logits.dtype)  # torch 2.11 has no mse_loss of two dtypes
        return LOSSES[loss](logits.flatten(0, 1), y.flatten(0, 1))

    def call() -> None:
        if "meta_grad" in how_called:
            for _ in range(1 + ("twice" in how_called)):
                maml.meta_grad(tasks, outer_loss=outer if "outer" in how_called else None)
        else:
            maml(tasks, outer_loss=outer if "outer" in how_called else None).loss.backward()

    agrees(maml, tasks, call, 2.0 if "twice" in how_called else 1.0, loss=LOSSES[loss])
    assert maml.executor == how[0]


@backends
def test_outputs(how) -> None:
    maml, tasks = made(how), classify()
    out, truth = maml(tasks), plain_loop(maml.model, tasks, lr=0.3, steps=3)
    close = {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(out.loss.detach(), truth.loss, **close)
    torch.testing.assert_close(out.logits.detach(), torch.stack(truth.logits), **close)
    torch.testing.assert_close(out.task_losses.detach(), truth.task_losses, **close)
    torch.testing.assert_close(out.support_losses.detach(), truth.support_losses, **close)
    right = (torch.stack(truth.logits).argmax(2) == tasks[3]).double().mean(1)
    torch.testing.assert_close(out.task_accuracy, right, **close)
    assert float(out.accuracy) == pytest.approx(float(right.mean()))
    assert out.finite.tolist() == [True] * 3
    assert out.executor == maml.executor == how[0]
    assert out.precision == {torch.float32: "highest", torch.float64: "float64"}[how[1]]


@backends
@pytest.mark.parametrize("options", [{"inner_steps": 0}, {"inner_steps": 1}, {"first_order": True}, {"memory": "fast"}, *({"reduction": r} for r in ("sum", 5))], ids=str)
def test_options(how, options: dict) -> None:
    divisor = {"sum": 1.0, 5: 5.0}.get(options.get("reduction"))
    loss = F.cross_entropy if divisor is None else lambda z, y: F.cross_entropy(z, y, reduction="sum") / divisor
    truth = {"steps": options.get("inner_steps", 3), "first_order": options.get("first_order", False), "loss": loss}
    agrees(made(how, inner_lr=0.05, **options), classify(), lr=0.05, **truth)


@backends
def test_loss_modules(how) -> None:
    weight = torch.tensor([1.0, 2.0, 0.5, 1.5])
    agrees(made(how, loss=nn.CrossEntropyLoss(weight, label_smoothing=0.1)), classify(), loss=lambda z, y: F.cross_entropy(z, y, weight.to(z), label_smoothing=0.1))
    agrees(made(how, loss=nn.MSELoss(reduction="sum"), inner_lr=0.01), regress(), lr=0.01, loss=lambda z, y: F.mse_loss(z, y, reduction="sum"))


@backends
def test_step_loss_weights(how) -> None:
    maml, tasks = made(how, step_loss_weights=[0.2, 0.3, 0.5]), classify()
    agrees(maml, tasks, step_weights=[0, 0.2, 0.3, 0.5])
    maml.step_loss_weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)  # annealed
    agrees(maml, tasks, step_weights=[0.1, 0.2, 0.3, 0.4])


@backends
def test_task_weights(how) -> None:
    maml, tasks = made(how), classify()
    agrees(maml, tasks, lambda: maml(tasks, task_weights=[0.5, 0.0, 2.0]).loss.backward(), task_weights=[0.5, 0.0, 2.0])
    loss = maml(tasks, task_weights=torch.tensor([0.5, 0.0, 2.0])).loss
    assert loss.item() == pytest.approx(float(plain_loop(maml.model, tasks, lr=0.3, steps=3, task_weights=[0.5, 0.0, 2.0]).loss), rel=1e-5)


@backends
def test_tasks_of_different_sizes(how) -> None:
    maml, batch = made(how), ragged()
    agrees(maml, batch)
    out, truth = maml(batch), plain_loop(maml.model, batch, lr=0.3, steps=3)
    assert [list(z.shape) for z in out.logits] == [[5, 4], [7, 4], [9, 4]]
    for z, expected, w in zip(out.logits, truth.logits, (2, 4, 3), strict=True):
        torch.testing.assert_close(z.detach()[:, :w], expected[:, :w], rtol=1e-5, atol=1e-5, check_dtype=False)

    def outer(logits, y):
        return sum(F.cross_entropy(z, t) for z, t in zip(logits, y, strict=True))

    plain = TaskBatch.from_tasks(list(batch))
    agrees(maml, plain, lambda: maml(plain, outer_loss=outer).loss.backward(), outer=outer)


def test_query_sizes_equal_and_support_sizes_not() -> None:
    tasks = [tuple(v[: n if i < 2 else 4] for i, v in enumerate(task)) for n, task in zip((3, 5), zip(*classify(2, 5, 4), strict=True), strict=True)]
    seen = {}

    def outer(logits, y):
        seen.update(logits=logits.shape, y=y.shape)
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())

    made()(tasks, outer_loss=outer)
    assert seen == {"logits": (2, 4, 4), "y": (2, 4)}


def test_every_form_of_tasks() -> None:
    maml, (sx, sy, qx, qy) = made(), classify()
    forms = [
        (sx, sy, qx, qy),
        [sx, sy, qx, qy],
        TaskBatch.from_tensors(sx, sy, qx, qy),
        {"train": (sx, sy), "test": (qx, qy)},
        {"support": [sx, sy], "query": [qx, qy]},
        list(zip(sx, sy, qx, qy, strict=True)),
        tuple(v.numpy() for v in (sx, sy, qx, qy)),
        (sx, sy.int(), qx, qy.to(torch.uint8)),
        (sx.double(), sy, qx.double(), qy),
    ]
    losses = [maml(form).loss.item() for form in forms]
    assert losses == [losses[0]] * len(forms)


def test_bytes_are_images() -> None:
    sx, sy, qx, qy = classify()
    sx, qx = (sx * 3).to(torch.uint8), (qx * 3).to(torch.uint8)
    agrees(made(inner_lr=0.001), (sx, sy, qx, qy), lr=0.001)


# ---------------------------------------------------------------------------------------------------------------- rates
W, B = "0.weight", "4.bias"  # of mlp()
RATES = {
    "scalar": 0.2,
    "per step": [0.3, 0.2, 0.1],
    "by name": {"*": 0.2, "4.*": 0.1},
    "by layer": {"0": 0.3, "2": 0.2, "4.*": 0.1},
    "by layer and step": {"*": 0.2, "2": [0.3, 0.2, 0.1]},
    "by name and step": {"*": 0.2, W: [0.3, 0.2, 0.1]},
    "per element": {"*": 0.2, W: torch.linspace(0.1, 0.3, 24).view(8, 3), B: torch.linspace(0.1, 0.3, 4)},
    "per element and step": {"*": 0.2, W: torch.linspace(0.1, 0.3, 72).view(3, 8, 3)},
    "all elements": {n: torch.linspace(0.1, 0.3, p.numel()).view(p.shape) for n, p in mlp().named_parameters()},
}


def rate_function(maml: MAML, values: dict):
    def rate(name: str, k: int):
        r = maml.rates.rates[name]
        value = values[r.name]
        return value[k] if r.per_step else value

    return rate


@backends
@pytest.mark.parametrize("form", RATES)
@pytest.mark.parametrize("options", [{}, {"first_order": True}, {"step_loss_weights": [0.0, 0.2, 0.3, 0.5]}], ids=["second", "first", "multi"])
def test_learned_rates(how, form: str, options: dict) -> None:
    tasks = classify()
    maml = made(how, inner_lr=RATES[form], learn_inner_lr=True, **options)
    values = {n: v.detach().double().clone().requires_grad_() for n, v in maml.rates.values.items()}
    truth = plain_loop(
        maml.model,
        tasks,
        lr=rate_function(maml, values),
        steps=3,
        learned=values,
        first_order="first_order" in options,
        step_weights=options.get("step_loss_weights"),
    )
    maml(tasks).loss.backward()
    found = grads(maml)
    assert distance(found, truth.gradients) <= BOUND[how[1]]
    rates = list(values)
    assert distance({n: found[n] for n in rates}, {n: truth.gradients[n] for n in rates}) <= 10 * BOUND[how[1]]
    for _ in range(2):  # set, then added to
        maml.meta_grad(tasks)
    assert distance({n: g / 2 for n, g in grads(maml).items()}, truth.gradients) <= BOUND[how[1]]


@backends
@pytest.mark.parametrize("form", RATES)
def test_fixed_rates(how, form: str) -> None:
    maml = made(how, inner_lr=RATES[form])
    agrees(maml, classify(), lr=rate_function(maml, maml.rates.values))
    assert [n for n, _ in maml.named_parameters()] == [n for n, _ in maml.model.named_parameters()]


@backends
def test_steps_and_rates_of_a_call(how) -> None:
    maml, tasks = made(how), classify()
    agrees(maml, tasks, lambda: maml(tasks, inner_steps=1).loss.backward(), steps=1)
    agrees(maml, tasks, lambda: maml(tasks, inner_lr=0.1).loss.backward(), lr=0.1)
    agrees(maml, tasks, lambda: maml.meta_grad(tasks, inner_lr=0.1, inner_steps=2), lr=0.1, steps=2)
    agrees(maml, tasks)
    per_step = made(how, inner_lr=[0.3, 0.2, 0.1])
    agrees(per_step, tasks, lambda: per_step(tasks, inner_lr=[0.1, 0.2], inner_steps=2).loss.backward(), steps=2, lr=lambda n, k: 0.1 * (k + 1))


def test_learned_rates_of_steps_that_did_not_run_get_zeros() -> None:
    maml, tasks = made(inner_lr=[0.3, 0.2, 0.1], learn_inner_lr=True), classify()
    for _ in range(2):
        maml.meta_grad(tasks, inner_steps=2)
    g = maml.rates.values["inner_lr"].grad
    assert g.shape == (3,) and g[2] == 0 and (g[:2] != 0).all()


def test_annealing_builds_no_plan(monkeypatch) -> None:
    maml, tasks = made(step_loss_weights=[0.2, 0.3, 0.5]), classify()
    losses = {maml(tasks).loss.item()}
    monkeypatch.setattr("fastmaml.engine.build_plan", lambda *a: pytest.fail("a Plan was built"))
    for i in range(1, 4):
        maml.step_loss_weights = [0.2 + i, 0.3, 0.5]
        losses.add(maml(tasks, inner_lr=0.3 / (1 + i)).loss.item())
    assert len(losses) == 4


# ---------------------------------------------------------------------------------------------------------------- non-finite tasks
def broken() -> tuple:
    sx, sy, qx, qy = classify()
    qx = qx.clone()
    qx[1, 0, 0] = float("nan")
    return sx, sy, qx, qy


@backends
@pytest.mark.parametrize("call", ["call", "meta_grad", "outer_loss"])
def test_a_non_finite_task_raises(how, call: str) -> None:
    maml = made(how)
    for p in maml.parameters():
        p.grad = torch.ones_like(p)

    def run() -> None:
        if call == "meta_grad":
            maml.meta_grad(broken())
        else:
            outer = None if call == "call" else lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten())
            maml(broken(), outer_loss=outer).loss.backward()

    with pytest.raises(NonFiniteError, match=r"1 task\(s\) is not finite: 1\..*on_nonfinite='skip'") as caught:
        run()
    assert caught.value.tasks == [1]
    assert pickle.loads(pickle.dumps(caught.value)).tasks == [1]
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in maml.parameters())


@backends
@pytest.mark.parametrize("call", ["call", "meta_grad", "meta_grad added"])
def test_a_non_finite_task_is_left_out(how, call: str) -> None:
    maml = made(how, on_nonfinite="skip")
    good = [v[[0, 2]] for v in classify()]
    expected = plain_loop(maml.model, good, lr=0.3, steps=3, task_weights=[1 / 3, 1 / 3]).gradients
    if call == "meta_grad added":
        for p in maml.parameters():
            p.grad = torch.zeros_like(p)
    with pytest.warns(UserWarning, match=r"1 task\(s\).*left out: \[1\]") as caught:
        out = maml.meta_grad(broken()) if "meta_grad" in call else maml(broken())
    assert caught[0].filename == __file__
    if call == "call":
        out.loss.backward()
    assert distance(grads(maml.model), expected) <= BOUND[how[1]]
    assert out.finite.tolist() == [True, False, True] and torch.isfinite(out.loss)
