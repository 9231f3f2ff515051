"""plan/pooling.py: a Program pools first only where that is exact, and is then the same Program in loss and meta-gradient."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import pytest
import torch
from random_programs import Case, error, gradients, norm, numbers_for, random_case
from torch import Tensor

import fastmaml.plan.sweep as sweep
from fastmaml.executors.torch.executor import TorchExecutor
from fastmaml.plan import Arrangement, Rate
from fastmaml.plan.pooling import pool_first
from fastmaml.program import Program, ProgramBuilder

TILES = {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0)}
POOLS = {
    "tiles": TILES,
    "gaps": {"kernel": (2, 1), "stride": (3, 2), "padding": (0, 0)},
    "overlap": {"kernel": (3, 3), "stride": (2, 2), "padding": (0, 0)},
    "padding": {"kernel": (2, 2), "stride": (2, 2), "padding": (1, 0)},
}
Layers = Callable[[ProgramBuilder, int], int]


def network(layers: Layers, role: str = "adapted") -> Program:
    """conv, the layers, linear."""
    b = ProgramBuilder((2, 7, 6))
    v = b.op("conv2d", 0, b.leaf("w", (3, 2, 3, 3), "adapted"), stride=(1, 1), padding=(1, 1, 1, 1))
    v = layers(b, v)
    v = b.op("reshape", v, shape=(b.values[v].numel,))
    return b.build(b.op("linear", v, b.leaf("head", (4, b.values[v].numel), "adapted"), b.leaf("bias", (4,), role)))


def batchnorm(b: ProgramBuilder, v: int, statistics: str = "batch", affine: bool = True) -> int:
    c = b.values[v].shape[:1]
    operands = [b.leaf("gamma", c, "adapted"), b.leaf("beta", c, "outer")] if affine else [None, None]
    operands += [b.leaf("mean", c, "const"), b.leaf("var", c, "const")] if statistics == "running" else []
    return b.op("batchnorm", v, *operands, eps=1e-3, statistics=statistics)


def activation(name: str) -> Callable[[ProgramBuilder, int], int]:
    return lambda b, v: b.op("relu", v) if name == "relu" else b.op("leaky_relu", v, slope=float(name))


def pool(kind: str) -> Callable[[ProgramBuilder, int], int]:
    return lambda b, v: b.op("maxpool2d", v, **POOLS[kind])


def chain(*layers: Layers) -> Layers:
    def made(b: ProgramBuilder, v: int) -> int:
        for layer in layers:
            v = layer(b, v)
        return v

    return made


def case_of(program: Program, leaves: dict[str, Tensor] | None = None, ties: bool = False, **options: object) -> Case:
    rates = {leaf.name: Rate("lr", learned=True) for leaf in program.leaves if leaf.role == "adapted"}
    a = Arrangement(**{"steps": 2, "rates": rates, **options})
    case = numbers_for(program, a, 1, [(5, 3), (3, 4)], rate=0.1, positive={"var"})
    b = case.batch
    if ties:  # numbers of which many are equal, in and behind the convolution
        x, q = (v.mul(1.5).round() for v in (b.support_x, b.query_x))
        case = dataclasses.replace(case, batch=dataclasses.replace(b, support_x=x, query_x=q))
        case = dataclasses.replace(case, leaves={**case.leaves, "w": (3 * case.leaves["w"]).round() / 2})
    return dataclasses.replace(case, leaves={**case.leaves, **(leaves or {})})


def run(case: Case, monkeypatch: pytest.MonkeyPatch, rewritten: bool) -> tuple[dict[str, Tensor], Tensor]:
    with monkeypatch.context() as patch:
        if not rewritten:
            patch.setattr(sweep, "pool_first", lambda program: program)
        plan = case.plan()
    results = TorchExecutor(plan).forward(case.call())
    return {n: v for n, v in results.values.items() if isinstance(n, str) and n.startswith("grad.")}, results.values["loss.query"]


def agree(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    (after, loss_after), (before, loss_before) = (run(case, monkeypatch, rewritten) for rewritten in (True, False))
    assert after.keys() == before.keys() and norm(before) > 1e-6
    assert error(after, before, 1e-9) <= 1e-12
    assert float((loss_after - loss_before).abs().max()) <= 1e-12 * max(1.0, float(loss_before.abs().max()))


def names(program: Program) -> list[str]:
    return [op.name for op in program.ops[1:-2]]  # between conv and head


NETWORKS = {  # layers, and what they become
    "relu": ([activation("relu"), pool("tiles")], ["maxpool2d", "relu"]),
    "leaky": ([activation("0.1"), pool("tiles")], ["maxpool2d", "leaky_relu"]),
    "steeper": ([activation("1.5"), pool("tiles")], ["maxpool2d", "leaky_relu"]),
    "relu-overlap": ([activation("relu"), pool("overlap")], ["maxpool2d", "relu"]),
    "relu-padding": ([activation("0.1"), pool("padding")], ["maxpool2d", "leaky_relu"]),
    "norm": ([batchnorm, pool("tiles")], ["batchnorm_maxpool2d"]),
    "norm-gaps": ([batchnorm, pool("gaps")], ["batchnorm_maxpool2d"]),
    "norm-relu": ([batchnorm, activation("relu"), pool("tiles")], ["batchnorm_maxpool2d", "relu"]),
    "norm-leaky": ([batchnorm, activation("0.1"), pool("gaps")], ["batchnorm_maxpool2d", "leaky_relu"]),
    "relu-norm": ([activation("relu"), batchnorm, pool("tiles")], ["relu", "batchnorm_maxpool2d"]),
    "twice": ([activation("relu"), pool("tiles"), pool("tiles")], ["maxpool2d", "maxpool2d", "relu"]),
    "norm-overlap": ([batchnorm, activation("relu"), pool("overlap")], ["batchnorm", "maxpool2d", "relu"]),
    "norm-padding": ([batchnorm, activation("relu"), pool("padding")], ["batchnorm", "maxpool2d", "relu"]),
    "falling": ([activation("-0.1"), pool("tiles")], ["leaky_relu", "maxpool2d"]),
    "falling-norm": ([batchnorm, activation("-0.1"), pool("tiles")], ["batchnorm", "leaky_relu", "maxpool2d"]),
    "tanh": ([lambda b, v: b.op("tanh", v), pool("tiles")], ["tanh", "maxpool2d"]),
    "average": ([activation("relu"), lambda b, v: b.op("avgpool2d", v, **TILES, count_include_pad=True)], ["relu", "avgpool2d"]),
    "other-norm": ([lambda b, v: b.op("groupnorm", v, eps=1e-3, groups=1), pool("tiles")], ["groupnorm", "maxpool2d"]),
}


@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
@pytest.mark.parametrize("name", NETWORKS)
def test_order_and_values(name: str, ties: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layers, expected = NETWORKS[name]
    program = network(chain(*layers))
    assert names(pool_first(program)) == expected
    case = case_of(program, ties=ties)
    agree(case, monkeypatch)
    if not ties:
        losses, truth = case.truth()
        results = TorchExecutor(case.plan()).forward(case.call())
        assert error(gradients(results, truth), truth, 1e-9) <= 1e-11
        assert torch.allclose(results.values["loss.query"], losses, rtol=1e-12, atol=1e-12)


GAMMAS = {"positive": [1.0, 0.5, 2.0], "negative": [-1.0, -0.5, -2.0], "zero": [0.0, -0.0, 0.0], "mixed": [1.0, 0.0, -0.7]}


@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
@pytest.mark.parametrize("statistics", ["batch", "support", "running"])
@pytest.mark.parametrize("kind", [*GAMMAS, "absent"])
def test_signs_of_gamma(kind: str, statistics: str, ties: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a gamma of zero all of a window is equal: torch takes the first element, whatever it was made of."""

    def normed(b: ProgramBuilder, v: int) -> int:
        return batchnorm(b, v, statistics, kind != "absent")

    program = network(chain(normed, activation("0.1"), pool("tiles")))
    assert names(pool_first(program)) == ["batchnorm_maxpool2d", "leaky_relu"]
    leaves = {} if kind == "absent" else {"gamma": torch.tensor(GAMMAS[kind]), "beta": torch.zeros(3)}  # which would absorb a tiny gamma
    for options in ({}, {"first_order": True}, {"memory": "fast"}, {"steps": 0}, {"query_from": 0}):
        agree(case_of(program, leaves, ties, **options), monkeypatch)


@pytest.mark.parametrize("which", ["activation", "norm", "output"])
def test_what_others_read_stays(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def layers(b: ProgramBuilder, v: int) -> int:
        normed = batchnorm(b, v)
        active = b.op("relu", normed)
        pooled = b.op("maxpool2d", active, **TILES)
        if which == "output":
            return active
        other = b.op("avgpool2d", active if which == "activation" else normed, **TILES, count_include_pad=True)
        return b.op("add", pooled, other)

    program = network(layers)
    expected = {
        "activation": ["batchnorm", "relu", "maxpool2d", "avgpool2d", "add"],
        "norm": ["batchnorm", "maxpool2d", "relu", "avgpool2d", "add"],
        "output": ["batchnorm", "relu"],
    }
    assert sorted(names(pool_first(program))) == sorted(expected[which])
    assert "batchnorm_maxpool2d" not in names(pool_first(program))
    agree(case_of(program), monkeypatch)


def test_a_program_that_ends_in_an_activation_keeps_it() -> None:
    b = ProgramBuilder((1, 4, 4))
    active = b.op("relu", 0)
    b.op("maxpool2d", active, **TILES)
    program = b.build(active)
    assert pool_first(program) == program


def test_nothing_is_done_twice() -> None:
    for layers, _ in NETWORKS.values():
        once = pool_first(network(chain(*layers)))
        assert names(pool_first(once)) == names(once)


def test_masks_are_of_the_pooled_size() -> None:
    plan = case_of(network(chain(batchnorm, activation("relu"), pool("tiles")))).plan(record_masks=True)
    kept = [buffer for buffer in plan.buffers.values() if buffer.kind in ("mask", "index")]
    assert kept and all(buffer.shape == (3, 3, 3) for buffer in kept)
    assert {buffer.kind for buffer in kept} == {"mask", "index"}


def test_the_plan_has_no_more_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is chosen and its tangent are copies that the pooling made before, too."""
    case = case_of(network(chain(batchnorm, activation("relu"), pool("tiles"))))
    plan = case.plan()
    monkeypatch.setattr(sweep, "pool_first", lambda program: program)
    assert plan.count() <= case.plan().count()
    assert not plan.count("maxpool2d_bwd") and case.plan().count("maxpool2d_bwd")
    large = [b for b in plan.buffers.values() if b.shape == (3, 7, 6)]
    before = [b for b in case.plan().buffers.values() if b.shape == (3, 7, 6)]
    assert len(large) < len(before)


@pytest.mark.parametrize("part", range(4))
def test_random_programs(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, where no decision hangs on rounding but by ties."""
    seen = 0
    for seed in range(80 * part, 80 * part + 80):
        case = random_case(random.Random(seed), conv=True, native=True)
        if pool_first(case.program) == case.program:
            continue
        (after, loss), (before, loss_before) = (run(case, monkeypatch, rewritten) for rewritten in (True, False))
        if not torch.isfinite(loss_before).all() or norm(before) > 1e3:
            continue
        seen += 1
        moved = max(1e-12, 1e3 * error(run(case.moved(1e-15), monkeypatch, False)[0], before, 1e-6))
        assert error(after, before, 1e-6) <= moved, f"seed {seed}"
    assert seen >= 10
