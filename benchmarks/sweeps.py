"""What grows how: time against inner steps, tasks, shots, filters and threads, memory against inner steps; fastmaml beside the plain loop.

Time should be a straight line in the first three: RESIDUAL is the largest distance of a measured point from the line that fits best, as a share of its time.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack

import torch

from benchmarks.peers import META_GRAD, PLAIN
from benchmarks.protocol import TURN, Settings
from benchmarks.worker import Failed, Worker
from benchmarks.workloads import WORKLOADS, Workload

RESIDUAL = 0.15
LONG = 10.0  # seconds: after a call of this length the plain loop's line ends
BASE = WORKLOADS["Omniglot strided, mean loss"].varied(inner_lr=0.01)  # a hundred large steps on noise would not stay finite
AXES: dict[str, tuple[int, ...]] = {
    "inner_steps": (1, 2, 5, 10, 20, 50, 100),
    "tasks": (1, 2, 4, 8, 16, 32, 64, 128, 256),
    "shots": (1, 2, 5, 10, 15, 20),
    "filters": (16, 32, 64, 128),
}
STRAIGHT = ("inner_steps", "tasks", "shots")
MEMORY = {"mini-ImageNet conv4-32, mean loss": (1, 5, 20, 50), "Omniglot FC, learn2learn": (1, 5, 20, 50)}
ALONE = ("Omniglot strided, mean loss", "Omniglot conv4-64, pytorch-maml", "mini-ImageNet conv4-32, mean loss")
Tell = Callable[[str], None]


# ------------------------------------------------------------------------------------------------- time
def sweep(axis: str, points: tuple[int, ...], settings: Settings, tell: Tell, base: Workload = BASE) -> list[dict]:
    """Rows of both sides, all points of an axis in turns."""
    rows = []
    for peer in (META_GRAD, PLAIN):
        with settings.worker() as worker:
            tell(f"{axis}: {peer}")
            times = _points(worker, peer, [base.varied(**{axis: n}) for n in points], settings)
        found = {n: v for n, v in zip(points, times, strict=False) if v}
        mine = [{"axis": axis, "at": n, "peer": peer, "median_ms": 1e3 * statistics.median(v), "repetitions": len(v)} for n, v in found.items()]
        if axis in STRAIGHT and len(mine) > 2:
            a, b = straight_line([r["at"] for r in mine], [r["median_ms"] for r in mine])
            for r in mine:
                r["line_ms"] = a + b * r["at"]
                r["residual"] = r["line_ms"] / r["median_ms"] - 1
        rows += mine
    return rows


def _points(worker: Worker, peer: str, workloads: list[Workload], settings: Settings) -> list[list[float]]:
    """Seconds of the calls of each workload, as far as the peer comes."""
    times: list[list[float]] = []
    try:
        for w in workloads:
            worker.ask("make", w.name, w.name, peer)
            first = worker.ask("first", w.name)
            times.append([])
            if peer == PLAIN and first > LONG:
                times[-1].append(first)
                break
        shorter = [(w, own) for w, own in zip(workloads, times, strict=False) if not own]
        started = time.perf_counter()
        while time.perf_counter() - started < settings.budget or not all(times):
            for w, own in shorter:
                own += worker.ask("turn", w.name, min(TURN, settings.budget))
    except Failed as error:
        print(f"{peer}, {w.name}: {error}")
    return times


def straight_line(x: list[float], y: list[float]) -> tuple[float, float]:
    """(a, b) of y = a + b x, by least squares of the relative residuals: a long time does not outweigh a short one."""
    columns = torch.tensor([[1 / v, u / v] for u, v in zip(x, y, strict=True)], dtype=torch.float64)
    a, b = torch.linalg.lstsq(columns, torch.ones(len(x), 1, dtype=torch.float64)).solution[:, 0].tolist()
    return a, b


# ------------------------------------------------------------------------------------------------- threads
def threads(workload: str, settings: Settings, tell: Tell) -> list[dict]:
    """A full meta-batch, and one task alone, on 1 .. all threads; beside them as many tasks as threads, which says what the machine gives."""
    most, w = len(os.sched_getaffinity(0)), WORKLOADS[workload]
    counts = sorted({1, *(2**i for i in range(1, 8) if 2**i < most), most})
    cases = {f"{tasks} on {n}": (tasks, n) for tasks in sorted({1, most, w.tasks}) for n in counts}
    times: dict[str, list[float]] = {key: [] for key in cases}
    with settings.worker() as worker:
        tell("one task, and many")
        for key, (tasks, n) in cases.items():
            worker.ask("make", key, w.varied(tasks=tasks).name, META_GRAD, n)
            worker.ask("first", key)
        started = time.perf_counter()
        while not all(times.values()) or time.perf_counter() - started < settings.budget:
            for key in cases:
                times[key] += worker.ask("turn", key, min(TURN, settings.budget))
    at = {case: 1e3 * statistics.median(times[key]) for key, case in cases.items()}
    return [
        {"workload": workload, "tasks": tasks, "threads": n, "median_ms": ms, "speedup": at[tasks, 1] / ms, "repetitions": len(times[f"{tasks} on {n}"])}
        for (tasks, n), ms in at.items()
    ]


# ------------------------------------------------------------------------------------------------- memory
def memory(workload: str, steps: tuple[int, ...], runs: int, settings: Settings, tell: Tell) -> list[dict]:
    """Peak MB above import and data by inner steps, beside what the Plan said: medians of fresh processes, for where the heap stands differs by half a MB."""
    rows = []
    for peer in (META_GRAD, PLAIN):
        for k in steps:
            w = WORKLOADS[workload].varied(inner_lr=0.01, inner_steps=k)
            tell(f"memory of {workload}, K = {k}: {peer}")
            row = {"workload": workload, "inner_steps": k, "peer": peer}
            try:
                row |= _peaks(w, peer, runs if peer == META_GRAD else 1, settings)
            except Failed as error:
                rows.append(row | {"reason": str(error)})
                break  # with more steps it would fail again
            rows.append(row)
    return rows


def _peaks(w: Workload, peer: str, runs: int, settings: Settings) -> dict[str, float]:
    found = []
    with ExitStack() as stack:
        for _ in range(runs):
            worker = stack.enter_context(settings.worker())
            worker.ask("make", w.name, w.name, peer)
            for _ in range(3 if peer == META_GRAD else 1):
                worker.ask("first", w.name)
            peak = worker.ask("peak")
            found.append(peak | ({"plan_mb": worker.ask("said", w.name)} if peer == META_GRAD else {}))
            worker.close()
    return {key: statistics.median(f[key] for f in found) for key in found[0]}

