"""The benchmarks: every way of computing a workload gives one meta-gradient, and each command runs in its quick form."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from plain_loop import one_thread  # noqa: F401
from test_omniglot import SUBSET, members, write_zip

import fastmaml
from fastmaml import nn

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))  # the benchmarks are not installed; last, so that the package is the one under test

from benchmarks import compare, engine  # noqa: E402
from benchmarks.conv import straight_line  # noqa: E402
from benchmarks.peers import CONV_PEERS, OURS, maml_of, plain_loop  # noqa: E402
from benchmarks.workloads import CONV_WORKLOADS, WORKLOADS, Workload, mini_imagenet, pooled, strided  # noqa: E402

MACHINE = {"cpu", "tier", "threads", "peak_gflops", "torch", "fastmaml", "python", "precision"}


def small(w: Workload, model, **changed) -> Workload:
    return dataclasses.replace(w, model=model, inner_steps=2, **changed)


@pytest.mark.parametrize(
    "w",
    [
        small(strided(tasks=2), lambda: nn.CbfinnOmniglot(5, filters=3)),
        small(pooled(tasks=2, queries=2), lambda: nn.PyTorchMAMLConv(5, filters=3)),
        dataclasses.replace(next(iter(WORKLOADS.values())), inner_steps=2),
    ],
    ids=lambda w: w.name,
)
def test_one_meta_gradient(w: Workload) -> None:
    """Of those that are in the benchmark; torch.compile of one of them would take minutes."""
    torch.manual_seed(0)
    model, tasks = w.model().double(), tuple(v.double() if v.is_floating_point() else v for v in w.tasks(0))
    found = {}
    for name, make in {**OURS, **CONV_PEERS}.items():
        if "compile" in name or ("channels" in name and tasks[0].dim() < 5):
            continue
        mine = copy.deepcopy(model)
        make(mine, w)(tasks)
        found[name] = engine.gradient(mine)
    truth = found["plain loop"]
    for name, g in found.items():
        assert (g - truth).norm() <= 1e-9 * truth.norm(), name


def test_the_inner_loop_changes_what_the_reference_adapts() -> None:
    for w in CONV_WORKLOADS.values():
        model = w.model()
        names = w.adapted(model)
        assert names and not any("norm" in name for name in names)
        assert any("norm" in name for name, _ in model.named_parameters())
        assert maml_of(w, model).plan(w.tasks(0)).steps == w.inner_steps
    w = WORKLOADS["OmniglotFC K=1, 1 query"]
    assert len(w.adapted(w.model())) == len(list(w.model().parameters()))


def test_workloads_run_natively() -> None:
    for make in (strided, pooled, mini_imagenet):
        w = make(tasks=1, queries=1)
        assert maml_of(w).meta_grad(w.tasks(0)).executor == "cpu"


def test_agreement_counts_the_tasks_it_is_asked_for() -> None:
    w = small(strided(tasks=2), lambda: nn.CbfinnOmniglot(5, filters=3))
    torch.manual_seed(0)
    model = w.model()
    calls = []

    def step(tasks) -> None:
        calls.append(len(tasks[0]))
        plain_loop(model, w)(tasks)

    assert engine.agreement(w, {"plain loop": step}, {"plain loop": model}, 5)["plain loop"] < 1e-2
    assert calls == [1] * 5


def test_straight_line() -> None:
    a, b = straight_line([1, 2, 5, 50], [3 + 2 * x for x in (1, 2, 5, 50)])
    assert abs(a - 3) < 1e-9 and abs(b - 2) < 1e-9
    _, slope = straight_line([1, 2, 100], [1.0, 2.0, 300.0])  # the long time is one of three, not all that counts
    assert slope < 2.5


def test_where_rows_go(tmp_path: Path) -> None:
    assert engine.place(None, "conv-time", partial=True) is None
    assert engine.place(tmp_path / "x.json", "conv-time", partial=True) == tmp_path / "x.json"
    usual = engine.place(None, "conv-time", partial=False)
    assert usual.name == "conv-time.json" and usual.parent.parent == engine.RESULTS
    engine.save(tmp_path / "new" / "x.json", [{"a": 1}])
    engine.save(tmp_path / "new" / "x.json", [{"a": 1}, {"a": 2}])
    written = json.loads((tmp_path / "new" / "x.json").read_text())
    assert set(written["machine"]) == MACHINE and len(written["rows"]) == 2
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["x.json"]


# ------------------------------------------------------------------------------------------------- the commands
def run(module: str, *arguments: object, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def omniglot(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("omniglot")
    write_zip(folder / f"{SUBSET}.zip", members())
    return folder


COMMANDS = {  # keys that every row has, and what else is said
    "time": ({"workload", "who", "error", "median_ms", "repetitions"}, "decisions differ"),
    "lines": ({"axis", "at", "median_ms", "line_ms", "residual"}, "time against shots"),
    "memory": ({"workload", "inner_steps", "above_mb", "plan_mb"}, "times what K=1 takes"),
    "threads": ({"workload", "one_thread_ms", "two_threads_ms", "speedup", "two_tasks_speedup"}, "on one thread"),
    "training": ({"who", "seed", "accuracy", "standard_error", "seconds", "first_losses", "float64_losses"}, "difference"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", COMMANDS)
def test_quick(what: str, omniglot: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    more = ("--data", omniglot, "--iterations", 2, "--seeds", 1) if what == "training" else ()
    done = run("conv", what, "--quick", "--out", out, *more, cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    keys, said = COMMANDS[what]
    written = json.loads(out.read_text())
    assert set(written["machine"]) == MACHINE
    assert written["rows"] and all(keys <= set(row) for row in written["rows"])
    assert said in done.stdout


@pytest.mark.slow
def test_quick_engine(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    done = run("engine", "--quick", "--out", out, cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert {row["workload"] for row in rows if "who" in row} == set(WORKLOADS)
    assert [row["inner_steps"] for row in rows if "above_mb" in row] == [1, 50]


def test_training_needs_data(tmp_path: Path) -> None:
    done = run("conv", "training", "--quick", cache=tmp_path)
    assert done.returncode == 2 and "--data" in done.stderr and "Traceback" not in done.stderr


# ------------------------------------------------------------------------------------------------- another revision
def test_interval_of_ratios() -> None:
    ratios = [1.0 + 0.01 * (i % 7 - 3) for i in range(70)]
    low, high = compare.interval(ratios)
    assert 0.98 <= low <= 1.0 <= high <= 1.02
    assert compare.interval([1.5] * 5) == (1.5, 1.5)


@pytest.mark.slow
def test_two_sides_in_turns() -> None:
    theirs, ours = (compare.Side(Path(fastmaml.__file__).parent.parent, threads=1) for _ in range(2))
    try:
        row = compare.compare("sinusoid K=1", theirs, ours, budget=0)
        assert row["pairs"] == 5 and row["theirs_ms"] > 0 and row["low"] <= row["ratio"] <= row["high"]
        with pytest.raises(RuntimeError, match="KeyError: 'no such workload'"):
            ours.turn("no such workload")
    finally:
        theirs.close()
        ours.close()


def test_compare_says_what_is_wrong(tmp_path: Path) -> None:
    done = run("compare", "HEAD", "--only", "resnet", cache=tmp_path)
    assert done.returncode == 2 and "no workload's name contains it; there are sinusoid K=1" in done.stderr
    done = run("compare", "no-such-revision", cache=tmp_path)
    assert done.returncode == 1 and "REV='no-such-revision': git cannot check it out" in done.stderr and "Traceback" not in done.stderr
