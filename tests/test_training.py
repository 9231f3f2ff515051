"""Trainer, checkpoints, evaluation: a run that stops goes on as if it had not, nothing is half written or misread."""

from __future__ import annotations

import csv
import json
import signal
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_omniglot import SUBSET, members, write_zip

from fastmaml.files import whole_file
from fastmaml.output import NonFiniteError
from fastmaml.training import CheckpointError, Settings, Trainer, checkpoint, evaluate
from fastmaml.training.evaluate import mean_and_interval
from fastmaml.training.trainer import COLUMNS


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A tiny Omniglot of 60 characters in 4 alphabets: 40, 4 and 16 of them."""
    folder = tmp_path_factory.mktemp("omniglot")
    write_zip(folder / f"{SUBSET}.zip", members(alphabets=dict.fromkeys("ABCD", 15)))
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch, data) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(data))


def sinusoid(**given) -> Settings:
    return Settings.of("sinusoid", **{"iterations": 120, "tasks": 3, "validation": 5, **given})


def omniglot(data: Path, **given) -> Settings:
    return Settings.of(
        "omniglot", data=data, **{"iterations": 7, "tasks": 2, "validation": 3, "ways": 3, "queries": 2, **given}
    )


RUNS = {
    "sinusoid": lambda data: sinusoid(),
    "first order": lambda data: sinusoid(first_order=True, inner_steps=3),
    "MT-nets": lambda data: sinusoid(method="MTNets", iterations=20),  # masks drawn for each task
    "MAML++": lambda data: sinusoid(method="MAMLPlusPlus", iterations=20),
    "Reptile": lambda data: sinusoid(method="Reptile", iterations=20),  # outer SGD
    "omniglot fc": lambda data: omniglot(data),
    "omniglot cnn": lambda data: omniglot(data, net="cnn", iterations=3, tasks=1, validation=1, inner_lr=0.1),
}


def interrupt_at(iteration: int, monkeypatch, number: int = signal.SIGINT) -> None:
    """A signal in the middle of the iteration that comes after that many."""
    real = Trainer.step

    def step(trainer: Trainer) -> None:
        if trainer.iteration == iteration:
            signal.raise_signal(number)
        real(trainer)

    monkeypatch.setattr(Trainer, "step", step)


def contents(out: Path) -> tuple[dict, dict, list]:
    """Of a run, without its times."""
    tensors, facts = checkpoint.load(out / checkpoint.NAME)
    rows = [{**row, "seconds": 0} for row in facts["log"]]
    with open(out / "log.csv", newline="") as file:
        table = [{**row, "seconds": 0} for row in csv.DictReader(file)]
    return tensors, {**facts, "seconds": 0, "log": rows}, table


# -- going on ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(settings, data, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGINT)  # a shell's background job has it ignored
    settings = settings(data)
    Trainer(settings, tmp_path / "whole").run()
    with monkeypatch.context() as patch:
        interrupt_at(settings.iterations // 2, patch)
        trainer = Trainer(settings, tmp_path / "parts")
        trainer.run()
    assert trainer.stopped == signal.SIGINT and trainer.iteration == settings.iterations // 2 + 1
    assert signal.getsignal(signal.SIGINT) is before
    again = Trainer.resume(tmp_path / "parts")
    assert again.iteration == trainer.iteration
    again.run()
    assert again.stopped == 0
    (whole, facts, table), (parts, other_facts, other_table) = (contents(tmp_path / n) for n in ("whole", "parts"))
    assert whole.keys() == parts.keys() and facts == other_facts and table == other_table
    for name, value in whole.items():
        assert torch.equal(value, parts[name]) and value.dtype == parts[name].dtype, name
    assert {file.name for file in (tmp_path / "parts").iterdir()} == {"checkpoint.safetensors", "log.csv", "curve.png"}


def test_a_finished_run_can_be_prolonged(tmp_path):
    Trainer(sinusoid(iterations=100), tmp_path / "long").run()  # a row every second iteration
    Trainer(sinusoid(iterations=60), tmp_path / "short").run()  # likewise
    trainer = Trainer.resume(tmp_path / "short", iterations=100, on_nonfinite="skip")
    trainer.run()
    long, short = (contents(tmp_path / name) for name in ("long", "short"))
    assert all(torch.equal(value, short[0][name]) for name, value in long[0].items()) and long[2] == short[2]
    assert checkpoint.load(tmp_path / "short" / checkpoint.NAME)[1]["settings"]["on_nonfinite"] == "skip"
    with pytest.raises(ValueError, match="iterations=99: the run in .* has done 100 already"):
        Trainer.resume(tmp_path / "short", iterations=99)
    with pytest.raises(
        ValueError, match="lr=0.5: the run in .* has 0.001, and keeps it.*iterations, data, on_nonfinite"
    ):
        Trainer.resume(tmp_path / "short", lr=0.5)


def test_other_data_is_another_run(data, tmp_path):
    Trainer(omniglot(data, iterations=1), tmp_path / "run").run()
    (tmp_path / "copy").mkdir()
    archive = (data / f"{SUBSET}.zip").read_bytes()
    (tmp_path / "copy" / f"{SUBSET}.zip").write_bytes(archive)
    assert Trainer.resume(tmp_path / "run", data=tmp_path / "copy").settings.data == str(tmp_path / "copy")
    write_zip(tmp_path / "copy" / f"{SUBSET}.zip", members(alphabets=dict.fromkeys("ABCDE", 15)))
    with pytest.raises(ValueError, match="the tasks are no longer those that the run in"):
        Trainer.resume(tmp_path / "run", data=tmp_path / "copy")


@pytest.mark.parametrize("backend", ["torch", "autograd"])
def test_other_backends(backend, data, tmp_path):
    trainer = Trainer(omniglot(data, iterations=1, backend=backend), tmp_path)
    trainer.run()
    assert trainer.maml.executor == backend


def test_a_step_that_raises_changes_nothing(tmp_path, monkeypatch):
    trainer = Trainer(sinusoid(), tmp_path)
    trainer.step()
    before = {name: p.clone() for name, p in trainer.maml.named_parameters()}
    stream = trainer.source.generator.get_state()
    monkeypatch.setattr(trainer.maml, "meta_grad", lambda batch: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        trainer.step()
    assert trainer.iteration == 1 and torch.equal(trainer.source.generator.get_state(), stream)
    assert all(torch.equal(p, before[name]) for name, p in trainer.maml.named_parameters())


def test_tasks_that_are_not_finite(tmp_path):
    trainer = Trainer(sinusoid(inner_lr=1e30, inner_steps=3), tmp_path)
    with pytest.raises(NonFiniteError):
        trainer.run()
    tensors, facts = checkpoint.load(tmp_path / checkpoint.NAME)
    assert facts["iteration"] == trainer.iteration < 120
    assert all(value.isfinite().all() for name, value in tensors.items() if name.startswith("model."))
    again = Trainer.resume(tmp_path, on_nonfinite="skip", iterations=trainer.iteration + 2)
    again.run()
    assert again.not_finite > 0


def test_seeds(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, same, other = (Trainer(sinusoid(seed=seed), tmp_path) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)  # torch's own stream stays where it is
    weights = [torch.cat([p.flatten() for p in t.maml.parameters()]) for t in (first, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert not torch.equal(first.source.sample().support_x, first.unseen.support_x[:30])


def test_it_learns(tmp_path):
    trainer = Trainer(sinusoid(iterations=300, tasks=10, lr=5e-3, validation=50), tmp_path)
    trainer.run()
    assert trainer.log[-1]["validation_loss"] < 0.9 * trainer.log[0]["validation_loss"]  # of six runs, three seeds by two versions of torch, 0.86 at most
    assert [row["iteration"] for row in trainer.log] == list(range(6, 301, 6))
    assert tuple(trainer.log[0]) == COLUMNS and trainer.log[0]["accuracy"] is None
    assert "mean squared error" in trainer.latest() and "new sinusoids" in trainer.latest()
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_validation_set(data, tmp_path):
    with pytest.raises(ValueError, match=r"ways=5: split 'validation' has 4 characters \(validation=0 trains without"):
        Trainer(omniglot(data, ways=5), tmp_path)
    trainer = Trainer(omniglot(data, ways=5, validation=0), tmp_path)
    trainer.run()
    assert trainer.log[-1]["validation_accuracy"] is None and trainer.latest().endswith("on training tasks")


@pytest.mark.parametrize("split_by", ["class", "alphabet"])
def test_settings_of_omniglot_reach_it(data, split_by):
    settings = omniglot(data, split_by=split_by, rotations=False)
    source = settings.source("test", 0)
    assert len(source.classes) == len(source.characters) == (16 if split_by == "class" else 15)
    assert settings.describe() == "omniglot, 3-way 1-shot, OmniglotFC"


# -- files -------------------------------------------------------------------------------------------------------------


def test_whole_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyError), whole_file(path) as file:
        file.write(b"half of the n")
        raise KeyError
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with whole_file(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


@pytest.fixture
def finished(tmp_path) -> Path:
    Trainer(sinusoid(iterations=3), tmp_path / "run").run()
    return tmp_path / "run"


def rewritten(path: Path, change) -> None:
    """The checkpoint with other tensors or facts."""
    tensors, facts = checkpoint.load(path)
    facts = {"format": checkpoint.FORMAT, **facts}
    change(tensors, facts)
    save_file(tensors, path, {"fastmaml": json.dumps(facts)})


DAMAGE = {
    "cut": (lambda p: p.write_bytes(p.read_bytes()[:2000]), "cannot be read"),
    "empty": (lambda p: p.write_bytes(b""), "cannot be read"),
    "pickle": (lambda p: torch.save({}, p), "cannot be read"),
    "foreign": (lambda p: save_file({"x": torch.zeros(1)}, p), "no checkpoint of fastmaml"),
    "version": (lambda p: rewritten(p, lambda t, f: f.update(format=99)), "another version"),
    "settings": (lambda p: rewritten(p, lambda t, f: f["settings"].update(colour="red")), "not the settings"),
    "values": (lambda p: rewritten(p, lambda t, f: f["settings"].update(inner_lr="fast")), "inner_lr='fast'"),
    "missing": (lambda p: rewritten(p, lambda t, f: t.pop("model.0.weight")), "does not fit its own settings"),
    "shape": (lambda p: rewritten(p, lambda t, f: t.update({"model.0.bias": torch.zeros(3)})), "does not fit its own"),
    "optimizer": (
        lambda p: rewritten(p, lambda t, f: t.update({"optimizer.0.bias.exp_avg": torch.zeros(3)})),
        "Adam's state of 0.bias has another shape",
    ),
    "generator": (lambda p: rewritten(p, lambda t, f: t.pop("generator")), "does not hold what a run needs"),
    "iteration": (lambda p: rewritten(p, lambda t, f: f.update(iteration=None)), "does not hold what a run needs"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_checkpoints_are_named(damage, message, finished):
    damage(finished / checkpoint.NAME)
    with pytest.raises(CheckpointError, match=f"(?s)checkpoint.safetensors.*{message}"):
        Trainer.resume(finished)


def test_no_checkpoint(tmp_path):
    for place in (tmp_path, tmp_path / "nowhere", tmp_path / "nowhere.safetensors"):
        with pytest.raises(CheckpointError, match="there is no such checkpoint"):
            evaluate(place)


def test_an_occupied_folder_is_refused(finished, tmp_path):
    with pytest.raises(FileExistsError, match="not an empty folder"):
        Trainer(sinusoid(), finished)
    with pytest.raises(FileExistsError, match="not an empty folder"):
        Trainer(sinusoid(), finished / "log.csv")
    (tmp_path / "empty").mkdir()
    Trainer(sinusoid(), tmp_path / "empty")


def test_a_checkpoint_is_plain_safetensors(finished):
    tensors = load_file(finished / checkpoint.NAME)
    assert {name.split(".")[0] for name in tensors} == {"model", "optimizer", "generator"}
    assert {name for name in tensors if name.startswith("optimizer.4.bias")} == {
        f"optimizer.4.bias.{key}" for key in ("step", "exp_avg", "exp_avg_sq")
    }
    assert tensors["optimizer.0.weight.step"].item() == 3


# -- evaluation --------------------------------------------------------------------------------------------------------


def test_mean_and_interval():
    mean, half = mean_and_interval(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert mean == 3.0 and half == pytest.approx(1.96 * (14 / 3) ** 0.5 / 2)
    assert mean_and_interval(torch.ones(1))[0] == 1.0


@pytest.mark.parametrize("kind", ["sinusoid", "omniglot"])
def test_evaluation(kind, data, tmp_path):
    settings = sinusoid(iterations=5) if kind == "sinusoid" else omniglot(data, iterations=3)
    trainer = Trainer(settings, tmp_path)
    trainer.run()
    result = evaluate(tmp_path, tasks=70, steps=3)  # more than are taken at once
    assert [row["steps"] for row in result.rows] == [0, 1, 2, 3]
    source = settings.source("test", settings.seed + 2)
    batches = [source.sample(50), source.sample(20)]
    for row in result.rows:
        with torch.no_grad():
            outs = [trainer.maml(batch, inner_steps=row["steps"]) for batch in batches]
        values = torch.cat([out.task_losses if kind == "sinusoid" else out.task_accuracy for out in outs])
        assert (row["mean"], row["interval95"]) == mean_and_interval(values) and row["not_finite"] == 0
    with open(tmp_path / "evaluation.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(row["mean"]) for row in table] == [row["mean"] for row in result.rows]
    assert (tmp_path / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    text = result.table().splitlines()
    assert len(text) == 6 and "70 test tasks" in text[0] and text[3].endswith("as in training")
    again = evaluate(tmp_path / checkpoint.NAME, tasks=70, steps=1)
    assert again.rows == result.rows[:2]
    assert evaluate(tmp_path, tasks=70, steps=1, seed=9).rows != again.rows


def test_evaluation_of_tasks_that_are_not_finite(tmp_path):
    Trainer(sinusoid(iterations=1, inner_lr=1e8, inner_steps=0), tmp_path).run()
    result = evaluate(tmp_path, tasks=20, steps=10)
    assert result.rows[0]["not_finite"] == 0 and result.rows[10]["not_finite"] > 0
    assert "tasks that are not finite" in result.table()


def test_evaluation_where_the_data_has_moved(data, tmp_path):
    Trainer(omniglot(data, iterations=1), tmp_path / "run").run()
    rewritten(tmp_path / "run" / checkpoint.NAME, lambda t, f: f["settings"].update(data=str(tmp_path / "gone")))
    with pytest.raises(FileNotFoundError, match="gone.*no such file"):
        evaluate(tmp_path / "run")
    assert evaluate(tmp_path / "run", tasks=2, steps=0, data=data, split="validation").split == "validation"


def test_evaluation_refuses(finished):
    with pytest.raises(ValueError, match="split='validation': sinusoid has test"):
        evaluate(finished, split="validation")
    with pytest.raises(ValueError, match="tasks=0: expected a whole number of at least 1"):
        evaluate(finished, tasks=0)
    assert not (finished / "evaluation.csv").exists()


# -- settings ----------------------------------------------------------------------------------------------------------

REFUSED = [
    (dict(task="chess"), "task='chess': expected one of sinusoid, glyphs, omniglot"),
    (dict(task="sinusoid", net="cnn"), "net='cnn': sinusoid has fc"),
    (dict(task="sinusoid", method="SGD"), "method='SGD': expected one of MAML, ANIL, BOIL"),
    (dict(task="glyphs", method="MTL"), "method='MTL' cannot be trained from nothing: its body is pretrained"),
    (dict(task="glyphs", method="LEO"), "method='LEO' cannot be trained from nothing: it works on embeddings"),
    (dict(task="sinusoid", method="ProtoMAML"), "method='ProtoMAML' needs classes"),
    (dict(task="glyphs", method="MAMLPlusPlus", first_order=True), "first_order=True: MAMLPlusPlus has a schedule"),
    (dict(task="sinusoid", inner_lr=None), "inner_lr=None: expected a finite number"),
    (dict(task="sinusoid", ways=5), "ways=5: sinusoid is a regression"),
    (dict(task="glyphs", net="rnn"), "net='rnn': glyphs has fc, cnn"),
    (dict(task="omniglot"), "data is missing.*images_background.zip"),
    (dict(task="glyphs", data="x"), "data='x' is for omniglot, not for glyphs"),
    (dict(task="sinusoid", rotations=False), "rotations=False is for omniglot"),
    (dict(task="sinusoid", iterations=0), "iterations=0: expected a whole number of at least 1"),
    (dict(task="sinusoid", lr=0), "lr=0: expected a finite number above 0"),
    (dict(task="sinusoid", inner_lr=float("nan")), "inner_lr=nan: expected a finite number"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=[message[:20] for _, message in REFUSED])
def test_settings_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Settings.of(**given)


def test_settings_survive_json(data):
    for settings in (sinusoid(), omniglot(data), Settings.of("glyphs")):
        assert Settings.from_dict(json.loads(json.dumps(asdict(settings)))) == settings
