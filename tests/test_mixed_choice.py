""""auto" takes the best executor for each part of a Plan, and says why; through MAML, where a GPU is simulated, and on one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from mixed_cases import anil_case, frozen, host, needs_host, parts_of
from test_torch_executor import option_case
from torch import Tensor, nn

import fastmaml
from fastmaml import executors
from fastmaml.executors import BackendError, explained
from fastmaml.executors.call import Call
from fastmaml.executors.cpu.executor import CpuExecutor
from fastmaml.executors.cuda import executor as cuda
from fastmaml.executors.mixed import MixedExecutor
from fastmaml.plan import Plan, Segment
from fastmaml.plan.parts import divide

GPU = torch.device("cuda")


# --------------------------------------------------------------------------------------------------------- what is a part
def test_the_parts_are_plans() -> None:
    case = anil_case("learned-per-tensor")
    plan = case.plan()
    parts = parts_of(plan)
    assert set(parts.around.segments) == {"prologue", "epilogue"} and not set(parts.inside.segments) & {"prologue", "epilogue"}
    assert parts.around.entries == 2 and parts.inside.entries == 1 and not parts.inside.reductions
    assert {name.split(".")[0] for name in parts.into} == {"prologue"} and {name.split(".")[0] for name in parts.back} == {"theta_bar", "zeta_bar", "rate_bar"}
    for part in (parts.around, parts.inside):
        made = {ref.buffer for _, i in part.instructions() for ref in i.writes()} | {r.target for r in part.reductions}
        read = {ref.buffer for _, i in part.instructions() for ref in i.reads()}
        assert not made & set(part.inputs) and read <= made | set(part.inputs) and set(part.results) <= made
        assert set(part.late) <= set(part.inputs) and "x.support" not in parts.inside.inputs
    whole = plan.count() + sum(len(part.instructions) for name, part in parts.inside.segments.items() if name.startswith("hand_over"))
    assert parts.around.count() + parts.inside.count() == whole


REFUSED = {
    "no inner loop": (lambda: anil_case(steps=0).plan(), frozen, "there is no inner loop"),
    "an adapted body": (lambda: option_case("conv", False, "constant", "plain").plan(), lambda s: "images" if s.name == "gradient" else None, "images"),
    "nothing before": (lambda: option_case("conv", False, "constant", "plain").plan(), frozen, "nothing comes before"),
    "joint rows": (lambda: anil_case("support").plan(), frozen, "of support and query rows together is needed inside"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_part(name: str) -> None:
    plan, why_not, message = REFUSED[name]
    with pytest.raises(NotImplementedError, match=message):
        divide(plan(), why_not)


# ----------------------------------------------------------------------------------------------------------------- choice
def conv_net(head: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, head))


def tasks_for(sizes: tuple[tuple[int, int], ...] = ((3, 4), (6, 2))) -> fastmaml.TaskBatch:
    generator = torch.Generator().manual_seed(1)

    def rows(n: int) -> tuple[Tensor, Tensor]:
        return torch.randn(n, 2, 6, 6, generator=generator), torch.arange(n) % 3

    return fastmaml.TaskBatch.from_tasks([(*rows(s), *rows(q)) for s, q in sizes])


def plan_for(parameterisation: str = "anil", steps: int = 2, model: nn.Module | None = None, **options: object) -> Plan:
    maml = fastmaml.MAML(model or conv_net(), inner_lr=0.1, inner_steps=steps, parameterisation=parameterisation, backend="torch", **options)
    return maml.plan(tasks_for())


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine said to have one: the host's device functions stand for the device's, Triton only lowers."""
    pytest.importorskip("triton", "3.6")
    monkeypatch.setattr(cuda, "_cuda", host)
    monkeypatch.setattr(executors, "sees_a_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))


def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "triton_executor", lambda: (None, "the Triton kernels could not be imported: no such module"))


def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_cuda", None)
    monkeypatch.setattr(cuda, "IMPORT_ERROR", "no such file")


def choose(plan: Plan, backend: str = "auto") -> tuple[str, str]:
    executor = executors.choose(backend, plan, torch.float32, GPU)
    return executor.name, explained(executor, backend, torch.float32, GPU)


@needs_host
def test_auto_gives_each_part_to_the_executor_that_is_made_for_it(gpu: None) -> None:
    name, said = choose(plan_for())
    assert name == "triton + cuda"
    triton, cuda, why = said.splitlines()
    assert triton == "triton: prologue, epilogue" and cuda.startswith("cuda: gradient, update, query, hvp, hand_over (kernels of this Plan's own")
    assert why.startswith("  why not cuda: conv2d_fwd has no device function")
    assert choose(plan_for(learn_inner_lr=True, first_order=True))[0] == "triton + cuda"
    assert choose(plan_for(batchnorm="joint"))[0] == choose(plan_for(steps=20))[0] == "triton + cuda"


@needs_host
def test_auto_leaves_a_plan_whole_where_nothing_is_gained(gpu: None) -> None:
    linear = nn.Sequential(nn.Flatten(), nn.Linear(72, 5), nn.ReLU(), nn.Linear(5, 3))
    assert choose(plan_for(model=linear))[0] == choose(plan_for("full", model=linear))[0] == "cuda"
    name, said = choose(plan_for("full"))
    assert name == "triton" and "why not cuda: conv2d_fwd has" in said and "Nor the inner loop alone: conv2d_fwd has" in said
    assert choose(plan_for(steps=0))[0] == "triton" and "there is no inner loop" in choose(plan_for(steps=0))[1]
    wide = nn.Sequential(nn.Conv2d(2, 30, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1080, 300))
    name, said = choose(plan_for(model=wide))
    assert name == "triton" and "MB of weights and their gradients for each task, too many for one thread block" in said


@needs_host
def test_what_is_missing_leads_to_the_next_best_with_the_reason(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as m:
        without_cuda(m)
        name, said = choose(plan_for())
        assert name == "triton" and "why not cuda: fastmaml._cuda could not be imported (no such file)" in said
    without_triton(monkeypatch)
    name, said = choose(plan_for())
    assert name == "torch + cuda" and "why not triton: the Triton kernels could not be imported" in said
    without_cuda(monkeypatch)
    name, said = choose(plan_for())
    assert name == "torch" and "no such file" in said and "no such module" in said


@needs_host
def test_a_backend_asked_for_by_name_runs_it_all_or_raises(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    name, said = choose(plan_for(), "triton")
    assert (name, said) == ("triton", "triton: all segments")
    with pytest.raises(BackendError, match=r"backend='cuda' cannot run this model: conv2d_fwd has no device function.*Able to: 'triton', 'torch'"):
        choose(plan_for(), "cuda")
    without_triton(monkeypatch)
    with pytest.raises(BackendError, match="backend='triton' cannot run this model: the Triton kernels could not be imported"):
        choose(plan_for(), "triton")


# ------------------------------------------------------------------------------------------------------------ through MAML
@pytest.fixture
def no_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cpu executor without convolutions: "auto" must find another for the body, on a machine as it is."""
    original = CpuExecutor.why_not_segment

    def refused(plan: Plan, segment: Segment) -> str | None:
        found = next((i.kernel for i in segment.instructions if i.kernel.startswith("conv2d")), None)
        return original(plan, segment) if found is None else f"{found} has no native kernel"

    monkeypatch.setattr(CpuExecutor, "why_not_segment", staticmethod(refused))


def used(backend: str, dtype: torch.dtype, device: str = "cpu", **options: object) -> tuple[fastmaml.MAML, list[Tensor]]:
    """Gradients of a call with each entry, adapted logits and accuracy."""
    maml = fastmaml.MAML(conv_net().to(device, dtype), inner_lr=0.1, inner_steps=3, parameterisation="anil", backend=backend, **options)
    tasks = tasks_for().to(device, dtype)
    out = maml(tasks)
    out.loss.backward()
    found = [out.loss.detach(), out.accuracy, *(p.grad.clone() for p in maml.parameters() if p.grad is not None)]
    maml.zero_grad()
    out = maml(tasks, outer_loss=lambda z, y: torch.stack([F.cross_entropy(a, b) for a, b in zip(z, y, strict=True)]).mean())
    out.loss.backward()
    found += [p.grad.clone() for p in maml.parameters() if p.grad is not None]
    maml.zero_grad()
    maml.meta_grad(tasks)
    found += [p.grad.clone() for p in maml.parameters() if p.grad is not None]
    with torch.no_grad():
        found.append(maml(tasks).loss)
    return maml, [*found, *maml.adapt(tasks)([tasks.task(t)[2] for t in range(2)])]


@pytest.mark.parametrize("options", [{}, {"learn_inner_lr": True}, {"first_order": True}], ids=["plain", "learned", "first"])
def test_through_maml(no_images: None, options: dict) -> None:
    maml, mine = used("auto", torch.float32, **options)
    maml(tasks_for())
    assert maml.executor == "torch + cpu"
    for a, b in zip(mine, used("torch", torch.float64, **options)[1], strict=True):
        assert float((a - b).norm()) <= 1e-5 * float(b.norm()) + 1e-7
    said = maml.explain(tasks_for())
    assert "torch: prologue, epilogue\ncpu: gradient, update, query" in said and "why not cpu: conv2d_fwd has no native kernel" in said
    assert any(name.startswith("cpu: ") for name in maml.memory_bytes(tasks_for()))
    checked = maml.verify(tasks_for(), repeats=1)
    assert checked.ok and checked.executor == "torch + cpu" and checked.plan_error <= 1e-11
    with pytest.raises(BackendError, match="backend='cpu' cannot run this model: conv2d_fwd has no native kernel"):
        fastmaml.MAML(conv_net(), backend="cpu").meta_grad(tasks_for())


def test_a_diverging_task_raises_by_number(no_images: None) -> None:
    maml, tasks = fastmaml.MAML(conv_net(), inner_lr=0.1, parameterisation="anil"), tasks_for()
    tasks.support_x[4] = float("nan")
    with pytest.raises(FloatingPointError, match=r"not finite: 1\."):
        maml.meta_grad(tasks)
    assert maml.executor == "torch + cpu" and all(p.grad is None for p in maml.parameters())


def test_several_objects_take_turns(no_images: None) -> None:
    """Two calls between a forward and its backward, of another object and of the same, change nothing."""
    first, second = (fastmaml.MAML(conv_net(), inner_lr=0.1, inner_steps=k, parameterisation="anil") for k in (1, 3))

    def outer(z: tuple[Tensor, ...], y: tuple[Tensor, ...]) -> Tensor:
        return torch.stack([F.cross_entropy(a, b) for a, b in zip(z, y, strict=True)]).mean()

    alone = torch.autograd.grad(first(tasks_for(), outer_loss=outer).loss, [*first.parameters()])
    pending = first(tasks_for(), outer_loss=outer).loss
    second(tasks_for(((2, 2), (4, 5)))), first(tasks_for(((2, 2), (4, 5))), outer_loss=outer)
    for a, b in zip(alone, torch.autograd.grad(pending, [*first.parameters()]), strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------------------------------------------------------------- on a GPU
def on_a_gpu(test: Callable) -> Callable:
    missing = not torch.cuda.is_available() or cuda._cuda is None
    return pytest.mark.cuda(pytest.mark.skipif(missing, reason="needs a GPU and fastmaml._cuda")(test))


@on_a_gpu
@pytest.mark.parametrize("options", [{}, {"learn_inner_lr": True}, {"first_order": True}], ids=["plain", "learned", "first"])
def test_through_maml_on_a_gpu(options: dict) -> None:
    """Three times: launch by launch, captured, replayed."""
    truth = used("torch", torch.float64, **options)[1]
    for _ in range(3):
        maml, mine = used("auto", torch.float32, "cuda", precision="highest", **options)
        assert maml(tasks_for().to("cuda")).executor == "triton + cuda"
        for a, b in zip(mine, truth, strict=True):
            assert float((a.double().cpu() - b).norm()) <= 1e-4 * float(b.norm()) + 1e-6


def call_on_a_gpu() -> tuple[MixedExecutor, Call]:
    case = anil_case()
    call = dataclasses.replace(case, batch=case.batch.to("cuda")).call(torch.float32)
    call = dataclasses.replace(call, **{part: {name: v.cuda() for name, v in getattr(call, part).items()} for part in ("leaves", "rates", "weights")})
    return executors.choose("auto", case.plan(), torch.float32, GPU), call


@on_a_gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_nothing_waits_between_the_parts() -> None:
    executor, call = call_on_a_gpu()
    for _ in range(2):
        assert executor.forward(call).all_finite
    try:
        torch.cuda.set_sync_debug_mode("error")
        executor.forward(call)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_a_gpu
def test_objects_on_streams_of_their_own() -> None:
    pairs, streams = [call_on_a_gpu() for _ in range(2)], [torch.cuda.Stream() for _ in range(2)]
    alone = pairs[0][0].forward(pairs[0][1]).values
    torch.cuda.synchronize()
    found = []
    for _ in range(4):
        for (executor, call), stream in zip(pairs, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(executor.forward(call).values)
    torch.cuda.synchronize()
    for values in found:
        assert all(torch.equal(v, values[name]) for name, v in alone.items())
