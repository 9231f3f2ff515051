"""The cuda executor: what it refuses and why, registers and shared memory that nvcc gives it, and what the host emulation would notice."""

from __future__ import annotations

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from cuda_host import LIMITS, PTXAS, conv_plan, host, on_host, plan_of, small_net, small_tasks
from executor_cases import ragged_case

import fastmaml
import fastmaml.nn as nets
from fastmaml import _cpu, engine, executors
from fastmaml.executors import BackendError, choose
from fastmaml.executors.cuda import executor as cuda
from fastmaml.executors.cuda.executor import CudaExecutor


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


def test_a_device_without_code_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU older or newer than what was built: the reason is CUDA's, and the way out is named."""
    module = SimpleNamespace(devices=lambda: (1, ""), why_not=lambda index: "no kernel image is available" if index == 1 else "")
    monkeypatch.setattr(cuda, "_cuda", module)
    assert executors.why_not_here("cuda", torch.float32, torch.device("cuda", 0)) is None
    why = executors.why_not_here("cuda", torch.float32, torch.device("cuda", 1))
    assert why == "fastmaml._cuda was not built for this device (no kernel image is available): build it with FASTMAML_CUDA_ARCHS"


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
