"""Omniglot from zips and folders: what is read, how it is split and sampled, what is refused, a cache that may be lost.

Most run on a tiny Omniglot written here. The last ones read the published files, from FASTMAML_OMNIGLOT or a folder
shared/data/omniglot beside the repository, and are skipped where there are none.
"""

from __future__ import annotations

import io
import os
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmaml.tasks import Omniglot
from fastmaml.tasks import omniglot_files as files
from fastmaml.tasks.episodes import nearest_neighbour
from fastmaml.tasks.omniglot import SHARES, characters_of

ALPHABETS = {"Ogham": 4, "Runic_(elder)": 7, "Tifinagh": 5, "Vai": 4}
DRAWERS = 6
SUBSET = "images_background_small1"


def png(number: int, drawer: int, side: int = 105) -> bytes:
    """A drawing as published: 1-bit, paper white. An L whose arms say which character, moved a little by the drawer."""
    ink = np.zeros((side, side), dtype=bool)
    ink[20 + drawer : 90, 20:28] = True
    ink[82:90, 20 : 40 + 3 * (number % 20)] = True
    out = io.BytesIO()
    Image.fromarray(~ink).save(out, format="PNG")
    return out.getvalue()


def members(subset: str = SUBSET, alphabets: dict[str, int] = ALPHABETS) -> dict[str, bytes]:
    out, number = {}, 0
    for alphabet, count in alphabets.items():
        for character in range(1, count + 1):
            number += 1
            for drawer in range(1, DRAWERS + 1):
                name = f"{subset}/{alphabet}/character{character:02d}/{number:04d}_{drawer:02d}.png"
                out[name] = png(number, drawer)
    return out


def write_zip(path: Path, contents: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("omniglot")
    write_zip(folder / f"{SUBSET}.zip", {f"{SUBSET}/": b"", **members(), f"{SUBSET}/Ogham/.DS_Store": b"x"})
    return folder


@pytest.fixture
def make(root, tmp_path):
    """Omniglot with a cache of the test's own."""
    return lambda *args, **kwargs: Omniglot(*(args or (root,)), **{"cache_dir": tmp_path / "cache", **kwargs})


def tensors(batch):
    return batch.support_x, batch.support_y, batch.query_x, batch.query_y


def assert_equal(a, b):
    assert all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


# -- reading -----------------------------------------------------------------------------------------------------------


def test_zip_and_folder_are_the_same(make, root, tmp_path):
    for name, data in members().items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    expected = make(split="all").sample()
    for place in (tmp_path, tmp_path / SUBSET, root / f"{SUBSET}.zip"):
        assert_equal(make(place, split="all").sample(), expected)


def test_images(make):
    source = make(split="all", rotations=False)
    assert len(source.characters) == len(source.classes) == 20
    assert source.classes[:5] == (*(f"Ogham/character0{i}" for i in (1, 2, 3, 4)), "Runic_(elder)/character01")
    assert source.alphabets[3:5] == ("Ogham", "Runic_(elder)")
    exact = make(split="all", rotations=False, size=105, tasks=40, shots=3, queries=2)
    batch, classes = exact.sample(return_classes=True)
    x = batch.stacked()[0].view(40, 5, 3, 105, 105)
    assert x.unique().tolist() == [0.0, 1.0]
    for t, way, shot in np.ndindex(40, 5, 3):
        number = int(classes[t, way]) + 1
        drawn = {Image.open(io.BytesIO(png(number, d))).tobytes() for d in range(1, DRAWERS + 1)}
        own = Image.fromarray(x[t, way, shot].numpy() == 0).tobytes()
        assert own in drawn


def test_resizing(root, tmp_path):
    grey = Image.open(io.BytesIO(png(1, 1))).convert("L")
    for resize in ("lanczos", "nearest"):
        bank = files.load_bank(root, None, 28, resize, tmp_path)
        want = 255 - np.asarray(grey.resize((28, 28), Image.Resampling[resize.upper()]))
        assert np.array_equal(bank.images[0], want)
    # What cbfinn/maml's script asks of the 1-bit images is Lanczos, what it gets is this
    bit = Image.open(io.BytesIO(png(1, 1))).resize((28, 28), Image.Resampling.LANCZOS)
    assert np.array_equal(bank.images[0], 255 * ~np.asarray(bit))


def test_batch(make):
    source = make(split="all", ways=4, shots=3, queries=2, tasks=6)
    batch, classes = source.sample(return_classes=True)
    x, y, query_x, query_y = batch.stacked()
    assert x.shape == (6, 12, 1, 28, 28) and query_x.shape == (6, 8, 1, 28, 28) and x.dtype == torch.float32
    assert y.tolist() == [[0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]] * 6 and y.dtype == torch.int64
    assert query_y.tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]] * 6
    assert classes.shape == (6, 4) and classes.max() < len(source.classes) == 80
    assert x.min() == 0 and x.max() == 1 and 0.01 < x.mean() < 0.3
    flat = make(split="all", ways=4, shots=3, queries=2, tasks=6, flatten=True).sample()
    assert torch.equal(flat.support_x, batch.support_x.flatten(1))


def test_stream_seed_and_threads(make):
    first, source = make(seed=3).sample(), make(seed=3)
    assert_equal(source.sample(), first)
    assert not torch.equal(source.sample().support_x, first.support_x)
    assert_equal(make(seed=4).sample(generator=torch.Generator().manual_seed(3)), first)
    before = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert_equal(make(seed=3).sample(), first)
    finally:
        torch.set_num_threads(before)


def test_on_a_device(make):
    """Rotated too, without a look at a value there."""
    batch, here = make(device="meta", ways=4, tasks=6, split="all").sample(), make(ways=4, tasks=6, split="all").sample()
    assert all(t.is_meta and t.shape == u.shape for t, u in zip(batch.stored(), here.stored(), strict=True))


def test_union_counts_a_drawing_once(tmp_path):
    small = {"Ogham": 4, "Runic_(elder)": 7}
    write_zip(tmp_path / f"{SUBSET}.zip", members(alphabets=small))
    second = "images_background_small2"
    write_zip(tmp_path / f"{second}.zip", members(second))  # all of the first's, numbered alike, and two more
    both = Omniglot(tmp_path, "all", cache_dir=tmp_path)
    assert both.characters == Omniglot(tmp_path, "all", subsets=second, cache_dir=tmp_path).characters
    assert both._rows.shape[1] == DRAWERS and len(both._images) == 20 * DRAWERS
    assert len(Omniglot(tmp_path, "all", subsets=[SUBSET], cache_dir=tmp_path).characters) == 11
    write_zip(tmp_path / f"{second}.zip", dict.fromkeys(members(second, small), png(19, 1)))
    with pytest.raises(ValueError, match="are two drawings of one name"):
        Omniglot(tmp_path, "all", cache_dir=tmp_path)


# -- classes, rotations, splits ----------------------------------------------------------------------------------------


def test_rotations(make):
    upright, turned = make(split="all", rotations=False, size=105), make(split="all", tasks=60, size=105)
    assert turned.classes[:5] == (
        *(f"Ogham/character01{a}" for a in ("", " 90°", " 180°", " 270°")),
        "Ogham/character02",
    )
    assert len(turned.classes) == 4 * len(upright.classes) == len(turned.alphabets)
    batch, classes = turned.sample(return_classes=True)
    assert set((classes % 4).flatten().tolist()) == {0, 1, 2, 3}
    assert all(len(set(task)) == 5 for task in (classes // 4).tolist())  # a character and its rotations never meet
    x, _, query_x, _ = batch.stacked()
    for t, way in np.ndindex(60, 5):
        character, k = divmod(int(classes[t, way]), 4)
        own = {image.numpy().tobytes() for image in upright._images[upright._rows[character]]}
        pair = [(image[t, way, 0] * 255).to(torch.uint8).rot90(-k).contiguous() for image in (x, query_x)]
        assert {image.numpy().tobytes() for image in pair} <= own and not torch.equal(*pair)


@pytest.mark.parametrize("split_by", ["class", "alphabet"])
@pytest.mark.parametrize("split_seed", [0, 7])
def test_splits_are_disjoint_and_complete(make, split_by, split_seed):
    parts = {s: make(split=s, ways=1, split_by=split_by, split_seed=split_seed) for s in SHARES}
    characters = [set(source.characters) for source in parts.values()]
    assert sum(map(len, characters)) == 20 and len(set.union(*characters)) == 20
    for split, source in parts.items():
        assert {name.split()[0] for name in source.classes} == set(source.characters)
        others = set.union(*(set(p.alphabets) for s, p in parts.items() if s != split))
        assert split_by == "class" or not set(source.alphabets) & others


def test_shares_and_order_of_the_split():
    names = [f"A{i // 40:02d}/character{i % 40:02d}" for i in range(1623)]
    sizes = {split: len(characters_of(names, split)) for split in SHARES}
    assert sizes == SHARES  # of the whole set those of the references
    assert characters_of(names, "test") == characters_of(names[::-1], "test") == sorted(characters_of(names, "test"))
    assert characters_of(names, "test") != characters_of(names, "test", split_seed=1)
    few = [f"A/character{i:02d}" for i in range(1, 6)]
    assert [len(characters_of(few, split)) for split in SHARES] == [3, 1, 1]
    assert characters_of(few, "test") == ["A/character05"]  # the order must never change: it decides published results


# -- refused -----------------------------------------------------------------------------------------------------------

REFUSED = [
    (dict(split="val"), ValueError, "split='val': expected one of 'train', 'validation', 'test', 'all'"),
    (dict(split_by="drawer"), ValueError, "split_by='drawer': expected one of 'class', 'alphabet'"),
    (dict(resize="bicubic"), ValueError, "resize='bicubic': expected one of 'lanczos', 'nearest'"),
    (dict(ways=0), ValueError, "ways=0: expected a whole number of at least 1"),
    (dict(ways=2, split="validation"), ValueError, "ways=2: split 'validation' has 1 characters"),
    (dict(shots=4, queries=3), ValueError, r"shots=4 and queries=3 take 7 drawings of a character, and \w+/.* has 6"),
    (dict(queries=1.5), TypeError, "queries=1.5: expected a whole number of at least"),
    (dict(size=4), ValueError, "size=4: expected a whole number of at least 8"),
    (dict(size=106), ValueError, "size=106: expected at most 105"),
    (dict(seed=None), TypeError, "seed=None: expected a whole number of at least"),
    (dict(split_seed=-1), ValueError, "split_seed=-1: expected a whole number of at least 0"),
    (dict(subsets="images_evaluation"), FileNotFoundError, "neither images_evaluation.zip nor a folder"),
    (dict(subsets="../up"), ValueError, "subsets='../up': expected names"),
    (dict(subsets=[]), ValueError, "subsets is empty"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED, ids=[" ".join(options) for options, *_ in REFUSED])
def test_refused(options, error, message, make):
    with pytest.raises(error, match=message):
        make(**options)


def test_a_missing_place_says_what_is_expected(make, tmp_path):
    for place in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError, match="brendenlake/omniglot.*images_evaluation.zip.*downloads nothing"):
            make(place)
    (tmp_path / SUBSET).mkdir()
    with pytest.raises(ValueError, match="holds no drawing ALPHABET/characterNN/NNNN_DD.png"):
        make(tmp_path)


def test_two_alphabets_are_no_split(tmp_path):
    write_zip(tmp_path / f"{SUBSET}.zip", members(alphabets={"Ogham": 4, "Vai": 4}))
    with pytest.raises(
        ValueError, match="split_by='alphabet': 2 alphabets cannot be split into train, validation, test"
    ):
        Omniglot(tmp_path, split_by="alphabet", cache_dir=tmp_path)


ONE = f"{SUBSET}/Ogham/character01/0001_01.png"
DAMAGE = {
    "no png": (b"text", rf"{ONE} is no readable PNG"),
    "cut png": (png(1, 1)[:60], rf"{ONE} is no readable PNG"),
    "jpeg": (b"\xff\xd8\xff\xe0" + bytes(100), rf"{ONE} is no readable PNG"),
    "size": (png(1, 1, side=104), rf"{ONE}: 104x104 pixels; the drawings of Omniglot have 105x105"),
    "huge": (bytes(files.MAX_BYTES + 1), rf"{ONE}: 1048577 bytes are too many"),
}


@pytest.mark.parametrize("kind", ["zip", "folder"])
@pytest.mark.parametrize(("data", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_drawing_is_named(data, message, kind, tmp_path):
    contents = {**members(), ONE: data}
    if kind == "zip":
        write_zip(tmp_path / f"{SUBSET}.zip", contents)
    else:
        for name, value in contents.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(value)
    with pytest.raises(ValueError, match=message):
        Omniglot(tmp_path, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_damaged_zip_is_named(root, tmp_path):
    good = (root / f"{SUBSET}.zip").read_bytes()
    archive = tmp_path / f"{SUBSET}.zip"
    archive.write_bytes(good[: len(good) // 2])
    with pytest.raises(ValueError, match=f"{SUBSET}.zip is not a readable zip file"):
        Omniglot(tmp_path, cache_dir=tmp_path)
    where = good.index(ONE.encode()) + len(ONE) + 12  # inside the first drawing
    archive.write_bytes(good[:where] + bytes(byte ^ 255 for byte in good[where : where + 8]) + good[where + 8 :])
    with pytest.raises(ValueError, match=rf"{SUBSET}.zip, member {ONE} cannot be read"):
        Omniglot(tmp_path, cache_dir=tmp_path)


def test_nothing_is_extracted(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    evil = {"../../evil.png": png(1, 1), f"../../{ONE}": png(1, 1), "/tmp/evil.sh": b"x"}
    write_zip(folder / f"{SUBSET}.zip", {**members(), **evil})
    before = sorted(tmp_path.rglob("*"))
    assert len(Omniglot(folder, "all", cache_dir=tmp_path / "cache").characters) == 20
    assert sorted(p for p in tmp_path.rglob("*") if (tmp_path / "cache") not in (p, *p.parents)) == before


# -- the cache ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    calls, real = [], files.read_bank
    monkeypatch.setattr(files, "read_bank", lambda *args: calls.append(args[1:]) or real(*args))
    return calls


def test_cache_file(root, tmp_path, monkeypatch, counted):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first, second = Omniglot(root), Omniglot(root, "test")
    assert counted == [(28, "lanczos")] and torch.equal(first._images, second._images)
    (file,) = (tmp_path / "fastmaml").iterdir()  # and no temporary file
    assert file.name.startswith(f"omniglot-{files.FORMAT}-") and file.name.endswith("-28-lanczos.npz")
    Omniglot(root, size=20), Omniglot(root, resize="nearest")
    assert counted[1:] == [(20, "lanczos"), (28, "nearest")]


def test_other_files_are_another_cache(tmp_path, counted):
    for name, data in members().items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    Omniglot(tmp_path, cache_dir=tmp_path), Omniglot(tmp_path, cache_dir=tmp_path)
    assert len(counted) == 1
    os.utime(tmp_path / ONE, (1, 1))
    Omniglot(tmp_path, cache_dir=tmp_path)
    assert len(counted) == 2
    (tmp_path / ONE).unlink()
    assert (Omniglot(tmp_path, "all", cache_dir=tmp_path)._rows[0] >= 0).sum() == DRAWERS - 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda file, bank: file.write_bytes(file.read_bytes()[:1000]),
        lambda file, bank: file.write_bytes(b""),
        lambda file, bank: np.savez(file, **bank._replace(images=bank.images[:, 1:])._asdict()),
        lambda file, bank: np.savez(file, **bank._replace(rows=bank.rows + len(bank.images))._asdict()),
        lambda file, bank: np.savez(
            file, **bank._replace(names=np.array([{}], dtype=object))._asdict()
        ),  # needs pickle
    ],
    ids=["cut", "empty", "size", "rows", "pickle"],
)
def test_damaged_cache_is_rebuilt(damage, root, tmp_path, counted):
    bank = files.load_bank(root, cache_dir=tmp_path)
    (file,) = tmp_path.iterdir()
    damage(file, bank)
    with pytest.warns(UserWarning, match="cannot be read and is rebuilt"):
        again = files.load_bank(root, cache_dir=tmp_path)
    assert len(counted) == 2 and all(np.array_equal(a, b) for a, b in zip(bank, again, strict=True))
    with warnings.catch_warnings(action="error"):
        files.load_bank(root, cache_dir=tmp_path)
    assert len(counted) == 2


def test_without_pillow(monkeypatch, make):
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(ImportError, match="pip install pillow"):
        make()


# -- the published files -----------------------------------------------------------------------------------------------

PLACES = [os.environ.get("FASTMAML_OMNIGLOT"), Path(__file__).parents[2] / "shared/data/omniglot"]
REAL = next((Path(p) for p in PLACES if p and Path(p).is_dir()), None)
published = pytest.mark.skipif(REAL is None, reason="no Omniglot here: set FASTMAML_OMNIGLOT to a folder with its zips")
SMALL = ("images_background_small1", "images_background_small2")


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    cache = tmp_path_factory.mktemp("published")
    return lambda *args, **kwargs: Omniglot(REAL, *args, subsets=SMALL, cache_dir=cache, **kwargs)


@published
def test_published_files(real):
    source = real("all", ways=20, shots=5, queries=15)
    assert len(source.characters) == 242 and len(source.classes) == 968 and len(source._images) == 242 * 20
    assert len(set(source.alphabets)) == 8 and (source._rows >= 0).all()
    assert [len(real(split).characters) for split in SHARES] == [164, 15, 63]
    assert sum(len(real(split, split_by="alphabet").characters) for split in SHARES) == 242
    batch = source.sample(4)
    assert batch.support_x.shape == (400, 1, 28, 28) and (batch.support_x.flatten(1).amax(1) > 0.5).all()
    assert 0.05 < batch.support_x.mean() < 0.15


@published
def test_published_files_are_neither_trivial_nor_hopeless(real):
    assert 0.3 < nearest_neighbour(real("test", tasks=100).sample()) < 0.6
