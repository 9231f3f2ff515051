"""The triton executor against the torch executor; test_triton_executor.py runs this file in a process of its own, interpreted or on a GPU.

Every instruction by itself first (rule (c) of DESIGN.md, section 5), on what the torch executor in float64 has in its buffers; then whole Plans.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton.language as tl
from random_programs import Case, error, norm, numbers_for, random_case
from torch import Tensor

import fastmaml
from fastmaml import nn as nets
from fastmaml.executors import torch_kernels
from fastmaml.executors.call import Results
from fastmaml.executors.torch import Task, TorchExecutor
from fastmaml.executors.triton import INTERPRETED, TritonExecutor, Workspace
from fastmaml.executors.triton_storage import Bucket
from fastmaml.plan import Arrangement, Plan, Rate
from fastmaml.plan.instructions import Instruction
from fastmaml.program import Loss, ProgramBuilder
from fastmaml.trace import trace



def patch_once() -> None:
    """The interpreter replaces the functions of triton.language at every call, which takes most of its time; in this process once is enough."""
    from triton.runtime import interpreter

    original, done = interpreter._patch_lang, set()

    def once(fn: Any) -> Any:
        names = frozenset(name for name, value in fn.__globals__.items() if value is tl or value is tl.core)
        if names not in done:
            done.add(names)
            original(fn)
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = once


if INTERPRETED:
    patch_once()
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
ZERO = 1e-6  # gradients below are zero to float32's rounding
reached: set[str] = set()  # kernels of instructions that were judged


def on_device(case: Case) -> Case:
    def move(tensors: dict) -> dict:
        return {name: v.to(DEVICE) for name, v in tensors.items()}

    moved = {"leaves": move(case.leaves), "rates": move(case.rates), "weights": move(case.weights)}
    return dataclasses.replace(case, batch=case.batch.to(DEVICE), **moved)


# ------------------------------------------------------------------------------------------------------ single instructions


class Lockstep(TorchExecutor):
    """Runs a Plan in float64; each instruction that is new also by Triton, on the same inputs, and judges what comes out."""

    def judge_all(self, case: Case) -> None:
        self.workspace = Workspace(self.plan, Bucket.of(case.batch.support_sizes, case.batch.query_sizes), DEVICE, "highest")
        self.workspace.describe(case.batch)
        self.seen: set = set()
        self.case = case
        self.forward(case.call())

    def _phase(self, task: Task, phase, call) -> None:
        raise AssertionError("all tasks at once")

    def _half(self, call, meta, tasks, half) -> Results:
        for phase in self.plan.schedule:
            everybody = [Task(-1, {}, 0, meta)] if phase.scope == "meta" else tasks
            for step in phase.steps():
                for name in phase.segments:
                    for instr in self.plan.segments[name].instructions:
                        self._judge(instr, step, everybody, phase.scope)
            for task in tasks:
                task.env.update(meta)
            if phase.scope != "meta":  # sums over tasks, as what comes after reads them
                self._sum_of_batches(call, meta, tasks, phase)
            if phase is max((p for p in self.plan.schedule if p.scope == "task"), key=self.plan.schedule.index):
                self._reduce(call, meta, tasks)
        return None

    def _sum_of_batches(self, call, meta, tasks, phase) -> None:
        if phase.scope == "batch":
            for name in self._summed(phase):
                meta[name, 0] = sum(task.env[name, 0] for task in tasks)

    def _judge(self, instr: Instruction, step: int, tasks: list[Task], scope: str) -> None:
        shapes = [None if ref is None else (self.plan.buffers[ref.buffer].rows, self.plan.buffers[ref.buffer].shape) for ref in (*instr.inputs, *instr.outputs)]
        homes = [ref is not None and self.plan.buffers[self._key(ref, step)[0]].home == "meta" for ref in instr.inputs]
        key = (instr.kernel, str(shapes), str(dict(instr.attrs)), str(homes), scope)
        sums = scope == "batch" and any(self.plan.buffers[ref.buffer].rows is None for ref in instr.writes())
        new = key not in self.seen and not sums
        self.seen.add(key)
        if new:
            reached.add(instr.kernel)
            launches = self._launches(instr, step, scope)
            for ref in instr.reads():
                self._write(self._key(ref, step), tasks)
        judges = [self._references(instr, step, task) for task in tasks] if new else []
        for task in tasks:
            super()._run(task, instr, step, {})
        if new:
            for launch in launches:
                launch()
            for i, ref in enumerate(instr.outputs):
                if ref is not None:
                    self._compare(instr, i, self._key(ref, step), tasks, judges)

    def _launches(self, instr: Instruction, step: int, scope: str) -> list:
        lowering = self.workspace.lowering
        lowering.site.launches, lowering.site.precision = [], "tf32x3"
        lowering.site.tasks = 1 if scope == "meta" else lowering.bucket.tasks
        lowering._instruction(instr, step, {}, False)
        lowering._place(lowering.site.launches)
        return lowering.site.launches

    def _write(self, key: tuple[str, int], tasks: list[Task]) -> None:
        name, slot = key
        buffer = self.plan.buffers[name]
        values = [task.env[key] for task in tasks]
        if buffer.columns:
            width = self.workspace.storage.bucket.rows(buffer.columns)
            values = [torch.nn.functional.pad(v, (0, width - v.shape[1])) for v in values]
        if buffer.rows:
            value = torch.cat(values)
        elif buffer.home == "meta":
            value = values[0]
        else:
            value = torch.stack(values)
        self.workspace.storage.write_slot(name, slot, value)

    def _references(self, instr: Instruction, step: int, task: Task) -> tuple[tuple, tuple, tuple]:
        """What comes out in float64, in float32, and in float64 when inputs move by rounding; all from what Triton reads, which is float32."""
        generator = torch.Generator().manual_seed(0)
        inputs = [None if ref is None else task.env[self._key(ref, step)] for ref in instr.inputs]
        real = [v is not None and v.dtype == torch.float64 and not self.plan.buffers[r.buffer].columns for v, r in zip(inputs, instr.inputs, strict=True)]

        def run(change) -> tuple:
            changed = [change(v.float()) if r else v for v, r in zip(inputs, real, strict=True)]
            if instr.kernel == "zero_fwd":
                return (torch.zeros(()).expand(task.zeros().shape).double(),)
            out = torch_kernels.KERNELS[instr.kernel](task, instr.attrs, *changed)
            return out if isinstance(out, tuple) else (out,)

        def moved(v: Tensor) -> Tensor:
            return v.double() * (1 + 2.0**-24 * torch.randn(v.shape, generator=generator, dtype=torch.float64).to(v.device))

        return run(Tensor.double), run(lambda v: v), run(moved)

    def _compare(self, instr: Instruction, i: int, key: tuple[str, int], tasks: list[Task], judges: list) -> None:
        name, slot = key
        buffer = self.plan.buffers[name]
        sizes = [task.rows.get(buffer.rows, 0) for task in tasks]
        got = self.workspace.storage.read(name, slot, sum(sizes)) if not buffer.columns else self._gram(name, sizes)
        parts = got.split(sizes) if buffer.rows else [got] if buffer.home == "meta" else list(got)
        for mine, references in zip(parts, judges, strict=True):
            truth, plain, moved = (out[i] for out in references)
            mine = mine[:, : truth.shape[1]] if buffer.columns else mine
            if buffer.kind in ("mask", "index"):
                assert torch.equal(mine.to(truth.dtype), truth), (instr, i)
                continue
            truth = torch.zeros_like(mine, dtype=torch.float64) if truth is None else truth.double()
            errors = [float((v.double() - truth).norm()) for v in (mine, plain, moved) if v is not None]
            allowed = 2 * sum(errors[1:2]) + 2.0**-21 * float(truth.norm()) + 4 * sum(errors[2:])
            assert errors[0] <= allowed, f"{instr}: output {i}, error {errors[0]:.3g} of {float(truth.norm()):.3g}, allowed {allowed:.3g}"

    def _gram(self, name: str, sizes: list[int]) -> Tensor:
        width = self.workspace.storage.bucket.rows("support")
        return self.workspace.storage.slot(name, 0)[: sum(sizes) * width].view(sum(sizes), width)


def instruction_cases() -> Iterator[tuple[str, Case, Plan]]:
    for seed in range(40):
        conv = seed % 2 == 0
        case = random_case(random.Random(seed), conv=conv, native=seed % 4 == 1, steps=1 + seed % 2)
        yield f"{'conv' if conv else 'linear'}-{seed}", case, case.plan(entry="train")
    yield "matrices", *matrices()


def matrices() -> tuple[Case, Plan]:
    """What random Programs leave out: layers over samples that are matrices or images, in every mode."""
    b = ProgramBuilder((3, 4, 5))
    v = b.op("layernorm", 0, b.leaf("ln.g", (4, 5), "adapted"), b.leaf("ln.b", (4, 5), "adapted"), eps=1e-3, dims=2)
    v = b.op("linear", v, b.leaf("w0", (6, 5), "adapted"), b.leaf("b0", (6,), "adapted"))
    v = b.op("groupnorm", v, b.leaf("gn.g", (3,), "adapted"), b.leaf("gn.b", (3,), "adapted"), eps=1e-3, groups=1)
    v = b.op("reshape", v, shape=(4, 18))
    v = b.op("batchnorm", v, b.leaf("bn.g", (4,), "adapted"), b.leaf("bn.b", (4,), "adapted"), eps=1e-3, statistics="batch")
    v = b.op("linear", b.op("tanh", v), b.leaf("w1", (3, 18), "adapted"), None)
    v = b.op("layernorm", v, b.leaf("l2.g", (3,), "adapted"), None, eps=1e-3, dims=1)
    v = b.op("linear", b.op("reshape", v, shape=(12,)), b.leaf("w2", (4, 12), "adapted"), b.leaf("b2", (4,), "adapted"))
    program = b.build(v)
    a = Arrangement(steps=2, rates={leaf.name: Rate("lr") for leaf in program.leaves})
    case = numbers_for(program, a, 0, [(3, 2), (5, 4)])
    return case, case.plan()


@pytest.mark.parametrize("shard", range(4))
def test_single_instructions(shard: int) -> None:
    for i, (name, case, plan) in enumerate(instruction_cases()):
        if i % 4 == shard:
            print(name)
            Lockstep(plan).judge_all(on_device(case))
