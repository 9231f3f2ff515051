"""What the examples share: command lines, pictures that are written whole or not at all, and intervals."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no window
import torch
from matplotlib.figure import Figure

OUT = Path(__file__).resolve().parent.parent / "build" / "demo"


def at_least(minimum: int):
    """The type of an argument: an integer of at least ``minimum``."""

    def parse(text: str) -> int:
        if not text.lstrip("-").isdigit() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text!r}: expected an integer of at least {minimum}")
        return int(text)

    return parse


def parse_arguments(description: str, iterations: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--iterations", type=at_least(1), default=iterations, help="default %(default)s")
    parser.add_argument("--seed", type=at_least(0), default=0, help="default %(default)s")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the pictures (default build/demo)")
    arguments = parser.parse_args()
    check_folder(arguments.out, parser)
    return arguments


def check_folder(out: Path, parser: argparse.ArgumentParser) -> None:
    """Before any training: a wrong folder must not cost a run."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {out}: {error.strerror}")
    if not os.access(out, os.W_OK):
        parser.error(f"--out {out}: cannot be written")


def save(figure: Figure, path: Path) -> Path:
    """To a temporary name, then renamed."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        figure.savefig(part, format="png", dpi=150)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def shown(path: Path) -> str:
    """As short as can be from here."""
    path = path.resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def mean_and_interval(per_task: torch.Tensor) -> tuple[float, float]:
    """Mean over tasks, and half the width of its 95 % interval."""
    per_task = per_task.double()
    return float(per_task.mean()), 1.96 * float(per_task.std(correction=1)) / len(per_task) ** 0.5
