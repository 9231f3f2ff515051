"""Plans: their size, groups and homes, what memory they take, and the schedule."""

from __future__ import annotations

import pytest
from random_programs import random_case, randoms
from test_plan import ROWS, kernels, make, mlp

import fastmaml.nn as nets
from fastmaml.plan import Plan
from fastmaml.plan.instructions import HOMES, Phase
from fastmaml.plan.memory import arena_layout, plan_bytes
from fastmaml.trace import trace

# -------------------------------------------------------------------------------------------------- size, groups, homes


SIZES = {"plain": {}, "fast": {"memory": "fast"}, "first": {"first_order": True}, "multi-step": {"query_from": 0}}


@pytest.mark.parametrize("options", [*SIZES.values(), {"kind": "element", "learned": True, "per_step": True}])
@pytest.mark.parametrize("entry", ["train", "halves", "evaluate", "adapt"])
def test_size_does_not_depend_on_the_number_of_steps(options: dict, entry: str) -> None:
    if entry in ("halves", "adapt") and "query_from" in options:
        options = {}
    for counts in ((1, 8), (9, 200)):  # many steps: weights are rolled back (rollback.py)
        few, many = (make(mlp(5, 8, 3, norm=True), steps, entry=entry, **options) for steps in counts)
        assert few.count() == many.count() and list(few.buffers) == list(many.buffers)
        assert [(p.segments, p.half) for p in few.schedule] == [(p.segments, p.half) for p in many.schedule]
        assert [str(i) for _, i in few.instructions()] == [str(i) for _, i in many.instructions()]


def test_groups() -> None:
    plan = make(mlp(5, 8, 8, 3))
    assert [g.rows for g in plan.segments["gradient"].groups] == ["support"]
    assert [g.rows for g in plan.segments["update"].groups] == [None]
    assert [g.rows for g in plan.segments["query"].groups] == ["query"]
    assert [g.rows for g in plan.segments["hvp"].groups] == ["support", None]
    normed = make(mlp(5, 8, 8, 3, norm=True)).segments["gradient"].groups
    assert len(normed) == 5 and {g.rows for g in normed} == {
        "support"
    }  # cut at the statistics and the sums of both norms
    conv = trace(nets.CNN4(filters=4, side=16).train(), (3, 16, 16)).with_roles(lambda n: "adapted")
    for each in (plan, make(mlp(5, 8, 8, 3, norm=True)), make(conv)):
        for segment in each.segments.values():
            for group in segment.groups:
                sums = set()
                for instr in group.instructions:
                    assert not sums & {ref.buffer for ref in instr.reads()}, "a reduction is read before it is finished"
                    if group.rows:
                        sums |= {ref.buffer for ref in instr.writes() if each.buffers[ref.buffer].rows is None}


def test_homes() -> None:
    plan = make(mlp(5, 8, 3))
    homes = {name: b.home for name, b in plan.buffers.items()}
    assert set(homes.values()) <= set(HOMES)
    for name in ("0.w", "1.b", "lr", "grad.0.w"):
        assert homes[name] == "meta"
    for name in ("x.support", "y.query", "logits", "loss.query", "loss.support", "correct"):
        assert homes[name] == "task"
    assert {homes[n] for n in homes if n.startswith(("theta", "g.", "gradient.mask"))} == {"run"}
    for name, buffer in plan.buffers.items():
        groups = {
            (s.name, n)
            for s in plan.segments.values()
            for n, g in enumerate(s.groups)
            if any(ref.buffer == name for i in g.instructions for ref in (*i.reads(), *i.writes()))
        }
        if buffer.home == "block":
            assert buffer.rows and len(groups) == 1
        if buffer.home == "scratch":
            assert len({segment for segment, _ in groups}) == 1
    halves = make(mlp(5, 8, 3), entry="halves")
    carried = {n for n, b in halves.buffers.items() if b.home == "task"}
    assert {"theta.0.w", "theta.1.b"} <= carried and any("gradient.mask" in name for name in carried)
    assert "dlogits" in halves.inputs and halves.entries == 2


# --------------------------------------------------------------------------------------------------------------- memory


def test_memory_grows_by_states_masks_and_statistics_alone() -> None:
    program = mlp(5, 8, 3, norm=True)
    one, fifty = (plan_bytes(make(program, k), ROWS, tasks=4, in_flight=2) for k in (1, 50))
    parameters = sum(program.values[leaf.value].numel for leaf in program.leaves)
    per_step = 4 * parameters + 8 * ROWS["support"] + 4 * 2 * 8  # theta_k, ReLU's mask, mean and rstd
    assert fifty["run"] - one["run"] == 2 * 49 * per_step
    assert fifty["task"] - one["task"] == 4 * 49 * 4  # the support losses
    assert fifty["scratch"] == one["scratch"] and fifty["meta"] == one["meta"]
    first = [plan_bytes(make(program, k, first_order=True), ROWS, 4, 2) for k in (1, 50)]
    assert first[1]["run"] == first[0]["run"]  # nothing goes back to theta_k


def test_fast_memory_recomputes_nothing() -> None:
    constant, fast = (make(mlp(5, 8, 3, norm=True), memory=memory) for memory in ("constant", "fast"))
    assert {"linear_fwd", "relu_replay", "batchnorm_fwd", "linear_bwd_input", "cross_entropy_bwd"} <= set(
        kernels(constant, "hvp")
    )
    primal = [name for name in kernels(fast, "hvp") if not name.endswith(("_jvp", "axpy_fwd"))]
    assert not primal
    sizes = [sum(plan_bytes(plan, ROWS, 1, 1).values()) for plan in (constant, fast)]
    assert sizes[1] > sizes[0]


@pytest.mark.parametrize("memory", ["constant", "fast"])
@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_arena_never_overlaps_two_live_buffers(net: str, memory: str) -> None:
    program = mlp(5, 8, 7, 3, norm=True)
    if net == "conv":
        program = trace(nets.CNN4(filters=4, side=16).train(), (3, 16, 16)).with_roles(lambda n: "adapted")
    check_arena(make(program, memory=memory, learned=True, kind="tensor"))


def test_arena_of_random_programs() -> None:
    for rng in randoms(60):
        check_arena(random_case(rng).plan())


def check_arena(plan: Plan) -> None:
    """Live: from the first to the last group that mentions it; the blocks of a group run all its instructions."""

    def size_of(buffer) -> int:
        return 4 * buffer.numel * (ROWS[buffer.rows] if buffer.rows else 1)

    offsets, size = arena_layout(plan, size_of)
    assert set(offsets) == {n for n, b in plan.buffers.items() if b.home in ("scratch", "block")}
    for segment in plan.segments.values():
        live: dict[str, list[int]] = {}
        for g, group in enumerate(segment.groups):
            for instr in group.instructions:
                for ref in (*instr.reads(), *instr.writes()):
                    if ref.buffer in offsets:
                        live.setdefault(ref.buffer, []).append(g)
        for a, at in live.items():
            end = offsets[a] + size_of(plan.buffers[a])
            assert offsets[a] % 64 == 0 and end <= size
            for b, other in live.items():
                together = a < b and min(at) <= max(other) and min(other) <= max(at)
                assert not together or end <= offsets[b] or offsets[b] + size_of(plan.buffers[b]) <= offsets[a]


# ------------------------------------------------------------------------------------------------- schedule, comparison


def test_schedule() -> None:
    def phases(plan: Plan) -> list[tuple[tuple[str, ...], list[int]]]:
        return [(phase.segments, list(phase.steps())) for phase in plan.schedule]

    inner, back = (("gradient", "update"), [0, 1, 2]), (("hvp",), [2, 1, 0])
    assert phases(make(mlp(5, 3))) == [inner, (("query",), [3]), back]
    assert phases(make(mlp(5, 3), query_from=0)) == [inner, (("query",), [3]), (("hvp", "query_step"), [2, 1, 0])]
    assert phases(make(mlp(5, 3), query_from=2)) == [
        inner,
        (("query",), [3]),
        (("hvp", "query_step"), [2]),
        (("hvp",), [1, 0]),
    ]
    assert phases(make(mlp(5, 3), query_from=3)) == [inner, (("query",), [3]), back]
    assert phases(make(mlp(5, 3), query_from=1, entry="evaluate"))[-1] == (("query_step",), [2, 1])
    assert phases(make(mlp(5, 3), steps=0)) == [(("query",), [0])]
    assert phases(make(mlp(5, 3), entry="adapt")) == [inner, (("finish",), [3])]
    halves = make(mlp(5, 3), entry="halves")
    assert [(p.segments, p.half) for p in halves.schedule] == [
        (("gradient", "update"), 0), (("query",), 0), (("query_reverse",), 1), (("hvp",), 1),
    ]  # fmt: skip
    assert isinstance(halves.schedule[0], Phase)
