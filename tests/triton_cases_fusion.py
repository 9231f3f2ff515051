"""Launches that do the work of several: sums of several arrays, statistics of a batchnorm in one launch or in the product in front of it."""

from __future__ import annotations

import dataclasses
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from random_programs import random_case
from triton_networks import fusible, patches, small, summed
from triton_process import DEVICE, judge_plan, on_device

from fastmaml.executors.triton.executor import INTERPRETED, TritonExecutor
from fastmaml.executors.triton.fused import Fused, Sums
from fastmaml.executors.triton.lowering import Lowering
from fastmaml.executors.triton.rules import RULES
from fastmaml.executors.triton.rules.products import Geometry, product
from fastmaml.executors.triton.site import Site
from fastmaml.executors.triton.storage import Bucket, View
from fastmaml.plan import Plan


def unfused(plan: Plan) -> TritonExecutor:
    executor = TritonExecutor(plan, "highest")
    executor.fused = plan
    return executor


def test_sums_of_several_arrays() -> None:
    """axpys and sum_tasks over arrays of more than a block, with operands that are absent or the same for all tasks."""
    generator = torch.Generator().manual_seed(0)
    tasks, sizes = 3, (5, 1500, 1)
    site = Site(SimpleNamespace(bucket=Bucket(tasks, 1, 1), device=DEVICE, one=torch.tensor([0, 1], dtype=torch.int32, device=DEVICE)))
    truth, found = [], []
    with site.together():
        for n, absent in zip(sizes, ("a", "s", "b"), strict=True):
            shared = torch.randn(1, n, generator=generator).to(DEVICE)
            each = torch.randn(tasks, n, generator=generator).to(DEVICE)
            rate = torch.randn(tasks, 1, generator=generator).to(DEVICE)
            y = torch.full((tasks, n), torch.nan, device=DEVICE)
            a, s, b = (None if name == absent else v for name, v in (("a", shared), ("s", rate), ("b", each)))
            views = [v if v is None else View(v, (v.shape[1],), None, 0 if v is shared else v.shape[1]) for v in (y, a, s, b)]
            site.axpy(*views, -1.0)
            found.append((y, views))  # the launch knows addresses alone
            truth.append((0 if a is None else a) - (0 if b is None else b) * (1 if s is None else s))
    (launch,) = site.launches
    launch()
    for (y, _), expected in zip(found, truth, strict=True):
        assert torch.allclose(y, expected.expand_as(y), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kernel", ["stats_fwd", "stats_jvp", "bwd_stats"])
def test_statistics_in_one_launch_have_the_same_bits(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task whose rows are one chunk: alone in one launch, beside a task of several chunks in two."""
    monkeypatch.setattr("fastmaml.executors.triton.rules.norms.CHUNK", 24)
    generator = torch.Generator().manual_seed(0)
    x, xt = (torch.randn(60, 5, generator=generator).to(DEVICE) * 3 + 1 for _ in range(2))
    mean, rstd = (torch.rand(2, 5, generator=generator).to(DEVICE) + 0.5 for _ in range(2))
    found = []
    for sizes in ([19], [19, 41]):
        offsets = torch.tensor([0, 19, 60][: len(sizes) + 1], dtype=torch.int32, device=DEVICE)
        storage = SimpleNamespace(bucket=Bucket(len(sizes), max(sizes), 1), device=DEVICE, offsets={"support": offsets})
        site = Site(storage)
        one, two = (torch.full((2, 5), torch.nan, device=DEVICE) for _ in range(2))
        rows = [View(v, (5,), "support") for v in (x, xt)]
        of_tasks = [View(v, (5,), None, 5) for v in (mean, rstd, one, two)]
        inputs = {"stats_fwd": rows[:1]}.get(kernel, [rows[0], *of_tasks[:2], rows[1]])
        RULES[f"batchnorm_{kernel}"](site, {"eps": 1e-3, "stat_rows": "support"}, inputs, of_tasks[2:])
        Lowering._place(SimpleNamespace(site=site, storage=storage), site.launches)
        for launch in site.launches:
            launch()
        assert (len(site.launches) == 1) == (len(sizes) == 1)
        found.append(torch.stack([one[0], two[0]]))
    assert torch.equal(*found) and found[0].isfinite().all()


FUSIBLE = {
    **{kind: lambda kind=kind: fusible(kind)[0] for kind in ("rows", "images")},
    "pools": lambda: small("conv", "plain", 2),
    "kept": lambda: small("conv", "plain", 1, memory="fast"),
    "learned rates": lambda: small("linear", "learned-per-tensor-and-step", 2),
    "random images": lambda: random_case(random.Random(10), conv=True),
    "random rows": lambda: random_case(random.Random(19), conv=False),
}


@pytest.mark.parametrize(("name", "chunk"), [*((name, 4096) for name in FUSIBLE), ("rows", 24), ("images", 24)])
def test_fusion_changes_no_bit(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of losses, logits, masks and gradients; with sums in one piece and in many. But for a batchnorm's, which products sum by other pieces (test_sums_of_tiles)."""
    monkeypatch.setattr("fastmaml.executors.triton.fusion_norms.SUMMED", {})
    monkeypatch.setattr("fastmaml.executors.triton.rules.products.CHUNK", chunk)
    monkeypatch.setattr("fastmaml.executors.triton.rules.norms.CHUNK", chunk)
    case = on_device(FUSIBLE[name]())
    plan = case.plan(record_masks=True)
    executor = TritonExecutor(plan, "highest")
    assert any(isinstance(instr, Fused) for _, instr in executor.fused.instructions())
    got, plain = (e.forward(case.call(torch.float32, record=True)).values for e in (executor, unfused(plan)))
    assert got.keys() == plain.keys()
    for key, value in plain.items():
        for mine, other in zip(*(v if isinstance(v, list) else [v] for v in (got[key], value)), strict=True):
            assert torch.equal(mine, other) if INTERPRETED else torch.allclose(mine.double(), other.double(), rtol=1e-4, atol=1e-6), key


@pytest.mark.parametrize("group", [2, 64])
def test_sums_of_tiles(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merged by groups of tiles, and all at once."""
    monkeypatch.setattr("fastmaml.executors.triton.rules.products.GROUP", group)
    judge_plan(summed())


def shuffled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the interpreter run the programs of a launch in another order."""
    from triton.runtime.interpreter import InterpreterBuilder

    in_order = InterpreterBuilder.set_grid_idx

    def set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        n = self.grid_dim[0]
        in_order(self, (x * 7 + 3) % n if n % 7 else n - 1 - x, y, z)

    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", set_grid_idx)


@pytest.mark.parametrize("mode", ["stats_fwd", "stats_jvp", "bwd_stats", "bwd_stats_jvp"])
def test_sums_of_tiles_have_the_same_bits(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a task of several tiles, whichever comes last: alone, twice, and behind a larger task. The product copies, so that nothing else rounds."""
    monkeypatch.setattr("fastmaml.executors.triton.rules.products.GROUP", 2)
    generator = torch.Generator().manual_seed(0)
    x, other, dy, xt = (torch.randn(1000, 5, generator=generator).to(DEVICE) * 3 + 1 for _ in range(4))
    of_task = [torch.rand(2, 5, generator=generator).to(DEVICE) + 0.5 for _ in range(4)]
    mean, rstd, mean_t, rstd_t = of_task
    found = []
    for order, sizes in enumerate(([273], [273], [727, 273])):
        if order == 1 and INTERPRETED:
            shuffled(monkeypatch)
        last, n = len(sizes) - 1, sum(sizes)
        rows = [View(v[-n:].contiguous(), (5,), "support") for v in (x, other, dy, xt)]
        y = View(torch.full((n, 5), torch.nan, device=DEVICE), (5,), "support")
        mine = [View(v[1 - last :].contiguous(), (5,), None, 5) for v in of_task]
        out = [View(torch.full((last + 1, 5), torch.nan, device=DEVICE), (5,), None, 5) for _ in range(2)]
        offsets = torch.tensor([0, *sizes], dtype=torch.int32, device=DEVICE).cumsum(0).to(torch.int32)
        site = Site(SimpleNamespace(bucket=Bucket(len(sizes), max(sizes), 1), device=DEVICE, offsets={"support": offsets}))
        operands = {"stats_fwd": (None,), "stats_jvp": (rows[1], *mine[:2], None), "bwd_stats": (rows[1], *mine[:2], None)}
        operands["bwd_stats_jvp"] = (rows[1], *mine[:2], rows[2], rows[3], *mine[2:], None)
        attrs = {"sums": Sums(mode, operands[mode], "support", 1e-3), "sum_outputs": out}
        copying = View(torch.eye(5, device=DEVICE), (5, 5))
        product(site, Geometry(1, 1, 5, 1, 1, 5, W_IN=1, W_OUT=5), [(rows[0], copying)], None, y, False, attrs)
        site.precision = "tf32x3"
        Lowering._place(SimpleNamespace(site=site, storage=site.storage), site.launches)
        (launch,) = site.launches
        if last == 0:  # as long as one is missing nobody merges
            dataclasses.replace(launch, grid=(launch.grid[0] - 1, 1, 1))()
            assert all(v.data.isnan().all() for v in out)
            launch.arguments["arrivals"].zero_()
        for _ in range(2):  # the counts are zero again
            launch()
            assert not launch.arguments["arrivals"].any()
            found.append(torch.stack([v.data[last] for v in out]))
        mine, whole = x[-273:].double(), (other[-273:].double() - mean[1]) * rstd[1]
        if mode == "stats_fwd":
            truth = torch.stack([mine.mean(0), (mine.var(0, correction=0) + 1e-3).rsqrt()])
        elif mode == "stats_jvp":
            truth = torch.stack([mine.mean(0), -rstd[1] ** 2 * (whole * mine).mean(0)])
        else:
            truth = torch.stack([mine.sum(0), (mine * whole).sum(0)])
            if mode == "bwd_stats_jvp":
                whole_t = (xt[-273:].double() - mean_t[1]) * rstd[1] + (other[-273:].double() - mean[1]) * rstd_t[1]
                truth[1] += (dy[-273:].double() * whole_t).sum(0)
        assert torch.allclose(found[-1].double(), truth, rtol=2e-5, atol=2e-4), (found[-1], truth)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("kind", ["rows", "images"])
def test_fused_plans(kind: str) -> None:
    judge_plan(fusible(kind)[0])


def test_statistics_from_patches() -> None:
    judge_plan(patches()[0])
