"""What the tests of native executors share: how a run is judged with equal masks, reference nets, ragged tasks, tasks that are not finite."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import torch
from random_programs import Case, error, norm, numbers_for
from torch import Tensor

import fastmaml.nn as nets
from fastmaml.batch import TaskBatch
from fastmaml.executors.call import Results
from fastmaml.executors.cpu.executor import CpuExecutor
from fastmaml.executors.torch.executor import TorchExecutor
from fastmaml.plan import Arrangement, Plan, Rate
from fastmaml.program import Loss, ProgramBuilder
from fastmaml.trace import trace

HERE = Path(__file__).parent
ZERO = 1e-6  # gradients below are zero to float32's rounding


def replayed(case: Case, plan: Plan, results: Results, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Gradients of the torch executor with the masks of ``results``."""
    masks = {key: value for key, value in results.values.items() if isinstance(key, tuple)}
    values = TorchExecutor(plan).forward(case.call(dtype, replay=masks)).values
    return {name: v for name, v in values.items() if isinstance(name, str) and name.startswith("grad.")}


def masks_equal_error(case: Case, bound: float, executor: type = CpuExecutor, **options: object) -> float:
    """Error with the masks replayed; -1: it diverges.

    Above ``bound`` the case is ill-conditioned or the executor wrong: at most 8 times the error of float32 torch itself
    on the same Plan with the same masks, and of what the truth moves by when inputs and leaves are rounded.
    """
    plan = case.plan(record_masks=True)
    results = executor(plan, **options).forward(case.call(torch.float32, record=True))
    truth = replayed(case, plan, results)
    if not truth:
        return 0.0
    if not bool(results.finite.all()) or norm(truth) > 1e6:
        diverged = not norm(truth) < 1e6 or not TorchExecutor(plan).forward(case.call(torch.float32)).finite.all()
        assert diverged, "only what really diverges may do so"
        return -1.0
    worst = error(results.values, truth, ZERO)
    if worst > bound:
        plain, moved = replayed(case, plan, results, torch.float32), replayed(case.moved(6e-8), plan, results)
        allowed = 8 * (error(plain, truth, ZERO) + error(moved, truth, ZERO))
        assert worst <= allowed, f"error {worst:.2g}, conditioning explains {allowed:.2g}"
    return worst


NETS = {
    "mlp": (lambda: nets.MLP(5, 40, 40, 3), (5,), "cross_entropy", 0.1),
    "mlp-tanh": (lambda: nets.MLP(7, 63, 1, 65, 4, activation=torch.nn.Tanh), (7,), "cross_entropy", 0.1),
    "mlp-wide": (lambda: nets.MLP(12, 70, 130, 17, 5), (12,), "cross_entropy", 0.1),
    "sinusoid": (lambda: nets.SinusoidMLP(init="torch"), (1,), "mse", 0.01),
    "omniglot-fc": (nets.OmniglotFC, (1, 28, 28), "cross_entropy", 0.1),
    "omniglot-fc-factored": (nets.OmniglotFC, (784,), "cross_entropy", 0.1),
}


def net_case(name: str, tasks: int = 16, steps: int = 3, rows: tuple[int, int] = (10, 15), **options: object) -> Case:
    build, shape, loss, rate = NETS[name]
    torch.manual_seed(0)
    net = build()
    program = trace(net, shape).with_roles(lambda _: "adapted")
    rates = {leaf.name: Rate("lr", learned=True) for leaf in program.leaves}
    a = Arrangement(
        steps=steps, loss=Loss(loss), rates=rates, support_rows=rows[0] if "factored" in name else None, **options
    )
    case = numbers_for(program, a, 0, [rows] * tasks, rate=rate)
    leaves = {n: p.detach() + 0.02 * torch.randn_like(p) for n, p in net.named_parameters()}
    return dataclasses.replace(case, leaves=leaves)


def same(a: Results, b: Results, names=None) -> None:
    for name in names or a.values:
        assert torch.equal(a.values[name], b.values[name]), f"{name} has other bits"


def ragged_images(option: str = "second") -> Case:
    """9 tasks of many sizes through convolutions, pooled norms, a residual, padded channels; their own, and shared statistics."""
    options = {"second": {}, "first": {"first_order": True}, "fast": {"memory": "fast"}, "steps": {"query_from": 0}, "support": {}}[option]
    b, statistics = ProgramBuilder((2, 9, 7)), "support" if option == "support" else "batch"

    def leaf(name: str, *shape: int) -> int:
        return b.leaf(name, shape, "outer" if name == "gamma" else "adapted")

    v = b.op("conv2d", 0, leaf("w1", 17, 2, 3, 3), leaf("b1", 17), stride=(1, 1), padding=(1, 1, 1, 1))
    v = b.op("relu", b.op("batchnorm", v, leaf("gamma", 17), leaf("beta", 17), eps=1e-2, statistics=statistics))
    v = b.op("maxpool2d", v, kernel=(2, 2), stride=(2, 2), padding=(0, 0))
    u = b.op("conv2d", v, leaf("w2", 17, 17, 3, 3), stride=(1, 1), padding=(1, 1, 1, 1))
    v = b.op("add", v, b.op("elu", b.op("groupnorm", u, leaf("g2", 17), eps=1e-2, groups=1), alpha=1.0))
    v = b.op("maxpool2d", b.op("relu", v), kernel=(2, 2), stride=(1, 1), padding=(0, 1))
    v = b.op("reshape", v, shape=(b.values[v].numel,))
    program = b.build(b.op("linear", v, leaf("head", 5, b.values[v].numel), leaf("bias", 5)))
    rates = {leaf.name: Rate(f"lr.{leaf.name}", (), True, True) for leaf in program.leaves if leaf.role == "adapted"}
    sizes = [(2 + 5 * t % 7, 1 + 7 * t % 5) for t in range(9)]
    case = numbers_for(program, Arrangement(steps=2, rates=rates, **options), 2, sizes, ways=[2 + t % 4 for t in range(9)], rate=0.05)
    return dataclasses.replace(case, leaves={**case.leaves, "gamma": case.leaves["gamma"] + 0.5 * torch.randn(17).sign()})


def ragged(option: str) -> Case:
    kind, _, option = option.rpartition("-")
    return ragged_images(option) if kind else ragged_case(option)


def ragged_case(option: str = "second") -> Case:
    """17 tasks of many sizes through a network with expressions, batch normalisation, ways. "wide": rows of all tasks go through in pieces."""
    options = {"second": {}, "first": {"first_order": True}, "fast": {"memory": "fast"}, "steps": {"query_from": 0}}
    options = {**options, "factored": {"support_rows": 13}, "wide": {"support_rows": 13}}[option]
    inputs = 4000 if option == "wide" else 40
    sizes = [(1 + 5 * t % 13, 1 + 7 * t % 11) for t in range(17)]
    torch.manual_seed(1)
    net = torch.nn.Sequential(
        torch.nn.Linear(inputs, 33), torch.nn.BatchNorm1d(33, eps=1e-2, track_running_stats=False), torch.nn.ELU()
    )
    program = trace(torch.nn.Sequential(net, torch.nn.Linear(33, 70), torch.nn.ReLU(), torch.nn.Linear(70, 5)), (inputs,))
    program = program.with_roles(lambda name: "outer" if name == "0.1.bias" else "adapted")
    rates = {leaf.name: Rate(f"lr.{leaf.name}", (), True, True) for leaf in program.leaves if leaf.role == "adapted"}
    a = Arrangement(steps=3, rates=rates, **options)
    return numbers_for(program, a, 2, sizes, ways=[2 + t % 4 for t in range(17)], rate=0.1)


def spoiled(case: Case, bad: dict[int, float]) -> Case:
    """The case with one number of the support set of some tasks replaced."""
    b = case.batch
    x = b.support_x.clone()
    for t, value in bad.items():
        x[int(b.support_offsets[t]), 0] = value
    return dataclasses.replace(
        case, batch=TaskBatch(x, b.support_y, b.query_x, b.query_y, b.support_sizes, b.query_sizes, b.ways)
    )


def without(case: Case, bad) -> Tensor:
    weights = torch.full((len(case.batch),), 1 / len(case.batch), dtype=torch.float64)
    weights[list(bad)] = 0.0
    return weights


def left_out(case: Case, bad: dict[int, float], threads: int) -> None:
    left_out_of(case, bad, CpuExecutor, threads=threads)


def left_out_of(case: Case, bad: dict[int, float], executor: type, **options: object) -> None:
    clean = executor(case.plan()).forward(case.call(torch.float32, task_weights=without(case, bad)))
    results = executor(case.plan(), **options).forward(spoiled(case, bad).call(torch.float32))
    assert (~results.finite).nonzero().flatten().tolist() == sorted(bad)
    for name in clean.values:
        if name.startswith("grad."):
            assert torch.allclose(clean.values[name], results.values[name], rtol=1e-5, atol=1e-7), name
    good = [t for t in range(len(case.batch)) if t not in bad]
    assert torch.equal(clean.values["loss.query"][good], results.values["loss.query"][good])


def overflowing(bad: int, inputs: int = 3, rate: float = 1e30) -> Case:
    """Losses are finite, and so is every gradient but the meta-gradient of one task.

    y = w x fits the support exactly, so that theta does not move in spite of a huge rate, but rate times the Hessian
    x x^T overflows where x is not zero. More inputs: factored.
    """
    b = ProgramBuilder((inputs,))
    program = b.build(b.op("linear", 0, b.leaf("w", (2, inputs), "adapted")))
    a = Arrangement(steps=1, loss=Loss("mse"), rates={"w": Rate("lr")}, support_rows=3)
    case = numbers_for(program, a, 0, [(3, 2)] * 5)
    x = torch.zeros_like(case.batch.support_x)
    x[3 * bad : 3 * bad + 3, 0] = 2.0**20
    batch = TaskBatch(x, x @ case.leaves["w"].T, case.batch.query_x, case.batch.query_y, (3,) * 5, (2,) * 5)
    return dataclasses.replace(case, batch=batch, rates={"lr": torch.tensor(rate)})


def subprocess_with(tier: str, script: str, *arguments: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "FASTMAML_ISA": tier, "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], env=env, capture_output=True, text=True, timeout=300
    )
