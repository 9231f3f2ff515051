"""The habits of training loops: what they do between forward, backward and step, against a plain torch loop."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from maml_cases import BOUND, agrees, backends, made
from plain_loop import classify, distance, grads, mlp, one_thread, plain_loop  # noqa: F401
from torch import nn

from fastmaml import MAML


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


SAYS = hasattr(torch._C._autograd, "_get_current_graph_task_keep_graph")  # whether torch says that nobody will go backward again; 2.4 does not


@pytest.mark.skipif(not SAYS, reason="this torch does not say whether a graph is kept")
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
    if outer is None and SAYS:
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
        agrees(maml, tasks, lambda: maml(tasks).loss.backward())
    assert caught[0].filename == __file__  # where the user called


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
