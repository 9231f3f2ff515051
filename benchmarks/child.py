"""The side of a worker (benchmarks/worker.py) that computes: what it can be asked are the methods of ``Child``."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, TextIO

import numpy as np
import torch

from benchmarks import cuda_graph
from benchmarks.libraries import LIBRARIES
from benchmarks.peers import LOWER, OURS, PEERS, Peer, Step, maml_of, plain_loop
from benchmarks.worker import status
from benchmarks.workloads import Tasks, Workload, find
from fastmaml.batch import TaskBatch
from fastmaml.plan.explain import costs


def serve(threads: int, device: str, answers: TextIO) -> None:
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # speeds are compared at one precision
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # the first optimizer imports for seconds: now, while the other workers start too
    child = Child(device)
    for line in sys.stdin:
        what, *arguments = json.loads(line)
        try:
            answer = {"value": getattr(child, what)(*arguments)}
        except Exception as error:  # a peer's: torch.compile has many ways to fail; an older revision may not know an argument
            answer = {"error": f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]}
        print(json.dumps(answer), file=answers, flush=True)


class Made(NamedTuple):
    model: torch.nn.Module
    step: Step
    tasks: Tasks
    w: Workload


class Child:
    """What a worker can be asked; ``made``, by key, is what ``make`` prepared. Seconds are those until the device is done."""

    def __init__(self, device: str = "cpu") -> None:
        self.device, self.on_gpu = device, device.startswith("cuda")
        self.made: dict[str, Made] = {}
        self.seed = 0
        self.before = (0.0, 0.0)

    def make(self, key: str, workload: str, peer: str, threads: int | None = None) -> None:
        w = find(workload)
        torch.manual_seed(0)
        model = w.model().to(self.device)
        step = peer_called(peer).make(model, w)
        if threads is not None:
            step = _on(threads, step)
        self.made[key] = Made(model, step, self._there(w.sample(0)), w)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / 2**20, 0.0
            return
        if os.path.exists("/proc/self/clear_refs"):
            with open("/proc/self/clear_refs", "w") as file:  # the peak starts here: what importing took and gave back would hide a part
                file.write("5")
        self.before = status("RssAnon"), status("RssFile")

    def first(self, key: str) -> float:
        """Seconds of the first call."""
        _, step, tasks, _ = self.made[key]
        begin = time.perf_counter()
        step(tasks)
        self._wait()
        return time.perf_counter() - begin

    def truth(self, workload: str, count: int, path: str) -> None:
        """The meta-gradients of single tasks by the plain loop in float64, [count, parameters], in a file."""
        w = find(workload)
        torch.manual_seed(0)
        model = w.model().double().to(self.device)
        step = plain_loop(model, w)
        found = []
        for task in single_tasks(w, count):
            model.zero_grad()
            step(self._there(tuple(v.double() if v.is_floating_point() else v for v in task)))
            found.append(gradient(model).numpy())
        np.save(path, np.stack(found), allow_pickle=False)

    def errors(self, key: str, path: str, copies: int = 1) -> list[float]:
        """Relative errors of the meta-gradients of the same single tasks. copies: as a batch of so many of each, for what is compiled for one shape."""
        truth = torch.from_numpy(np.load(path, allow_pickle=False))
        model, step, _, w = self.made[key]
        out = []
        for want, task in zip(truth, single_tasks(w, len(truth)), strict=True):
            model.zero_grad()
            step(self._there(tuple(v.expand(copies, *v.shape[1:]).contiguous() for v in task)))
            got = gradient(model)
            out.append(float((got - want).norm() / want.norm()))
        model.zero_grad()
        return out

    def turn(self, key: str, seconds: float) -> list[float]:
        """Seconds of the calls of a turn; of several the first is left out: it finds the caches full of another's data."""
        _, step, tasks, _ = self.made[key]
        return self._timed(lambda: step(tasks), seconds)

    def iterations(self, key: str, seconds: float) -> list[float]:
        """The same of whole iterations: drawing the tasks, the meta-gradient, Adam."""
        model, step, _, w = self.made[key]
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)

        def iteration() -> None:
            self.seed += 1
            optimizer.zero_grad()
            step(self._there(w.sample(self.seed)))
            optimizer.step()

        return self._timed(iteration, seconds)

    def replay(self, key: str) -> dict[str, float]:
        """Milliseconds of the graph alone, of a step that is one."""
        _, step, tasks, _ = self.made[key]
        return {"replay_ms": step.replay_ms(tasks)} if isinstance(step, cuda_graph.Replayed) else {}

    def peak(self) -> dict[str, float]:
        """MB since ``make``: above import and data, of that pages of files (code that ran for the first time), and in all. On a GPU of torch's allocator."""
        if self.on_gpu:
            peak = torch.cuda.max_memory_allocated() / 2**20
            return {"above_mb": peak - self.before[0], "code_mb": 0.0, "total_mb": torch.cuda.max_memory_reserved() / 2**20}
        peak, loaded = status("VmHWM"), status("RssFile")
        before, files = self.before
        return {"above_mb": peak - loaded - before, "code_mb": loaded - files, "total_mb": peak}

    def said(self, key: str) -> float:
        """MB that fastmaml says a call lays out, before it runs."""
        model, _, tasks, w = self.made[key]
        return sum(maml_of(w, model).memory_bytes(tasks).values()) / 2**20

    def plan(self, key: str, count: int) -> dict[str, float]:
        """Of fastmaml: arithmetic and MB of a call as planned, and how its decisions compare with float64's on some tasks."""
        model, _, tasks, w = self.made[key]
        maml = maml_of(w, model)
        sure = maml.verify(tuple(v[:count] for v in tasks), repeats=1)
        return {
            "gflop": sum(row.flops for row in costs(maml.plan(tasks), TaskBatch.of(tasks))) / 1e9,
            "plan_mb": self.said(key),
            "flips": sure.flips, "decisions": sure.decisions, "equal_error": sure.equal_error,
        }  # fmt: skip


    def _there(self, tasks: Tasks) -> Tasks:
        """On the device that is measured."""
        return tuple(v.to(self.device) for v in tasks) if self.on_gpu else tasks

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def _timed(self, call: Callable[[], object], seconds: float) -> list[float]:
        times, end = [], time.perf_counter() + seconds
        while not times or time.perf_counter() < end:
            begin = time.perf_counter()
            call()
            self._wait()
            times.append(time.perf_counter() - begin)
        return times[1:] or times


def peer_called(name: str) -> Peer:
    """By name; ``module:attribute`` is one of the user's own."""
    known = {**OURS, **LOWER, **PEERS, **LIBRARIES}
    known |= {p.name: p for p in map(cuda_graph.graphed, known.values())}
    if name not in known and ":" in name:
        module, attribute = name.split(":", 1)
        return getattr(importlib.import_module(module), attribute)
    return known[name]


def single_tasks(w: Workload, count: int) -> Iterator[Tasks]:
    """``count`` meta-batches of one task."""
    seed = 0
    while count > 0:
        seed += 1
        batch = w.sample(seed)
        for t in range(min(count, len(batch[0]))):
            yield tuple(v[t : t + 1] for v in batch)
        count -= len(batch[0])


def gradient(model: torch.nn.Module) -> torch.Tensor:
    """All parameters' .grad as one float64 vector on the CPU."""
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().double() for p in model.parameters()]).cpu()


def _on(threads: int, step: Callable) -> Callable:
    def on_threads(tasks):
        torch.set_num_threads(threads)
        return step(tasks)

    return on_threads

