"""The user's own model, of many kinds, and edited between calls, against a plain torch loop."""

from __future__ import annotations

import copy
from operator import attrgetter

import pytest
import torch
import torch.nn.functional as F
from maml_cases import BOUND, Tied, agrees, backends, conv_net, made
from plain_loop import classify, distance, grads, mlp, one_thread, plain_loop  # noqa: F401
from torch import nn

import fastmaml
from fastmaml import MAML


# ---------------------------------------------------------------------------------------------------------------- the user's model
@pytest.mark.parametrize("mode", [None, "batch", "support", "running"])
@pytest.mark.parametrize("where", ["constructor", "call"])
def test_batchnorm_modes(mode: str | None, where: str) -> None:
    model = conv_net()
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    maml = made(("torch", torch.float64), model, **({"batchnorm": mode} if where == "constructor" else {}))
    tasks = classify(shape=(1, 6, 6))
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    agrees(maml, tasks, lambda: maml(tasks, **({"batchnorm": mode} if where == "call" else {})).loss.backward(), batchnorm=mode or "batch")
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())


def test_batchnorm_in_eval_mode_wants_a_decision() -> None:
    maml, tasks = made(("torch", torch.float64), conv_net()), classify(shape=(1, 6, 6))
    maml(tasks)
    maml.eval()
    with pytest.raises(ValueError, match="batchnorm='batch'.*batchnorm='running'"):
        maml(tasks)
    with pytest.raises(ValueError, match="batchnorm='batch'.*batchnorm='running'"):
        maml.adapt(*tasks[:2])
    agrees(maml, tasks, lambda: maml(tasks, batchnorm="running").loss.backward(), batchnorm="running")
    maml.train()
    agrees(maml, tasks, batchnorm="batch")


@backends
@pytest.mark.parametrize("adapt", ["4.*", "*.weight", ["0.*", "4.bias"]], ids=str)
def test_adapt_patterns(how, adapt) -> None:
    maml, tasks = made(how, adapt=adapt), classify()
    maml(tasks).loss.backward()
    found = grads(maml.model)
    patterns = [adapt] if isinstance(adapt, str) else adapt
    names = [n for n, _ in maml.model.named_parameters() if n not in maml.rates.rates]
    model = copy.deepcopy(maml.model)
    expected = plain_loop(model, tasks, lr=lambda n, k: 0.0 if n in names else 0.3, steps=3).gradients
    assert distance(found, expected) <= BOUND[how[1]]
    assert set(maml.adapt(*tasks[:2]).weights) == set(maml.rates.rates) and len(patterns) <= len(maml.rates.rates)


@backends
def test_frozen_parameters(how) -> None:
    model = mlp()
    model[0].requires_grad_(False)
    maml, tasks = made(how, model), classify()
    agrees(maml, tasks)
    assert model[0].weight.grad is None
    agrees(maml, tasks, lambda: maml.meta_grad(tasks))


@backends
def test_tied_weights(how) -> None:
    maml, tasks = made(how, Tied()), classify()
    agrees(maml, tasks)
    module = maml.adapt(*tasks[:2]).module(1)
    assert module.a.weight is module.b.weight
    assert copy.deepcopy(maml).model.b.weight is not maml.model.b.weight


class Named(nn.Module):
    """Two layers whose weights have the names ``first`` and ``second``."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.names = first, second
        for name, shape in ((first, (8, 3)), (second, (4, 8))):
            *path, last = name.split(".")
            holder = self
            for part in path:
                holder.add_module(part, nn.Module())
                holder = getattr(holder, part)
            holder.register_parameter(last, nn.Parameter(torch.randn(shape) * 0.3))

    def forward(self, x):
        first, second = attrgetter(*self.names)(self)
        return F.linear(F.linear(x, first).tanh(), second)


CLASHES = [("gradient.weight", "weight"), ("weight", "g.weight"), ("w", "theta.w"), ("w", "theta_bar.w"), ("w", "u.w"), ("w", "grad.w"), ("w", "logits"), ("w", "correct"), ("w", "loss.query")]


@backends
@pytest.mark.parametrize("names", CLASHES, ids=".".join)
def test_names_that_the_plan_uses_itself(how, names: tuple[str, str]) -> None:
    """Right, or refused: never silently wrong."""
    maml = made(how, Named(*names))
    try:
        agrees(maml, classify())
    except ValueError as error:
        assert repr(names[1]) in str(error) and "rename it" in str(error)


class Summed(nn.Module):
    """A weight that is the sum of two."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        shapes = {"a": (8, 3), "b": (8, 3), "c": (4, 8)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape) * 0.3))

    def forward(self, x):
        return F.linear(F.linear(x, self.a + self.b).tanh(), self.c)


@backends
def test_sums_of_parameters(how) -> None:
    """Both terms have the sum's gradient, each a copy of its own."""
    for adapt in ("c", "*"):
        maml = made(how, Summed(), adapt=adapt)
        agrees(maml, classify(), adapt=adapt)
        maml.meta_grad(classify())
        assert len({p.grad.data_ptr() for p in maml.parameters()}) == 3


# ---------------------------------------------------------------------------------------------------------------- the model edited between calls
def replace_layer(maml: MAML) -> None:
    torch.manual_seed(5)
    maml.model[2] = nn.Linear(8, 8).to(maml.model[0].weight)


def append_layers(maml: MAML) -> None:
    torch.manual_seed(5)
    maml.model.append(nn.Tanh())


def replace_parameter(maml: MAML) -> None:
    maml.model[0].weight = nn.Parameter(maml.model[0].weight.detach() * 2)


def new_values(maml: MAML) -> None:
    with torch.no_grad():
        maml.model[0].weight.mul_(2)


def freeze(maml: MAML) -> None:
    maml.model[0].requires_grad_(False)


def thaw(maml: MAML) -> None:
    maml.model[0].requires_grad_(False)
    maml(classify())
    maml.model[0].requires_grad_(True)


def to_double(maml: MAML) -> None:
    maml.double()


def model_to_double(maml: MAML) -> None:
    maml.model.double()


def other_model(maml: MAML) -> None:
    maml.model = mlp((3, 5, 4), seed=7).to(next(maml.model.parameters()))


def other_data(maml: MAML) -> None:
    maml.model[0].weight.data = maml.model[0].weight.data.clone() * 3


EDITS = [replace_layer, append_layers, replace_parameter, new_values, freeze, thaw, to_double, model_to_double, other_model, other_data]


@pytest.mark.parametrize("edit", EDITS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("learn", [False, True], ids=["fixed rates", "learned rates"])
def test_edited_model(edit, learn: bool) -> None:
    maml, tasks = made(learn_inner_lr=learn), classify()
    agrees(maml, tasks)
    rates = list(maml.rates.values.values())
    edit(maml)
    agrees(maml, tasks, lr=float(rates[0].detach()) if learn else 0.3)
    if learn:
        assert all(a is b for a, b in zip(rates, maml.rates.values.values(), strict=True))  # the optimizer holds them
        assert all(r.dtype == maml.rates.values["inner_lr"].dtype for r in maml.model.parameters())


def test_train_and_eval_flips() -> None:
    model = nn.Sequential(mlp((3, 8, 8)), nn.Dropout(0.5), nn.Linear(8, 4))
    maml, tasks = made(model=model), classify()
    with pytest.warns(UserWarning, match="'1' \\(Dropout\\)"):
        maml(tasks)
    assert maml.executor == "autograd"
    maml.eval()
    agrees(maml, tasks)
    assert maml.executor != "autograd"
    maml.train()
    maml(tasks)  # warned once per object
    assert maml.executor == "autograd"


def test_a_hook_added_later_is_seen() -> None:
    maml, tasks, seen = made(("torch", torch.float32)), classify(), []
    maml(tasks)
    maml.model[0].register_forward_hook(lambda *a: seen.append(1))
    with pytest.raises(fastmaml.TraceError, match="forward hook"):
        maml(tasks)


def test_flags_of_the_object_may_change() -> None:
    maml, tasks = made(), classify()
    agrees(maml, tasks)
    maml.first_order = True  # derivative-order annealing
    agrees(maml, tasks, first_order=True)
    maml.first_order, maml.inner_steps = False, 1
    agrees(maml, tasks, steps=1)
