"""The triton executor. Its cases (triton_cases_*.py) run in processes of their own: a process is either interpreted, on CPU tensors, or compiled, on a GPU.

On a GPU all of them run. Interpreted, the slow ones (every option, random Programs) would take ten minutes: cd tests; TRITON_INTERPRET=1 pytest triton_cases_*.py
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from fastmaml.executors import OLDEST_TRITON

HERE = Path(__file__).parent
CASES = sorted(path.name for path in HERE.glob("triton_cases_*.py"))
VERSION = metadata.version("triton") if importlib.util.find_spec("triton") else "0.0"
needs_triton = pytest.mark.skipif(tuple(map(int, VERSION.split(".")[:2])) < OLDEST_TRITON, reason="triton 3.6 or newer is not installed (pip install triton: Linux)")


def run(arguments: list[str], interpret: bool, **variables: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.run([sys.executable, *arguments], cwd=HERE, env=environment, capture_output=True, text=True)


def run_cases(interpret: bool, file: str, *selection: str) -> None:
    ignore = ("-W", "ignore::RuntimeWarning", "-W", "ignore::DeprecationWarning")  # numpy's, of infinities that are masked; the interpreter's
    done = run(["-m", "pytest", "-q", "-p", "no:cacheprovider", *ignore, file, *selection], interpret)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    print(done.stdout.splitlines()[-1])


@needs_triton
@pytest.mark.parametrize("file", CASES)
def test_interpreted(file: str) -> None:
    run_cases(True, file, "-m", "not slow")


@needs_triton
@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("file", CASES)
def test_on_a_gpu(file: str) -> None:
    run_cases(False, file)


# ------------------------------------------------------------------------------------------------------ choice and reasons

ASK = """
import sys, torch, fastmaml
assert "fastmaml.kernels.update" not in sys.modules, "importing fastmaml imports the Triton kernels"
maml = fastmaml.MAML(torch.nn.Linear(2, 3), backend={backend!r})
tasks = [torch.randn(2, 3, 2), torch.zeros(2, 3, dtype=torch.int64)] * 2
{before}
try:
    maml.meta_grad(tasks)
    print(maml.executor)
except Exception as error:
    print(type(error).__name__, error)
print("imported" if "fastmaml.kernels.update" in sys.modules else "not imported")
"""


def ask(backend: str, interpret: bool, before: str = "") -> list[str]:
    done = run(["-c", ASK.format(backend=backend, before=before)], interpret)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_cpu_is_refused_with_a_reason_and_without_an_import() -> None:
    error, imported = ask("triton", interpret=False)
    assert error.startswith("BackendError backend='triton' cannot run this model: the parameters are on cpu")
    assert "TRITON_INTERPRET=1" in error and imported == "not imported"


def test_auto_on_a_cpu_leaves_triton_alone() -> None:
    assert ask("auto", interpret=True)[1] == "not imported"


@needs_triton
def test_by_name_it_runs_interpreted() -> None:
    said = ask("triton", interpret=True)
    if "only 0-dimensional arrays" in said[0]:
        pytest.skip("this Triton's interpreter does not work with this numpy")
    assert said == ["triton", "imported"]


@needs_triton
def test_a_triton_that_is_too_old_is_named() -> None:
    error, imported = ask("triton", interpret=True, before="import triton; triton.__version__ = '3.5.1'")
    assert "Triton 3.5.1 is too old for the Triton kernels: pip install 'triton>=3.6'" in error and imported == "not imported"


def test_without_triton_the_reason_is_kept() -> None:
    error, imported = ask("triton", interpret=True, before="sys.modules['triton'] = None")
    assert "the Triton kernels could not be imported: ModuleNotFoundError" in error and imported == "not imported"
