"""The README's python blocks run as they stand, in order, in one namespace; only the endless loader is cut short."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path

import pytest

from fastmaml.tasks import Glyphs

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_blocks_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    endless = Glyphs.__iter__
    monkeypatch.setattr(Glyphs, "__iter__", lambda source: islice(endless(source), 2))
    names: dict[str, object] = {}
    blocks = list(re.finditer(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE))
    assert len(blocks) >= 3
    for block in blocks:
        line = README.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], "README.md", "exec"), names)  # with the README's line numbers in errors
    assert "'cpu'" in capsys.readouterr().out
    assert type(names["network"]) is type(names["model"])


def test_newcomers_page() -> None:
    lines = README.splitlines()
    assert len(lines) < 150
    assert lines.index("```python") < 30
    assert "maml.verify" in README.split("```python")[2]


def test_map_names_what_exists() -> None:
    places = README.split("## Map")[1]
    for row in re.findall(r"^\| (`.*?) \|", places, re.MULTILINE):
        folder = ""
        for name in re.findall(r"`(.*?)`", row):
            path = ROOT / name if (ROOT / name).exists() else ROOT / folder / name
            assert path.exists(), f"the README's map has {name!r}, which is not there"
            folder = str(path.parent)
