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
from random_programs import Case, error, gradients, norm, numbers_for, random_case
from test_torch_executor import OPTIONS, focal, option_case, run_halves, small_program
from torch import Tensor

import fastmaml
from fastmaml.executors import torch_kernels
from fastmaml.executors.call import Results
from fastmaml.executors.cuda import CudaExecutor
from fastmaml.executors.mixed import MixedExecutor
from fastmaml.executors.torch import Task, TorchExecutor
from fastmaml.executors.triton import INTERPRETED, TritonExecutor, Workspace
from fastmaml.executors.triton_fused import Fused, Sums
from fastmaml.executors.triton_fusion import fuse
from fastmaml.executors.triton_lowering import Lowering
from fastmaml.executors.triton_rules import RULES
from fastmaml.executors.triton_rules.products import Geometry, product
from fastmaml.executors.triton_site import Site
from fastmaml.executors.triton_storage import Bucket, Storage, View
from fastmaml.optimizers import SGD, ImplicitGradient
from fastmaml.plan import Arrangement, Plan, Rate
from fastmaml.plan.instructions import Buffer, Group, Instruction, Phase, Reduction, Ref, Segment
from fastmaml.plan.parts import divide
from fastmaml.program import Loss, ProgramBuilder


def patch_once() -> None:
    """The interpreter replaces the functions of triton.language at every call, which takes most of its time; in this process once is enough."""
    from triton.runtime import interpreter

    original, done = interpreter._patch_lang, set()

    def once(fn: Any) -> Any:
        names = frozenset(name for name, value in fn.__globals__.items() if value is tl or value is tl.core)
        if names not in done:
            done.add(names)
            original(fn)
            tl.tensor.__index__ = lambda self: self.handle.data.item()  # Triton 3.6 asks numpy 2.4 for what it no longer does
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = once


if INTERPRETED:
    patch_once()
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
ZERO = 1e-6  # gradients below are zero to float32's rounding
reached: set[str] = set()  # kernels of instructions that were judged
seen: dict[tuple, set[str]] = {}  # by kernel and operands: shapes that were


def on_device(case: Case) -> Case:
    def move(tensors: dict) -> dict:
        return {name: v.to(DEVICE) for name, v in tensors.items()}

    moved = {"leaves": move(case.leaves), "rates": move(case.rates), "weights": move(case.weights)}
    return dataclasses.replace(case, batch=case.batch.to(DEVICE), **moved)


# ------------------------------------------------------------------------------------------------------ single instructions


def judge(what: str, norms: list[float]) -> None:
    """Rule (c), and what rounding the inputs would change. A result of few numbers may be right by luck: these are judged together."""
    wrong, plain, moved, size = norms
    allowed = 2 * plain + 2.0**-21 * size + 8 * moved
    assert wrong <= allowed, f"{what}: error {wrong:.3g} of {size:.3g}, allowed {allowed:.3g}"


def parts_of(instr: Instruction) -> tuple[Instruction, ...]:
    return instr.parts if isinstance(instr, Fused) else (instr,)


class Lockstep(TorchExecutor):
    """Runs a Plan in float64; each instruction that is new also by Triton, on the same inputs, and judges what comes out. ``fused``: of the fused Plan, of
    which the torch executor runs the parts."""

    def judge_all(self, case: Case, fused: bool = False) -> None:
        self.lowered = fuse(self.plan) if fused else self.plan
        self.workspace = Workspace(self.lowered, Bucket.of(case.batch.support_sizes, case.batch.query_sizes), DEVICE, "highest")
        self.workspace.describe(case.batch)
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


INNER = (  # what is not a plain step
    {"optimizer": SGD(momentum=0.5, dampening=0.3, max_norm=0.1)},
    {"optimizer": SGD(weight_decay=0.1, clip_value=0.01)},
    {"meta_gradient": ImplicitGradient(cg_steps=2)},
)


def instruction_cases() -> Iterator[tuple[str, Case, Plan]]:
    for conv, seeds in CHOSEN.items():
        for seed in seeds:
            case = random_case(random.Random(seed), conv=conv, native=seed % 4 == 1, steps=1 + seed % 2)
            yield f"{'images' if conv else 'rows'}, random.Random({seed})", case, case.plan()
    for kind, option in (("linear", "factored-learned"), ("conv", "plain")):
        case = option_case(kind, False, "constant", option)
        yield option, case, case.plan()
    for changes in INNER:
        case = small("linear", "plain", 2, **changes)
        yield str(changes), case, case.plan()
    yield "matrices", *matrices()
    for kind in ("rows", "images"):
        yield f"fusible {kind}", *fusible(kind)
    yield "patches", *patches()
    yield "summed", summed(), summed().plan()
    b = ProgramBuilder((5,))
    v = b.op("batchnorm", b.op("linear", 0, b.leaf("body", (4, 5), "outer")), eps=1e-3, statistics="joint")
    program = b.build(b.op("linear", v, b.leaf("head", (3, 4), "adapted")))
    case = numbers_for(program, Arrangement(steps=1, rates={"head": Rate("lr")}), 0, [(3, 2), (5, 4)])
    yield "joint", case, case.plan()


def matrices() -> tuple[Case, Plan]:
    """What random Programs leave out: layers over samples that are matrices or images, in every mode."""
    b = ProgramBuilder((3, 4, 5))
    v = b.op("layernorm", 0, b.leaf("ln.g", (4, 5), "adapted"), b.leaf("ln.b", (4, 5), "adapted"), eps=1e-3, dims=2)
    v = b.op("linear", v, b.leaf("w0", (6, 5), "adapted"), b.leaf("b0", (6,), "adapted"))
    v = b.op("groupnorm", v, b.leaf("gn.g", (3,), "adapted"), b.leaf("gn.b", (3,), "adapted"), eps=1e-3, groups=1)
    v = b.op("reshape", v, shape=(4, 18))
    v = b.op("batchnorm", v, b.leaf("bn.g", (4,), "adapted"), b.leaf("bn.b", (4,), "adapted"), eps=1e-3, statistics="batch")
    v = b.op("linear", b.op("tanh", v), b.op("transpose", b.leaf("w1", (18, 3), "adapted")), None)
    v = b.op("layernorm", v, b.leaf("l2.g", (3,), "adapted"), None, eps=1e-3, dims=1)
    v = b.op("linear", b.op("reshape", v, shape=(12,)), b.op("slice", b.leaf("w2", (6, 12), "adapted"), dim=0, start=1, stop=5), b.leaf("b2", (4,), "adapted"))
    program = b.build(v)
    a = Arrangement(steps=2, rates={leaf.name: Rate("lr") for leaf in program.leaves})
    case = numbers_for(program, a, 0, [(3, 2), (5, 4)])
    return case, case.plan()


def patches() -> tuple[Case, Plan]:
    """A convolution of the samples of which so many outputs are normalised that their statistics are made of the moments of its patches."""
    b = ProgramBuilder((2, 5, 6))
    v = b.op("conv2d", 0, b.leaf("w", (19, 2, 2, 3), "adapted"), b.leaf("b", (19,), "adapted"), stride=(2, 1), padding=(1, 0, 0, 2))
    v = b.op("relu", b.op("batchnorm", v, b.leaf("bn.g", (19,), "adapted"), b.leaf("bn.b", (19,), "adapted"), eps=1e-3, statistics="batch"))
    v = b.op("global_avgpool2d", b.op("maxpool2d", v, kernel=(2, 2), stride=(2, 2), padding=(0, 0)))
    program = b.build(b.op("linear", v, b.leaf("head", (3, 19), "adapted"), None))
    a = Arrangement(steps=1, rates={leaf.name: Rate("lr") for leaf in program.leaves})
    case = numbers_for(program, a, 0, [(3, 2), (5, 4)])
    plan = case.plan()
    assert plan.count("patch_stats")
    return case, plan


def fusible(kind: str) -> tuple[Case, Plan]:
    """relu and leaky_relu behind and before products and batchnorm, in ragged tasks of odd shapes."""
    b = ProgramBuilder((5,) if kind == "rows" else (2, 5, 7))
    names = iter(range(99))

    def leaf(*shape: int) -> int:
        return b.leaf(f"p{next(names)}", shape, "adapted")

    def batchnorm(v: int, channels: int) -> int:
        return b.op("batchnorm", v, leaf(channels), leaf(channels), eps=1e-3, statistics="batch")

    if kind == "rows":
        v = b.op("relu", b.op("linear", 0, leaf(7, 5), leaf(7)))
        v = b.op("leaky_relu", b.op("linear", v, leaf(9, 7), leaf(9)), slope=0.1)
        v = b.op("relu", batchnorm(v, 9))
        last = 9
    else:
        v = b.op("relu", b.op("conv2d", 0, leaf(3, 2, 3, 3), leaf(3), stride=(2, 1), padding=(1, 1, 0, 1)))
        v = b.op("relu", b.op("conv2d", v, leaf(4, 3, 2, 3), None, stride=(1, 2), padding=(0, 0, 1, 1)))
        v = b.op("leaky_relu", batchnorm(v, 4), slope=0.2)
        v = b.op("relu", batchnorm(b.op("conv2d", v, leaf(6, 4, 2, 3), leaf(6), stride=(1, 1), padding=(0, 0, 0, 0)), 6))
        v = b.op("reshape", v, shape=(6,))
        last = 6
    program = b.build(b.op("linear", v, leaf(3, last), leaf(3)))
    a = Arrangement(steps=2 if kind == "rows" else 1, rates={leaf.name: Rate("lr") for leaf in program.leaves})
    case = numbers_for(program, a, 0, [(3, 1), (5, 2)])
    return case, case.plan()


def summed() -> Case:
    """Batchnorm behind products whose rows are several tiles, of ragged tasks; of more channels than a tile has; behind and in front of pools; without gamma."""
    b = ProgramBuilder((2, 9, 11))
    names = iter(range(99))

    def leaf(*shape: int) -> int:
        return b.leaf(f"p{next(names)}", shape, "adapted")

    def batchnorm(v: int, gamma: int | None, beta: int | None) -> int:
        return b.op("batchnorm", v, gamma, beta, eps=1e-3, statistics="batch")

    v = b.op("conv2d", 0, leaf(3, 2, 2, 2), leaf(3), stride=(1, 1), padding=(1, 0, 0, 1))
    v = batchnorm(v, leaf(3), leaf(3))
    v = batchnorm(b.op("conv2d", v, leaf(70, 3, 1, 1), None, stride=(1, 1), padding=(0, 0, 0, 0)), None, leaf(70))
    v = b.op("relu", b.op("maxpool2d", v, kernel=(2, 1), stride=(3, 2), padding=(0, 0)))
    v = batchnorm(b.op("conv2d", v, leaf(5, 70, 3, 2), leaf(5), stride=(1, 2), padding=(0, 0, 0, 0)), leaf(5), None)
    v = b.op("reshape", b.op("maxpool2d", v, kernel=(1, 3), stride=(1, 3), padding=(0, 0)), shape=(5,))
    v = batchnorm(b.op("linear", v, leaf(6, 5), leaf(6)), leaf(6), leaf(6))
    program = b.build(b.op("linear", v, leaf(3, 6), leaf(3)))
    a = Arrangement(steps=1, rates={leaf.name: Rate("lr") for leaf in program.leaves})
    return numbers_for(program, a, 0, [(3, 1), (2, 2)])


MODES = {"fwd": "relu_fwd", "jvp": "relu_jvp", "bwd_input": "relu_bwd", "bwd_input_jvp": "relu_bwd_jvp"}
FUSED = [f"{op}_{mode}+{relu}" for op in ("linear", "conv2d", "batchnorm") for mode, relu in MODES.items()]
FUSED += [f"{op}_{stats}" for op in ("linear", "conv2d") for stats in ("fwd+batchnorm_stats_fwd", "jvp+batchnorm_stats_jvp", "bwd_input+batchnorm_bwd_stats")]
FUSED += [f"conv2d_bwd_input{jvp}+relu_bwd{jvp}+batchnorm_bwd_stats{jvp}" for jvp in ("", "_jvp")] + ["conv2d_bwd_input_jvp+batchnorm_bwd_stats_jvp"]
FUSED += ["batchnorm_maxpool2d_fwd+batchnorm_fwd+relu_fwd", "maxpool2d_replay+batchnorm_fwd+relu_replay", "maxpool2d_jvp+batchnorm_jvp+relu_jvp"]
FUSED += [f"batchnorm_bwd_input{jvp}+maxpool2d_bwd{jvp}" for jvp in ("", "_jvp")]
FUSED += [f"{op}_bwd_weight{jvp}" for op in ("linear", "conv2d") for jvp in ("+sgd_fwd", "_jvp+axpy_fwd")]
FUSED += ["patch_stats_bwd+add_fwd+sgd_fwd", "patch_stats_bwd_jvp+add_fwd"]
NOT_IN_PLANS = {f"{op}_replay" for op in ("batchnorm_maxpool2d",)}  # of replayed runs, which are the torch executor's


def test_single_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastmaml.executors.triton_rules.products.GROUP", 2)
    for name, case, plan in instruction_cases():
        print(name)
        Lockstep(plan).judge_all(on_device(case))
        Lockstep(plan).judge_all(on_device(case), fused=True)
    assert set(torch_kernels.KERNELS) - reached <= NOT_IN_PLANS, "no case reaches these"
    assert set(FUSED) <= reached, "no case reaches these"
    assert set(torch_kernels.KERNELS) - set(RULES) <= NOT_IN_PLANS, "these have no rule"


# ------------------------------------------------------------------------------------------------------------- whole Plans


def replayed(case: Case, plan: Plan, masks: dict, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Gradients of the torch executor with the decisions of another run."""
    values = TorchExecutor(plan).forward(case.call(dtype, replay=masks)).values
    return {name: v for name, v in values.items() if isinstance(name, str) and name.startswith("grad.")}


def judge_plan(case: Case, bound: float = 1e-5) -> Results:
    """Rule (a): with equal masks within ``bound`` of float64, or of what rounding explains. "highest": what float32 can do."""
    case = on_device(case)
    plan = case.plan(record_masks=True)
    results = TritonExecutor(plan, "highest").forward(case.call(torch.float32, record=True))
    masks = {key: value for key, value in results.values.items() if isinstance(key, tuple)}
    truth = replayed(case, plan, masks)
    assert results.finite.all() and norm(truth) > 0
    worst = error(results.values, truth, ZERO)
    if worst > bound:
        plain, moved = replayed(case, plan, masks, torch.float32), replayed(case.moved(6e-8), plan, masks)
        allowed = 8 * (error(plain, truth, ZERO) + error(moved, truth, ZERO))
        assert worst <= allowed, f"error {worst:.2g}, conditioning explains {allowed:.2g}"
    return results


QUICK = [("conv", "support")] + [("linear", o) for o in ("multi-step-from-1", "learned-per-tensor-and-step", "mse-divisor", "one-row", "ways", "factored-learned")]


def small(kind: str, option: str, steps: int = 2, tasks: tuple[int, ...] = (0, 2), **changes: Any) -> Case:
    """An option of test_torch_executor.py with fewer steps and tasks."""
    case = option_case(kind, False, "constant", option)
    rates = {r.name: case.rates[r.name][:steps] if r.per_step else case.rates[r.name] for r in case.arrangement.rates.values()}
    weights = case.weights | {"step_weights": case.weights["step_weights"][: steps + 1]}
    batch = case.batch.select([t for t in tasks if t < len(case.batch)])
    arrangement = dataclasses.replace(case.arrangement, steps=steps, **changes)
    return dataclasses.replace(case, arrangement=arrangement, rates=rates, weights=weights, batch=batch)


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
    monkeypatch.setattr("fastmaml.executors.triton_rules.norms.CHUNK", 24)
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
    monkeypatch.setattr("fastmaml.executors.triton_fusion_norms.SUMMED", {})
    monkeypatch.setattr("fastmaml.executors.triton_rules.products.CHUNK", chunk)
    monkeypatch.setattr("fastmaml.executors.triton_rules.norms.CHUNK", chunk)
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
    monkeypatch.setattr("fastmaml.executors.triton_rules.products.GROUP", group)
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
    monkeypatch.setattr("fastmaml.executors.triton_rules.products.GROUP", 2)
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


@pytest.mark.parametrize(("kind", "option"), QUICK)
def test_options(kind: str, option: str) -> None:
    judge_plan(small(kind, option))


@pytest.mark.parametrize("changes", INNER, ids=["norm", "value", "implicit"])
def test_inner_optimizers(changes: dict) -> None:
    judge_plan(small("linear", "plain", 2, **changes))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["conv", "linear"])
@pytest.mark.parametrize("option", OPTIONS)
def test_all_options(kind: str, option: str) -> None:
    judge_plan(option_case(kind, False, "constant", option))


@pytest.mark.parametrize(("steps", "first_order"), [(0, False), (1, False), (1, True)])
def test_few_steps_and_first_order(steps: int, first_order: bool) -> None:
    judge_plan(small("conv", "plain", steps, first_order=first_order, memory="fast"))


@pytest.mark.parametrize(("kind", "bounds"), [("linear", (1e-5, 5e-3, 3e-2)), ("conv", (1e-5, 5e-3, 3e-2))])
def test_precisions(kind: str, bounds: tuple[float, ...]) -> None:
    """Those of DESIGN.md, section 5. The interpreter rounds to bfloat16, and computes all other products in float32."""
    case = on_device(small(kind, "plain", 2))
    truth = gradients(TorchExecutor(case.plan()).forward(case.call()), case.leaves)
    errors = []
    for precision, bound in zip(("highest", "high", "medium"), bounds, strict=True):
        results = TritonExecutor(case.plan(), precision).forward(case.call(torch.float32))
        errors.append(error(gradients(results, case.leaves), truth, ZERO))
        assert results.precision == precision and errors[-1] <= bound
    assert errors[2] > 10 * errors[0], "medium rounds to bfloat16"


def test_a_rate_of_each_task() -> None:
    """With a factored first layer: rows of every task are scaled by its own number."""
    case = small("linear", "factored", 2)
    rates = {name: dataclasses.replace(rate, home="task") for name, rate in case.arrangement.rates.items()}
    case = dataclasses.replace(case, arrangement=dataclasses.replace(case.arrangement, rates=rates), rates={"lr": torch.tensor([0.2, 0.1])})
    case = on_device(case)
    plan = case.plan()
    truth = {}
    for t in range(2):  # a batch of one, with its rate
        one = dataclasses.replace(case, batch=case.batch.select(t), rates={"lr": case.rates["lr"][t]})
        one = dataclasses.replace(one, arrangement=dataclasses.replace(one.arrangement, rates=small("linear", "factored", 2).arrangement.rates))
        for name, g in gradients(TorchExecutor(one.plan()).forward(one.call()), case.leaves).items():
            truth[name] = truth.get(name, 0) + g / 2
    got = gradients(TritonExecutor(plan, "highest").forward(case.call(torch.float32)), case.leaves)
    assert error(got, truth, ZERO) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv"])
def test_random_programs(conv: bool) -> None:
    for seed in range(100, 112):
        print(f"random.Random({seed})")
        judge_plan(random_case(random.Random(seed), conv))


def test_halves_around_a_torch_loss() -> None:
    case = on_device(small("linear", "learned-rate", 1))
    plan = case.plan(entry="halves")
    losses, truth = run_halves(TorchExecutor(plan), case, focal)
    executor = TritonExecutor(plan, "highest")
    for _ in range(2):  # the second time in the same workspace
        got, values = run_halves(executor, case, focal, torch.float32)
        assert torch.allclose(got.double(), losses, rtol=1e-4)
        names = [n for n in truth if isinstance(n, str) and n.startswith("grad.")]
        assert error({n: values[n] for n in names}, {n: truth[n] for n in names}, ZERO) <= 1e-4
    assert sum(map(len, executor._idle.values())) == 1, "the workspace went back"


class OnTheHost(CudaExecutor):
    """The cuda executor, where there is no GPU as host code."""

    def __init__(self, plan: Plan) -> None:
        host = pytest.importorskip("fastmaml._cuda_host") if INTERPRETED else None
        super().__init__(plan, native=host)


@pytest.mark.parametrize("entry", ["train", "halves"])
@pytest.mark.parametrize("option", ["plain", "learned-per-tensor-and-step"])
def test_around_an_inner_loop_on_another(option: str, entry: str) -> None:
    """ANIL: the body here, the head's inner loop on the cuda executor, with equal masks; twice, for the second call of a GPU replays graphs."""
    case = small("conv", option)
    program = small_program("conv", outer=("body", "norm"))
    rates = {name: rate for name, rate in case.arrangement.rates.items() if name.startswith("head")}
    case = on_device(dataclasses.replace(case, program=program, arrangement=dataclasses.replace(case.arrangement, rates=rates)))
    plan = case.plan(entry=entry, record_masks=True)
    parts = divide(plan, lambda segment: "elsewhere" if segment.name.startswith(("prologue", "epilogue")) else None)
    around = TritonExecutor(parts.around, "highest")
    executor = MixedExecutor(plan, parts, around, OnTheHost(parts.inside))
    for _ in range(2):
        got, truth = executor.forward(case.call(torch.float32, record=True)), TorchExecutor(plan)
        assert got.executor == "triton + cuda" and got.precision == "highest" and got.finite.all()
        masks = {key: value for key, value in got.values.items() if isinstance(key, tuple)}
        exact = truth.forward(case.call(replay=masks))
        assert {name for name, _ in masks} == {name for name in plan.results if plan.buffers[name].kind in ("mask", "index")}
        assert error({"z": got.values["logits"]}, {"z": exact.values["logits"]}, ZERO) <= 1e-5
        if entry == "halves":
            given = {"dlogits": torch.tanh(exact.values["logits"])}
            got, exact = executor.reverse(got.state, given), truth.reverse(exact.state, given)
        names = [name for name in plan.results if name.startswith("grad.")]
        assert got.all_finite and error(got.values, {name: exact.values[name] for name in names}, ZERO) <= 1e-5
    del got
    assert sum(map(len, around._idle.values())) == 1, "the workspace went back"


def test_what_comes_late_decides_on_the_sums() -> None:
    """A task that the inner loop has lost is in none of the sums; what is late may have steps."""
    b = ProgramBuilder((3,))
    v = b.op("tanh", b.op("linear", 0, b.leaf("body", (4, 3), "outer")))
    program = b.build(b.op("linear", v, b.leaf("head", (2, 4), "adapted")))
    a = Arrangement(steps=2, loss=Loss("mse"), rates={"head": Rate("lr", (2, 4), True, True)})
    case = on_device(numbers_for(program, a, 0, [(3, 2), (2, 4), (4, 1)]))
    case.batch.query_y[2] = 1e20  # of task 1: its loss is infinite, and nothing else
    plan, names = case.plan(), ("grad.body", "grad.head", "grad.lr")
    parts = divide(plan, lambda segment: "elsewhere" if segment.name.startswith(("prologue", "epilogue")) else None)
    got = MixedExecutor(plan, parts, TritonExecutor(parts.around, "highest"), OnTheHost(parts.inside)).forward(case.call(torch.float32))
    weights = torch.tensor([1 / 3, 0.0, 1 / 3], dtype=torch.float64)
    truth = TorchExecutor(plan).forward(case.call(task_weights=weights)).values
    assert got.finite.tolist() == [True, False, True] and not got.all_finite
    assert error(got.values, {name: truth[name] for name in names}, ZERO) <= 1e-5


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(2, 5, 3, padding=1), torch.nn.BatchNorm2d(5), torch.nn.ReLU(), torch.nn.MaxPool2d(2)
    return torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(45, 3)).to(DEVICE)


def tasks_for(sizes: list[tuple[int, int]]) -> fastmaml.TaskBatch:
    generator = torch.Generator().manual_seed(1)

    def rows(n: int) -> tuple[Tensor, Tensor]:
        return torch.randn(n, 2, 6, 6, generator=generator), torch.arange(n) % 3

    return fastmaml.TaskBatch.from_tasks([(*rows(s), *rows(q)) for s, q in sizes]).to(DEVICE)


def gradient(maml: fastmaml.MAML) -> Tensor:
    return torch.cat([p.grad.double().flatten() for p in maml.parameters()])


def test_what_users_call() -> None:
    """Ragged tasks through MAML: the gradient of the torch backend; the bits of a task in any batch; adapted networks; errors that name the reason."""
    batch, found = tasks_for([(3, 4), (6, 2)]), {}
    for backend in ("torch", "triton"):
        maml = fastmaml.MAML(net().double() if backend == "torch" else net(), inner_lr=0.05, inner_steps=1, backend=backend, precision="highest")
        out = maml(batch if backend == "triton" else batch.to(torch.float64))
        out.loss.backward()
        assert out.executor == backend
        found[backend] = gradient(maml)
    assert float((found["triton"] - found["torch"]).norm() / found["torch"].norm()) <= 1e-4
    assert out.precision == "highest" and out.loss.device == batch.device and maml.memory_bytes(batch)["run"] > 0
    alone = maml(batch.select([1]))
    same = torch.allclose if INTERPRETED else torch.equal  # numpy's products depend on where a row lies; a GPU's do not
    assert same(alone.task_losses, out.task_losses[1:])
    adapted = maml.adapt(batch)
    assert [z.shape for z in adapted([batch.task(t)[2] for t in range(2)])] == [(4, 3), (2, 3)]
    assert adapted.module(1)(batch.task(1)[2]).shape == (2, 3)
    with pytest.raises(RuntimeError, match="float64"):
        fastmaml.MAML(net().double(), backend="triton").plan(batch.to(torch.float64))


def last_gradients() -> Plan:
    """Two weight gradients that are the last terms of sums over tasks, and a loss, by themselves: of a convolution and of a linear layer, which end in
    theta_bar - rate g."""
    attrs = {"stride": (2, 1), "padding": (1, 0, 0, 2), "input_shape": (8, 5, 6), "weight_shape": (7, 8, 3, 3)}
    layers = {"conv2d": ((8, 5, 6), (7, 2, 6), (7, 8, 3, 3), attrs), "linear": ((2, 70), (2, 3), (3, 70), {})}
    buffers, instructions = [Buffer("lr", home="meta"), Buffer("loss", home="task"), Buffer("loss.query", home="task")], []
    instructions.append(Instruction("copy_fwd", (Ref("loss"),), (Ref("loss.query"),)))
    for op, (x, y, w, attrs) in layers.items():
        buffers += [Buffer(f"{op}.{name}", shape, "support", home="run") for name, shape in (("x", x), ("dy", y), ("xt", x), ("dyt", y))]
        buffers += [Buffer(f"{op}.{name}", shape, home="run") for name, shape in (("dw", w), ("db", w[:1]), ("w_bar", w), ("b_bar", w[:1]))]
        buffers += [Buffer(f"grad.{op}.{name}", shape, home="meta") for name, shape in (("w_bar", w), ("b_bar", w[:1]))]
        rows, dw, db, w_bar, b_bar = (tuple(Ref(f"{op}.{name}") for name in names) for names in (("x", "dy", "xt", "dyt"), ("dw",), ("db",), ("w_bar",), ("b_bar",)))
        instructions.append(Instruction(f"{op}_bwd_weight_jvp", rows, dw + db, attrs))
        instructions += [Instruction("axpy_fwd", (*bar, *g, Ref("lr")), bar, {"sign": -1.0}) for bar, g in ((w_bar, dw), (b_bar, db))]
    reductions = tuple(Reduction(Ref(b.name.removeprefix("grad.")), b.name) for b in buffers if b.name.startswith("grad."))
    inputs = tuple(b.name for b in buffers if b.name.split(".")[-1] in ("lr", "loss", "x", "dy", "xt", "dyt", "w_bar", "b_bar") and not b.name.startswith("grad."))
    segment = Segment("hvp", tuple(Group((instr,), None) for instr in instructions))
    return Plan("last", 1, {b.name: b for b in buffers}, {"hvp": segment}, (Phase(("hvp",)),), reductions, ("loss.query", *(r.target for r in reductions)), inputs)


def spoil(values: dict[str, list[Tensor]], place: str) -> None:
    """Something of task 1 is not finite: or all is, but not its gradient."""
    if place == "loss":
        values["loss"][1][()] = torch.nan
    elif place == "adjoint":
        values["conv2d.dyt"][1][0, 3, 1, 2] = torch.inf
    elif place == "theta_bar":
        values["linear.w_bar"][1][2, 69] = -torch.inf
    elif place == "gradient":
        values["conv2d.x"][1][0, 5, 2, 3] = values["conv2d.dyt"][1][0, :, 1, 3] = 2.0**70


class Walled(Storage):
    """Behind every array of floats lie more, which are no numbers."""

    def _new(self, home: str, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
        array = super()._new(home, numel + 1000, dtype)
        return (array.fill_(torch.nan) if dtype.is_floating_point else array.zero_())[:numel]


@pytest.mark.parametrize("programs", [1, 3, 10**6])  # all tasks by one program, some, each by its own
@pytest.mark.parametrize("place", ["nowhere", "loss", "adjoint", "theta_bar", "gradient"])
def test_last_gradients_of_tasks_that_are_not_finite(place: str, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule (c), for the sum over those that are."""
    monkeypatch.setattr("fastmaml.executors.triton_sums.PROGRAMS", programs)
    monkeypatch.setattr("fastmaml.executors.triton_lowering.Storage", Walled)
    generator, sizes, plan = torch.Generator().manual_seed(0), (3, 1, 4, 1, 2), last_gradients()

    def numbers(b: Buffer) -> list[Tensor]:
        return [torch.randn(([n] if b.rows else []) + list(b.shape), generator=generator) for n in (sizes if b.home != "meta" else (1,))]

    values = {name: numbers(plan.buffers[name]) for name in plan.inputs}
    spoil(values, place)
    weights = [0.5, 3.0, 1.0, 0.25, 2.0]
    there = [t for t in range(5) if place == "nowhere" or t != 1]

    def truth(op: str, change) -> tuple[Tensor, ...]:
        v = {name.removeprefix(f"{op}."): [change(x) for x in of] for name, of in values.items()}
        attrs = next(instr.attrs for _, instr in plan.instructions() if instr.kernel.startswith(op))
        found = [torch_kernels.KERNELS[f"{op}_bwd_weight_jvp"](None, attrs, *(v[name][t] for name in ("x", "dy", "xt", "dyt"))) for t in range(5)]
        return tuple(sum(weights[t] * (v[bar][t] - v["lr"][0] * found[t][i]) for t in there) for i, bar in enumerate(("w_bar", "b_bar")))

    workspace = Workspace(fuse(plan), Bucket(5, 4, 1), DEVICE, "highest")
    groups = {1: {5}, 3: {3}, 10**6: {1}}[programs]
    assert {summed.group for summed in workspace.lowering.sums.values()} == groups and len(workspace.lowering.sums) == 2
    workspace.describe(fastmaml.TaskBatch.from_tasks([(torch.zeros(n, 1), torch.zeros(n), torch.zeros(1, 1), torch.zeros(1)) for n in sizes]))
    storage = workspace.storage
    storage.task_weights.copy_(torch.tensor(weights))
    for name, of in values.items():
        b = plan.buffers[name]
        storage.write(name, torch.cat(of) if b.rows else torch.stack(of) if b.home != "meta" else of[0])
    for summed in workspace.lowering.sums.values():
        if summed.partial:
            summed.partial.data.fill_(torch.nan)
    workspace.run(0)
    assert storage.finite.tolist() == [int(t in there) for t in range(5)]
    for op in ("conv2d", "linear"):
        moved = [truth(op, lambda v: v.double() * (1 + 2.0**-24 * torch.randn(v.shape, generator=generator, dtype=torch.float64)))]
        for exact, plain, near, bar in zip(truth(op, Tensor.double), truth(op, Tensor.float), *moved, ("w_bar", "b_bar"), strict=True):
            got = storage.read(f"grad.{op}.{bar}", 0).cpu()
            judge(f"{op} {bar}", [float((v.double() - exact).norm()) for v in (got, plain, near)] + [float(exact.norm())])


LAST = [("rows", 2, {}), ("images", 1, {}), ("images", 1, {"first_order": True}), ("rows", 0, {}), ("rows", 1, {"query_from": 0}), ("rows", 2, INNER[0])]


@pytest.mark.parametrize(("kind", "steps", "changes"), LAST, ids=str)
def test_last_gradients_in_the_accumulator(kind: str, steps: int, changes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whole Plans: at the first step, or of the query, where the loss of a state joins in last, and with momentum."""
    monkeypatch.setattr("fastmaml.executors.triton_sums.PROGRAMS", 2)
    case = fusible(kind)[0]
    case = numbers_for(case.program, dataclasses.replace(case.arrangement, steps=steps, **changes), 0, [(3, 1), (5, 2), (1, 3), (4, 4), (2, 1)])
    judge_plan(dataclasses.replace(case, task_weights=torch.tensor([0.3, 1.0, 2.0, 0.5, 0.1], dtype=torch.float64)))
    found = [launch.kernel.__name__ for half in Lowering(fuse(case.plan()), Bucket(5, 8, 4), "meta").halves for launch in half]
    assert found.count("conv2d_weight_tasks") == {"rows": 3, "images": 4}[kind]


@pytest.mark.parametrize("programs", [256, 1])  # last gradients by task, summed in the accumulator
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_tasks_that_are_not_finite(kind: str, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastmaml.executors.triton_sums.PROGRAMS", programs)
    case = on_device(small(kind, "plain", 1, (0, 1, 2)))
    batch = case.batch
    good = TritonExecutor(case.plan()).forward(dataclasses.replace(case, batch=batch.select([0, 2])).call(torch.float32))
    batch.support_x[batch.support_sizes[0]] = float("nan")  # of task 1
    weights = torch.tensor([0.5, 7.0, 0.5], dtype=torch.float64)
    executor = TritonExecutor(case.plan())
    for _ in range(2):  # the second time in the same workspace
        results = executor.forward(case.call(torch.float32, task_weights=weights))
        assert results.finite.tolist() == [True, False, True] and not results.all_finite
        for name, value in good.values.items():
            if name.startswith("grad."):
                assert torch.allclose(results.values[name], value, rtol=1e-5, atol=1e-6), name
    (workspace,) = (w for kept in executor._idle.values() for w in kept)
    assert any(summed.group > 1 for summed in workspace.lowering.sums.values()) == (programs == 1)


def test_out_of_memory_names_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    case = on_device(small("linear", "plain", 0))
    executor = TritonExecutor(case.plan())

    def full(*_: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("fastmaml.executors.triton.Workspace", full)
    with pytest.raises(torch.cuda.OutOfMemoryError, match=rf"2 tasks needs {sum(executor.memory(case.batch).values()):,} bytes"):
        executor.forward(case.call(torch.float32))
    monkeypatch.undo()
    assert executor.forward(case.call(torch.float32)).all_finite


def test_objects_make_room_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first allocation fails; what another object has kept is let go, and the second one succeeds."""
    case = on_device(small("linear", "plain", 0))
    first, second = TritonExecutor(case.plan()), TritonExecutor(case.plan())
    first.forward(case.call(torch.float32))
    assert sum(map(len, first._idle.values())) == 1
    fails = [True]

    def tight(*arguments: Any) -> Workspace:
        if fails.pop() if fails else False:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return Workspace(*arguments)

    monkeypatch.setattr("fastmaml.executors.triton.Workspace", tight)
    assert second.forward(case.call(torch.float32)).all_finite and not any(first._idle.values())
    assert first.forward(case.call(torch.float32)).all_finite
