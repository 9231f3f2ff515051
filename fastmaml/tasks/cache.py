"""Banks of images kept on disk: npz without pickle, written whole, checked when read, rebuilt where they are damaged."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from fastmaml.files import whole_file

Bank = TypeVar("Bank", bound=tuple)  # a NamedTuple of arrays


def cached(path: Path | None, kind: type[Bank], check: Callable[[Bank], Bank], make: Callable[[], Bank]) -> Bank:
    """The bank in the file ``path``, or made and then written there; a folder that cannot be written costs no more.

    ``check`` raises ValueError for a bank that ``make`` would not make: it is made anew then, with a warning."""
    if path is not None:
        try:
            with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
                return check(kind(*(file[name] for name in kind._fields)))
        except (FileNotFoundError, NotADirectoryError):
            pass
        except Exception as error:  # zipfile, zlib and numpy raise all kinds on a damaged file
            warnings.warn(f"the cache {path} cannot be read and is rebuilt: {error}", stacklevel=4)
    bank = make()
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as file:
                np.savez_compressed(file, **bank._asdict())
        except OSError:
            pass  # no cache, then: the next process makes it again
    return bank
