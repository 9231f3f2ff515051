"""The cpu executor: rules (a) and (b) of DESIGN.md. The rest of it: test_cpu_bits.py, test_cpu_nonfinite.py, test_cpu_processes.py."""

from __future__ import annotations

import copy
import dataclasses
import statistics

import pytest
import torch
from executor_cases import NETS, ZERO, masks_equal_error, net_case, subprocess_with
from random_programs import error, gradients, norm, random_case, randoms

import fastmaml
from fastmaml.executors.cpu.executor import CpuExecutor
from fastmaml.executors.torch.executor import TorchExecutor
from fastmaml.program import Loss


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
import torch, executor_cases as t
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
