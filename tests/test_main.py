"""python -m fastmaml: says what is there, and why the rest is not; always exits with 0."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

import fastmaml
from fastmaml import __main__ as command
from fastmaml import machine
from fastmaml.executors import BACKENDS
from fastmaml.executors.cpu import executor as cpu_executor
from fastmaml.executors.cuda import executor as cuda_executor


@pytest.fixture(autouse=True)
def peaks(monkeypatch) -> None:
    monkeypatch.setattr(machine, "bandwidth", lambda: 12.5)
    monkeypatch.setattr(machine, "peak_gflops", lambda threads=None: 123.0)


def report(capsys) -> dict[str, str]:
    assert command.main([]) == 0
    out = capsys.readouterr().out.splitlines()
    return {row[:12].strip(): row[13:] for row in out}


def test_report(capsys) -> None:
    rows = report(capsys)
    assert rows["fastmaml"].startswith(fastmaml.__version__) and "torch" in rows["fastmaml"]
    assert set(BACKENDS) - {"auto"} <= set(rows)
    assert list(rows)[list(rows).index("cpu"):][: len(BACKENDS) - 1] == [name for name in BACKENDS if name != "auto"]  # in the order of choice
    assert rows["torch"].startswith("yes") and rows["autograd"].startswith("yes")
    assert "123 GFLOP/s" in rows["peak"] and "12.5 GB/s" in rows["peak"]
    if cpu_executor._cpu is not None:
        assert "OpenMP" in rows["built"] and cpu_executor._cpu.tiers()[-1] in rows["built"]
        assert cpu_executor._cpu.active_tier() in rows["active"] and rows["cpu"].startswith("yes")


def test_without_the_native_half(capsys, monkeypatch) -> None:
    monkeypatch.setattr(cpu_executor, "_cpu", None)
    monkeypatch.setattr(cpu_executor, "IMPORT_ERROR", "no such file")
    monkeypatch.setattr(machine, "peak_gflops", lambda threads=None: None)
    rows = report(capsys)
    assert "was not (no such file)" in rows["built"] and rows["cpu"].startswith("no:")
    assert "GFLOP/s" not in rows["peak"]


@pytest.mark.parametrize(
    ("devices", "said"), [((0, "no driver"), "no: CUDA finds no device: no driver"), ((1, ""), "yes: one launch"), (None, "no: fastmaml._cuda could not be imported (no such file)")]
)
def test_cuda(devices: tuple | None, said: str, capsys, monkeypatch) -> None:
    card = {"name": "a card", "capability": (9, 0), "shared_bytes": 1 << 17, "multiprocessors": 1}
    module = devices and SimpleNamespace(devices=lambda: devices, device=lambda index: card)
    monkeypatch.setattr(cuda_executor, "_cuda", module)
    monkeypatch.setattr(cuda_executor, "IMPORT_ERROR", "no such file")
    monkeypatch.setenv("FASTMAML_NVRTC", "0")
    assert command.main([]) == 0
    shown = capsys.readouterr().out
    assert f"cuda       {said}" in shown
    assert ("; Plans are walked at run time: FASTMAML_NVRTC=0" in shown) == (devices == (1, ""))
    assert ("a card (sm_90, 128 KB shared)" in shown) == (devices == (1, ""))


def test_variables_that_are_set(capsys, monkeypatch) -> None:
    monkeypatch.setenv("FASTMAML_SOMETHING", "7")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert "FASTMAML_SOMETHING=7, OMP_NUM_THREADS=2" in report(capsys)["variables"]


@pytest.mark.parametrize(("argument", "code"), [("--version", 0), ("--help", 0), ("--wrong", 2)])
def test_arguments(argument: str, code: int, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main([argument])
    assert stop.value.code == code
    out = capsys.readouterr()
    assert "python -m fastmaml" in out.out + out.err or out.out == f"fastmaml {fastmaml.__version__}\n"


def test_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "fastmaml", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"fastmaml {fastmaml.__version__}\n"


@pytest.mark.skipif(cpu_executor._cpu is None, reason="fastmaml._cpu is not built")
def test_a_tier_that_is_not_there_is_named(monkeypatch) -> None:
    monkeypatch.setenv("FASTMAML_ISA", "imaginary")  # read when the native half is first used: in a new process
    program = "from fastmaml import __main__ as c; print(c._tier(), c._backend('cpu'))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "no tier (FASTMAML_ISA=imaginary" in done.stdout and "no: no tier" in done.stdout
