"""What the Plan gains from a parameterisation's structure: which products it does not have, counted in instructions and in FLOPs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from families import small_conv
from plain_loop import classify, mlp

from benchmarks import families as benchmark
from fastmaml import MAML, TaskBatch, methods
from fastmaml.parameterisation import Layerwise, SetEncoder, TNet
from fastmaml.plan.costs import costs

CONVS = ("0.weight", "4.weight")


def images(tasks: int = 2, support: int = 5) -> TaskBatch:
    return TaskBatch.of(classify(tasks, support, 7, (2, 6, 6)))


def kernels(maml: MAML, segment: str, batch: TaskBatch | None = None) -> Counter:
    plan = maml.plan(batch or images())
    return Counter(i.kernel for i in plan.segments[segment].instructions) if segment in plan.segments else Counter()


def products(maml: MAML, batch: TaskBatch, *segments: str) -> int:
    """FLOPs of linear, conv2d and matmul."""
    return sum(row.products for row in costs(maml.plan(batch), batch) if not segments or row.segment in segments)


def convs(found: Counter) -> dict[str, int]:
    return {name: n for name, n in found.items() if name.startswith("conv2d")}


def test_head_only_has_no_body_in_the_inner_loop_and_no_gradient_of_it() -> None:
    frozen, anil = methods.HeadOnly(small_conv(), inner_steps=3), methods.ANIL(small_conv(), inner_steps=3)
    for maml in (frozen, anil):
        assert not convs(kernels(maml, "gradient")) and not convs(kernels(maml, "hvp")) and not convs(kernels(maml, "query"))
        assert convs(kernels(maml, "prologue")) == {"conv2d_fwd": 4}  # two layers, support and query
    assert not any(n for n in (i.kernel for _, i in frozen.plan(images()).instructions()) if n.startswith("conv2d") and n != "conv2d_fwd")
    assert convs(kernels(anil, "epilogue")) == {"conv2d_bwd_weight": 4, "conv2d_bwd_input": 2}  # once, after all steps


def test_the_body_costs_the_same_for_any_number_of_steps() -> None:
    batch = images()
    one, ten = (products(methods.ANIL(small_conv(), inner_steps=k), batch) for k in (1, 10))
    full = [products(MAML(small_conv(), inner_steps=k), batch) for k in (1, 10)]
    assert ten < 1.5 * one and full[1] > 4 * full[0]


def test_mtl_runs_the_body_once_with_weights_made_once() -> None:
    maml = methods.MTL(small_conv(), inner_steps=20)
    assert kernels(maml, "prologue_meta")["mul_fwd"] == 2 and kernels(maml, "prologue_meta")["add_fwd"] == 1
    assert not convs(kernels(maml, "gradient")) and not convs(kernels(maml, "hvp"))
    assert kernels(maml, "epilogue_meta")["mul_bwd"] == 2  # the scales; the frozen weights have none
    assert kernels(maml, "gradient")["linear_bwd_weight"] == 1  # the head


@pytest.mark.parametrize("frozen", [True, False])
def test_channelwise_scale_shift_has_no_weight_gradient_in_the_inner_loop(frozen: bool) -> None:
    maml = methods.ChannelScaleShift(small_conv(), frozen=frozen, inner_steps=3)
    gradient, hvp = kernels(maml, "gradient"), kernels(maml, "hvp")
    assert not any("bwd_weight" in name for name in gradient)
    assert any("conv2d_bwd_weight" in name for name in hvp) is not frozen  # the mixed derivative of what is outer-learned alone
    full = kernels(MAML(small_conv(), inner_steps=3), "gradient")
    assert full["conv2d_bwd_weight"] == 2 and gradient["conv2d_fwd"] == 1  # what lies below the first scale runs in the prologue
    batch = images()
    assert products(maml, batch, "gradient") < 0.5 * products(MAML(small_conv(), inner_steps=3), batch, "gradient")


def test_contexts_have_no_weight_gradient_in_the_inner_loop() -> None:
    film = methods.CAVIA(small_conv(), layers=list(CONVS), inner_steps=3)
    assert not any("conv2d_bwd_weight" in name or "linear_bwd_weight" in name for name in kernels(film, "gradient"))
    plan = methods.CAVIA(mlp(), inner_steps=3).plan(TaskBatch.of(classify()))
    weights = [i for i in plan.segments["gradient"].instructions if i.kernel == "linear_bwd_weight"]
    assert [i.outputs[0] for i in weights] == [None]  # of the first layer its bias alone
    assert not any(i.kernel == "linear_bwd_input" and i.outputs[0].buffer.endswith("d0") for i in plan.segments["gradient"].instructions)


def test_t_is_composed_into_the_weight_and_never_run_as_a_layer() -> None:
    maml, full = (MAML(small_conv(), parameterisation=p, inner_steps=3) for p in (TNet(), "full"))
    for segment in ("gradient", "query"):
        assert convs(kernels(maml, segment)) == convs(kernels(full, segment))
        assert kernels(maml, segment)["matmul_fwd"] == 3  # two kernels and a bias: adapted, so at every step
    # What is not adapted is composed once per meta-iteration.
    anil = methods.TNets(small_conv(), adapt="8.*", inner_steps=3)
    assert kernels(anil, "prologue_meta")["matmul_fwd"] == 3 and kernels(anil, "gradient")["matmul_fwd"] == 0
    assert not convs(kernels(anil, "gradient")) and not convs(kernels(anil, "hvp"))


def test_few_rows_run_through_the_factors_of_a_weight() -> None:
    """plan/reassociate.py: x (T W)^t = (x W^t) T^t, x (W + B A)^t = x W^t + (x A^t) B^t, where a task has few rows; many rows compose the weight."""
    for method, layers in ((methods.TNets, 3), (methods.LowRankMAML, 4)):  # and the first one of all is factored (plan/rewrite.py)
        few, many = (TaskBatch.of(classify(2, n, 4, (30,))) for n in (6, 500))
        run, composed = (kernels(method(mlp((30, 40, 20)), inner_steps=3), "gradient", batch) for batch in (few, many))
        assert run["matmul_fwd"] == 0 and composed["matmul_fwd"] == 2 + 2 * (method is methods.TNets)  # T b as well
        assert (run["linear_fwd"], run["factored_linear_fwd"]) == (layers, 1) and composed["linear_fwd"] == 2


def test_a_low_rank_over_frozen_weights_learns_its_factors_alone() -> None:
    plan = methods.LowRankMAML(mlp((30, 40, 4)), rank=2, inner_steps=3).plan(TaskBatch.of(classify(shape=(30,))))
    assert sorted(name for name in plan.results if name.startswith("grad.")) == sorted(
        f"grad.{n}" for n in ("0.weight", "0.bias", "2.weight", "2.bias", *(f"low_rank.{f}.{i}.weight" for f in "AB" for i in "02"))
    )


def test_modulation_is_read_by_every_step_and_made_by_none() -> None:
    torch.manual_seed(0)
    maml = methods.MMAML(mlp(), SetEncoder(3, 4, size=6), inner_steps=3)
    plan = maml.plan(TaskBatch.of(classify()))
    given = {n for n in plan.inputs if n.startswith("mmaml.") and plan.buffers[n].home == "task"}
    assert given == {f"mmaml.{p}.{i}.weight" for p in ("gamma", "beta") for i in "02"}
    assert not any(ref.buffer in given for _, i in plan.instructions() for ref in i.writes())


def test_zero_head_has_no_gradient_of_where_it_begins() -> None:
    plan = methods.ZeroHead(mlp(), inner_steps=3).plan(TaskBatch.of(classify()))
    assert not any("head" in name for name in plan.results if name.startswith("grad."))


def test_layerwise_counts_are_those_of_adapt() -> None:
    batch = images()
    assert costs(MAML(small_conv(), parameterisation=Layerwise("8.*")).plan(batch), batch) == costs(MAML(small_conv(), adapt="8.*").plan(batch), batch)


@pytest.mark.parametrize("problem", [benchmark.convolutional, benchmark.sinusoids])
def test_the_tables_of_what_the_families_cost(problem) -> None:
    """docs/methods.md: instructions and FLOPs of every family, counted again."""
    text = (Path(__file__).parent.parent / "docs" / "methods.md").read_text()
    title, batch, rows = problem()
    full, section = rows[0][1](), text.partition(f"**{title}**")[2].partition("\n\n**")[0]
    wrong = [line for name, make in rows if (line := f"| {name} | {' | '.join(benchmark.counted(make(), full, batch))} |") not in section]
    assert not wrong, "counted, and not so in docs/methods.md:\n" + "\n".join(wrong)


def test_a_mixture_is_as_many_tasks() -> None:
    """A row for each component of each task, in one batch: the FLOPs of that many tasks of MAML, and not one instruction more for a second component."""
    batch = TaskBatch.of(classify(4))
    one, three = (methods.Mixture(mlp(), components=m, inner_steps=3) for m in (1, 3))
    assert one.plan(one._rows(batch)).count() == three.plan(three._rows(batch)).count()
    assert products(three, three._rows(batch)) == 3 * products(one, batch)
    assert products(one, batch) == products(MAML(mlp(), inner_steps=3), batch)
