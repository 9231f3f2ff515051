"""MAML as one writes it in torch, on the user's nn.Module: the truth of the tests of what users call. It shares no line with fastmaml."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from inner_sgd import moves
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastmaml import SGD, TaskBatch


@pytest.fixture(autouse=True)
def one_thread():
    """Imported by a test file: networks of a few neurons wait for a second thread more than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Truth(NamedTuple):
    loss: Tensor
    gradients: dict[str, Tensor | None]  # by name of the parameter; None where torch gives none
    logits: list[Tensor]
    task_losses: Tensor
    support_losses: Tensor  # [tasks, steps]
    adapted: list[dict[str, Tensor]]


def plain_loop(
    model: nn.Module,
    tasks: Any,
    *,
    lr: float | Callable[[str, int], Any] = 0.01,
    steps: int = 1,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    adapt: str = "*",
    first_order: bool = False,
    step_weights: Sequence[float] | None = None,
    task_weights: Sequence[float] | None = None,
    outer: Callable[[Any, Any], Tensor] | None = None,
    batchnorm: str | None = None,
    learned: Mapping[str, Tensor] | None = None,
    optimizer: SGD | None = None,
    dtype: torch.dtype = torch.float64,
) -> Truth:
    """The meta-gradient by torch.autograd.grad with create_graph, on a copy of ``model`` in ``dtype``.

    ``lr``: a number, or a function of (name, step). ``step_weights``: of theta_0 .. theta_K. ``outer``: a loss of all logits and all targets.
    ``learned``: tensors that ``lr`` reads, to be differentiated too.
    """
    model = copy.deepcopy(model).to(dtype)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms if batchnorm else ():
        norm.train(batchnorm != "running")
    batch = TaskBatch.of(tasks)
    parameters = dict(model.named_parameters())
    names = [name for name, p in parameters.items() if p.requires_grad and fnmatchcase(name, adapt)]
    rate = lr if callable(lr) else lambda name, k: lr
    last, states, targets, support_losses = [], [], [], []
    losses: Any = []
    with _double_backward(model):
        for t in range(len(batch)):
            sx, sy, qx, qy = (_cast(v, dtype) for v in batch.task(t))
            cut = slice(None) if batch.ways is None else slice(int(batch.ways[t]))
            theta, inner_losses, velocity = parameters, [], {}
            trajectory = [theta]
            for k in range(steps):
                inner = loss(_call(model, theta, sx)[:, cut], sy)
                grads = torch.autograd.grad(inner, [theta[n] for n in names], create_graph=not first_order, allow_unused=True)
                found = {n: g for n, g in zip(names, grads, strict=True) if g is not None}
                moved = {n: theta[n] - rate(n, k) * d for n, d in moves(optimizer or SGD(), theta, found, velocity).items()}
                theta = {**theta, **moved}
                trajectory.append(theta)
                inner_losses.append(inner.detach())

            def query(theta: Mapping[str, Tensor], sx: Tensor = sx, qx: Tensor = qx) -> Tensor:
                if batchnorm != "support":
                    return _call(model, theta, qx)
                for norm in norms:
                    norm.forward = partial(_support_norm, norm, len(sx))
                out = _call(model, theta, torch.cat([sx, qx]))[len(sx) :]
                for norm in norms:
                    del norm.forward
                return out

            logits = query(theta)
            if step_weights is None:
                losses.append(None if outer else loss(logits[:, cut], qy))
            else:
                parts = [w * loss((logits if k == steps else query(trajectory[k]))[:, cut], qy) for k, w in enumerate(step_weights) if w]
                losses.append(sum(parts))
            last.append(logits)
            targets.append(qy)
            states.append({n: v.detach() for n, v in theta.items()})
            support_losses.append(torch.stack(inner_losses) if inner_losses else torch.zeros(0, dtype=dtype))
        if outer is None:
            losses = torch.stack(losses)
            weights = torch.full_like(losses, 1 / len(losses)) if task_weights is None else torch.tensor(task_weights, dtype=torch.float64).to(losses)
            total = (losses * weights).sum()
        else:
            same = len({len(z) for z in last}) == 1
            total = outer(torch.stack(last) if same else tuple(last), torch.stack(targets) if same else tuple(targets))
        wanted = {n: p for n, p in parameters.items() if p.requires_grad} | dict(learned or {})
        grads = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    per_task = torch.zeros(0) if outer else losses.detach()
    gradients = dict(zip(wanted, grads, strict=True))
    return Truth(total.detach(), gradients, [z.detach() for z in last], per_task, torch.stack(support_losses), states)


def _call(model: nn.Module, theta: Mapping[str, Tensor], x: Tensor) -> Tensor:
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    return functional_call(model, (dict(theta), buffers), (x,))


def _cast(v: Tensor, dtype: torch.dtype) -> Tensor:
    return v.to(dtype) if v.is_floating_point() or v.dtype is torch.uint8 else v


def _support_norm(norm: nn.Module, n: int, x: Tensor) -> Tensor:
    dims, shape = (0, *range(2, x.dim())), (1, -1, *[1] * (x.dim() - 2))
    mean, var = x[:n].mean(dims).view(shape), x[:n].var(dims, unbiased=False).view(shape)
    return (x - mean) / (var + norm.eps).sqrt() * norm.weight.view(shape) + norm.bias.view(shape)


@contextlib.contextmanager
def _double_backward(model: nn.Module):
    """Attention and recurrent layers have a double backward in their plain implementations only."""
    recurrent = any(isinstance(m, nn.RNNBase) for m in model.modules())
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(enabled and not recurrent)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


def distance(got: Mapping[str, Tensor | None], truth: Mapping[str, Tensor | None]) -> float:
    """Norm of the difference over norm of the truth, all parameters together. None must stand where the truth has None."""
    assert got.keys() == truth.keys(), got.keys() ^ truth.keys()
    assert [n for n, g in got.items() if g is None] == [n for n, g in truth.items() if g is None]
    pairs = [(got[n].double(), g.double()) for n, g in truth.items() if g is not None]
    return float(sum(((a - b) ** 2).sum() for a, b in pairs) ** 0.5 / sum((b**2).sum() for _, b in pairs) ** 0.5)


def grads(module: nn.Module) -> dict[str, Tensor | None]:
    """``.grad`` of the trained parameters (of a model, or of a MAML object), taken away."""
    found = {n: p.grad for n, p in module.named_parameters() if p.requires_grad}
    module.zero_grad(set_to_none=True)
    return found


# ---------------------------------------------------------------------------------------------------------------- small models and tasks
def mlp(sizes: Sequence[int] = (3, 8, 8, 4), seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for i, o in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(i, o), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def classify(tasks: int = 3, support: int = 6, query: int = 7, shape: Sequence[int] = (3,), ways: int = 4, seed: int = 1) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    x = [torch.randn(tasks, n, *shape, generator=g) for n in (support, query)]
    y = [torch.randint(0, ways, (tasks, n), generator=g) for n in (support, query)]
    return x[0], y[0], x[1], y[1]


def regress(tasks: int = 3, support: int = 6, query: int = 7, shape: Sequence[int] = (3,), outputs: int = 4, seed: int = 1) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    x = [torch.randn(tasks, n, *shape, generator=g) for n in (support, query)]
    y = [torch.randn(tasks, n, outputs, generator=g) for n in (support, query)]
    return x[0], y[0], x[1], y[1]


def ragged(ways: Sequence[int] = (2, 4, 3), seed: int = 2, shape: Sequence[int] = (3,)) -> TaskBatch:
    """Tasks of different sizes and ways."""
    g = torch.Generator().manual_seed(seed)
    tasks = []
    for t, w in enumerate(ways):
        n, q = 3 + t, 5 + 2 * t
        x = [torch.randn(m, *shape, generator=g) for m in (n, q)]
        y = [torch.randint(0, w, (m,), generator=g) for m in (n, q)]
        tasks.append((x[0], y[0], x[1], y[1]))
    return TaskBatch.from_tasks(tasks, ways=list(ways))
