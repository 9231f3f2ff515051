"""Checkpoints: one safetensors file, written whole or not at all, that never needs pickle.

    model.<parameter>                the meta-parameters, those of the method and learned rates included
    model.parameterisation           the method's signature, but of one that adapts the network's own parameters: checked on load
    optimizer.<parameter>.<state>    Adam's step, exp_avg, exp_avg_sq (Reptile: none)
    generator                        state of the task source's stream, uint8

The facts (settings, iteration, log) are JSON in the file's metadata under "fastmaml".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastmaml.files import whole_file

FORMAT = 1
NAME = "checkpoint.safetensors"


class CheckpointError(ValueError):
    """A file that is no checkpoint of fastmaml, or one that is damaged or does not fit."""


def path_of(place: Path) -> Path:
    """Of the checkpoint in a folder, or the file itself."""
    path = place / NAME if place.is_dir() else place
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such checkpoint. fastmaml train --out FOLDER writes one")
    return path


def save(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    from safetensors.torch import save as to_bytes

    data = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    with whole_file(path) as file:
        file.write(to_bytes(data, {"fastmaml": json.dumps({"format": FORMAT, **facts})}))


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, facts). Raises CheckpointError naming the file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("fastmaml")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it has no iterator)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    try:
        facts = json.loads(text or "")
    except ValueError:
        facts = None
    if not isinstance(facts, dict) or "format" not in facts:
        raise CheckpointError(f"{path} is a safetensors file, but no checkpoint of fastmaml train")
    if facts.pop("format") != FORMAT:
        raise CheckpointError(f"{path} was written by another version of fastmaml")
    return tensors, facts
