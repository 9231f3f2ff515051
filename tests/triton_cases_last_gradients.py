"""Last weight gradients summed over the tasks in the accumulator, and tasks that are not finite."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from random_programs import numbers_for
from torch import Tensor
from triton_networks import INNER, fusible, small
from triton_process import DEVICE, judge, judge_plan, on_device

import fastmaml
from fastmaml.executors.call import Call
from fastmaml.executors.torch import kernels as torch_kernels
from fastmaml.executors.triton.executor import TritonExecutor, Workspace
from fastmaml.executors.triton.fusion import fuse
from fastmaml.executors.triton.lowering import Lowering
from fastmaml.executors.triton.storage import Bucket, Storage
from fastmaml.plan import Plan
from fastmaml.plan.instructions import Buffer, Group, Instruction, Phase, Reduction, Ref, Segment


def last_gradients() -> Plan:
    """Two weight gradients that are the last terms of sums over tasks, and a loss, by themselves: of a convolution and of a linear layer, which end in
    theta_bar - rate g."""
    attrs = {"stride": (2, 1), "padding": (1, 0, 0, 2), "input_shape": (8, 5, 6), "weight_shape": (7, 8, 3, 3)}
    layers = {"conv2d": ((8, 5, 6), (7, 2, 6), (7, 8, 3, 3), attrs), "linear": ((2, 70), (2, 3), (3, 70), {})}
    buffers, instructions = [Buffer("lr", home="meta"), Buffer("loss", home="task"), Buffer("loss.query", home="task")], []
    instructions.append(Instruction("copy_fwd", (Ref("loss"),), (Ref("loss.query"),)))
    for op, (x, y, w, attrs) in layers.items():
        buffers += [Buffer(f"{op}.{name}", shape, "support", home="run") for name, shape in (("x", x), ("dy", y), ("xt", x), ("dyt", y))]
        buffers += [Buffer(f"{op}.{name}", shape, home="run") for name, shape in (("dw", w), ("db", w[:1]), ("w_bar", w), ("b_bar", w[:1]))]
        buffers += [Buffer(f"grad.{op}.{name}", shape, home="meta") for name, shape in (("w_bar", w), ("b_bar", w[:1]))]
        rows, dw, db, w_bar, b_bar = (tuple(Ref(f"{op}.{name}") for name in names) for names in (("x", "dy", "xt", "dyt"), ("dw",), ("db",), ("w_bar",), ("b_bar",)))
        instructions.append(Instruction(f"{op}_bwd_weight_jvp", rows, dw + db, attrs))
        instructions += [Instruction("axpy_fwd", (*bar, *g, Ref("lr")), bar, {"sign": -1.0}) for bar, g in ((w_bar, dw), (b_bar, db))]
    reductions = tuple(Reduction(Ref(b.name.removeprefix("grad.")), b.name) for b in buffers if b.name.startswith("grad."))
    inputs = tuple(b.name for b in buffers if b.name.split(".")[-1] in ("lr", "loss", "x", "dy", "xt", "dyt", "w_bar", "b_bar") and not b.name.startswith("grad."))
    segment = Segment("hvp", tuple(Group((instr,), None) for instr in instructions))
    return Plan("last", 1, {b.name: b for b in buffers}, {"hvp": segment}, (Phase(("hvp",)),), reductions, ("loss.query", *(r.target for r in reductions)), inputs)


def spoil(values: dict[str, list[Tensor]], place: str) -> None:
    """Something of task 1 is not finite: or all is, but not its gradient."""
    if place == "loss":
        values["loss"][1][()] = torch.nan
    elif place == "adjoint":
        values["conv2d.dyt"][1][0, 3, 1, 2] = torch.inf
    elif place == "theta_bar":
        values["linear.w_bar"][1][2, 69] = -torch.inf
    elif place == "gradient":
        values["conv2d.x"][1][0, 5, 2, 3] = values["conv2d.dyt"][1][0, :, 1, 3] = 2.0**70


class Walled(Storage):
    """Behind every array of floats lie more, which are no numbers."""

    def _new(self, home: str, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
        array = super()._new(home, numel + 1000, dtype)
        return (array.fill_(torch.nan) if dtype.is_floating_point else array.zero_())[:numel]


@pytest.mark.parametrize("programs", [1, 3, 10**6])  # all tasks by one program, some, each by its own
@pytest.mark.parametrize("place", ["nowhere", "loss", "adjoint", "theta_bar", "gradient"])
def test_last_gradients_of_tasks_that_are_not_finite(place: str, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule (c), for the sum over those that are."""
    monkeypatch.setattr("fastmaml.executors.triton.last_gradients.PROGRAMS", programs)
    monkeypatch.setattr("fastmaml.executors.triton.lowering.Storage", Walled)
    generator, sizes, plan = torch.Generator().manual_seed(0), (3, 1, 4, 1, 2), last_gradients()

    def numbers(b: Buffer) -> list[Tensor]:
        return [torch.randn(([n] if b.rows else []) + list(b.shape), generator=generator) for n in (sizes if b.home != "meta" else (1,))]

    values = {name: numbers(plan.buffers[name]) for name in plan.inputs}
    spoil(values, place)
    weights = [0.5, 3.0, 1.0, 0.25, 2.0]
    there = [t for t in range(5) if place == "nowhere" or t != 1]

    def truth(op: str, change) -> tuple[Tensor, ...]:
        v = {name.removeprefix(f"{op}."): [change(x) for x in of] for name, of in values.items()}
        attrs = next(instr.attrs for _, instr in plan.instructions() if instr.kernel.startswith(op))
        found = [torch_kernels.KERNELS[f"{op}_bwd_weight_jvp"](None, attrs, *(v[name][t] for name in ("x", "dy", "xt", "dyt"))) for t in range(5)]
        return tuple(sum(weights[t] * (v[bar][t] - v["lr"][0] * found[t][i]) for t in there) for i, bar in enumerate(("w_bar", "b_bar")))

    workspace = Workspace(fuse(plan), Bucket(5, 4, 1), DEVICE, "highest")
    groups = {1: {5}, 3: {3}, 10**6: {1}}[programs]
    assert {summed.group for summed in workspace.lowering.sums.values()} == groups and len(workspace.lowering.sums) == 2
    workspace.describe(Call(fastmaml.TaskBatch.from_tasks([(torch.zeros(n, 1), torch.zeros(n), torch.zeros(1, 1), torch.zeros(1)) for n in sizes]), {}))
    storage = workspace.storage
    storage.task_weights.copy_(torch.tensor(weights))
    for name, of in values.items():
        b = plan.buffers[name]
        storage.write(name, torch.cat(of) if b.rows else torch.stack(of) if b.home != "meta" else of[0])
    for summed in workspace.lowering.sums.values():
        if summed.partial:
            summed.partial.data.fill_(torch.nan)
    workspace.run(0)
    assert storage.finite.tolist() == [int(t in there) for t in range(5)]
    for op in ("conv2d", "linear"):
        moved = [truth(op, lambda v: v.double() * (1 + 2.0**-24 * torch.randn(v.shape, generator=generator, dtype=torch.float64)))]
        for exact, plain, near, bar in zip(truth(op, Tensor.double), truth(op, Tensor.float), *moved, ("w_bar", "b_bar"), strict=True):
            got = storage.read(f"grad.{op}.{bar}", 0).cpu()
            judge(f"{op} {bar}", [float((v.double() - exact).norm()) for v in (got, plain, near)] + [float(exact.norm())])


def test_a_gradient_that_is_read_later_is_not_summed_in_the_accumulator() -> None:
    plan = last_gradients()
    found = {}
    for later in ("linear", "conv2d", None):
        buffers, groups, results = plan.buffers, plan.segments["hvp"].groups, plan.results
        if later:
            bar = buffers[f"{later}.w_bar"]
            read = Instruction("copy_fwd", (Ref(bar.name),), (Ref("seen"),))
            buffers, groups, results = {**buffers, "seen": Buffer("seen", bar.shape, home="task")}, (*groups, Group((read,), None)), (*results, "seen")
        changed = dataclasses.replace(plan, buffers=buffers, segments={"hvp": Segment("hvp", groups)}, results=results)
        found[later] = {summed.source for summed in Lowering(fuse(changed), Bucket(5, 4, 1), "meta").sums.values()}
    assert found == {None: {"conv2d.w_bar", "linear.w_bar"}, "linear": {"conv2d.w_bar"}, "conv2d": {"linear.w_bar"}}


LAST = [("rows", 2, {}), ("images", 1, {}), ("images", 1, {"first_order": True}), ("rows", 0, {}), ("rows", 1, {"query_from": 0}), ("rows", 2, INNER[0])]


@pytest.mark.parametrize(("kind", "steps", "changes"), LAST, ids=str)
def test_last_gradients_in_the_accumulator(kind: str, steps: int, changes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whole Plans: at the first step, or of the query, where the loss of a state joins in last, and with momentum."""
    monkeypatch.setattr("fastmaml.executors.triton.last_gradients.PROGRAMS", 2)
    case = fusible(kind)[0]
    case = numbers_for(case.program, dataclasses.replace(case.arrangement, steps=steps, **changes), 0, [(3, 1), (5, 2), (1, 3), (4, 4), (2, 1)])
    judge_plan(dataclasses.replace(case, task_weights=torch.tensor([0.3, 1.0, 2.0, 0.5, 0.1], dtype=torch.float64)))
    found = [launch.kernel.__name__ for half in Lowering(fuse(case.plan()), Bucket(5, 8, 4), "meta").halves for launch in half]
    assert found.count("conv2d_weight_tasks") == {"rows": 3, "images": 4}[kind]


@pytest.mark.parametrize("programs", [256, 1])  # last gradients by task, summed in the accumulator
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_tasks_that_are_not_finite(kind: str, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastmaml.executors.triton.last_gradients.PROGRAMS", programs)
    case = on_device(small(kind, "plain", 1, (0, 1, 2)))
    batch = case.batch
    good = TritonExecutor(case.plan()).forward(dataclasses.replace(case, batch=batch.select([0, 2])).call(torch.float32))
    batch.support_x[batch.support_sizes[0]] = float("nan")  # of task 1
    weights = torch.tensor([0.5, 7.0, 0.5], dtype=torch.float64)
    executor = TritonExecutor(case.plan())
    for _ in range(2):  # the second time in the same workspace
        results = executor.forward(case.call(torch.float32, task_weights=weights))
        assert results.finite.tolist() == [True, False, True] and not results.all_finite
        for name, value in good.values.items():
            if name.startswith("grad."):
                assert torch.allclose(results.values[name], value, rtol=1e-5, atol=1e-6), name
    (workspace,) = (w for kept in executor._idle.values() for w in kept)
    assert any(summed.group > 1 for summed in workspace.lowering.sums.values()) == (programs == 1)
