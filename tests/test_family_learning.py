"""The learning benchmark of the methods: every problem and method of its table can be trained, and what it prints is a table."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import family_learning
from benchmarks import family_problems as problems
from fastmaml.training.evaluate import mean_and_interval

ROOT = Path(__file__).parent.parent
PLACES = [os.environ.get("FASTMAML_OMNIGLOT"), ROOT.parent / "shared/data/omniglot"]
REAL = next((Path(p) for p in PLACES if p and Path(p).is_dir()), None)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "benchmarks.family_learning", *arguments]
    return subprocess.run(line, cwd=ROOT, env=os.environ | {"OMP_WAIT_POLICY": "passive"}, capture_output=True, text=True, timeout=300)


def test_table() -> None:
    done = command("modes", "--iterations", "2")
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[1:]] == [f"| {name}" for name in problems.Modes.methods]
    assert all("±" in row for row in rows[1:])


def test_characters_need_data() -> None:
    done = command("pretrained")
    assert done.returncode == 2 and "--data FOLDER" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(REAL is None, reason="no Omniglot here: set FASTMAML_OMNIGLOT to a folder with its zips")
@pytest.mark.parametrize("name", ["omniglot", "pretrained", "embeddings"])
def test_characters(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(problems, "pretrain", lambda data, whole=problems.pretrain.__wrapped__: whole(data, batches=1))
    monkeypatch.setattr(family_learning, "NEW", family_learning.AT_ONCE)
    on = problems.problem(name, REAL)
    monkeypatch.setattr(on, "tasks", 2, raising=False)
    for method, make in on.methods.items():
        torch.manual_seed(0)
        maml = make()
        family_learning.train(on, method, maml, iterations=1, seed=0)
        assert (getattr(maml, "step_loss_weights", None) is not None) == (method == "MAMLPlusPlus"), "its schedule, and nobody else's"
        accuracy = family_learning.on_new_tasks(on, maml, seed=0)
        assert accuracy.shape == (family_learning.AT_ONCE,) and 0 <= float(accuracy.mean()) <= 1


# problem, what is worse there, what was made for it, meta-iterations (fewer than in docs/methods.md, which has the numbers)
LEARNED = {
    "sinusoids": ("sinusoid", "MAML", ("CAVIA", "TNets", "MTNets", "LowRankMAML", "SubspaceMAML"), 1500),
    "a large inner rate": ("rates", "MAML, inner_lr=0.1", ("TNets, inner_lr=0.1", "MTNets, inner_lr=0.1"), 5000),
    "three modes": ("modes", "MAML", ("Mixture", "MMAML", "HSML"), 3000),
    "characters": ("omniglot", "ANIL", ("MAMLPlusPlus", "ProtoMAML"), 100),
    "a pretrained body": ("pretrained", "HeadOnly", ("MTL",), 40),
    "embeddings": ("embeddings", "ZeroHead", ("LEO",), 1000),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNED)
def test_it_learns_what_it_was_made_for(name: str) -> None:
    """Better on new tasks than what it is held against, and (but for the mixture) by more than the interval of the pairs."""
    problem, worse, better, iterations = LEARNED[name]
    if problem in ("omniglot", "pretrained", "embeddings") and REAL is None:
        pytest.skip("no Omniglot here: set FASTMAML_OMNIGLOT to a folder with its zips")
    on = problems.problem(problem, REAL)
    found = {}
    for method in (m for m in on.methods if m.startswith((worse, *better))):
        torch.manual_seed(0)
        maml = on.methods[method]()
        family_learning.train(on, method, maml, iterations, seed=0)
        found[method] = family_learning.on_new_tasks(on, maml, seed=0)
    assert len(found) == 1 + len(better)
    for method in (m for m in found if m.startswith(better)):
        gain, half = mean_and_interval((found[method] - found[worse]) * (-1 if on.measure == "error" else 1))
        least = 0 if method.startswith("Mixture") else half  # its gain is two intervals, and another machine rounds its way to other weights
        assert gain > least, f"{method}: {gain:+.3f} ± {half:.3f}"
