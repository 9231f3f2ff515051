"""Agreement, then time, then memory, of the engine's first workloads: ``python -m benchmarks.engine``."""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

import fastmaml
from benchmarks.peers import OURS, PEERS, plain_loop
from benchmarks.workloads import WORKLOADS, Workload
from fastmaml import _cpu


def gradient(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten().double() for p in model.parameters()])


def agreement(w: Workload, steps: dict, models: dict) -> dict[str, float]:
    """Median over single tasks of the relative error of each one's meta-gradient against float64."""
    tasks = w.tasks(1)
    exact = copy.deepcopy(next(iter(models.values()))).double()
    truth = plain_loop(exact, w)
    errors: dict[str, list[float]] = {name: [] for name in steps}
    for t in range(min(16, len(tasks[0]))):
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
            steps[name](tasks)
        a, b = gradient(models["torch.compile(vmap)"]), gradient(models["plain loop"])
        errors["torch.compile(vmap)"].append(float((a - b).norm() / b.norm()))
    return {name: statistics.median(values) for name, values in errors.items() if values}


def interleaved(steps: dict, models: dict, tasks, budget: float) -> dict[str, list[float]]:
    """Times of single calls, in turns, until the budget (seconds) is spent or the first has 3,000 of them. A turn is as many calls as fit into 10 ms, as in
    a training loop; of several the first is not counted: it finds the caches full of the peer's data."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for model in models.values():
        model.zero_grad()
    for step in steps.values():
        for _ in range(3):
            step(tasks)
    started = time.perf_counter()
    while time.perf_counter() - started < budget and len(times[next(iter(times))]) < 3000:
        for name, step in steps.items():
            turn, end = [], time.perf_counter() + 0.01
            while not turn or time.perf_counter() < end:
                begin = time.perf_counter()
                step(tasks)
                turn.append(time.perf_counter() - begin)
            times[name] += turn[1:] or turn
    return times


def measure(w: Workload, compile_too: bool, budget: float) -> list[dict]:
    torch.manual_seed(0)
    model = w.model()
    makers = {**OURS, **{n: p for n, p in PEERS.items() if compile_too or "compile" not in n}}
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
    errors = agreement(w, steps, models)
    small = {n: s for n, s in steps.items() if n not in ("plain loop", "torch.func loop")}
    times = interleaved(small, models, tasks, budget)  # the fast ones often, the slow ones a few times among them
    rest = {n: steps[n] for n in ("fastmaml meta_grad", "plain loop", "torch.func loop")}
    slow = interleaved(rest, models, tasks, budget)
    times |= {n: slow[n] for n in ("plain loop", "torch.func loop")}
    rows = []
    for name, values in times.items():
        q = statistics.quantiles(values, n=5) if len(values) > 1 else [values[0]] * 4
        rows.append(
            {
                "workload": w.name, "who": name, "error": errors.get(name), "first_ms": first[name] * 1e3, "median_ms": statistics.median(values) * 1e3,
                "p20_ms": q[0] * 1e3, "p80_ms": q[3] * 1e3, "repetitions": len(values),
            }
        )  # fmt: skip
    return rows


def show(rows: list[dict]) -> str:
    ours = {r["who"]: r["median_ms"] for r in rows if r["who"] in OURS}
    lines = [f"{rows[0]['workload']}", f"  {'':22s}{'error':>9s}{'first call':>12s}{'median':>11s}{'p20':>10s}{'p80':>10s}   ratio to meta_grad / backward()"]
    for r in rows:
        error = "-" if r["error"] is None else f"{r['error']:.1e}"
        ratio = "" if r["who"] in OURS else "   " + " / ".join(f"{r['median_ms'] / v:.1f}x" for v in ours.values())
        lines.append(f"  {r['who']:22s}{error:>9s}{r['first_ms']:>9.0f} ms{r['median_ms']:>8.2f} ms{r['p20_ms']:>10.2f}{r['p80_ms']:>10.2f}{ratio}")
    return "\n".join(lines)


MEMORY = """
import resource, sys, torch, fastmaml
from benchmarks.workloads import images
torch.set_num_threads(2)
tasks = images()(0)
maml = fastmaml.MAML(fastmaml.nn.OmniglotFC(5), inner_lr=0.01, inner_steps=int(sys.argv[1]))
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


def memory() -> list[dict]:
    """Peak MB above import and data, K = 1 and K = 50, beside what the Plan said: medians of five processes each, for where the heap stands differs by
    half a MB. Pages of files, which are code that runs for the first time and the same for every Plan, are counted apart."""
    rows = []
    for steps in (1, 50):
        command = [sys.executable, "-c", MEMORY, str(steps)]
        runs = [[float(v) for v in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()] for _ in range(5)]
        above, code, said, peak = (statistics.median(values) for values in zip(*runs, strict=True))
        rows.append({"workload": "OmniglotFC memory", "inner_steps": steps, "above_mb": above, "code_mb": code, "plan_mb": said, "total_mb": peak})
    return rows


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
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, suffix=".json") as f:
        json.dump({"machine": machine(), "rows": rows}, f, indent=1)
    os.chmod(f.name, 0o644)
    os.replace(f.name, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=8.0, help="seconds of repetitions per workload and group of peers")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it takes over a minute)")
    parser.add_argument("--only", default="", help="workloads whose name contains this")
    parser.add_argument("--out", type=Path, help="write all rows as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"machine: {machine()}\n")
    rows = []
    for w in tqdm([w for w in WORKLOADS.values() if args.only in w.name], leave=False, disable=not sys.stderr.isatty()):
        rows += (mine := measure(w, not args.no_compile, args.budget))
        print(show(mine) + "\n", flush=True)
        save(args.out, rows)
    kept = memory() if not args.only else []
    for r in kept:
        print(f"memory, OmniglotFC, K={r['inner_steps']}: {r['above_mb']:.1f} MB above import and data (the executor said {r['plan_mb']:.1f}) and {r['code_mb']:.1f} of code, {r['total_mb']:.0f} MB in all")
    save(args.out, rows + kept)


if __name__ == "__main__":
    main()
