"""plan/patches.py: statistics from the moments of patches, where that is exact and pays, and the same loss and meta-gradient."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
import torch
from executor_cases import ZERO, masks_equal_error, same
from random_programs import Case, error, gradients, norm, numbers_for, random_case
from test_torch_executor import focal, run_halves

import fastmaml.plan.patches as patches
import fastmaml.plan.sweep as sweep
from fastmaml.executors.cpu.executor import CpuExecutor
from fastmaml.executors.torch.executor import TorchExecutor
from fastmaml.optimizers import SGD, ImplicitGradient
from fastmaml.plan import Arrangement, Rate
from fastmaml.program import Program, ProgramBuilder

TILES = {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0)}
GAPS = {"kernel": (2, 1), "stride": (3, 2), "padding": (0, 0)}
SIZES = [(5, 3), (3, 4)]


class Net:
    """conv of the samples, norm, relu, [pool], conv, norm, relu, head; every part may be another."""

    def __init__(self, **options: object) -> None:
        self.o = {"pool": TILES, "bias": True, "affine": "both", "statistics": "batch", "weight": "leaf", "data": "plain", "tied": False, **options}
        self.o = {"image": (2, 7, 6), "out": 6, "kernel": (2, 3), "stride": (1, 1), "padding": (1, 0, 1, 1), **self.o}
        self.shape = self.o["out"], self.o["image"][0], *self.o["kernel"]
        self.b = ProgramBuilder((math.prod(self.o["image"]),) if self.o["data"] == "flat" else self.o["image"])

    def leaf(self, name: str, *shape: int, role: str = "adapted", home: str = "meta") -> int:
        return self.b.leaf(name, shape, role, home)

    def weight(self) -> int:
        kind, b, (out, *patch) = self.o["weight"], self.b, self.shape
        if kind == "leaf":
            return self.leaf("w", *self.shape)
        if kind == "scaled":
            return b.op("mul", self.leaf("w", *self.shape, role="outer"), self.leaf("scale", out, 1, 1, 1))
        left, right = self.leaf("left", out, 6), self.leaf("right", 6, math.prod(patch), role="outer")
        return b.op("reshape", b.op("matmul", left, right), shape=self.shape)

    def norm(self, v: int, name: str) -> int:
        c = self.b.values[v].shape[0]
        affine = self.o["affine"]
        gamma = self.leaf(f"{name}.gamma", c) if affine in ("both", "gamma", "product") else None
        if affine == "product":  # made behind the convolution
            gamma = self.b.op("mul", gamma, self.leaf(f"{name}.scale", c, role="outer"))
        beta = self.leaf(f"{name}.beta", c, role="outer" if affine == "beta" else "adapted") if affine in ("both", "beta") else None
        return self.b.op("batchnorm", v, gamma, beta, eps=1e-3, statistics=self.o["statistics"])

    def build(self) -> Program:
        b, v = self.b, 0
        if self.o["data"] == "flat":
            v = b.op("reshape", v, shape=self.o["image"])
        if self.o["data"] == "padded":
            v = b.op("pad2d", v, padding=(1, 0, 0, 2))
        w, data = self.weight(), v
        bias = self.leaf("bias", self.shape[0], role="outer" if self.o["bias"] == "outer" else "adapted") if self.o["bias"] else None
        v = b.op("conv2d", v, w, bias, stride=self.o["stride"], padding=self.o["padding"])
        v = self.norm(v, "n0")
        v = b.op("relu", v)
        if self.o["pool"] and min(b.values[v].shape[1:]) >= 2:
            v = b.op("maxpool2d", v, **self.o["pool"])
        if self.o["tied"]:
            other = b.op("global_avgpool2d", b.op("tanh", b.op("conv2d", data, w, None, stride=(2, 2), padding=(0, 0, 0, 0))))
        v = b.op("conv2d", v, self.leaf("w1", 4, self.shape[0], 2, 2), self.leaf("b1", 4), stride=(1, 1), padding=(0, 1, 1, 0))
        v = b.op("relu", self.norm(v, "n1"))
        v = b.op("reshape", v, shape=(b.values[v].numel,))
        v = b.op("linear", v, self.leaf("head", 3, b.values[v].shape[0]), self.leaf("hb", 3))
        if self.o["tied"]:
            v = b.op("add", v, b.op("linear", other, self.leaf("head2", 3, self.shape[0]), None))
        return b.build(v)


def case_of(program: Program, sizes=SIZES, rate: float = 0.1, **options: object) -> Case:
    rates = {leaf.name: Rate("lr", learned=True) for leaf in program.leaves if leaf.role == "adapted"}
    a = Arrangement(**{"steps": 2, "rates": rates, **options})
    case = numbers_for(program, a, 1, sizes, rate=rate)
    b = case.batch  # a mean, as images have one
    return dataclasses.replace(case, batch=dataclasses.replace(b, support_x=b.support_x + 1.5, query_x=b.query_x + 1.5))


NETS = {
    "plain": {},
    "dense": {"pool": None},
    "gaps": {"pool": GAPS},
    "no-bias": {"bias": False},
    "outer-bias": {"bias": "outer"},
    "no-affine": {"affine": None},
    "gamma": {"affine": "gamma"},
    "beta": {"affine": "beta", "pool": None},
    "gamma-product": {"affine": "product"},
    "support": {"statistics": "support"},
    "scaled": {"weight": "scaled"},
    "product": {"weight": "product", "pool": None},
    "flat": {"data": "flat"},
    "padded": {"data": "padded", "pool": None},
    "tied": {"tied": True},
}
OPTIONS = {
    "second": {},
    "first": {"first_order": True},
    "fast": {"memory": "fast"},
    "one": {"steps": 1, "support_rows": 5},
    "every": {"query_from": 0},
    "many": {"steps": 9, "support_rows": 5},
    "momentum": {"optimizer": SGD(momentum=0.5, max_norm=0.5)},
}


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it is exact, whether it pays or not."""
    monkeypatch.setattr(patches, "FORWARD", 1e9)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", NETS)
def test_float64(name: str, option: str, always: None) -> None:
    case = case_of(Net(**NETS[name]).build(), **OPTIONS[option])
    plan = case.plan()
    assert plan.count("patch_stats_fwd") >= 1 and plan.count("patch_stats_bwd") >= 1
    losses, truth = case.truth()
    results = TorchExecutor(plan).forward(case.call())
    if option != "every":
        assert torch.allclose(results.values["loss.query"], losses, rtol=1e-12, atol=1e-12)
    assert error(gradients(results, truth), truth, 1e-9) <= 1e-11


def run(case: Case, **changes: object) -> dict:
    values = TorchExecutor(case.plan(**changes)).forward(case.call()).values
    return {n: v for n, v in values.items() if isinstance(n, str)}


def ordinary(case: Case, monkeypatch: pytest.MonkeyPatch, **changes: object) -> dict:
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "statistics_from_patches", lambda program, *_: program)
        return run(case, **changes)


@pytest.mark.parametrize("entry", ["evaluate", "adapt", "implicit", "reptile"])
@pytest.mark.parametrize("name", ["plain", "dense", "support"])
def test_other_entries(name: str, entry: str, always: None, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(Net(**NETS[name]).build())
    fixed = {n: dataclasses.replace(rate, learned=False) for n, rate in case.arrangement.rates.items()}
    changes = {
        "evaluate": {"entry": "evaluate"},
        "adapt": {"entry": "adapt"},
        "implicit": {"meta_gradient": ImplicitGradient(cg_steps=3), "rates": fixed, "support_rows": 5},
        "reptile": {"meta_gradient": "reptile", "rates": fixed},
    }[entry]
    assert case.plan(**changes).count("patch_stats_fwd")
    got, before = run(case, **changes), ordinary(case, monkeypatch, **changes)
    assert got.keys() == before.keys()
    assert error(got, before, 1e-9) <= 1e-11


@pytest.mark.parametrize("name", ["plain", "dense", "scaled"])
def test_halves_around_a_torch_loss(name: str, always: None) -> None:
    case = case_of(Net(**NETS[name]).build())
    plan = case.plan(entry="halves")
    assert plan.count("patch_stats_bwd_jvp")
    losses, truth = case.truth(outer=focal)
    got, values = run_halves(TorchExecutor(plan), case, focal)
    assert torch.allclose(got, losses, rtol=1e-12)
    assert error({n: values[f"grad.{n}"] for n in truth if f"grad.{n}" in values}, {n: g for n, g in truth.items() if f"grad.{n}" in values}, 1e-9) <= 1e-11
    got, mine = run_halves(CpuExecutor(plan), case, focal, torch.float32)
    names = [n for n in values if isinstance(n, str) and n.startswith("grad.")]
    assert error({n: mine[n] for n in names}, {n: values[n] for n in names}, ZERO) <= 1e-4


def random_net(rng: random.Random) -> Net:
    (h, w), kernel = rng.choice([(5, 7), (9, 6), (3, 3), (13, 4)]), (rng.choice([1, 2, 3]), rng.choice([1, 3]))
    return Net(
        image=(rng.choice([1, 2, 3, 17]), h, w),
        out=rng.choice([1, 6, 16, 17, 65]),
        kernel=kernel,
        stride=(rng.choice([1, 1, 2]), rng.choice([1, 2, 3])),
        padding=tuple(rng.choice([0, 1, 2]) for _ in range(4)),
        pool=rng.choice([None, TILES, GAPS]),
        bias=rng.choice([True, False, "outer"]),
        affine=rng.choice(["both", "gamma", "beta", "product", None]),
        statistics=rng.choice(["batch", "support"]),
        weight=rng.choice(["leaf", "leaf", "scaled", "product"]),
        data=rng.choice(["plain", "flat", "padded"]),
        tied=rng.choice([False, False, True]),
    )


@pytest.mark.parametrize("seed", range(40))
def test_random_nets(seed: int, always: None) -> None:
    """Against autograd in float64, and on the cpu executor by rule (a)."""
    rng = random.Random(seed)
    sizes = [(rng.randint(1, 6), rng.randint(1, 4)) for _ in range(3)]
    memory = rng.choice(["constant", "fast"])
    case = case_of(random_net(rng).build(), sizes, 0.02, steps=rng.choice([1, 2, 3]), first_order=rng.random() < 0.2, memory=memory)
    plan = case.plan()
    assert plan.count("patch_stats_fwd") and plan.count("patch_stats_bwd")
    _, truth = case.truth()
    got = gradients(TorchExecutor(plan).forward(case.call()), truth)
    assert error(got, truth, 1e-6) <= max(1e-11, 1e3 * error(case.moved(1e-15).truth()[1], truth, 1e-6))
    assert masks_equal_error(case, 1e-5) >= 0


@pytest.mark.parametrize("part", range(2))
def test_random_programs(part: int, always: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few of them have such a layer: in float64 the same as without, on the cpu executor by rule (a)."""
    seen = 0
    for seed in range(300 * part, 300 * part + 300):
        case = random_case(random.Random(seed), conv=True, native=True)
        if not case.plan().count("patch_stats"):
            continue
        got, before = ({n: v for n, v in values.items() if n.startswith("grad.")} for values in (run(case), ordinary(case, monkeypatch)))
        if not before or not all(torch.isfinite(v).all() for v in before.values()) or norm(before) > 1e3:
            continue
        seen += 1
        moved = {n: v for n, v in ordinary(case.moved(1e-15), monkeypatch).items() if n in before}
        assert error(got, before, 1e-6) <= max(1e-11, 1e3 * error(moved, before, 1e-6)), f"seed {seed}"
        assert masks_equal_error(case, 1e-5) >= -1, f"seed {seed}"
    assert seen >= 2


# ------------------------------------------------------------------------------------------------------------ the cpu executor


@pytest.mark.parametrize("option", ["second", "first", "fast", "one"])
@pytest.mark.parametrize("name", NETS)
def test_equal_masks(name: str, option: str, always: None) -> None:
    case = case_of(Net(**NETS[name]).build(), **OPTIONS[option])
    assert case.plan(record_masks=True).count("patch_stats_fwd")
    assert 0 <= masks_equal_error(case, 1e-5, threads=2) <= 1e-5


@pytest.mark.parametrize("name", ["plain", "dense", "scaled"])
def test_bits_do_not_depend_on_threads_or_blocks_on_teams(name: str, always: None) -> None:
    case = case_of(Net(**NETS[name]).build(), [(5, 3), (1, 4), (7, 2), (12, 3), (4, 4)])
    call, plan = case.call(torch.float32), case.plan()
    for block_rows in (None, 1, 3):
        first = CpuExecutor(plan, threads=1, block_rows=block_rows).forward(call)
        for threads in (2, 3, 16, 40):  # 40: teams share a task
            same(first, CpuExecutor(plan, threads=threads, block_rows=block_rows).forward(call))


def test_a_task_that_is_not_finite(always: None) -> None:
    case = case_of(Net().build())
    for bad in (float("nan"), float("inf"), 3e38):
        x = case.batch.support_x.clone()
        x[0, 0, 2, 2] = bad
        results = CpuExecutor(case.plan()).forward(dataclasses.replace(case, batch=dataclasses.replace(case.batch, support_x=x)).call(torch.float32))
        assert results.finite.tolist() == [False, True]


# ------------------------------------------------------------------------------------------------------------ the Plan


@pytest.mark.parametrize("name", ["plain", "dense"])
def test_one_walk_in_each_direction(name: str, always: None) -> None:
    """From the samples to the sums of the second layer's statistics, and from that layer's gradient to the first weight's."""
    plan = case_of(Net(**NETS[name]).build()).plan()
    choose, replay, scatter = (["batchnorm_maxpool2d_fwd"], ["maxpool2d_replay"], "maxpool2d_bwd") if name == "plain" else ([], [], None)

    def group_of(segment: str, kernel: str) -> list[str]:
        found = [[i.kernel for i in group.instructions] for group in plan.segments[segment].groups]
        return next(kernels for kernels in found if kernel in kernels)

    groups = [[i.kernel for i in group.instructions] for group in plan.segments["gradient"].groups]
    assert groups[0] == ["patch_stats_fwd"]
    assert groups[1] == ["conv2d_fwd", *choose, "batchnorm_fwd", "relu_fwd", "conv2d_fwd", "batchnorm_stats_fwd"]
    last = groups[-1] if "conv2d_bwd_weight" in groups[-1] else groups[-2]
    back = ["batchnorm_bwd_input", *([scatter] if scatter else []), "conv2d_bwd_weight"]
    assert last == ["batchnorm_bwd_input", "conv2d_bwd_input", "conv2d_bwd_weight", "relu_bwd", "batchnorm_bwd_stats", *back]
    forward = group_of("hvp", "conv2d_jvp")
    assert forward[:2] == ["conv2d_fwd", "conv2d_jvp"] and forward.count("conv2d_jvp") == 2 and set(replay) <= set(forward)
    assert [i.kernel for i in plan.segments["hvp"].instructions].count("batchnorm_stats_jvp") == 1  # of the second layer
    first = {i.outputs[0].buffer for _, i in plan.instructions() if i.kernel in ("conv2d_fwd", "conv2d_jvp") and i.inputs[0].buffer == "x.support"}
    if name == "plain":
        assert first and {plan.buffers[buffer].home for buffer in first} == {"block"}


def test_what_is_made_once_and_for_whom(always: None) -> None:
    """The moments in the prologue, of the support rows alone; the query keeps its own statistics, and the bias."""
    plan = case_of(Net().build(), query_from=0).plan()
    where = {i.kernel: name for name, i in plan.instructions() if i.kernel.startswith("patch_")}
    assert where["patch_moments_fwd"] == "prologue" and plan.count("patch_moments") == 1
    assert set(where.values()) == {"prologue", "gradient", "hvp"}
    for name, segment in plan.segments.items():
        convs = [i for i in segment.instructions if i.kernel == "conv2d_fwd" and i.inputs[0].buffer.startswith("x.")]
        assert all((i.inputs[2] is None) == (name in ("gradient", "hvp")) for i in convs)
        if name.startswith("query"):
            assert convs and sum(i.kernel == "batchnorm_stats_fwd" for i in segment.instructions) == 2


def test_layers_with_the_same_patches_share_their_moments(always: None) -> None:
    b = ProgramBuilder((2, 6, 5))
    parts = []
    for n, (out, padding) in enumerate(((3, 1), (4, 1), (3, 0))):
        v = b.op("conv2d", 0, b.leaf(f"w{n}", (out, 2, 3, 3), "adapted"), None, stride=(1, 1), padding=(padding,) * 4)
        v = b.op("global_avgpool2d", b.op("tanh", b.op("batchnorm", v, eps=1e-3, statistics="batch")))
        parts.append(b.op("linear", v, b.leaf(f"head{n}", (3, out), "adapted"), None))
    case = case_of(b.build(b.op("add", b.op("add", *parts[:2]), parts[2])))
    plan = case.plan()
    assert plan.count("patch_moments_fwd") == 2 and plan.count("patch_stats_jvp") == 3
    _, truth = case.truth()
    assert error(gradients(TorchExecutor(plan).forward(case.call()), truth), truth, 1e-9) <= 1e-11
    assert 0 <= masks_equal_error(case, 1e-5) <= 1e-5


def refused(kind: str) -> Program:
    b = ProgramBuilder((2, 7, 6))
    conv = dict(stride=(1, 1), padding=(1, 1, 1, 1))
    statistics = {"running": "running", "joint": "joint"}.get(kind, "batch")
    role = "outer" if kind in ("frozen", "joint") else "adapted"
    x = b.op("tanh", 0) if kind == "not data" else 0
    z = v = b.op("conv2d", x, b.leaf("w", (3, 2, 3, 3), role), b.leaf("bias", (3,), role), **conv)
    if kind == "activation":
        v = b.op("relu", v)
    running = [b.leaf("mean", (3,), "const"), b.leaf("var", (3,), "const")] if kind == "running" else []
    v = b.op("batchnorm", v, None if kind == "joint" else b.leaf("gamma", (3,), "adapted"), None, *running, eps=1e-3, statistics=statistics)
    if kind == "two readers":
        v = b.op("add", v, z)
    if kind == "other norm":
        v = b.op("groupnorm", z, eps=1e-3, groups=1)
    v = b.op("reshape", v, shape=(b.values[v].numel,))
    return b.build(b.op("linear", v, b.leaf("head", (4, b.values[v].numel), "adapted"), None))


@pytest.mark.parametrize("kind", ["not data", "activation", "two readers", "other norm", "running", "frozen", "joint"])
def test_where_it_is_not_exact_nothing_changes(kind: str, always: None) -> None:
    program = refused(kind)
    assert patches.statistics_from_patches(program, "train", 5, 5) == program
    assert not case_of(program).plan().count("patch_")


def test_a_program_that_ends_in_a_convolution(always: None) -> None:
    b = ProgramBuilder((2, 3, 3))
    z = b.op("conv2d", 0, b.leaf("w", (3, 2, 3, 3), "adapted"), None, stride=(1, 1), padding=(0,) * 4)
    program = b.build(b.op("reshape", z, shape=(3,)))
    assert patches.statistics_from_patches(program, "train", 5, 5) == program


@pytest.mark.parametrize(
    ("channels", "kernel", "outputs", "steps", "second_order", "pays"),
    [
        (1, 3, 64, 1, True, True),  # Omniglot
        (3, 3, 32, 5, True, True),  # mini-ImageNet
        (3, 3, 32, 1, True, False),
        (3, 3, 64, 1, True, True),
        (3, 3, 32, 1, False, False),
        (3, 3, 32, 5, False, True),
        (3, 7, 64, 5, True, False),
        (64, 3, 64, 10, True, False),
        (20, 3, 4000, 5, True, False),  # larger than MOST
    ],
)
def test_where_it_pays(channels: int, kernel: int, outputs: int, steps: int, second_order: bool, pays: bool) -> None:
    b = ProgramBuilder((channels, 9, 9))
    z = b.op("conv2d", 0, b.leaf("w", (outputs, channels, kernel, kernel), "adapted"), None, stride=(1, 1), padding=(1,) * 4)
    v = b.op("global_avgpool2d", b.op("relu", b.op("batchnorm", z, None, None, eps=1e-3, statistics="batch")))
    program = b.build(b.op("linear", v, b.leaf("head", (5, outputs), "adapted"), None))
    case = case_of(program, [(1, 1)], steps=steps, first_order=not second_order)
    assert bool(case.plan().count("patch_stats")) == pays
    assert not case.plan(entry="predict", steps=0).count("patch_") and not case.plan(steps=0).count("patch_")


def test_the_bias_has_no_gradient(always: None) -> None:
    """Exactly: the ordinary way leaves the rounding of a sum over all pixels."""
    case = case_of(Net().build(), steps=3)
    plan = case.plan(entry="adapt")
    adapted = CpuExecutor(plan).forward(case.call(torch.float32)).values["adapted.bias"]
    assert torch.equal(adapted, case.leaves["bias"].float().expand_as(adapted))
