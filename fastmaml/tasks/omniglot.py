"""Omniglot (Lake et al. 2015): few-shot classification of handwritten characters, read from files you have.

A class is a character in one of four rotations, an example one of its 20 drawings. As in the reference systems the
images are inverted (ink 1), resized to 28x28, split by character 1100 / 100 / 423, and rotated by multiples of 90
degrees in every split. Two rules keep tasks honest:

- A character and its rotations are in one split.
- They never meet in one task: an O turned by 90 degrees is an O. A task draws its characters first and one rotation of
  each, which is what cbfinn/maml does.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastmaml.counts import check_count
from fastmaml.tasks.episodes import Episodes
from fastmaml.tasks.omniglot_files import RESIZE, SIDE, load_bank

SHARES = {"train": 1100, "validation": 100, "test": 423}  # characters of the whole set, as Finn et al. 2017 split them
SPLIT_BY = ("class", "alphabet")
MIN_SIZE = 8
ANGLES = (0, 90, 180, 270)  # counterclockwise


class Omniglot(Episodes):
    """Endless source of tasks, `TaskBatch` with

    support_x [tasks, ways * shots, 1, size, size], query_x [tasks, ways * queries, 1, size, size]: float32, 0 paper to
    1 ink (flatten=True: [tasks, n, size * size]); support_y, query_y: int64 labels 0 .. ways - 1, class after class.

    root       folder with the published zips or the folders in them, or one such zip or folder itself
    split      "train" | "validation" | "test" | "all"
    subsets    names without .zip; default: those of images_background, images_evaluation, images_background_small1 and
               images_background_small2 that are there. Of a character in two of them each drawing counts once
    split_by   "class": characters in an order that follows from split_seed, 1100 / 100 / 423 of them; of smaller sets the
               same shares, rounded, at least one each. "alphabet": whole alphabets, likewise. The published split by
               alphabet is split="all" with subsets="images_background" and with subsets="images_evaluation"
    rotations  False: upright only, a class is a character
    resize     "lanczos" (of the grey image, as learn2learn) | "nearest" (what Pillow's Lanczos does to a 1-bit image, and
               so the images of cbfinn/maml)
    cache_dir  where the resized images are kept (default $XDG_CACHE_HOME/fastmaml or ~/.cache/fastmaml)
    device     where the images lie, as bytes, and where tasks are put together; a seed means the same tasks on any

    seed is of the source's own stream, split_seed of the split: sources that must not overlap need the same split_seed.
    ``classes`` names the classes, ``alphabets`` their alphabets. Raises FileNotFoundError saying where Omniglot is
    published, ValueError naming the argument or the damaged file.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        split: str = "train",
        ways: int = 5,
        shots: int = 1,
        queries: int = 1,
        tasks: int = 32,
        size: int = 28,
        seed: int = 0,
        subsets: str | Sequence[str] | None = None,
        split_by: str = "class",
        split_seed: int = 0,
        rotations: bool = True,
        resize: str = "lanczos",
        cache_dir: str | os.PathLike | None = None,
        flatten: bool = False,
        device: str | torch.device = "cpu",
    ) -> None:
        for name, value, allowed in (
            ("split", split, (*SHARES, "all")),
            ("split_by", split_by, SPLIT_BY),
            ("resize", resize, RESIZE),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, allowed))}")
        super().__init__(ways, shots, queries, tasks, seed, flatten, device)
        self.split, self.rotations = split, bool(rotations)
        self.size = check_count("size", size, MIN_SIZE)
        if size > SIDE:
            raise ValueError(f"size={size}: expected at most {SIDE}, the size of the drawings")
        check_count("split_seed", split_seed, minimum=0)

        bank = load_bank(root, _names(subsets), self.size, resize, cache_dir)
        names = bank.names.tolist()
        mine = [names.index(name) for name in characters_of(names, split, split_by, split_seed)]
        angles = ANGLES if self.rotations else ANGLES[:1]
        self.characters = tuple(names[c] for c in mine)  # "Alphabet/characterNN"
        self.classes = tuple(f"{name} {angle}°" if angle else name for name in self.characters for angle in angles)
        self.alphabets = tuple(name.split("/")[0] for name in self.classes)
        self._check_counts(bank.rows[mine])
        rows = torch.from_numpy(bank.rows[mine]).long().repeat_interleave(len(angles), 0)  # [classes, drawings]
        self._fill(torch.from_numpy(bank.images), rows, torch.arange(len(mine)).repeat_interleave(len(angles)))

    def _check_counts(self, rows) -> None:
        if self.ways > len(rows):
            raise ValueError(f"ways={self.ways}: split {self.split!r} has {len(rows)} characters")
        have = (rows >= 0).sum(1)
        fewest = int(have.argmin())
        if self.shots + self.queries > have[fewest]:
            raise ValueError(
                f"shots={self.shots} and queries={self.queries} take {self.shots + self.queries} drawings of a"
                f" character, and {self.characters[fewest]} has {have[fewest]}"
            )

    def _draw(self, rows: Tensor, classes: Tensor, generator: torch.Generator) -> Tensor:
        images = self._images[rows.to(self.device)]
        if self.rotations:
            turns = classes % len(ANGLES)
            for k in range(1, len(ANGLES)):
                chosen = (turns == k).nonzero()[:, 0].to(self.device)
                images[chosen] = images[chosen].rot90(k, (1, 2))
        return images.float().mul_(1 / 255)


def characters_of(names: Iterable[str], split: str, split_by: str = "class", split_seed: int = 0) -> list[str]:
    """Those of the characters "Alphabet/characterNN" that are in a split, sorted.

    Characters (or alphabets) stand in the order of SHA-256 of "<split_seed> <name>": the same everywhere, for ever."""
    names = sorted(names)
    if split == "all":
        return names
    unit = {name: name if split_by == "class" else name.split("/")[0] for name in names}
    units = sorted(set(unit.values()), key=lambda name: hashlib.sha256(f"{split_seed} {name}".encode()).digest())
    if len(units) < len(SHARES):
        what = "characters" if split_by == "class" else "alphabets"
        raise ValueError(
            f"split_by={split_by!r}: {len(units)} {what} cannot be split into {', '.join(SHARES)}; split='all' takes all"
        )
    validation, test = (max(1, round(len(units) * SHARES[s] / sum(SHARES.values()))) for s in ("validation", "test"))
    train = len(units) - validation - test
    chosen = {"train": units[:train], "validation": units[train : train + validation], "test": units[-test:]}[split]
    return [name for name in names if unit[name] in set(chosen)]


def _names(subsets: str | Sequence[str] | None) -> tuple[str, ...] | None:
    if subsets is None:
        return None
    names = (subsets,) if isinstance(subsets, str) else tuple(subsets)
    for name in names:
        if not isinstance(name, str) or not name or name in (".", "..") or "/" in name or "\\" in name:
            raise ValueError(f"subsets={subsets!r}: expected names of zips or folders, without .zip")
    if not names:
        raise ValueError("subsets is empty: name at least one, or pass None for those that are there")
    return names
