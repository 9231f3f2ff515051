"""Triton's kernels compiled ahead of time for GPUs that are not here: registers without spills, and shared memory, within the limits of one table."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import pytest
import torch

pytest.importorskip("triton", "3.6", reason="triton is not installed (pip install triton: Linux)")

import random

import triton_aot
from random_programs import random_case

import fastmaml.nn as nets
from fastmaml.executors.triton.executor import INTERPRETED
from fastmaml.executors.triton.fusion import fuse
from fastmaml.executors.triton.lowering import Lowering
from fastmaml.executors.triton.storage import Bucket
from fastmaml.plan import Arrangement, Plan, Rate, build_plan
from fastmaml.program import Program
from fastmaml.trace import trace

pytestmark = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: nothing can be compiled")
SPILLS = 0  # bytes of local memory
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a block may have
REGISTERS = {  # by kernel; all others
    "conv2d_rows": 248,
    "conv2d_rows with sums": 255,  # the largest, on sm_80 in three TF32 products, has eight warps: from 129 on a multiprocessor has one such block in any case
    "conv2d_weight": 248,
    "conv2d_weight_tasks": 248,
    "batchnorm_sums": 128,
    "batchnorm_rows": 144,
    "layernorm_moments": 128,
    "layernorm_rows": 168,
    "layernorm_weight": 184,
}
REGISTERS_ELSEWHERE = 96


def net_plan(program: Program, learned: bool = True, **options: Any) -> Plan:
    program = program.with_roles(lambda _: "adapted")
    rates = {leaf.name: Rate("lr", learned=learned) for leaf in program.leaves}
    return build_plan(program, Arrangement(steps=2, rates=rates, support_rows=5, **options))


@functools.cache
def launches(random_too: bool = True) -> list[Any]:
    """Of reference networks in their usual sizes, and of random Programs."""
    torch.manual_seed(0)
    plans = [(net_plan(trace(nets.PyTorchMAMLConv().train(), (1, 28, 28))), Bucket(32, 5, 75))]
    plans += [(net_plan(trace(nets.PyTorchMAMLConv(5, channels=3, side=84, filters=32).train(), (3, 84, 84))), Bucket(4, 5, 75))]
    plans += [(net_plan(trace(nets.OmniglotFC(), (784,))), Bucket(32, 5, 75))]
    for seed in range(60 if random_too else 0):
        plans.append((random_case(random.Random(seed), conv=seed % 2 == 0).plan(), Bucket(3, 7, 6)))
    plans += [(fuse(plan), bucket) for plan, bucket in plans]
    found = [launch for plan, bucket in plans for half in Lowering(plan, bucket, "meta").halves for launch in half]
    conv4 = trace(nets.PyTorchMAMLConv().train(), (1, 28, 28))
    many = [(fuse(plan), Bucket(64, 5, 15)) for plan in (net_plan(conv4), net_plan(conv4, learned=False, first_order=True))]  # so many tasks that some are summed
    for plan, bucket in (*plans[:1], *many):  # products alone know a precision
        for precision in ("highest", "high", "medium"):
            found += [launch for half in Lowering(plan, bucket, "meta", precision).halves for launch in half if "PRECISION" in launch.arguments]
    return found


def distinct(alike: Any, random_too: bool = True) -> dict[Any, Any]:
    """One launch for each value of ``alike``: with the most operands, then the largest grid."""
    out: dict[Any, tuple[Any, Any]] = {}
    for launch in launches(random_too):
        absent = sum(value is None for value in launch.arguments.values())
        size = -absent, math.prod(launch.grid)
        key = alike(launch)
        if key not in out or size > out[key][0]:
            out[key] = size, launch
    return {key: launch for key, (_, launch) in out.items()}


def mode(launch: Any) -> tuple:
    """The kernel, and what makes it another one: its mode, precision, prologue and epilogue."""
    updates = (launch.arguments.get(name) is not None for name in ("base", "w_base"))
    return launch.kernel.__name__, *(launch.arguments.get(name) for name in ("MODE", "PRECISION", "REVERSED", "X_POOLED", "XT_POOLED", "DY_POOLED", "ACTIVATION", "SUMS")), *updates


def without_operands() -> list[Any]:
    """Few launches in which each operand of a kernel that may be absent is."""
    missing: set[tuple] = set()
    found, absent = [], {}
    for launch in launches():
        absent[id(launch)] = {(launch.kernel.__name__, launch.arguments.get("MODE"), n) for n, value in launch.arguments.items() if value is None and not n.isupper()}
        missing |= absent[id(launch)]
    for launch in sorted(launches(), key=lambda launch: -len(absent[id(launch)])):
        if absent[id(launch)] & missing:
            found.append(launch)
            missing -= absent[id(launch)]
    return found


def tile(launch: Any) -> tuple:
    """The kernel, its tile, and which operands it has: what its registers depend on. Sizes of images change little."""
    values = launch.arguments
    sizes = (values.get(name) for name in ("BM", "BN", "BK", "TILES_N", "PRECISION", "REVERSED", "ACTIVATION", "SUMS"))
    return launch.kernel.__name__, *sizes, *(value is None for value in values.values())


def check(launch: Any, capability: int) -> None:
    used, name = triton_aot.compiled(launch, capability), launch.kernel.__name__ + (" with sums" if launch.arguments.get("SUMS") else "")
    assert used["STACK"] <= SPILLS and used["LOCAL"] <= SPILLS, f"{mode(launch)} spills: {used}"
    assert used["shared"] <= SHARED[capability], f"{mode(launch)}: {used}"
    assert used["REG"] <= REGISTERS.get(name, REGISTERS_ELSEWHERE), f"{mode(launch)}: {used}"


@pytest.mark.parametrize("capability", SHARED)
def test_every_kernel(capability: int) -> None:
    for launch in distinct(mode).values():
        check(launch, capability)
    assert {launch.arguments["PRECISION"] for launch in launches() if launch.kernel.__name__ == "conv2d_weight_tasks"} == {"tf32", "tf32x3", "bf16", "bf16x3"}


def test_without_operands() -> None:
    for launch in without_operands():
        check(launch, 90)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
def test_every_tile_of_the_reference_networks(capability: int) -> None:
    for launch in distinct(tile, random_too=False).values():
        if launch.kernel.__name__.startswith("conv2d"):
            check(launch, capability)


@pytest.mark.parametrize("capability", SHARED)
def test_arrivals_see_what_was_stored(capability: int) -> None:
    """Of a product that ends in sums: the threads of a program meet between their stores and the atomic, which releases and acquires; what others have stored is not
    read from the cache of a multiprocessor."""
    launch = next(launch for launch in launches(False) if launch.arguments.get("SUMS") == "stats_fwd")
    steps = re.findall(r"bar\.sync|st\.global|atom[.\w:]*|ld\.global\.cg", triton_aot.binary_of(launch, capability).asm["ptx"])
    atomics = [i for i, step in enumerate(steps) if step.startswith("atom")]
    assert len(atomics) == 2 and {steps[i] for i in atomics} == {"atom.global.gpu.acq_rel.add.u32"}, "of a group, of all groups"
    for i in atomics:
        assert steps[i - 1] == steps[i + 1] == "bar.sync", "before, for the stores; behind, for the answer"
        assert "st.global" in steps[:i] and "ld.global.cg" in steps[i:]


def test_products_are_on_tensor_cores() -> None:
    """One product where the Plan asks for it, three elsewhere; never the default of Triton."""
    found = {launch.arguments["PRECISION"] for launch in distinct(mode).values() if "PRECISION" in launch.arguments}
    assert found == {"tf32", "tf32x3", "bf16", "bf16x3"}


def test_no_layout_without_memory_takes_any() -> None:
    """Bytes are counted on the device "meta"."""
    lowering = Lowering(random_case(random.Random(1)).plan(), Bucket(3, 7, 6), "meta")
    assert sum(lowering.bytes.values()) > 0 and lowering.storage.finite.is_meta
