"""The rooms of DESIGN.md, section 3: who imports whom, what the native half knows, that no instruction set leaks."""

from __future__ import annotations

import ast
import math
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from executor_cases import net_case, ragged_case
from random_programs import random_case

from fastmaml import _cpu
from fastmaml.executors.cpu.executor import CpuExecutor
from fastmaml.executors.cpu.lowering import Lowering, rows_capacity
from fastmaml.optimizers import ImplicitGradient
from fastmaml.plan import Arrangement, Plan, Rate, build_plan
from fastmaml.program import OPS, Loss, ProgramBuilder

ROOT = Path(__file__).parent.parent
PACKAGE, CSRC = ROOT / "fastmaml", ROOT / "csrc"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# From the bottom to the top. A module imports from its own room and from the rooms below it.
ROOMS = (
    {"counts", "program", "batch", "batch_checks", "optimizers"},
    {"nn", "_trace", "trace", "files", "tasks", "machine", "options", "watch"},
    {"plan", "parameterisation", "rates"},
    {"executors"},
    {"autograd", "adapted", "engine", "output", "plain_loop", "prologue", "rewritten_loop", "state"},
    {"maml", "diagnostics"},
    {"full", "functional", "leo", "mixture"},
    {"methods"},
    {"training", "compat", "cli", "__main__", "__init__"},
)
LEVEL = {name: level for level, room in enumerate(ROOMS) for name in room}


def room(module: str) -> str:
    """The room of a module of the package: its file or folder right below fastmaml."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(path: Path, top_level_only: bool = False) -> list[str]:
    tree = ast.parse(path.read_text())
    found = []
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def own_modules(path: Path) -> set[str]:
    """Modules of fastmaml that a file imports."""
    known = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in SOURCES} | {
        "fastmaml._cpu"
    }
    return {name for name in imports(path) if name in known and name != "fastmaml"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_downwards(path: Path) -> None:
    mine = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert mine in LEVEL, f"fastmaml/{mine} has no room: give it one in ROOMS"
    for module in own_modules(path):
        other = room(module)
        if other not in ("_cpu", mine):
            assert LEVEL[other] <= LEVEL[mine], f"{path.name} imports {module}, which lives above it"
    forbidden = {
        "executors": {"maml", "parameterisation", "autograd", "adapted", "functional", "trace"},
        "plan": {"executors", "maml", "parameterisation", "trace", "batch", "batch_checks"},
        "program": {"plan", "executors", "trace", "batch", "batch_checks"},
        "parameterisation": {"executors", "maml"},
    }.get(mine, set())
    assert not {room(module) for module in own_modules(path)} & forbidden


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda p: p.name)
def test_triton_kernels_import_torch_and_triton_only(path: Path) -> None:
    allowed = {
        "__future__",
        "torch",
        "triton",
        "math",
        "functools",
        "dataclasses",
        "collections",
        "typing",
        "kernels",
        "fastmaml.kernels",
    }
    for module in imports(path):
        assert module.split(".")[0] in allowed or module.startswith("fastmaml.kernels"), f"{path.name} imports {module}"


def test_the_plan_knows_no_torch() -> None:
    for path in (PACKAGE / "plan").glob("*.py"):
        if path.stem != "explain":
            assert not any(name.split(".")[0] == "torch" for name in imports(path, top_level_only=True)), path.name


# ------------------------------------------------------------------------------------------------------ the native half


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    "path", sorted(p for p in CSRC.rglob("*") if p.is_file()), ids=lambda p: str(p.relative_to(CSRC))
)
def test_only_bindings_know_python_and_nothing_knows_torch(path: Path) -> None:
    for header in includes(path):
        assert not header.startswith(("torch/", "ATen/", "c10/")), f"{path.name} includes {header}"
        if path.name != "bindings.cpp":
            assert not header.startswith(("Python.h", "pybind11/")), f"{path.name} includes {header}"


DEVICE = sorted((CSRC / "cuda").glob("*.cuh"))


@pytest.mark.parametrize("path", DEVICE, ids=lambda p: p.name)
def test_device_functions_are_for_nvcc_and_for_the_host(path: Path) -> None:
    """What both compile includes neither CUDA's headers nor containers, and nothing but block.cuh asks who compiles it."""
    allowed = {p.name for p in DEVICE} | {"flat.h", "host/fibers.h", "math.h", "stdint.h", "fastmaml/kernels.h"}
    assert set(includes(path)) <= allowed
    assert "__CUDACC__" not in path.read_text() or path.name == "block.cuh"
    assert not re.search(r"\b(threadIdx|__syncthreads|__shfl|atomicAdd)", path.read_text()) or path.name == "block.cuh"


def test_only_the_executor_includes_the_cuda_runtime() -> None:
    using = {p.name for p in (CSRC / "cuda").rglob("*") if p.is_file() and any("cuda_runtime" in h for h in includes(p))}
    assert using == {"executor.cu"}


def test_a_device_function_lives_where_its_cpu_kernel_does() -> None:
    text = (CSRC / "cuda/walk.cuh").read_text()
    smooth = {f"{name}_{mode}" for name in re.findall(r"CUDA_SMOOTH\(K, (\w+)\)", text) for mode in ("fwd", "jvp", "bwd", "bwd_jvp")}
    listed = smooth | set(re.findall(r"K\((\w+)\)", text.replace("K(name##", "")))
    for name in listed:
        found = [p.stem for p in (CSRC / "cpu/kernels").glob("*.cpp") if re.search(rf"^void {name}\(const Call", p.read_text(), re.MULTILINE)]
        stem = found[0] if found else "activations"
        mine = (CSRC / f"cuda/{stem}.cuh").read_text()
        assert f"void {name}(const Call" in mine or f"FASTMAML_SMOOTH({name.split('_')[0]}," in mine, f"{name} is not in csrc/cuda/{stem}.cuh"
    assert len(listed) > 80


def test_building_needs_no_torch() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    requires = re.search(r"^\[build-system\]\nrequires = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)
    assert requires and "torch" not in requires[1]
    assert not re.search(r"^\s*(import|from) torch", (ROOT / "setup.py").read_text(), re.MULTILINE)


def objects() -> list[Path]:
    return sorted(
        p for p in (ROOT / "build" / sys.implementation.cache_tag).glob("*/*.o") if p.parent.name not in ("cpu", "cuda", "cuda_host")
    )


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
@pytest.mark.skipif(not objects(), reason="no objects under build/: not built here")
def test_code_with_isa_flags_defines_nothing_outside_its_own_namespace() -> None:
    """Otherwise the linker may keep an AVX-512 copy of a shared inline function for everybody."""
    symbol = re.compile(r"^[0-9a-f]* ?([A-Za-z]) (.*)$")
    seen = 0
    for path in objects():
        own = f"fastmaml::{path.parent.name}::"
        listing = subprocess.run(
            ["nm", "-C", "--defined-only", str(path)], capture_output=True, text=True, check=True
        ).stdout
        for line in listing.splitlines():
            match = symbol.match(line.strip())
            if match and (match[1].isupper() or match[1] in "uvw"):  # lower case: local to the file
                name = re.sub(r"^(guard variable for|vtable for|typeinfo for|typeinfo name for) ", "", match[2])
                assert name.startswith(own), f"{path.parent.name}/{path.name} defines {name}"
                seen += 1
    assert seen >= len(_cpu.kernels())


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not installed")
def test_the_extension_needs_no_torch_library() -> None:
    listing = subprocess.run(["readelf", "-d", _cpu.__file__], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", listing)
    assert needed and not [name for name in needed if re.search(r"torch|c10|mkl|python", name)], needed


# -------------------------------------------------------------------------------------------------------------- kernels


def lowered(plan, support: int = 7, query: int = 6) -> set[str]:
    ids = {name: i for i, name in enumerate(_cpu.kernels())}
    lowering = Lowering(plan, rows_capacity(support, query), ids)
    return {step.call.kernel for _, groups in lowering.phases for _, steps in groups for step in steps}


def joint_body_plan() -> Plan:
    """A body with statistics of support and query rows together, below an adapted head."""
    b = ProgramBuilder((3,))
    w, head = b.leaf("w", (5, 3), "outer"), b.leaf("head", (4, 5), "adapted")
    normed = b.op("batchnorm", b.op("linear", 0, w), eps=1e-5, statistics="joint")
    return build_plan(b.build(b.op("linear", normed, head)), Arrangement(2, Loss(), {"head": Rate("inner_lr")}))


def patches_plan() -> Plan:
    """A first convolution with few taps and many outputs, whose batch statistics are made of the moments of its patches."""
    b = ProgramBuilder((1, 5, 5))
    v = b.op("conv2d", 0, b.leaf("w", (16, 1, 3, 3), "adapted"), None, stride=(1, 1), padding=(1, 1, 1, 1))
    v = b.op("global_avgpool2d", b.op("relu", b.op("batchnorm", v, eps=1e-5, statistics="batch")))
    program = b.build(b.op("linear", v, b.leaf("head", (4, 16), "adapted")))
    return build_plan(program, Arrangement(2, Loss(), {"w": Rate("inner_lr"), "head": Rate("inner_lr")}))


def test_every_native_kernel_is_reached_by_some_plan() -> None:
    reached: set[str] = set()
    for seed in range(300):
        case = random_case(random.Random(seed), conv=seed % 3 == 0, native=True)
        reached |= lowered(case.plan(entry=("train", "halves", "evaluate", "adapt")[seed % 4], query_from=None))
        reached |= lowered(case.plan())
    for case in (net_case("omniglot-fc-factored", tasks=1), ragged_case("factored")):
        reached |= lowered(case.plan(), 13, 15) | lowered(case.plan(memory="fast"), 13, 15)
    reached |= lowered(joint_body_plan()) | lowered(patches_plan())
    case = net_case("mlp", tasks=1)
    fixed = {name: Rate("lr") for name in case.arrangement.rates}
    reached |= lowered(case.plan(rates=fixed, meta_gradient=ImplicitGradient()), 13, 15)
    declared = (CSRC / "include/fastmaml/kernels.h").read_text()
    assert sorted(re.findall(r"\bK\((\w+)\)", declared)) == sorted(_cpu.kernels())
    assert not set(_cpu.kernels()) - reached


SHARED = {  # kernels that are no op's own: where they live
    "activations": ("tanh", "sigmoid", "exp", "elu", "gelu", "silu", "softplus"),
    "factored_linear": ("gram", "factored_linear"),
    "avgpool2d": ("global_avgpool2d",),
    "layernorm": ("groupnorm",),
    "linear": ("row_sum",),
    "patch_stats": ("patch_moments", "patch_stats"),
    "relu": ("leaky_relu",),
    "reshape": ("flatten_image", "unflatten_image"),
}


def test_one_op_one_stem() -> None:
    stems = {path.stem for path in (CSRC / "cpu/kernels").glob("*.cpp")} - {"table"}
    homes = {op: stem for stem, ops in SHARED.items() for op in ops}
    losses = {"cross_entropy", "mse"}
    for stem in stems:
        known = stem in OPS or stem in losses or stem in SHARED or stem in ("update", "expression")
        assert known, f"csrc/cpu/kernels/{stem}.cpp is no op's stem"
    for op in losses | {name for name in OPS if any(k.startswith(f"{name}_") for k in _cpu.kernels())}:
        weights_only = op in ("add", "mul", "matmul", "transpose", "slice")
        assert homes.get(op, op) in stems or weights_only, f"{op} has native kernels, but no file of its name"


@pytest.mark.parametrize(
    ("op", "sample", "weight", "attrs"),
    [
        ("conv2d", (1, 1, 100), (2, 1, 1, 97), dict(stride=(1, 1), padding=(0, 0, 0, 0))),
        ("linear", (3, 4), (6, 4), {}),
    ],
)
def test_ops_the_cpu_cannot_run_are_named(op: str, sample: tuple, weight: tuple, attrs: dict) -> None:
    b = ProgramBuilder(sample)
    v = b.op(op, 0, b.leaf("w", weight, "adapted"), **attrs)
    program = b.build(b.op("reshape", v, shape=(math.prod(b.values[v].shape),)))
    plan = build_plan(program, Arrangement(steps=1, rates={"w": Rate("lr")}, loss=Loss("mse")))
    assert op in (CpuExecutor.why_not(plan) or "")
