"""Every instruction of the triton executor by itself, and fused (rule (c) of DESIGN.md, section 5), on what the torch executor in float64 has in its buffers."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from random_programs import Case, numbers_for, random_case
from test_torch_executor import option_case
from torch import Tensor
from triton_networks import INNER, fusible, matrices, patches, small, summed
from triton_process import DEVICE, judge, on_device

from fastmaml.executors.call import Results
from fastmaml.executors.torch import kernels as torch_kernels
from fastmaml.executors.torch.executor import Task, TorchExecutor
from fastmaml.executors.triton.executor import Workspace
from fastmaml.executors.triton.fused import Fused
from fastmaml.executors.triton.fusion import fuse
from fastmaml.executors.triton.rules import RULES
from fastmaml.executors.triton.storage import Bucket
from fastmaml.plan import Arrangement, Plan, Rate
from fastmaml.plan.instructions import Instruction
from fastmaml.program import ProgramBuilder

reached: set[str] = set()  # kernels of instructions that were judged
seen: dict[tuple, set[str]] = {}  # by kernel and operands: shapes that were


def parts_of(instr: Instruction) -> tuple[Instruction, ...]:
    return instr.parts if isinstance(instr, Fused) else (instr,)


class Lockstep(TorchExecutor):
    """Runs a Plan in float64; each instruction that is new also by Triton, on the same inputs, and judges what comes out. ``fused``: of the fused Plan, of
    which the torch executor runs the parts."""

    def judge_all(self, case: Case, fused: bool = False) -> None:
        self.lowered = fuse(self.plan) if fused else self.plan
        self.workspace = Workspace(self.lowered, Bucket.of(case.batch.support_sizes, case.batch.query_sizes), DEVICE, "highest")
        self.workspace.describe(case.call())
        self.few: dict[tuple[str, int], list[list[float]]] = {}
        self.forward(case.call())
        for what, rows in self.few.items():
            judge(f"{what}", [sum(n * n for n in column) ** 0.5 for column in zip(*rows, strict=True)])

    def _phase(self, task: Task, phase, call) -> None:
        raise AssertionError("all tasks at once")

    def _half(self, call, meta, tasks, half) -> Results:
        for phase in self.plan.schedule:
            everybody = [Task(-1, {}, 0, meta)] if phase.scope == "meta" else tasks
            for step in phase.steps():
                for name in phase.segments:
                    for instr in self.lowered.segments[name].instructions:
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
        sums = scope == "batch" and any(self.plan.buffers[ref.buffer].rows is None for ref in instr.writes())
        new = not sums and self._is_new(instr, step)
        if new:
            reached.add("+".join(part.kernel for part in parts_of(instr)))
            launches = self._launches(instr, step, scope)
            for ref in instr.reads():
                self._write(self._key(ref, step), tasks)
        judges = [self._references(instr, step, task) for task in tasks] if new else []
        for task in tasks:
            for part in parts_of(instr):
                super()._run(task, part, step, {})
        if new:
            for launch in launches:
                launch()
            for i, ref in enumerate(instr.outputs):
                if ref is not None:
                    self._compare(instr, i, self._key(ref, step), tasks, judges)

    def _is_new(self, instr: Instruction, step: int) -> bool:
        """Of each kernel three kinds of shapes, with each set of operands: which are there, and which are one for all tasks."""
        refs = [None if ref is None else self.plan.buffers[self._key(ref, step)[0]] for ref in (*instr.inputs, *instr.outputs)]
        operands = *(part.kernel for part in parts_of(instr)), *(None if b is None else b.home == "meta" for b in refs)
        shapes = str([None if b is None else (b.rows, b.shape) for b in refs]) + str(dict(instr.attrs))
        tried = seen.setdefault(operands, set())
        new = shapes not in tried and len(tried) < 3
        tried.add(shapes)
        return new

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
        made = {ref for part in parts_of(instr) for ref in part.outputs}
        more = (ref for part in parts_of(instr) for ref in part.inputs if ref not in made)  # what is fused away because nothing depends on it
        refs = list(dict.fromkeys((*instr.inputs, *more)))
        inputs = [None if ref is None else task.env[self._key(ref, step)] for ref in refs]
        real = [v is not None and v.dtype == torch.float64 and not self.plan.buffers[r.buffer].columns for v, r in zip(inputs, refs, strict=True)]

        def run(change) -> tuple:
            keys = [None if ref is None else self._key(ref, step) for ref in refs]
            values = {None: None} | {key: change(v.float()) if r else v for key, v, r in zip(keys, inputs, real, strict=True)}
            if instr.kernel == "zero_fwd":
                return (None,)
            for part in parts_of(instr):
                out = torch_kernels.KERNELS[part.kernel](task, part.attrs, *(values[None if ref is None else self._key(ref, step)] for ref in part.inputs))
                made = dict(zip(part.outputs, out if isinstance(out, tuple) else (out,), strict=True))
                values |= {self._key(ref, step): v for ref, v in made.items() if ref is not None}
            return tuple(None if ref is None else values[self._key(ref, step)] for ref in instr.outputs)

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
            norms = [float((v.double() - truth).norm()) if v is not None else 0.0 for v in (mine, plain, moved)] + [float(truth.norm())]
            if mine.numel() < 64:
                self.few.setdefault((instr.kernel, i), []).append(norms)
            else:
                judge(f"{instr}: output {i}", norms)

    def _gram(self, name: str, sizes: list[int]) -> Tensor:
        width = self.workspace.storage.bucket.rows("support")
        return self.workspace.storage.slot(name, 0)[: sum(sizes) * width].view(sum(sizes), width)


CHOSEN = {True: (4, 10, 16, 20, 36, 38), False: (11, 17, 19, 21, 25)}  # seeds that reach much in little time: images, rows


def joint() -> tuple[Case, Plan]:
    b = ProgramBuilder((5,))
    v = b.op("batchnorm", b.op("linear", 0, b.leaf("body", (4, 5), "outer")), eps=1e-3, statistics="joint")
    program = b.build(b.op("linear", v, b.leaf("head", (3, 4), "adapted")))
    case = numbers_for(program, Arrangement(steps=1, rates={"head": Rate("lr")}), 0, [(3, 2), (5, 4)])
    return case, case.plan()


def planned(make: Callable[..., Case], *arguments: Any, **options: Any) -> Callable[[], tuple[Case, Plan]]:
    def made() -> tuple[Case, Plan]:
        case = make(*arguments, **options)
        return case, case.plan()

    return made


CASES: dict[str, Callable[[], tuple[Case, Plan]]] = {
    f"{'images' if conv else 'rows'}, random.Random({seed})": planned(random_case, random.Random(seed), conv=conv, native=seed % 4 == 1, steps=1 + seed % 2)
    for conv, seeds in CHOSEN.items()
    for seed in seeds
}
CASES |= {option: planned(option_case, kind, False, "constant", option) for kind, option in (("linear", "factored-learned"), ("conv", "plain"))}
CASES |= {str(changes): planned(small, "linear", "plain", 2, **changes) for changes in INNER}
CASES |= {"matrices": matrices, "patches": patches, "summed": planned(summed), "joint": joint}
CASES |= {f"fusible {kind}": partial(fusible, kind) for kind in ("rows", "images")}


MODES = {"fwd": "relu_fwd", "jvp": "relu_jvp", "bwd_input": "relu_bwd", "bwd_input_jvp": "relu_bwd_jvp"}
FUSED = [f"{op}_{mode}+{relu}" for op in ("linear", "conv2d", "batchnorm") for mode, relu in MODES.items()]
FUSED += [f"{op}_{stats}" for op in ("linear", "conv2d") for stats in ("fwd+batchnorm_stats_fwd", "jvp+batchnorm_stats_jvp", "bwd_input+batchnorm_bwd_stats")]
FUSED += [f"conv2d_bwd_input{jvp}+relu_bwd{jvp}+batchnorm_bwd_stats{jvp}" for jvp in ("", "_jvp")] + ["conv2d_bwd_input_jvp+batchnorm_bwd_stats_jvp"]
FUSED += ["batchnorm_maxpool2d_fwd+batchnorm_fwd+relu_fwd", "maxpool2d_replay+batchnorm_fwd+relu_replay", "maxpool2d_jvp+batchnorm_jvp+relu_jvp"]
FUSED += [f"batchnorm_bwd_input{jvp}+maxpool2d_bwd{jvp}" for jvp in ("", "_jvp")]
FUSED += [f"{op}_bwd_weight{jvp}" for op in ("linear", "conv2d") for jvp in ("+sgd_fwd", "_jvp+axpy_fwd")]
FUSED += ["patch_stats_bwd+add_fwd+sgd_fwd", "patch_stats_bwd_jvp+add_fwd"]
NOT_IN_PLANS = {f"{op}_replay" for op in ("batchnorm_maxpool2d",)}  # of replayed runs, which are the torch executor's


judged: set[str] = set()


@pytest.mark.parametrize("name", CASES)
def test_single_instructions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastmaml.executors.triton.rules.products.GROUP", 2)
    case, plan = CASES[name]()
    Lockstep(plan).judge_all(on_device(case))
    Lockstep(plan).judge_all(on_device(case), fused=True)
    judged.add(name)


def test_every_instruction_was_reached() -> None:
    if judged != set(CASES):
        pytest.skip("not all cases ran in this process")
    assert set(torch_kernels.KERNELS) - reached <= NOT_IN_PLANS, "no case reaches these"
    assert set(FUSED) <= reached, "no case reaches these"
    assert set(torch_kernels.KERNELS) - set(RULES) <= NOT_IN_PLANS, "these have no rule"
