"""What this machine can do at best, measured once per process: the peaks that floor times are computed from."""

from __future__ import annotations

import functools
import time

import torch

COPY_BYTES = 128 << 20  # of each side of the copy: more than a large last-level cache


def peak_gflops(threads: int | None = None) -> float | None:
    """GFLOP/s of a register-only FMA loop on ``threads`` threads (None: torch.get_num_threads()).

    None where fastmaml._cpu is not built. Other processes on the same cores lower it."""
    return _peak_gflops(threads or torch.get_num_threads())


@functools.cache
def _peak_gflops(threads: int) -> float | None:
    try:
        from fastmaml import _cpu
    except ImportError:
        return None
    return _cpu.peak_gflops(threads)


@functools.cache
def bandwidth() -> float:
    """GB/s of memory: a large copy by torch, bytes read and bytes written both counted, the best of five."""
    source = torch.zeros(COPY_BYTES // 4)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(6):  # the first brings the pages in
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * COPY_BYTES / best * 1e-9


def peaks() -> dict[str, float | None]:
    """The arguments that ``fastmaml.plan.explain.explain`` takes from the caller."""
    return {"peak_gflops": peak_gflops(), "bandwidth": bandwidth()}
