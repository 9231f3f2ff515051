"""A benchmark that was cut off goes on where it stopped, with what it measured before and nothing else."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from benchmarks import run


@pytest.fixture
def cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict]:
    """Runs the benchmark, whose jobs take no time; ``at``: the title that fails. The results of it."""

    def run_(*arguments: object, at: str | None = None) -> dict:
        def job(title: str) -> list[dict]:
            if title == at:
                raise KeyboardInterrupt
            return [{"workload": title}]

        monkeypatch.setattr(run, "jobs", lambda args, settings: [(part, t, lambda tell, t=t: job(t)) for part in args.parts for t in ("a", "b", "c")])
        monkeypatch.setattr(run.report, "terminal", lambda part, rows: "")
        monkeypatch.setattr(run.report, "write", lambda result, out: None)
        monkeypatch.setattr(sys, "argv", ["run", *map(str, arguments)])
        with pytest.raises(KeyboardInterrupt) if at else nullcontext():
            run.main()
        return json.loads((tmp_path / "results.json").read_text())

    return run_


def test_a_run_that_was_cut_off_goes_on(cut_off: Callable[..., dict], tmp_path: Path) -> None:
    found = cut_off("--parts", "speed", "--out", tmp_path, at="b")
    assert found["done"] == [["speed", "a"]]
    found = cut_off("--parts", "speed", "--resume", tmp_path)
    assert found["done"] == [["speed", t] for t in "abc"] and [row["workload"] for row in found["speed"]] == list("abc")


def test_what_does_not_go_together_is_not_resumed(cut_off: Callable[..., dict], tmp_path: Path) -> None:
    cut_off("--parts", "speed", "--out", tmp_path, at="b")
    for arguments, said in (
        (("--parts", "speed", "--budget", 7), "budget was 3.0 there and is 7.0 now"),
        (("--parts", "memory"), "no results.json of benchmarks.run to go on with (KeyError: 'memory')"),
        (("--parts", "speed", "--only", "sinusoid"), "only was  there and is sinusoid now"),
    ):
        with pytest.raises(SystemExit, match=re.escape(said)):
            cut_off(*arguments, "--resume", tmp_path)
    (tmp_path / "results.json").write_text("[1]")
    with pytest.raises(SystemExit, match="TypeError"):
        cut_off("--parts", "speed", "--resume", tmp_path)
