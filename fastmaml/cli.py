"""The commands `fastmaml train` and `fastmaml evaluate`: arguments, words, exit codes.

0: done. 1: it went wrong on the way. 2: wrong arguments, before any work. 130: stopped by Ctrl-C, 143: by SIGTERM.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

from fastmaml.executors import BACKENDS, BackendError
from fastmaml.output import NonFiniteError
from fastmaml.training.evaluate import evaluate
from fastmaml.training.methods import NAMES as METHODS
from fastmaml.training.settings import CHANGEABLE, DEFAULTS, SPLITS, Settings
from fastmaml.training.trainer import Trainer

WRONG = (ValueError, TypeError, FileNotFoundError, FileExistsError, NotADirectoryError, BackendError)
ALL_SPLITS = tuple(dict.fromkeys(split for splits in SPLITS.values() for split in splits))


def at_least(minimum: int) -> Callable[[str], int]:
    """The type of an argument: an integer of at least ``minimum``."""

    def parse(text: str) -> int:
        if not text.lstrip("-").isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text!r}: expected an integer of at least {minimum}")
        return int(text)

    return parse


def positive(text: str) -> float:
    """The type of an argument: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a finite number above 0")
    return value


def add_commands(parser: argparse.ArgumentParser) -> None:
    """The subcommands; each sets ``run``, which takes the arguments and returns the exit code."""
    commands = parser.add_subparsers(title="commands", metavar="{train,evaluate}", dest="command")

    train = commands.add_parser(
        "train",
        help="train a network by MAML or another method",
        description="Train a network by MAML or another method of the family, from settings alone.",
    )
    kinds = train.add_subparsers(title="tasks", dest="task", required=True)
    about = {
        "sinusoid": "regression of sinusoids from a few points",
        "glyphs": "letters, drawn from matplotlib's fonts",
        "omniglot": "handwritten characters, read from files you have",
    }
    for task in DEFAULTS:
        usage = f"{parser.prog} train {task} [options]"  # all of them would hide the error they stand above
        text = f"Train on {task}: {about[task]}."
        _train_arguments(kinds.add_parser(task, help=about[task], description=text, usage=usage), task)

    again = commands.add_parser(
        "evaluate",
        help="evaluate a checkpoint on new tasks",
        description="A checkpoint on new tasks, after every number of inner steps.",
    )
    again.add_argument(
        "checkpoint", type=Path, metavar="DIR", help="folder that fastmaml train wrote, or the checkpoint in it"
    )
    again.add_argument("--tasks", type=at_least(1), default=600, metavar="N", help="default %(default)s")
    again.add_argument("--steps", type=at_least(0), metavar="N", help="most inner steps (default 10, or those of training where they are more)")
    again.add_argument("--split", choices=ALL_SPLITS, default="test", help="default %(default)s")
    again.add_argument("--seed", type=at_least(0), metavar="N", help="of the tasks (default: that of the run, plus 2)")
    _device(again)
    again.add_argument("--data", metavar="PATH", help="where Omniglot lies, if not where it was in training")
    again.set_defaults(run=_evaluate, parser=again)


def _train_arguments(parser: argparse.ArgumentParser, task: str) -> None:
    default = DEFAULTS[task]

    def add(name: str, text: str, **options: object) -> None:
        # Suppressed: what is not given does not appear, so that --resume knows
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, help=text, **options)

    def number(name: str, least: int, text: str, value: int) -> None:
        add(name, f"{text} (default {value})", type=at_least(least), metavar="N")

    if task == "omniglot":
        add(
            "data",
            "folder with images_background.zip, images_evaluation.zip, ... or what was in them; needed",
            metavar="PATH",
        )
        add("split-by", "what is kept apart (default class)", choices=("class", "alphabet"))
        add("no-rotations", "upright characters only", dest="rotations", action="store_false")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs", task),
        metavar="DIR",
        help="folder for what is written (default %(default)s)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in --out; only these may change: "
        + ", ".join(f"--{name.replace('_', '-')}" for name in CHANGEABLE),
    )
    number("iterations", 1, "meta-iterations", default["iterations"])
    if "ways" in default:
        number("ways", 1, "classes of a task", default["ways"])
    number("shots", 1, "support examples of a class" if "ways" in default else "support points", default["shots"])
    number("queries", 1, "query examples of a class" if "ways" in default else "query points", default["queries"])
    number("tasks", 1, "tasks of a meta-iteration", default["tasks"])
    if task != "sinusoid":
        add("net", "fully connected or convolutional (default fc)", choices=("fc", "cnn"))
    add("method", f"what trains it (default MAML; inner rates, steps and --lr are then its paper's): {', '.join(METHODS)}", metavar="NAME")
    add("inner-lr", f"learning rate of the inner loop (default {default['inner_lr']}, or the method's)", type=positive, metavar="X")
    add("inner-steps", "steps of the inner loop (default 1, or the method's)", type=at_least(0), metavar="N")
    add("lr", f"Adam's learning rate (default {default['lr']}; Reptile: of SGD)", type=positive, metavar="X")
    add("first-order", "without second derivatives (FOMAML)", action="store_true")
    number("seed", 0, "of weights and tasks", 0)
    number("validation", 0, "tasks of unseen classes for the learning curve", 100)
    add(
        "on-nonfinite",
        "a task that is not finite ends the run, or is left out (default raise)",
        choices=("raise", "skip"),
    )
    add("backend", "default auto", choices=BACKENDS)
    _device(parser)
    parser.set_defaults(run=_train, parser=parser)


def _device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu, cuda, cuda:1, ... (default %(default)s)")


OTHERS = ("command", "run", "parser", "task", "out", "resume", "device")  # what argparse puts beside the settings


def _train(arguments: argparse.Namespace) -> int:
    given = {name: value for name, value in vars(arguments).items() if name not in OTHERS}
    if "data" in given:
        given["data"] = str(Path(given["data"]).expanduser().resolve())  # it will be read again from elsewhere
    out = arguments.out
    try:
        if arguments.resume:
            trainer = Trainer.resume(out, arguments.device, task=arguments.task, **given)
        else:
            trainer = Trainer(Settings.of(arguments.task, **given), out, arguments.device)
        out.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        arguments.parser.error(f"--out {out}: {error}. Give another folder, or --resume to go on with the run in it")
    except (*WRONG, PermissionError) as error:
        arguments.parser.error(str(error))
    settings = trainer.settings
    print(f"{settings.describe()}: {settings.iterations} iterations of {settings.tasks} tasks", flush=True)
    if trainer.iteration:
        print(f"goes on after iteration {trainer.iteration}", flush=True)
    try:
        trainer.run(bar=True)
    except NonFiniteError as error:
        which = ", ".join(map(str, error.tasks[:8])) + (" ..." if len(error.tasks) > 8 else "")
        print(
            f"iteration {trainer.iteration + 1}: loss or gradient of task {which} is not finite. The run until then is in {out}.",
            file=sys.stderr,
        )
        print(
            "Go on with --resume --on-nonfinite skip, or begin anew with a smaller --inner-lr or --lr.", file=sys.stderr
        )
        return 1
    except KeyboardInterrupt:
        print(f"stopped at once; {out} holds what was last written", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"{out} cannot be written: {error}", file=sys.stderr)
        return 1
    where = f" on the {trainer.maml.executor!r} executor" if trainer.maml.executor else ""
    left_out = f"; {trainer.not_finite} tasks left out" if trainer.not_finite else ""
    result = trainer.latest() or "too few for a row of the log"
    print(
        f"{trainer.iteration} iteration{'s' if trainer.iteration != 1 else ''} in {trainer.seconds:.0f} s{where}: {result}{left_out}"
    )
    print(f"{out}/ has checkpoint.safetensors, log.csv, curve.png")
    if trainer.stopped:
        print(
            f"stopped after iteration {trainer.iteration}: go on with fastmaml train {settings.task} --out {out} --resume"
        )
        return 130 if trainer.stopped == 2 else 143
    print(f"next: fastmaml evaluate {out}")
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    a = arguments
    try:
        result = evaluate(a.checkpoint, tasks=a.tasks, steps=a.steps, split=a.split, seed=a.seed, data=a.data, device=a.device, bar=True)
    except (*WRONG, PermissionError) as error:
        arguments.parser.error(str(error))
    except OSError as error:
        print(f"the evaluation cannot be written: {error}", file=sys.stderr)
        return 1
    folder = a.checkpoint if a.checkpoint.is_dir() else a.checkpoint.parent
    print(result.table())
    print(f"{folder}/ has evaluation.csv, evaluation.png")
    return 0
