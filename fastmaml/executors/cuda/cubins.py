"""Cubins on disk, for any number of processes: a file for each, named by the hash of all that it is made of, at most FASTMAML_CUBIN_BYTES together.

A file says its own length and hash, and is made anew where they do not hold. Its time of change is that of its last use. Who adds one removes, beyond the
limit, the least recently used: a reader that has opened such a file reads it to its end, a later one finds none. Nothing here is needed: where the folder
cannot be used, that is said once, and every process compiles for itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import warnings
from pathlib import Path

from fastmaml.files import cache_path, whole_file

LIMIT = 256 << 20  # bytes: some hundreds of Plans
ABANDONED = 3600  # seconds after which a part of a file is not being written any more

_said: set[Path] = set()


def limit() -> int:
    """FASTMAML_CUBIN_BYTES, or what holds without it."""
    text = os.environ.get("FASTMAML_CUBIN_BYTES", "")
    if text and not (text.isascii() and text.isdigit()):
        raise RuntimeError(f"FASTMAML_CUBIN_BYTES={text}: must be a number of bytes, 0 to keep nothing on disk")
    return int(text) if text else LIMIT


def folder(cache_dir: str | os.PathLike | None = None) -> Path | None:
    """Where they lie; None without a home folder."""
    return cache_path("cubins", cache_dir)


def load(key: str, cache_dir: str | os.PathLike | None = None) -> bytes | None:
    """The cubin of this key, from now on the last one used; None where there is none."""
    at = folder(cache_dir)
    if not limit() or at is None:
        return None
    path = at / f"{key}.cubin"
    try:
        stored = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _say_once(at, error)
        return None
    image = stored.partition(b"\n")[2]
    if stored != _wrapped(image):
        warnings.warn(f"the cache {path} is damaged and is made anew", stacklevel=3)
        return None
    with contextlib.suppress(OSError):  # a folder that is only read keeps no times
        os.utime(path)
    return image


def keep(key: str, image: bytes, cache_dir: str | os.PathLike | None = None) -> None:
    """Puts a cubin on disk, and takes others away beyond the limit."""
    at, wrapped, most = folder(cache_dir), _wrapped(image), limit()
    if at is None or len(wrapped) > most:
        return
    try:
        at.mkdir(parents=True, exist_ok=True)
        with whole_file(at / f"{key}.cubin") as file:
            file.write(wrapped)
        _evict(at, most)
    except OSError as error:
        _say_once(at, error)


def usage(at: Path) -> tuple[int, int]:
    """(files, bytes) of a folder; OSError where it cannot be read."""
    sizes = [size for _, path, size in _files(at) if path.suffix == ".cubin"]
    return len(sizes), sum(sizes)


def _evict(at: Path, most: int) -> None:
    """Whoever else does the same at once finds the same files to remove, or finds them gone."""
    files, now = sorted(_files(at)), time.time_ns()
    total = sum(size for _, path, size in files if path.suffix == ".cubin")
    for used, path, size in files:
        if path.suffix == ".part" and now - used > ABANDONED * 10**9:
            path.unlink(missing_ok=True)
        elif path.suffix == ".cubin" and total > most:
            path.unlink(missing_ok=True)
            total -= size


def _files(at: Path) -> list[tuple[int, Path, int]]:
    """(time of last use, path, bytes) of cubins, and of parts of them."""
    found = []
    with os.scandir(at) as entries:
        for entry in entries:
            if entry.name.endswith((".cubin", ".part")):
                with contextlib.suppress(FileNotFoundError):  # removed since
                    stat = entry.stat()
                    found.append((stat.st_mtime_ns, Path(entry.path), stat.st_size))
    return found


def _wrapped(image: bytes) -> bytes:
    return f"fastmaml cubin, {len(image)} bytes, sha256 {hashlib.sha256(image).hexdigest()}\n".encode() + image


def _say_once(at: Path, why: OSError) -> None:
    if at not in _said:
        _said.add(at)
        warnings.warn(f"compiled kernels cannot be kept in {at}, every process compiles its own: {why}", stacklevel=4)
