"""What the examples share: command lines, pictures that are written whole or not at all, and intervals."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no window
from fastmaml.cli import at_least
from fastmaml.training.evaluate import mean_and_interval
from fastmaml.training.pictures import save_figure as save

__all__ = ["OUT", "at_least", "check_folder", "mean_and_interval", "parse_arguments", "save", "shown"]

OUT = Path(__file__).resolve().parent.parent / "build" / "demo"


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


def shown(path: Path) -> str:
    """As short as can be from here."""
    path = path.resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
