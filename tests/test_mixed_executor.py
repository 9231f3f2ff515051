"""One Plan on two executors: its inner loop on one, what is around it on the other; and that "auto" so takes the best for each part."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from random_programs import Case, error, gradients, numbers_for, outer_losses, random_case, randoms
from test_cpu_executor import ZERO, masks_equal_error
from test_torch_executor import OPTIONS, focal, option_case, run_halves, small_program
from torch import Tensor, nn

import fastmaml
from fastmaml import executors
from fastmaml.executors import BackendError, cuda, explained
from fastmaml.executors.call import Call
from fastmaml.executors.cpu import CpuExecutor
from fastmaml.executors.cuda import CudaExecutor
from fastmaml.executors.mixed import MixedExecutor
from fastmaml.executors.torch import TorchExecutor
from fastmaml.plan import Arrangement, Plan, Rate, Segment
from fastmaml.plan.parts import Parts, divide, split
from fastmaml.program import Loss, ProgramBuilder

try:
    from fastmaml import _cuda_host as host
except ImportError:
    host = None
MAKE = {"torch": TorchExecutor, "cpu": CpuExecutor, "cuda": functools.partial(CudaExecutor, native=host, threads=64)}
INSIDE = ["torch", "cpu", pytest.param("cuda", marks=pytest.mark.skipif(host is None, reason="fastmaml._cuda_host is not built"))]
GPU = torch.device("cuda")
needs_host = pytest.mark.skipif(host is None, reason="fastmaml._cuda_host is not built")


def frozen(segment: Segment) -> str | None:
    return f"{segment.name} runs elsewhere" if segment.name.startswith(("prologue", "epilogue")) else None


def parts_of(plan: Plan) -> Parts:
    """Also without an inner loop: the query rows by themselves."""
    if plan.steps:
        return divide(plan, frozen)
    names = [phase.segments[0] for phase in plan.schedule]
    return split(plan, names.index("query"), names.index("epilogue"))


def mixed(plan: Plan, inside: str = "torch", around: str = "torch") -> MixedExecutor:
    parts = parts_of(plan)
    return MixedExecutor(plan, parts, MAKE[around](parts.around), MAKE[inside](parts.inside))


def anil_case(option: str = "plain", kind: str = "conv", first_order: bool = False, memory: str = "constant", steps: int = 3) -> Case:
    """A frozen body and an adapted head, ragged tasks."""
    case = option_case(kind, first_order, memory, option)
    program = small_program(kind, OPTIONS[option].get("statistics", "batch"), ("body", "norm"))
    rates = {n: r for n, r in case.arrangement.rates.items() if n.startswith("head")}
    return dataclasses.replace(case, program=program, arrangement=dataclasses.replace(case.arrangement, rates=rates, steps=steps))


# ------------------------------------------------------------------------------------------- against float64 autograd
CROSSING = [option for option in OPTIONS if "support" not in option and not option.startswith(("outer", "factored"))]


@pytest.mark.parametrize("kind", ["conv", "linear"])
@pytest.mark.parametrize("option", CROSSING)
def test_options(option: str, kind: str) -> None:
    for first_order, memory in ((False, "constant"), (True, "constant"), (False, "fast")):
        case = anil_case(option, kind, first_order, memory)
        losses, truth = case.truth()
        results = mixed(case.plan()).forward(case.call())
        assert results.executor == "torch + torch" and results.all_finite
        assert error({"loss": outer_losses(case, results)}, {"loss": losses}, ZERO) <= 1e-11
        assert error(gradients(results, truth), truth, ZERO) <= 1e-11


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
@pytest.mark.parametrize("steps", [0, 1, 5, 10])
def test_the_native_inner_loop_of_anil(steps: int, first_order: bool, inside: str) -> None:
    """The body in float64, so that its decisions are the truth's."""
    options = ["plain", "ways", "task-weights"] + ["learned-rate", "multi-step"] * (steps == 3)
    for option in options:
        case = anil_case(option, first_order=first_order, steps=steps)
        losses, truth = case.truth()
        results = mixed(case.plan(), inside).forward(case.call())
        assert error({"loss": outer_losses(case, results)}, {"loss": losses}, ZERO) <= 1e-5
        assert error(gradients(results, truth), truth, ZERO) <= 1e-5


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("option", ["learned-rate", "learned-per-tensor-and-step", "learned-per-element-and-step", "learned-multi-step", "mse-sum", "class-weight"])
def test_native_options(option: str, inside: str) -> None:
    case = anil_case(option)
    _, truth = case.truth()
    results = mixed(case.plan(), inside).forward(case.call())
    assert error(gradients(results, truth), truth, ZERO) <= 1e-5


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
def test_two_halves_around_a_torch_loss(first_order: bool, steps: int, inside: str) -> None:
    for option in ("plain", "learned-rate", "learned-per-element-and-step"):
        case = anil_case(option, first_order=first_order, steps=steps)
        case.rates.update({name: v[:steps] for name, v in case.rates.items() if "step" in option and steps})
        if "learned" in option and not steps:
            continue  # no rate is read
        losses, truth = case.truth(outer=focal)
        executor = mixed(case.plan(entry="halves"), inside)
        got, values = run_halves(executor, case, focal)
        assert executor.inside.plan.entries == executor.around.plan.entries == 2
        assert error({"loss": got}, {"loss": losses}, ZERO) <= 1e-5
        assert error({n: values[f"grad.{n}"] for n in truth}, truth, ZERO) <= (1e-11 if inside == "torch" else 1e-5)


@pytest.mark.parametrize("inside", ["cpu", INSIDE[-1]])
def test_equal_masks(inside: str) -> None:
    """The decisions of both parts come out under the whole Plan's names, and can be replayed."""
    for option in ("plain", "learned-per-tensor", "task-weights"):
        case = anil_case(option)
        plan = case.plan(record_masks=True)
        kinds = {key[0].split(".")[0] for key in mixed(plan, inside).forward(case.call(torch.float32, record=True)).values if isinstance(key, tuple)}
        assert kinds == {"prologue"}
        assert 0 <= masks_equal_error(case, 1e-5, functools.partial(mixed, inside=inside)) <= 1e-5


@pytest.mark.parametrize("entry", ["train", "halves", "evaluate", "adapt"])
def test_random_programs_have_the_bits_of_the_whole(entry: str) -> None:
    """Whatever can be cut, in float64: no number is missing, or read from the wrong place."""
    crossed = set()
    for n, rng in enumerate(randoms(120)):
        case = random_case(rng, conv=n % 2 == 0, **({} if entry == "train" else {"query_from": None}))
        plan = case.plan(entry=entry)
        try:
            executor = mixed(plan) if plan.steps else None
        except NotImplementedError:
            executor = None
        if executor is None:
            continue
        crossed |= {name.split(".")[0] for name in (*executor.parts.into, *executor.parts.back)}
        torch_executor = TorchExecutor(plan)
        whole, found = torch_executor.forward(case.call()), executor.forward(case.call())
        results = [(whole, found)]
        if entry == "halves":
            given = {"dlogits": torch.tanh(whole.values["logits"])}
            results.append((torch_executor.reverse(whole.state, given), executor.reverse(found.state, given)))
            results[1][0].values = {k: v for k, v in results[1][0].values.items() if k in results[1][1].values}
            assert {r.target for r in plan.reductions if r.target in plan.results} <= results[1][1].values.keys()
        for one, other in results:
            assert one.values.keys() == other.values.keys() and torch.equal(one.finite, other.finite)
            for name, value in one.values.items():
                assert torch.equal(value.nan_to_num(7.0), other.values[name].nan_to_num(7.0)), name
    assert len(crossed) >= (5 if entry in ("train", "halves") else 1), crossed


# ------------------------------------------------------------------------------------------------ tasks that are not finite
def spoiled(case: Case, task: int, what: str, value: float) -> Case:
    batch = case.batch.to(torch.float64)
    rows = getattr(batch, what).clone()
    rows.split(list(batch.support_sizes if "support" in what else batch.query_sizes))[task].fill_(value)
    return dataclasses.replace(case, batch=dataclasses.replace(batch, **{what: rows}))


def without(case: Case, task: int) -> Case:
    weights = torch.full((len(case.batch),), 1 / len(case.batch), dtype=torch.float64)
    weights[task] = 0.0
    return dataclasses.replace(case, task_weights=weights)


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("entry", ["train", "halves"])
def test_a_task_is_left_out_by_both_parts(entry: str, inside: str) -> None:
    case = anil_case("learned-rate")
    bad = spoiled(case, 1, "support_x", float("nan"))
    found = []
    for c in (without(case, 1), bad):
        executor = mixed(c.plan(entry=entry), inside)
        results = executor.forward(c.call(torch.float32))
        if entry == "halves":
            assert results.finite.tolist() == [True, c is not bad, True]
            results = executor.reverse(results.state, {"dlogits": torch.ones_like(results.values["logits"])})
        found.append(results)
    clean, results = found
    assert results.finite.tolist() == [True, False, True] and not results.all_finite
    for name in (n for n in clean.values if n.startswith("grad.")):
        assert torch.allclose(clean.values[name], results.values[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("inside", ["cpu", INSIDE[-1]])
def test_what_only_the_inner_loop_knows(inside: str) -> None:
    """A loss that is infinite in float32 while every gradient is finite: known to the inner loop alone, the sums are made around it."""
    case = anil_case("mse", steps=1)
    bad = spoiled(case, 2, "query_y", 1e20)
    whole, results = CpuExecutor(case.plan()).forward(bad.call(torch.float32)), mixed(case.plan(), inside).forward(bad.call(torch.float32))
    assert whole.finite.tolist() == results.finite.tolist() == [True, True, False]
    for name in (n for n in whole.values if n.startswith("grad.")):
        assert torch.allclose(whole.values[name], results.values[name], rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("inside", INSIDE)
def test_what_only_the_reverse_of_the_body_knows(inside: str) -> None:
    """A gradient of the body that overflows: the head's are finite, and must not be in the sums either."""
    b = ProgramBuilder((2,))
    v = b.op("tanh", b.op("linear", 0, b.leaf("body", (3, 2), "outer")))
    program = b.build(b.op("linear", v, b.leaf("head", (2, 3), "adapted")))
    a = Arrangement(steps=1, loss=Loss("mse", "sum"), rates={"head": Rate("lr")}, first_order=True)
    case = numbers_for(program, a, 0, [(3, 2)] * 3)
    x = case.batch.query_x.clone()
    x[2:4] = torch.tensor([1.0, 3e38])  # of task 1; the body gives it no weight
    leaves = {**case.leaves, "body": case.leaves["body"] * torch.tensor([1.0, 0.0]), "head": 30 * case.leaves["head"]}
    case = dataclasses.replace(case, batch=dataclasses.replace(case.batch, query_x=x), leaves=leaves)
    plan = case.plan()
    results = mixed(plan, inside).forward(case.call(torch.float32))
    whole = TorchExecutor(plan).forward(case.call(torch.float32))
    assert whole.finite.tolist() == results.finite.tolist() == [True, False, True]
    assert torch.allclose(whole.values["grad.head"], results.values["grad.head"], rtol=1e-5)
    assert torch.allclose(whole.values["grad.body"], results.values["grad.body"], rtol=1e-5)


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
    pytest.importorskip("triton")
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
def test_nothing_waits_between_the_parts() -> None:
    executor, call = call_on_a_gpu()
    for _ in range(2):
        assert executor.forward(call).all_finite
    torch.cuda.set_sync_debug_mode("error")
    try:
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
