"""The examples run from anywhere, give the same twice, answer wrong arguments, and leave nothing but pictures."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
PICTURES = {"glyphs-learning.png", "glyphs-task.png", "sinusoid.png"}


def run(folder: Path, name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, EXAMPLES / name, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_demo_twice(tmp_path: Path) -> None:
    texts = []
    for out in ("first", "second"):
        done = run(tmp_path, "demo.py", "--quick", "--out", out)
        assert done.returncode == 0, done.stderr
        assert not done.stderr  # no warnings; no progress bar where nobody watches
        assert {file.name for file in (tmp_path / out).iterdir()} == PICTURES
        assert all(f"{out}/{name}" in done.stdout for name in PICTURES)
        texts.append(re.sub(r" *[\d.]+ ms.*|\d+ seconds|" + out, "", done.stdout))
    assert texts[0] == texts[1]
    for name in PICTURES:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sinusoid.py", "glyphs.py"])
def test_alone(tmp_path: Path, name: str) -> None:
    done = run(tmp_path, name, "--iterations", 2, "--seed", 3, "--out", tmp_path / "new" / "folder")
    assert done.returncode == 0, done.stderr
    assert "new/folder/" in done.stdout


@pytest.mark.slow
def test_the_same_by_hand(tmp_path: Path) -> None:
    """The network of the letters, both ways: agreement and a time in every row, the baseline's speed is 1."""
    done = run(tmp_path, "plain_torch.py")
    assert done.returncode == 0 and not done.stderr, done.stderr
    rows = re.findall(r"^ +(plain torch loop|fastmaml), \d threads? +(\S+) +([\d.]+) ms +([\d.]+)x$", done.stdout, re.M)
    assert {row[0] for row in rows} == {"plain torch loop", "fastmaml"}
    assert all(float(error) < 1e-4 and float(elapsed) > 0 for _, error, elapsed, _ in rows)
    assert max(float(speed) for name, _, _, speed in rows if name == "plain torch loop") == 1.0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--iterations", "0"), "--iterations: '0': expected an integer of at least 1"),
        (("--seed", "x"), "--seed: 'x': expected an integer of at least 0"),
        (("--out", "file"), "--out file: File exists"),
    ],
)
def test_wrong_arguments(tmp_path: Path, arguments: tuple[str, str], said: str) -> None:
    (tmp_path / "file").touch()
    done = run(tmp_path, "sinusoid.py", *arguments)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
