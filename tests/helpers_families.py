"""What the tests of the meta-parameterisations share: options of both executors, and the comparison with the equations in all ways of calling."""

from __future__ import annotations

import families
import pytest
import torch
import torch.nn.functional as F
from families import truth
from maml_cases import BACKENDS, BOUND

import fastmaml
from fastmaml import MAML
from fastmaml.parameterisation import SetEncoder

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


NAMES = [f"{layer}.{kind}" for layer in ("0", "2", "4") for kind in ("weight", "bias")]


def moved(maml: MAML) -> None:
    """Away from the initial values, where some gradients vanish."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in dict(maml.parameterisation.trained()).values():
            p.add_(0.3 * torch.randn(p.shape, generator=g).to(p))


def encoder() -> SetEncoder:
    torch.manual_seed(3)
    return SetEncoder(3, 4, size=6, hidden=10)
