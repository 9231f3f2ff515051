"""Agreement, then time, then memory, of the fully connected workloads: ``python -m benchmarks.engine``.

What is measured how stands here; benchmarks/conv.py uses it for convolutional networks."""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from tqdm import tqdm

import fastmaml
from benchmarks.peers import OURS, PEERS, maml_of, plain_loop
from benchmarks.workloads import WORKLOADS, Workload
from fastmaml import _cpu
from fastmaml.batch import TaskBatch
from fastmaml.files import whole_file
from fastmaml.plan.explain import costs

SLOW = ("plain loop", "loop, channels last", "torch.func loop")
RESULTS = Path(__file__).parent / "results"


def gradient(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten().double() for p in model.parameters()])


def agreement(w: Workload, steps: dict, models: dict, most: int) -> dict[str, float]:
    """Median over ``most`` single tasks of the relative error of each one's meta-gradient against float64."""
    one = len(w.tasks(1)[0])
    tasks = tuple(torch.cat(v)[:most] for v in zip(*(w.tasks(seed) for seed in range(1, 2 + (most - 1) // one)), strict=True))
    exact = copy.deepcopy(next(iter(models.values()))).double()
    truth = plain_loop(exact, w)
    errors: dict[str, list[float]] = {name: [] for name in steps}
    for t in range(most):
        one = tuple(v[t : t + 1] for v in tasks)
        exact.zero_grad()
        truth(tuple(v.double() if v.is_floating_point() else v for v in one))
        want = gradient(exact)
        for name in (n for n in steps if n != "torch.compile(vmap)"):  # it would compile anew for one task
            models[name].zero_grad()
            steps[name](one)
            errors[name].append(float((gradient(models[name]) - want).norm() / want.norm()))
    if "torch.compile(vmap)" in steps:  # the whole batch against the plain loop
        for name in ("torch.compile(vmap)", "plain loop"):
            models[name].zero_grad()
            steps[name](w.tasks(1))
        a, b = gradient(models["torch.compile(vmap)"]), gradient(models["plain loop"])
        errors["torch.compile(vmap)"].append(float((a - b).norm() / b.norm()))
    return {name: statistics.median(values) for name, values in errors.items() if values}


def interleaved(steps: Mapping[str, Callable], models: Mapping[str, torch.nn.Module], tasks, budget: float) -> dict[str, list[float]]:
    """Times of single calls, in turns, until the budget (seconds) is spent or the first has 3,000 of them; at least one turn. A turn is as many calls as
    fit into 10 ms, as in a training loop; of several the first is not counted: it finds the caches full of the peer's data."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for model in models.values():
        model.zero_grad()
    for step in steps.values():
        begin, calls = time.perf_counter(), 0
        while not calls or (calls < 3 and time.perf_counter() - begin < 1):
            step(tasks)
            calls += 1
    started = time.perf_counter()
    while not times[next(iter(times))] or (time.perf_counter() - started < budget and len(times[next(iter(times))]) < 3000):
        for name, step in steps.items():
            turn, end = [], time.perf_counter() + 0.01
            while not turn or time.perf_counter() < end:
                begin = time.perf_counter()
                step(tasks)
                turn.append(time.perf_counter() - begin)
            times[name] += turn[1:] or turn
    return times


def measure(w: Workload, peers: Mapping[str, Callable], budget: float, most: int = 16) -> list[dict]:
    """Rows of every way of computing the workload: its error over ``most`` single tasks, its first call, its times; of ours also the decisions that differ
    from float64's on (at most 4) tasks, the error where float64 replays them, and the arithmetic of one call."""
    torch.manual_seed(0)
    model = w.model()
    makers = {**OURS, **peers}
    models = {name: copy.deepcopy(model) for name in makers}
    steps = {name: make(models[name], w) for name, make in makers.items()}
    tasks = w.tasks(0)
    first = {}
    for name in list(steps):
        begin = time.perf_counter()
        try:
            steps[name](tasks)
        except Exception as error:  # a peer's: torch.compile has many ways to fail
            if name in OURS:
                raise
            print(f"{name} fails on {w.name}: {error!r}"[:200], file=sys.stderr)
            del steps[name]
            continue
        first[name] = time.perf_counter() - begin
    errors = agreement(w, steps, models, most)
    fast = {n: s for n, s in steps.items() if n not in SLOW}
    times = interleaved(fast, models, tasks, budget)  # the fast ones often, the slow ones a few times among them
    rest = {n: s for n, s in steps.items() if n in ("fastmaml meta_grad", *SLOW)}
    slow = interleaved(rest, models, tasks, budget)
    times |= {n: v for n, v in slow.items() if n in SLOW}
    maml = maml_of(w, copy.deepcopy(model))
    sure = maml.verify(tuple(v[: min(4, most)] for v in tasks), repeats=1)
    mine = {"flips": sure.flips, "decisions": sure.decisions, "equal_error": sure.equal_error}
    mine["gflop"] = sum(row.flops for row in costs(maml.plan(tasks), TaskBatch.of(tasks))) / 1e9
    rows = []
    for name, values in times.items():
        q = statistics.quantiles(values, n=5) if len(values) > 1 else [values[0]] * 4
        row = {
            "workload": w.name, "who": name, "error": errors.get(name), "first_ms": first[name] * 1e3, "median_ms": statistics.median(values) * 1e3,
            "p20_ms": q[0] * 1e3, "p80_ms": q[3] * 1e3, "repetitions": len(values),
        }  # fmt: skip
        rows.append(row | (mine if name in OURS else {}))
    return rows


def show(rows: list[dict]) -> str:
    ours = {r["who"]: r["median_ms"] for r in rows if r["who"] in OURS}
    mine = next(r for r in rows if r["who"] in OURS)
    gflop = mine["gflop"]
    lines = [
        f"{rows[0]['workload']}: {gflop:.3g} GFLOP as planned, {gflop / min(ours.values()) * 1e3:.0f} a second",
        f"  {mine['flips']} of {mine['decisions']:,} decisions differ from float64's; with them replayed there our error is {mine['equal_error']:.1e}",
        f"  {'':22s}{'error':>9s}{'first call':>12s}{'median':>11s}{'p20':>10s}{'p80':>10s}   ratio to meta_grad / backward()",
    ]
    for r in rows:
        error = "-" if r["error"] is None else f"{r['error']:.1e}"
        ratio = "" if r["who"] in OURS else "   " + " / ".join(f"{r['median_ms'] / v:.1f}x" for v in ours.values())
        lines.append(f"  {r['who']:22s}{error:>9s}{r['first_ms']:>9.0f} ms{r['median_ms']:>8.2f} ms{r['p20_ms']:>10.2f}{r['p80_ms']:>10.2f}{ratio}")
    return "\n".join(lines)


MEMORY = """
import dataclasses, sys, torch
from benchmarks import workloads
from benchmarks.peers import maml_of
torch.set_num_threads(2)
w = {**workloads.WORKLOADS, **workloads.CONV_WORKLOADS}[sys.argv[1]]
w = dataclasses.replace(w, inner_lr=0.01, inner_steps=int(sys.argv[2]))
tasks, maml = w.tasks(0), maml_of(w)
for p in maml.parameters(): p.grad = torch.zeros_like(p)
def status(key):  # MB, of this process alone: ru_maxrss would carry over from the parent
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(key))
with open("/proc/self/clear_refs", "w") as f: f.write("5")  # the peak starts here: what importing took and gave back would hide a part of ours
before, files = status("RssAnon"), status("RssFile")
for _ in range(3): maml.meta_grad(tasks)
peak, loaded = status("VmHWM"), status("RssFile")
said = sum(maml.memory_bytes(tasks).values()) / 2**20
print(peak - loaded - before, loaded - files, said, peak)
"""


def memory(workload: str, steps: tuple[int, ...] = (1, 50), runs: int = 5) -> list[dict]:
    """Peak MB above import and data for each number of inner steps, beside what the Plan said: medians of fresh processes, for where the heap stands differs
    by half a MB. Pages of files, which are code that runs for the first time and the same for every Plan, are counted apart."""
    rows = []
    for k in steps:
        command = [sys.executable, "-c", MEMORY, workload, str(k)]
        found = []
        for _ in range(runs):
            done = subprocess.run(command, cwd=RESULTS.parent.parent, stdout=subprocess.PIPE, text=True, check=True)
            found.append([float(v) for v in done.stdout.split()])
        above, code, said, peak = (statistics.median(values) for values in zip(*found, strict=True))
        rows.append({"workload": f"memory of {workload}", "inner_steps": k, "above_mb": above, "code_mb": code, "plan_mb": said, "total_mb": peak})
    return rows


def show_memory(rows: list[dict]) -> str:
    lines = [
        f"{r['workload']}, at K={r['inner_steps']}: {r['above_mb']:.1f} MB above import and data (the executor said {r['plan_mb']:.1f}) and"
        f" {r['code_mb']:.1f} of code, {r['total_mb']:.0f} MB in all"
        for r in rows
    ]
    return "\n".join(lines)


def machine() -> dict:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "cpu": model, "tier": _cpu.active_tier(), "threads": torch.get_num_threads(), "peak_gflops": round(_cpu.peak_gflops(torch.get_num_threads())),
        "torch": torch.__version__, "fastmaml": fastmaml.__version__, "python": platform.python_version(), "precision": "float32",
    }  # fmt: skip


def save(path: Path | None, rows: list[dict]) -> None:
    """Writes all rows so far, whole or not at all."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as f:
        f.write(json.dumps({"machine": machine(), "rows": rows}, indent=1).encode())


def place(out: Path | None, name: str, partial: bool) -> Path | None:
    """Where rows go: ``--out``, else results/<date>-cpu/<name>.json; nowhere if they are a part or a try."""
    return out or (None if partial else RESULTS / f"{datetime.date.today()}-cpu" / f"{name}.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=8.0, help="seconds of repetitions per workload and group of peers")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it takes over a minute)")
    parser.add_argument("--only", default="", help="workloads whose name contains this")
    parser.add_argument("--quick", action="store_true", help="a try: one turn, no torch.compile, few tasks for agreement")
    parser.add_argument("--out", type=Path, help="where all rows go as JSON (default results/<date>-cpu/engine.json; nowhere with --quick, --only or --no-compile)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"machine: {machine()}\n")
    out = place(args.out, "engine", args.quick or args.no_compile or bool(args.only))
    budget, most = (0, 2) if args.quick else (args.budget, 16)
    peers = {n: p for n, p in PEERS.items() if "compile" not in n or not (args.quick or args.no_compile)}
    rows = []
    for w in tqdm([w for w in WORKLOADS.values() if args.only in w.name], leave=False, disable=not sys.stderr.isatty()):
        rows += (mine := measure(w, peers, budget, most))
        print(show(mine) + "\n", flush=True)
        save(out, rows)
    if not args.only:
        rows += (kept := memory("OmniglotFC K=1, 1 query", runs=1 if args.quick else 5))
        print(show_memory(kept))
    save(out, rows)


if __name__ == "__main__":
    main()
