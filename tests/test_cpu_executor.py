"""The cpu executor: rules (a) and (b) of DESIGN.md, equal bits, ragged and non-finite tasks, threads, fork, tiers."""

from __future__ import annotations

import copy
import dataclasses
import multiprocessing
import os
import statistics
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from random_programs import Case, error, gradients, norm, numbers_for, random_case, randoms
from torch import Tensor

import fastmaml
import fastmaml.nn as nets
from fastmaml import _cpu
from fastmaml.batch import TaskBatch
from fastmaml.executors.call import Results
from fastmaml.executors.cpu import CpuExecutor
from fastmaml.executors.torch import TorchExecutor
from fastmaml.plan import Arrangement, Plan, Rate
from fastmaml.program import Loss, ProgramBuilder
from fastmaml.trace import trace

HERE = Path(__file__).parent
ZERO = 1e-6  # gradients below are zero to float32's rounding


# ------------------------------------------------------------------------------------- (a) against float64, masks equal


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


@pytest.mark.parametrize("rows", [96, 97, 150, 250])
def test_many_support_rows(rows: int) -> None:
    """Sums over so many rows are made in pieces, which must not be added to in place."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(10, 40), torch.nn.Tanh(), torch.nn.Linear(40, 3))
    settings = {"inner_lr": 0.05, "inner_steps": 3, "loss": "mse"}
    tasks = [torch.randn(4, n, c) for n, c in ((rows, 10), (rows, 3), (20, 10), (20, 3))]
    found = []
    for backend, dtype in (("cpu", torch.float32), ("torch", torch.float64)):
        own = copy.deepcopy(model).to(dtype)
        fastmaml.MAML(own, backend=backend, **settings).meta_grad([v.to(dtype) for v in tasks])
        found.append(torch.cat([p.grad.double().flatten() for p in own.parameters()]))
    assert float((found[0] - found[1]).norm() / found[1].norm()) <= 2e-6


def test_random_programs() -> None:
    errors: list[float] = []
    for n, rng in enumerate(randoms(520)):
        case = random_case(rng, native=True)
        errors.append(masks_equal_error(case, 1e-5, threads=n % 3 + 1, block_rows=(None, 1, 4)[n // 3 % 3]))
    judged = [e for e in errors if e >= 0]
    assert len(judged) >= 500 and sum(e > 1e-5 for e in judged) <= 0.04 * len(judged)
    assert statistics.median(judged) <= 1e-6


def test_random_images() -> None:
    """Convolutions, and what may come around them."""
    errors: list[float] = []
    for n, rng in enumerate(randoms(520)):
        case = random_case(rng, conv=True, native=True)
        errors.append(masks_equal_error(case, 1e-5, threads=n % 3 + 1, block_rows=(None, 1, 4)[n // 3 % 3]))
    judged = [e for e in errors if e >= 0]
    assert len(judged) >= 500 and sum(e > 1e-5 for e in judged) <= 0.04 * len(judged)
    assert statistics.median(judged) <= 1e-6


@pytest.mark.parametrize("entry", ["evaluate", "adapt"])
@pytest.mark.parametrize("conv", [False, True], ids=["rows", "images"])
def test_random_programs_without_gradients(conv: bool, entry: str) -> None:
    """What comes out is the torch executor's to float32's rounding."""
    for rng in randoms(20):
        case = random_case(rng, conv=conv, native=True, query_from=None)
        plan, call = case.plan(entry=entry), case.call(torch.float32)
        got = CpuExecutor(plan, threads=2, block_rows=rng.choice([None, 1, 4])).forward(call).values
        exact, plain = TorchExecutor(plan).forward(case.call()).values, TorchExecutor(plan).forward(call).values
        assert got.keys() == exact.keys()
        for name, truth in exact.items():
            if name != "correct" and torch.isfinite(truth).all():
                allowed = 10 * error({name: plain[name]}, {name: truth}, ZERO) + 1e-5
                assert error({name: got[name]}, {name: truth}, ZERO) <= allowed, name


@pytest.mark.parametrize("conv", [False, True], ids=["rows", "images"])
def test_random_halves(conv: bool) -> None:
    """The two-entry Plan, around a torch loss that is the built-in one: the same gradients as the one-entry Plan's."""
    for rng in randoms(40):
        case = dataclasses.replace(random_case(rng, conv=conv, native=True, loss=Loss(), query_from=None), task_weights=None)
        plan = case.plan(entry="halves")
        crashes = any(i.kernel.endswith("relu_fwd") and i.outputs[0] is None for _, i in plan.instructions())
        if crashes or any(leaf.home == "task" for leaf in case.program.leaves):  # see the two tests below
            continue
        whole = CpuExecutor(case.plan()).forward(
            case.call(torch.float32, task_weights=torch.ones(len(case.batch), dtype=torch.float64))
        )
        executor = CpuExecutor(plan, threads=2)
        forward = executor.forward(case.call(torch.float32, total=True))
        logits = [z.detach().requires_grad_() for z in forward.values["logits"].split(case.batch.query_sizes)]
        ways = case.batch.ways.tolist()
        losses = [
            torch.nn.functional.cross_entropy(z[:, :w], case.batch.task(t)[3])
            for t, (z, w) in enumerate(zip(logits, ways, strict=True))
        ]
        dlogits = torch.autograd.grad(sum(losses), logits)
        truth = {n: v for n, v in whole.values.items() if isinstance(n, str) and n.startswith("grad.")}
        if torch.isfinite(whole.values["loss.query"]).all() and norm(truth) < 1e6:
            got = executor.reverse(forward.state, {"dlogits": torch.cat(dlogits)}).values
            assert error({n: got.get(n, torch.zeros_like(v)) for n, v in truth.items()}, truth, ZERO) <= 1e-4


HALVES = """
import torch, test_cpu_executor as t
b = t.ProgramBuilder((3,))
hidden = b.op("relu", b.op("linear", 0, b.leaf("w", (2, 3), "adapted", {home!r})))
program = b.build(b.op("linear", hidden, b.leaf("head", (2, 2), {head!r})))
case = t.numbers_for(program, t.Arrangement(steps=1, rates={{"w": t.Rate("lr")}}), 0, [(3, 2)] * 4)
results = []
for executor in (t.TorchExecutor, t.CpuExecutor):
    executor = executor(case.plan(entry="halves"))
    forward = executor.forward(case.call(torch.float32, total=True))
    results.append(executor.reverse(forward.state, {{"dlogits": torch.ones(8, 2)}}).values["grad.w"])
assert torch.allclose(*results, atol=1e-6), results
"""


@pytest.mark.parametrize(
    ("home", "head"),
    [("meta", "outer"), ("task", "outer"), ("meta", "const")],
)
def test_halves_in_a_process_of_their_own(home: str, head: str) -> None:
    done = subprocess_with("", HALVES.format(home=home, head=head))
    assert done.returncode == 0, done.stderr


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


@pytest.mark.parametrize("memory", ["constant", "fast"])
@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("name", NETS)
def test_reference_nets_with_equal_masks(name: str, steps: int, first_order: bool, memory: str) -> None:
    case = net_case(name, tasks=3, steps=steps, first_order=first_order, memory=memory)
    assert 0 <= masks_equal_error(case, 3e-5) <= 3e-5


# --------------------------------------------------------------------------------------- (b) free-running, task by task


@pytest.mark.parametrize("name", NETS)
def test_free_running_is_as_good_as_float32_torch(name: str) -> None:
    case = net_case(name)
    executor = CpuExecutor(case.plan(record_masks=True))
    errors: dict[str, list[float]] = {"ours": [], "torch": []}
    flips = decisions = 0
    for t in range(len(case.batch)):
        one = dataclasses.replace(case, batch=case.batch.select(t))
        _, truth = one.truth()
        _, plain = one.truth(torch.float32)
        results = executor.forward(one.call(torch.float32, record=True))
        errors["ours"].append(error(gradients(results, truth), truth, ZERO))
        errors["torch"].append(error(plain, truth, ZERO))
        exact = TorchExecutor(case.plan(record_masks=True)).forward(one.call())
        for key in [key for key in exact.values if isinstance(key, tuple)]:
            flips += int((exact.values[key][0] != results.values[key][0]).sum())
            decisions += exact.values[key][0].numel()
    assert statistics.median(errors["ours"]) <= 2 * statistics.median(errors["torch"])
    assert flips <= 1e-3 * decisions


# ---------------------------------------------------------------------------------------------------------- determinism


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


def test_rows_of_all_tasks_in_pieces() -> None:
    case = net_case("omniglot-fc-factored", steps=1, rows=(20, 20))
    assert case.plan().count("factored") and sum(case.batch.support_sizes) > 252  # of 4,160 bytes, in and out: more than a piece
    assert 0 <= masks_equal_error(case, 3e-5) <= 3e-5


OPTIONS = ("second", "first", "fast", "steps", "factored", "wide", *(f"images-{o}" for o in ("second", "first", "fast", "steps", "support")))


@pytest.mark.parametrize("option", OPTIONS)
def test_bits_do_not_depend_on_threads_or_runs(option: str) -> None:
    case = ragged(option)
    call, plan = case.call(torch.float32), case.plan()
    first = CpuExecutor(plan, threads=1).forward(call)
    for threads in (1, 2, 3, 16, 40):  # 40: teams share a task
        executor = CpuExecutor(plan, threads=threads)
        for _ in range(3):
            same(first, executor.forward(call))


@pytest.mark.parametrize("tasks", [1, 2, 3])
@pytest.mark.parametrize("name", NETS)
def test_teams_give_the_same_bits(name: str, tasks: int) -> None:
    case = net_case(name, tasks=tasks, steps=2)
    results = [CpuExecutor(case.plan(), threads=threads).forward(case.call(torch.float32)) for threads in (1, 2, 5, 8)]
    for other in results[1:]:
        same(results[0], other)


@pytest.mark.parametrize("steps", [1, 11])
def test_nothing_is_laid_out_that_no_call_touches(steps: int) -> None:
    """A weight gradient that is added where it belongs as it is made has no place of its own."""
    maml = fastmaml.MAML(nets.OmniglotFC(5), inner_lr=0.01, inner_steps=steps, backend="cpu")
    x, y = torch.randn(2, 5, 1, 28, 28), torch.arange(5).expand(2, -1)
    plan = maml.plan((x, y, x, y))
    low = CpuExecutor(plan).prepared(5, 5).lowering
    touched = {low._name(ref.buffer) for _, groups in low.phases for _, steps in groups for s in steps for ref in s.call.operands if ref is not None}
    touched |= {name for r in plan.reductions for name in (r.source.buffer, r.target)} | {*plan.inputs, *plan.results, *low.turned.values()}
    assert set(low.at) <= touched
    gradients = {n for n, b in plan.buffers.items() if b.home == "scratch" and len(b.shape) == 2 and not b.rows}
    assert gradients and not gradients & set(low.at)


@pytest.mark.parametrize("block_rows", [1, 4])
@pytest.mark.parametrize("option", OPTIONS)
def test_blocks_of_rows(option: str, block_rows: int) -> None:
    """Reductions over blocks round differently, but each size of block has its own bits for any number of threads."""
    case = ragged(option)
    plan, call = case.plan(), case.call(torch.float32)
    whole, blocks = CpuExecutor(plan).forward(call), CpuExecutor(plan, threads=1, block_rows=block_rows).forward(call)
    same(blocks, CpuExecutor(plan, threads=3, block_rows=block_rows).forward(call))
    names = [n for n in whole.values if n.startswith("grad.")]
    truth = {n: whole.values[n] for n in names}
    assert error(blocks.values, truth, ZERO) <= 1e-4


def alone(case: Case, executor: CpuExecutor, t: int) -> Results:
    return executor.forward(dataclasses.replace(case, batch=case.batch.select(t)).call(torch.float32))


@pytest.mark.parametrize("option", OPTIONS)
def test_a_task_of_a_ragged_batch_is_that_task_alone(option: str) -> None:
    """Bit for bit: losses, logits, and its gradient (all other tasks weigh nothing)."""
    case = ragged(option)
    executor, together = CpuExecutor(case.plan()), CpuExecutor(case.plan(), threads=2).forward(case.call(torch.float32))
    logits = together.values["logits"].split(case.batch.query_sizes)
    for t in range(0, len(case.batch), 3):
        one = alone(case, executor, t)
        assert torch.equal(one.values["logits"], logits[t])
        for name in ("loss.query", "loss.support", "correct"):
            assert torch.equal(one.values[name][0], together.values[name][t]), name
        weights = torch.zeros(len(case.batch), dtype=torch.float64)
        weights[t] = 1.0
        picked = CpuExecutor(case.plan(), threads=2).forward(case.call(torch.float32, task_weights=weights))
        for name in one.values:
            if option in ("factored", "wide") and name == "grad.0.0.weight":  # one product over the rows of all tasks
                assert torch.allclose(one.values[name], picked.values[name], rtol=1e-5, atol=1e-6)
            elif name.startswith("grad."):
                assert torch.equal(one.values[name], picked.values[name]), name


@pytest.mark.parametrize("option", ["second", "factored", "wide", "images-second", "images-support"])
def test_order_of_the_tasks_does_not_matter_to_any_of_them(option: str) -> None:
    case = ragged(option)
    order = torch.randperm(len(case.batch), generator=torch.Generator().manual_seed(0)).tolist()
    executor = CpuExecutor(case.plan(), threads=2)
    first = executor.forward(case.call(torch.float32))
    mixed = executor.forward(dataclasses.replace(case, batch=case.batch.select(order)).call(torch.float32))
    for name in ("loss.query", "loss.support", "correct"):
        assert torch.equal(first.values[name][order], mixed.values[name])
    logits = first.values["logits"].split(case.batch.query_sizes)
    assert torch.equal(torch.cat([logits[t] for t in order]), mixed.values["logits"])
    names = {n: v for n, v in first.values.items() if n.startswith("grad.")}
    assert error(mixed.values, names, ZERO) <= 1e-5


@pytest.mark.parametrize("tasks", [1, 2, 7, 16, 17, 33, 100])
def test_sum_over_tasks(tasks: int) -> None:
    case = net_case("sinusoid", tasks=tasks, steps=1, rows=(3, 2))
    _, truth = case.truth()
    results = CpuExecutor(case.plan(), threads=2).forward(case.call(torch.float32))
    assert error(gradients(results, truth), truth, ZERO) <= 1e-4  # free-running: a flip may happen


def test_gradients_are_added_to_sinks() -> None:
    case = ragged_case()
    executor = CpuExecutor(case.plan())
    plain = executor.forward(case.call(torch.float32))
    sinks = {
        n: torch.full_like(v, 2.0) for n, v in plain.values.items() if n.startswith("grad.") and n != "grad.2.bias"
    }
    executor.forward(case.call(torch.float32, sinks=sinks))
    for name, sink in sinks.items():
        assert torch.equal(sink, 2.0 + plain.values[name]), name


# -------------------------------------------------------------------------------------------- tasks that are not finite


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


@pytest.mark.parametrize("threads", [1, 2, 40])
@pytest.mark.parametrize(
    "bad",
    [{3: float("nan")}, {0: float("inf"), 16: float("-inf")}, {5: 3e38, 6: float("nan")}],
    ids=["nan", "inf", "two"],
)
@pytest.mark.parametrize("option", ["second", "factored", "wide"])
def test_non_finite_tasks_are_named_and_left_out(option: str, bad: dict[int, float], threads: int) -> None:
    left_out(ragged_case(option), bad, threads)


@pytest.mark.parametrize("threads", [1, 2, 40])
@pytest.mark.parametrize("option", ["second", "support"])
@pytest.mark.parametrize("bad", [{3: float("nan")}, {0: float("inf"), 8: float("nan")}], ids=["nan", "two"])
def test_non_finite_images_are_named_and_left_out(option: str, bad: dict[int, float], threads: int) -> None:
    left_out(ragged_images(option), bad, threads)


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


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("bad", [0, 3])
@pytest.mark.parametrize(
    ("inputs", "rate"),
    [
        pytest.param(3, 1e30, id="weight"),
        pytest.param(12, 3e38, id="factored"),
        pytest.param(12, 1e30, id="factored-product"),
    ],
)
def test_a_gradient_that_alone_is_infinite(inputs: int, rate: float, bad: int, threads: int) -> None:
    case = overflowing(bad, inputs, rate)
    assert bool(case.plan().count("factored")) == (inputs == 12)
    results = CpuExecutor(case.plan(), threads=threads).forward(case.call(torch.float32))
    assert torch.isfinite(results.values["loss.query"]).all() and torch.isfinite(results.values["loss.support"]).all()
    assert (~results.finite).nonzero().flatten().tolist() == [bad]
    weights = without(case, [bad])
    good = dataclasses.replace(case, batch=case.batch.select([t for t in range(5) if t != bad]))
    clean = CpuExecutor(case.plan()).forward(good.call(torch.float32, task_weights=weights[weights > 0]))
    truth = {n: v for n, v in clean.values.items() if n.startswith("grad.")}
    assert error(results.values, truth, ZERO) <= 1e-5


@pytest.mark.parametrize("kind", ["nan", "overflow"])
def test_strict_leaves_sinks_alone(kind: str) -> None:
    case = spoiled(ragged_case(), {4: float("nan")}) if kind == "nan" else overflowing(2)
    executor = CpuExecutor(case.plan(), threads=2)
    names = [n for n in executor.forward(case.call(torch.float32)).values if n.startswith("grad.")]
    for strict in (True, False):
        sinks = {n: torch.zeros_like(executor.forward(case.call(torch.float32)).values[n]) for n in names}
        executor.forward(case.call(torch.float32, sinks=sinks, strict=strict))
        assert bool(norm(sinks)) != strict and all(torch.isfinite(v).all() for v in sinks.values())


# -------------------------------------------------------------------------------------------- threads, processes, tiers


def test_one_object_in_several_python_threads() -> None:
    case, other = (
        ragged_case(),
        dataclasses.replace(ragged_case(), batch=ragged_case().batch.select(list(range(5, 12)))),
    )
    executor = CpuExecutor(case.plan(), threads=2)
    expected = [executor.forward(c.call(torch.float32)) for c in (case, other)]
    failures: list[BaseException] = []

    def work(i: int) -> None:
        try:
            for n in range(12):
                which = (i + n) % 2
                same(expected[which], executor.forward((case, other)[which].call(torch.float32)))
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def _child(pipe, executor: CpuExecutor, case: Case) -> None:
    values = executor.forward(case.call(torch.float32)).values
    pipe.send({n: v.numpy() for n, v in values.items()})


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning", "ignore:Exception ignored in.*at_fork")  # of JAX, where tests of the benchmark came before
def test_a_forked_child_gives_the_same_bits_and_does_not_hang() -> None:
    case = ragged_case()
    executor = CpuExecutor(case.plan(), threads=2)
    expected = executor.forward(case.call(torch.float32)).values  # a parallel region has run
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(send, executor, case), daemon=True)
    child.start()
    hangs = not receive.poll(60)
    got = {} if hangs else receive.recv()
    child.join(0 if hangs else 10)
    child.kill()
    assert not hangs, "the child hangs"
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert torch.equal(value, torch.from_numpy(got[name])), name


TIER_SCRIPT = """
import random, sys
from fastmaml import _cpu
import test_cpu_executor as t
assert _cpu.active_tier() == sys.argv[1], _cpu.active_tier()
for seed in range(24):
    case = t.random_case(random.Random(seed), conv=seed % 2 == 1, native=True)
    t.masks_equal_error(case, 1e-5, threads=seed % 3 + 1, block_rows=(None, 1, 4)[seed % 3])
for name in t.NETS:
    assert 0 <= t.masks_equal_error(t.net_case(name, tasks=2), 3e-5) <= 3e-5, name
t.test_bits_do_not_depend_on_threads_or_runs("second")
t.test_bits_do_not_depend_on_threads_or_runs("images-second")
t.test_a_task_of_a_ragged_batch_is_that_task_alone("second")
print("passed")
"""


def subprocess_with(tier: str, script: str, *arguments: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "FASTMAML_ISA": tier, "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], env=env, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("tier", _cpu.tiers()[1:] or ["baseline"])
def test_every_tier(tier: str) -> None:
    """The best tier is what every other test here runs."""
    done = subprocess_with(tier, TIER_SCRIPT, tier)
    assert done.returncode == 0 and done.stdout.strip() == "passed", done.stdout + done.stderr


def test_a_tier_that_is_not_there_is_an_error_that_lists_those_that_are() -> None:
    done = subprocess_with("neon", "from fastmaml import _cpu; _cpu.active_tier()")
    assert done.returncode != 0
    assert f"FASTMAML_ISA=neon: this machine has {', '.join(_cpu.tiers())}" in done.stderr
