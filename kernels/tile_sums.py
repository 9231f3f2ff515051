"""The sums over rows that batchnorm needs, made by the tiles of the product that makes these rows (conv2d.py), while they are in registers.

    stats_fwd        of y = the tile:    mean, and the sum of squares about it; in the end mean, rstd
    stats_jvp        of xt = the tile:   sum xt,  sum (x - mean) xt;            in the end mean_t, rstd_t
    bwd_stats        of dy = the tile:   s1, s2
    bwd_stats_jvp    of dyt = the tile:  s1t, s2t                               formulas: batchnorm.py

Each tile stores its two sums; of every GROUP tiles the last one to come merges the group's, of the groups the last one those of the task. Who comes last is told by a
count of arrivals, which is zero again behind the launch. Merged are slots in their order, whoever does it: a task has the same bits at any time and in any batch. What a
program stores before its arrival is seen by who comes later: a barrier, then an atomic that releases and acquires.
"""

import triton
import triton.language as tl
from fastmaml.kernels.batchnorm import second_term
from fastmaml.kernels.tiles import channel


@triton.jit
def _arrived_last(arrivals, everybody):
    """Counts this program; whether it is the last one."""
    tl.debug_barrier()  # all its threads have stored
    last = tl.atomic_add(arrivals, 1, sem="acq_rel") == everybody - 1
    if last:
        tl.store(arrivals, 0)
    return last


@triton.jit
def _put(slot, one, two, c, C):
    tl.store(slot + c, one, c < C)
    tl.store(slot + C + c, two, c < C)


@triton.jit
def _merged(slots, count, each, rows, c, C, MODE: tl.constexpr, GROUP: tl.constexpr):
    """The sums of ``count`` slots [2, C], of ``each`` rows, ``rows`` in all; means and squares by the formula of Chan et al. (1979)."""
    one = tl.zeros(c.shape, tl.float32)
    two = tl.zeros(c.shape, tl.float32)
    for s0 in range(0, count, GROUP):
        s = s0 + tl.arange(0, GROUP)
        at, there = slots + s[:, None] * (2 * C) + c[None, :], (s < count)[:, None] & (c < C)[None, :]
        a = tl.load(at, there, 0.0, cache_modifier=".cg")  # what others have stored: not from the cache of this multiprocessor
        b = tl.load(at + C, there, 0.0, cache_modifier=".cg")
        if MODE == "stats_fwd":
            n = tl.maximum(tl.minimum(rows - s * each, each), 0).to(tl.float32)[:, None]
            before, here = 1.0 * (s0 * each), tl.minimum(rows - s0 * each, GROUP * each).to(tl.float32)
            mean = tl.sum(n * a, 0) / here
            d = a - mean[None, :]
            square = tl.sum(tl.where(there, b + n * d * d, 0.0), 0)
            d = mean - one
            one += d * (here / (before + here))
            two += square + d * d * (before * here / (before + here))
        else:
            one += tl.sum(a, 0)
            two += tl.sum(b, 0)
    return one, two


@triton.jit
def _of_tile(v, x, mean, rstd, dy, xt, mean_t, rstd_t, at, there, rows, t, c, C, MODE: tl.constexpr):
    """The sums of a tile v [pixels, channels] that lies at ``at``, ``rows`` of its pixels."""
    v = tl.where(there, v, 0.0)
    one = tl.sum(v, 0)
    if MODE == "stats_fwd":
        one = one / rows
        d = tl.where(there, v - one[None, :], 0.0)
        two = tl.sum(d * d, 0)
    else:
        d = tl.load(x + at, there, 0.0) - channel(mean, t, C, c, c < C, 0.0)
        r = channel(rstd, t, C, c, c < C, 0.0)
        two = tl.sum(tl.where(there, second_term(v, d, r, dy, xt, mean_t, rstd_t, at, there, t, c, C, MODE), 0.0), 0)
    return one, two


@triton.jit
def tile_sums(v, x, mean, rstd, dy, xt, mean_t, rstd_t, sums, products, parts, arrivals, eps, at, there, rows, slots, t, c, C,
              MODE: tl.constexpr, BM: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """What a tile v of BM pixels, of which the first ``rows`` of the task are summed, does for sums and products [C] of task t; either may be unwanted.

    parts [tasks, slots, 2, C]: the tiles, then their groups; arrivals [tasks, blocks of channels, slots]. Tiles: program_id 0, blocks of channels: program_id 1."""
    tile, tiles = tl.program_id(0), tl.cdiv(rows, BM)
    if tile < tiles:
        own = parts + t.to(tl.int64) * slots * (2 * C)
        counts = arrivals + (t.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * slots
        here = tl.minimum(rows - tile * BM, BM)
        inside = there & (tl.arange(0, BM) < here)[:, None]
        one, two = _of_tile(v, x, mean, rstd, dy, xt, mean_t, rstd_t, at, inside, here.to(tl.float32), t, c, C, MODE)
        _put(own + tile * (2 * C), one, two, c, C)
        group, groups = tile // GROUP, tl.cdiv(tiles, GROUP)
        first = group * GROUP
        count = tl.minimum(tiles - first, GROUP)
        if _arrived_last(counts + 1 + group, count):
            one, two = _merged(own + first * (2 * C), count, BM, tl.minimum(rows - first * BM, GROUP * BM), c, C, MODE, GROUP)
            _put(own + (tiles + group) * (2 * C), one, two, c, C)
            if _arrived_last(counts, groups):
                one, two = _merged(own + tiles * (2 * C), groups, GROUP * BM, rows, c, C, MODE, GROUP)
                if MODE == "stats_fwd":
                    two = 1.0 / tl.sqrt(two / rows + eps)
                elif MODE == "stats_jvp":
                    r = tl.load(rstd + t * C + c, c < C, 0.0)
                    one = one / rows
                    two = -r * r * r * (two / rows)
                if sums is not None:
                    tl.store(sums + t * C + c, one, c < C)
                if products is not None:
                    tl.store(products + t * C + c, two, c < C)
