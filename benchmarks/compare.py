"""This working tree against another revision: ``python -m benchmarks.compare REV``.

The revision is built in a worktree of its own, which is removed at the end. Both sides run the workloads of this tree's ``benchmarks/workloads.py``, each
in a process of its own that sleeps while the other computes, in turns A B, B A, ...; each pair of turns gives one ratio. Printed are both medians, the
median ratio (above 1: the revision was slower) and its 95 % interval by bootstrap. Exit status 1 if some workload has become slower beyond --tolerance
with its whole interval.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
BOOTSTRAPS = 2000
TURN = 0.05  # seconds of calls in one turn, at least one call

# ``fastmaml`` comes from the first folder, the workloads from the second
SIDE = """
import sys
sys.path.insert(0, sys.argv[1])
import fastmaml
assert fastmaml.__file__.startswith(sys.argv[1]), fastmaml.__file__
sys.path.insert(0, sys.argv[2])
from benchmarks.compare import serve
serve(int(sys.argv[3]))
"""


def serve(threads: int) -> None:
    """A side: reads the name of a workload per line and answers with the seconds of one turn, as JSON. The first turn of a workload is a warm-up."""
    import torch

    from benchmarks.peers import OURS
    from benchmarks.workloads import CONV_WORKLOADS, WORKLOADS

    torch.set_num_threads(threads)
    known, made = {**WORKLOADS, **CONV_WORKLOADS}, {}
    for line in sys.stdin:
        name = line.strip()
        try:
            if name not in made:
                torch.manual_seed(0)
                w = known[name]
                made = {name: (OURS["fastmaml meta_grad"](w.model(), w), w.tasks(0))}
            step, tasks = made[name]
            print(json.dumps(_turn(step, tasks)), flush=True)
        except Exception as error:  # an older revision may not know the model or an argument
            print(json.dumps({"error": f"{type(error).__name__}: {error}".splitlines()[0]}), flush=True)


def _turn(step, tasks) -> float:
    """Median seconds of the calls of a turn; of several the first is not counted: it finds the caches full of the other side's data."""
    calls, end = [], time.perf_counter() + TURN
    while not calls or time.perf_counter() < end:
        begin = time.perf_counter()
        step(tasks)
        calls.append(time.perf_counter() - begin)
    return statistics.median(calls[1:] or calls)


class Side:
    """A child process that computes when asked."""

    def __init__(self, root: Path, threads: int) -> None:
        environment = os.environ | {"OMP_WAIT_POLICY": "passive"}  # a waiting side leaves the cores alone
        command = [sys.executable, "-c", SIDE, str(root), str(ROOT), str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=tempfile.gettempdir())

    def turn(self, name: str) -> float:
        """Raises RuntimeError with what the side says, or that it has died."""
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process ended with status {self.process.wait()}")
        answer = json.loads(line)
        if isinstance(answer, dict):
            raise RuntimeError(answer["error"])
        return answer

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


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


def compare(name: str, theirs: Side, ours: Side, budget: float) -> dict:
    """Seconds of both sides in turns, until the budget is spent."""
    sides = {"theirs": theirs, "ours": ours}
    for side in sides.values():
        side.turn(name)
    times: dict[str, list[float]] = {who: [] for who in sides}
    started = time.perf_counter()
    while len(times["ours"]) < 5 or time.perf_counter() - started < budget:
        for who in sides if len(times["ours"]) % 2 else reversed(sides):
            times[who].append(sides[who].turn(name))
    ratios = [a / b for a, b in zip(*times.values(), strict=True)]
    low, high = interval(ratios)
    medians = {f"{who}_ms": statistics.median(found) * 1e3 for who, found in times.items()}
    return {"workload": name, **medians, "ratio": statistics.median(ratios), "low": low, "high": high, "pairs": len(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", metavar="REV", help="a commit, branch or tag of this repository")
    parser.add_argument("--only", default="", help="workloads whose name contains this")
    parser.add_argument("--budget", type=float, default=15.0, help="seconds of repetitions per workload (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tolerance", type=float, default=0.02, help="how much slower a workload may become (default %(default)s)")
    args = parser.parse_args()

    from benchmarks.workloads import CONV_WORKLOADS, WORKLOADS

    names = [name for name in (*WORKLOADS, *CONV_WORKLOADS) if args.only in name]
    if not names:
        parser.error(f"--only {args.only!r}: no workload's name contains it; there are {', '.join((*WORKLOADS, *CONV_WORKLOADS))}")
    with built(args.revision) as root:
        theirs, ours = Side(root, args.threads), Side(ROOT, args.threads)
        try:
            sys.exit(_table(names, args, theirs, ours))
        finally:
            theirs.close()
            ours.close()


def _table(names: list[str], args: argparse.Namespace, theirs: Side, ours: Side) -> int:
    width, slower = max(map(len, names)), 0
    print(f"{'':{width}s}  {args.revision[:12]:>12s}      this tree   ratio   95 % interval   pairs")
    for name in names:
        try:
            row = compare(name, theirs, ours, args.budget)
        except RuntimeError as error:
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
