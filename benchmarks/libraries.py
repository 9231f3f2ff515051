"""The meta-gradient by other libraries, each used as its own examples use it. None is imported before it is asked for."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import Peer, Step, loss_of, store
from benchmarks.workloads import Tasks, Workload


def _missing(library: str, load: Callable[[], object] | None = None) -> str | None:
    """Why the library cannot be imported, or None."""
    try:
        (load or (lambda: importlib.import_module(library)))()
    except Exception as error:  # a library that this torch or numpy breaks may raise anything
        if isinstance(error, ModuleNotFoundError) and error.name == library:
            return f"not installed (pip install {library})"
        return f"{library} is there but does not import: {error}"


def _store_gradient_at(fast: Iterable[Tensor], model: nn.Module, loss: Tensor) -> None:
    """First order: the gradient at the last fast weights, in the order of the parameters, is taken for theirs."""
    names = [name for name, _ in model.named_parameters()]
    store(model, dict(zip(names, torch.autograd.grad(loss, list(fast)), strict=True)))


# ------------------------------------------------------------------------------------------------- learn2learn
def _learn2learn() -> ModuleType:
    """Its module of MAML: installed, or of the source checkout $LEARN2LEARN. There the packages stay bare: their __init__ needs compiled data sets."""
    source = os.environ.get("LEARN2LEARN")
    for name in ("learn2learn", "learn2learn.algorithms") if source else ():
        if name not in sys.modules:
            sys.modules[name] = ModuleType(name)
            sys.modules[name].__path__ = [os.path.join(source, *name.split("."))]
    return importlib.import_module("learn2learn.algorithms.maml")


def learn2learn(model: nn.Module, w: Workload) -> Step:
    """examples/vision/maml_omniglot.py: MAML.clone and adapt. For some of the parameters, adapt as the docstring of ``maml_update`` writes it out."""
    l2l, loss_fn, adapted = _learn2learn(), loss_of(w), w.adapted(model)
    maml = l2l.MAML(model, lr=w.inner_lr, first_order=w.first_order)

    def adapt_some(learner: nn.Module, loss: Tensor) -> None:
        params = dict(learner.module.named_parameters())
        grads = torch.autograd.grad(loss, [params[n] for n in adapted], create_graph=not w.first_order)
        l2l.maml_update(learner.module, learner.lr, list(map(dict(zip(adapted, grads, strict=True)).get, params)))

    adapt = l2l.MAML.adapt if len(adapted) == len(list(model.parameters())) else adapt_some

    def step(tasks: Tasks) -> Tensor:
        total = torch.zeros(())
        for sx, sy, qx, qy in zip(*tasks, strict=True):
            learner = maml.clone()
            for _ in range(w.inner_steps):
                adapt(learner, loss_fn(learner(sx), sy))
            query = loss_fn(learner(qx), qy) / len(tasks[0])
            query.backward()
            total = total + query.detach()
        return total

    return step


# ------------------------------------------------------------------------------------------------- higher
def higher(model: nn.Module, w: Workload) -> Step:
    """examples/maml-omniglot.py: innerloop_ctx over torch.optim.SGD of the adapted parameters; first order without higher gradients tracked."""
    import higher as library

    loss_fn, params = loss_of(w), dict(model.named_parameters())
    inner = torch.optim.SGD([params[n] for n in w.adapted(model)], w.inner_lr)
    options = {"copy_initial_weights": False, "track_higher_grads": not w.first_order}

    def step(tasks: Tasks) -> Tensor:
        total = torch.zeros(())
        for sx, sy, qx, qy in zip(*tasks, strict=True):
            with library.innerloop_ctx(model, inner, **options) as (fast, optimiser):
                for _ in range(w.inner_steps):
                    optimiser.step(loss_fn(fast(sx), sy))
                query = loss_fn(fast(qx), qy) / len(tasks[0])
                if w.first_order:  # the fast weights are then cut off from the parameters
                    _store_gradient_at(fast.parameters(), model, query)
                else:
                    query.backward()
            total = total + query.detach()
        return total

    return step


# ------------------------------------------------------------------------------------------------- torchopt
def _adapted_layers(model: nn.Module, w: Workload) -> nn.ModuleList | None:
    """The layers with adapted parameters, or None where one has others besides: MetaSGD takes a module, all of it."""
    adapted = set(w.adapted(model))
    layers = nn.ModuleList(m for name, m in model.named_modules() if any(f"{name}.{n}".lstrip(".") in adapted for n, _ in m.named_parameters(recurse=False)))
    return layers if len(list(layers.parameters())) == len(adapted) else None


def torchopt(model: nn.Module, w: Workload) -> Step:
    """examples/few-shot/maml_omniglot.py: MetaSGD between extract_state_dict and recover_state_dict; first order by stop_gradient after each step."""
    import torchopt as library

    loss_fn = loss_of(w)
    inner = library.MetaSGD(_adapted_layers(model, w), lr=w.inner_lr)

    def step(tasks: Tasks) -> Tensor:
        weights, state = library.extract_state_dict(model), library.extract_state_dict(inner)
        queries = []
        for sx, sy, qx, qy in zip(*tasks, strict=True):
            for _ in range(w.inner_steps):
                inner.step(loss_fn(model(sx), sy))
                if w.first_order:
                    library.stop_gradient(model)
            query, fast = loss_fn(model(qx), qy) / len(tasks[0]), list(model.parameters())
            library.recover_state_dict(model, weights)
            library.recover_state_dict(inner, state)
            if w.first_order:
                _store_gradient_at(fast, model, query)
            queries.append(query.detach() if w.first_order else query)
        total = torch.stack(queries).sum()
        if not w.first_order:
            total.backward()
        return total.detach()

    return step


def _torchopt_absent(w: Workload) -> str | None:
    partial = "its MetaSGD adapts whole layers, not some parameters of a layer"
    return _missing("torchopt") or (None if _adapted_layers(w.model(), w) else partial)


# ------------------------------------------------------------------------------------------------- JAX: the network
Layer = Callable[[dict[str, Any], Any], Any]  # (its own parameters by name, x) -> y


def _conv(p: dict[str, Any], x: Any, m: nn.Conv2d) -> Any:
    from jax import lax

    pads, layout = [(n, n) for n in m.padding], ("NCHW", "OIHW", "NCHW")
    y = lax.conv_general_dilated(x, p["weight"], m.stride, pads, rhs_dilation=m.dilation, dimension_numbers=layout, feature_group_count=m.groups)
    return y + p["bias"][:, None, None] if "bias" in p else y


def _batchnorm(p: dict[str, Any], x: Any, eps: float) -> Any:
    from jax import lax

    over, channels = (0, *range(2, x.ndim)), (-1, *[1] * (x.ndim - 2))
    y = (x - x.mean(over, keepdims=True)) * lax.rsqrt(x.var(over, keepdims=True) + eps)
    y = y * p["weight"].reshape(channels) if "weight" in p else y
    return y + p["bias"].reshape(channels) if "bias" in p else y


def _max_pool(x: Any, *kernel_stride_padding: int | tuple[int, int]) -> Any:
    from jax import lax

    kernel, stride, pads = ((n, n) if isinstance(n, int) else n for n in kernel_stride_padding)
    return lax.reduce_window(x, -float("inf"), lax.max, (1, 1, *kernel), (1, 1, *stride), ((0, 0), (0, 0), *((n, n) for n in pads)))


def _layer(m: nn.Module) -> Layer:
    from jax import numpy as jnp

    match m:
        case nn.Linear():
            return lambda p, x: x @ p["weight"].T + p.get("bias", 0.0)
        case nn.Conv2d(padding_mode="zeros", padding=tuple()):
            return lambda p, x: _conv(p, x, m)
        case nn.ZeroPad2d(padding=(left, right, top, bottom)):
            return lambda p, x: jnp.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
        case nn.BatchNorm1d(eps=eps) | nn.BatchNorm2d(eps=eps):
            return lambda p, x: _batchnorm(p, x, eps)
        case nn.ReLU():
            return lambda p, x: jnp.where(x > 0, x, 0.0)
        case nn.LeakyReLU(negative_slope=slope):
            return lambda p, x: jnp.where(x > 0, x, slope * x)
        case nn.MaxPool2d(kernel_size=kernel, stride=stride, padding=padding, dilation=1, ceil_mode=False, return_indices=False):
            return lambda p, x: _max_pool(x, kernel, stride, padding)
        case nn.AdaptiveAvgPool2d(output_size=1 | (1, 1)):
            return lambda p, x: x.mean((2, 3), keepdims=True)
        case nn.Flatten(start_dim=1, end_dim=-1):
            return lambda p, x: x.reshape(len(x), -1)
    raise NotImplementedError(m)


def _layers(module: nn.Module, prefix: str = "") -> Iterator[tuple[dict[str, str], Layer]]:
    """({a parameter's name in its layer: in the model}, layer), in the order of calling."""
    if type(module).forward is nn.Sequential.forward:
        for name, child in module.named_children():
            yield from _layers(child, f"{prefix}{name}.")
    elif type(module).__module__.startswith("torch.nn."):
        yield {name: prefix + name for name, _ in module.named_parameters()}, _layer(module)
    else:  # a class of its own, also one derived from a known layer
        raise NotImplementedError(module)


# ------------------------------------------------------------------------------------------------- JAX: MAML
def _jax_loss(w: Workload) -> Callable[[Any, Any], Any]:
    """``loss_of`` in JAX."""
    import jax

    def rows(output: Any, target: Any) -> Any:
        if w.loss == "mse":
            return (output - target) ** 2
        return -(jax.nn.one_hot(target, output.shape[1]) * jax.nn.log_softmax(output)).sum(1)

    if w.reduction == "mean":
        return lambda output, target: rows(output, target).mean()
    return lambda output, target: rows(output, target).sum() / w.reduction


def _jax_task_loss(model: nn.Module, w: Workload) -> Callable[..., Any]:
    import jax

    layers, loss_fn, adapted = list(_layers(model)), _jax_loss(w), w.adapted(model)

    def inner(fast: dict[str, Any], params: dict[str, Any], x: Any, y: Any) -> Any:
        every = params | fast
        for names, layer in layers:
            x = layer({own: every[name] for own, name in names.items()}, x)
        return loss_fn(x, y)

    def task_loss(params: dict[str, Any], sx: Any, sy: Any, qx: Any, qy: Any) -> Any:
        fast = {n: params[n] for n in adapted}
        for _ in range(w.inner_steps):
            grads = jax.grad(inner)(fast, params, sx, sy)
            grads = jax.lax.stop_gradient(grads) if w.first_order else grads
            fast = {n: fast[n] - w.inner_lr * grads[n] for n in fast}
        return inner(fast, params, qx, qy)

    return task_loss


def _jax_vmap(task_loss: Callable[..., Any]) -> Callable[..., Any]:
    import jax

    per_task = jax.vmap(task_loss, (None, 0, 0, 0, 0))
    return jax.value_and_grad(lambda params, *tasks: per_task(params, *tasks).mean())


def _jax_map(task_loss: Callable[..., Any]) -> Callable[..., Any]:
    import jax

    def gradient(params: dict[str, Any], *tasks: Any) -> Any:
        each = jax.lax.map(lambda task: jax.value_and_grad(task_loss)(params, *task), tasks)
        return jax.tree.map(lambda v: v.mean(0), each)

    return gradient


def _jax(over_tasks: Callable[..., Any]) -> Callable[[nn.Module, Workload], Step]:
    """JAX's own notebooks/maml.ipynb: jit of grad, vmap and grad. Arrays go over and back by dlpack, without a copy."""

    def make(model: nn.Module, w: Workload) -> Step:
        import jax

        gradient = jax.jit(over_tasks(_jax_task_loss(model, w)))

        def array(t: Tensor) -> Any:
            return jax.numpy.from_dlpack(t.detach() if t.is_floating_point() else t.int())

        def step(tasks: Tasks) -> Tensor:
            params = {n: array(p) for n, p in model.named_parameters()}
            loss, grads = jax.block_until_ready(gradient(params, *map(array, tasks)))
            store(model, {n: torch.from_dlpack(g) for n, g in grads.items()})
            return torch.from_dlpack(loss)

        return step

    return make


def _jax_absent(w: Workload) -> str | None:
    if missing := _missing("jax"):
        return missing
    try:
        list(_layers(w.model()))
    except NotImplementedError as unknown:
        return f"not translated into JAX: {unknown}"
    return None


LIBRARIES = {
    p.name: p
    for p in (
        Peer("learn2learn", learn2learn, lambda w: _missing("learn2learn", _learn2learn)),
        Peer("higher", higher, lambda w: _missing("higher")),
        Peer("torchopt", torchopt, _torchopt_absent),
        Peer("JAX vmap(jit)", _jax(_jax_vmap), _jax_absent, compiles=True),
        Peer("JAX map(jit)", _jax(_jax_map), _jax_absent, compiles=True),
    )
}
