"""Training and evaluation as `fastmaml train` and `fastmaml evaluate` run them."""

from fastmaml.training.checkpoint import CheckpointError
from fastmaml.training.evaluate import evaluate
from fastmaml.training.settings import Settings
from fastmaml.training.trainer import Trainer

__all__ = ["CheckpointError", "Settings", "Trainer", "evaluate"]
