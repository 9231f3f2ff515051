"""fastmaml beside what people run today: ``python -m benchmarks.run``.

speed        agreement with float64, then interleaved times, whole iterations and peak memory, of each workload by each peer
first-order  the same in first order
sweeps       time against inner steps, tasks, shots and filters
threads      a meta-batch, and one task alone, on 1 .. all threads
memory       peak against inner steps

Results go to benchmarks/results/<date>-<machine>/: results.json after each workload, then report.md and its pictures (benchmarks/report.py). The
default is a subset of about twenty minutes on two cores; --complete takes hours, unattended, and goes on with --resume where it was cut off.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import report, sweeps
from benchmarks.cuda_graph import graphed
from benchmarks.libraries import LIBRARIES
from benchmarks.peers import LOWER, META_GRAD, OURS, PEERS, PLAIN, Peer, has_convolutions
from benchmarks.protocol import Settings, folder_of, machine, measure
from benchmarks.workloads import DEFAULT, WORKLOADS, Workload
from fastmaml.files import whole_file

PARTS = ("speed", "first-order", "sweeps", "threads", "memory")
FEWER = {"inner_steps": (1, 2, 5), "tasks": (1, 8, 32), "shots": (1, 5, 15), "filters": (16, 64)}  # points of the default
COMPILED = ("torch.compile", "JAX")  # for minutes, where there are convolutions
FIRST_ORDER = ("sinusoid, cbfinn", "Omniglot FC, learn2learn")  # of the default
NEVER_BEST = ("torch.func loop", "torch.compile(loop)", "JAX map(jit)")


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    here = machine(args.threads, args.device)
    out = args.resume or args.out or (None if args.quick else folder_of(here))
    settings = Settings(args.threads, args.budget, args.agreement, args.time_limit, 1000 * args.memory_limit, args.device)
    asked = {name: getattr(args, name) for name in ("complete", "quick", "parts", "only", "peers")} | {"own": [p.name for p in args.own]}
    result = {"machine": here, "settings": asdict(settings), "asked": asked, "done": [], **{part: [] for part in args.parts}}
    if args.resume:
        result = resumed(args.resume, result)
    todo = [job for job in jobs(args, settings) if list(job[:2]) not in result["done"]]
    bar = tqdm(todo, leave=False, disable=not sys.stderr.isatty())
    for part, title, job in bar:
        bar.set_description(title)
        rows = job(bar.set_postfix_str)
        result[part] += [here | row for row in rows]  # a row of the threads has its own number of them
        bar.write(report.terminal(part, rows) + "\n", file=sys.stdout)
        sys.stdout.flush()
        result["done"].append([part, title])
        save(result, out)
    if out:
        report.write(result, out)
        print(f"results: {out}")


def resumed(folder: Path, fresh: dict) -> dict:
    """The results of a run that was cut off, if it measured the same: rows of two machines, commits or settings are not mixed."""
    try:
        old = json.loads((folder / "results.json").read_text())
        parts = {key: old[key] for key in fresh}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SystemExit(f"--resume {folder}: no results.json of benchmarks.run to go on with ({type(error).__name__}: {error})") from error
    for key in ("machine", "settings", "asked"):
        for name, now in json.loads(json.dumps(fresh[key])).items():
            before = parts[key].get(name)
            if name != "peak_gflops" and before != now:  # that is measured anew each time
                raise SystemExit(f"--resume {folder}: {name} was {before} there and is {now} now: make it the same, or begin anew with --out")
    return parts


def jobs(args: argparse.Namespace, settings: Settings) -> Iterator[tuple]:
    """(part, title, function of ``tell`` that returns rows)."""
    whole = args.complete
    for w in chosen(args):
        for part, variant in (("speed", w), ("first-order", w.varied(first_order=True))):
            if part in args.parts and (part == "speed" or whole or args.only or w.name.split(" [")[0] in FIRST_ORDER):
                peers = peers_of(args, variant)
                yield part, variant.name, lambda tell, v=variant, p=peers: measure(v, p, settings, tell)
    if "sweeps" in args.parts:
        for axis, points in (sweeps.AXES if whole else FEWER).items():
            few, base = (points[:2], sweeps.BASE.varied(tasks=2)) if args.quick else (points, sweeps.BASE)
            yield "sweeps", axis, lambda tell, a=axis, p=few, b=base: sweeps.sweep(a, p, settings, tell, b)
    if "threads" in args.parts and args.device == "cpu":
        names = sweeps.ALONE if whole else sweeps.ALONE[:1]
        for name in names:
            yield "threads", name, lambda tell, n=name: sweeps.threads(n, settings, tell)
    if "memory" in args.parts:
        for name, steps in list(sweeps.MEMORY.items())[args.quick :]:
            few, runs = (steps, 5) if whole else ((1, 3) if args.quick else steps[::2], 1)
            yield "memory", name, lambda tell, n=name, k=few, r=runs: sweeps.memory(n, k, r, settings, tell)


def chosen(args: argparse.Namespace) -> list[Workload]:
    names = list(WORKLOADS) if args.complete or args.only else DEFAULT
    found = [WORKLOADS[n] for n in names if args.only in n]
    if args.quick:
        found = [w.varied(tasks=2, queries=1, inner_steps=min(w.inner_steps, 2)) for w in found]
    return found


def peers_of(args: argparse.Namespace, w: Workload) -> list[Peer]:
    """The plain loop always: the others are held against it. On a GPU also fastmaml in its lower precisions, and each in a CUDA graph."""
    known = {**PEERS, **LIBRARIES}
    if args.device != "cpu":
        known = {**LOWER, **known}
        known |= {p.name: p for p in map(graphed, (OURS[META_GRAD], *known.values()))}
    if args.peers:
        known = {n: p for n, p in known.items() if n == PLAIN or any(text in n for text in args.peers)}
    elif args.quick or (w.first_order and not args.complete):
        known = {n: known[n] for n in (PLAIN, "torch.func vmap")}
    elif not args.complete:
        known = {n: _left_out(p, w) for n, p in known.items()}
    return [*known.values(), *args.own]


def _left_out(peer: Peer, w: Workload) -> Peer:
    """Absent from the default set, where it is slow to compile or never the best."""
    slow = peer.name.startswith(COMPILED) and has_convolutions(w)
    why = "compiles for minutes" if slow else "is never the best" if peer.name.startswith(NEVER_BEST) else None
    return Peer(peer.name, peer.make, lambda w: f"left out, for it {why}: --complete", peer.compiles) if why else peer


def own_peer(text: str) -> Peer:
    module, _, attribute = text.partition(":")
    sys.path.append(os.getcwd())
    try:
        peer = getattr(import_module(module), attribute or "peer")
    except (ImportError, AttributeError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error
    return Peer(text, peer.make, peer.absent, peer.compiles)  # by this name the worker finds it


def _unusable(device: str) -> str | None:
    """Why nothing can be measured on this device, or None."""
    try:
        kind, index = torch.device(device).type, torch.device(device).index or 0
    except RuntimeError as error:
        return str(error).splitlines()[0]
    if kind not in ("cpu", "cuda"):
        return "expected cpu or cuda"
    there = torch.cuda.device_count() if kind == "cuda" else 1
    return None if index < there else f"torch sees {there} CUDA device{'s' * (there != 1)} here"


def save(result: dict, out: Path | None) -> None:
    """Whole or not at all."""
    if out:
        out.mkdir(parents=True, exist_ok=True)
        with whole_file(out / "results.json") as file:
            file.write(json.dumps(result, indent=1).encode())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--complete", action="store_true", help="every workload, peer and point")
    size.add_argument("--quick", action="store_true", help="a try of every part on small sizes, whose times mean nothing; no files unless --out")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--only", default="", help="workloads whose name contains this, of all there are")
    parser.add_argument("--peers", nargs="+", metavar="TEXT", help="peers whose name contains one of these; the plain loop always")
    parser.add_argument("--peer", dest="own", action="append", type=own_peer, default=[], metavar="MODULE:NAME", help="a benchmarks.peers.Peer of your own")
    parser.add_argument("--learn2learn", type=Path, metavar="CHECKOUT", help="its sources, where it is not installed")
    parser.add_argument("--device", default="cpu", help="where to compute: cpu (default), cuda, cuda:1, ...; in float32, without TF32")
    parser.add_argument("--threads", type=int, default=2, help="of torch and fastmaml (default %(default)s)")
    parser.add_argument("--budget", type=float, help="seconds of repetitions per peer and workload (default 10; 3 without --complete)")
    parser.add_argument("--agreement", type=int, help="single tasks that are held against float64 (default 16; 8 without --complete)")
    parser.add_argument("--time-limit", type=float, metavar="S", help="seconds of any one answer, compiling too (default 240; 100 without --complete)")
    parser.add_argument("--memory-limit", type=float, default=10.0, metavar="GB", help="of one process (default %(default)s)")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="go on with the results in this folder, where a run with the same arguments was cut off")
    args = parser.parse_args()
    if args.only and not any(args.only in name for name in WORKLOADS):
        parser.error(f"--only {args.only!r}: no workload's name contains it; there are {'; '.join(WORKLOADS)}")
    if args.threads < 1:
        parser.error(f"--threads {args.threads}: expected at least 1")
    if args.agreement is not None and args.agreement < 3:
        parser.error(f"--agreement {args.agreement}: expected at least 3: errors are medians, which one flipped ReLU must not decide")
    if why := _unusable(args.device):
        parser.error(f"--device {args.device}: {why}")
    if args.resume and args.out:
        parser.error(f"--resume {args.resume} --out {args.out}: results go on in the folder of --resume, so leave out --out")
    if args.learn2learn:
        if not (args.learn2learn / "learn2learn" / "algorithms" / "maml.py").is_file():
            parser.error(f"--learn2learn {args.learn2learn}: there is no learn2learn/algorithms/maml.py in it")
        os.environ["LEARN2LEARN"] = str(args.learn2learn.resolve())
    args.budget = args.budget if args.budget is not None else 0.0 if args.quick else 10.0 if args.complete else 3.0
    args.agreement = args.agreement or (5 if args.quick else 16 if args.complete else 8)
    args.time_limit = args.time_limit or (240.0 if args.complete else 100.0)
    return args


if __name__ == "__main__":
    main()
