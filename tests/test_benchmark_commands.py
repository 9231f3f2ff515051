"""The commands of the benchmarks in their quick form, their reports, and comparing two revisions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_benchmarks import MACHINE, ROOT, SINUSOID
from test_omniglot import SUBSET, members, write_zip

from benchmarks import compare, protocol, report, run
from benchmarks.peers import META_GRAD, PLAIN
from benchmarks.worker import Failed, Worker


# ------------------------------------------------------------------------------------------------- reports
def results() -> dict:
    machine = protocol.machine(1)
    common = {"error": 1e-7, "first_s": 0.01, "p20_ms": 0.9, "median_ms": 1.0, "p80_ms": 1.2, "repetitions": 300, "ratio_p20": 0.9, "ratio": 1.0, "ratio_p80": 1.1, "above_mb": 3.0}
    speed = [
        {"workload": "a", "peer": META_GRAD, "order": 2, **common, "gflop": 0.02, "flips": 1, "decisions": 1000, "equal_error": 1e-7, "iteration_ms": 2.0},
        {"workload": "a", "peer": PLAIN, "order": 2, **common, "median_ms": 20.0, "ratio": 20.0},
        {"workload": "a", "peer": "other", "order": 2, **common, "median_ms": 5.0, "ratio": 5.0},
        {"workload": "a", "peer": "third", "order": 2, "reason": "not installed (pip install third)"},
    ]
    line = [{"axis": "tasks", "at": n, "peer": META_GRAD, "median_ms": 1.0 * n, "line_ms": 1.1 * n, "residual": 0.1, "repetitions": 3} for n in (1, 2, 4)]
    threads = [{"workload": "a", "tasks": 1, "threads": n, "median_ms": 2.0 / n, "speedup": 1.0 * n, "repetitions": 3} for n in (1, 2)]
    memory = [{"workload": "a", "inner_steps": k, "peer": META_GRAD, "above_mb": 3.0, "code_mb": 1.0, "plan_mb": 2.9, "total_mb": 200.0} for k in (1, 50)]
    return {"machine": machine, "speed": speed, "sweeps": line, "threads": threads, "memory": [*memory, {"workload": "a", "inner_steps": 1, "peer": PLAIN, "reason": "no"}]} | {
        part: [row | machine for row in rows] for part, rows in {"speed": speed, "sweeps": line, "threads": threads}.items()
    }


def test_report(tmp_path: Path) -> None:
    result = results()
    report.write(result, tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {"report.md", "speed.png", "floor.png", "sweeps.png", "threads.png", "memory.png"}
    text = (tmp_path / "report.md").read_text()
    for said in ("not installed (pip install third)", "20x", "largest distance from a straight line: 10.0%", result["machine"]["cpu"], "| 2.00x |"):
        assert said in text, said
    uncounted = {key: value for key, value in result["speed"][0].items() if key != "gflop"} | {"workload": "b", "reason": "in verify: not finished in 25 s"}
    report.write({**result, "speed": [*result["speed"], uncounted]}, tmp_path)
    graph = {**result["speed"][0], "peer": f"{META_GRAD} in a CUDA graph", "replay_ms": 0.0123}
    assert "graph alone" not in text and "| 3.0 | 0.0123 ms |" in report.markdown({**result, "speed": [*result["speed"], graph]})
    assert "third  " in report.terminal("speed", result["speed"]) and report.terminal("speed", []) == "speed: nothing was measured"


def test_the_readme_table() -> None:
    """Only measured numbers stand there, and they are those of the file that it names."""
    text = report.README.read_text()
    path = text.split(report.BEGIN.split("{")[0])[1].split(" -->")[0].strip()
    result = json.loads((ROOT / path).read_text())
    assert set(result["machine"]) >= MACHINE and all(set(row) >= MACHINE for row in result["speed"])
    assert report.section(result, path) in text, f"README.md's table is not that of {path}: python -m benchmarks.report {path} --readme"


def test_the_table_goes_into_the_readme() -> None:
    table = report.section(results(), "benchmarks/results/x/results.json")
    assert "| a: unknown here | 1.0e-07, 1.0e-07 | 20 ms | 5 ms (other) | 1 ms |" in table
    assert report.sizes(SINUSOID.name) == "25 tasks, 10 + 10 points, K = 1"
    text = f"before\n{report.BEGIN.format('old')}\nold\n{report.END}\nafter"
    assert report.into_readme(text, table) == f"before\n{table}\nafter"
    with pytest.raises(ValueError, match="has no section"):
        report.into_readme("nothing", table)


# ------------------------------------------------------------------------------------------------- the commands
def command(module: str, *arguments: object, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if "XDIST" not in k} | {"XDG_CACHE_HOME": str(cache), "OMP_WAIT_POLICY": "passive"}
    line = [sys.executable, "-m", *module.split(), *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
@pytest.mark.parametrize("part", run.PARTS)
def test_quick(part: str, tmp_path: Path) -> None:
    only = ("--only", SINUSOID.name) if part in ("speed", "first-order") else ()
    done = command("benchmarks.run", "--quick", "--parts", part, "--threads", 1, "--out", tmp_path, *only, cache=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "results.json").read_text())
    assert result[part] and all(set(row) >= MACHINE for row in result[part])
    assert "reason" not in str(result[part])
    assert part != "threads" or {row["threads"] for row in result[part]} >= {1, len(os.sched_getaffinity(0))}
    assert (tmp_path / "report.md").exists() and f"results: {tmp_path}" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--only", "resnet"), "no workload's name contains it; there are sinusoid, cbfinn;"),
        (("--threads", 0), "--threads 0: expected at least 1"),
        (("--agreement", 2), "--agreement 2: expected at least 3: errors are medians"),
        (("--learn2learn", "/nowhere"), "there is no learn2learn/algorithms/maml.py in it"),
        (("--peer", "no_such_module:x"), "no_such_module"),
        (("--parts", "speeds"), "invalid choice: 'speeds'"),
        (("--resume", "there", "--out", "here"), "leave out --out"),
    ],
)
def test_wrong_arguments(arguments: tuple, said: str, tmp_path: Path) -> None:
    done = command("benchmarks.run", *arguments, cache=tmp_path)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_report_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[1]")
    for place in (tmp_path / "x.json", tmp_path / "none.json"):
        done = command("benchmarks.report", place, cache=tmp_path)
        assert done.returncode == 2 and "not a results.json of benchmarks.run" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def omniglot(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("omniglot")
    write_zip(folder / f"{SUBSET}.zip", members())
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("what", ["sinusoid", "glyphs", "omniglot"])
def test_curves(what: str, omniglot: Path, tmp_path: Path) -> None:
    data = ("--data", omniglot) if what == "omniglot" else ()
    done = command("benchmarks.curves", what, "--quick", "--out", tmp_path / "out", *data, cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "out" / f"curves-{what}.json").read_text())
    assert {row["who"] for row in written["rows"]} == {PLAIN, "fastmaml"} and set(written["machine"]) == MACHINE
    assert all(len(row["first_losses"]) == len(row["float64_losses"]) == 10 and row["points"] for row in written["rows"])
    assert (tmp_path / "out" / f"curves-{what}.png").stat().st_size > 10_000 and "difference" in done.stdout


def test_curves_need_data(tmp_path: Path) -> None:
    done = command("benchmarks.curves", "omniglot", "--quick", cache=tmp_path)
    assert done.returncode == 2 and "--data" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_kernels(tmp_path: Path) -> None:
    done = command("pytest benchmarks/test_kernels.py -q -p no:cacheprovider -k", "sinusoid and linear_bwd", cache=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "linear_bwd_weight_jvp" in done.stdout and "GFLOP/s" in done.stdout


# ------------------------------------------------------------------------------------------------- another revision
def test_interval_of_ratios() -> None:
    ratios = [1.0 + 0.01 * (i % 7 - 3) for i in range(70)]
    low, high = compare.interval(ratios)
    assert 0.98 <= low <= 1.0 <= high <= 1.02
    assert compare.interval([1.5] * 5) == (1.5, 1.5)


@pytest.mark.slow
def test_two_sides_in_turns() -> None:
    with Worker(1) as theirs, Worker(1) as ours:
        row = compare.compare(SINUSOID.name, theirs, ours, budget=0)
        assert row["pairs"] == 5 and row["theirs_ms"] > 0 and row["low"] <= row["ratio"] <= row["high"]
        with pytest.raises(Failed, match="KeyError: 'no such workload'"):
            compare.compare("no such workload", theirs, ours, budget=0)


def test_compare_says_what_is_wrong(tmp_path: Path) -> None:
    done = command("benchmarks.compare", "HEAD", "--only", "resnet", cache=tmp_path)
    assert done.returncode == 2 and "no workload's name contains it; there are sinusoid, cbfinn" in done.stderr
    done = command("benchmarks.compare", "no-such-revision", cache=tmp_path)
    assert done.returncode == 1 and "REV='no-such-revision': git cannot check it out" in done.stderr and "Traceback" not in done.stderr
