"""The cuda executor on a device, by kernels of each Plan's own and by the walk: agreement, bits, streams, captured graphs, memory. Everything here needs a
GPU; test_cuda_executor.py and test_cuda_straight.py ask the same of the same device functions on the host."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from cuda_host import small_net, small_tasks, use
from executor_cases import NETS, ZERO, left_out_of, masks_equal_error, net_case, overflowing, ragged_case, same
from random_programs import error, random_case, randoms

import fastmaml
from fastmaml.executors.call import Call, Results
from fastmaml.executors.cpu.executor import CpuExecutor
from fastmaml.executors.cuda import executor as cuda
from fastmaml.executors.cuda import nvrtc
from fastmaml.executors.cuda.executor import CudaExecutor

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(cuda._cuda is None, reason=f"fastmaml._cuda was not built: {cuda.IMPORT_ERROR}"),
]


@pytest.fixture(autouse=True, params=["straight", "walk"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which way the Plans of a test run. Compiling takes seconds: tests of many Plans compile a few."""
    if request.param == "walk":
        monkeypatch.setenv("FASTMAML_NVRTC", "0")
    else:
        try:
            nvrtc.find()
        except nvrtc.Absent as error:
            pytest.skip(str(error))
        if not cuda._cuda.can_load:
            pytest.skip("fastmaml._cuda was built by an nvcc before 12.8, which loads no compiled kernel")
    return request.param


def moved(call: Call) -> Call:
    """The same call with its tensors on the device."""
    parts = {name: {key: v.cuda() for key, v in getattr(call, name).items()} for name in ("leaves", "rates", "weights", "sinks")}
    return dataclasses.replace(call, batch=call.batch.to("cuda"), **parts)


class OnDevice(CudaExecutor):
    """Takes and gives tensors of the host."""

    def forward(self, call: Call) -> Results:
        results = super().forward(moved(call))

        def home(value):
            return [v.cpu() for v in value] if isinstance(value, list) else value.cpu()

        results.values = {name: home(value) for name, value in results.values.items()}
        results.finite = results.finite.cpu()
        return results


def test_the_path_that_was_asked_for_runs(path: str) -> None:
    case = ragged_case()
    executor = CudaExecutor(case.plan())
    executor.forward(moved(case.call(torch.float32)))
    assert executor.how.startswith("kernels of this Plan's own" if path == "straight" else "one kernel that walks any Plan: FASTMAML_NVRTC=0")


def test_both_paths_agree(path: str) -> None:
    for case in (ragged_case(), net_case("sinusoid", steps=3), net_case("mlp-tanh", steps=2)):
        call = case.call(torch.float32)
        one, other = OnDevice(case.plan()).forward(call), OnDevice(case.plan(), compiler=None).forward(call)
        assert error(one.values, other.values, ZERO) <= 1e-5


def test_random_programs(path: str) -> None:
    count = 200 if path == "walk" else 6
    errors = [masks_equal_error(random_case(rng, native=True), 1e-5, OnDevice) for rng in randoms(count)]
    judged = [e for e in errors if e >= 0]
    assert len(judged) >= int(0.95 * count) and sum(e > 1e-5 for e in judged) <= 0.04 * len(judged)


@pytest.mark.parametrize("memory", ["constant", "fast"])
@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("name", NETS)
def test_reference_nets_with_equal_masks(name: str, steps: int, memory: str, path: str) -> None:
    if path == "straight" and (steps == 5 or memory == "fast"):
        pytest.skip("compiled with other steps")
    assert 0 <= masks_equal_error(net_case(name, tasks=16, steps=steps, memory=memory), 3e-5, OnDevice) <= 3e-5


@pytest.mark.parametrize("option", ["second", "first", "fast", "steps", "factored"])
def test_bits_do_not_depend_on_threads_blocks_places_or_runs(option: str, path: str) -> None:
    if path == "straight" and option not in ("second", "factored"):
        pytest.skip("compiled with other options")
    case = ragged_case(option)
    plan, call = case.plan(), case.call(torch.float32)
    first = OnDevice(plan).forward(call)
    clusters = [{"ranks": n} for n in (2, 4, 8) if torch.cuda.get_device_capability() >= (9, 0)]
    for options in ({}, {"threads": 64}, {"blocks": 1}, {"blocks": 5}, {"ranks": 1, "shared_limit": 1}, {"shared_limit": 100_000}, *clusters):
        executor = OnDevice(plan, **options)
        for _ in range(20):
            same(first, executor.forward(call))


def test_many_tasks() -> None:
    """More than run at once."""
    case = net_case("sinusoid", tasks=2000, steps=1, rows=(3, 2))
    call = case.call(torch.float32)
    results, exact = OnDevice(case.plan()).forward(call), CpuExecutor(case.plan()).forward(call)
    assert error(results.values, exact.values, ZERO) <= 1e-4


@pytest.mark.parametrize("option", ["second", "factored"])
def test_non_finite_tasks_are_named_and_left_out(option: str) -> None:
    left_out_of(ragged_case(option), {5: 3e38, 6: float("nan")}, OnDevice)


def test_a_gradient_that_alone_is_infinite() -> None:
    results = OnDevice(overflowing(3).plan()).forward(overflowing(3).call(torch.float32))
    assert (~results.finite).nonzero().flatten().tolist() == [3]


def test_through_maml() -> None:
    maml = fastmaml.MAML(small_net().cuda(), inner_lr=0.1, inner_steps=2)
    out = maml.meta_grad([v.cuda() for v in small_tasks()])
    assert out.executor == "cuda"
    on_device = use(small_net().cuda(), "cuda", lambda v: v.cuda())
    for a, b in zip(on_device, use(small_net(), "cpu"), strict=True):
        assert float((a.cpu() - b).norm()) <= 1e-4 * float(b.norm()) + 1e-6


def test_a_captured_graph_follows_its_inputs() -> None:
    """And needs its inputs only: what the executor laid out is the graph's own."""
    case = ragged_case()
    executor, call = CudaExecutor(case.plan()), moved(case.call(torch.float32))
    sinks = {n: torch.zeros_like(v) for n, v in executor.forward(call).values.items() if n.startswith("grad.")}
    call = dataclasses.replace(call, sinks=sinks)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = executor.forward(call)
    other = {name: v + 0.01 for name, v in call.leaves.items()}
    for name, v in call.leaves.items():
        v.copy_(other[name])
    for _ in range(3):
        torch.full((1 << 24,), float("nan"), device="cuda")  # what was freed is somebody else's
        for v in sinks.values():
            v.zero_()
        graph.replay()
    direct = executor.forward(dataclasses.replace(call, sinks={}))
    for name, sink in sinks.items():
        assert torch.equal(sink, direct.values[name]), name
    assert torch.equal(captured.values["loss.query"], direct.values["loss.query"])


def test_a_graph_of_sizes_not_seen_before_is_refused() -> None:
    case = ragged_case()
    executor, call = CudaExecutor(case.plan()), moved(case.call(torch.float32))
    with pytest.raises(RuntimeError, match="call it once before the graph is captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device="cuda")  # torch warns of a graph with nothing in it
        executor.forward(call)


def test_a_captured_call_of_maml_follows_its_inputs() -> None:
    """Of a tuple, with labels, class weights and weights of the tasks that lie on the host."""
    model = small_net().cuda()
    maml = fastmaml.MAML(model, inner_lr=0.1, inner_steps=2, loss=torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5, 1.0])))
    tasks = tuple(v.cuda() for v in small_tasks())
    weights = torch.linspace(0.1, 0.3, len(tasks[0]))
    maml.meta_grad(tasks, task_weights=weights)
    maml.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = maml.meta_grad(tasks, task_weights=weights)
    tasks[0].mul_(0.9)
    graph.replay()
    captured, loss = [p.grad.clone() for p in maml.parameters()], out.loss.clone()
    maml.zero_grad(set_to_none=True)
    assert torch.equal(maml.meta_grad(tasks, task_weights=weights).loss, loss)
    assert all(torch.equal(p.grad, g) for p, g in zip(maml.parameters(), captured, strict=True))


def test_streams() -> None:
    """Calls of one object on several streams do not meet."""
    case = ragged_case()
    executor, call = CudaExecutor(case.plan()), moved(case.call(torch.float32))
    first = executor.forward(call)
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in range(4)], []
    for n in range(40):
        with torch.cuda.stream(streams[n % 4]):
            found.append(executor.forward(call))
    torch.cuda.synchronize()
    for other in found:
        same(first, other)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_launch_waits_for_nothing() -> None:
    case = ragged_case()
    executor, call = CudaExecutor(case.plan()), moved(case.call(torch.float32))
    executor.forward(call)
    try:
        torch.cuda.set_sync_debug_mode("error")
        executor.forward(call)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_out_of_memory_names_the_bytes_and_leaves_nothing() -> None:
    case = ragged_case()
    executor, call = CudaExecutor(case.plan(), shared_limit=1), moved(case.call(torch.float32))
    executor.forward(call)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_per_process_memory_fraction(1e-6)
    try:
        with pytest.raises(torch.cuda.OutOfMemoryError, match="the Plan of 17 tasks needs .* bytes on cuda.*fewer tasks"):
            executor.forward(call)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.cuda.memory_allocated() == before
    executor.forward(call)


def test_several_objects() -> None:
    models = [small_net().cuda() for _ in range(3)]
    tasks = [v.cuda() for v in small_tasks()]
    mamls = [fastmaml.MAML(copy.deepcopy(m), inner_lr=0.1, inner_steps=k + 1) for k, m in enumerate(models)]
    alone = [float(maml(tasks).loss) for maml in mamls]
    assert [float(maml(tasks).loss) for maml in reversed(mamls)] == alone[::-1]
