"""TaskBatch: what it accepts, what it holds, what it refuses and how it says so."""

import pickle

import numpy as np
import pytest
import torch

from fastmaml.batch import TaskBatch
from fastmaml.counts import check_count


def stacked(tasks=3, n_support=5, n_query=7, shape=(2, 4)):
    return (
        torch.randn(tasks, n_support, *shape), torch.randint(5, (tasks, n_support)),
        torch.randn(tasks, n_query, *shape), torch.randint(5, (tasks, n_query)),
    )  # fmt: skip


def ragged(sizes=((1, 2), (4, 1), (3, 3)), shape=(2,)):
    return [
        (torch.randn(s, *shape), torch.randint(5, (s,)), torch.randn(q, *shape), torch.randint(5, (q,)))
        for s, q in sizes
    ]


def assert_same(batch, tasks):
    assert len(batch) == len(tasks)
    for t, (got, expected) in enumerate(zip(batch, tasks, strict=True)):
        for a, b, c in zip(got, batch.task(t), expected, strict=True):
            assert torch.equal(a, c) and torch.equal(b, c)


def test_stacked_tensors_are_views():
    data = stacked()
    batch = TaskBatch.of(data)
    assert (batch.tasks, batch.support_sizes, batch.query_sizes) == (3, (5,) * 3, (7,) * 3)
    assert batch.uniform and batch.ways is None and batch.device.type == "cpu"
    flat = batch.support_x, batch.support_y, batch.query_x, batch.query_y
    for x, original, again in zip(flat, data, batch.stacked(), strict=True):
        assert x.shape == (original.shape[0] * original.shape[1], *original.shape[2:])
        assert x.data_ptr() == original.data_ptr() == again.data_ptr()
        assert torch.equal(again, original)
    assert_same(batch, list(zip(*data, strict=True)))
    assert TaskBatch.of(batch) is batch


def test_ragged_tasks():
    tasks = ragged()
    batch = TaskBatch.of(tasks)
    assert not batch.uniform and batch.support_sizes == (1, 4, 3) and batch.query_sizes == (2, 1, 3)
    assert batch.support_offsets.tolist() == [0, 1, 5, 8] and batch.query_offsets.tolist() == [0, 2, 3, 6]
    assert batch.support_offsets.dtype == torch.int64 and batch.support_offsets is batch.support_offsets
    assert_same(batch, tasks)
    assert_same(TaskBatch.of([list(task) for task in tasks]), tasks)
    again = TaskBatch.from_offsets(
        batch.support_x,
        batch.support_y,
        batch.query_x,
        batch.query_y,
        batch.support_offsets,
        [0, 2, 3, 6],
        ways=[5, 4, 3],
    )
    assert_same(again, tasks)
    assert again.ways.tolist() == [5, 4, 3]
    assert TaskBatch.of(ragged(sizes=((2, 3), (2, 3)))).uniform
    assert TaskBatch.of(ragged() + ragged()[:1]).tasks == 4  # four tasks are not taken for one 4-tuple


@pytest.mark.parametrize("names", [("support", "query"), ("train", "test")])
@pytest.mark.parametrize("convert", [lambda x: x, lambda x: x.numpy()], ids=["tensor", "numpy"])
def test_dicts_and_arrays(names, convert):
    data = stacked()
    sx, sy, qx, qy = map(convert, data)
    batch = TaskBatch.of({names[0]: (sx, sy), names[1]: [qx, qy], "ways": 5})
    assert_same(batch, list(zip(*data, strict=True)))
    assert batch.ways.tolist() == [5, 5, 5]
    assert_same(TaskBatch.of([sx, sy, qx, qy]), list(zip(*data, strict=True)))
    assert batch.support_x.data_ptr() == data[0].data_ptr()


def test_arrays_that_torch_cannot_share_are_copied():
    sx, sy, qx, qy = (x.numpy() for x in stacked())
    sx.flags.writeable = False
    batch = TaskBatch.of((sx, sy[:, ::-1], qx.astype(">f4"), qy))  # no warning either
    assert np.array_equal(batch.stacked()[0].numpy(), sx)
    assert np.array_equal(batch.stacked()[1].numpy(), sy[:, ::-1])
    assert np.array_equal(batch.stacked()[2].numpy(), qx.astype(np.float32))


def test_float_targets_and_non_contiguous_inputs():
    x, y = torch.randn(4, 6, 1), torch.randn(4, 6, 3)
    batch = TaskBatch.of((x.transpose(0, 1), y.transpose(0, 1), x.transpose(0, 1), y.transpose(0, 1)))
    assert batch.support_y.shape == (24, 3)
    assert torch.equal(batch.stacked()[1], y.transpose(0, 1))


def test_to_changes_floats_only():
    batch = TaskBatch.from_tensors(*stacked(), ways=5)
    for changed in (batch.to(dtype=torch.float64), batch.to("cpu", torch.float64), batch.to(torch.float64)):
        assert changed.support_x.dtype == changed.query_x.dtype == torch.float64
        assert changed.support_y.dtype == changed.query_y.dtype == torch.int64
        assert changed.support_sizes == batch.support_sizes and changed.ways is not None
    x = torch.randn(2, 3, 1)
    assert TaskBatch.of((x, x, x, x)).to(dtype=torch.float64).query_y.dtype == torch.float64
    with pytest.raises(TypeError, match=r"dtype=torch.int64: expected a floating-point type"):
        batch.to(dtype=torch.int64)
    meta = batch.to("meta")
    assert meta.device.type == "meta" and meta.support_offsets.device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a GPU")
def test_pin_memory():
    assert TaskBatch.of(stacked()).pin_memory().query_x.is_pinned()


@pytest.mark.parametrize(
    "indices",
    [[2, 0], [1], 1, [-1, 0, 0], slice(1, 3), slice(None, None, -1), torch.tensor([0, 2]), np.array([1, 2])],
    ids=str,
)
@pytest.mark.parametrize("kind", ["uniform", "ragged"])
def test_select(indices, kind):
    batch = (
        TaskBatch.from_tensors(*stacked(), ways=[2, 3, 4])
        if kind == "uniform"
        else TaskBatch.from_tasks(ragged(), [2, 3, 4])
    )
    chosen = np.atleast_1d(np.arange(3)[indices]).tolist()
    picked = batch.select(indices)
    assert_same(picked, [batch.task(t) for t in chosen])
    assert picked.ways.tolist() == [batch.ways.tolist()[t] for t in chosen]


def test_neighbouring_tasks_are_selected_without_copy():
    batch = TaskBatch.from_tasks(ragged())
    assert batch.select([1, 2]).query_x.data_ptr() == batch.task(1)[2].data_ptr()


def test_it_is_frozen_prints_and_travels_between_processes():
    batch = TaskBatch.of(stacked())
    assert_same(pickle.loads(pickle.dumps(batch)), list(batch))
    with pytest.raises(AttributeError):
        batch.support_x = None
    assert (
        repr(batch)
        == "TaskBatch(3 tasks, support 5, query 7 rows, x float32 with shape [2, 4], y int64 with shape [], cpu)"
    )
    assert "support 1..4, query 1..3 rows" in repr(TaskBatch.of(ragged()))


def replaced(index, value, data=None):
    data = list(data or stacked())
    data[index] = value
    return tuple(data)


def part(index, value):
    """Three ragged tasks, the second with one tensor replaced."""
    tasks = ragged()
    tasks[1] = replaced(index, value, tasks[1])
    return tasks


X, Y = torch.zeros(3, 5, 2, 4), torch.zeros(3, 5, dtype=torch.long)
REFUSED = {
    "none": (lambda: None, TypeError, "cannot read tasks from a NoneType: pass a TaskBatch, a tuple"),
    "one tensor": (lambda: X, TypeError, r"cannot read tasks from float32 with shape \[3, 5, 2, 4\]"),
    "three": (lambda: stacked()[:3], TypeError, r"cannot read tasks from a tuple of 3 \(Tensor\)"),
    "lists": (lambda: replaced(1, [[0]]), TypeError, "support_y is a list of 1 .*: expected a torch.Tensor or"),
    "strings": (lambda: replaced(2, np.array([["a"]])), TypeError, "query_x is <U1 .*: expected numbers"),
    "tasks": (lambda: replaced(3, torch.zeros(4, 7)), ValueError, "query_y has 4 tasks but support_x has 3"),
    "rank": (
        lambda: replaced(1, torch.zeros(3)),
        ValueError,
        r"support_y has shape \[3\]: expected \[tasks, n, .*support_y\[None\]",
    ),
    "support rows": (lambda: replaced(1, Y[:, :4]), ValueError, "support_y has 4 rows per task but support_x has 5"),
    "query rows": (lambda: replaced(3, Y), ValueError, "query_y has 5 rows per task but query_x has 7"),
    "features": (
        lambda: replaced(2, torch.zeros(3, 7, 2, 5)),
        ValueError,
        r"query_x has rows of shape \[2, 5\] but support_x .* \[2, 4\]",
    ),
    "targets": (
        lambda: replaced(3, torch.zeros(3, 7, 1)),
        ValueError,
        r"query_y has rows of shape \[1\] but support_y .* \[\]",
    ),
    "device": (
        lambda: replaced(3, stacked()[3].to("meta")),
        ValueError,
        "one device, got support_x on cpu, .* query_y on meta",
    ),
    "no tasks": (lambda: tuple(x[:0] for x in stacked()), ValueError, "the batch has 0 tasks"),
    "no support": (
        lambda: stacked(n_support=0),
        ValueError,
        "task 0 has 0 support rows: every task needs at least one",
    ),
    "no query": (lambda: stacked(n_query=0), ValueError, "task 0 has 0 query rows"),
    "empty list": (lambda: [], ValueError, "the list of tasks is empty"),
    "task of 3": (
        lambda: [*ragged(), (X, Y, X)],
        TypeError,
        r"task 3 is a tuple of 3 \(Tensor\): expected \(support_x",
    ),
    "task scalar": (lambda: part(1, torch.tensor(1)), ValueError, "support_y of task 1 is a scalar"),
    "task shape": (
        lambda: part(2, torch.zeros(1, 3)),
        ValueError,
        r"query_x of task 1 is float32 .* \[1, 3\].*only the first axis",
    ),
    "task dtype": (lambda: part(3, torch.zeros(1)), ValueError, "query_y of task 1 is float32 .*that of task 0 int64"),
    "task rows": (
        lambda: part(1, torch.zeros(3, dtype=torch.long)),
        ValueError,
        "task 1: support_y has 3 rows but support_x has 4",
    ),
    "task empty": (lambda: ragged(((1, 1), (2, 0))), ValueError, "task 1 has 0 query rows"),
    "dict keys": (
        lambda: {"train": (X, Y), "valid": (X, Y)},
        TypeError,
        r"keys \['train', 'valid'\] but neither 'query' nor 'test'",
    ),
    "dict pair": (
        lambda: {"train": X, "test": (X, Y)},
        TypeError,
        r"tasks\['train'\] is float32 .*: expected a pair \(x, y\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    make, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        TaskBatch.of(make())


def test_refused_ways_offsets_sizes_and_indices():
    data, batch = stacked(), TaskBatch.of(stacked())
    flat = batch.support_x, batch.support_y, batch.query_x, batch.query_y
    cases = [
        (
            lambda: TaskBatch.from_tensors(*data, ways=[5, 5]),
            ValueError,
            r"ways has shape \[2\] but the batch has 3 tasks",
        ),
        (lambda: TaskBatch.from_tensors(*data, ways=0), ValueError, "ways of task 0 is 0: expected at least 1"),
        (
            lambda: TaskBatch.from_tensors(*data, ways=[1.0, 2.0, 3.0]),
            TypeError,
            "ways is float32 .*: expected integers",
        ),
        (lambda: TaskBatch.from_offsets(*flat, [0, 5, 10], [0, 7, 21]), ValueError, "expected 10 rows in each"),
        (lambda: TaskBatch.from_offsets(*flat, [0, 5, 15], [0, 21]), ValueError, "query has 1 tasks but support has 2"),
        (
            lambda: TaskBatch.from_offsets(*flat, [1, 15], [0, 21]),
            ValueError,
            r"support_offsets\[0\] is 1: offsets begin with 0",
        ),
        (lambda: TaskBatch.from_offsets(*flat, [0, 16, 15], [0, 7, 21]), ValueError, "task 1 has -1 support rows"),
        (lambda: TaskBatch.from_offsets(*flat, [0.0, 15.0], [0, 21]), ValueError, "support_offsets is float32"),
        (lambda: batch.select([0, 3]), IndexError, r"indices \[3\] of a batch of 3 tasks"),
        (lambda: batch.select([]), ValueError, "indices select 0 tasks"),
        (lambda: batch.select([True, False, True]), TypeError, "indices are booleans"),
        (lambda: batch.task(3), IndexError, "task 3 of a batch of 3"),
        (lambda: TaskBatch.of(ragged()).stacked(), ValueError, "different sizes and cannot be stacked"),
        (lambda: check_count("shots", 0), ValueError, "shots=0: expected a whole number of at least 1"),
        (lambda: check_count("shots", 1.0), TypeError, "shots=1.0: expected a whole number of at least"),
        (lambda: check_count("shots", True), TypeError, "shots=True: expected a whole number of at least"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()


def test_a_pickle_carries_the_rows_once():
    data = [torch.zeros(3, 5, 1000), torch.zeros(3, 5), torch.zeros(3, 2, 1000), torch.zeros(3, 2)]
    batch = TaskBatch.from_tensors(*data)
    assert batch.support_x.shape == (15, 1000)
    assert len(pickle.dumps(batch)) < 1.2 * 4 * sum(v.numel() for v in data)
