"""Omniglot as it is published: zips or folders of 105x105 1-bit PNGs, read into one bank of small images.

    images_background/ALPHABET/characterNN/NNNN_DD.png      DD: one of 20 drawers

Nothing is downloaded and nothing extracted: members of a zip are read in memory. The bank is kept in the user's cache.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastmaml.files import cache_path
from fastmaml.tasks.cache import cached

SUBSETS = ("images_background", "images_evaluation", "images_background_small1", "images_background_small2")
PUBLISHED = (
    "Omniglot is published at https://github.com/brendenlake/omniglot, folder python/: images_background.zip and"
    " images_evaluation.zip (or the smaller images_background_small1.zip and images_background_small2.zip), to be left"
    " as zips or extracted. fastmaml downloads nothing"
)
SIDE = 105
RESIZE = ("lanczos", "nearest")
MAX_BYTES = 1 << 20  # of one drawing; the published ones have a few hundred
FORMAT = 1  # part of the cache's file name: raise it when what is computed below changes
DRAWING = re.compile(r"(?:.*/)?([^/]+)/(character\d+)/(\d+_\d+)\.png")

Drawings = dict[str, tuple[str, bytes]]  # "Alphabet/characterNN/NNNN_DD" -> where it was found, the PNG


class Bank(NamedTuple):
    """All drawings of all characters."""

    images: np.ndarray  # uint8 [drawings, size, size], 255 is ink
    rows: np.ndarray  # int32 [characters, drawers]: row of images, -1 where a character has fewer drawings
    names: np.ndarray  # str [characters], "Alphabet/characterNN", sorted


def load_bank(
    root: str | os.PathLike,
    subsets: tuple[str, ...] | None = None,
    size: int = 28,
    resize: str = "lanczos",
    cache_dir: str | os.PathLike | None = None,
) -> Bank:
    """The union of the subsets, resized and inverted: from the cache if the same files were read before."""
    places = find(root, subsets)
    name = f"omniglot-{FORMAT}-{_digest(places)}-{size}-{resize}.npz"
    return cached(
        cache_path(name, cache_dir), Bank, lambda bank: _checked(bank, size), lambda: read_bank(places, size, resize)
    )


def find(root: str | os.PathLike, subsets: tuple[str, ...] | None) -> dict[str, Path]:
    """The zip or folder of each subset; without ``subsets`` of the published ones that are there."""
    root = Path(root).expanduser()
    if not root.exists():
        raise FileNotFoundError(f"root={str(root)!r}: no such file or folder. {PUBLISHED}")
    if subsets is None and (root.is_file() or root.name in SUBSETS):  # one subset itself
        return {root.stem: root}
    if not root.is_dir():
        raise NotADirectoryError(f"root={str(root)!r}: expected the folder that holds the subsets. {PUBLISHED}")
    places = {}
    for name in SUBSETS if subsets is None else subsets:
        archive, folder = root / f"{name}.zip", root / name
        if archive.is_file():
            places[name] = archive
        elif folder.is_dir():
            places[name] = folder
        elif subsets is not None:
            raise FileNotFoundError(
                f"subsets={subsets!r}: {root} has neither {name}.zip nor a folder {name}. {PUBLISHED}"
            )
    if not places:
        raise FileNotFoundError(f"root={str(root)!r} holds none of {', '.join(SUBSETS)}, zip or folder. {PUBLISHED}")
    return places


def read_bank(places: dict[str, Path], size: int, resize: str) -> Bank:
    """Every drawing of every place; one that stands in two of them counts once."""
    drawings: Drawings = {}
    for place in places.values():
        found = False
        for name, where, data in _read_zip(place) if place.is_file() else _read_folder(place):
            found = True
            other = drawings.setdefault(name, (where, data))
            if other[1] != data:
                raise ValueError(
                    f"{where} and {other[0]} are two drawings of one name: are these files of one edition?"
                )
        if not found:
            raise ValueError(f"{place} holds no drawing ALPHABET/characterNN/NNNN_DD.png. {PUBLISHED}")
    characters: dict[str, list[int]] = {}
    images = np.empty((len(drawings), size, size), dtype=np.uint8)
    for row, name in enumerate(sorted(drawings)):
        images[row] = _decode(*drawings[name], size, resize)
        characters.setdefault(name.rpartition("/")[0], []).append(row)
    rows = np.full((len(characters), max(map(len, characters.values()))), -1, dtype=np.int32)
    for own, found_rows in zip(rows, characters.values(), strict=True):
        own[: len(found_rows)] = found_rows
    return Bank(images, rows, np.array(list(characters)))


def _read_zip(path: Path) -> Iterator[tuple[str, str, bytes]]:
    """(name, where, PNG) of each drawing. Nothing is extracted, so that a member's path cannot lead anywhere."""
    again = "fetch the file again from where Omniglot is published"
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is not a readable zip file ({error}): {again}") from None
    with archive:
        for info in archive.infolist():
            name, where = _name(info.filename), f"{path}, member {info.filename}"
            if name is None:
                continue
            if info.file_size > MAX_BYTES:
                raise ValueError(f"{where}: {info.file_size} bytes are too many for a drawing")
            try:
                yield name, where, archive.read(info)
            except Exception as error:  # a wrong checksum, zlib, an unknown method, a password, a truncated file
                raise ValueError(f"{where} cannot be read ({error}): {again}") from None


def _read_folder(path: Path) -> Iterator[tuple[str, str, bytes]]:
    for file in sorted(path.rglob("*.png")):
        name = _name(file.relative_to(path).as_posix())
        if name is None:
            continue
        if file.stat().st_size > MAX_BYTES:
            raise ValueError(f"{file}: {file.stat().st_size} bytes are too many for a drawing")
        yield name, str(file), file.read_bytes()


def _name(path: str) -> str | None:
    match = DRAWING.fullmatch(path)
    return None if match is None or path.startswith("__MACOSX") else "/".join(match.groups())


def _decode(where: str, data: bytes, size: int, resize: str) -> np.ndarray:
    """uint8 [size, size], ink 255. The published files are 1-bit, paper white."""
    Image = _pillow()
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            sides = image.size
            if sides == (SIDE, SIDE):
                image = image.convert("L")  # before: of a 1-bit image Pillow takes the nearest pixel, whatever is asked
                image = image.resize((size, size), Image.Resampling[resize.upper()])
                return 255 - np.asarray(image)
    except Exception as error:  # Pillow raises all kinds on a damaged file
        raise ValueError(f"{where} is no readable PNG: {error}") from None
    raise ValueError(f"{where}: {sides[0]}x{sides[1]} pixels; the drawings of Omniglot have {SIDE}x{SIDE}")


def _digest(places: dict[str, Path]) -> str:
    """Of the contents of zips; of folders their place and every file's name, size and time."""
    digest = hashlib.sha256()
    for name, place in places.items():
        digest.update(f"{name}\n".encode())
        if place.is_file():
            digest.update(place.read_bytes())
        else:
            digest.update(f"{place.resolve()}\n".encode())
            for file in sorted(place.rglob("*.png")):
                stat = file.stat()
                digest.update(f"{file.relative_to(place).as_posix()}\n{stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:24]


def _checked(bank: Bank, size: int) -> Bank:
    """bank, or ValueError where a cache file holds something else than read_bank makes."""
    images, rows, names = bank
    good = (
        (images.dtype, rows.dtype, names.dtype.kind) == (np.uint8, np.int32, "U")
        and images.ndim == 3 and images.shape[1:] == (size, size)
        and rows.ndim == 2 and rows.size > 0 and names.shape == rows.shape[:1]
        and np.array_equal(np.sort(rows[rows >= 0]), np.arange(len(images))) and rows.min() >= -1
        and (rows[:, 0] >= 0).all() and len(set(names.tolist())) == len(names) and all("/" in n for n in names.tolist())
    )  # fmt: skip
    if not good:
        raise ValueError("its arrays have unexpected shapes, types or values")
    return bank


def _pillow():
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("Omniglot reads PNG files with Pillow: pip install pillow") from error
    return Image
