"""plan/costs.py against counts by hand and the table of FLOPs per image; plan/explain.py as a reader sees it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fastmaml
from fastmaml import MAML, TaskBatch, machine
from fastmaml import nn as nets
from fastmaml.executors.torch.kernels import KERNELS
from fastmaml.plan import Arrangement, Buffer, Instruction, Rate, Ref, build_plan
from fastmaml.plan.costs import Counter, compulsory_bytes, costs
from fastmaml.plan.explain import explain, stored_bytes
from fastmaml.plan.memory import plan_bytes
from fastmaml.program import Loss
from fastmaml.trace import trace


def line(tasks: int, support: int, query: int, inputs: int = 1, outputs: int = 1) -> TaskBatch:
    sizes = (support, inputs), (support, outputs), (query, inputs), (query, outputs)
    return TaskBatch.from_tensors(*(torch.randn(tasks, *s) for s in sizes))


def images(tasks: int, n: int, shape: tuple[int, ...] = (1, 28, 28)) -> TaskBatch:
    x, y = torch.rand(tasks, n, *shape), torch.arange(n).remainder(5).repeat(tasks, 1)
    return TaskBatch.from_tensors(x, y, x, y)


def segment(rows: list, name: str, field: str) -> int:
    return sum(getattr(row, field) for row in rows if row.segment == name)


def mlp_plan(steps: int = 1):
    batch = line(2, 5, 7, inputs=3, outputs=2)
    return MAML(nets.MLP(3, 4, 2), loss="mse", inner_steps=steps, backend="torch").plan(batch), batch


def test_counts_of_a_tiny_mlp_by_hand() -> None:
    plan, batch = mlp_plan(steps=3)
    rows = costs(plan, batch)
    inner = 3 * 2 * 5  # rows of all steps and tasks
    forward, without_first = 2 * (3 * 4 + 4 * 2), 2 * 4 * 2
    # the gradient at the first layer's output meets no tangent (its input is data), so the HVP does not make it again
    gradient, hvp = 2 * forward + without_first, 3 * forward + 4 * without_first
    assert segment(rows, "gradient", "products") == inner * gradient
    assert segment(rows, "hvp", "products") == inner * hvp
    assert segment(rows, "query", "products") == 2 * 7 * gradient
    # a row of the gradient: biases 4 + 2, ReLU 4 forward and 4 back, loss 6 and its gradient 6, bias gradients 4 + 2
    assert segment(rows, "gradient", "flops") == inner * (gradient + 32)
    parameters = 3 * 4 + 4 + 4 * 2 + 2
    assert segment(rows, "update", "flops") == 3 * 2 * 2 * parameters
    assert segment(rows, "update", "bytes") == 3 * 2 * 4 * (3 * parameters + 4)  # and the rate, once for each array
    assert segment(rows, "sum over tasks", "flops") == 2 * 2 * parameters
    assert segment(rows, "sum over tasks", "bytes") == 3 * parameters * 4
    assert {row.times for row in rows if row.segment in ("gradient", "update", "hvp")} == {3}


def test_bytes_of_one_instruction_by_hand() -> None:
    plan, batch = mlp_plan()
    counter = Counter(plan, batch, tasks=2)
    first, relu = plan.segments["gradient"].instructions[:2]
    assert (first.kernel, relu.kernel) == ("linear_fwd", "relu_fwd")
    assert counter.bytes(first) == 4 * (10 * 3 + 2 * 12 + 2 * 4 + 10 * 4)
    assert counter.bytes(relu) == 10 * 4 * (4 + 4 + 1)  # the mask has one byte
    assert counter.bytes(first, "block") == 4 * 10 * 4
    assert counter.flops(first) == (2 * 10 * 12, 10 * 4)


def test_compulsory_bytes() -> None:
    plan, batch = mlp_plan()
    given, results = compulsory_bytes(plan, batch)
    assert given == 4 * (2 * 12 * (3 + 2) + 26 + 1)  # data, parameters, the rate
    assert results == 4 * (26 + 2 + 2 + 2 * 7 * 2)  # gradients, both losses, logits


# Products of one row in MFLOP: forward, gradient, Hessian-vector product. The last network's activations are more than one step keeps
# (frame.KEPT_BYTES), so its HVP makes them again.
PER_IMAGE = {
    "sinusoid": (lambda: MAML(nets.SinusoidMLP(), loss="mse"), line(2, 3, 4), (0.00336, 0.0100, 0.01984)),
    "conv4, stride 2": (lambda: MAML(nets.CbfinnOmniglot()), images(2, 5), (5.31, 15.7, 30.98)),
    "conv4, pooled": (lambda: MAML(nets.HTYMAMLNet()), images(2, 5), (19.63, 57.99, 114.2)),
    "conv4-32, 84": (lambda: MAML(nets.CbfinnMiniImagenet()), images(1, 5, (3, 84, 84)), (54.69, 151.9, 376.5)),
}


@pytest.mark.parametrize("name", PER_IMAGE)
def test_products_per_image(name: str) -> None:
    build, batch, (forward, gradient, hvp) = PER_IMAGE[name]
    maml = build()
    rows, support = costs(maml.plan(batch), batch), sum(batch.support_sizes)
    assert segment(rows, "gradient", "products") / support * 1e-6 == pytest.approx(gradient, rel=0.005)
    assert segment(rows, "hvp", "products") / support * 1e-6 == pytest.approx(hvp, rel=0.005)
    evaluated = costs(maml.plan(batch, inner_steps=0, entry="evaluate"), batch)
    assert segment(evaluated, "query", "products") / sum(batch.query_sizes) * 1e-6 == pytest.approx(forward, rel=0.005)


@pytest.mark.parametrize(("steps", "gflop"), [(1, 0.00996), (5, 0.0441), (10, 0.0857)])  # one: its activations are kept
def test_a_whole_meta_iteration_on_sinusoids(steps: int, gflop: float) -> None:
    batch = line(25, 10, 10)
    plan = MAML(nets.SinusoidMLP(), loss="mse", inner_steps=steps).plan(batch)
    assert sum(row.products for row in costs(plan, batch)) * 1e-9 == pytest.approx(gflop, rel=0.005)


def factored_plan(steps: int = 3):
    """MLP(30, 4, 2), the first layer of which is factored: two tasks of 5 support and 7 query rows."""
    program = trace(nets.MLP(30, 4, 2), (30,)).with_roles(lambda name: "adapted")
    rates = {leaf.name: Rate("inner_lr") for leaf in program.leaves}
    arrangement = Arrangement(steps, Loss("mse"), rates, support_rows=5)
    return build_plan(program, arrangement), line(2, 5, 7, 30, 2)


def test_a_factored_first_layer_by_hand() -> None:
    rows = costs(*factored_plan())
    assert segment(rows, "prologue_batch", "products") == 2 * (5 + 7) * 2 * 30 * 4  # x W_0^T of all rows
    assert segment(rows, "prologue", "products") == 2 * 2 * (5 + 7) * 5 * 30  # the Gram matrices
    head, inner = 2 * 4 * 2, 3 * 2 * 5
    assert segment(rows, "gradient", "products") == inner * (2 * 5 * 4 + 3 * head)
    assert segment(rows, "epilogue_batch", "products") == 2 * (5 + 7) * 2 * 30 * 4
    assert "all tasks together:" in explain(*factored_plan()) and "[n,30]x2 -> [n,n]" in explain(*factored_plan())


def test_ragged_tasks_are_summed() -> None:
    plan, _ = mlp_plan()
    ragged = TaskBatch.from_tasks([line(1, n, 3, 3, 2).task(0) for n in (2, 8)])
    even = line(2, 5, 3, 3, 2)
    assert costs(plan, ragged) == costs(plan, even)
    assert "2..8 support and 3 query rows" in explain(plan, ragged)


def test_every_kernel_of_the_torch_executor_has_a_count() -> None:
    plan = SimpleNamespace(buffers={"x": Buffer("x", (2, 2), "support")})
    counter = Counter(plan, SimpleNamespace(support_sizes=(3,), query_sizes=(3,)), tasks=1)
    x = Ref("x")
    for kernel in KERNELS:
        instr = Instruction(kernel, (x,) * 5, (x, x))
        assert (counter.flops(instr) is None) == kernel.startswith("module_"), f"{kernel}: add it to costs.ELEMENTWISE"


def test_stored_bytes_are_those_of_the_memory_plan() -> None:
    batch = images(3, 5)
    for memory in ("constant", "fast"):
        whole = MAML(nets.OmniglotFC(), inner_steps=2, memory=memory, backend="torch").plan(batch)
        for plan in (whole, factored_plan()[0]):
            rows = {"support": 5, "query": 5, "joint": 10}
            total = plan_bytes(plan, rows, tasks=3, in_flight=2)
            for home, copies in (("meta", 1), ("task", 3), ("run", 2)):
                own = [b for b in plan.buffers.values() if b.home == home and b.name not in plan.inputs]
                assert total[home] == copies * sum(stored_bytes(b, rows) for b in own)


# ------------------------------------------------------------------------------------------------------------- in words


def test_the_table() -> None:
    plan, batch = mlp_plan(steps=3)
    text = explain(plan, batch, peak_gflops=100.0, bandwidth=10.0, in_flight=8)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0] == "Plan 'train': 2 tasks of 5 support and 7 query rows, 3 inner steps"
    assert "each task, k = 0 .. 2:" in lines and "each task, k = 2 .. 0:" in lines
    assert any(row.startswith("hvp x 3") for row in lines)
    row = next(row for row in lines if "linear_fwd" in row)
    assert row.split() == ["linear_fwd", "[n,3]", "[4,3]", "[4]", "->", "[n,4]", "840", "1.22", "kB", "blk"]
    total = sum(row.flops for row in costs(plan, batch))
    assert f"{total / 1e3:.3g} k" in next(row for row in lines if row.startswith("total"))
    assert "2 tasks in flight" in text and "at least" in lines[-1]


def test_printing_does_not_grow_with_the_steps() -> None:
    few, many = (explain(*mlp_plan(steps)).splitlines() for steps in (3, 300))
    assert len(few) == len(many)


def test_without_peaks_no_floor_is_claimed() -> None:
    text = explain(*mlp_plan())
    assert "at least" not in text and "fastmaml.machine.peaks" in text


def test_floor_is_the_slower_of_compute_and_memory() -> None:
    plan, batch = mlp_plan()
    total = sum(row.flops for row in costs(plan, batch))
    assert explain(plan, batch, peak_gflops=total * 1e-9, bandwidth=1e6).endswith("at least 1 s")
    assert explain(plan, batch, peak_gflops=1e9, bandwidth=sum(compulsory_bytes(plan, batch)) * 1e-9).endswith(" 1 s")


ARRANGEMENTS = {
    "first order": ({"first_order": True}, "train"),
    "head only": ({"adapt": "classifier.*"}, "train"),
    "learned rates": ({"learn_inner_lr": True, "inner_lr": {"*": 0.1}}, "train"),
    "multi-step": ({"step_loss_weights": [0.5, 0.5]}, "train"),
    "support statistics": ({"batchnorm": "support"}, "train"),
    "fast memory": ({"memory": "fast"}, "train"),
    "two halves": ({}, "halves"),
    "evaluation": ({}, "evaluate"),
    "adaptation": ({}, "adapt"),
}


@pytest.mark.parametrize("name", ARRANGEMENTS)
@pytest.mark.parametrize("net", [nets.OmniglotFC, nets.HTYMAMLNet])
def test_any_plan_can_be_explained(name: str, net) -> None:
    options, entry = ARRANGEMENTS[name]
    maml, batch = MAML(net(), inner_steps=2, **options), images(2, 5)
    plan = maml.plan(batch, entry=entry)
    text = explain(plan, batch, 50.0, 5.0)
    assert max(map(len, text.splitlines())) <= 100
    assert "Not counted" not in text
    for kernel in {instr.kernel for _, instr in plan.instructions()}:
        assert kernel in text


def test_a_module_that_is_not_traced_says_so() -> None:
    net = nn.Sequential(nn.Linear(1, 4), nn.Dropout(), nn.Linear(4, 1))
    maml, batch = MAML(net, loss="mse", backend="autograd"), line(2, 3, 3)
    text = explain(maml.plan(batch), batch, 50.0, 5.0)
    assert "Not counted: module_bwd, module_bwd_jvp, module_fwd, module_jvp, module_replay" in text
    assert text.endswith("without what is not counted") and " ? " in text


def test_maml_explain() -> None:
    batch = line(2, 5, 7, inputs=3, outputs=2)
    assert "hvp" in fastmaml.MAML(nets.MLP(3, 4, 2), loss="mse").explain(batch)


def test_peaks_are_measured_once(monkeypatch) -> None:
    monkeypatch.setattr(machine, "COPY_BYTES", 1 << 16)
    machine.bandwidth.cache_clear()
    try:
        assert machine.bandwidth() > 0 and machine.bandwidth() == machine.bandwidth()
        assert machine.peak_gflops(1) is None or machine.peak_gflops(1) == machine.peak_gflops(1) > 0
        assert set(machine.peaks()) == {"peak_gflops", "bandwidth"}
    finally:
        machine.bandwidth.cache_clear()
