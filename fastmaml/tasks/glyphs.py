"""Few-shot classification of letters, drawn from the text faces that matplotlib ships: real images without a download.

A class is a letter, an example is a face with a random rotation and shift. Meta-training has Latin, Greek and Cyrillic,
meta-testing Georgian and Armenian, so that test alphabets are never seen in training. Three rules keep tasks honest:

- Letters whose DejaVu Sans bitmaps coincide (Latin A, Greek Alpha, Cyrillic A) are one class; one that spans the splits
  is a class of the training split.
- Near duplicates (cosine similarity > 0.95) never meet in one task. They form groups (connected components, mostly one
  letter under different accents); a task draws its groups first and one class from each.
- Support and query examples of a class never share a face.
"""

from __future__ import annotations

import math
import os
import unicodedata
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmaml.counts import check_count
from fastmaml.files import cache_path
from fastmaml.tasks.cache import cached
from fastmaml.tasks.episodes import Episodes

ALPHABETS = {"train": ("LATIN", "GREEK", "CYRILLIC"), "test": ("GEORGIAN", "ARMENIAN")}  # first words of Unicode names
FACES = (  # the first one decides which letters coincide; the order decides which numbers a seed gives
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique",
    "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique",
    "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic",
    "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta",
    "cmr10", "cmb10", "cmss10", "cmtt10", "cmti10",
)  # fmt: skip
WRONG = {"DejaVuSansMono-Oblique": "ӶӷӋӌ"}  # this face has the two letters' drawings exchanged
MIN_FACES = 6
NEAR_DUPLICATE = 0.95
MIN_SIZE, MAX_SIZE = 12, 128
FORMAT = 1  # part of the cache's file name: raise it when the rendering below changes


class Glyphs(Episodes):
    """Endless source of letter classification tasks, `TaskBatch` with

    support_x [tasks, ways * shots, 1, size, size], query_x [tasks, ways * queries, 1, size, size]: float32, 0 paper to
    1 ink (flatten=True: [tasks, n, size * size]); support_y, query_y: int64 labels 0 .. ways - 1, class after class.

    split: "train" (Latin, Greek, Cyrillic) or "test" (Georgian, Armenian). shots, queries: examples per class. jitter:
    rotations of up to 12 degrees, shifts of up to 2/28 of the size. cache_dir: where the rendered letters are kept
    (default $XDG_CACHE_HOME/fastmaml or ~/.cache/fastmaml); rendering takes a second or two, all that a folder that
    cannot be written costs. device: where the letters lie, as bytes, and where tasks are put together; a seed means the
    same tasks on any, but for the last bits of a rotation. Raises ValueError or TypeError naming the argument, ImportError without matplotlib.
    """

    def __init__(
        self,
        split: str = "train",
        ways: int = 5,
        shots: int = 1,
        queries: int = 1,
        tasks: int = 32,
        size: int = 28,
        seed: int = 0,
        jitter: bool = True,
        cache_dir: str | os.PathLike | None = None,
        flatten: bool = False,
        device: str | torch.device = "cpu",
    ) -> None:
        if split not in ALPHABETS:
            raise ValueError(f"split={split!r}: expected one of {', '.join(map(repr, ALPHABETS))}")
        super().__init__(ways, shots, queries, tasks, seed, flatten, device)
        self.split, self.jitter = split, jitter
        self.size = check_count("size", size, MIN_SIZE)
        if size > MAX_SIZE:
            raise ValueError(f"size={size}: expected at most {MAX_SIZE}")

        bank = load_bank(self.size, cache_dir)
        alphabet = [_alphabet(code) for code in bank.codes.tolist()]
        mine = [c for c, name in enumerate(alphabet) if name in ALPHABETS[split]]
        self.classes = tuple(chr(bank.codes[c]) for c in mine)
        self.alphabets = tuple(alphabet[c].title() for c in mine)  # of each class
        self.faces = FACES
        rows = torch.from_numpy(bank.rows[mine]).long()  # [classes, faces]: row of images, -1 where there is none
        groups = self._fill(torch.from_numpy(bank.images), rows, torch.from_numpy(bank.groups[mine]))
        if self.ways > groups:
            raise ValueError(
                f"ways={ways}: split {split!r} has {len(self.classes)} classes, of which at most"
                f" {groups} meet in one task (near duplicates never do)"
            )

    def _draw(self, rows: Tensor, classes: Tensor, generator: torch.Generator) -> Tensor:
        images = self._images[rows.to(self.device)].float().mul_(1 / 255)
        return _jitter(images, generator) if self.jitter else images


def _jitter(images: Tensor, generator: torch.Generator, degrees: float = 12.0, shift: float = 2 / 28) -> Tensor:
    """Rotate each of images [n, size, size] by up to +-degrees and shift it by up to +-shift of its size."""
    n, size = images.shape[:2]
    noise = torch.rand(3, n, 1, generator=generator) * 2 - 1
    angle = noise[0].double() * math.radians(degrees)
    cos, sin = angle.cos().float(), angle.sin().float()  # double, rounded once: the same bits for any thread count
    x = torch.linspace(-1 + 1 / size, 1 - 1 / size, size)
    cos, sin, noise, x = (v.to(images.device) for v in (cos, sin, noise, x))
    grid = torch.empty(n, size, size, 2, device=images.device)
    # One product per row and per column, one sum per pixel: affine_grid's matrix product, four times as fast
    torch.sub((cos * x + noise[1] * (2 * shift))[:, None, :], (sin * x)[:, :, None], out=grid[..., 0])
    torch.add((sin * x + noise[2] * (2 * shift))[:, None, :], (cos * x)[:, :, None], out=grid[..., 1])
    return F.grid_sample(images[:, None], grid, align_corners=False)[:, 0].clamp_(0, 1)


# -- the letters: rendered once, kept on disk --------------------------------------------------------------------------


class Bank(NamedTuple):
    """All classes of both splits in all their faces."""

    images: np.ndarray  # uint8 [rows, size, size]
    rows: np.ndarray  # int32 [classes, faces]: row of images, -1 where the class is not in that face
    codes: np.ndarray  # int32 [classes]: code point; of letters that coincide, the lowest
    groups: np.ndarray  # int32 [classes]: near duplicates share a number


def load_bank(size: int, cache_dir: str | os.PathLike | None = None) -> Bank:
    """The bank from its cache file, or rendered and then cached. A file that does not read well is rendered anew."""
    matplotlib = _matplotlib()
    path = cache_path(f"glyphs-{FORMAT}-matplotlib-{matplotlib.__version__}-{size}.npz", cache_dir)
    return cached(path, Bank, lambda bank: _checked(bank, size), lambda: render_bank(size))


def render_bank(size: int) -> Bank:
    """Draw every letter that MIN_FACES faces have, join letters that coincide, group near duplicates."""
    fonts = [_Font(face, size) for face in FACES]
    count = Counter(code for font in fonts for code in font.codes)
    letters = sorted(c for c in fonts[0].codes if count[c] >= MIN_FACES)
    classes: dict[bytes, list[int]] = {}  # bitmap in the first face -> code points
    for code in letters:
        classes.setdefault(fonts[0].draw(code).tobytes(), []).append(code)
    images, rows = [], np.full((len(classes), len(FACES)), -1, dtype=np.int32)
    for row, codes in zip(rows, classes.values(), strict=True):
        for f, font in enumerate(fonts):
            code = next((c for c in codes if c in font.codes), None)
            if code is not None:
                row[f] = len(images)
                images.append(font.draw(code))
    codes = np.array([same[0] for same in classes.values()], dtype=np.int32)
    bank = np.stack(images)
    return Bank(bank, rows, codes, _group_near_duplicates(bank[rows[:, 0]], codes))


def _group_near_duplicates(images: np.ndarray, codes: np.ndarray) -> np.ndarray:
    x = images.reshape(len(images), -1).astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    test = np.array([_alphabet(code) in ALPHABETS["test"] for code in codes.tolist()])
    near = (x @ x.T > NEAR_DUPLICATE) & (test[:, None] == test)  # splits never meet, so they need no common groups
    np.fill_diagonal(near, True)
    groups = np.arange(len(x), dtype=np.int32)
    while True:  # connected components: everyone takes the lowest number among its neighbours
        lowest = np.where(near, groups, len(x)).min(1).astype(np.int32)
        if (lowest == groups).all():
            return groups
        groups = lowest


class _Font:
    """One face: the code points of its letters, and their bitmaps."""

    def __init__(self, face: str, size: int) -> None:
        from matplotlib import ft2font

        path = Path(_matplotlib().get_data_path(), "fonts", "ttf", f"{face}.ttf")
        if not path.is_file():
            raise FileNotFoundError(
                f"Glyphs needs a face that matplotlib ships, {path}, and it is missing: reinstall it"
            )
        self.size = size
        self.font = ft2font.FT2Font(str(path))
        # Unhinted outlines: hinting at this size moves stems to whole pixels and makes faces look alike
        flags = getattr(ft2font, "LoadFlags", None)  # absent before matplotlib 3.10
        self.flags = ft2font.LOAD_NO_HINTING if flags is None else flags.NO_HINTING
        self.codes = {c for c, index in self.font.get_charmap().items() if index and self._is_letter(face, c, index)}

    def _is_letter(self, face: str, code: int, index: int) -> bool:
        letter = chr(code)
        if unicodedata.category(letter)[0] != "L" or letter in WRONG.get(face, ""):
            return False
        if not any(_alphabet(code) in names for names in ALPHABETS.values()):
            return False
        # The Computer Modern files put other glyphs at letters' code points (AE at U+00C0): there, believe the name
        return not face.startswith("cm") or self.font.get_glyph_name(index) == letter

    def draw(self, code: int) -> np.ndarray:
        """uint8 [size, size], the letter in the middle: capitals half as high as the image, wide ones shrunk to fit."""
        em, room = 0.75 * self.size, self.size * 24 // 28
        image = self._bitmap(code, em)
        while max(image.shape) > room:
            em *= min(0.97, room / max(image.shape))
            image = self._bitmap(code, em)
        out = np.zeros((self.size, self.size), dtype=np.uint8)
        top, left = (self.size - image.shape[0]) // 2, (self.size - image.shape[1]) // 2
        out[top : top + image.shape[0], left : left + image.shape[1]] = image
        return out

    def _bitmap(self, code: int, em: float) -> np.ndarray:
        self.font.set_size(em, 72)
        self.font.set_text(chr(code), flags=self.flags)
        self.font.draw_glyphs_to_bitmap(antialiased=True)
        return np.asarray(self.font.get_image())


def _alphabet(code: int) -> str:
    return unicodedata.name(chr(code), "").split(" ")[0]


def _checked(bank: Bank, size: int) -> Bank:
    """bank, or ValueError where a cache file holds something else than render_bank makes."""
    images, rows, codes, groups = bank
    classes = len(codes) if codes.ndim else 0
    good = (
        (images.dtype, rows.dtype, codes.dtype, groups.dtype) == (np.uint8, np.int32, np.int32, np.int32)
        and images.ndim == 3 and images.shape[1:] == (size, size)
        and classes > 0 and rows.shape == (classes, len(FACES)) and codes.shape == groups.shape == (classes,)
        and rows.min() >= -1 and rows.max() < len(images) and ((rows >= 0).sum(1) >= MIN_FACES).all()
        and codes.min() >= 0 and codes.max() <= 0x10FFFF and groups.min() >= 0 and groups.max() < classes
    )  # fmt: skip
    if not good:
        raise ValueError("its arrays have unexpected shapes, types or values")
    return bank


def _matplotlib():
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("Glyphs draws letters from the faces of matplotlib: pip install matplotlib") from error
    return matplotlib
