"""The autograd executor leaves the module alone; when it is chosen, and how it behaves beside torch's own modes."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from autograd_cases import agrees, made, nets
from plain_loop import classify, distance, grads, mlp, plain_loop
from torch import nn

from fastmaml import MAML, BackendError, TaskBatch, TraceError

pytestmark = pytest.mark.filterwarnings("ignore:fastmaml cannot trace")


# ---------------------------------------------------------------------------------------------------------------- the module is left alone
@nets
def test_the_module_is_left_alone(net: str) -> None:
    maml, tasks = made(net)
    parameters = {n: (p, p.detach().clone()) for n, p in maml.model.named_parameters()}
    buffers = {n: (b, b.clone()) for n, b in maml.model.named_buffers()}
    maml(tasks).loss.backward()
    maml.adapt(*tasks[:2])(tasks[2])
    assert all(p is parameters[n][0] and torch.equal(p, parameters[n][1]) for n, p in maml.model.named_parameters())
    assert all(b is buffers[n][0] and torch.equal(b, buffers[n][1]) for n, b in maml.model.named_buffers())
    assert torch._C._get_mkldnn_enabled()
    copy.deepcopy(maml)(tasks)


def test_the_module_is_left_alone_by_an_error() -> None:
    class Fails(nn.Linear):
        def forward(self, x):
            if len(x) == 6 and float(x.sum()) != 0:
                raise ArithmeticError("six rows")
            return super().forward(x)

    maml = MAML(Fails(3, 4), inner_steps=2, backend="autograd")
    weight = maml.model.weight
    with pytest.raises(ArithmeticError, match="six rows"):
        maml(classify(2, 5, 6))
    assert maml.model.weight is weight and torch.is_grad_enabled()
    maml(classify(2, 5, 7)).loss.backward()


@pytest.mark.parametrize("mode", [None, "batch", "running"])
def test_batchnorm(mode: str | None) -> None:
    maml, tasks = made("ResNet-12", batchnorm=mode, inner_steps=2)
    for block in maml.model.blocks:
        block.drop = 0.0
    with torch.no_grad():
        for norm in (m for m in maml.model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.running_mean.normal_(0, 0.1)
    maml = MAML(maml.model, inner_lr=0.1, inner_steps=2, batchnorm=mode, backend="autograd")
    agrees(maml, tasks, steps=2, batchnorm=mode or "batch")
    assert all(m.training for m in maml.modules())
    maml.eval()
    if mode is None:
        with pytest.raises(ValueError, match=r"layer 'blocks.0.norms.0' \(BatchNorm2d\) is in eval mode.*batchnorm='batch'.*'running'.*model.train\(\)"):
            maml(tasks)
    else:
        agrees(maml, tasks, steps=2, batchnorm=mode)


def test_batchnorm_modes_that_it_has_not() -> None:
    maml, tasks = made("ResNet-12")
    with pytest.raises(ValueError, match="batchnorm='support' needs a model that can be traced.*BatchNorm2d.*choose 'batch' or 'running'"):
        maml(tasks, batchnorm="support")
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Dropout(), nn.Linear(8, 4))
    with pytest.raises(ValueError, match="batchnorm='running', but layer '1'.*no running statistics"):
        MAML(model, batchnorm="running", backend="autograd")(classify())


# ---------------------------------------------------------------------------------------------------------------- choosing it
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("net", "layer"), [("ResNet-12", "blocks"), ("transformer", "attention"), ("LSTM", "rnn"), ("dropout", "2")])
def test_one_warning_names_the_layer(net: str, layer: str) -> None:
    maml, tasks = made(net, inner_steps=1)
    with pytest.warns(UserWarning, match=f"cannot trace layer '{layer}.*autograd executor") as caught:
        maml(tasks)
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        maml(tasks, inner_steps=2).loss.backward()
        maml.adapt(*tasks[:2])(tasks[2])
        maml.meta_grad([v[:1] for v in tasks])
        if net != "ResNet-12":
            MAML(maml.model, backend="autograd")(tasks)  # asked for: nothing to say


@nets
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_another_backend_raises(net: str, backend: str) -> None:
    maml, tasks = made(net, backend=backend)
    with pytest.raises(TraceError, match="cannot trace layer.*backend='autograd' runs any module"):
        maml(tasks)


def test_asked_for_by_name_it_runs_what_could_be_traced() -> None:
    maml = MAML(mlp().double(), inner_lr=0.1, inner_steps=3, backend="autograd")
    agrees(maml, classify())
    with pytest.raises(BackendError, match="backend='cuda'.*the parameters are on cpu.*Able to"):
        MAML(mlp(), backend="cuda")(classify())


def test_evaluation_draws_no_graph(monkeypatch) -> None:
    maml, tasks = made("dropout")
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: pytest.fail("a gradient") if k.get("create_graph") else grad(*a, **k))
    with torch.no_grad():
        maml(tasks)
    maml.adapt(*tasks[:2])
    with pytest.raises(pytest.fail.Exception):
        maml(tasks)


grad = torch.autograd.grad


def test_inference_mode() -> None:
    maml, tasks = made("LSTM")
    maml.eval()
    expected = maml.adapt(*tasks[:2])(tasks[2])
    with torch.inference_mode():
        inside = [v.clone() for v in tasks]
        assert torch.equal(maml.adapt(*inside[:2])(inside[2]), expected)
        assert torch.equal(maml(inside).logits, expected)


@pytest.mark.filterwarnings("ignore:autocast")
def test_autocast_does_not_reach_the_module() -> None:
    maml, tasks = made("LSTM", torch.float32)
    maml.plan(tasks)
    losses = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            losses.append(maml(tasks, outer_loss=lambda z, y: F.cross_entropy(z.float().flatten(0, 1), y.flatten())).loss)
            losses[-1].backward()
    assert losses[0].item() == losses[1].item()
    assert all(torch.isfinite(g).all() for g in grads(maml).values())


def test_threads_take_turns() -> None:
    maml, failed = made("LSTM")[0], []
    maml.eval()
    batches = [classify(2, 5, 6, (5, 3), seed=s) for s in range(3)]
    expected = [plain_loop(maml.model, b, lr=0.1, steps=3).gradients for b in batches]

    names, parameters = zip(*maml.named_parameters(), strict=True)  # here: while a module runs, it holds other tensors

    def work(i: int) -> None:
        for _ in range(3):
            found = grad(maml(batches[i]).loss, parameters)
            error = distance(dict(zip(names, found, strict=True)), expected[i])
            failed.extend([error] if error > 1e-10 else [])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_non_finite_tasks() -> None:
    maml, tasks = made("LSTM", on_nonfinite="skip")
    maml.eval()
    broken = [v.clone() for v in tasks]
    broken[0][1] = float("inf")
    with pytest.warns(UserWarning, match=r"left out: \[1\]"):
        maml(broken).loss.backward()
    expected = plain_loop(maml.model, TaskBatch.of(tasks).select([0]), lr=0.1, steps=3, task_weights=[0.5]).gradients
    assert distance(grads(maml), expected) <= 1e-10


RETURNS = {
    "a tuple": (lambda m, x: (m[0](x), x), "returns tuple for 2 samples"),
    "one number": (lambda m, x: m[0](x).sum(), r"returns torch.float32 \[\] for 2 samples"),
    "the wrong rows": (lambda m, x: m[0](x)[:1], r"returns torch.float32 \[1, 4\] for 2 samples"),
    "integers": (lambda m, x: m[0](x).argmax(1, keepdim=True), r"returns torch.int64 \[2, 1\]"),
    "an error": (lambda m, x: m[0](x[:, :2]), r"cannot run on samples of shape \[3\] \(torch.float32\): RuntimeError"),
}


@pytest.mark.parametrize("case", RETURNS)
def test_modules_that_return(case: str) -> None:
    function, message = RETURNS[case]

    class Odd(nn.Sequential):
        def forward(self, x):
            return function(self, x)

    with pytest.raises(ValueError, match=message):
        MAML(Odd(nn.Linear(3, 4)), backend="autograd")(classify())


def test_scripted_modules() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.trace(mlp(), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="a scripted module.*pass the nn.Module"):
        MAML(scripted, backend="autograd")(classify())
