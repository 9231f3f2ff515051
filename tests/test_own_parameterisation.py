"""A parameterisation of the user's own: the example and the page of methods."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import families
import pytest
import torch
from families import truth
from helpers_families import agrees, backends, grads, options
from plain_loop import classify, mlp, one_thread  # noqa: F401

import fastmaml
from fastmaml import MAML, methods


@backends
def test_own_parameterisation(how, monkeypatch: pytest.MonkeyPatch) -> None:
    """examples/own_parameterisation.py: W = U diag(s) V^t, s adapted. Under 40 lines, without the planner or an executor."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "examples")
    example = importlib.import_module("own_parameterisation")
    maml = MAML(mlp().to(how[1]), parameterisation=example.SingularValues(), **options(how))
    assert len(inspect.getsource(example.SingularValues).splitlines()) < 40

    def forward(w, phi, x):
        w, p = {**w, **phi}, "singular_values"
        return families.mlp({**w, **{f"{n}.weight": w[f"{p}.U.{n}.weight"] @ w[f"{p}.s.{n}.weight"].diag() @ w[f"{p}.V.{n}.weight"] for n in "024"}}, x)

    agrees(maml, classify(), forward, lambda w, t: {f"singular_values.s.{n}.weight": w[f"singular_values.s.{n}.weight"] for n in "024"})
    if how[0] == "cpu":
        before, after = example.main(iterations=20)
        assert after < before


def test_the_page_of_methods_runs() -> None:
    """The code of docs/methods.md."""
    text = (Path(__file__).parent.parent / "docs" / "methods.md").read_text()
    names = {"fastmaml": fastmaml, "torch": torch, "model": mlp()}
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(code, names)
    maml, tasks = names["maml"], classify()

    def forward(w, phi, x):
        return families.mlp({**w, **{f"{n}.weight": w[f"{n}.weight"] * phi[f"gain.{n}.weight"].exp() for n in "024"}}, x)

    _, expected, _ = truth(maml, tasks, forward, lambda w, t: {f"gain.{n}.weight": w[f"gain.{n}.weight"] for n in "024"}, lr=0.1, steps=1)
    maml.meta_grad(tasks)
    assert families.distance(grads(maml), expected) <= 3e-6
    for name in re.findall(r"^\| `(\w+)\(", text, re.MULTILINE):
        assert name == "MAML" or hasattr(methods, name), name
