"""maml.adapt: the networks that the inner loop leaves behind."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from maml_cases import BACKENDS, conv_net, made
from plain_loop import classify, grads, mlp, one_thread, plain_loop, ragged, regress  # noqa: F401
from torch import nn

from fastmaml import TaskBatch

backends = pytest.mark.parametrize("how", BACKENDS, ids=str)
CLOSE = {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False}


@backends
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_adapted(how, steps: int) -> None:
    maml, (sx, sy, qx, qy) = made(how, inner_steps=steps), classify()
    truth = plain_loop(maml.model, (sx, sy, qx, qy), lr=0.3, steps=steps)
    adapted = maml.adapt(sx, sy)
    assert len(adapted) == 3
    torch.testing.assert_close(adapted(qx), torch.stack(truth.logits), **CLOSE)
    torch.testing.assert_close(adapted.support_losses, truth.support_losses, **CLOSE)
    assert adapted.support_losses.shape == (3, steps)
    for name, w in adapted.weights.items():
        torch.testing.assert_close(w, torch.stack([theta[name] for theta in truth.adapted]), **CLOSE)
    for t in (0, 2, -1):
        module = adapted.module(t)
        assert type(module) is type(maml.model) and module is not maml.model
        torch.testing.assert_close(module(qx[t].to(how[1])), truth.logits[t], **CLOSE)
    assert all(p.grad is None for p in maml.parameters()) and not adapted(qx).requires_grad


@backends
def test_every_form(how) -> None:
    maml, batch = made(how), ragged()
    truth = plain_loop(maml.model, batch, lr=0.3, steps=3)
    sx, sy, qx, _ = zip(*batch, strict=True)
    for adapted in (maml.adapt(batch), maml.adapt(sx, sy, ways=[2, 4, 3]), maml.adapt(list(sx), list(sy), ways=torch.tensor([2, 4, 3]))):
        logits = adapted(list(qx))
        assert isinstance(logits, tuple) and [len(z) for z in logits] == [5, 7, 9]
        for z, expected, w in zip(logits, truth.logits, (2, 4, 3), strict=True):
            torch.testing.assert_close(z[:, :w], expected[:, :w], **CLOSE)
    more = adapted([x[:1] for x in qx])  # other sizes, on the same object
    torch.testing.assert_close(torch.cat(more), torch.cat([z[:1] for z in logits]), **CLOSE)
    assert adapted(torch.stack([x[:2] for x in qx])).shape == (3, 2, 4)


def test_numpy_arrays_and_bytes() -> None:
    maml, (sx, sy, qx, _) = made(), classify()
    expected = maml.adapt(sx, sy)(qx)
    torch.testing.assert_close(maml.adapt(sx.numpy(), sy.numpy())(qx.double()), expected, **CLOSE)
    images = (sx * 3).to(torch.uint8)
    torch.testing.assert_close(maml.adapt(images, sy)(images), maml.adapt(images.float(), sy)(images.float()), **CLOSE)


def test_regression_and_options() -> None:
    maml, (sx, sy, qx, qy) = made(loss="mse"), regress()
    truth = plain_loop(maml.model, (sx, sy, qx, qy), lr=0.1, steps=2, loss=F.mse_loss)
    torch.testing.assert_close(maml.adapt(sx, sy, inner_lr=0.1, inner_steps=2)(qx), torch.stack(truth.logits), **CLOSE)


def test_integer_labels_only_of_the_support() -> None:
    """The query targets are nobody's business here."""
    sx, sy, qx, _ = classify()
    adapted = made().adapt(TaskBatch.from_tensors(sx, sy, qx, torch.full((3, 7), 99)))
    assert adapted(qx).shape == (3, 7, 4)


@pytest.mark.parametrize("mode", ["batch", "support", "running"])
@pytest.mark.parametrize("where", ["constructor", "call"])
def test_batchnorm(mode: str, where: str) -> None:
    model = conv_net()
    model[1].running_mean.normal_()
    maml = made(("torch", torch.float64), model, **({"batchnorm": mode} if where == "constructor" else {}))
    sx, sy, qx, qy = classify(shape=(1, 6, 6))
    truth = plain_loop(model, (sx, sy, qx, qy), lr=0.3, steps=3, batchnorm=mode)
    adapted = maml.adapt(sx, sy, **({"batchnorm": mode} if where == "call" else {}))
    torch.testing.assert_close(adapted(qx), torch.stack(truth.logits), rtol=1e-10, atol=1e-10)
    if mode != "batch":  # no query row sees another one
        torch.testing.assert_close(adapted(qx[:, :1]), torch.stack(truth.logits)[:, :1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("adapt", ["4.*", "0.*"])
def test_parameters_that_are_not_adapted(adapt: str) -> None:
    maml, (sx, sy, qx, qy) = made(adapt=adapt), classify()
    truth = plain_loop(maml.model, (sx, sy, qx, qy), lr=0.3, steps=3, adapt=adapt)
    adapted = maml.adapt(sx, sy)
    with torch.no_grad():  # what was adapted stays as it was
        for p in maml.parameters():
            p.zero_()
    torch.testing.assert_close(adapted(qx), torch.stack(truth.logits), **CLOSE)
    torch.testing.assert_close(adapted.module(1)(qx[1]), truth.logits[1], **CLOSE)


def test_the_module_is_plain() -> None:
    maml, (sx, sy, qx, qy) = made(), classify()
    module = pickle.loads(pickle.dumps(copy.deepcopy(maml.adapt(sx, sy).module(0))))
    F.cross_entropy(module(qx[0]), qy[0]).backward()
    assert all(g is not None for g in grads(module).values()) and all(isinstance(p, nn.Parameter) for p in module.parameters())


def test_adapting_builds_its_plans_once(monkeypatch) -> None:
    maml, (sx, sy, qx, _) = made(), classify()
    maml.adapt(sx, sy)(qx)
    monkeypatch.setattr("fastmaml.engine.build_plan", lambda *a: pytest.fail("a Plan was built"))
    maml.adapt(sx, sy)(qx)


def test_an_adapted_model_outlives_edits_of_the_model() -> None:
    maml, (sx, sy, qx, _) = made(), classify()
    adapted = maml.adapt(sx, sy)
    expected = adapted(qx)
    maml.model[2] = nn.Linear(8, 8)
    assert torch.equal(adapted(qx), expected)
