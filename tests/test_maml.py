"""What users call, against a plain torch loop on the same nn.Module: gradients, options, and the habits of training loops."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import warnings
from operator import attrgetter

import pytest
import torch
import torch.nn.functional as F
from plain_loop import classify, distance, grads, mlp, one_thread, plain_loop, ragged, regress  # noqa: F401
from torch import nn

import fastmaml
from fastmaml import MAML, NonFiniteError, TaskBatch
from fastmaml.executors import cpu

LOSSES = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss}
BOUND = {torch.float32: 3e-6, torch.float64: 1e-11}
needs_cpu = pytest.mark.skipif(cpu._cpu is None, reason="fastmaml._cpu is not built")
BACKENDS = [pytest.param(("cpu", torch.float32), marks=needs_cpu, id="cpu"), ("torch", torch.float32), ("torch", torch.float64)]
backends = pytest.mark.parametrize("how", BACKENDS, ids=lambda h: f"{h[0]}-{str(h[1]).removeprefix('torch.')}" if isinstance(h, tuple) else None)


def made(how=("auto", torch.float32), model: nn.Module | None = None, **options) -> MAML:
    model = (mlp() if model is None else model).to(how[1])
    return MAML(model, **{"inner_lr": 0.3, "inner_steps": 3, "backend": how[0], **options})


def agrees(maml: MAML, tasks, call=None, factor: float = 1.0, **truth) -> None:
    """The gradient that ``maml`` leaves in ``.grad`` is that of the plain loop in float64."""
    call = call or (lambda: maml(tasks).loss.backward())
    call()
    found = {n: g if g is None else g / factor for n, g in grads(maml.model).items()}
    dtype = next(maml.model.parameters()).dtype
    expected = plain_loop(maml.model, tasks, **{"lr": 0.3, "steps": 3, **truth}).gradients
    assert distance(found, {n: expected[n] for n in found}) <= BOUND[dtype]


# ---------------------------------------------------------------------------------------------------------------- the gradient
@backends
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("how_called", ["backward", "meta_grad", "meta_grad twice", "outer_loss", "meta_grad outer_loss"])
def test_gradient(how, loss: str, how_called: str) -> None:
    maml, tasks = made(how, loss=loss), regress() if loss == "mse" else classify()

    def outer(logits, y):  # what the built-in losses compute: the mean over tasks
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


# ---------------------------------------------------------------------------------------------------------------- training loops
@backends
def test_scaled_losses_accumulate(how) -> None:
    maml, tasks, more = made(how), classify(), classify(seed=9)
    expected = [plain_loop(maml.model, t, lr=0.3, steps=3).gradients for t in (tasks, more)]
    first, second = maml(tasks), maml(more)  # two forwards before one backward
    (first.loss / 4 + 3 * second.loss).backward()
    assert distance(grads(maml.model), {n: expected[0][n] / 4 + 3 * expected[1][n] for n in expected[0]}) <= BOUND[how[1]]
    for t in (tasks, more):
        loss = maml(t).loss
        loss /= 2  # in place, as accumulation loops write it
        loss.backward()
    assert distance(grads(maml.model), {n: (expected[0][n] + expected[1][n]) / 2 for n in expected[0]}) <= BOUND[how[1]]


def test_gradients_become_grad_without_a_copy() -> None:
    maml = made(("cpu", torch.float32))
    maml.model.zero_grad()
    out = maml(classify())
    addresses = [g.data_ptr() for g in out.loss.grad_fn.gradients]
    out.loss.backward()
    assert [p.grad.data_ptr() for p in maml.parameters() if p.grad is not None] == addresses


@backends
@pytest.mark.parametrize("outer", [None, lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten())], ids=["built in", "outer_loss"])
def test_backward_twice(how, outer) -> None:
    maml, tasks = made(how), classify()
    out = maml(tasks, outer_loss=outer)
    out.loss.backward(retain_graph=True)
    once = grads(maml.model)
    out.loss.backward()
    again = grads(maml.model)
    if outer is None:
        with pytest.raises(RuntimeError, match="second backward.*retain_graph=True"):
            out.loss.backward()
    assert all(torch.equal(once[n], g) and once[n].data_ptr() != g.data_ptr() for n, g in again.items())


@backends
def test_two_outer_losses_before_backward(how) -> None:
    def outer(logits, y):
        return F.cross_entropy(logits.flatten(0, 1), y.flatten()) + 0.1 * logits.square().mean()

    maml, tasks, more = made(how), classify(), classify(seed=9)
    expected = [plain_loop(maml.model, t, lr=0.3, steps=3, outer=outer).gradients for t in (tasks, more)]
    (maml(tasks, outer_loss=outer).loss + 2 * maml(more, outer_loss=outer).loss).backward()
    assert distance(grads(maml.model), {n: expected[0][n] + 2 * expected[1][n] for n in expected[0]}) <= BOUND[how[1]]


def test_torch_autograd_grad_and_hooks() -> None:
    maml, tasks, seen = made(), classify(), []
    parameters = list(maml.parameters())
    handle = parameters[0].register_hook(lambda g: seen.append(g) or 2 * g)
    found = torch.autograd.grad(maml(tasks).loss, parameters)
    handle.remove()
    expected = plain_loop(maml.model, tasks, lr=0.3, steps=3).gradients
    assert len(seen) == 1
    assert distance({"a": found[0] / 2, "b": found[1]}, {"a": expected["0.weight"], "b": expected["0.bias"]}) <= 3e-6


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.spare = mlp(), nn.Linear(2, 2)

    def forward(self, x):
        return self.net(x)


@backends
def test_unused_parameters_get_none(how) -> None:
    maml, tasks = made(how, Unused()), classify()
    agrees(maml, tasks)  # None stands where the plain loop has None
    agrees(maml, tasks, lambda: maml.meta_grad(tasks))
    agrees(maml, tasks, lambda: maml(tasks, outer_loss=lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten())).loss.backward())
    assert "spare.weight" not in maml.adapt(*tasks[:2]).weights


@pytest.mark.parametrize("name", ["logits", "task_losses", "support_losses"])
def test_only_the_loss_carries_gradient(name: str) -> None:
    maml, tasks = made(), classify()
    out = maml(tasks)
    with pytest.raises(RuntimeError, match="outer_loss="):
        getattr(out, name).sum().backward()
    with pytest.raises(RuntimeError, match="outer_loss="):  # never silently dropped from a sum
        (out.loss + getattr(out, name).sum()).backward()
    if name != "task_losses":
        out = maml(tasks, outer_loss=lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten()))
        with pytest.raises(RuntimeError, match="outer_loss="):
            (out.loss + getattr(out, name).sum()).backward()
    assert all(p.grad is None for p in maml.parameters())


@pytest.mark.parametrize("outer", [None, lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten())], ids=["built in", "outer_loss"])
def test_a_second_derivative_is_refused(outer) -> None:
    maml = made()
    with pytest.raises(RuntimeError, match="create_graph=True is not supported"):
        torch.autograd.grad(maml(classify(), outer_loss=outer).loss, list(maml.parameters()), create_graph=True)


def test_no_grad_does_no_gradient_work(monkeypatch) -> None:
    entries, run = [], MAML._run
    monkeypatch.setattr(MAML, "_run", lambda self, tasks, entry, **kw: entries.append(entry) or run(self, tasks, entry, **kw))
    maml, tasks = made(), classify()
    expected = maml(tasks)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            outs = maml(tasks), maml(tasks, outer_loss=lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten()))
        for out in outs:
            assert out.loss.item() == pytest.approx(expected.loss.item()) and not out.loss.requires_grad and not out.logits.requires_grad
            assert torch.equal(out.logits, expected.logits.detach())
    assert entries == ["train"] + ["evaluate"] * 4
    assert maml.plan(tasks, entry="evaluate").count() < maml.plan(tasks).count()


def test_meta_grad_without_grad_mode() -> None:
    maml, tasks = made(), classify()
    with torch.no_grad():
        agrees_with = maml.meta_grad(tasks)
    assert not agrees_with.loss.requires_grad and all(p.grad is not None for p in maml.parameters())


@backends
def test_autocast_is_ignored_and_says_so(how) -> None:
    maml, tasks = made(how), classify()
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.warns(UserWarning, match="autocast is ignored") as caught:
        agrees(maml, tasks)
    assert caught[0].filename == __file__


def test_inputs_changed_between_forward_and_backward() -> None:
    maml, tasks = made(), [v.clone() for v in classify()]
    out = maml(tasks)
    expected = plain_loop(maml.model, tasks, lr=0.3, steps=3).gradients
    tasks[0].zero_()
    out.loss.backward()  # the gradients were there already
    assert distance(grads(maml.model), expected) <= 3e-6


@backends
@pytest.mark.parametrize("what", ["support_x", "support_y", "query_x", "parameter", "rate"])
def test_changes_before_the_reverse_half(how, what: str) -> None:
    """As torch: what backward still needs must not have changed."""
    maml = made(how, learn_inner_lr=True)
    tasks = [v.to(how[1]) if v.is_floating_point() else v.clone() for v in classify()]
    out = maml(tasks, outer_loss=lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten()))
    with torch.no_grad():
        changed = {"parameter": maml.model[0].weight, "rate": maml.rates.values["inner_lr"]}
        changed |= dict(zip(("support_x", "support_y", "query_x"), tasks[:3], strict=True))
        changed[what].zero_()
    with pytest.raises(RuntimeError, match="changed in place between forward and backward"):
        out.loss.backward()
    assert all(p.grad is None for p in maml.parameters())


@backends
def test_what_leaves_is_never_written_again(how) -> None:
    maml, tasks, more = made(how), classify(), classify(seed=9)
    first, adapted = maml(tasks), maml.adapt(*tasks[:2])
    first.loss.backward()
    kept = [first.loss, first.logits, first.task_losses, first.support_losses, first.correct, first.finite, *adapted.weights.values()]
    kept += [p.grad for p in maml.parameters()]
    copies = [v.detach().clone() for v in kept]
    maml.zero_grad(set_to_none=True)
    maml(more).loss.backward()
    maml.meta_grad(more)
    maml.adapt(*more[:2])(more[2])
    assert all(torch.equal(v, c) for v, c in zip(kept, copies, strict=True))


def test_grad_scaler_and_clipping() -> None:
    maml, tasks = made(), classify()
    optimizer = torch.optim.SGD(maml.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    expected = plain_loop(maml.model, tasks, lr=0.3, steps=3).gradients
    before = {n: p.detach().clone() for n, p in maml.named_parameters()}
    scaler.scale(maml(tasks).loss).backward()
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(maml.parameters(), 1e-3)
    assert float(norm) == pytest.approx(float(sum(g.square().sum() for g in expected.values()) ** 0.5), rel=1e-4)
    scaler.step(optimizer)
    moved = {n: (before[n] - p.detach()) / 0.1 for n, p in maml.named_parameters()}
    assert distance(moved, {n: g * 1e-3 / norm for n, g in expected.items()}) < 1e-3


@pytest.mark.parametrize("learn", [False, True], ids=["fixed rates", "learned rates"])
def test_an_optimizer_lowers_the_loss(learn: bool) -> None:
    maml, tasks = made(learn_inner_lr=learn), classify()
    optimizer = torch.optim.Adam(maml.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        out = maml(tasks)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert (maml.rates.values["inner_lr"].item() != pytest.approx(0.3)) == learn


def test_ddp(tmp_path) -> None:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    maml, tasks = made(inner_lr={"*": 0.3}, learn_inner_lr=True), classify()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        ddp = nn.parallel.DistributedDataParallel(maml)
        for _ in range(2):  # the second iteration needs all hooks of the first to have fired
            maml.zero_grad()
            ddp(tasks).loss.backward()
        found = grads(maml.model)
        state = ddp.state_dict()
    finally:
        torch.distributed.destroy_process_group()
    assert distance(found, plain_loop(maml.model, tasks, lr=0.3, steps=3).gradients) <= 3e-6
    assert list(state) == [f"module.{n}" for n in maml.state_dict()]


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


# ---------------------------------------------------------------------------------------------------------------- the user's model
def conv_net(channels: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(channels * 9, 4)]
    return nn.Sequential(*layers)


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


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 4)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.head(self.b(self.a(x).tanh()).tanh())


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
