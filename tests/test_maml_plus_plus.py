"""MAML++: per-step batch normalisation and rates, the annealed multi-step loss, against plain torch; its schedule against the authors' numbers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from plain_loop import classify, distance, grads, mlp, one_thread  # noqa: F401
from test_optimizers import BOUND, backends
from torch import Tensor, nn
from torch.func import functional_call

import fastmaml.nn as nets
from fastmaml import MAML, TaskBatch, methods
from fastmaml.parameterisation import SetEncoder

STEPS, SHAPE = 3, (1, 6, 7)


def convolutional(dtype: torch.dtype = torch.float64) -> nn.Module:
    """With a norm in front of everything that is adapted, too."""
    torch.manual_seed(0)
    layers = [nn.BatchNorm2d(1), nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.LeakyReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.BatchNorm1d(20), nn.Linear(20, 4)]
    model = nets.per_step_batchnorm(nn.Sequential(*layers), STEPS)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.to(dtype)


def truth(maml: MAML, data, weights: list[float] | None = None, first_order: bool = False) -> dict[str, Tensor]:
    """Written from the paper and the authors' loop: step k, and the query after it, read row k of gamma and beta."""
    model = copy.deepcopy(maml.model).double()
    trained = dict(model.named_parameters())
    rates = {n: r.detach().double().requires_grad_() for n, r in maml.rates.learned()}
    total: Tensor = torch.zeros((), dtype=torch.float64)
    batch, steps = TaskBatch.of(data), maml.inner_steps
    for t in range(len(batch)):
        sx, sy, qx, qy = batch.task(t)
        theta = dict(trained)

        def loss(k: int, x: Tensor, y: Tensor) -> Tensor:
            for norm in (m for m in model.modules() if isinstance(m, nets.StepBatchNorm)):
                norm.step = k
            return F.cross_entropy(functional_call(model, theta, (x.double(),)), y)  # noqa: B023

        for k in range(steps):
            names = list(maml.rates.rates)
            found = torch.autograd.grad(loss(k, sx, sy), [theta[n] for n in names], create_graph=not first_order)
            theta = {**theta, **{n: theta[n] - rates[f"inner_lr.{n}"][k] * g for n, g in zip(names, found, strict=True)}}
            if weights is not None or k == steps - 1:
                total = total + (1.0 if weights is None else weights[k]) * loss(k, qx, qy) / len(batch)
    wanted = {**trained, **rates}
    return dict(zip(wanted, torch.autograd.grad(total, list(wanted.values())), strict=True))


@backends
@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
@pytest.mark.parametrize("weights", [None, [0.2, 0.3, 0.5]], ids=["last", "multi-step"])
def test_gradient(how, weights: list[float] | None, first_order: bool) -> None:
    data, model = classify(shape=SHAPE), convolutional(how[1])
    maml = methods.MAMLPlusPlus(model, inner_steps=STEPS, step_loss_weights=weights, first_order=first_order, backend=how[0])
    expected = truth(maml, data, weights, first_order)
    assert {n for n, g in expected.items() if n.startswith("inner_lr.")} == {f"inner_lr.{n}" for n in ("1.weight", "1.bias", "7.weight", "7.bias")}
    maml.meta_grad(data)
    assert distance(grads(maml), expected) <= 3 * BOUND[how[1]]
    if weights is None:
        maml(data, outer_loss=lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten())).loss.backward()
        assert distance(grads(maml), expected) <= 3 * BOUND[how[1]]
    for p in maml.parameters():
        p.grad = torch.zeros_like(p)
    for _ in range(2):
        maml.meta_grad(data)  # added to what is there
    assert distance({n: g / 2 for n, g in grads(maml).items()}, expected) <= 3 * BOUND[how[1]]


@backends
def test_fewer_steps_than_rows(how) -> None:
    data, model = classify(shape=SHAPE), convolutional(how[1])
    maml = methods.MAMLPlusPlus(model, inner_steps=STEPS, per_step_norms=False, backend=how[0])
    maml(data, inner_steps=2).loss.backward()
    found = grads(maml)
    shorter = methods.MAMLPlusPlus(copy.deepcopy(model), inner_steps=2, per_step_norms=False)
    expected = truth(shorter, data)
    for n, g in expected.items():
        assert distance({n: found[n][: len(g)]}, {n: g}) <= 30 * BOUND[how[1]] or float(g.norm()) < 1e-6
        assert not found[n][len(g) :].any()
    with pytest.raises(ValueError, match="steps"):
        maml(data, inner_steps=4)


@backends
def test_adapted_networks_are_those_of_the_last_step(how) -> None:
    data, model = classify(shape=SHAPE), convolutional(how[1])
    maml = methods.MAMLPlusPlus(model, inner_steps=STEPS, per_step_norms=False, backend=how[0])
    adapted = maml.adapt(*data[:2])
    with torch.no_grad():
        logits = maml(data).logits
        torch.testing.assert_close(adapted(data[2].to(how[1])), logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(adapted.module(1)(data[2][1].to(how[1])), logits[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batchnorm", [None, "support"])
def test_verify(batchnorm: str | None) -> None:
    maml = methods.MAMLPlusPlus(convolutional(torch.float32), inner_steps=STEPS, batchnorm=batchnorm)
    said = maml.verify(classify(tasks=4, shape=SHAPE), repeats=1)
    assert said.ok and said.plan_error <= 1e-11


# ------------------------------------------------------------------------------------------------- running statistics per step
def with_statistics(dtype: torch.dtype) -> nn.Module:
    """As ``convolutional``, with statistics that differ from step to step."""
    torch.manual_seed(0)
    layers = [nn.BatchNorm2d(1), nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.LeakyReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.BatchNorm1d(20), nn.Linear(20, 4)]
    model = nets.per_step_batchnorm(nn.Sequential(*layers), STEPS, statistics=True)
    with torch.no_grad():
        for v in (*model.parameters(), *model.buffers()):
            v.add_(0.2 * torch.rand_like(v))
    return model.to(dtype)


@backends
@pytest.mark.parametrize("weights", [None, [0.2, 0.3, 0.5]], ids=["last", "multi-step"])
def test_gradient_with_running_statistics(how, weights: list[float] | None) -> None:
    """Support rows of step k, and the query rows after it, are normalised by row k."""
    data, model = classify(shape=SHAPE), with_statistics(how[1])
    maml = methods.MAMLPlusPlus(model, inner_steps=STEPS, per_step_norms=False, batchnorm="running", step_loss_weights=weights, backend=how[0])
    before = {n: b.clone() for n, b in model.named_buffers()}
    model.eval()
    expected = truth(maml, data, weights)
    maml.meta_grad(data)
    assert distance(grads(maml), expected) <= 3 * BOUND[how[1]]
    assert len(before) == 6 and all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    model.train()
    with torch.no_grad():
        by_batch, by_row = maml(data, batchnorm="batch").loss, maml(data).loss
    assert abs(float(by_batch - by_row)) > 1e-3
    adapted = maml.adapt(*data[:2], inner_steps=2)  # the networks of row 1
    with torch.no_grad():
        logits = maml(data, inner_steps=2).logits if weights is None else adapted(data[2].to(how[1]))
        torch.testing.assert_close(adapted(data[2].to(how[1])), logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(adapted.module(1).eval()(data[2][1].to(how[1])), logits[1], rtol=1e-4, atol=1e-5)
        by_batch = maml.adapt(*data[:2], inner_steps=2, batchnorm="batch").module(1).eval()  # adapted by the batch, predicts by the row of its last step
        theta = dict(by_batch.named_parameters())
        for norm in (m for m in model.modules() if isinstance(m, nets.StepBatchNorm)):
            norm.step = 1
        expected = functional_call(copy.deepcopy(model).eval(), theta, (data[2][1].to(how[1]),))
        torch.testing.assert_close(by_batch(data[2][1].to(how[1])), expected, rtol=1e-4, atol=1e-5)


@backends
@pytest.mark.parametrize("weights", [None, [0.2, 0.3, 0.5]], ids=["last", "multi-step"])
def test_recorded_statistics(how, weights: list[float] | None) -> None:
    """In the authors' order, against their loop in plain torch."""
    data, model = classify(tasks=3, shape=SHAPE), with_statistics(how[1])
    maml = methods.MAMLPlusPlus(model, inner_steps=STEPS, per_step_norms=False, step_loss_weights=weights, backend=how[0])
    reference, batch = copy.deepcopy(model).double(), TaskBatch.of(data)
    for t in range(len(batch)):
        sx, sy, qx, _ = batch.task(t)
        theta = dict(reference.named_parameters())

        def run(k: int, x: Tensor) -> Tensor:
            for norm in (m for m in reference.modules() if isinstance(m, nets.StepBatchNorm)):
                norm.step = k
            return functional_call(reference, theta, (x.double(),))  # noqa: B023

        for k in range(STEPS):
            names = list(maml.rates.rates)
            found = torch.autograd.grad(F.cross_entropy(run(k, sx), sy), [theta[n] for n in names])
            theta = {**theta, **{n: theta[n] - 0.1 * g for n, g in zip(names, found, strict=True)}}
            if weights is not None or k == STEPS - 1:
                run(k, qx)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    model.eval()
    methods.record_statistics(maml, data)
    assert not any(m.training for m in model.modules())
    for name, found in model.state_dict().items():
        if "running" in name:
            tolerance = 1e-10 if how[1] is torch.float64 else 1e-5
            torch.testing.assert_close(found.double(), reference.get_buffer(name), rtol=tolerance, atol=tolerance)
            assert not torch.equal(found, before[name]) and found.shape[0] == STEPS
        else:
            assert torch.equal(found, before[name])
    assert all(m.step == STEPS - 1 for m in model.modules() if isinstance(m, nets.StepBatchNorm))


def test_statistics_in_the_state_and_their_errors() -> None:
    data = classify(shape=SHAPE)
    model = nn.Sequential(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5, momentum=0.3), nn.ReLU(), nn.Flatten(), nn.Linear(100, 4))
    model[1].running_mean.fill_(0.5)
    plain, maml = copy.deepcopy(model), methods.MAMLPlusPlus(model, inner_steps=STEPS, per_step_statistics=True)
    assert maml.model[1].momentum == 0.3 and torch.equal(maml.model[1].running_mean, torch.full((STEPS, 5), 0.5))
    methods.record_statistics(maml, data)
    state = maml.state_dict()
    assert state["1.running_mean"].shape == state["1.running_var"].shape == (STEPS, 5)
    again = methods.MAMLPlusPlus(copy.deepcopy(plain), inner_steps=STEPS, per_step_statistics=True)
    again.load_state_dict(state)
    assert torch.equal(again(data, batchnorm="running").loss, maml(data, batchnorm="running").loss)
    with pytest.raises(RuntimeError, match="Unexpected key.*1.running_mean"):
        methods.MAMLPlusPlus(copy.deepcopy(plain), inner_steps=STEPS).load_state_dict(state)
    maml.model.eval()
    with pytest.raises(ValueError, match="eval mode and has running statistics: say batchnorm='batch'.*or batchnorm='running'"):
        maml(data)
    with pytest.raises(ValueError, match="has 3 steps, inner_steps is 4"):
        maml(data, inner_steps=4, batchnorm="running")
    without = methods.MAMLPlusPlus(plain, inner_steps=STEPS)
    with pytest.raises(ValueError, match="no norm of the model has running statistics for each step: build it with MAMLPlusPlus"):
        methods.record_statistics(without, data)
    with pytest.raises(ValueError, match=r"parameterisation mmaml.* writes '2.bias' anew at each step"):
        methods.record_statistics(methods.MMAML(with_statistics(torch.float32), SetEncoder(42, 4), inner_steps=STEPS), data)
    with pytest.raises(ValueError, match="a mixture has several initialisations"):
        methods.record_statistics(methods.Mixture(with_statistics(torch.float32), inner_steps=STEPS), data)
    with pytest.raises(ValueError, match="batchnorm='running', but the layer has no running statistics"):
        without(data, batchnorm="running")
    with pytest.raises(ValueError, match="per_step_statistics=True and per_step_norms=False"):
        methods.MAMLPlusPlus(model, per_step_norms=False, per_step_statistics=True)


@pytest.mark.parametrize("method", [methods.ANIL, methods.ChannelScaleShift, methods.TNets, methods.MTNets])
def test_statistics_of_other_methods(method) -> None:
    """What the network normalises at theta_0, whatever the weights are made of: row 0 of the first norm after one update."""
    model = with_statistics(torch.float32)
    before, data = model[0].running_mean.clone(), classify(tasks=1, shape=SHAPE)
    methods.record_statistics(method(model, inner_steps=STEPS), data)
    torch.testing.assert_close(model[0].running_mean[0], 0.9 * before[0] + 0.1 * data[0].mean((0, 1, 3, 4)))
    assert model[6].running_mean.isfinite().all() and not torch.equal(model[6].running_mean[0], model[6].running_mean[2])


def test_verify_with_running_statistics() -> None:
    maml = methods.MAMLPlusPlus(with_statistics(torch.float32), inner_steps=STEPS, per_step_norms=False, batchnorm="running")
    said = maml.verify(classify(tasks=4, shape=SHAPE), repeats=1)
    assert said.ok and said.plan_error <= 1e-11


def test_what_is_adapted_and_learned() -> None:
    """HowToTrainYourMAML: all but the norms is adapted, a rate per tensor and step; the authors' network has 111,749 such parameters."""
    maml = methods.MAMLPlusPlus(nets.HTYMAMLNet())
    assert sum(p.numel() for n, p in maml.model.named_parameters() if n in maml.rates.rates) == 111_749
    assert all(r.shape == (5,) and torch.equal(r.detach(), torch.full((5,), 0.1)) for r in maml.rates.values.values())
    assert all(p.shape == (5, 64) for n, p in maml.named_parameters() if ".norm." in n and not n.startswith("inner_lr"))
    again = methods.MAMLPlusPlus(nets.HTYMAMLNet())
    again.load_state_dict(maml.state_dict())


def test_rows_begin_as_the_norms_affine() -> None:
    norm = nn.BatchNorm2d(3)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
    model = nets.per_step_batchnorm(nn.Sequential(nn.Sequential(norm)), 4)
    assert torch.equal(model[0][0].weight, norm.weight.expand(4, -1)) and not model[0][0].bias.any()
    x = torch.randn(5, 3, 2, 2)
    torch.testing.assert_close(model(x), norm(x))


# ---------------------------------------------------------------------------------------------------------------- the schedule
def test_annealing() -> None:
    """The authors' formula, by hand: K = 5, 10 epochs."""
    maml = methods.MAMLPlusPlus(mlp(), inner_steps=5)
    schedule = methods.MAMLPlusPlusSchedule(maml, first_order_epochs=2)
    assert schedule.step_loss_weights(0) == pytest.approx([0.2] * 5)
    assert schedule.step_loss_weights(1) == pytest.approx([0.18] * 4 + [0.28])
    assert schedule.step_loss_weights(9) == pytest.approx([0.02] * 4 + [0.92])
    assert methods.MAMLPlusPlusSchedule(maml, 100).step_loss_weights(99) == pytest.approx([0.006] * 4 + [0.976])  # not below 0.03 / K
    assert schedule.step_loss_weights(10) is None
    orders = []
    for epoch in (0, 1, 2, 10):
        schedule.begin(epoch)
        orders.append((maml.first_order, maml.step_loss_weights is None))
    assert orders == [(True, False), (True, False), (False, False), (False, True)]


def test_annealing_builds_three_plans() -> None:
    data, maml = classify(), methods.MAMLPlusPlus(mlp(), inner_steps=3)
    schedule = methods.MAMLPlusPlusSchedule(maml, multi_step_epochs=6, first_order_epochs=3)
    for epoch in range(9):
        schedule.begin(epoch)
        maml.meta_grad(data)
    assert len(maml._engine._runners) == 3


def test_errors() -> None:
    with pytest.raises(ValueError, match="multi_step_epochs=-1: expected a whole number of at least 0"):
        methods.MAMLPlusPlusSchedule(methods.MAMLPlusPlus(mlp()), multi_step_epochs=-1)
    data, maml = classify(shape=SHAPE), methods.MAMLPlusPlus(convolutional(torch.float32), inner_steps=STEPS)
    with pytest.raises(ValueError, match="has 3 steps, inner_steps is 4"):
        MAML(maml.model, inner_steps=4)(data)
    with pytest.raises(ValueError, match="has a loss before the first inner step"):
        MAML(maml.model, inner_steps=3, step_loss_weights=[0.1, 0.2, 0.3, 0.4])(data)
    with pytest.raises(ValueError, match="has a value per inner step, which needs a model that can be traced"):
        MAML(nn.Sequential(maml.model, nn.Softsign()), backend="autograd")(data)
