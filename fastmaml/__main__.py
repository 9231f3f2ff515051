"""python -m fastmaml: what was built, what is active, which backends are there and why the others are not.

With a command it trains or evaluates: `python -m fastmaml train ...` and `fastmaml train ...` are the same (cli.py).
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import fastmaml
from fastmaml import cli, machine
from fastmaml.executors import BACKENDS, triton_executor
from fastmaml.executors.cpu import executor as cpu_executor
from fastmaml.executors.cuda import cubins, nvrtc
from fastmaml.executors.cuda import executor as cuda_executor

VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")  # and every FASTMAML_*
RUNS = {
    "cpu": "native kernels, float32: fully connected and convolutional networks",
    "cuda": "one launch for each half of a meta-iteration, float32: fully connected networks, and inner loops of a head behind a frozen body",
    "triton": "any traced model in float32 on an NVIDIA GPU",
    "torch": "any traced model, any dtype and device; not fast",
    "autograd": "any nn.Module; not fast",
}


def main(arguments: Sequence[str] | None = None) -> int:
    prog = "fastmaml" if Path(sys.argv[0]).stem == "fastmaml" else "python -m fastmaml"
    about = "Trains and evaluates; without a command it says " + __doc__.partition(": ")[2].partition("\n")[0]
    parser = argparse.ArgumentParser(prog=prog, description=about)
    parser.add_argument("--version", action="version", version=f"fastmaml {fastmaml.__version__}")
    cli.add_commands(parser)
    parsed = parser.parse_args(arguments)
    if parsed.command is not None:
        try:
            return parsed.run(parsed)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return 130
    for name, text in report():
        print(f"{name:<12} {text}")
    return 0


def report() -> list[tuple[str, str]]:
    """Lines (what, how it stands)."""
    versions = f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}"
    lines = [("fastmaml", f"{fastmaml.__version__}, {versions}")]
    native = cpu_executor._cpu
    if native is None:
        lines.append(("built", f"fastmaml._cpu was not ({cpu_executor.IMPORT_ERROR})"))
        lines.append(("", "in a source tree: python setup.py build_ext --inplace, or pip install -e ."))
    else:
        openmp = "with OpenMP" if native.openmp else "without OpenMP: one thread"
        lines.append(("built", f"fastmaml._cpu, {openmp}; tiers that run here: {', '.join(native.tiers())}"))
    if cuda_executor._cuda is not None:
        lines.append(("", f"fastmaml._cuda; devices: {_devices()}"))
    lines.append(("active", f"{_tier()}, {_threads()}"))
    lines.append(("backends", "auto takes the first of these that can run the model; a frozen body and the head behind it may have one each"))
    lines += [(f"  {name}", _backend(name)) for name in BACKENDS if name != "auto"]
    if cuda_executor._cuda is not None:
        lines.append(("cubins", _cubins()))
    set_here = [f"{name}={value}" for name, value in sorted(os.environ.items()) if _ours(name)]
    lines.append(("variables", ", ".join(set_here) or "none is set (FASTMAML_ISA, OMP_NUM_THREADS, ...)"))
    return [*lines, ("peak", _peak())]


def _ours(name: str) -> bool:
    return name.startswith("FASTMAML_") or name in VARIABLES


def _tier() -> str:
    if cpu_executor._cpu is None:
        return "no native kernels"
    try:
        return f"tier {cpu_executor._cpu.active_tier()}"
    except RuntimeError as error:  # FASTMAML_ISA names a tier that is not there
        return f"no tier ({error})"


def _threads() -> str:
    n = torch.get_num_threads()
    return f"{n} thread{'' if n == 1 else 's'} (torch.get_num_threads())"


def _backend(name: str) -> str:
    if name == "cpu" and cpu_executor._cpu is None:
        return f"no: fastmaml._cpu could not be imported: {cpu_executor.IMPORT_ERROR}"
    if name == "cpu" and _tier().startswith("no"):
        return f"no: {_tier()}"
    if name == "cuda" and (why := cuda_executor.CudaExecutor.unavailable()):
        return f"no: {why}"
    if name == "triton":
        if not torch.cuda.is_available():
            return "no: there is no NVIDIA GPU" + (f"; {why}" if (why := triton_executor()[1]) else "")
        if triton_executor()[1]:
            return f"no: {triton_executor()[1]}"
    return f"yes: {RUNS.get(name, 'available')}" + (f"; {_nvrtc()}" if name == "cuda" else "")


def _nvrtc() -> str:
    try:
        return f"compiled for each Plan by NVRTC {nvrtc.find().version}"
    except nvrtc.Absent as error:
        return f"Plans are walked at run time: {error}"


def _cubins() -> str:
    at = cubins.folder()
    try:
        if not cubins.limit() or at is None:
            return "not kept: " + ("FASTMAML_CUBIN_BYTES=0" if at else "there is no home folder")
        count, size = cubins.usage(at) if at.exists() else (0, 0)
        return f"{at}: {count} compiled kernels, {size / 2**20:.1f} MB of at most {cubins.limit() / 2**20:.1f} MB (FASTMAML_CUBIN_BYTES)"
    except (OSError, RuntimeError) as error:  # it cannot be read; or the variable says no number
        return f"not kept: {error}"


def _devices() -> str:
    module = cuda_executor._cuda
    count, why = module.devices()
    found = [module.device(i) for i in range(count)]
    return ", ".join(f"{d['name']} (sm_{d['capability'][0]}{d['capability'][1]}, {d['shared_bytes'] // 1024} KB shared)" for d in found) or f"none ({why})"


def _peak() -> str:
    memory = f"{machine.bandwidth():.1f} GB/s of memory (a large copy)"
    try:
        flops = machine.peak_gflops()
    except RuntimeError:
        flops = None
    return memory if flops is None else f"{flops:.0f} GFLOP/s in float32 (multiply-adds in registers), {memory}"


if __name__ == "__main__":
    raise SystemExit(main())
