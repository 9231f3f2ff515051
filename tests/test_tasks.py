"""Task sources: the same numbers for a seed and any thread count, honest splits, a cache that may be lost."""

import itertools
import math
import unicodedata

import numpy as np
import pytest
import torch

from fastmaml.tasks import Glyphs, Sinusoid
from fastmaml.tasks import glyphs as module
from fastmaml.tasks.episodes import nearest_neighbour
from fastmaml.tasks.glyphs import FACES, load_bank


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A folder with the rendered letters, so that they are drawn once for all tests."""
    folder = tmp_path_factory.mktemp("glyphs")
    load_bank(28, folder)
    return folder


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def tensors(batch):
    return batch.support_x, batch.support_y, batch.query_x, batch.query_y


def assert_equal(a, b):
    assert all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


SOURCES = {
    "sinusoid": lambda cache, **kwargs: Sinusoid(**kwargs),
    "train": lambda cache, **kwargs: Glyphs("train", cache_dir=cache, **kwargs),
    "test": lambda cache, **kwargs: Glyphs("test", cache_dir=cache, **kwargs),
}


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
def test_stream_and_seed(make, cache):
    first, second = itertools.islice(make(cache, seed=3), 2)
    assert len(first) == make(cache).tasks and first.uniform
    assert not torch.equal(first.support_x, second.support_x) and not torch.equal(first.support_x, first.query_x)
    again = make(cache, seed=3)
    assert_equal(again.sample(), first)
    assert_equal(next(iter(again)), second)
    assert not torch.equal(make(cache, seed=4).sample().support_x, first.support_x)
    # A generator given to sample leaves the source's own stream where it is
    fresh = make(cache, seed=5)
    assert_equal(fresh.sample(generator=torch.Generator().manual_seed(3)), first)
    assert_equal(fresh.sample(), make(cache, seed=5).sample())
    assert len(fresh.sample(tasks=7)) == 7


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
def test_on_a_device(make, cache):
    """"meta" has shapes and no memory: what mixes it with the CPU raises, and so does what has to know a value before it goes on."""
    there, here = make(cache, device="meta"), make(cache)
    batch = there.sample()
    assert all(t.is_meta and t.shape == u.shape and t.dtype is u.dtype for t, u in zip(tensors(batch), tensors(here.sample()), strict=True))
    assert torch.equal(there.generator.get_state(), here.generator.get_state())


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
def test_same_bits_for_any_thread_count(make, cache, threads):
    batches = []
    for count in (1, 2, 3):
        threads(count)
        batches.append(make(cache, tasks=301, shots=3, queries=5).sample())
    assert_equal(batches[0], batches[1])
    assert_equal(batches[0], batches[2])


def test_sinusoid():
    source = Sinusoid(shots=5, queries=9, tasks=400)
    batch, amplitude, phase = source.sample(return_params=True)
    x, y, query_x, query_y = batch.stacked()
    assert x.shape == y.shape == (400, 5, 1) and query_x.shape == query_y.shape == (400, 9, 1)
    assert {t.dtype for t in (x, y, query_x, query_y, amplitude, phase)} == {torch.float32}
    assert amplitude.shape == phase.shape == (400,)
    assert 0.1 <= amplitude.min() < 0.3 and 4.8 < amplitude.max() <= 5.0
    assert 0.0 <= phase.min() < 0.1 and 3.0 < phase.max() <= math.pi + 1e-6
    assert -5 <= x.min() < -4.9 and 4.9 < x.max() <= 5
    expected = amplitude[:, None, None].double() * torch.sin(query_x.double() - phase[:, None, None].double())
    assert torch.equal(query_y, expected.float())
    assert Sinusoid(amplitude=(2, 2), phase=(0, 0)).sample(return_params=True)[1].unique().tolist() == [2.0]


def test_glyph_batch(cache):
    source = Glyphs("test", ways=4, shots=3, queries=2, tasks=6, cache_dir=cache)
    batch, classes = source.sample(return_classes=True)
    x, y, query_x, query_y = batch.stacked()
    assert x.shape == (6, 12, 1, 28, 28) and query_x.shape == (6, 8, 1, 28, 28) and x.dtype == torch.float32
    assert (
        y.tolist() == [[0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]] * 6 and query_y.tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]] * 6
    )
    assert y.dtype == torch.int64 and classes.shape == (6, 4) and classes.max() < len(source.classes)
    assert x.min() == 0 and 0.9 < x.max() <= 1
    assert 0.02 < x.mean() < 0.3  # ink is 1 and there is less of it than of paper
    assert (x.flatten(2).amax(2) > 0.3).all()  # no letter is blank
    flat = Glyphs("test", ways=4, shots=3, queries=2, tasks=6, cache_dir=cache, flatten=True).sample()
    assert torch.equal(flat.support_x, batch.support_x.flatten(1))


def test_other_size(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FACES", FACES[:6])  # the fewer, the sooner they are drawn
    batch = Glyphs("train", size=20, tasks=2, cache_dir=tmp_path).sample()
    assert batch.query_x.shape == (10, 1, 20, 20) and batch.query_x.mean() > 0.02


def test_splits_are_disjoint_and_complete(cache):
    train, test = (Glyphs(split, cache_dir=cache) for split in ("train", "test"))
    assert len(set(train.classes)) == len(train.classes) > 1200 and len(set(test.classes)) == len(test.classes) > 150
    assert not set(train.classes) & set(test.classes)
    assert set(train.alphabets) == {"Latin", "Greek", "Cyrillic"} and set(test.alphabets) == {"Georgian", "Armenian"}
    assert train.faces == FACES and len(FACES) == 21
    for source in (train, test):
        assert len(source.alphabets) == len(source.classes)
        for letter, alphabet in zip(source.classes, source.alphabets, strict=True):
            assert unicodedata.name(letter).startswith(alphabet.upper()) and unicodedata.category(letter)[0] == "L"
    # Latin A, Greek Alpha, Cyrillic A: one drawing, one class. Armenian letters drawn as Latin ones are no test
    assert "A" in train.classes and not {"Α", "А"} & set(train.classes)
    assert not {"Օ", "հ", "ո"} & set(test.classes)
    bank = load_bank(28, cache)
    first_face = {image.tobytes() for image in bank.images[bank.rows[:, 0]]}
    assert len(first_face) == len(bank.codes)


def test_computer_modern_has_plain_letters_only(cache):
    bank = load_bank(28, cache)
    drawn = {chr(bank.codes[c]) for c in np.flatnonzero((bank.rows[:, FACES.index("cmr10") :] >= 0).any(1))}
    assert drawn == set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")


@pytest.mark.parametrize("split", ["train", "test"])
def test_near_duplicates_never_meet(split, cache):
    source = Glyphs(split, ways=20, tasks=100, cache_dir=cache)
    bank = load_bank(28, cache)
    index = {code: c for c, code in enumerate(bank.codes.tolist())}
    x = bank.images[bank.rows[[index[ord(letter)] for letter in source.classes], 0]].reshape(len(source.classes), -1)
    x = x / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    near = x @ x.T > 0.95
    assert near.sum() > len(near)  # there are some
    classes = source.sample(return_classes=True)[1].numpy()
    meet = near[classes[:, :, None], classes[:, None, :]]  # [tasks, ways, ways]
    assert (meet == np.eye(20, dtype=bool)).all()


def test_all_groups_at_once_and_every_class_in_the_long_run(cache):
    with pytest.raises(ValueError, match="of which at most") as error:
        Glyphs("test", ways=1000, cache_dir=cache)
    most = int(str(error.value).split("at most ")[1].split()[0])
    source = Glyphs("test", ways=most, tasks=25, cache_dir=cache)
    drawn = source.sample(return_classes=True)[1]
    assert set(drawn.flatten().tolist()) == set(range(len(source.classes)))


@pytest.mark.parametrize(("shots", "queries"), [(1, 1), (5, 3), (1, 15), (5, 15), (30, 2)])
def test_support_and_query_share_no_face(shots, queries, cache):
    source = Glyphs("train", shots=shots, queries=queries, tasks=20, jitter=False, cache_dir=cache, flatten=True)
    batch, classes = source.sample(return_classes=True)
    support, query = batch.stacked()[0], batch.stacked()[2]
    bank = load_bank(28, cache)
    index = {code: c for c, code in enumerate(bank.codes.tolist())}

    def drawings(x):
        return {image.numpy().tobytes() for image in x.mul(255).round().to(torch.uint8)}

    for t, way in itertools.product(range(20), range(5)):
        rows = bank.rows[index[ord(source.classes[classes[t, way]])]]
        own = [bank.images[row].tobytes() for row in rows if row >= 0]
        a, b = drawings(support[t, way * shots :][:shots]), drawings(query[t, way * queries :][:queries])
        assert a | b <= set(own)  # label and class agree
        if len(set(own)) == len(own):  # a few faces draw a letter alike
            assert not a & b
            if shots + queries <= len(own):
                assert len(a) == shots and len(b) == queries


def test_nearest_neighbour(cache):
    plain, jittered = (
        nearest_neighbour(Glyphs("test", tasks=100, jitter=jitter, cache_dir=cache).sample())
        for jitter in (False, True)
    )
    assert 0.3 < jittered < 0.65 < plain < 0.95  # neither trivial nor hopeless
    same = Glyphs("test", tasks=3, cache_dir=cache).sample()
    same = type(same).from_tensors(*same.stacked()[:2], *same.stacked()[:2])
    assert nearest_neighbour(same) == 1.0


# -- the cache ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_bank(cache, monkeypatch):
    """A render_bank that returns at once with 15 classes of each split, and the sizes it was called with."""
    bank, calls = load_bank(28, cache), []
    few = [*range(15), *(c for c, code in enumerate(bank.codes) if 0x531 <= code <= 0x53F)]  # A .. O, Armenian capitals
    rows = bank.rows[few]
    images = bank.images[rows[rows >= 0]]
    rows[rows >= 0] = range(len(images))
    bank = module.Bank(images, rows, bank.codes[few], np.arange(len(few), dtype=np.int32))
    monkeypatch.setattr(module, "render_bank", lambda size: calls.append(size) or bank)
    return bank, calls


def test_rendering_is_reproducible_and_equals_its_cache(cache):
    for a, b in zip(module.render_bank(28), load_bank(28, cache), strict=True):
        assert np.array_equal(a, b) and a.dtype == b.dtype


def test_cache_file(small_bank, tmp_path, monkeypatch):
    _, calls = small_bank
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for _ in range(2):
        Glyphs("test")
    assert calls == [28]
    (file,) = (tmp_path / "fastmaml").iterdir()  # and no temporary file
    import matplotlib

    assert file.name == f"glyphs-{module.FORMAT}-matplotlib-{matplotlib.__version__}-28.npz"


DAMAGE = {
    "empty": lambda data: b"",
    "text": lambda data: b"not a zip file",
    "cut": lambda data: data[: len(data) // 2],
    "flipped": lambda data: data[:5000] + bytes(100) + data[5100:],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_cache_is_rebuilt(damage, small_bank, tmp_path):
    bank, calls = small_bank
    load_bank(28, tmp_path)
    (file,) = tmp_path.iterdir()
    good = file.read_bytes()
    file.write_bytes(damage(good))
    with pytest.warns(UserWarning, match="cannot be read and is rebuilt"):
        again = load_bank(28, tmp_path)
    assert calls == [28, 28] and np.array_equal(again.images, bank.images)
    load_bank(28, tmp_path)  # repaired: no warning
    assert calls == [28, 28]


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b._replace(images=b.images[:, 1:]),
        lambda b: b._replace(images=b.images.astype(np.float32)),
        lambda b: b._replace(rows=b.rows + len(b.images)),
        lambda b: b._replace(rows=np.full_like(b.rows, -1)),
        lambda b: b._replace(groups=b.groups[1:]),
        lambda b: b._replace(codes=-b.codes),
        lambda b: b._replace(codes=np.array([{}], dtype=object)),  # would need pickle
    ],
    ids=["size", "dtype", "rows", "no faces", "groups", "codes", "pickle"],
)
def test_wrong_contents_are_rebuilt(change, small_bank, tmp_path):
    bank, calls = small_bank
    load_bank(28, tmp_path)
    (file,) = tmp_path.iterdir()
    np.savez(file, **change(bank)._asdict())
    with pytest.warns(UserWarning, match="is rebuilt"):
        load_bank(28, tmp_path)
    assert calls == [28, 28]


def test_no_cache_where_none_can_be_written(small_bank, tmp_path, monkeypatch):
    _, calls = small_bank
    (tmp_path / "file").write_text("in the way")
    Glyphs("test", cache_dir=tmp_path / "file" / "folder")  # not a folder
    monkeypatch.setattr(module.os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError("read-only")))
    Glyphs("test", cache_dir=tmp_path / "other")
    assert calls == [28, 28] and not list((tmp_path / "other").iterdir())


REFUSED = [
    (lambda c: Glyphs("val", cache_dir=c), ValueError, "split='val': expected one of 'train', 'test'"),
    (
        lambda c: Glyphs("test", ways=500, cache_dir=c),
        ValueError,
        "ways=500: split 'test' has [0-9]+ classes, of which at most",
    ),
    (lambda c: Glyphs(ways=0, cache_dir=c), ValueError, "ways=0: expected a whole number of at least 1"),
    (lambda c: Glyphs(shots=0, cache_dir=c), ValueError, "shots=0: expected a whole number of at least 1"),
    (lambda c: Glyphs(queries=1.5, cache_dir=c), TypeError, "queries=1.5: expected a whole number of at least"),
    (lambda c: Glyphs(tasks=-1, cache_dir=c), ValueError, "tasks=-1: expected a whole number of at least 1"),
    (lambda c: Glyphs(size=4, cache_dir=c), ValueError, "size=4: expected a whole number of at least 12"),
    (lambda c: Glyphs(size=1000, cache_dir=c), ValueError, "size=1000: expected at most 128"),
    (lambda c: Glyphs(seed=None, cache_dir=c), TypeError, "seed=None: expected a whole number of at least"),
    (lambda c: Glyphs(cache_dir=c).sample(tasks=0), ValueError, "tasks=0: expected a whole number of at least 1"),
    (lambda c: Sinusoid(shots=0), ValueError, "shots=0: expected a whole number of at least 1"),
    (lambda c: Sinusoid(seed=-1), ValueError, "seed=-1: expected a whole number of at least 0"),
    (lambda c: Sinusoid(amplitude=(5, 1)), ValueError, r"amplitude=\(5, 1\): expected finite numbers with low <= high"),
    (lambda c: Sinusoid(phase=math.pi), ValueError, r"phase=3.14.*: expected a pair \(low, high\)"),
    (lambda c: Sinusoid(x=(0, math.inf)), ValueError, r"x=\(0, inf\): expected finite"),
    (lambda c: Sinusoid(device="gpu"), ValueError, "device='gpu': expected 'cpu', 'cuda' or 'cuda:0'"),
    (lambda c: Glyphs(cache_dir=c, device="cuda:99"), ValueError, r"device='cuda:99': torch sees \d+ CUDA devices here"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED, ids=[message[:20] for *_, message in REFUSED])
def test_refused(call, error, message, cache):
    with pytest.raises(error, match=message):
        call(cache)


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        Glyphs()
