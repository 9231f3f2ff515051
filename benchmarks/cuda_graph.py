"""A peer's meta-iteration, captured in a CUDA graph and replayed: its kernels without the time that Python and torch take to launch them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.peers import Peer, Step
from benchmarks.workloads import Tasks, Workload

NAME = "{} in a CUDA graph"
WARM_UP = 3  # calls on a stream of their own before a capture, as torch asks: libraries choose their kernels in them


@dataclass
class Captured:
    """A graph with the tensors that it reads and writes. ``kept``: what else it was captured with must not be freed."""

    graph: torch.cuda.CUDAGraph
    tasks: Tasks
    loss: Tensor
    gradients: list[Tensor | None]
    kept: object = None


class Replayed:
    """``step``, whose every shape of tasks is captured when it first comes. What leaves is a copy."""

    def __init__(self, model: nn.Module, step: Step) -> None:
        self.parameters, self.step = list(model.parameters()), step
        self.captured: dict[tuple, Captured] = {}

    def __call__(self, tasks: Tasks) -> Tensor:
        key = tuple(v.shape for v in tasks)
        if key not in self.captured:
            self.captured[key] = self._capture(tasks)
        found = self.captured[key]
        for to, v in zip(found.tasks, tasks, strict=True):
            to.copy_(v)
        found.graph.replay()
        for p, g in zip(self.parameters, found.gradients, strict=True):
            if g is not None:
                p.grad = g.clone() if p.grad is None else p.grad.add_(g)
        return found.loss.clone()

    def replay_ms(self, tasks: Tasks, count: int = 100) -> float:
        """Of one replay, among ``count`` that follow one another, with the tasks on the device: what is left when nothing is launched from Python."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self(tasks)
        graph = self.captured[tuple(v.shape for v in tasks)].graph
        torch.cuda.synchronize()
        begin.record()
        for _ in range(count):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / count

    def _capture(self, tasks: Tasks) -> Captured:
        own = [p.grad for p in self.parameters]
        still = tuple(v.clone() for v in tasks)
        try:
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(WARM_UP):
                    self._afresh(still)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                loss = self._afresh(still)
            return Captured(graph, still, loss, [p.grad for p in self.parameters], self.step)
        finally:
            for p, g in zip(self.parameters, own, strict=True):
                p.grad = g

    def _afresh(self, tasks: Tasks) -> Tensor:
        """Without gradients to add to: those that a graph makes are its own, and each replay writes them anew."""
        for p in self.parameters:
            p.grad = None
        return self.step(tasks).detach()


def graphed(peer: Peer) -> Peer:
    """The peer in a graph. What cannot be captured (a copy to the CPU in the middle, say) fails with torch's reason, and that is its row."""

    def make(model: nn.Module, w: Workload) -> Step:
        return Replayed(model, peer.make(model, w))

    return Peer(NAME.format(peer.name), make, peer.absent, True, peer.lower)
