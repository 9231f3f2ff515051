"""The autograd executor: modules that cannot be traced, exact against the plain loop on the same random numbers."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from plain_loop import classify, distance, grads, mlp, one_thread, plain_loop, ragged, regress  # noqa: F401
from torch import nn

from fastmaml import MAML, BackendError, TaskBatch, TraceError

pytestmark = pytest.mark.filterwarnings("ignore:fastmaml cannot trace")
DOUBLE = torch.float64


class Block(nn.Module):
    """Of a ResNet-12 as few-shot learners write it: the mask depends on chance and on the training flag, its use on data."""

    def __init__(self, c_in: int, c_out: int, drop: float) -> None:
        super().__init__()
        sizes = ((c_in, c_out), (c_out, c_out), (c_out, c_out))
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1, bias=False) for i, o in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(c_out) for _ in sizes)
        self.down = nn.Sequential(nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out))
        self.drop = drop

    def forward(self, x):
        y = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(y))
            y = F.leaky_relu(y + self.down(x) if i == 2 else y, 0.1)
        y = F.max_pool2d(y, 2)
        if self.training and self.drop:
            seeds = torch.bernoulli(torch.full_like(y, self.drop))
            mask = 1 - F.max_pool2d(seeds, 3, 1, 1)
            if mask.sum() > 0:
                y = y * mask * (mask.numel() / mask.sum())
        return y


class ResNet12(nn.Module):
    def __init__(self, widths=(3, 4, 5, 6)) -> None:
        super().__init__()
        channels = (2, *widths)
        self.blocks = nn.Sequential(*(Block(channels[i], channels[i + 1], 0.1 * (i >= 2)) for i in range(4)))
        self.head = nn.Linear(widths[-1], 4)

    def forward(self, x):
        return self.head(self.blocks(x).mean((2, 3)))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.attention = nn.Linear(3, 8), nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.tokens(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.encoder(x).mean(1))


class LSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(3, 6, num_layers=2, dropout=0.2, batch_first=True), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


class Dropped(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 4))


NETS = {"ResNet-12": (ResNet12, (2, 16, 16)), "transformer": (Transformer, (5, 3)), "LSTM": (LSTM, (5, 3)), "dropout": (Dropped, (3,))}
nets = pytest.mark.parametrize("net", NETS)


def made(net: str, dtype: torch.dtype = DOUBLE, **options) -> tuple[MAML, tuple]:
    kind, shape = NETS[net]
    torch.manual_seed(0)
    return MAML(kind().to(dtype), **{"inner_lr": 0.1, "inner_steps": 3, **options}), classify(2, 5, 6, shape)


def agrees(maml: MAML, tasks, call=None, bound: float = 1e-10, parts=None, **truth) -> None:
    """Same gradient, and the generator left where the plain loop leaves it."""
    maml.plan(tasks)
    torch.manual_seed(3)
    out = (call or (lambda: maml(tasks)))()
    if out.loss.requires_grad:
        out.loss.backward()
    state = torch.get_rng_state()
    torch.manual_seed(3)
    expected = plain_loop(maml.model, tasks, **{"lr": 0.1, "steps": 3, "dtype": next(maml.parameters()).dtype, **truth})
    assert maml.executor == "autograd" and torch.equal(state, torch.get_rng_state())
    found = grads(maml)
    assert distance(found, {n: expected.gradients[n] for n in found}) <= bound
    assert out.loss.item() == pytest.approx(float(expected.loss), rel=1e-6)


@nets
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_exact(net: str, steps: int) -> None:
    maml, tasks = made(net, inner_steps=steps)
    agrees(maml, tasks, steps=steps)


@nets
def test_float32(net: str) -> None:
    maml, tasks = made(net, torch.float32)
    agrees(maml, tasks, bound=1e-2 if net == "ResNet-12" else 2e-5)  # ReLU and pooling decisions may flip


@nets
def test_meta_grad_and_outer_loss(net: str) -> None:
    maml, tasks = made(net, inner_steps=2)

    def outer(z, y):
        return F.cross_entropy(z.flatten(0, 1), y.flatten())

    agrees(maml, tasks, lambda: maml.meta_grad(tasks), steps=2)
    agrees(maml, tasks, lambda: maml(tasks, outer_loss=outer), steps=2)


def test_two_outer_losses_before_backward() -> None:
    """The query rows are computed again with the masks of their own forward, not of the last one."""
    maml, tasks = made("dropout")
    more = classify(2, 5, 6, seed=9)
    outer = lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten())  # noqa: E731
    maml.plan(tasks, entry="halves")
    torch.manual_seed(3)
    a, b = maml(tasks, outer_loss=outer), maml(more, outer_loss=outer)
    (a.loss + 2 * b.loss).backward(retain_graph=True)
    first = grads(maml)
    (a.loss + 2 * b.loss).backward()
    torch.manual_seed(3)
    expected = [plain_loop(maml.model, t, lr=0.1, steps=3).gradients for t in (tasks, more)]
    truth = {n: expected[0][n] + 2 * expected[1][n] for n in first}
    assert distance(first, truth) <= 1e-10 and distance(grads(maml), truth) <= 1e-10


WEIGHT = torch.tensor([1.0, 2.0, 3.0, 4.0])
OPTIONS = {
    "first order": ({"first_order": True}, {"first_order": True}),
    "sum": ({"reduction": "sum", "inner_lr": 0.01}, {"lr": 0.01, "loss": lambda z, y: F.cross_entropy(z, y, reduction="sum")}),
    "memory": ({"memory": "fast"}, {}),
    "adapt": ({"adapt": "3.*"}, {"adapt": "3.*"}),
    "adapt body": ({"adapt": "0.*"}, {"adapt": "0.*"}),
    "smoothing": ({"loss": nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1)}, {"loss": lambda z, y: F.cross_entropy(z, y, WEIGHT.to(z), label_smoothing=0.1)}),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options(case: str) -> None:
    options, truth = OPTIONS[case]
    maml, tasks = made("dropout", **options)
    agrees(maml, tasks, **truth)


@pytest.mark.parametrize("net", ["dropout", "LSTM"])
@pytest.mark.parametrize("rates", [0.1, [0.1, 0.2, 0.15], {"*": 0.1}, {"*": [0.1, 0.2, 0.15]}], ids=["scalar", "step", "name", "name and step"])
@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
def test_learned_rates(net: str, rates, first_order: bool) -> None:
    maml, tasks = made(net, inner_lr=rates, learn_inner_lr=True, first_order=first_order)
    values = {n: v.detach().clone().requires_grad_() for n, v in maml.rates.values.items()}

    def rate(name: str, k: int):
        r = maml.rates.rates[name]
        return values[r.name][k] if r.per_step else values[r.name]

    agrees(maml, tasks, lr=rate, learned=values, first_order=first_order)


def test_multi_step_loss_without_chance() -> None:
    maml, tasks = made("dropout", step_loss_weights=[0.1, 0.2, 0.3, 0.4])
    maml.eval()
    forced = MAML(maml.model, inner_lr=0.1, inner_steps=3, step_loss_weights=[0.1, 0.2, 0.3, 0.4], backend="autograd")
    agrees(forced, tasks, step_weights=[0.1, 0.2, 0.3, 0.4])


def test_regression_and_ragged_tasks() -> None:
    model = mlp().double()
    agrees(MAML(model, inner_lr=0.1, inner_steps=3, loss="mse", backend="autograd"), regress(), loss=F.mse_loss)
    agrees(MAML(model, inner_lr=0.1, inner_steps=3, backend="autograd"), ragged())


def test_tokens() -> None:
    """Integers go into an embedding as they are."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 6), nn.Flatten(), nn.Linear(18, 4)).double()
    g = torch.Generator().manual_seed(0)
    tasks = tuple(torch.randint(0, high, shape, generator=g) for high, shape in ((11, (2, 5, 3)), (4, (2, 5)), (11, (2, 6, 3)), (4, (2, 6))))
    maml = MAML(model, inner_lr=0.1, inner_steps=3)
    agrees(maml, tasks)
    with torch.no_grad():
        assert maml.adapt(*tasks[:2])(tasks[2]).shape == (2, 6, 4)


class Sometimes(nn.Module):
    """Which parameters are read depends on the data, and one never is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.never = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x):
        y = self.a(x).tanh() * (1 + x.sum().detach())
        return y + self.b(x) if len(x) > 5 else y


def test_parameters_that_are_read_sometimes() -> None:
    maml, tasks = MAML(Sometimes().double(), inner_lr=0.1, inner_steps=3), classify(2, 5, 6)
    agrees(maml, tasks)  # never: None, as in the plain loop; b: of the query alone
    torch.manual_seed(3)
    maml.meta_grad(tasks)
    assert maml.model.never.weight.grad is None and maml.model.b.weight.grad is not None


def test_frozen_and_tied_parameters() -> None:
    maml, tasks = made("transformer")
    maml.model.encoder.requires_grad_(False)
    maml.model.encoder.layers[1].linear1.weight = maml.model.encoder.layers[0].linear1.weight
    agrees(maml, tasks)


class Noted(nn.Sequential):
    """Writes down the masks that are drawn."""

    def forward(self, x):
        mask = torch.bernoulli(torch.full((len(x), 8), 0.5, dtype=x.dtype))
        self.seen.append(mask)
        return self[1]((self[0](x).tanh() + 0 * x.sum().item()) * mask)


def test_masks_are_replayed() -> None:
    model = Noted(nn.Linear(3, 8), nn.Linear(8, 4)).double()
    model.seen = []
    maml, tasks = MAML(model, inner_steps=3), classify(1, 5, 6)
    maml.plan(tasks)
    model.seen.clear()
    maml(tasks)
    drawn = [m for m in model.seen if len(m) == 5]
    # gradient passes 0 1 2, then Hessian-vector products 2 (its graph is kept), 1, 0
    assert len(drawn) == 5 and torch.equal(drawn[3], drawn[1]) and torch.equal(drawn[4], drawn[0])
    assert not torch.equal(drawn[0], drawn[1])


def test_what_cannot_be_replayed_is_refused() -> None:
    class Counting(nn.Sequential):
        def forward(self, x):
            self.calls += 1
            return super().forward(x) * (self.calls + 0 * x.sum().item())

    model = Counting(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))
    model.calls = 1
    with pytest.raises(RuntimeError, match="other outputs when a step is computed again.*keeps state"):
        MAML(model, inner_steps=3)(classify())
    model.calls = 1
    MAML(model, inner_steps=3, first_order=True)(classify())  # nothing is computed again


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
