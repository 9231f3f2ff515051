"""Parameters, state, copies and pickles of a MAML object; several at once."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from maml_cases import BOUND, agrees, backends, made
from plain_loop import classify, distance, grads, mlp, one_thread, plain_loop  # noqa: F401
from torch import nn

from fastmaml import MAML


# ---------------------------------------------------------------------------------------------------------------- parameters and state
def test_names() -> None:
    maml = made(inner_lr={"*": 0.1}, learn_inner_lr=True)
    own = [n for n, _ in maml.model.named_parameters()]
    assert [n for n, _ in maml.named_parameters()] == own + [f"inner_lr.{n}" for n in own]
    assert [n for n, _ in maml.named_parameters(prefix="a")][-1] == f"a.inner_lr.{own[-1]}"
    assert list(maml.state_dict()) == own + [f"inner_lr.{n}" for n in own]
    assert list(made().state_dict()) == list(mlp().state_dict())
    plain = made()
    assert [id(p) for p in plain.parameters()] == [id(p) for p in plain.model.parameters()]


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a larger module"])
def test_state_goes_round(inside: bool) -> None:
    wrap = (lambda m: nn.Sequential(m)) if inside else (lambda m: m)
    a, b = (wrap(made(model=mlp(seed=s), inner_lr=lr, learn_inner_lr=True)) for s, lr in ((0, 0.1), (1, 0.2)))
    file = io.BytesIO()
    torch.save(a.state_dict(), file)
    file.seek(0)
    b.load_state_dict(torch.load(file, weights_only=True))
    assert all(torch.equal(v, b.state_dict()[n]) for n, v in a.state_dict().items())
    inner = b[0] if inside else b
    assert inner.rates.values["inner_lr"].item() == pytest.approx(0.1)
    assert inner(classify()).loss.item() == (a[0] if inside else a)(classify()).loss.item()


def test_state_of_another_form_is_refused() -> None:
    learned, plain = made(learn_inner_lr=True), made()
    with pytest.raises(RuntimeError, match="no 'inner_lr'.*learn_inner_lr=True"):
        learned.load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match="Unexpected key.*inner_lr"):
        plain.load_state_dict(learned.state_dict())
    with pytest.raises(RuntimeError, match=r"'inner_lr' has shape \[\] in the state, \[3\] here"):
        made(inner_lr=[0.1, 0.2, 0.3], learn_inner_lr=True).load_state_dict(learned.state_dict())
    assert learned.load_state_dict(plain.state_dict(), strict=False).unexpected_keys == []
    plain.model.load_state_dict(mlp(seed=4).state_dict())  # the model's own names


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": lambda m: (lambda f: (torch.save(m, f), f.seek(0), torch.load(f, weights_only=False))[2])(io.BytesIO()),
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
def test_copies(way: str, used: bool) -> None:
    maml, tasks = made(inner_lr=[0.3, 0.2, 0.1], learn_inner_lr=True, loss=nn.CrossEntropyLoss(torch.rand(4))), classify()
    if used:
        maml(tasks).loss.backward()
    other = COPIES[way](maml)
    assert torch.equal(other(tasks).loss, maml(tasks).loss)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1.0)
    assert other(tasks).loss.item() != maml(tasks).loss.item()
    assert [n for n, _ in other.named_parameters()] == [n for n, _ in maml.named_parameters()]


# ---------------------------------------------------------------------------------------------------------------- several at once
def in_threads(work, n: int = 4) -> None:
    errors: list[BaseException] = []

    def run(i: int) -> None:
        try:
            work(i)
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@backends
def test_threads_share_one_object(how) -> None:
    maml = made(how)
    batches = [classify(tasks=2 + i, seed=i) for i in range(4)]
    expected = [plain_loop(maml.model, b, lr=0.3, steps=3).gradients for b in batches]

    def work(i: int) -> None:
        for repeat in range(5):
            names, parameters = zip(*maml.model.named_parameters(), strict=True)
            outer = (lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten())) if repeat % 2 else None
            found = torch.autograd.grad(maml(batches[i], outer_loss=outer).loss, parameters)
            assert distance(dict(zip(names, found, strict=True)), expected[i]) <= BOUND[how[1]]

    in_threads(work)


def test_threads_with_objects_of_their_own() -> None:
    tasks, model = classify(), mlp()
    expected = plain_loop(model, tasks, lr=0.3, steps=3).gradients

    def work(i: int) -> None:
        maml = made(model=copy.deepcopy(model))
        for _ in range(3):
            maml.meta_grad(tasks)
            assert distance(grads(maml.model), expected) <= 3e-6

    in_threads(work)


def test_several_objects_on_one_model() -> None:
    model, tasks = mlp(), classify()
    short, long = MAML(model, inner_lr=0.3), MAML(model, inner_lr=0.1, inner_steps=2, first_order=True)
    for _ in range(2):
        agrees(short, tasks, steps=1)
        agrees(long, tasks, lr=0.1, steps=2, first_order=True)


def test_many_plans_are_not_kept() -> None:
    maml = made()
    for steps in range(40):
        maml.plan(classify(), inner_steps=steps)
    assert len(maml._engine._runners) <= 32


def test_no_warning_in_ordinary_use() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        maml, tasks = made(), classify()
        maml(tasks).loss.backward()
        maml.meta_grad(tasks)
        maml.adapt(*tasks[:2])(tasks[2])
        assert "gradient" in maml.explain(tasks) and maml.plan(tasks).steps == 3


@backends
def test_gradients_lie_as_their_parameters(how) -> None:
    """Else autograd copies them and warns, even of the stride of an axis of one: the bias of a network with one output."""
    model = nn.Sequential(nn.Linear(3, 1), nn.Tanh(), nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
    maml = made(how, model, loss="mse")
    x, y = torch.randn(2, 5, 3, dtype=how[1]), torch.randn(2, 5, 1, dtype=how[1])
    for call in (lambda: maml((x, y, x, y)).loss.backward(), lambda: maml.meta_grad((x, y, x, y))):
        model.zero_grad()
        call()
        assert all(p.grad.stride() == p.stride() for p in model.parameters())
