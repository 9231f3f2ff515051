"""What the triton executor fuses: how many launches a meta-iteration takes, which instructions and buffers are left. Nothing is run here (triton_cases_fusion.py does)."""

from __future__ import annotations

from collections import Counter

import pytest

pytest.importorskip("triton", "3.6", reason="triton is not installed (pip install triton: Linux)")

import fastmaml.nn as nets
from fastmaml.executors.triton.fused import Fused
from fastmaml.executors.triton.fusion import fuse
from fastmaml.executors.triton.lowering import Lowering
from fastmaml.executors.triton.storage import Bucket
from fastmaml.plan import Arrangement, Plan, Rate, build_plan
from fastmaml.trace import trace


def conv4(steps: int = 1, **options: object) -> Plan:
    program = trace(nets.PyTorchMAMLConv().train(), (1, 28, 28)).with_roles(lambda _: "adapted")
    learned = options.pop("learned", False)
    rates = {leaf.name: Rate("lr", learned=learned) for leaf in program.leaves}
    return build_plan(program, Arrangement(steps=steps, rates=rates, support_rows=5, **options))


def launched(plan: Plan) -> Counter:
    """Of a meta-batch of pytorch-maml: 32 tasks, 5 and 75 rows."""
    return Counter(launch.kernel.__name__ for half in Lowering(plan, Bucket(32, 5, 75), "meta").halves for launch in half)


def chains(plan: Plan) -> Counter:
    return Counter("+".join(part.kernel for part in instr.parts) for _, instr in plan.instructions() if isinstance(instr, Fused))


def test_launches_of_conv4() -> None:
    """Fewer for sums of weights, and for statistics whose rows are one chunk, make them 162 (Lowering), what is fused the rest. Statistics of the first layer
    from its patches are small launches in the place of passes over its images."""
    plan = conv4()
    before, after = launched(plan), launched(fuse(plan))
    assert (before.total(), after.total()) == (162, 86)
    assert not {"relu_fwd", "relu_masked", "reshape"} & set(after), "every relu is an epilogue, nothing is copied"
    assert not {"batchnorm_moments", "batchnorm_stats_fwd", "batchnorm_sums"} & set(after), "every sum of a batchnorm is made by the product in front"
    assert not {"maxpool2d_fwd", "maxpool2d_gather", "maxpool2d_bwd"} & set(after), "nothing is pooled by itself"
    assert (after["conv2d_rows"], after["batchnorm_rows"], after["conv2d_weight"]) == (27, 24, 15), "what is left of a block: 2 forward, 3 back"
    assert after["axpy"] == 1, "the gradient of the first layer's bias, which is zero; every other update of a weight is an epilogue or a term of axpys"
    assert (after["patch_moments_sums"], after["patch_stats"], after["patch_stats_weight"]) == (1, 2, 2)
    assert (after["axpys"], after["all_finite"], after["sum_tasks"]) == (2, 1, 1), "batchnorm's steps, and their reverse; all gradients"


def test_a_grid_has_room_for_so_many_tasks() -> None:
    program = trace(nets.MLP(2, 4, 3), (2,)).with_roles(lambda _: "adapted")
    plan = build_plan(program, Arrangement(steps=1, rates={leaf.name: Rate("lr") for leaf in program.leaves}))
    Lowering(plan, Bucket(65535, 1, 1), "meta")
    with pytest.raises(ValueError, match="65,536 tasks at once, the Triton kernels are launched for at most 65,535: pass fewer"):
        Lowering(plan, Bucket(65536, 1, 1), "meta")


def test_launches_of_five_steps() -> None:
    plan = conv4(5)
    assert (launched(plan).total(), launched(fuse(plan)).total()) == (734, 387)


def test_tasks_share_the_first_step() -> None:
    """Products that read theta_0 alone read one copy of it; those that make no sums of a batchnorm, whose tiles are each task's own, walk over the rows of all
    tasks as over one task's, and a tile may hold rows of two tasks."""
    launches = Lowering(fuse(conv4()), Bucket(32, 5, 75), "meta").halves[0]
    products = [launch for launch in launches if launch.kernel.__name__ == "conv2d_rows" and launch.arguments["x2"] is None]
    shared = [launch for launch in products if launch.arguments["w_task"] == 0]
    assert len(shared) == 9, "forward, and back to every layer's input; the tangent of a weight is each task's own"
    whole = [launch for launch in shared if launch.grid[2] == 1]
    assert [launch.arguments["SUMS"] is None for launch in shared] == [launch in whole for launch in shared] and len(whole) == 2
    assert all(launch.arguments["offsets"].numel() == 2 for launch in whole)


@pytest.mark.parametrize("steps", [1, 3])
def test_last_gradients_of_many_tasks_are_summed_in_the_accumulator(steps: int) -> None:
    """Of 64 tasks two by each program; those of 32 are only looked at, whether they are finite."""
    plan = fuse(conv4(steps))
    few, many = (Lowering(plan, Bucket(tasks, 5, 75), "meta") for tasks in (32, 64))
    layers = {f"theta_bar.block{i}.conv.weight": 1 for i in (2, 3, 4)} | {"theta_bar.classifier.weight": 1}
    assert {summed.source: summed.group for summed in few.sums.values()} == layers
    assert {summed.source: summed.group for summed in many.sums.values()} == layers | {name: 2 for name in layers if "block" in name}
    names = Counter(launch.kernel.__name__ for launch in many.halves[0])
    assert names["conv2d_weight_tasks"] == 3 and names.total() == len(few.halves[0]), "no launch more"


def test_what_is_fused_in_conv4() -> None:
    found = chains(fuse(conv4()))
    assert found == {
        "conv2d_fwd+batchnorm_stats_fwd": 7,
        "conv2d_jvp+batchnorm_stats_jvp": 3,
        "batchnorm_maxpool2d_fwd+batchnorm_fwd+relu_fwd": 6,
        "batchnorm_maxpool2d_fwd+batchnorm_fwd+relu_fwd+reshape_fwd": 2,
        "maxpool2d_jvp+batchnorm_jvp+relu_jvp": 1,
        "maxpool2d_jvp+maxpool2d_replay+batchnorm_jvp+relu_jvp": 2,
        "maxpool2d_jvp+maxpool2d_replay+batchnorm_jvp+relu_jvp+reshape_jvp": 1,
        "conv2d_bwd_input+relu_bwd+batchnorm_bwd_stats": 6,
        "conv2d_bwd_input_jvp+relu_bwd_jvp+batchnorm_bwd_stats_jvp": 3,
        "linear_bwd_input+reshape_bwd+relu_bwd+batchnorm_bwd_stats": 2,
        "linear_bwd_input_jvp+reshape_bwd_jvp+relu_bwd_jvp+batchnorm_bwd_stats_jvp": 1,
        "batchnorm_bwd_input+maxpool2d_bwd": 1,
        "batchnorm_bwd_input_jvp+maxpool2d_bwd_jvp": 1,
        "conv2d_bwd_weight+sgd_fwd+sgd_fwd": 3,
        "conv2d_bwd_weight_jvp+axpy_fwd+axpy_fwd": 3,
        "patch_stats_bwd+add_fwd+sgd_fwd": 1,
        "patch_stats_bwd_jvp+add_fwd": 1,  # its direction is what the update would write over
        "linear_bwd_weight+sgd_fwd+sgd_fwd": 1,
        "linear_bwd_weight_jvp+axpy_fwd+axpy_fwd": 1,
    }


def test_gradients_are_not_stored() -> None:
    plan = conv4()
    gone = {name for name in plan.buffers if name not in fuse(plan).buffers}
    assert {"g.block2.conv.weight", "g.classifier.bias", "g.block1.norm.weight"} <= gone
    assert not gone & {*plan.results, *plan.inputs}


def test_a_learned_rate_keeps_its_gradient() -> None:
    """A gradient that is kept for each step, to be read again when the rates' own are made, is not swallowed by the update."""
    program = trace(nets.PyTorchMAMLConv().train(), (1, 28, 28)).with_roles(lambda _: "adapted")
    rates = {leaf.name: Rate(f"lr.{leaf.name}", learned=True) for leaf in program.leaves}
    fused = fuse(build_plan(program, Arrangement(steps=3, rates=rates, support_rows=5)))
    read = {ref.buffer for _, instr in fused.instructions() if instr.kernel == "sgd_bwd_rate" for ref in instr.reads()}
    assert {f"g.{leaf.name}" for leaf in program.leaves if "conv.weight" in leaf.name} <= read <= set(fused.buffers)
    assert not any("bwd_weight+sgd" in chain for chain in chains(fused))


@pytest.mark.parametrize("options", [{}, {"first_order": True}, {"learned": True}, {"memory": "fast"}, {"query_from": 1}, {"entry": "halves"}], ids=str)
@pytest.mark.parametrize("steps", [1, 4])
def test_nothing_is_read_before_it_is_written(steps: int, options: dict) -> None:
    """The fused Plan in order of its schedule, as slots of buffers."""
    fused = fuse(conv4(steps, **options))
    lowering = Lowering(fused, Bucket(2, 5, 5), "meta")
    there = {(name, slot) for name in fused.inputs for slot in range(max(fused.buffers[name].steps, 1))}
    for phase in fused.schedule:
        for step in phase.steps():
            for segment in phase.segments:
                for instr in fused.segments[segment].instructions:
                    missing = {lowering.storage.key(ref, step) for ref in instr.reads()} - there
                    assert not missing, (instr.kernel, missing)
                    there |= {lowering.storage.key(ref, step) for ref in instr.writes()}
