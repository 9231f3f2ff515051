"""Properties of Plans: nothing in them is unused, unwritten, doubled, or left out. Their size and memory: test_plan_memory.py."""

from __future__ import annotations

import re

import pytest
from random_programs import random_case, randoms

from fastmaml.plan import Arrangement, Plan, Rate, build_plan
from fastmaml.program import Loss, Program, ProgramBuilder

ROWS = {"support": 10, "query": 15, "joint": 25}


def mlp(*sizes: int, roles=lambda name: "adapted", norm: bool = False, relu: str = "relu") -> Program:
    b = ProgramBuilder(sizes[:1])
    v = 0
    for i, (into, out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        names = {name: (f"{i}.{name}", shape) for name, shape in (("w", (out, into)), ("b", (out,)), ("g", (out,)))}
        leaf = {name: b.leaf(*named, roles(named[0])) for name, named in names.items()}
        v = b.op("linear", v, leaf["w"], leaf["b"])
        if i < len(sizes) - 2:
            v = b.op("batchnorm", v, leaf["g"], None, eps=1e-3, statistics="batch") if norm else v
            v = b.op(relu, v)
    return b.build(v)


def head_only(name: str) -> str:
    return "adapted" if name.startswith("2.") else "outer"


def make(
    program: Program, steps: int = 3, kind: str = "one", per_step: bool = False, learned: bool = False, **options
) -> Plan:
    adapted = {leaf.name: program.values[leaf.value].shape for leaf in program.leaves if leaf.role == "adapted"}
    rates = {n: Rate("lr", (), per_step, learned) for n in adapted}
    if kind != "one":
        rates = {n: Rate(f"lr.{n}", s if kind == "element" else (), per_step, learned) for n, s in adapted.items()}
    return build_plan(program, Arrangement(steps=steps, rates=rates, **options))


def kernels(plan: Plan, segment: str) -> dict[str, int]:
    """How often each kernel stands in a segment."""
    names = [i.kernel for i in plan.segments[segment].instructions] if segment in plan.segments else []
    return {name: names.count(name) for name in dict.fromkeys(names)}


# ------------------------------------------------------------------------------------------------------------ data flow


def check_data_flow(plan: Plan) -> None:
    """Unrolls the schedule and follows every array from writing to reading; the planner's own liveness is not asked."""

    def key(ref, step: int) -> tuple[str, int]:
        buffer = plan.buffers[ref.buffer]
        if not buffer.steps:
            return ref.buffer, 0
        slot = step + ref.shift
        assert 0 <= slot < buffer.steps, f"{ref} at step {step} is outside its {buffer.steps} slots"
        return (buffer.first, 0) if buffer.first and slot == 0 else (ref.buffer, slot)

    writer: dict[tuple[str, int], int] = {}
    for name in plan.inputs:
        writer.update({(name, slot): -1 for slot in range(max(plan.buffers[name].steps, 1))})
    used: set[int] = set()
    runs: list[str] = []

    def reduce() -> None:
        for r in plan.reductions:
            for slot in range(max(plan.buffers[r.source.buffer].steps, 1)):
                used.add(writer[r.source.buffer, slot])
                runs.append(f"reduction to {r.target}")
                writer[r.target, slot] = len(runs) - 1

    seen_tasks = reduced = False
    for phase in plan.schedule:
        if phase.scope != "task" and seen_tasks and not reduced:
            reduce()
            reduced = True
        seen_tasks |= phase.scope == "task"
        for step in phase.steps():
            for name in phase.segments:
                for instr in plan.segments[name].instructions:
                    for ref in instr.reads():
                        assert key(ref, step) in writer, f"{instr} reads {ref} before it is written"
                        used.add(writer[key(ref, step)])
                    runs.append(f"{name} at step {step}: {instr}")
                    writer.update({key(ref, step): len(runs) - 1 for ref in instr.writes()})
    if not reduced:
        reduce()
    results = [at for at in writer if at[0] in plan.results]
    assert {name for name, _ in results} == set(plan.results), "a result is never written"
    used.update(writer[at] for at in results)
    # one segment serves all steps, and nobody asks for the cotangent of the factors' beginning, which is zero, nor for the momentum after the last step
    last = re.compile(rf"hvp at step 0: theta_bar\.\S+\.factor = axpy_fwd|update at step {plan.steps - 1}: v\.\S+ = scale_fwd")
    unused = [text for i, text in enumerate(runs) if i not in used and not last.match(text)]
    assert not unused, unused[:5]
    mentioned = {ref.buffer for _, i in plan.instructions() for ref in (*i.reads(), *i.writes())}
    mentioned |= {name for r in plan.reductions for name in (r.source.buffer, r.target)}
    mentioned |= {b.first for b in plan.buffers.values() if b.first}
    assert mentioned == set(plan.buffers)


ENTRIES = ("train", "halves", "evaluate", "adapt", "predict")


@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_every_result_is_used_and_every_operand_written(entry: str, conv: bool) -> None:
    for rng in randoms(60):
        changes = {} if entry in ("train", "evaluate") else {"query_from": None}
        case = random_case(rng, conv, **changes)
        if entry == "predict":
            check_data_flow(case.plan(entry=entry, steps=0))
        else:
            check_data_flow(case.plan(entry=entry))
            if entry == "train":
                check_data_flow(case.plan(entry=entry, record_masks=True))


@pytest.mark.parametrize("relu", ["relu", "tanh"])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "batchnorm"])
def test_exact_instructions_of_a_two_layer_network(norm: bool, relu: str) -> None:
    plan = make(mlp(5, 8, 3, norm=norm, relu=relu))
    bn = (
        {"batchnorm_stats_fwd": 1, "batchnorm_fwd": 1, "batchnorm_bwd_stats": 1, "batchnorm_bwd_input": 1}
        if norm
        else {}
    )
    both = {f"{relu}_fwd": 1, "linear_fwd": 2, "cross_entropy_fwd": 1, "cross_entropy_bwd": 1, f"{relu}_bwd": 1, **bn}
    both |= {"linear_bwd_weight": 2, "linear_bwd_input": 1}  # no input gradient of the first layer
    parameters = 5 if norm else 4
    assert kernels(plan, "gradient") == both
    assert kernels(plan, "update") == {"sgd_fwd": parameters}
    assert kernels(plan, "query") == both | {"copy_fwd": 1}
    hvp = kernels(plan, "hvp")
    assert hvp["linear_jvp"] == hvp["linear_fwd"] == hvp["linear_bwd_weight_jvp"] == 2
    assert hvp["linear_bwd_input_jvp"] == hvp["cross_entropy_bwd"] == hvp["cross_entropy_bwd_jvp"] == 1
    assert hvp["axpy_fwd"] == parameters
    assert not {"linear_bwd_weight", "cross_entropy_fwd", "batchnorm_stats_fwd"} & set(hvp)
    assert ("relu_replay" in hvp) == (relu == "relu") and "relu_fwd" not in hvp
    first = next(i for i in plan.segments["hvp"].instructions if i.kernel == "linear_jvp")
    assert first.inputs[2] is None  # x has no tangent


def test_hvp_recomputes_no_adjoint_that_meets_only_zeros() -> None:
    hvp = kernels(make(mlp(5, 8, 3)), "hvp")
    assert "linear_bwd_input" not in hvp and "relu_bwd" not in hvp


def test_first_order_has_no_hvp() -> None:
    plan = make(mlp(5, 8, 3), first_order=True)
    assert set(plan.segments) == {"gradient", "update", "query"}
    assert not plan.count("linear_jvp") and all(not b.steps for b in plan.buffers.values() if b.kind == "mask")


def test_frozen_body_runs_once_in_the_prologue() -> None:
    program = mlp(5, 8, 8, 3, roles=head_only)
    plan = make(program)
    assert kernels(plan, "prologue_batch") == {"linear_fwd": 2}  # of the data itself: for all tasks in one product
    assert kernels(plan, "prologue") == {"linear_fwd": 2, "relu_fwd": 4}  # support and query
    assert [phase.scope for phase in plan.schedule][:2] == ["batch", "task"]
    assert kernels(plan, "gradient") == {
        "linear_fwd": 1, "cross_entropy_fwd": 1, "cross_entropy_bwd": 1, "linear_bwd_weight": 1,
    }  # fmt: skip
    assert "relu_replay" not in kernels(plan, "hvp") and kernels(plan, "hvp")["linear_jvp"] == 1
    assert kernels(plan, "epilogue")["linear_bwd_weight"] == kernels(plan, "epilogue_batch")["linear_bwd_weight"] == 2
    frozen = make(program.with_roles(lambda n: "adapted" if head_only(n) == "adapted" else "const"))
    assert "epilogue" not in frozen.segments and not frozen.count("linear_bwd_input")


def test_frozen_weights_get_no_gradient() -> None:
    plan = make(mlp(5, 8, 8, 3, roles=lambda name: "const" if name == "1.w" else "adapted"))
    for segment in ("gradient", "query", "hvp"):
        weights = [i for i in plan.segments[segment].instructions if "bwd_weight" in i.kernel]
        assert len(weights) == 3 and sum(i.outputs[0] is None for i in weights) == 1
    jvps = [i for i in plan.segments["hvp"].instructions if i.kernel == "linear_jvp"]
    assert [i.inputs[3] is None for i in jvps] == [False, True, False]
    assert "grad.1.w" not in plan.results and "g.1.w" not in plan.buffers


def test_weight_expressions_are_hoisted_to_where_they_are_constant() -> None:
    b = ProgramBuilder((4,))
    scale, w, own = b.leaf("scale", (3, 1), "outer"), b.leaf("w", (3, 4), "outer"), b.leaf("v", (2, 3), "adapted")
    x = b.op("linear", 0, b.op("mul", w, b.op("exp", scale)))
    plan = make(b.build(b.op("linear", x, b.op("mul", own, b.op("slice", scale, dim=0, start=0, stop=2)))))
    assert kernels(plan, "prologue_meta") == {"exp_fwd": 1, "mul_fwd": 1, "slice_fwd": 1}
    assert {phase.scope for phase in plan.schedule if "prologue_meta" in phase.segments} == {"meta"}
    assert kernels(plan, "gradient")["mul_fwd"] == 1 and "exp_fwd" not in kernels(plan, "gradient")


@pytest.mark.parametrize("kind", ["one", "tensor"])
def test_a_wide_first_layer_is_factored(kind: str) -> None:
    """Its weight moves in the span of the support rows: inner steps read their Gram matrix, never the layer's width."""
    program = mlp(40, 8, 3)
    plan = make(program, kind=kind, support_rows=10)
    assert kernels(plan, "prologue_batch") == {"linear_fwd": 2} and kernels(plan, "prologue")["gram_fwd"] == 2
    for segment, kernel in (("gradient", "linear_fwd"), ("query", "linear_fwd"), ("hvp", "linear_jvp")):
        assert kernels(plan, segment)[kernel] == 1  # the head
    inner = [i for s in ("gradient", "update", "hvp") for i in plan.segments[s].instructions]
    assert not {"x.support", "0.w"} & {ref.buffer for i in inner for ref in (*i.reads(), *i.writes())}
    assert {f"grad.{leaf.name}" for leaf in program.leaves} <= set(plan.results)
    for other in (
        make(program, support_rows=21),
        make(program, kind="element", support_rows=10),
        make(program, steps=0, support_rows=10),
    ):
        assert not other.count("factored")


# ---------------------------------------------------------------------------------------------------------------- rates


def test_gradients_are_stored_only_for_rates_that_need_them() -> None:
    program = mlp(5, 8, 3)

    def stored(**options) -> set[int]:
        return {b.steps for name, b in make(program, **options).buffers.items() if name.startswith("g.")}

    assert stored() == stored(kind="tensor") == stored(kind="element", per_step=True) == {0}
    assert stored(learned=True) == stored(learned=True, per_step=True) == {0}  # one scalar: the loss tangent
    assert stored(learned=True, kind="tensor") == stored(learned=True, kind="element") == {3}
    assert stored(learned=True, first_order=True) == {3}


@pytest.mark.parametrize("per_step", [False, True])
def test_gradient_of_a_shared_rate_is_the_loss_tangent(per_step: bool) -> None:
    plan = make(mlp(5, 8, 3), learned=True, per_step=per_step)
    assert kernels(plan, "hvp")["cross_entropy_jvp"] == 1 and not plan.count("sgd_bwd")
    assert "update_bwd" not in plan.segments and "grad.lr" in plan.results
    assert plan.buffers["grad.lr"].steps == (3 if per_step else 0)
    assert not make(mlp(5, 8, 3)).count("cross_entropy_jvp")
    other = make(mlp(5, 8, 3), learned=True, per_step=per_step, kind="element")
    assert kernels(other, "update_bwd") == {"sgd_bwd": 4, "sgd_bwd_rate": 4} and not other.count("cross_entropy_jvp")


def test_plans_can_be_compared_and_printed() -> None:
    program = mlp(5, 8, 3)
    assert make(program) == make(program) and make(program) != make(program, first_order=True)
    assert make(program, 2) != make(program, 3)
    text = "\n".join(str(instr) for _, instr in make(program).instructions())
    assert "theta.0.w[k+1] = sgd_fwd(theta.0.w, g.0.w, lr)" in text


def test_nothing_to_adapt_is_an_error() -> None:
    for role in ("outer", "const"):
        with pytest.raises(ValueError, match="nothing to adapt"):
            make(mlp(5, 3, roles=lambda name, role=role: role))
    b = ProgramBuilder((3,))
    b.leaf("unused", (2,), "adapted")
    program = b.build(b.op("linear", 0, b.leaf("w", (2, 3), "outer")))
    with pytest.raises(ValueError, match="nothing to adapt"):
        build_plan(program, Arrangement(steps=1, loss=Loss()))
