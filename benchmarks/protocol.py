"""How a workload is measured: agreement first, then times in turns, each way of computing in a process of its own.

1. The plain loop in float64 gives the meta-gradients of single tasks; the error of a peer is the median over them. A peer whose error is more than LIMIT
   times that of the plain loop in float32, or more than its lower precision allows, is reported with it, and without a speed.
2. The others take turns, A B C A B C: in each round every one calls for TURN seconds, and the quotient of two turns of one round is one ratio. Slow ones
   have spent their budget after a few rounds and drop out.
3. The whole iteration (tasks drawn, meta-gradient, Adam) and the peak memory come last.

A peer that is not installed, fails, or hits its limit of time or memory is a row with the reason.
"""

from __future__ import annotations

import datetime
import platform
import re
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

import fastmaml
from benchmarks.peers import META_GRAD, OURS, PLAIN, Peer
from benchmarks.worker import ROOT, Failed, Worker
from benchmarks.workloads import Workload
from fastmaml import _cpu

LIMIT = 3.0  # times the plain loop's error
ROUNDING = 2.0**-24  # an error below float32's own rounding is none
TURN = 0.05  # seconds
SMALL, REPETITIONS = 0.05, 300  # a call shorter than the first (seconds) is repeated at least so often
LONG = 1000  # ms: of a peer whose calls take longer no whole iterations are measured, for they are its calls
FLAGS = ("avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "amx_tile", "amx_bf16")


@dataclass(frozen=True)
class Settings:
    """budget: seconds of repetitions per peer and workload; seconds, megabytes: limits of each answer and each process; device: as torch names it."""

    threads: int = 2
    budget: float = 10.0
    agreement: int = 16
    seconds: float = 240.0
    megabytes: float = 10_000.0
    device: str = "cpu"

    def worker(self) -> Worker:
        return Worker(self.threads, seconds=self.seconds, megabytes=self.megabytes, device=self.device)


# ------------------------------------------------------------------------------------------------- one workload
def measure(w: Workload, peers: Iterable[Peer], settings: Settings, tell: Callable[[str], None] = lambda text: None) -> list[dict]:
    """One row for each peer, ours first. ``tell`` hears what is being done."""
    peers = [*OURS.values(), *peers]
    rows = {p.name: {"workload": w.name, "peer": p.name, "order": 1 if w.first_order else 2} for p in peers}
    for p in (p for p in peers if p.lower):
        rows[p.name]["precision"], rows[p.name]["allowed"] = p.lower
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        truth = str(Path(folder) / "truth.npy")
        workers = {p.name: stack.enter_context(settings.worker()) for p in peers if not _is_absent(p, w, rows[p.name])}  # they import torch meanwhile
        tell("float64")
        with settings.worker() as exact:
            exact.seconds *= 4
            exact.ask("truth", w.name, settings.agreement, truth)
        for p in (p for p in peers if p.name in workers):
            tell(f"agreement of {p.name}")
            if not _enters(workers[p.name], p, w, truth, rows[p.name]):
                del workers[p.name]
        _judge(rows, workers)
        _take_turns(workers, rows, settings, tell)
        _finish(workers, rows, settings, tell)
    return list(rows.values())


def _is_absent(peer: Peer, w: Workload, row: dict) -> bool:
    why = peer.absent(w)
    if why:
        row["reason"] = why
    return bool(why)


def _enters(worker: Worker, peer: Peer, w: Workload, truth: str, row: dict) -> bool:
    """Whether it gives a meta-gradient at all; its error and the seconds of its first call, which compiles."""
    try:
        worker.ask("make", w.name, w.name, peer.name)
        row["first_s"] = worker.ask("first", w.name)
        errors = worker.ask("errors", w.name, truth, w.tasks if peer.compiles else 1)
        row["error"] = statistics.median(errors)
    except Failed as error:
        row["reason"] = str(error)
        worker.close()
        return False
    return True


def _judge(rows: dict[str, dict], workers: dict[str, Worker]) -> None:
    plain = rows[PLAIN].get("error") if PLAIN in rows else None
    for name in list(workers):
        error, allowed = rows[name]["error"], rows[name].get("allowed")
        if plain is None:
            why = "the plain loop gave no error to judge it by"
        elif not error <= (allowed or LIMIT * max(plain, ROUNDING)):
            why = f"its error {error:.1e} is over " + (f"what its precision allows, {allowed:g}" if allowed else f"{LIMIT:g} times the plain loop's {plain:.1e}")
        else:
            continue
        rows[name]["reason"] = f"no speed, for {why}"
        workers.pop(name).close()


def _take_turns(workers: dict[str, Worker], rows: dict[str, dict], settings: Settings, tell: Callable[[str], None]) -> None:
    times: dict[str, list[list[float]]] = {name: [] for name in workers}
    ratios: dict[str, list[float]] = {name: [] for name in workers}
    turn = 0
    while active := [name for name in workers if _wants(times[name], settings.budget)]:
        turn += 1
        tell(f"round {turn}: {len(active)} in turns")
        ours = [name for name in OURS if name in workers and name not in active]
        for name in [*ours, *active]:
            try:
                times[name].append(workers[name].ask("turn", rows[name]["workload"], min(TURN, settings.budget)))
            except Failed as error:
                rows[name]["reason"] = str(error)
                del workers[name]
        if META_GRAD in workers:
            base = statistics.median(times[META_GRAD][-1])
            for name in (n for n in active if n in workers):
                ratios[name].append(statistics.median(times[name][-1]) / base)
    for name in workers:
        calls = [1e3 * t for one in times[name] for t in one]
        rows[name] |= dict(zip(("p20_ms", "median_ms", "p80_ms"), quantiles(calls), strict=True)) | {"repetitions": len(calls)}
        rows[name] |= dict(zip(("ratio_p20", "ratio", "ratio_p80"), quantiles(ratios[name]), strict=True)) if ratios[name] else {}


def _wants(turns: list[list[float]], budget: float) -> bool:
    """Another turn. Small workloads go on until their number of repetitions, where there is a budget at all."""
    if not turns:
        return True
    calls = [t for turn in turns for t in turn]
    return sum(calls) < budget or (budget > 0 and len(calls) < REPETITIONS and statistics.median(calls) < SMALL)


def _finish(workers: dict[str, Worker], rows: dict[str, dict], settings: Settings, tell: Callable[[str], None]) -> None:
    for name, worker in workers.items():
        tell(f"whole iterations of {name}")
        doing = "a whole iteration"
        try:
            rows[name] |= worker.ask("peak") | worker.ask("replay", rows[name]["workload"])
            if rows[name]["median_ms"] > LONG and name not in OURS:
                continue
            calls = worker.ask("iterations", rows[name]["workload"], settings.budget / 10)
            rows[name]["iteration_ms"] = 1e3 * statistics.median(calls)
            if name == META_GRAD:
                doing, worker.seconds = "verify", 4 * worker.seconds  # the plain loop in float64 is a part of it
                rows[name] |= worker.ask("plan", rows[name]["workload"], 4)
        except Failed as error:
            rows[name]["reason"] = f"in {doing}: {error}"


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """p20, median, p80."""
    if len(values) == 1:
        return (values[0],) * 3
    fifths = statistics.quantiles(values, n=5, method="inclusive")  # never outside of what was measured, of two calls neither
    return fifths[0], statistics.median(values), fifths[3]


# ------------------------------------------------------------------------------------------------- the machine
def machine(threads: int | None = None, device: str = "cpu") -> dict:
    """What every row carries: where, with what and how precisely it was measured."""
    threads, on_cpu = threads or torch.get_num_threads(), device == "cpu"
    return {
        "cpu": _cpuinfo("model name") or platform.machine(),
        "flags": [flag for flag in FLAGS if flag in (_cpuinfo("flags") or "").split()],
        "device": "cpu" if on_cpu else f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}", "precision": "float32",
        "tier": _cpu.active_tier(), "threads": threads, "peak_gflops": round(_cpu.peak_gflops(threads)) if on_cpu else None,
        "versions": {"fastmaml": fastmaml.__version__, "python": platform.python_version(), **_versions("torch", "triton", "learn2learn", "higher", "torchopt", "jax")},
        "commit": _commit(),
    }  # fmt: skip


def folder_of(here: dict) -> Path:
    """Where results go unless told otherwise: results/<date>-<machine>."""
    name = f"{here['cpu']} {here['threads']}t" if here["device"] == "cpu" else here["device"].split(",")[0]
    words = re.findall(r"[a-z0-9]+", re.sub(r"\(.*?\)|cpu|processor|@ *\S*", " ", name.lower()))
    return ROOT / "benchmarks" / "results" / "-".join([str(datetime.date.today()), *words])


def _cpuinfo(key: str) -> str | None:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith(key)), None)


def _versions(*names: str) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """With a + where the tree has changes of its own; None outside a repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=10", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
