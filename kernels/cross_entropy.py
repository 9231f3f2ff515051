"""cross_entropy over the first ``ways`` outputs of each row: p = softmax(z), q the smoothed and weighted target, N the normaliser.

    q_c = (smoothing / ways + (1 - smoothing) [c = label]) weight_c,   N = sum of weight[label] ("mean"), 1 ("sum"), or a number

    fwd      -sum q log p / N, and how many argmax are right     bwd      ((sum q) p - q) / N times the step's weight
    jvp      <bwd, zt>                                           bwd_jvp  (sum q) p (zt - <p, zt>) / N
"""

import triton
import triton.language as tl
from fastmaml.kernels.tiles import rows_of


@triton.jit
def _normaliser(labels, weight, first, rows, divisor, MEAN: tl.constexpr, BR: tl.constexpr):
    if not MEAN:
        return 1.0 / divisor
    elif weight is None:
        return 1.0 / rows.to(tl.float32)
    else:
        total = tl.zeros((BR,), tl.float32)
        for r0 in range(0, rows, BR):
            r = r0 + tl.arange(0, BR)
            total += tl.load(weight + tl.load(labels + first + r, r < rows, 0), r < rows, 0.0)
        return 1.0 / tl.sum(total, 0)


@triton.jit
def _target(z, label, weight, c, there, ways, smoothing):
    """(log p, q) of a tile of rows; -inf and 0 outside."""
    w = tl.full((1, c.shape[0]), 1.0, tl.float32)
    if weight is not None:
        w = tl.load(weight + c, c < ways, 0.0)[None, :]
    z = tl.where(there, z, float("-inf"))
    z = z - tl.max(tl.where(z == z, z, float("-inf")), 1)[:, None]
    e = tl.where(there, tl.exp(z), 0.0)
    logp = tl.where(there, z - tl.log(tl.sum(e, 1))[:, None], float("-inf"))
    hit = tl.where(c[None, :] == label[:, None], 1.0 - smoothing, 0.0)
    return logp, tl.where(there, (smoothing / ways + hit) * w, 0.0)


@triton.jit
def cross_entropy_fwd(offsets, ways, logits, labels, weight, logits_t, loss, correct, divisor, smoothing, C, MEAN: tl.constexpr, BR: tl.constexpr,
                      BC: tl.constexpr):  # fmt: skip
    """``logits_t`` given: jvp. ``ways`` [tasks], 0: all C outputs. Grid: tasks."""
    t = tl.program_id(0)
    first, rows = rows_of(offsets, t)
    n = tl.load(ways + t)
    n = tl.where(n > 0, n, C)
    scale = _normaliser(labels, weight, first, rows, divisor, MEAN, BR)
    c = tl.arange(0, BC)
    total = tl.zeros((BR,), tl.float32)
    right = tl.zeros((BR,), tl.float32)
    for r0 in range(0, rows, BR):
        r = r0 + tl.arange(0, BR)
        there = (r < rows)[:, None] & (c < n)[None, :]
        at = (first + r)[:, None] * C + c[None, :]
        label = tl.load(labels + first + r, r < rows, -1)
        inside = (c < n)[None, :] & (r[:, None] >= 0)  # rows behind the last are zeros: no infinities
        logp, q = _target(tl.load(logits + at, there, 0.0), label, weight, c, inside, n, smoothing)
        if logits_t is None:
            total += tl.where(r < rows, -tl.sum(q * tl.where(inside, logp, 0.0), 1), 0.0)
            if correct is not None:
                right += tl.where((r < rows) & (tl.argmax(tl.where(logp == logp, logp, float("-inf")), 1) == label), 1.0, 0.0)
        else:
            p = tl.where(inside, tl.exp(logp), 0.0)
            d = tl.sum(q, 1)[:, None] * p - q
            total += tl.where(r < rows, tl.sum(d * tl.load(logits_t + at, there, 0.0), 1), 0.0)
    tl.store(loss + t, tl.sum(total, 0) * scale)
    if correct is not None:
        tl.store(correct + t, tl.sum(right, 0))


@triton.jit
def cross_entropy_bwd(offsets, ways, logits, labels, weight, logits_t, step_weight, d, divisor, smoothing, C, MEAN: tl.constexpr, BR: tl.constexpr,
                      BC: tl.constexpr):  # fmt: skip
    """``logits_t`` given: bwd_jvp. Grid: rows, tasks."""
    t = tl.program_id(1)
    first, rows = rows_of(offsets, t)
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    if tl.program_id(0) * BR < rows:
        n = tl.load(ways + t)
        n = tl.where(n > 0, n, C)
        scale = _normaliser(labels, weight, first, rows, divisor, MEAN, BR)
        if step_weight is not None:
            scale *= tl.load(step_weight)
        c = tl.arange(0, BC)
        there = (r < rows)[:, None] & (c < n)[None, :]
        inside = (c < n)[None, :] & (r[:, None] >= 0)
        at = (first + r)[:, None] * C + c[None, :]
        logp, q = _target(tl.load(logits + at, there, 0.0), tl.load(labels + first + r, r < rows, -1), weight, c, inside, n, smoothing)
        p = tl.where(inside, tl.exp(logp), 0.0)
        mass = tl.sum(q, 1)[:, None]
        if logits_t is None:
            v = (mass * p - q) * scale
        else:
            zt = tl.load(logits_t + at, there, 0.0)
            v = mass * p * (zt - tl.sum(p * zt, 1)[:, None]) * scale
        tl.store(d + at, v, (r < rows)[:, None] & (c < C)[None, :])
