"""The cuda executor as host code, its threads as fibers: against float64 with equal masks, the same bits in every order of the threads, with any number
of them, of blocks, and wherever the memory lies; ragged and non-finite tasks; what is refused, and what was built. On a device: test_cuda_device.py."""

from __future__ import annotations

import copy
import dataclasses
import functools
import random
import re
import statistics
import sys
from pathlib import Path

import pytest
import torch
from random_programs import Case, error, norm, random_case, randoms
from test_cpu_executor import (
    NETS,
    ZERO,
    left_out_of,
    masks_equal_error,
    net_case,
    overflowing,
    ragged_case,
    same,
    without,
)

import fastmaml
import fastmaml.nn as nets
from fastmaml import _cpu, engine
from fastmaml.executors import BackendError, choose, cuda
from fastmaml.executors.call import Results
from fastmaml.executors.cpu import CpuExecutor
from fastmaml.executors.cuda import CudaExecutor
from fastmaml.executors.torch import TorchExecutor
from fastmaml.plan import Plan

host = pytest.importorskip("fastmaml._cuda_host", reason="fastmaml._cuda_host is built in a source tree: python setup.py build_ext --inplace")
on_host = functools.partial(CudaExecutor, native=host, threads=64)
ORDERS = ("forward", "reversed", "shuffled1")


# ------------------------------------------------------------------------------------- (a) against float64, masks equal
def test_random_programs() -> None:
    errors = []
    for n, rng in enumerate(randoms(60)):
        case = random_case(rng, native=True)
        assert CudaExecutor.why_not(case.plan(), host) is None
        options = {"order": ORDERS[n % 3], "shared_limit": (0, 1, 12000)[n // 3 % 3], "threads": (32, 64, 128)[n // 9 % 3]}
        errors.append(masks_equal_error(case, 1e-5, on_host, **options))
    judged = [e for e in errors if e >= 0]
    assert len(judged) >= 56 and sum(e > 1e-5 for e in judged) <= 0.04 * len(judged)
    assert statistics.median(judged) <= 1e-6


@pytest.mark.parametrize("memory", ["constant", "fast"])
@pytest.mark.parametrize(("steps", "first_order"), [(0, False), (1, False), (5, False), (2, True)])
@pytest.mark.parametrize("name", NETS)
def test_reference_nets_with_equal_masks(name: str, steps: int, first_order: bool, memory: str) -> None:
    big = "omniglot" in name
    if big and (steps == 5 or memory == "fast"):
        pytest.skip("slow on the host, and not another Plan")
    case = net_case(name, tasks=2, steps=steps, first_order=first_order, memory=memory, rows=(5, 6) if big else (10, 15))
    assert 0 <= masks_equal_error(case, 3e-5, on_host, order="shuffled2", threads=256) <= 3e-5


@pytest.mark.parametrize("entry", ["evaluate", "adapt"])
def test_random_programs_without_gradients(entry: str) -> None:
    for n, rng in enumerate(randoms(12)):
        case = random_case(rng, native=True, query_from=None)
        plan, call = case.plan(entry=entry), case.call(torch.float32)
        got = on_host(plan, order=ORDERS[n % 3]).forward(call).values
        exact, plain = TorchExecutor(plan).forward(case.call()).values, TorchExecutor(plan).forward(call).values
        assert got.keys() == exact.keys()
        for name, truth in exact.items():
            if name != "correct" and torch.isfinite(truth).all():
                allowed = 10 * error({name: plain[name]}, {name: truth}, ZERO) + 1e-5
                assert error({name: got[name]}, {name: truth}, ZERO) <= allowed, name


def test_halves() -> None:
    """Forward, a torch loss, reverse: the cpu executor's gradients."""
    for n, rng in enumerate(randoms(20)):
        case = dataclasses.replace(random_case(rng, native=True, query_from=None), task_weights=None)
        plan, found = case.plan(entry="halves"), []
        for executor in (on_host(plan, order=ORDERS[n % 3]), CpuExecutor(plan)):
            forward = executor.forward(case.call(torch.float32, total=True))
            logits = forward.values["logits"].split(case.batch.query_sizes)
            found.append((forward, executor.reverse(forward.state, {"dlogits": torch.tanh(torch.cat(logits))})))
        (mine, mine_back), (theirs, theirs_back) = found
        assert torch.equal(mine.finite, theirs.finite) and mine_back.values.keys() == theirs_back.values.keys()
        if theirs_back.all_finite and theirs_back.values and norm(theirs_back.values) < 1e3:
            assert error(mine.values, theirs.values, ZERO) <= 1e-5
            assert error(mine_back.values, theirs_back.values, ZERO) <= 1e-4


# ------------------------------------------------------------------------------------------------------------------ bits
CASES = {
    **{option: functools.partial(ragged_case, option) for option in ("second", "first", "fast", "steps", "factored")},
    "sinusoid": functools.partial(net_case, "sinusoid", tasks=5, steps=3),
    "random": lambda: random_case(random.Random(5), native=True),
}


@functools.cache
def plan_of(name: str) -> tuple[Case, Plan, Results]:
    case = CASES[name]()
    plan = case.plan()
    return case, plan, on_host(plan).forward(case.call(torch.float32))


@pytest.mark.parametrize("name", CASES)
def test_the_order_of_the_threads_changes_no_bit(name: str) -> None:
    case, plan, first = plan_of(name)
    for order in ("reversed", "shuffled3", "shuffled4"):
        same(first, on_host(plan, order=order).forward(case.call(torch.float32)))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "options",
    [{"threads": 32}, {"threads": 256, "blocks": 1}, {"shared_limit": 1}, {"shared_limit": 24000}, {"shared_limit": 90000}],
    ids=lambda options: "-".join(f"{k}{v}" for k, v in options.items()),
)
def test_bits_do_not_depend_on_threads_blocks_or_places(name: str, options: dict) -> None:
    case, plan, first = plan_of(name)
    executor = on_host(plan, **{"order": "shuffled5", **options})
    same(first, executor.forward(case.call(torch.float32)))
    same(first, executor.forward(case.call(torch.float32)))  # counters are zeros again


def test_memory_is_shared_while_it_fits() -> None:
    """All of a task in flight, then its scratch, then nothing."""
    case, plan, _ = plan_of("second")
    placed = []
    for limit in (232448, 100000, 1):
        native = on_host(plan, shared_limit=limit).prepared(case.batch).native
        placed.append((native.shared_arena_bytes, native.arena_bytes))
    (whole, none), (part, rest), (nothing, all_of_it) = placed
    assert none == nothing == 0 and 0 < part < whole == all_of_it == part + rest


@pytest.mark.parametrize("option", ["second", "factored"])
def test_a_task_of_a_ragged_batch_is_that_task_alone(option: str) -> None:
    case, plan, together = plan_of(option)
    logits = together.values["logits"].split(case.batch.query_sizes)
    for t in (0, 7, 16):
        weights = torch.zeros(len(case.batch), dtype=torch.float64)
        weights[t] = 1.0
        picked = on_host(plan).forward(case.call(torch.float32, task_weights=weights))
        one = on_host(plan).forward(dataclasses.replace(case, batch=case.batch.select(t)).call(torch.float32))
        assert torch.equal(one.values["logits"], logits[t])
        for name in one.values:
            if name.startswith("grad."):
                assert torch.equal(one.values[name], picked.values[name]), name


@pytest.mark.parametrize("tasks", [1, 2, 33])
def test_sum_over_tasks(tasks: int) -> None:
    case = net_case("sinusoid", tasks=tasks, steps=1, rows=(3, 2))
    call = case.call(torch.float32)
    results, exact = on_host(case.plan()).forward(call), CpuExecutor(case.plan()).forward(call)
    assert error(results.values, exact.values, ZERO) <= 1e-5


def test_sinks_are_added_to() -> None:
    case, plan, plain = plan_of("second")
    sinks = {n: torch.full_like(v, 2.0) for n, v in plain.values.items() if n.startswith("grad.") and n != "grad.2.bias"}
    on_host(plan).forward(case.call(torch.float32, sinks=sinks))
    for name, sink in sinks.items():
        assert torch.equal(sink, 2.0 + plain.values[name]), name


# -------------------------------------------------------------------------------------------- tasks that are not finite
@pytest.mark.parametrize("bad", [{3: float("nan")}, {0: float("inf"), 16: float("-inf")}, {5: 3e38, 6: float("nan")}], ids=["nan", "inf", "two"])
@pytest.mark.parametrize("option", ["second", "factored"])
def test_non_finite_tasks_are_named_and_left_out(option: str, bad: dict[int, float]) -> None:
    left_out_of(ragged_case(option), bad, on_host)


@pytest.mark.parametrize(("inputs", "rate"), [(3, 1e30), (12, 3e38), (12, 1e30)], ids=["weight", "factored", "factored-product"])
def test_a_gradient_that_alone_is_infinite(inputs: int, rate: float) -> None:
    case = overflowing(3, inputs, rate)
    results = on_host(case.plan(), order="reversed").forward(case.call(torch.float32))
    assert not results.all_finite and (~results.finite).nonzero().flatten().tolist() == [3]
    weights = without(case, [3])
    good = dataclasses.replace(case, batch=case.batch.select([0, 1, 2, 4]))
    clean = on_host(case.plan()).forward(good.call(torch.float32, task_weights=weights[weights > 0]))
    truth = {n: v for n, v in clean.values.items() if n.startswith("grad.")}
    assert error(results.values, truth, ZERO) <= 1e-5


@pytest.mark.parametrize("strict", [True, False])
def test_strict_leaves_sinks_alone(strict: bool) -> None:
    case = overflowing(2)
    names = [n for n in on_host(case.plan()).forward(case.call(torch.float32)).values if n.startswith("grad.")]
    sinks = {n: torch.zeros(2, 3) for n in names}
    on_host(case.plan()).forward(case.call(torch.float32, sinks=sinks, strict=strict))
    assert bool(norm(sinks)) != strict and all(torch.isfinite(v).all() for v in sinks.values())


# ------------------------------------------------------------------------------------------------------- through MAML
@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Plan of MAML objects runs on the host's threads."""
    monkeypatch.setattr(engine, "choose", lambda backend, plan, *_: on_host(plan, order="reversed"))


def small_net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 20), torch.nn.LayerNorm(20), torch.nn.GELU(), torch.nn.Linear(20, 4))


def small_tasks() -> tuple:
    torch.manual_seed(1)
    return torch.randn(5, 8, 6), torch.randint(4, (5, 8)), torch.randn(5, 7, 6), torch.randint(4, (5, 7))


def use(model: torch.nn.Module, backend: str, to=lambda v: v) -> list[torch.Tensor]:
    """Gradients by meta_grad (twice: the second one into the first one's), backward, an outer loss; adapted logits."""
    maml = fastmaml.MAML(model, inner_lr=0.1, inner_steps=2, backend=backend, learn_inner_lr=True)
    tasks, found = tuple(to(v) for v in small_tasks()), []

    def collect() -> None:
        found.extend(p.grad.clone() for p in maml.parameters())
        maml.zero_grad()

    maml.meta_grad(tasks), maml.meta_grad(tasks)
    collect()
    out = maml(tasks)
    out.loss.backward()
    collect()
    maml(tasks, outer_loss=lambda logits, y: torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())).loss.backward()
    collect()
    adapted = maml.adapt(*tasks[:2])
    return [*found, out.logits.detach(), out.correct, out.support_losses.detach(), adapted(tasks[2])]


def test_through_maml(everywhere: None) -> None:
    mine = use(small_net(), "auto")
    engine.choose = choose
    for a, b in zip(mine, use(small_net(), "cpu"), strict=True):
        assert float((a - b).norm()) <= 1e-5 * float(b.norm()) + 1e-7


def test_memory_is_known_before(everywhere: None) -> None:
    maml = fastmaml.MAML(small_net(), inner_lr=0.1, inner_steps=2)
    sizes = maml.memory_bytes(small_tasks())
    assert sizes["shared memory of a block"] > 0 and sizes["parameters and gradients, packed"] > 0
    assert "shared memory of a block" in maml.explain(small_tasks())


def test_diverging_tasks_raise_by_number(everywhere: None) -> None:
    tasks = [v.clone() for v in small_tasks()]
    tasks[0][3] = float("nan")
    maml = fastmaml.MAML(small_net(), inner_lr=0.1)
    with pytest.raises(FloatingPointError, match=r"not finite: 3\."):
        maml.meta_grad(tasks)
    assert all(p.grad is None for p in maml.parameters())


# ------------------------------------------------------------------------------------------------------------ refused
def conv_plan() -> Plan:
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 5))
    x, y = torch.randn(2, 5, 1, 8, 8), torch.arange(5).expand(2, -1)
    return fastmaml.MAML(model, backend="torch").plan((x, y, x, y))


def test_images_are_refused_by_name() -> None:
    assert re.search("conv2d.* has no device function.*vectors, not of images", CudaExecutor.why_not(conv_plan(), host))


def test_images_that_are_flattened_first_are_vectors() -> None:
    x, y = torch.randn(2, 5, 1, 28, 28), torch.arange(5).expand(2, -1)
    assert CudaExecutor.why_not(fastmaml.MAML(nets.OmniglotFC(), backend="torch").plan((x, y, x, y)), host) is None


def test_a_plan_of_too_many_arrays_names_the_limit() -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(130)))
    x, y = torch.randn(1, 2, 2), torch.arange(2).expand(1, -1)
    plan = fastmaml.MAML(model, backend="torch").plan((x, y, x, y))
    assert re.search(r"the Plan has \d+ inputs and outputs, a launch takes at most 480", CudaExecutor.why_not(plan, host))


def test_without_the_extension_or_a_device_the_reason_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, meta = ragged_case().plan(), torch.device("cuda")
    monkeypatch.setattr(cuda, "_cuda", None)
    monkeypatch.setattr(cuda, "IMPORT_ERROR", "no such file")
    assert "could not be imported (no such file)" in CudaExecutor.why_not(plan)
    with pytest.raises(BackendError, match=r"backend='cuda' cannot run this model: fastmaml._cuda could not be imported \(no such file\).*'torch'"):
        choose("cuda", plan, torch.float32, meta)
    assert choose("auto", plan, torch.float32, meta).name == "torch"


def test_parameters_elsewhere_are_named() -> None:
    with pytest.raises(BackendError, match="backend='cuda' cannot run this model: the parameters are on cpu. Able to: 'cpu', 'torch'"):
        fastmaml.MAML(small_net(), backend="cuda").meta_grad(small_tasks())


@pytest.mark.parametrize("order", ["sideways", ""])
def test_an_order_that_is_none(order: str) -> None:
    case, plan, _ = plan_of("sinusoid")
    with pytest.raises(RuntimeError, match=f"order {order}: must be forward, reversed or shuffled"):
        on_host(plan, order=order).forward(case.call(torch.float32))


# ------------------------------------------------------------------------------------------------ the host's threads
def sum_of_products(order: str) -> float:
    """A device function with a barrier inside."""
    a = torch.ones(320)
    out = torch.full((16,), float("nan"))
    host.call_kernel(order, 64, "sgd_bwd_rate", [a.data_ptr(), a.data_ptr(), 0, out.data_ptr()], [0] * 4, 1, [320, 0, 0], [], (0, 1, 1, 0))
    return float(out[0])


def test_a_barrier_that_is_missing_shows() -> None:
    for order in ("forward", "reversed", "shuffled1"):
        assert sum_of_products(order) == -320.0
    assert sum_of_products("forward-deaf") != -320.0


def test_every_device_function_is_a_kernel_of_the_cpu_and_reached_by_some_plan() -> None:
    functions, ids = set(host.kernels()), {name: i for i, name in enumerate(host.all_kernels())}
    assert host.all_kernels() == _cpu.kernels() and functions <= set(ids)
    left_out = {name.rsplit("_", 1)[0] for name in set(ids) - functions}
    images = ("conv2d", "maxpool2d", "avgpool2d", "pad2d", "image", "patch")
    assert all(any(word in name for word in images) for name in left_out), left_out


# ------------------------------------------------------------------------------------------------------- what was built
# Of each function, by architecture: registers (512 threads have 128 each), bytes of its stack, bytes spilled, static shared memory. More needs a reason.
LIMITS = {"sm_80": (128, 256, 0, 0), "sm_90": (128, 256, 0, 0)}
PTXAS = Path(__file__).parent.parent / "build" / sys.implementation.cache_tag / "cuda/executor.cu.o.log"  # what it said as _cuda was built


@pytest.mark.skipif(cuda._cuda is None, reason=f"fastmaml._cuda was not built: {cuda.IMPORT_ERROR}")
@pytest.mark.skipif(not PTXAS.exists(), reason="fastmaml._cuda was not built in this source tree")
def test_registers_spills_and_shared_memory() -> None:
    said, seen = PTXAS.read_text(), set()
    assert "error" not in said
    for entry in re.split(r"Compiling entry function", said)[1:]:
        arch = re.search(r"for '(sm_\d+)'", entry)[1]
        if arch not in LIMITS:
            continue
        seen.add(arch)
        most, stack, spilled, shared = LIMITS[arch]
        functions = re.findall(r"properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry)
        assert len(functions) > len(host.kernels())
        for name, frame, stores, loads in functions:
            assert int(frame) <= stack and int(stores) + int(loads) <= spilled, f"{arch} {name}: stack {frame}, spilled {stores} + {loads} bytes"
        used = [int(n) for n in re.findall(r"Used (\d+) registers", entry)]
        static = [int(n) for n in re.findall(r"(\d+) bytes smem", entry)]
        assert used and max(used) <= most and max(static, default=0) <= shared, (arch, used, static)
    assert seen, "built for none of the architectures of the table"


@pytest.mark.skipif(cuda._cuda is None, reason=f"fastmaml._cuda was not built: {cuda.IMPORT_ERROR}")
def test_the_extension_says_what_it_finds() -> None:
    count, why = cuda._cuda.devices()
    assert count > 0 or why
    assert cuda._cuda.kernels() == host.kernels()
    if not count:
        assert f"CUDA finds no device: {why}" in CudaExecutor.why_not(ragged_case().plan())


def test_one_net_of_every_depth() -> None:
    """Deep and narrow, shallow and wide: what does not fit shared memory lies beside it."""
    for widths in ((3, *(8 for _ in range(12)), 2), (40, 300, 5)):
        model = nets.MLP(*widths)
        x, y = torch.randn(2, 6, widths[0]), torch.randint(2, (2, 6))
        theirs, mine = copy.deepcopy(model), copy.deepcopy(model)
        fastmaml.MAML(theirs, inner_lr=0.05, inner_steps=2, backend="cpu").meta_grad((x, y, x, y))
        maml = fastmaml.MAML(mine, inner_lr=0.05, inner_steps=2, backend="torch")
        executor = on_host(maml.plan((x, y, x, y)), threads=128)
        leaves = dict(mine.named_parameters())
        from fastmaml.batch import TaskBatch
        from fastmaml.executors.call import Call

        values = executor.forward(Call(TaskBatch.of((x, y, x, y)), leaves, maml.rates.at(2, None, maml._engine.view()))).values
        for name, p in theirs.named_parameters():
            assert float((values[f"grad.{name}"] - p.grad).norm()) <= 1e-4 * float(p.grad.norm()) + 1e-6


@pytest.mark.parametrize("steps", [4, 2])
@pytest.mark.parametrize("batchnorm", ["running", "batch"])
def test_norms_for_each_step(batchnorm: str, steps: int, monkeypatch) -> None:
    """MAML++: affine and running statistics of each step, of which the first ``steps`` are read."""
    torch.manual_seed(0)
    model = nets.per_step_batchnorm(torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.BatchNorm1d(9), torch.nn.ReLU(), torch.nn.Linear(9, 4)), 4, statistics=True)
    with torch.no_grad():
        for v in (*model.parameters(), *model.buffers()):
            v.add_(0.2 * torch.rand_like(v))
    data = (torch.randn(3, 8, 6), torch.randint(4, (3, 8)), torch.randn(3, 7, 6), torch.randint(4, (3, 7)))
    options = {"inner_steps": steps, "per_step_norms": False, "batchnorm": batchnorm}
    truth = fastmaml.methods.MAMLPlusPlus(copy.deepcopy(model).double(), backend="torch", **options)
    maml = fastmaml.methods.MAMLPlusPlus(model, **options)
    truth.meta_grad(data)
    monkeypatch.setattr(engine, "choose", lambda backend, plan, *_: on_host(plan))
    assert maml.meta_grad(data).executor == "cuda"
    expected = torch.cat([p.grad.flatten() for p in truth.parameters()])
    found = torch.cat([p.grad.flatten() for p in maml.parameters()])
    assert float((found - expected).norm() / expected.norm()) <= 1e-5
