"""What the executors of a GPU share: results that are read late, graphs that are being captured, and the memory that all of them take from."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from fastmaml.executors.call import Results

Made = TypeVar("Made")
_CAPTURED: list[tuple] = []  # what graphs point to that callers have captured
KEEPERS: weakref.WeakSet[Any] = weakref.WeakSet()  # executors that keep device memory for their next calls; they have ``let_go``


class DeviceResults(Results):
    """Whose ``all_finite`` is read from the device when it is asked for. While a graph is captured nothing can be read: it is True then, and with
    ``strict`` the gradients of a replay that finds a task not finite stay as they were."""

    __slots__ = ("_known",)

    @property
    def all_finite(self) -> bool:
        if self._known is None:
            self._known = bool(self.finite.all())
        return self._known

    @all_finite.setter
    def all_finite(self, known: bool | None) -> None:
        self._known = known


def capturing(device: torch.device) -> bool:
    """Whether a graph is captured on this device's current stream."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def keep_for_graph(device: torch.device, *what: Any) -> None:
    """While a graph is captured: it points to these for as long as it lives, which nobody is told; so they stay."""
    if capturing(device):
        _CAPTURED.append(what)


def with_room(make: Callable[[], Made], tasks: int, device: torch.device, parts: Callable[[], Mapping[str, int]]) -> Made:
    """What ``make`` makes on ``device``. Where there is no room, the executors of all objects let go of what they keep first; where there is none then, the error
    says what was asked for (``parts``: bytes by purpose), and holds on to nothing that was made on the way."""
    with contextlib.suppress(torch.cuda.OutOfMemoryError):
        return make()
    for keeper in list(KEEPERS):
        keeper.let_go()
    if device.type == "cuda" and not capturing(device):
        torch.cuda.empty_cache()
    with contextlib.suppress(torch.cuda.OutOfMemoryError):
        return make()
    sizes = parts()
    listed = ", ".join(f"{words} {size:,}" for words, size in sizes.items())
    message = f"the Plan of {tasks} tasks needs {sum(sizes.values()):,} bytes on {device} ({listed}), which are not free: pass fewer tasks at once"
    raise torch.cuda.OutOfMemoryError(message)
