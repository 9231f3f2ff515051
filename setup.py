"""Builds the native half: writes one build.ninja and runs it. A file's place says how it is compiled.

csrc/cpu/bindings.cpp    the only file that sees Python; glue, so -O1
csrc/cpu/*.cpp           portable: no ISA flags, so that choosing a tier never needs one
csrc/cpu/kernels/*.cpp   once per tier of ISA_FLAGS, into build/<tag>/<tier>/<op>.o
csrc/cuda/               fastmaml._cuda, where nvcc is; csrc/cuda/*.cu by nvcc
csrc/cuda/*.cuh, *.h     their text also goes into the extension: what NVRTC compiles a Plan's own source with
csrc/cuda/host/*.cpp     with the rest of csrc/cuda as host code: fastmaml._cuda_host, for the tests of a source tree (in-place builds)

Reads FASTMAML_CUDA=auto|0|1, FASTMAML_CUDA_ARCHS=80;90, FASTMAML_SANITIZE=0|1, CXX, CUDA_HOME, MAX_JOBS.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

os.chdir(Path(__file__).resolve().parent)  # every path below is relative to the repository


def setting(name, *choices):
    value = os.environ.get(name) or choices[0]
    if value not in choices:
        raise SystemExit(f"{name}={value}: must be {' or '.join(choices)}")
    return value


X86 = platform.machine().lower() in ("x86_64", "amd64")
SANITIZE = setting("FASTMAML_SANITIZE", "0", "1") == "1"
BUILD = Path("build", sys.implementation.cache_tag + ("-sanitize" if SANITIZE else ""))
CXX = os.environ.get("CXX") or "c++"
FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -Wall -Wextra -Icsrc/include"
FLAGS += " -DFASTMAML_X86=1" if X86 else ""
SANITIZE_FLAGS = "-fsanitize=address,undefined -fno-omit-frame-pointer -g -O1" if SANITIZE else ""
ISA_FLAGS = {"baseline": ""}
if X86:
    ISA_FLAGS["avx2"] = "-mavx2 -mfma"
    ISA_FLAGS["avx512"] = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mprefer-vector-width=512"

RULES = f"""\
builddir = {BUILD}
rule cxx
  command = {CXX} {FLAGS} $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = $out
rule nvcc
  command = $nvcc $flags -Xptxas=-v -MMD -MF $out.d -c $in -o $out 2> $out.log; s=$$?; grep -v 'ptxas info\|bytes stack' $out.log >&2; exit $$s
  depfile = $out.d
  deps = gcc
  description = $out
rule link
  command = $linker -shared $in $flags -o $out
  description = $out
"""


def find_nvcc():
    """(nvcc, "") where fastmaml._cuda is to be built, else (None, why not)."""
    wanted = setting("FASTMAML_CUDA", "auto", "0", "1")
    if wanted == "0" or SANITIZE:
        return None, "FASTMAML_CUDA=0" if wanted == "0" else "FASTMAML_SANITIZE=1 is for the CPU"
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if nvcc and Path("csrc/cuda/bindings.cpp").exists():
        return nvcc, ""
    missing = "no csrc/cuda/bindings.cpp" if nvcc else "no nvcc on PATH or in CUDA_HOME/bin"
    if wanted == "1":
        raise SystemExit(f"FASTMAML_CUDA=1, but there is {missing}; FASTMAML_CUDA=auto builds what can be built")
    return None, missing


def cuda_flags():
    """Machine code for every architecture asked for, and PTX of the newest plain one for those to come."""
    archs = (os.environ.get("FASTMAML_CUDA_ARCHS") or "80;90").split(";")
    if not all(re.fullmatch(r"\d+[af]?", arch) for arch in archs):
        raise SystemExit(f"FASTMAML_CUDA_ARCHS={';'.join(archs)}: must be like 80;90 or 90a")
    codes = [f"arch=compute_{arch},code=sm_{arch}" for arch in archs]
    plain = sorted((arch for arch in archs if arch.isdigit()), key=int)
    codes += [f"arch=compute_{arch},code=compute_{arch}" for arch in plain[-1:]]
    host = "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"
    return f"-std=c++17 -O3 --fmad=false {host} -Icsrc/include " + " ".join(f"-gencode={code}" for code in codes)


def openmp_flag():
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.cpp")
        probe.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
        command = [*shlex.split(CXX), "-fopenmp", str(probe), "-o", str(probe.with_suffix(""))]
        return "" if subprocess.run(command, capture_output=True).returncode else "-fopenmp"


def python_flags():
    import pybind11  # here: making an sdist needs setuptools alone

    includes = {sysconfig.get_path("include"), sysconfig.get_path("platinclude"), pybind11.get_include()}
    return " ".join(["-O1", *(shlex.quote(f"-isystem{include}") for include in sorted(includes))])


def write_manifest(nvcc, openmp, tests):
    """Writes build.ninja; returns the libraries it makes, by the extension's name."""
    lines = [RULES]

    def edge(output, rule, inputs, **variables):
        lines.append(f"build {output}: {rule} {' '.join(map(str, inputs))}")
        lines.extend(f"  {name} = {value.replace('$', '$$')}" for name, value in variables.items())
        return output

    def compile(folder, into, flags):
        for source in sorted(Path("csrc", folder).glob("*.cpp")):
            python = python_flags() if source.stem == "bindings" else ""
            yield edge(BUILD / into / f"{source.stem}.o", "cxx", [source], flags=f"{python} {flags} {SANITIZE_FLAGS}")

    def library(name, objects, linker, flags):
        output = BUILD / (name + sysconfig.get_config_var("EXT_SUFFIX"))
        return edge(output, "link", objects, linker=linker, flags=f"{flags} {SANITIZE_FLAGS}")

    # Portable objects go first: were a symbol ever shared with a tier's object, the linker would keep the portable one.
    objects = list(compile("cpu", "cpu", openmp))
    for tier, isa in ISA_FLAGS.items():
        objects += compile("cpu/kernels", tier, f"-DFASTMAML_ISA={tier} {isa}")
    libraries = {"fastmaml._cpu": library("_cpu", objects, CXX, openmp)}
    headers = []
    if nvcc or tests:
        source = embed_headers(BUILD / "headers.cpp")
        headers = [edge(source.with_suffix(".o"), "cxx", [source], flags=SANITIZE_FLAGS)]
    if nvcc:  # nvcc links cudart statically: on a machine without CUDA, _cuda imports and counts no devices
        objects, nvcc = [*compile("cuda", "cuda", ""), *headers], shlex.quote(nvcc)
        for source in sorted(Path("csrc/cuda").glob("*.cu")):
            objects.append(edge(BUILD / f"cuda/{source.name}.o", "nvcc", [source], nvcc=nvcc, flags=cuda_flags()))
        libraries["fastmaml._cuda"] = library("_cuda", objects, nvcc, "")
    if tests:  # -O1: half of the time to compile, and fibers are slow anyway
        objects = [*compile("cuda", "cuda_host", "-DFASTMAML_CUDA_HOST=1"), *compile("cuda/host", "cuda_host/host", "-O1"), *headers]
        libraries["fastmaml._cuda_host"] = library("_cuda_host", objects, CXX, "")
    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / "build.ninja").write_text("\n".join(lines) + "\n")
    return libraries


def embed_headers(output):
    """C++ with the text of the headers that a Plan's own source includes: what compiles it, wherever the package is, has those of this build."""
    include = Path("csrc/include")
    headers = {path.name: path for path in [*sorted(Path("csrc/cuda").glob("*.cuh")), Path("csrc/cuda/flat.h")]}
    headers |= {str(path.relative_to(include)): path for path in (include / "fastmaml/kernels.h", include / "fastmaml/plan.h")}
    entries = "".join(f'{{"{name}", R"header({path.read_text()})header"}},\n' for name, path in headers.items())
    name = "const char* const header_texts[][2]"
    text = f"namespace fastmaml {{\nnamespace cuda {{\nextern {name};\n{name} = {{\n{entries}{{nullptr, nullptr}}}};\n}}\n}}\n"
    output.parent.mkdir(parents=True, exist_ok=True)
    if not output.exists() or output.read_text() != text:
        output.write_text(text)
    return output


def run_ninja(*arguments, **options):
    # Beside the interpreter first: a virtual environment need not be activated.
    ninja = shutil.which("ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if ninja is None:
        raise SystemExit("fastmaml is built by ninja, which was not found: pip install ninja")
    result = subprocess.run([ninja, "-f", str(BUILD / "build.ninja"), *arguments], text=True, **options)
    if result.returncode:
        raise SystemExit("the native build of fastmaml failed: see the first error above")
    return result.stdout


class BuildNative(build_ext):
    def build_extensions(self):
        if shutil.which(shlex.split(CXX)[0]) is None:
            raise SystemExit(f"fastmaml needs a C++17 compiler: {CXX!r} was not found, CXX= names another")
        (nvcc, why_no_cuda), openmp = find_nvcc(), openmp_flag()
        libraries = write_manifest(nvcc, openmp, tests=self.source_tree)
        run_ninja("-t", "cleandead", stdout=subprocess.DEVNULL)  # objects whose source is gone
        run_ninja(*(["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []))
        if not SANITIZE:
            commands = run_ninja("-t", "compdb", "cxx", "nvcc", stdout=subprocess.PIPE)
            Path("build/compile_commands.json").write_text(commands)
        for name, library in libraries.items():
            target = Path(self.get_ext_fullpath(name))
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)  # not overwritten: a running process keeps the file it has
            shutil.copy2(library, target)
        how = [*ISA_FLAGS, "OpenMP" if openmp else "no OpenMP: one thread", *(["sanitizers"] if SANITIZE else [])]
        cuda = f" and _cuda ({os.environ.get('FASTMAML_CUDA_ARCHS') or '80;90'})"
        print(f"fastmaml: built _cpu ({', '.join(how)}){cuda if nvcc else f'; left out _cuda ({why_no_cuda})'}")

    def run(self):
        self.force = True  # ninja alone decides what is out of date
        self.source_tree = bool(self.inplace) and not SANITIZE  # while it runs, setuptools forgets that it is in place
        super().run()
        host = self.get_ext_filename("fastmaml._cuda_host")
        if self.source_tree:
            Path(host).unlink(missing_ok=True)
            shutil.copy2(Path(self.build_lib, host), host)
        if not find_nvcc()[0]:  # a library of an earlier build must not be found in place of this one's reason
            for folder in [self.build_lib, "."] if self.inplace else [self.build_lib]:
                Path(folder, self.get_ext_filename("fastmaml._cuda")).unlink(missing_ok=True)


# What an extension lists goes into the sdist; the build itself goes by place.
csrc = sorted(str(path) for path in Path("csrc").rglob("*") if path.suffix in (".cpp", ".h", ".cu", ".cuh"))
extensions = [Extension("fastmaml._cpu", [path for path in csrc if path.endswith(".cpp")], depends=csrc)]
extensions += [Extension("fastmaml._cuda", ["csrc/cuda/bindings.cpp"])] if find_nvcc()[0] else []

setup(
    packages=[*find_packages(include=["fastmaml", "fastmaml.*"]), "fastmaml.kernels"],
    package_dir={"fastmaml.kernels": "kernels"},
    ext_modules=extensions,
    cmdclass={"build_ext": BuildNative},
)
