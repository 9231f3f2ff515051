"""The triton executor as others use it: in halves, around an inner loop elsewhere, through MAML, out of memory."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from executor_cases import ZERO
from random_programs import error, numbers_for
from test_torch_executor import focal, run_halves, small_program
from torch import Tensor
from triton_networks import small
from triton_process import DEVICE, on_device

import fastmaml
from fastmaml.executors import device
from fastmaml.executors.cuda.executor import CudaExecutor
from fastmaml.executors.mixed import MixedExecutor
from fastmaml.executors.torch.executor import TorchExecutor
from fastmaml.executors.triton.executor import INTERPRETED, TritonExecutor, Workspace
from fastmaml.plan import Arrangement, Plan, Rate
from fastmaml.plan.parts import divide
from fastmaml.program import Loss, ProgramBuilder


def test_halves_around_a_torch_loss() -> None:
    case = on_device(small("linear", "learned-rate", 1))
    plan = case.plan(entry="halves")
    losses, truth = run_halves(TorchExecutor(plan), case, focal)
    executor = TritonExecutor(plan, "highest")
    for _ in range(2):  # the second time in the same workspace
        got, values = run_halves(executor, case, focal, torch.float32)
        assert torch.allclose(got.double(), losses, rtol=1e-4)
        names = [n for n in truth if isinstance(n, str) and n.startswith("grad.")]
        assert error({n: values[n] for n in names}, {n: truth[n] for n in names}, ZERO) <= 1e-4
    assert sum(map(len, executor._idle.values())) == 1, "the workspace went back"


class OnTheHost(CudaExecutor):
    """The cuda executor, where there is no GPU as host code."""

    def __init__(self, plan: Plan) -> None:
        host = pytest.importorskip("fastmaml._cuda_host") if INTERPRETED else None
        super().__init__(plan, native=host)


@pytest.mark.parametrize("entry", ["train", "halves"])
@pytest.mark.parametrize("option", ["plain", "learned-per-tensor-and-step"])
def test_around_an_inner_loop_on_another(option: str, entry: str) -> None:
    """ANIL: the body here, the head's inner loop on the cuda executor, with equal masks; twice, for the second call of a GPU replays graphs."""
    case = small("conv", option)
    program = small_program("conv", outer=("body", "norm"))
    rates = {name: rate for name, rate in case.arrangement.rates.items() if name.startswith("head")}
    case = on_device(dataclasses.replace(case, program=program, arrangement=dataclasses.replace(case.arrangement, rates=rates)))
    plan = case.plan(entry=entry, record_masks=True)
    parts = divide(plan, lambda segment: "elsewhere" if segment.name.startswith(("prologue", "epilogue")) else None)
    around = TritonExecutor(parts.around, "highest")
    executor = MixedExecutor(plan, parts, around, OnTheHost(parts.inside))
    for _ in range(2):
        got, truth = executor.forward(case.call(torch.float32, record=True)), TorchExecutor(plan)
        assert got.executor == "triton + cuda" and got.precision == "highest" and got.finite.all()
        masks = {key: value for key, value in got.values.items() if isinstance(key, tuple)}
        exact = truth.forward(case.call(replay=masks))
        assert {name for name, _ in masks} == {name for name in plan.results if plan.buffers[name].kind in ("mask", "index")}
        assert error({"z": got.values["logits"]}, {"z": exact.values["logits"]}, ZERO) <= 1e-5
        if entry == "halves":
            given = {"dlogits": torch.tanh(exact.values["logits"])}
            got, exact = executor.reverse(got.state, given), truth.reverse(exact.state, given)
        names = [name for name in plan.results if name.startswith("grad.")]
        assert got.all_finite and error(got.values, {name: exact.values[name] for name in names}, ZERO) <= 1e-5
    del got
    assert sum(map(len, around._idle.values())) == 1, "the workspace went back"


def test_what_comes_late_decides_on_the_sums() -> None:
    """A task that the inner loop has lost is in none of the sums; what is late may have steps."""
    b = ProgramBuilder((3,))
    v = b.op("tanh", b.op("linear", 0, b.leaf("body", (4, 3), "outer")))
    program = b.build(b.op("linear", v, b.leaf("head", (2, 4), "adapted")))
    a = Arrangement(steps=2, loss=Loss("mse"), rates={"head": Rate("lr", (2, 4), True, True)})
    case = on_device(numbers_for(program, a, 0, [(3, 2), (2, 4), (4, 1)]))
    case.batch.query_y[2] = 1e20  # of task 1: its loss is infinite, and nothing else
    plan, names = case.plan(), ("grad.body", "grad.head", "grad.lr")
    parts = divide(plan, lambda segment: "elsewhere" if segment.name.startswith(("prologue", "epilogue")) else None)
    got = MixedExecutor(plan, parts, TritonExecutor(parts.around, "highest"), OnTheHost(parts.inside)).forward(case.call(torch.float32))
    weights = torch.tensor([1 / 3, 0.0, 1 / 3], dtype=torch.float64)
    truth = TorchExecutor(plan).forward(case.call(task_weights=weights)).values
    assert got.finite.tolist() == [True, False, True] and not got.all_finite
    assert error(got.values, {name: truth[name] for name in names}, ZERO) <= 1e-5


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(2, 5, 3, padding=1), torch.nn.BatchNorm2d(5), torch.nn.ReLU(), torch.nn.MaxPool2d(2)
    return torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(45, 3)).to(DEVICE)


def tasks_for(sizes: list[tuple[int, int]]) -> fastmaml.TaskBatch:
    generator = torch.Generator().manual_seed(1)

    def rows(n: int) -> tuple[Tensor, Tensor]:
        return torch.randn(n, 2, 6, 6, generator=generator), torch.arange(n) % 3

    return fastmaml.TaskBatch.from_tasks([(*rows(s), *rows(q)) for s, q in sizes]).to(DEVICE)


def gradient(maml: fastmaml.MAML) -> Tensor:
    return torch.cat([p.grad.double().flatten() for p in maml.parameters()])


def test_what_users_call() -> None:
    """Ragged tasks through MAML: the gradient of the torch backend; the bits of a task in any batch; adapted networks; errors that name the reason."""
    batch, found = tasks_for([(3, 4), (6, 2)]), {}
    for backend in ("torch", "triton"):
        maml = fastmaml.MAML(net().double() if backend == "torch" else net(), inner_lr=0.05, inner_steps=1, backend=backend, precision="highest")
        out = maml(batch if backend == "triton" else batch.to(torch.float64))
        out.loss.backward()
        assert out.executor == backend
        found[backend] = gradient(maml)
    assert float((found["triton"] - found["torch"]).norm() / found["torch"].norm()) <= 1e-4
    assert out.precision == "highest" and out.loss.device == batch.device and maml.memory_bytes(batch)["run"] > 0
    alone = maml(batch.select([1]))
    same = torch.allclose if INTERPRETED else torch.equal  # numpy's products depend on where a row lies; a GPU's do not
    assert same(alone.task_losses, out.task_losses[1:])
    adapted = maml.adapt(batch)
    assert [z.shape for z in adapted([batch.task(t)[2] for t in range(2)])] == [(4, 3), (2, 3)]
    assert adapted.module(1)(batch.task(1)[2]).shape == (2, 3)
    with pytest.raises(RuntimeError, match="float64"):
        fastmaml.MAML(net().double(), backend="triton").plan(batch.to(torch.float64))


@pytest.mark.parametrize("entry", ["train", "halves"])
def test_a_captured_call_keeps_its_memory(entry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a call lays out while a graph is captured is the graph's: it was there before, with its tables filled, and nobody else gets it."""
    case = on_device(small("linear", "learned-rate", 1))
    executor, call = TritonExecutor(case.plan(entry=entry)), case.call(torch.float32)
    plain = executor.forward(call)
    found = plain.values["logits"].clone()
    if entry == "halves":
        executor.reverse(plain.state, {"dlogits": torch.ones_like(found)})
    del plain
    (kept,) = (w for idle in executor._idle.values() for w in idle)
    with monkeypatch.context() as m:
        for module in ("triton.executor", "device"):
            m.setattr(f"fastmaml.executors.{module}.capturing", lambda device: True)
        monkeypatch.setattr(kept.storage.table, "copy_", None)  # nothing comes from the host
        with pytest.raises(RuntimeError, match="laid out for tasks of these sizes and weights: call it once .and backward. before each capture"):
            executor.forward(dataclasses.replace(call, task_weights=torch.tensor([0.5, 0.7])))
        captured = executor.forward(call)
        assert torch.equal(captured.values["logits"], found) and captured._known is True
        if entry == "halves":
            executor.reverse(captured.state, {"dlogits": torch.ones_like(found)})
        with pytest.raises(RuntimeError, match="call it once .and backward. before each capture"):
            executor.forward(call)
        del captured
    assert device._CAPTURED[-1][0] is kept and not any(executor._idle.values())
    executor.forward(call)
    assert kept not in [w for idle in executor._idle.values() for w in idle]


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_captured_graph_follows_its_inputs(kind: str) -> None:
    case = on_device(small(kind, "plain", 2))
    executor, call = TritonExecutor(case.plan(), "highest"), case.call(torch.float32)
    executor.forward(call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = executor.forward(call)
    for v in call.leaves.values():
        v.add_(0.01)
    for _ in range(2):
        executor.forward(dataclasses.replace(call, leaves={name: torch.zeros_like(v) for name, v in call.leaves.items()}))  # in memory of its own
        graph.replay()
    direct = executor.forward(call)
    for name, value in direct.values.items():
        assert torch.equal(captured.values[name], value), name


def test_what_was_laid_out_in_inference_mode_serves_later_calls() -> None:
    maml = fastmaml.MAML(net(), inner_lr=0.05, inner_steps=1, backend="triton")
    batch = tasks_for([(3, 4), (6, 2)])
    with torch.inference_mode():
        maml.adapt(batch)
    assert maml.adapt(batch).module(0)(batch.task(0)[2]).shape == (4, 3)


def test_out_of_memory_names_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    case = on_device(small("linear", "plain", 0))
    executor = TritonExecutor(case.plan())

    def full(*_: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("fastmaml.executors.triton.executor.Workspace", full)
    with pytest.raises(torch.cuda.OutOfMemoryError, match=rf"2 tasks needs {sum(executor.memory(case.batch).values()):,} bytes"):
        executor.forward(case.call(torch.float32))
    monkeypatch.undo()
    assert executor.forward(case.call(torch.float32)).all_finite


def test_objects_make_room_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first allocation fails; what another object has kept is let go, and the second one succeeds."""
    case = on_device(small("linear", "plain", 0))
    first, second = TritonExecutor(case.plan()), TritonExecutor(case.plan())
    first.forward(case.call(torch.float32))
    assert sum(map(len, first._idle.values())) == 1
    fails = [True]

    def tight(*arguments: Any) -> Workspace:
        if fails.pop() if fails else False:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return Workspace(*arguments)

    monkeypatch.setattr("fastmaml.executors.triton.executor.Workspace", tight)
    assert second.forward(case.call(torch.float32)).all_finite and not any(first._idle.values())
    assert first.forward(case.call(torch.float32)).all_finite
