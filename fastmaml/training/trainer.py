"""Trainer: meta-iterations with Adam (Reptile: SGD), a log, and checkpoints from which a run goes on as if it had never stopped.

Everything that a run depends on is in the checkpoint: settings, parameters, Adam's state, the task source's stream, the
log and the sums since its last row. log.csv and curve.png are written from it.
"""

from __future__ import annotations

import hashlib
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmaml.counts import check_count
from fastmaml.maml import MAML
from fastmaml.methods import MAMLPlusPlusSchedule
from fastmaml.output import NonFiniteError
from fastmaml.tasks.device import check_device
from fastmaml.training import checkpoint, methods
from fastmaml.training.checkpoint import CheckpointError
from fastmaml.training.pictures import draw_curve, write_csv
from fastmaml.training.settings import CHANGEABLE, UNSEEN, Settings

COLUMNS = ("iteration", "loss", "accuracy", "validation_loss", "validation_accuracy", "not_finite", "seconds")
ROWS = 50  # of a run's log
SAVE_EVERY = 30.0  # seconds


class Trainer:
    """``Trainer(settings, out)`` begins a run, ``Trainer.resume(out)`` takes one up; ``run()`` trains and writes. ``device`` holds the network and the
    tasks; it is no setting of the run, which may go on on another.

    Raises ValueError, FileExistsError, BackendError or CheckpointError before any work starts. iteration: how many are
    done; log: rows of COLUMNS, means since the row before; stopped: the signal that ended the last run() early, or 0.
    """

    def __init__(self, settings: Settings, out: Path, device: str | torch.device = "cpu") -> None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise FileExistsError(f"{out} is there and is not an empty folder")
        self._start(settings, out, check_device(device))

    @classmethod
    def resume(cls, out: Path, device: str | torch.device = "cpu", **changed: Any) -> Trainer:
        """The run in the folder ``out``; of the settings those in CHANGEABLE may be given anew."""
        path = checkpoint.path_of(out)
        tensors, facts = checkpoint.load(path)
        settings = _settings(path, facts)
        for name, value in changed.items():
            if name not in CHANGEABLE and value != getattr(settings, name):
                raise ValueError(
                    f"{name}={value!r}: the run in {out} has {getattr(settings, name)!r}, and keeps it."
                    f" What may change when a run goes on: {', '.join(CHANGEABLE)}"
                )
        trainer = cls.__new__(cls)
        trainer._start(replace(settings, **changed), path.parent, check_device(device))
        trainer._restore(path, tensors, facts)
        return trainer

    def _start(self, settings: Settings, out: Path, device: torch.device) -> None:
        self.settings, self.out = settings, out
        self.maml = settings.maml(device)
        self.schedule = MAMLPlusPlusSchedule(self.maml) if settings.method == "MAMLPlusPlus" else None
        self.optimizer = methods.outer_optimizer(settings.method, self.maml, settings.lr)
        for p in self.maml.parameters():
            p.grad = torch.zeros_like(p)  # from the first iteration on meta_grad adds to what is there
        self.source = settings.training_source(device)
        self.unseen = None
        if settings.validation:
            try:
                self.unseen = settings.unseen_source(device).sample(settings.validation)
            except ValueError as error:
                raise ValueError(f"{error} (validation=0 trains without a curve of unseen classes)") from None
        sample = self.source.sample(generator=torch.Generator().manual_seed(0))
        self.maml.plan(sample)  # a backend that cannot run it says so now
        if device.type != "cpu":  # the last bits of a rotation are the device's own
            sample = settings.training_source().sample(generator=torch.Generator().manual_seed(0))
        self._digest = hashlib.sha256(b"".join(x.numpy().tobytes() for x in sample.stored())).hexdigest()
        self.iteration, self.stopped, self.seconds = 0, 0, 0.0
        self.every, self.log = -(-settings.iterations // ROWS), []
        self._sums = dict(count=0, loss=0.0, accuracy=0.0, not_finite=0)

    # ------------------------------------------------------------------------------------------------- training
    def run(self, bar: bool = False) -> None:
        """Up to settings.iterations, or until Ctrl-C or SIGTERM, which end it after the iteration under way.

        Writes checkpoint, log.csv and curve.png into ``out`` in the end, and if a task is not finite (NonFiniteError);
        the first two before it begins and every 30 seconds."""
        from tqdm import tqdm

        self.out.mkdir(parents=True, exist_ok=True)
        self.save(picture=False)  # a folder that cannot be written must not cost a run
        begun, before, saved = time.perf_counter(), self.seconds, time.perf_counter()
        total, self.stopped = self.settings.iterations, 0
        with (
            stop_signals() as stop,
            quiet_about_skipped(),
            tqdm(
                total=total, initial=self.iteration, desc=self.settings.task, leave=False, disable=None if bar else True
            ) as shown,
        ):
            while self.iteration < total and not stop:
                try:
                    self.step()
                except NonFiniteError:
                    self.seconds = before + time.perf_counter() - begun
                    self.save()
                    raise
                self.seconds = before + time.perf_counter() - begun
                if self.iteration % self.every == 0:
                    self._add_row()
                    shown.set_postfix_str(self.latest(), refresh=False)
                shown.update()
                if time.perf_counter() - saved > SAVE_EVERY:
                    self.save(picture=False)
                    saved = time.perf_counter()
            self.stopped = stop[0] if self.iteration < total else 0
        self.save()

    def step(self) -> None:
        """One meta-iteration. If it raises, nothing has changed."""
        stream = self.source.generator.get_state()
        self.optimizer.zero_grad(set_to_none=False)
        try:
            if self.schedule:
                self.schedule.begin(self.iteration // methods.EPOCH)
            tasks = self.source.sample()
            out = self.maml.meta_grad(tasks, **self._seeds(self.settings.seed, self.iteration * self.settings.tasks, len(tasks)))
        except BaseException:
            self.source.generator.set_state(stream)
            raise
        self.optimizer.step()
        self.iteration += 1
        sums = self._sums
        sums["count"] += 1
        sums["loss"] += _query_loss(out)
        sums["accuracy"] += 0.0 if self.settings.regression else float(out.accuracy)
        sums["not_finite"] += int((~out.finite).sum())

    def _seeds(self, seed: int, first: int, tasks: int) -> dict[str, list[int]]:
        return methods.task_seeds(self.settings.method, seed, first, tasks)

    def _add_row(self) -> None:
        sums, regression = self._sums, self.settings.regression
        row = dict.fromkeys(COLUMNS)
        row.update(iteration=self.iteration, loss=sums["loss"] / sums["count"], not_finite=sums["not_finite"])
        row.update(accuracy=None if regression else sums["accuracy"] / sums["count"], seconds=round(self.seconds, 3))
        if self.unseen is not None:
            kept = self.maml.on_nonfinite, self.maml.step_loss_weights
            self.maml.on_nonfinite, self.maml.step_loss_weights = "skip", None
            with torch.no_grad():
                out = self.maml(self.unseen, **self._seeds(self.settings.seed + 1, 0, len(self.unseen)))
            self.maml.on_nonfinite, self.maml.step_loss_weights = kept
            row.update(validation_loss=_query_loss(out), validation_accuracy=None if regression else float(out.accuracy))
        self.log.append(row)
        self._sums = dict(count=0, loss=0.0, accuracy=0.0, not_finite=0)

    @property
    def not_finite(self) -> int:
        """Tasks left out so far."""
        return sum(row["not_finite"] for row in self.log) + self._sums["not_finite"]

    def latest(self) -> str:
        """The last row of the log in words; nothing before there is one."""
        if not self.log:
            return ""
        key, form = ("loss", ".3f") if self.settings.regression else ("accuracy", ".1%")
        row, text = self.log[-1], f"{self.settings.measure} {self.log[-1][key]:{form}} on training tasks"
        if row[f"validation_{key}"] is not None:
            text += f", {row[f'validation_{key}']:{form}} on {UNSEEN[self.settings.task]}"
        return text

    # ------------------------------------------------------------------------------------------------- keeping
    def save(self, picture: bool = True) -> None:
        tensors = {f"model.{name}": value for name, value in self.maml.state_dict().items()}
        for name, p in self.maml.named_parameters():
            tensors.update({f"optimizer.{name}.{key}": value for key, value in self.optimizer.state.get(p, {}).items()})
        tensors["generator"] = self.source.generator.get_state()
        facts = dict(settings=asdict(self.settings), iteration=self.iteration, every=self.every, log=self.log)
        facts.update(sums=self._sums, seconds=self.seconds, digest=self._digest)
        checkpoint.save(self.out / checkpoint.NAME, tensors, facts)
        write_csv(self.out / "log.csv", COLUMNS, self.log)
        if picture:
            draw_curve(self.out / "curve.png", self.settings, self.log, UNSEEN[self.settings.task])

    def _restore(self, path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        _load_model(path, self.maml, tensors)
        parameters = dict(self.maml.named_parameters())
        state: dict[int, dict[str, Tensor]] = {}
        try:
            for index, (name, p) in enumerate(parameters.items()):
                prefix = f"optimizer.{name}."
                own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
                if own and (
                    own["exp_avg"].shape != p.shape or own["exp_avg_sq"].shape != p.shape or own["step"].numel() != 1
                ):
                    raise ValueError(f"Adam's state of {name} has another shape")
                if own:
                    state[index] = own
            self.optimizer.load_state_dict(
                {"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]}
            )
            self.source.generator.set_state(tensors["generator"])
            self.iteration, self.every = (
                check_count("iteration", facts["iteration"], 0),
                check_count("every", facts["every"]),
            )
            self.seconds = float(facts["seconds"])
            self.log, self._sums = [{name: row[name] for name in COLUMNS} for row in facts["log"]], dict(facts["sums"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path} does not hold what a run needs to go on: {error}") from None
        if facts.get("digest") != self._digest:
            raise ValueError(
                f"the tasks are no longer those that the run in {self.out} began with: other data, or another version of"
                " the library that draws or resizes the images. It cannot go on as the same run"
            )
        if self.iteration > self.settings.iterations:
            raise ValueError(
                f"iterations={self.settings.iterations}: the run in {self.out} has done {self.iteration} already"
            )


def _query_loss(out: Any) -> float:
    """The outer loss without what a parameterisation adds to it (HSML's reconstruction)."""
    return float(out.loss if getattr(out, "penalty", None) is None else out.task_losses[out.finite].mean())


def model_from(
    path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], data: str | None, device: torch.device
) -> tuple[Settings, MAML]:
    """The trained MAML of a checkpoint, on ``device``. ``data``: where Omniglot lies, if not where it was."""
    settings = _settings(path, facts)
    if data is not None:
        settings = replace(settings, data=data)
    maml = settings.maml(device)
    _load_model(path, maml, tensors)
    return settings, maml


def _settings(path: Path, facts: Mapping[str, Any]) -> Settings:
    try:
        return Settings.from_dict(facts.get("settings"))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from None


def _load_model(path: Path, maml: MAML, tensors: Mapping[str, Tensor]) -> None:
    prefix = "model."
    try:
        maml.load_state_dict({name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)})
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit its own settings: {error}") from None


@contextmanager
def quiet_about_skipped() -> Iterator[None]:
    """Tasks left out by on_nonfinite="skip" are counted in the log: no warning for each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"\d+ task\(s\) with a loss or gradient that is not finite")
        yield


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that fills when the process is asked to stop (Ctrl-C, SIGTERM); asked twice, KeyboardInterrupt as ever.

    An interrupt in the middle of an optimizer's step would leave half of the parameters behind."""
    stop: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handler(number: int, frame: Any) -> None:
        if stop:
            raise KeyboardInterrupt
        stop.append(number)

    old = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)
