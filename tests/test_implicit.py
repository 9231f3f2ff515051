"""iMAML: the implicit meta-gradient against plain torch's conjugate gradient, and against the dense solution of its linear system."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from executor_cases import masks_equal_error
from plain_loop import classify, distance, grads, mlp, one_thread, ragged, regress  # noqa: F401
from random_programs import numbers_for, random_case, randoms
from test_optimizers import BOUND, backends
from torch import Tensor, nn
from torch.func import functional_call

from fastmaml import MAML, SGD, ImplicitGradient, TaskBatch, methods
from fastmaml.plan import Rate, frame, rollback
from fastmaml.program import Program


def truth(model: nn.Module, batch: TaskBatch, rule: ImplicitGradient, lr: float, steps: int, loss=F.cross_entropy, momentum: float = 0.0, dense: bool = False):
    """Written from the paper, with the damping of its authors' code; in float64. dense: A^-1 by torch.linalg.solve."""
    total = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in model.named_parameters()}
    first = torch.cat([p.detach().double().flatten() for p in model.parameters()])

    def call(flat: Tensor, x: Tensor, y: Tensor, cut: slice) -> Tensor:
        pieces = flat.split([p.numel() for p in model.parameters()])
        named = {n: v.view_as(p) for (n, p), v in zip(model.named_parameters(), pieces, strict=True)}
        return loss(functional_call(model, named, (x.double(),))[:, cut], y.double() if y.is_floating_point() else y)

    for t in range(len(batch)):
        sx, sy, qx, qy = batch.task(t)
        cut = slice(None) if batch.ways is None else slice(int(batch.ways[t]))
        theta = first.clone().requires_grad_()
        optimizer = torch.optim.SGD([theta], lr=lr, momentum=momentum)
        for _ in range(steps):
            optimizer.zero_grad()
            (call(theta, sx, sy, cut) + rule.lam / 2 * (theta - first).square().sum()).backward()
            optimizer.step()
        (g,) = torch.autograd.grad(call(theta, sx, sy, cut), theta, create_graph=True)
        (b,) = torch.autograd.grad(call(theta, qx, qy, cut), theta)

        def product(v: Tensor, g: Tensor = g, theta: Tensor = theta) -> Tensor:
            (hv,) = torch.autograd.grad(g, theta, v, retain_graph=True)
            return (1 + rule.cg_damping) * v + hv / (rule.lam + rule.lam_damping)

        x = conjugate_gradient(product, b, rule.cg_steps)
        if dense:
            x = torch.linalg.solve(torch.stack([product(e) for e in torch.eye(len(b), dtype=torch.float64)]).T, b)
        for (n, p), part in zip(model.named_parameters(), x.split([p.numel() for p in model.parameters()]), strict=True):
            total[n] += part.view_as(p) / len(batch)
    return total


def conjugate_gradient(product, b: Tensor, steps: int) -> Tensor:
    x, r, p = torch.zeros_like(b), b.clone(), b.clone()
    for _ in range(steps):
        if float(r @ r) == 0:
            return x
        a = product(p)
        alpha = (r @ r) / (p @ a)
        x, new = x + alpha * p, r - alpha * a
        p, r = new + (new @ new) / (r @ r) * p, new
    return x


RULES = {
    "the authors'": ImplicitGradient(),
    "the paper's": ImplicitGradient(lam=2.0, cg_damping=0.0, lam_damping=0.0),
    "one iteration": ImplicitGradient(lam=0.5, cg_steps=1),
    "weak": ImplicitGradient(lam=0.1, cg_steps=8, cg_damping=0.3, lam_damping=1.0),
}


@backends
@pytest.mark.parametrize("again", [False, True], ids=["kept", "made again"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_gradient(how, rule: ImplicitGradient, again: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """again: with activations at theta_K that every product makes again, as of large networks."""
    if again:
        monkeypatch.setattr(frame, "KEPT_BYTES", 0)
    data, model = classify(), mlp().double()
    expected = truth(model, TaskBatch.of(data), rule, 0.2, 4)
    model = model.to(how[1])
    maml = MAML(model, inner_lr=0.2, inner_steps=4, meta_gradient=rule, backend=how[0])
    assert any(i.kernel == "linear_fwd" for i in maml.plan(data).segments["cg"].instructions) == again
    maml.meta_grad(data)
    assert distance(grads(model), expected) <= 3 * BOUND[how[1]]
    maml(data, outer_loss=lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten())).loss.backward()
    assert distance(grads(model), expected) <= 3 * BOUND[how[1]]


def test_it_is_the_solution_of_the_linear_system() -> None:
    """(I + H / lam) x = grad L_Q(theta_K), the paper's equation 6: all but solved after 40 iterations."""
    data, model = classify(tasks=2), mlp((3, 4, 4)).double()
    rule = ImplicitGradient(lam=1.0, cg_steps=40, cg_damping=0.0, lam_damping=0.0)
    expected = truth(model, TaskBatch.of(data), rule, 0.2, 30, dense=True)
    MAML(model, inner_lr=0.2, inner_steps=30, meta_gradient=rule).meta_grad(data)
    assert distance(grads(model), expected) <= 1e-8


@pytest.mark.parametrize("steps", [1, rollback.KEPT + 2])
def test_with_momentum_mse_and_ragged_tasks(steps: int) -> None:
    rule = ImplicitGradient(lam=1.0)
    for data, loss, name in ((TaskBatch.of(regress()), F.mse_loss, "mse"), (ragged(), F.cross_entropy, "cross_entropy")):
        model = mlp().double()
        expected = truth(model, data, rule, 0.1, steps, loss, momentum=0.5)
        maml = MAML(model, inner_lr=0.1, inner_steps=steps, loss=name, meta_gradient=rule, inner_optimizer=SGD(momentum=0.5))
        maml.meta_grad(data.to(dtype=torch.float64))
        assert distance(grads(model), expected) <= 1e-11


@backends
def test_images_and_opaque_modules(how) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5, track_running_stats=False), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(20, 4)).double()
    data, rule = classify(shape=(1, 6, 7)), ImplicitGradient(lam=1.0)
    expected = truth(net, TaskBatch.of(data), rule, 0.1, 3)
    net = net.to(how[1])
    MAML(net, inner_lr=0.1, inner_steps=3, meta_gradient=rule, backend=how[0]).meta_grad(data)
    assert distance(grads(net), expected) <= 3 * BOUND[how[1]]
    opaque = nn.Sequential(nn.Linear(3, 6), nn.Softsign(), nn.Linear(6, 4)).double()
    expected = truth(opaque, TaskBatch.of(classify()), rule, 0.1, 3)
    MAML(opaque, inner_lr=0.1, inner_steps=3, meta_gradient=rule, backend="autograd").meta_grad(classify())
    assert distance(grads(opaque), expected) <= 1e-11


def test_no_steps_and_no_gradient() -> None:
    """Without inner steps it is the query gradient; where that is zero, so is the solution, and nothing is divided by it."""
    data, model = classify(), mlp().double()
    maml = MAML(model, inner_steps=0, meta_gradient=ImplicitGradient())
    maml.meta_grad(data)
    found = grads(model)
    MAML(model, inner_steps=0).meta_grad(data)
    assert distance(found, grads(model)) == 0.0
    line = nn.Linear(3, 4).double()
    with torch.no_grad():
        line.weight.zero_(), line.bias.zero_()
    x, y, qx, qy = regress()
    MAML(line, loss="mse", inner_lr=0.1, inner_steps=2, meta_gradient=ImplicitGradient(), backend="torch").meta_grad((x, 0 * y, qx, 0 * qy))
    assert all(float(p.grad.abs().max()) == 0 for p in line.parameters())


def test_memory_and_products_do_not_grow_with_the_steps() -> None:
    data, few, many = classify(), methods.iMAML(mlp(), inner_steps=2), methods.iMAML(mlp(), inner_steps=40)
    plans = [maml.plan(data) for maml in (few, many)]
    kept = [sum(b.numel for b in plan.buffers.values() if b.home == "run" for _ in range(max(b.steps, 1))) for plan in plans]
    assert kept[0] == kept[1]
    (cg,) = [phase for phase in plans[1].schedule if phase.segments == ("cg",)]
    assert len(cg.steps()) == 5 and not {"hvp", "update_bwd"} & plans[1].segments.keys()


def test_verify() -> None:
    assert methods.iMAML(mlp(), inner_steps=3).verify(classify(tasks=4), repeats=1).ok


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"learn_inner_lr": True}, "no gradient of the inner rates"),
        ({"step_loss_weights": [0.1] * 16}, "does not look at the losses of the steps"),
        ({"adapt": "0.*"}, "leaves out '2.weight': adapt it, or freeze it"),
        ({"first_order": True}, "the implicit meta-gradient is of second order"),
        ({"lam": 0}, "lam=0: expected a finite number above 0"),
        ({"cg_steps": 0}, "cg_steps=0: expected a whole number of at least 1"),
        ({"cg_damping": -1.0}, "cg_damping=-1.0: expected a finite number of at least 0"),
    ],
    ids=str,
)
def test_errors(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        methods.iMAML(mlp(), **options)


def test_verify_replays_the_decisions_at_the_last_theta() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5, track_running_stats=False), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(20, 4))
    said = methods.iMAML(net, inner_steps=3).verify(classify(tasks=4, shape=(1, 6, 7)), repeats=1)
    assert said.ok and said.plan_error <= 1e-11 and said.equal_error <= 3e-5
    assert said.decisions == 4 * (4 * 6 + 7) * 2 * 5 * 2 * 2  # pooling and ReLU after it, at three steps, at theta_K and for the query


def test_random_programs() -> None:
    """Everything adapted, on both executors, with equal masks."""
    for n, rng in enumerate(randoms(30)):
        case = random_case(rng, conv=n % 3 == 0, native=True, query_from=None, first_order=False, steps=rng.choice([1, 3]))
        rates = {leaf.name: Rate("lr") for leaf in case.program.leaves if leaf.name not in running_statistics(case.program)}
        program = case.program.with_roles(lambda name, rates=rates: "adapted" if name in rates else "const")
        program = replace(program, leaves=tuple(replace(leaf, home="meta") for leaf in program.leaves))
        a = replace(case.arrangement, rates=rates, meta_gradient=ImplicitGradient(lam=1.0))
        sizes = list(zip(case.batch.support_sizes, case.batch.query_sizes, strict=True))
        positive = running_statistics(case.program)
        masks_equal_error(numbers_for(program, a, n, sizes, positive=positive), 1e-5)


def running_statistics(program: Program) -> set[str]:
    norms = [op for op in program.ops if op.name == "batchnorm" and op.attrs["statistics"] == "running"]
    return {leaf.name for leaf in program.leaves for op in norms if leaf.value in op.inputs[3:]}
