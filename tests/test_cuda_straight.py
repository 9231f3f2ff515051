"""The source of a Plan's own kernel: as host code the same bits as the walk, by nvcc and NVRTC machine code within the limits of a table; and what
runs where it cannot be compiled. On disk: test_cuda_cubins.py. On a device: test_cuda_device.py."""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from cuda_host import LIMITS, ORDERS, host, on_host, small_net, small_tasks
from executor_cases import net_case, ragged_case, same
from mixed_cases import anil_case, parts_of
from random_programs import Case

import fastmaml
from fastmaml import engine
from fastmaml.executors.cuda import executor as cuda
from fastmaml.executors.cuda import nvrtc
from fastmaml.executors.cuda.executor import KERNELS, CudaExecutor
from fastmaml.executors.mixed import MixedExecutor
from fastmaml.executors.torch.executor import TorchExecutor
from fastmaml.plan import Plan

CSRC = Path(__file__).parent.parent / "csrc"
CXX = shlex.split(os.environ.get("CXX") or "c++")
needs_compiler = pytest.mark.skipif(shutil.which(CXX[0]) is None, reason=f"the compiler {CXX[0]} is not installed")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


def nvrtc_or_skip() -> nvrtc.Nvrtc:
    try:
        return nvrtc.find()
    except nvrtc.Absent as error:
        pytest.skip(str(error))


# ------------------------------------------------------------------------------------------------------------ host code
@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, ModuleType, torch.device], int]:
    """Makes a source a function of this process, its threads the fibers of fastmaml._cuda_host."""
    folder, numbers, kept = tmp_path_factory.mktemp("sources"), itertools.count(), {}
    command = [*CXX, "-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden", f"-I{CSRC}/include", f"-I{CSRC}/cuda"]
    subprocess.run([*command, "-c", f"{CSRC}/cuda/host/fibers.cpp", "-o", f"{folder}/fibers.o"], check=True)

    def compiled(source: str, module: ModuleType, device: torch.device) -> int:
        if source not in kept:
            stem = folder / f"half{next(numbers)}"
            stem.with_suffix(".cpp").write_text(source)
            subprocess.run([*command, "-shared", f"{stem}.cpp", f"{folder}/fibers.o", "-o", f"{stem}.so"], check=True)
            kept[source] = ctypes.CDLL(f"{stem}.so")
        return ctypes.cast(kept[source].fastmaml_half, ctypes.c_void_p).value

    return compiled


CASES: dict[str, Callable[[], Case]] = {
    "second, ragged": functools.partial(ragged_case, "second"),
    "first order, ragged": functools.partial(ragged_case, "first"),
    "factored, ragged": functools.partial(ragged_case, "factored"),
    "losses of every step, ragged": functools.partial(ragged_case, "steps"),
    "sinusoid": functools.partial(net_case, "sinusoid", tasks=4, steps=3),
    "odd": functools.partial(net_case, "mlp-tanh", tasks=3, steps=2, rows=(5, 7)),
}


@needs_compiler
@pytest.mark.parametrize("name", CASES)
def test_the_bits_of_the_walk(name: str, compiler: Callable) -> None:
    case = CASES[name]()
    plan, call = case.plan(), case.call(torch.float32)
    walked = on_host(plan).forward(call)
    for order in ORDERS:
        executor = on_host(plan, order=order, compiler=compiler)
        same(walked, executor.forward(call))
        assert executor.how.endswith("1 so far")
    small = on_host(plan, order="shuffled9", compiler=compiler, shared_limit=1, threads=128)  # tasks in flight beside shared memory
    if name in ("second, ragged", "sinusoid"):
        same(walked, small.forward(call))


@needs_compiler
@pytest.mark.parametrize("entry", ["train", "halves"])
def test_the_inner_loop_of_a_mixed_plan_has_the_bits_of_the_walk(entry: str, compiler: Callable) -> None:
    case = anil_case("learned-per-element-and-step")
    plan, call, found = case.plan(entry=entry), case.call(torch.float32), []
    for options in ({}, {"compiler": compiler, "order": "shuffled3"}):
        parts = parts_of(plan)
        executor = MixedExecutor(plan, parts, TorchExecutor(parts.around), on_host(parts.inside, **options))
        results = executor.forward(call)
        found.append(dict(results.values))
        if entry == "halves":
            found[-1] |= executor.reverse(results.state, {"dlogits": torch.tanh(results.values["logits"])}).values
        assert executor.inside.how.startswith("kernels of") == bool(options)
    assert found[0].keys() == found[1].keys() and len(found[0]) >= 7
    assert all(torch.equal(v, found[1][name]) for name, v in found[0].items())


def normed() -> torch.nn.Module:
    torch.manual_seed(3)
    norm = torch.nn.BatchNorm1d(17, track_running_stats=False)
    return torch.nn.Sequential(torch.nn.Linear(6, 17), norm, torch.nn.ReLU(), torch.nn.Linear(17, 9), torch.nn.Tanh(), torch.nn.Linear(9, 4))


def narrow() -> torch.nn.Module:
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.LeakyReLU(), torch.nn.Linear(9, 4))


METHODS = {
    "batch norm, learned rates": (normed, dict(inner_steps=3, learn_inner_lr=True)),
    "momentum": (narrow, dict(inner_steps=2, inner_optimizer=fastmaml.SGD(momentum=0.9, nesterov=True, weight_decay=1e-3, max_norm=1.0))),
    "layer norm, first order": (small_net, dict(inner_steps=2, first_order=True)),
}


@needs_compiler
@pytest.mark.parametrize("name", METHODS)
def test_the_bits_of_the_walk_through_maml(name: str, compiler: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both halves, and the one of meta_grad."""
    build, options = METHODS[name]
    found = []
    for how in (dict(), dict(compiler=compiler, order="reversed"), dict(compiler=compiler, order="shuffled2")):
        executors: list[CudaExecutor] = []

        def choose(backend: str, plan: Plan, *_, how=how, executors=executors) -> CudaExecutor:
            executors.append(on_host(plan, **how))
            return executors[-1]

        monkeypatch.setattr(engine, "choose", choose)
        maml = fastmaml.MAML(build(), inner_lr=0.1, **options)
        values = [maml(small_tasks()).logits.detach()]
        maml.meta_grad(small_tasks())
        maml(small_tasks(), outer_loss=lambda z, y: torch.nn.functional.cross_entropy(z.flatten(0, 1), y.flatten())).loss.backward()
        found.append([*values, *(p.grad for p in maml.parameters())])
        assert all(executor.how.startswith("kernels of") == bool(how) for executor in executors)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


# --------------------------------------------------------------------------------------------------------------- source
def source_of(case: Case, shared_limit: int = 166912, half: int = 0, threads: int = 0, ranks: int = 1) -> str:
    """For the shared memory of sm_80, and as many threads as the Plan asks for."""
    prepared = CudaExecutor(case.plan(), host, threads=threads, ranks=ranks, shared_limit=shared_limit).prepared(case.batch)
    (support,), (query,) = ({*sizes} if len({*sizes}) == 1 else {-1} for sizes in (case.batch.support_sizes, case.batch.query_sizes))
    return prepared.native.source(half, support, query, case.batch.ways is not None)


def test_a_source_calls_what_the_walk_calls() -> None:
    """Every instruction once, in the order of the Plan, and each phase a loop over its steps."""
    case = net_case("sinusoid", tasks=4, steps=3)
    text = source_of(case)
    listed = [instr.kernel for _, instr in case.plan().instructions()]
    called = re.findall(r"call<(\w+)>", text)
    assert len(called) >= 20 and set(called) <= set(host.kernels()) and called.count("mse_bwd") == sum(k == "mse_bwd" for k in listed)
    assert "phase<&Half::phase0, 0, 3, 1>()" in text and "kSupport = 10, kQuery = 15" in text
    assert "kSupport = -1, kQuery = -1" in source_of(ragged_case())


def test_pieces_are_small_while_there_are_few_and_a_task_asks_for_its_first_weights() -> None:
    def head(text: str) -> dict[str, int]:
        return {name: int(value) for name, value in re.findall(r"p\.(\w+) = (\d+);", text)}

    small, large = head(source_of(net_case("sinusoid", tasks=2))), head(source_of(net_case("omniglot-fc", tasks=1, steps=1, rows=(2, 2))))
    assert small["chunk"] == small["threads"] == 256 and small["sum_chunks"] >= 9  # 2080 floats
    assert large["chunk"] == 3 * 512 and large["threads"] == 512  # of 247,648: 162 pieces
    assert 4 * 1761 < small["warm_bytes"] < large["warm_bytes"] == 24576
    assert head(source_of(net_case("sinusoid", tasks=2), ranks=2))["warm_bytes"] == 0  # its barriers empty L1


def test_all_that_a_source_includes_is_in_the_extension() -> None:
    known = {*host.headers(), *nvrtc.SHIMS, "host/fibers.h"}  # the last is the host's alone
    for name, text in host.headers().items():
        assert set(re.findall(r'^#\s*include [<"]([^>"]+)[>"]', text, re.MULTILINE)) <= known - {name}, name


def test_a_source_is_the_same_for_the_same_plan() -> None:
    assert source_of(net_case("mlp", tasks=2)) == source_of(net_case("mlp", tasks=5))


# ----------------------------------------------------------------------------------------------------- what is compiled
def head_case() -> SimpleNamespace:
    """The inner loop of a mixed Plan."""
    case = anil_case("learned-rate")
    return SimpleNamespace(plan=lambda: parts_of(case.plan()).inside, batch=case.batch)


COMPILED = {"head": head_case, "sinusoid": functools.partial(net_case, "sinusoid", tasks=2, steps=1, rows=(10, 10)), "ragged": functools.partial(ragged_case, "first")}


def compiled_within_limits(source: str, arch: str, folder: Path, *options: str) -> int:
    """How many functions nvcc made of a source, none beyond the walk's limits; and nothing on the stack: what lies there did not fold."""
    (folder / "half.cu").write_text(source)
    command = ["nvcc", "-cubin", *options, f"-arch={arch}", "-std=c++17", "--fmad=false", "-Xptxas=-v", f"-I{CSRC}/include", f"-I{CSRC}/cuda", "half.cu", "-o", "half.cubin"]
    own = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # nvcc does not live with a sanitizer's libraries
    said = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=own)
    assert said.returncode == 0, said.stderr
    most, _, spilled, _ = LIMITS[arch]
    functions = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said.stderr)
    for frame, stores, loads in functions:
        assert int(frame) == 0 and int(stores) + int(loads) <= spilled, said.stderr
    assert int(re.search(r"Used (\d+) registers", said.stderr)[1]) <= most, said.stderr
    return len(functions)


@needs_nvcc
@pytest.mark.parametrize(("name", "arch"), [("head", "sm_80"), ("head", "sm_90"), ("sinusoid", "sm_80"), ("sinusoid", "sm_90"), ("ragged", "sm_90")])
def test_registers_stack_and_spills(name: str, arch: str, tmp_path: Path) -> None:
    assert compiled_within_limits(source_of(COMPILED[name]()), arch, tmp_path) >= 3  # the entry, and each phase by itself


def test_nvrtc_makes_a_cubin_and_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = nvrtc_or_skip()
    text = source_of(COMPILED["sinusoid"]())
    image = nvrtc.cubin(text, host.headers(), "sm_90", tmp_path)
    assert image[:4] == b"\x7fELF" and b"fastmaml_half" in image
    monkeypatch.setattr(found, "compile", None)  # now it comes from the disk
    assert nvrtc.cubin(text, host.headers(), "sm_90", tmp_path) == image


def test_what_nvrtc_says_is_passed_on(tmp_path: Path) -> None:
    nvrtc_or_skip()
    with pytest.raises(RuntimeError, match=r"(?s)nvrtcCompileProgram: NVRTC_ERROR_COMPILATION: half.cu\(1\): error: .*no_such_thing"):
        nvrtc.cubin("int x = no_such_thing;", {}, "sm_90", tmp_path)
    assert not list(tmp_path.rglob("*"))


@pytest.mark.skipif(cuda._cuda is None, reason=f"fastmaml._cuda was not built: {cuda.IMPORT_ERROR}")
def test_the_extension_has_the_same_sources_and_says_what_it_cannot_load() -> None:
    assert cuda._cuda.headers() == host.headers() and "straight.cuh" in host.headers() and "fastmaml/plan.h" in host.headers()
    case = net_case("mlp", tasks=2)
    native = CudaExecutor(case.plan(), host).prepared(case.batch)
    other = cuda._cuda.Plan(native.lowering.words, native.lowering.scratch_at, host.device(0)["shared_bytes"], 0)
    assert other.source(0, 10, 15, False) == native.native.source(0, 10, 15, False)
    with pytest.raises(RuntimeError, match="fastmaml._cuda: "):
        cuda._cuda.load(b"no cubin", 0)


# --------------------------------------------------------------------------------------------- where nothing is compiled
def walked_after(error: Exception) -> CudaExecutor:
    def failing(*_) -> int:
        raise error

    case = net_case("sinusoid", tasks=2, steps=1, rows=(3, 2))
    executor, call = on_host(case.plan(), compiler=failing), case.call(torch.float32)
    same(on_host(case.plan()).forward(call), executor.forward(call))
    executor.forward(call)  # without another word
    return executor


def test_without_nvrtc_the_plan_is_walked_and_the_reason_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert walked_after(nvrtc.Absent("no libnvrtc here")).how == "one kernel that walks any Plan: no libnvrtc here"
    monkeypatch.setenv("FASTMAML_NVRTC", "0")
    with pytest.raises(nvrtc.Absent, match="FASTMAML_NVRTC=0"):
        nvrtc.find()
    monkeypatch.delenv("FASTMAML_NVRTC")
    monkeypatch.setattr(nvrtc, "places", lambda: iter(["/no/such/library"]))
    nvrtc.library.cache_clear()
    with pytest.raises(nvrtc.Absent, match="libnvrtc was not found among Python's packages .pip install nvidia-cuda-nvrtc"):
        nvrtc.find()


def test_a_source_that_does_not_compile_warns_once_and_is_walked() -> None:
    with pytest.warns(UserWarning, match="no kernel could be compiled for this Plan alone.*error: out of luck") as said:
        executor = walked_after(RuntimeError("error: out of luck"))
    assert len(said) == 1 and "error: out of luck" in executor.how


def test_explain_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "choose", lambda backend, plan, *_: on_host(plan))
    assert "cuda: all segments (one kernel that walks any Plan: " in fastmaml.MAML(small_net(), inner_lr=0.1).explain(small_tasks())


def test_tasks_of_ever_other_sizes_are_not_compiled_for_ever() -> None:
    made = []
    executor = on_host(net_case("sinusoid", steps=1).plan(), compiler=lambda source, *_: made.append(source) or 0)
    for query in range(1, KERNELS + 4):
        executor.forward(net_case("sinusoid", tasks=2, steps=1, rows=(3, query)).call(torch.float32))
    assert len(made) == KERNELS == len(set(made)) and executor.how.endswith(f"{KERNELS} so far, other sizes are walked")
