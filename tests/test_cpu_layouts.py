"""Weight expressions on the cpu executor: what stays packed, what is the same memory, and that neither changes the meta-gradient."""

from __future__ import annotations

import pytest
import torch
from families import distance
from helpers_families import moved
from plain_loop import classify, grads, one_thread  # noqa: F401
from torch import nn

import fastmaml
from fastmaml import MAML, SGD, TaskBatch, methods
from fastmaml.executors.cpu import executor as cpu
from fastmaml.executors.cpu.lowering import Lowering, rows_capacity
from fastmaml.parameterisation import Kind, Parameterisation

pytestmark = pytest.mark.skipif(cpu._cpu is None, reason="fastmaml._cpu is not built")


class Mixed(Parameterisation):
    """T (W * s) + T W: a weight that is reshaped twice, a factor for each kernel, products and a sum; s adapted with W."""

    name = "mixed"

    def declare(self, network):
        self.names = list(network.weights())[:-1]
        for name in self.names:
            p = network.parameters[name]
            self.adapted(f"s.{name}", torch.ones(*p.shape[:2], 1, 1))
            self.outer(f"T.{name}", torch.eye(p.shape[0]))

    def roles(self, network):
        return {name: Kind("adapted" if name in self.names else "outer") for name in network.parameters}

    def rewrite(self, r):
        for name in self.names:
            w, t = r.leaf(name), r.own(f"T.{name}")
            both = r.add(r.matmul(t, r.matrix(r.mul(w, r.own(f"s.{name}")))), r.matmul(t, r.matrix(w)))
            r.substitute(name, r.reshape(both, *r.shape(w)))


def net(first: int, second: int, norm: type = nn.BatchNorm2d) -> nn.Sequential:
    """A convolution of 3 x 2 taps, one of 1 x 1 and a head, tanh between them: no decision that float32 could take otherwise."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, first, (3, 2)), norm(first), nn.Tanh(), nn.Conv2d(first, second, 1), norm(second), nn.Tanh(), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(second * 12, 4))
    for layer in model:
        if isinstance(layer, norm):
            layer.track_running_stats = False
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None
            nn.init.uniform_(layer.weight, 0.5, 1.5)
    return model


CONVS = ["0.weight", "3.weight"]
OPTIONS = {"inner_lr": 0.1, "inner_steps": 3}
METHODS = {
    "TNets": lambda model, **kw: methods.TNets(model, **kw),
    "LowRank": lambda model, **kw: methods.LowRankMAML(model, rank=3, **kw),
    "MTL": lambda model, **kw: methods.MTL(model, adapt="both", **kw),
    "CAVIA": lambda model, **kw: methods.CAVIA(model, context=3, layers=CONVS, **kw),
    "mixed": lambda model, **kw: MAML(model, parameterisation=Mixed(), **kw),
}
SIZES = [(5, 9), (64, 17), (70, 130), (128, 64)]  # one panel, whole panels, a narrower last one
BATCH = classify(shape=(2, 5, 5))
MORE = {
    "first order": {"first_order": True, "inner_steps": 10},
    "momentum": {"inner_optimizer": SGD(momentum=0.5, weight_decay=0.1)},
    "clip": {"inner_optimizer": SGD(max_norm=1.0)},
    "learned rates": {"learn_inner_lr": True, "inner_lr": [0.1, 0.05, 0.1]},
    "fast": {"memory": "fast"},
}


def agrees(method: str, sizes: tuple[int, int], **kw) -> None:
    """With the torch executor in float64, in both ways of calling."""
    torch.manual_seed(1)
    mine = METHODS[method](net(*sizes), backend="cpu", **{**OPTIONS, **kw})
    moved(mine)
    truth = METHODS[method](net(*sizes).double(), backend="torch", **{**OPTIONS, **kw})
    truth.load_state_dict(mine.state_dict())
    truth.meta_grad(tuple(v.double() if v.is_floating_point() else v for v in BATCH))
    expected = grads(truth)
    mine.meta_grad(BATCH)
    assert distance(grads(mine), expected) <= 1e-5
    mine.zero_grad()
    mine(BATCH).loss.backward()
    assert distance(grads(mine), expected) <= 1e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_meta_gradient(method: str, sizes: tuple[int, int]) -> None:
    agrees(method, sizes)


@pytest.mark.parametrize("method", ["TNets", "mixed"])
@pytest.mark.parametrize("more", MORE)
def test_meta_gradient_of_other_steps(method: str, more: str) -> None:
    agrees(method, (9, 17), **MORE[more])


@pytest.mark.parametrize("method", METHODS)
def test_a_team_of_threads_changes_no_bit(method: str) -> None:
    maml, found = METHODS[method](net(70, 130), backend="cpu", **OPTIONS), []
    moved(maml)
    for threads in (1, 3):
        torch.set_num_threads(threads)  # for one task
        maml.meta_grad(tuple(v[:1] for v in BATCH))
        found.append(grads(maml))
    assert all(torch.equal(a, found[1][name]) for name, a in found[0].items() if a is not None)


def lowering(maml: MAML) -> Lowering:
    plan = maml.plan(TaskBatch.of(BATCH))
    return Lowering(plan, rows_capacity(6, 7), {name: i for i, name in enumerate(cpu._cpu.kernels())})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sizes", [(5, 9), (64, 128)], ids=str)
def test_a_convolutions_weight_is_never_copied(method: str, sizes: tuple[int, int]) -> None:
    low = lowering(METHODS[method](net(*sizes), **OPTIONS))
    assert low.packed[CONVS[0]] == (12, sizes[0], 6)
    for phase, groups in low.phases:
        for step in (step for _, steps in groups for step in steps if phase.scope == "task"):
            moves = step.call.kernel in ("pack_fwd", "unpack_fwd", "copy_fwd")
            assert not moves or not any(len(low.packed.get(ref.buffer, ())) == 3 for ref in step.call.operands), step.call


def test_a_narrower_last_panel_makes_a_factor_of_kernels_plain() -> None:
    low = lowering(METHODS["MTL"](net(70, 130), **OPTIONS))
    calls = [step.call for _, groups in low.phases for _, steps in groups for step in steps]
    assert any(call.kernel == "unpack_fwd" and len(call.sizes) == 3 for call in calls)


def test_a_film_joins_the_affine_it_follows_unless_that_runs_before_the_inner_loop() -> None:
    plan = METHODS["CAVIA"](net(5, 9), **OPTIONS).plan(TaskBatch.of(BATCH))
    kernels = [instr.kernel for instr in plan.segments["gradient"].instructions]
    assert kernels.count("batchnorm_fwd") == 2 and kernels.count("batchnorm_stats_fwd") == 1  # the first film; the second norm
    assert kernels.count("mul_fwd") == 2


def test_a_film_after_a_norm_of_each_step() -> None:
    def made(dtype: torch.dtype, backend: str) -> MAML:
        model = net(5, 9).to(dtype)
        for i, channels in ((1, 5), (4, 9)):
            model[i] = fastmaml.nn.StepBatchNorm(channels, 3).to(dtype)
        return METHODS["CAVIA"](model, backend=backend, **OPTIONS)

    torch.manual_seed(1)
    mine, truth = made(torch.float32, "cpu"), made(torch.float64, "torch")
    moved(mine)
    truth.load_state_dict(mine.state_dict())
    mine.meta_grad(BATCH)
    truth.meta_grad(tuple(v.double() if v.is_floating_point() else v for v in BATCH))
    assert distance(grads(mine), grads(truth)) <= 1e-5
