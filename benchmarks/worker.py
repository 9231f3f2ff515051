"""A process of its own for each way of computing: what it compiles, leaks or crashes stays there, it can be given up at a limit of time or memory, and it
sleeps while another one computes. It may import fastmaml from another folder than this one (benchmarks/compare.py).

Questions and answers are lines of JSON on pipes.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
CHILD = """
import os, sys
answers = os.fdopen(os.dup(1), "w")  # what libraries print must not stand among the answers
os.dup2(2, 1)
sys.path.insert(0, sys.argv[2])
import benchmarks  # of this tree, whichever fastmaml it measures
sys.path.insert(0, sys.argv[1])
import fastmaml
assert fastmaml.__file__.startswith(sys.argv[1]), fastmaml.__file__
from benchmarks.child import serve
serve(int(sys.argv[3]), sys.argv[4], answers)
"""


class Failed(RuntimeError):
    """Why a worker gave no answer, in one line."""


class Worker:
    """The parent's side. ``ask`` raises Failed with the error of the child, or the limit that it hit; it is closed then."""

    def __init__(self, threads: int, root: Path = ROOT, seconds: float = 240, megabytes: float = 10_000, device: str = "cpu") -> None:
        self.seconds, self.megabytes = seconds, megabytes
        self.said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        command = [sys.executable, "-W", "ignore", "-c", CHILD, str(root), str(ROOT), str(threads), device]
        paths = [os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}  # it runs in another folder, where none of its modules can hide another
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said, text=True, env=environment, cwd=tempfile.gettempdir()
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def ask(self, what: str, *arguments: object) -> Any:
        """The answer of this method of benchmarks.child.Child."""
        if self.process.stdin.closed:
            raise Failed("its process has ended")
        try:
            self.process.stdin.write(json.dumps([what, *arguments]) + "\n")
            self.process.stdin.flush()
            answer = json.loads(self._line() or self._end())
        except BrokenPipeError:
            self._end()
        if "error" in answer:
            raise Failed(answer["error"])
        return answer["value"]

    def _line(self) -> str:
        deadline = time.monotonic() + self.seconds
        while not select.select([self.process.stdout], [], [], 0.1)[0]:
            if time.monotonic() > deadline:
                self._kill(f"not finished in {self.seconds:g} s")
            if (taken := resident(self.process.pid)) > self.megabytes:
                self._kill(f"took over {self.megabytes / 1000:g} GB ({taken / 1000:.1f})")
        return self.process.stdout.readline()

    def _kill(self, why: str) -> None:
        self.process.kill()
        self.close()
        raise Failed(why)

    def _end(self) -> None:
        status = self.process.wait()
        self.said.seek(0)
        lines = self.said.read().strip().splitlines()
        self.close()
        killed = " (killed: as a rule all processes together took more memory than there is)" if status == -signal.SIGKILL else ""
        raise Failed(f"its process ended with status {status}{killed}" + (f": {lines[-1]}" if lines else ""))

    def close(self) -> None:
        for end in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                end.close()
        self.process.wait()
        self.said.close()


def status(key: str, pid: int | str = "self") -> float:
    """A line of /proc/<pid>/status in MB; 0 where there is none."""
    try:
        with open(f"/proc/{pid}/status") as file:
            return next((int(line.split()[1]) / 1024 for line in file if line.startswith(key)), 0.0)
    except OSError:
        return 0.0


def resident(pid: int) -> float:
    return status("VmRSS", pid)
