"""fastmaml train --method: each is its constructor's, with its paper's defaults; the checkpoint knows which it is."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from plain_loop import distance, grads
from safetensors.torch import save_file

from fastmaml import MAML, methods
from fastmaml.parameterisation import SetEncoder
from fastmaml.training import CheckpointError, Settings, Trainer, checkpoint, evaluate
from fastmaml.training.methods import EPOCH, NAMES, REFUSED

CLASSES = dict(ways=3, queries=2, tasks=2, validation=2, iterations=2)
CONSTRUCTORS = {"MAML": MAML, **{name: getattr(methods, name) for name in methods.__all__}}


def settings_of(method: str, **given) -> Settings:
    if method == "ProtoMAML":
        return Settings.of("glyphs", method=method, **CLASSES, **given)
    return Settings.of("sinusoid", method=method, **{"iterations": 2, "tasks": 2, "validation": 2, **given})


def test_every_constructor_is_offered_or_refused() -> None:
    assert {*NAMES, *REFUSED, "MAMLPlusPlusSchedule", "record_statistics"} == set(CONSTRUCTORS)


@pytest.mark.parametrize("method", NAMES)
def test_trained_evaluated_and_taken_up_again(method: str, tmp_path) -> None:
    trainer = Trainer(settings_of(method), tmp_path)
    before = {name: p.detach().clone() for name, p in trainer.maml.named_parameters()}
    trainer.run()
    assert any(not torch.equal(p, before[name]) for name, p in trainer.maml.named_parameters())
    again = Trainer.resume(tmp_path)
    for name, value in trainer.maml.state_dict().items():
        assert torch.equal(value, again.maml.state_dict()[name]), name
    assert again.maml.parameterisation.signature == trainer.maml.parameterisation.signature
    result = evaluate(tmp_path, tasks=3, steps=1)
    assert all(0 <= row["mean"] < 1e3 and row["not_finite"] == 0 for row in result.rows)
    assert method == "MAML" or f", {method}" in result.table()


@pytest.mark.parametrize("method", [name for name in NAMES if name not in ("Mixture", "MTNets")])
def test_it_is_the_constructors(method: str) -> None:
    """The same meta-gradient as of the object that one builds by hand from the same network and numbers."""
    settings = settings_of(method)
    maml = settings.maml()
    encoder = (SetEncoder(1, 1, decoder=method == "HSML"),) if method in ("MMAML", "HSML") else ()
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        net = type(maml.model)(ways=3) if settings.ways else type(maml.model)()
        made = CONSTRUCTORS[method](net, *encoder, inner_lr=settings.inner_lr, inner_steps=settings.inner_steps, loss="cross_entropy" if settings.ways else "mse")
    made.load_state_dict(maml.state_dict())
    tasks = settings.source("test", 0).sample(3)
    maml.meta_grad(tasks), made.meta_grad(tasks)
    found = grads(maml)
    assert distance(found, grads(made)) == 0 and any(g.any() for g in found.values())


def test_defaults_are_the_papers(tmp_path) -> None:
    of = {name: Settings.of("glyphs", method=name) for name in NAMES}
    assert (of["MAML"].inner_lr, of["ANIL"].inner_lr, of["FirstOrderMAML"].inner_lr) == (0.1, 0.1, 0.1)  # the task's
    assert (of["iMAML"].inner_lr, of["iMAML"].inner_steps) == (0.1, 16) and of["CAVIA"].inner_lr == 1.0
    assert (of["MAMLPlusPlus"].inner_lr, of["MAMLPlusPlus"].inner_steps, of["MAMLPlusPlus"].lr) == (0.1, 5, 3e-3)
    assert (of["Reptile"].inner_lr, of["Reptile"].inner_steps, of["Reptile"].lr) == (0.02, 5, 0.1)
    rates = of["MetaSGD"].maml().rates.values.values()
    assert of["MetaSGD"].inner_lr is None and all(0.005 <= r.min() <= r.max() <= 0.1 for r in rates)
    assert Settings.of("glyphs", method="Reptile", inner_lr=0.5, lr=1.0).inner_lr == 0.5
    assert Settings.of("glyphs", method="CAVIA", net="cnn").maml().parameterisation.signature == "cavia(size=100, layers='block3.conv.weight')"
    assert isinstance(Trainer(settings_of("Reptile"), tmp_path).optimizer, torch.optim.SGD)


def test_reptile_moves_by_epsilon(tmp_path) -> None:
    trainer = Trainer(settings_of("Reptile", tasks=4, lr=0.3), tmp_path)
    before, tasks = {n: p.detach().clone() for n, p in trainer.maml.named_parameters()}, copy.deepcopy(trainer.source).sample()
    adapted = copy.deepcopy(trainer.maml).adapt(tasks)
    trainer.step()
    for name, p in trainer.maml.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] + 0.3 * (adapted.weights[name].mean(0) - before[name]), rtol=1e-5, atol=1e-6)


def test_schedule_of_maml_plus_plus(tmp_path) -> None:
    """Epochs of 500 iterations, whatever the length of the run; the curve of unseen tasks is of the last step's loss."""
    trainer = Trainer(settings_of("MAMLPlusPlus", iterations=EPOCH + 3), tmp_path)
    trainer.step()
    assert trainer.maml.step_loss_weights == pytest.approx([0.2] * 5)
    trainer.iteration = EPOCH
    trainer.step()
    assert trainer.maml.step_loss_weights == pytest.approx([0.18] * 4 + [0.28])
    trainer._add_row()
    assert trainer.maml.step_loss_weights == pytest.approx([0.18] * 4 + [0.28])
    trainer.maml.step_loss_weights = None
    with torch.no_grad():
        assert trainer.log[-1]["validation_loss"] == float(trainer.maml(trainer.unseen).loss)


def test_the_log_is_of_the_query_loss(tmp_path) -> None:
    """HSML's reconstruction loss is trained by, and not reported as an error."""
    trainer = Trainer(settings_of("HSML"), tmp_path)
    trainer.run()
    with torch.no_grad():
        out = trainer.maml(trainer.unseen)
    assert float(out.penalty.mean()) > 0 and float(out.loss) == pytest.approx(float(out.task_losses.mean() + out.penalty.mean()))
    assert trainer.log[-1]["validation_loss"] == float(out.task_losses.mean())


def test_noise_belongs_to_the_tasks_of_a_run(tmp_path) -> None:
    """Whatever torch's global generator says."""
    Trainer(settings_of("MTNets"), tmp_path).run()
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(evaluate(tmp_path, tasks=4, steps=2).rows)
    assert found[0] == found[1]


def test_a_checkpoint_of_another_method_is_refused(tmp_path) -> None:
    Trainer(settings_of("ANIL"), tmp_path).run()
    path = tmp_path / checkpoint.NAME
    tensors, facts = checkpoint.load(path)

    def says(method: str | None) -> None:
        settings = {**facts["settings"], "method": method} if method else {n: v for n, v in facts["settings"].items() if n != "method"}
        save_file(tensors, path, {"fastmaml": json.dumps({"format": checkpoint.FORMAT, **facts, "settings": settings})})

    for method in ("MAML", "BOIL", "TNets", None):  # None: written before there were others
        says(method)
        with pytest.raises(CheckpointError, match=r"does not fit its own settings: the state was saved with parameterisation layerwise\(adapt='head'\), this object has"):
            evaluate(tmp_path, tasks=2)
    says("Unheard")
    with pytest.raises(CheckpointError, match="cannot be used: method='Unheard': expected one of"):
        Trainer.resume(tmp_path)
    says("ANIL")
    assert evaluate(tmp_path, tasks=2).settings.method == "ANIL"


def test_runs_of_before_are_of_maml(tmp_path) -> None:
    Trainer(settings_of("MAML"), tmp_path).run()
    path = tmp_path / checkpoint.NAME
    tensors, facts = checkpoint.load(path)
    del facts["settings"]["method"]
    save_file(tensors, path, {"fastmaml": json.dumps({"format": checkpoint.FORMAT, **facts})})
    assert Trainer.resume(tmp_path, iterations=3).settings.method == "MAML"
