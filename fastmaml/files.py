"""Files that are written whole or not at all, and where those lie that can be made again."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file beside ``path`` to be written, renamed to it at the end: others see the old contents or the new ones.

    Nothing is left behind, and ``path`` stays as it was, where writing raises."""
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(part, "xb") as file:
            yield file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def cache_path(name: str, cache_dir: str | os.PathLike | None) -> Path | None:
    """Of the file ``name`` in cache_dir, $XDG_CACHE_HOME/fastmaml or ~/.cache/fastmaml; None without a home folder."""
    try:
        if cache_dir is not None:
            return Path(cache_dir).expanduser() / name
        base = os.environ.get("XDG_CACHE_HOME", "")  # to be ignored where it is not absolute, says its specification
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "fastmaml" / name
    except RuntimeError:  # no home folder
        return None
