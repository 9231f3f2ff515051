"""Few-shot classification tasks from a bank of images: the sampling that `Glyphs` and `Omniglot` share.

Classes that must never meet in one task form a group; a task draws its groups first and one class from each.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastmaml.batch import TaskBatch
from fastmaml.counts import check_count
from fastmaml.tasks.device import check_device


class Episodes:
    """Endless source of ``TaskBatch``. A subclass checks its own arguments, fills in its bank, and draws the images:

    __init__   counts, the source's own stream, the device
    _fill      the bank
    _draw      rows of the bank -> float32 images on the device
    """

    def __init__(self, ways: int, shots: int, queries: int, tasks: int, seed: int, flatten: bool, device: str | torch.device) -> None:
        self.ways, self.shots = check_count("ways", ways), check_count("shots", shots)
        self.queries, self.tasks = check_count("queries", queries), check_count("tasks", tasks)
        self.generator = torch.Generator().manual_seed(check_count("seed", seed, minimum=0))
        self.flatten, self.device = flatten, check_device(device)

    def _fill(self, images: Tensor, rows: Tensor, group: Tensor) -> int:
        """images uint8 [n, size, size]; rows int64 [classes, examples]: row of images, -1 where there is none; group int64 [classes].

        Returns the number of groups: the most ways that a task can have."""
        self._images, self._rows = images.to(self.device), rows
        self._present = rows >= 0
        self._group = group.unique(return_inverse=True)[1]
        self._members = self._group.argsort(stable=True)  # classes, group after group
        self._group_size = self._group.bincount()
        self._group_start = self._group_size.cumsum(0) - self._group_size
        return len(self._group_size)

    def _draw(self, rows: Tensor, classes: Tensor, generator: torch.Generator) -> Tensor:
        """rows int64 [n] of the bank, the class of each [n], both on the CPU -> images float32 [n, size, size], 0 paper to 1 ink."""
        raise NotImplementedError

    def sample(
        self, tasks: int | None = None, generator: torch.Generator | None = None, *, return_classes: bool = False
    ) -> TaskBatch | tuple[TaskBatch, Tensor]:
        """One meta-batch from the source's own stream, or from `generator` (on the CPU).

        With return_classes: (batch, index into `classes` int64 [tasks, ways]).
        """
        tasks = self.tasks if tasks is None else check_count("tasks", tasks)
        generator = self.generator if generator is None else generator
        ways, shots, queries = self.ways, self.shots, self.queries

        group = torch.rand(tasks, len(self._group_size), generator=generator).topk(ways).indices  # [tasks, ways]
        member = torch.randint(1 << 30, (tasks, ways), generator=generator) % self._group_size[group]
        classes = self._members[self._group_start[group] + member]  # [tasks, ways]

        # Examples in random order, those the class has first; support takes from the front, query from the rest. A
        # class with fewer than are asked for repeats some, but never one on both sides.
        order = torch.rand(tasks, ways, self._rows.shape[1], generator=generator)
        order = order.masked_fill_(~self._present[classes], -1.0).argsort(descending=True)
        have = self._present[classes].sum(-1, keepdim=True)  # [tasks, ways, 1]
        share = (have * shots // (shots + queries)).clamp(min=1)
        front = torch.where(have >= shots + queries, shots, torch.minimum(share, have - 1))
        place_support = torch.arange(shots) % front
        place_query = front + torch.arange(queries) % (have - front)
        rows = self._rows[classes]
        support = rows.gather(2, order.gather(2, place_support)).flatten()
        query = rows.gather(2, order.gather(2, place_query)).flatten()

        of_image = classes.flatten()
        of_image = torch.cat([of_image.repeat_interleave(shots), of_image.repeat_interleave(queries)])
        images = self._draw(torch.cat([support, query]), of_image, generator)  # [n, size, size]
        shape = (images[0].numel(),) if self.flatten else (1, *images.shape[1:])
        x_support, x_query = images.view(-1, *shape).split([len(support), len(query)])
        label = torch.arange(ways, device=self.device)
        batch = TaskBatch.from_tensors(
            x_support.view(tasks, ways * shots, *shape),
            label.repeat_interleave(shots).repeat(tasks, 1),
            x_query.view(tasks, ways * queries, *shape),
            label.repeat_interleave(queries).repeat(tasks, 1),
        )
        return (batch, classes) if return_classes else batch

    def __iter__(self) -> Iterator[TaskBatch]:
        """Endless; goes on where the source's stream stands."""
        while True:
            yield self.sample()


def nearest_neighbour(batch: TaskBatch) -> float:
    """Accuracy of the label of the nearest support image (Euclidean distance of pixels): what no learning achieves."""
    right = total = 0
    for support_x, support_y, query_x, query_y in batch:
        nearest = torch.cdist(query_x.flatten(1), support_x.flatten(1)).argmin(1)
        right += int((support_y[nearest] == query_y).sum())
        total += len(query_y)
    return right / total
