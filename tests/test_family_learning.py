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
