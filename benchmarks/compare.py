"""This working tree against another revision: ``python -m benchmarks.compare REV``.

The revision is built in a worktree of its own, which is removed at the end. Both sides run the workloads of this tree's ``benchmarks/workloads.py``, each
in a worker of its own (worker.py) that sleeps while the other computes, in turns A B, B A, ...; each pair of turns gives one ratio. Printed are both medians, the
median ratio (above 1: the revision was slower) and its 95 % interval by bootstrap. Exit status 1 if some workload has become slower beyond --tolerance
with its whole interval.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.peers import META_GRAD
from benchmarks.worker import ROOT, Failed, Worker
from benchmarks.workloads import DEFAULT, WORKLOADS

BOOTSTRAPS = 2000
TURN = 0.05  # seconds of calls in one turn, at least one call

@contextlib.contextmanager
def built(revision: str) -> Iterator[Path]:
    """A worktree of the revision with the extension in place. Raises SystemExit where git does not know it or it does not build."""
    with tempfile.TemporaryDirectory(prefix="fastmaml-compare-") as folder:
        root = Path(folder).resolve() / "tree"
        _checked(["git", "worktree", "add", "--detach", str(root), revision], ROOT, f"REV={revision!r}: git cannot check it out")
        try:
            _checked([sys.executable, "setup.py", "build_ext", "--inplace"], root, f"REV={revision!r}: it does not build")
            yield root
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(root)], cwd=ROOT, check=False, capture_output=True)


def _checked(command: list[str], cwd: Path, what: str) -> None:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise SystemExit(f"{what}: there is no {command[0]} here") from None
    if done.returncode:
        raise SystemExit(f"{what}:\n{done.stderr.strip()[-2000:]}")


def interval(ratios: list[float], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the median, by bootstrap over the pairs (Efron 1979)."""
    rng = random.Random(seed)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(BOOTSTRAPS))
    return medians[int(0.025 * BOOTSTRAPS)], medians[int(0.975 * BOOTSTRAPS) - 1]


def compare(name: str, theirs: Worker, ours: Worker, budget: float) -> dict:
    """Seconds of both sides in turns, until the budget is spent. Raises Failed, for an older revision may not know the model or an argument."""
    sides = {"theirs": theirs, "ours": ours}
    for side in sides.values():
        side.ask("make", name, name, META_GRAD)
        side.ask("turn", name, TURN)
    times: dict[str, list[float]] = {who: [] for who in sides}
    started = time.perf_counter()
    while len(times["ours"]) < 5 or time.perf_counter() - started < budget:
        for who in sides if len(times["ours"]) % 2 else reversed(sides):
            times[who].append(statistics.median(sides[who].ask("turn", name, TURN)))
    ratios = [a / b for a, b in zip(*times.values(), strict=True)]
    low, high = interval(ratios)
    medians = {f"{who}_ms": statistics.median(found) * 1e3 for who, found in times.items()}
    return {"workload": name, **medians, "ratio": statistics.median(ratios), "low": low, "high": high, "pairs": len(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", metavar="REV", help="a commit, branch or tag of this repository")
    parser.add_argument("--only", default="", help="workloads whose name contains this, of all there are (default: those of make bench)")
    parser.add_argument("--budget", type=float, default=15.0, help="seconds of repetitions per workload (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tolerance", type=float, default=0.02, help="how much slower a workload may become (default %(default)s)")
    args = parser.parse_args()

    names = [name for name in (WORKLOADS if args.only else DEFAULT) if args.only in name]
    if not names:
        parser.error(f"--only {args.only!r}: no workload's name contains it; there are {'; '.join(WORKLOADS)}")
    with built(args.revision) as root, Worker(args.threads, root) as theirs, Worker(args.threads) as ours:
        sys.exit(_table(names, args, theirs, ours))


def _table(names: list[str], args: argparse.Namespace, theirs: Worker, ours: Worker) -> int:
    width, slower = max(map(len, names)), 0
    print(f"{'':{width}s}  {args.revision[:12]:>12s}      this tree   ratio   95 % interval   pairs")
    for name in names:
        try:
            row = compare(name, theirs, ours, args.budget)
        except Failed as error:
            print(f"{name:{width}s}  not compared: {error}", flush=True)
            continue
        regressed = row["high"] < 1 - args.tolerance
        slower += regressed
        print(
            f"{name:{width}s}  {row['theirs_ms']:9.3f} ms   {row['ours_ms']:9.3f} ms   {row['ratio']:.3f}   {row['low']:.3f} - {row['high']:.3f}   {row['pairs']:5d}"
            + ("   SLOWER" if regressed else ""),
            flush=True,
        )
    return 1 if slower else 0


if __name__ == "__main__":
    main()
