"""fastmaml train and fastmaml evaluate as a reader of the terminal sees them: words, files, exit codes."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_training import cache, data, interrupt_at  # noqa: F401 (fixtures)

from fastmaml.__main__ import main

SMALL = ("--iterations", "60", "--tasks", "2", "--validation", "3")


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    try:
        code = main([str(a) for a in arguments])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_train_then_evaluate(capsys, tmp_path):
    out = tmp_path / "new" / "run"
    code, said, errors = run(capsys, "train", "sinusoid", *SMALL, "--out", out)
    assert code == 0 and not errors  # no bar where nobody watches
    lines = said.splitlines()
    assert lines[0] == "sinusoid, 10-shot, SinusoidMLP: 60 iterations of 2 tasks"
    assert re.fullmatch(
        r"60 iterations in \d+ s on the '\w+' executor: mean squared error [\d.]+ on training tasks, [\d.]+ on new sinusoids",
        lines[1],
    )
    assert lines[-1] == f"next: fastmaml evaluate {out}"
    assert {file.name for file in out.iterdir()} == {"checkpoint.safetensors", "log.csv", "curve.png"}

    code, said, errors = run(capsys, "evaluate", out, "--tasks", 20)
    assert code == 0 and not errors
    lines = said.splitlines()
    assert lines[0] == "sinusoid, 10-shot, SinusoidMLP after 60 iterations; 20 test tasks"
    assert [int(line.split()[0]) for line in lines[2:13]] == list(range(11)) and "as in training" in lines[3]
    assert {"evaluation.csv", "evaluation.png"} <= {file.name for file in out.iterdir()}


def test_omniglot(capsys, tmp_path, data):  # noqa: F811
    options = ("--ways", 3, "--queries", 2, "--no-rotations", "--split-by", "class", "--first-order", *SMALL[2:])
    code, said, errors = run(
        capsys, "train", "omniglot", "--data", data, "--iterations", 5, *options, "--out", tmp_path / "run"
    )
    assert code == 0 and not errors and "omniglot, 3-way 1-shot, OmniglotFC, first order" in said
    assert "validation characters" in said
    code, said, _ = run(capsys, "evaluate", tmp_path / "run", "--tasks", 5, "--steps", 1, "--split", "validation")
    assert code == 0 and "5 validation tasks" in said and re.search(r"^ +1 +\d+\.\d+%   ± ", said, re.MULTILINE)


def test_method(capsys, tmp_path):
    """It is in the checkpoint: evaluate takes it from there, a run that goes on keeps it."""
    out = tmp_path / "run"
    code, said, errors = run(capsys, "train", "sinusoid", "--method", "MAMLPlusPlus", *SMALL, "--iterations", 5, "--inner-steps", 3, "--out", out)
    assert code == 0 and not errors and said.startswith("sinusoid, 10-shot, SinusoidMLP, MAMLPlusPlus: 5 iterations")
    code, said, errors = run(capsys, "evaluate", out, "--tasks", 5)
    assert code == 0 and not errors and said.splitlines()[0].startswith("sinusoid, 10-shot, SinusoidMLP, MAMLPlusPlus after 5")
    assert [int(line.split()[0]) for line in said.splitlines()[2:6]] == [0, 1, 2, 3] and "as in training" in said.splitlines()[5]
    code, _, errors = run(capsys, "evaluate", out, "--steps", 4)
    assert code == 2 and "steps=4: MAMLPlusPlus was trained with rates and norms for 3 inner steps" in errors
    code, _, errors = run(capsys, "train", "sinusoid", "--out", out, "--resume", "--method", "ANIL")
    assert code == 2 and "method='ANIL': the run in" in errors and "has 'MAMLPlusPlus', and keeps it" in errors
    code, said, _ = run(capsys, "train", "sinusoid", "--out", out, "--resume", "--iterations", 7)
    assert code == 0 and "goes on after iteration 5" in said


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_and_taken_up_again(number, code, capsys, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_at(20, patch, number)
        got, said, _ = run(capsys, "train", "sinusoid", *SMALL, "--out", out)
    assert got == code and "stopped after iteration 21" in said
    assert f"go on with fastmaml train sinusoid --out {out} --resume" in said
    got, _, errors = run(capsys, "train", "sinusoid", *SMALL, "--out", out)
    assert got == 2 and "not an empty folder. Give another folder, or --resume" in errors
    got, _, errors = run(capsys, "train", "sinusoid", "--out", out, "--resume", "--lr", 0.5)
    assert got == 2 and "lr=0.5: the run in" in errors and "keeps it" in errors
    got, _, errors = run(capsys, "train", "glyphs", "--out", out, "--resume")
    assert got == 2 and "task='glyphs': the run in" in errors
    got, said, _ = run(capsys, "train", "sinusoid", "--out", out, "--resume")
    assert got == 0 and "goes on after iteration 21" in said and "60 iterations in" in said
    got, said, _ = run(capsys, "train", "sinusoid", "--out", out, "--resume")  # nothing left to do
    assert got == 0 and "goes on after iteration 60" in said


def test_two_interrupts_stop_at_once(capsys, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGINT)  # a shell's background job has it ignored
    with monkeypatch.context() as patch:
        interrupt_at(20, patch)
        interrupt_at(20, patch)
        code, _, errors = run(capsys, "train", "sinusoid", *SMALL, "--out", tmp_path)
    assert code == 130 and "stopped at once" in errors
    assert signal.getsignal(signal.SIGINT) is before
    assert run(capsys, "train", "sinusoid", "--out", tmp_path, "--resume")[0] == 0  # from its beginning


def test_not_finite(capsys, tmp_path):
    options = (*SMALL, "--inner-lr", "1e30", "--inner-steps", 3)
    code, _, errors = run(capsys, "train", "sinusoid", *options, "--out", tmp_path / "run")
    assert code == 1 and "is not finite" in errors and "--on-nonfinite skip" in errors and "Traceback" not in errors
    code, said, _ = run(capsys, "train", "sinusoid", *options, "--out", tmp_path / "other", "--on-nonfinite", "skip")
    assert code == 0 and re.search(r"; \d+ tasks left out", said)


def test_a_folder_that_cannot_be_written(capsys, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    code, _, errors = run(capsys, "train", "sinusoid", *SMALL, "--out", tmp_path / "file" / "below")
    assert code == 2 and "file" in errors and "Traceback" not in errors
    full = OSError(28, "No space left on device")
    monkeypatch.setattr("fastmaml.files.os.replace", lambda *_: (_ for _ in ()).throw(full))
    code, said, errors = run(capsys, "train", "sinusoid", *SMALL, "--out", tmp_path / "run")
    assert code == 1 and "cannot be written: [Errno 28] No space left" in errors and "iterations in" not in said
    assert not list((tmp_path / "run").iterdir())


WRONG = [
    (("dance",), "invalid choice: 'dance'"),
    (("train",), "the following arguments are required: task"),
    (("train", "chess"), "invalid choice: 'chess'"),
    (("train", "sinusoid", "--ways", "5"), "unrecognized arguments: --ways 5"),
    (("train", "sinusoid", "--iterations", "0"), "--iterations: '0': expected an integer of at least 1"),
    (("train", "sinusoid", "--seed", "x"), "--seed: 'x': expected an integer of at least 0"),
    (("train", "sinusoid", "--lr", "-1"), "--lr: '-1': expected a finite number above 0"),
    (("train", "sinusoid", "--inner-lr", "nan"), "--inner-lr: 'nan': expected a finite number above 0"),
    (("train", "glyphs", "--method", "anil"), "method='anil': expected one of MAML, ANIL"),
    (("train", "glyphs", "--method", "HeadOnly"), "method='HeadOnly' cannot be trained from nothing: its body is pretrained and frozen"),
    (("train", "sinusoid", "--method", "Reptile", "--first-order"), "Reptile sets first_order itself"),
    (("train", "sinusoid", "--method", "MAMLPlusPlus", "--inner-steps", "0"), "inner_steps=0: expected a whole number of at least 1"),
    (("train", "glyphs", "--net", "rnn"), "--net: invalid choice: 'rnn'"),
    (("train", "glyphs", "--backend", "gpu"), "--backend: invalid choice: 'gpu'"),
    (("train", "sinusoid", "--backend", "cuda"), "backend='cuda'"),
    (("train", "sinusoid", "--device", "cuda:99"), "device='cuda:99': torch sees"),
    (("train", "sinusoid", "--device", "gpu"), "device='gpu': expected 'cpu', 'cuda'"),
    (("train", "omniglot"), "data is missing: omniglot is read from files you have"),
    (("train", "omniglot", "--data", "nowhere"), "no such file or folder. Omniglot is published at"),
    (("train", "sinusoid", "--resume"), "there is no such checkpoint"),
    (("evaluate",), "the following arguments are required: DIR"),
    (("evaluate", "nowhere"), "nowhere: there is no such checkpoint"),
    (("evaluate", "nowhere", "--split", "val"), "--split: invalid choice: 'val'"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[" ".join(a) for a, _ in WRONG])
def test_wrong_arguments(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said, errors = run(capsys, *arguments)
    assert code == 2 and not said and message in errors and "usage:" in errors
    assert not list(tmp_path.iterdir())  # nothing was begun


def test_help(capsys):
    for arguments in (("--help",), ("train", "--help"), ("train", "omniglot", "--help"), ("evaluate", "--help")):
        code, said, _ = run(capsys, *arguments)
        assert code == 0 and "usage:" in said
    assert "--data PATH" in run(capsys, "train", "omniglot", "--help")[1]


def test_the_console_script():
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert '[project.scripts]\nfastmaml = "fastmaml.__main__:main"\n' in text


def test_as_a_module(tmp_path):
    command = [sys.executable, "-m", "fastmaml", "train", "sinusoid", *SMALL, "--out", tmp_path / "run"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr and (tmp_path / "run" / "curve.png").exists()


def test_interrupted_before_training(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("fastmaml.cli.Trainer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    code, said, errors = run(capsys, "train", "sinusoid", "--out", tmp_path / "run")
    assert (code, said, errors) == (130, "", "stopped\n")
