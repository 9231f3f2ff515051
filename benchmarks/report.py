"""Results as text, Markdown and pictures: ``python -m benchmarks.report results.json [--readme]`` (which also writes README.md's table anew)."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks import pictures
from benchmarks.peers import BACKWARD, META_GRAD, PLAIN, is_mine
from benchmarks.sweeps import RESIDUAL
from benchmarks.worker import ROOT
from benchmarks.workloads import find
from fastmaml.files import whole_file

README = ROOT / "README.md"
BEGIN, END = "<!-- measured: {} -->", "<!-- measured: end -->"
Rows = list[dict]


def by(rows: Iterable[dict], key: str) -> dict[str, Rows]:
    """Rows in groups, in the order in which the groups appear."""
    groups: dict[str, Rows] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def peer(rows: Rows, name: str) -> dict:
    return next((r for r in rows if r["peer"] == name), {})


def others(rows: Rows) -> Rows:
    """Measured peers, without our own rows."""
    return [r for r in rows if not is_mine(r["peer"]) and "ratio" in r]


def duration(ms: float | None) -> str:
    if ms is None:
        return ""
    return f"{ms / 1e3:.3g} s" if ms >= 1000 else f"{ms:.3g} ms"


# ------------------------------------------------------------------------------------------------- tables
def speed_lines(rows: Rows) -> tuple[str, list[str], list[list[str]]]:
    """Title, head and cells of one workload."""
    ours = peer(rows, META_GRAD)
    title = rows[0]["workload"]
    if "gflop" in ours:
        title += f": {ours['gflop']:.3g} GFLOP as planned, {ours['gflop'] / ours['median_ms'] * 1e3:.0f} a second; "
        title += f"{ours['flips']} of {ours['decisions']:,} decisions differ from float64's, with these replayed the error is {ours['equal_error']:.0e}"
    head = ["", "error", "first call", "median", "p20 .. p80", "calls", "ratio", "p20 .. p80", "whole iteration", "peak MB", ""]
    replayed = ["graph alone"] if any("replay_ms" in r for r in rows) else []
    cells = []
    for r in rows:
        has = "median_ms" in r
        cells.append([
            r["peer"],
            f"{r['error']:.1e}" if "error" in r else "",
            duration(1e3 * r["first_s"]) if "first_s" in r else "",
            duration(r.get("median_ms")),
            f"{r['p20_ms']:.3g} .. {r['p80_ms']:.3g}" if has else "",
            f"{r['repetitions']:,}" if has else "",
            f"{r['ratio']:.3g}x" if "ratio" in r else "",
            f"{r['ratio_p20']:.3g} .. {r['ratio_p80']:.3g}" if "ratio" in r else "",
            duration(r.get("iteration_ms")),
            f"{r['above_mb']:.1f}" if "above_mb" in r else "",
            *(duration(r.get("replay_ms")) for _ in replayed),
            r.get("reason") or (r["precision"] if "allowed" in r else ""),
        ])  # fmt: skip
    return title, [*head[:-1], *replayed, head[-1]], cells


def sweep_lines(rows: Rows) -> tuple[str, list[str], list[list[str]]]:
    head = [rows[0]["axis"].replace("_", " "), "", "median", "from the straight line"]
    cells = [[str(r["at"]), r["peer"], duration(r["median_ms"]), f"{r['residual']:+.1%}" if "residual" in r else ""] for r in rows]
    worst = [abs(r["residual"]) for r in rows if r["peer"] == META_GRAD and "residual" in r]
    said = f"; fastmaml's largest distance from a straight line: {max(worst):.1%} (at most {RESIDUAL:.0%})" if worst else ""
    return f"time against {head[0]}{said}", head, cells


def thread_lines(rows: Rows) -> tuple[str, list[str], list[list[str]]]:
    cells = [[str(r["tasks"]), str(r["threads"]), duration(r["median_ms"]), f"{r['speedup']:.2f}x"] for r in rows]
    return f"threads: {rows[0]['workload']}", ["tasks", "threads", "median", "against one thread"], cells


def memory_lines(rows: Rows) -> tuple[str, list[str], list[list[str]]]:
    cells = [
        [str(r["inner_steps"]), r["peer"], *(f"{r[key]:.1f}" if key in r else "" for key in ("above_mb", "plan_mb", "code_mb", "total_mb")), r.get("reason", "")]
        for r in rows
    ]
    head = ["inner steps", "", "MB above import and data", "said before", "code", "in all", ""]
    return f"memory: {rows[0]['workload']}", head, cells


LINES: dict[str, tuple[str, Callable]] = {
    "speed": ("workload", speed_lines),
    "first-order": ("workload", speed_lines),
    "sweeps": ("axis", sweep_lines),
    "threads": ("workload", thread_lines),
    "memory": ("workload", memory_lines),
}


def terminal(part: str, rows: Rows) -> str:
    """One group of rows as a table of text."""
    if not rows:
        return f"{part}: nothing was measured"
    title, head, cells = LINES[part][1](rows)
    table = [head, *cells]
    widths = [max(len(line[i]) for line in table) for i in range(len(head))]
    texts = ["  ".join(c.ljust(n) if i == 0 or i == len(head) - 1 else c.rjust(n) for i, (c, n) in enumerate(zip(line, widths, strict=True))) for line in table]
    return "\n".join([title, *("  " + t.rstrip() for t in texts)])


def markdown(result: dict) -> str:
    here = result["machine"]
    versions = ", ".join(f"{name} {v}" for name, v in here["versions"].items())
    peak = f", measured peak {here['peak_gflops']} GFLOP/s" if here["peak_gflops"] else ""
    parts = [
        "# Measured",
        f"{here['cpu']} ({here['device']}, {here['tier']}), {here['threads']} threads, {here['precision']}{peak}; {versions};"
        f" commit {here['commit']}. Ratios: time of the row over that of `{META_GRAD}` in the same rounds. Error: median over single tasks against float64.",
    ]
    names = {"speed": "Second order", "first-order": "First order", "sweeps": "Sweeps", "threads": "Threads", "memory": "Memory"}
    for part, (key, lines) in LINES.items():
        if not result.get(part):
            continue
        parts += [f"## {names[part]}", *(f"![{name}]({file})" for name, file in pictures.of(part, here))]
        for rows in by(result[part], key).values():
            title, head, cells = lines(rows)
            parts += [f"**{title}**", "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *cells))]
    return "\n\n".join(parts) + "\n"


def write(result: dict, folder: Path) -> None:
    """report.md and the pictures it shows, each whole or not at all."""
    pictures.draw(result, folder)
    with whole_file(folder / "report.md") as file:
        file.write(markdown(result).encode())


# ------------------------------------------------------------------------------------------------- README
def section(result: dict, path: str) -> str:
    """README.md's table, of the second-order rows in ``path``, its place in the repository."""
    here = result["machine"]
    lines = [
        BEGIN.format(path),
        f"{here['cpu']}, {here['tier']}, {here['threads']} threads, torch {here['versions']['torch']}, {here['precision']}; medians of turns, each peer in a process of its own."
        f" Error: median over single tasks against float64. Every peer and its spread: [report]({Path(path).parent}/report.md).",
        "",
        "| meta-iteration | error: plain torch, ours | plain loop | best other peer | `meta_grad` | `backward()` | ratio to both |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, rows in by(result["speed"], "workload").items():
        ours, plain = peer(rows, META_GRAD), peer(rows, PLAIN)
        best = min((r for r in others(rows) if r["peer"] != PLAIN), key=lambda r: r["median_ms"], default={})
        if "ratio" not in ours:
            continue
        backward = peer(rows, BACKWARD).get("median_ms")
        lines.append(
            f"| {name}: {sizes(name)} | {plain.get('error', float('nan')):.1e}, {ours['error']:.1e} | {duration(plain.get('median_ms'))} |"
            f" {duration(best.get('median_ms'))} ({best.get('peer', 'none')}) | {duration(ours['median_ms'])} | {duration(backward)} |"
            f" {plain.get('ratio', float('nan')):.3g}x, {best.get('ratio', float('nan')):.3g}x |"
        )
    lines += ["", f"![speed-up by workload]({Path(path).parent}/speed.png)", END]
    return "\n".join(lines)


def sizes(name: str) -> str:
    try:
        w = find(name)
    except KeyError:  # of another revision
        return "unknown here"
    rows = f"{w.ways}-way {w.shots}-shot, {w.queries} {'query' if w.queries == 1 else 'queries'}" if w.image else f"{w.shots} + {w.queries} points"
    return f"{w.tasks} tasks, {rows}, K = {w.inner_steps}"


def into_readme(text: str, table: str) -> str:
    """``text`` with its measured section replaced. ValueError where there is none."""
    begin, end = text.find(BEGIN.split("{")[0]), text.find(END)
    if begin < 0 or end < begin:
        raise ValueError(f"README.md has no section between {BEGIN!r} and {END!r}")
    return text[:begin] + table + text[end + len(END) :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="a results.json of benchmarks.run")
    parser.add_argument("--readme", action="store_true", help="also write README.md's table anew from it")
    args = parser.parse_args()
    try:
        result = json.loads(args.results.read_text())
        result["machine"]["versions"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"{args.results}: not a results.json of benchmarks.run ({type(error).__name__}: {error})")
    write(result, args.results.parent)
    if args.readme:
        place = args.results.resolve()
        if not place.is_relative_to(ROOT):
            parser.error(f"{args.results}: README.md can only show results inside of the repository")
        with whole_file(README) as file:
            file.write(into_readme(README.read_text(), section(result, place.relative_to(ROOT).as_posix())).encode())


if __name__ == "__main__":
    main()
