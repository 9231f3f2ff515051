"""maxpool2d_*: against torch's to the last bit; what is kept is each maximum's position in its window."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from kernel_cases import IMAGES, TIERS, Case, Operand, image, lowered, normal, out
from torch import Tensor

tiers = pytest.mark.parametrize("tier", TIERS)
WINDOWS = [  # kernel, stride, padding
    ((2, 2), (2, 2), (0, 0)),
    ((3, 3), (2, 2), (1, 1)),
    ((2, 3), (1, 2), (0, 1)),
    ((1, 1), (1, 1), (0, 0)),
    ((2, 2), (1, 1), (1, 1)),
    ((1, 1), (2, 3), (0, 0)),
    ((3, 2), (4, 3), (1, 0)),
    ((5, 4), (1, 2), (2, 2)),
    ((17, 16), (1, 1), (8, 8)),
]
windows = pytest.mark.parametrize("window", WINDOWS, ids=lambda w: "-".join(f"{a}x{b}" for a, b in w))


class Pool:
    """One window on images of one shape."""

    def __init__(self, window: tuple, shape: tuple[int, int, int, int]) -> None:
        self.kernel, self.stride, self.padding = window
        self.n, *self.image = shape
        sides = zip(self.image[1:], self.kernel, self.stride, self.padding, strict=True)
        self.sides = [(size + 2 * p - k) // s + 1 for size, k, s, p in sides]
        self.shape, self.output = tuple(shape), (self.n, shape[1], *self.sides)
        self.kind = "ints" if self.kernel[0] * self.kernel[1] > 256 else "bytes"

    def fits(self) -> bool:
        return all(size + 2 * p >= k for size, k, p in zip(self.image[1:], self.kernel, self.padding, strict=True))

    def starts(self) -> tuple[Tensor, Tensor]:
        i, j = (torch.arange(o) * s - p for o, s, p in zip(self.sides, self.stride, self.padding, strict=True))
        return i[:, None], j

    def positions(self, index: Tensor) -> Tensor:
        """torch's index (h * w) as the position in the window."""
        (i, j), w = self.starts(), self.image[2]
        return (index // w - i) * self.kernel[1] + index % w - j

    def index(self, positions: Tensor) -> Tensor:
        (i, j), kw = self.starts(), self.kernel[1]
        return (i + positions.long() // kw) * self.image[2] + j + positions.long() % kw

    def case(self, mode: str, inputs: list, outputs: list) -> Case:
        attrs = {"kernel": self.kernel, "stride": self.stride, "padding": self.padding, "input_shape": self.image}
        made = lowered(f"maxpool2d_{mode}", inputs, outputs, self.n, attrs)
        reference = made.formula

        def formula(task: SimpleNamespace, attrs: dict, v: Tensor, positions: Tensor | None = None) -> object:
            if positions is not None:
                return reference(task, attrs, v, self.index(positions))
            y, index = reference(task, attrs, v)
            return y, self.positions(index)

        made.formula = formula
        return made


def cases(window: tuple) -> list[Pool]:
    shapes = [*IMAGES, (1, 7, 17, 19)]
    return [pool for pool in (Pool(window, shape) for shape in shapes) if pool.fits()]


def with_ties(shape: tuple[int, ...]) -> Tensor:
    return normal(*shape).mul(2).round() / 2


@tiers
@windows
def test_all_modes(tier: str, window: tuple) -> None:
    assert cases(window)
    for pool in cases(window):
        x = image(with_ties(pool.shape))
        forward = pool.case("fwd", [x], [out("image", *pool.output), out(pool.kind, *pool.output)])
        y, index = forward.check(tier, elementwise=True)
        expected = forward.reference(torch.float32)
        assert torch.equal(y, expected[0]) and torch.equal(index.long(), expected[1])

        kept = Operand(pool.kind, index)
        replay = pool.case("replay", [x, kept], [out("image", *pool.output)])
        assert torch.equal(replay.check(tier, elementwise=True)[0], y)
        tangent = pool.case("jvp", [image(normal(*pool.shape, seed=1)), kept], [out("image", *pool.output)])
        assert torch.equal(tangent.check(tier)[0], tangent.reference(torch.float32)[0])
        for mode in ("bwd", "bwd_jvp"):
            backward = pool.case(mode, [image(normal(*pool.output, seed=2)), kept], [out("image", *pool.shape)])
            backward.check(tier, elementwise=True)


@tiers
@windows
def test_reverse_is_the_transpose(tier: str, window: tuple) -> None:
    """<jvp(xt), dy> = <xt, bwd(dy)>."""
    pool = cases(window)[-1]
    x, xt, dy = normal(*pool.shape), normal(*pool.shape, seed=1), normal(*pool.output, seed=2)
    _, index = pool.case("fwd", [image(x)], [None, out(pool.kind, *pool.output)]).run(tier)
    kept = Operand(pool.kind, index)
    (yt,) = pool.case("replay", [image(xt), kept], [out("image", *pool.output)]).run(tier)
    (dx,) = pool.case("bwd", [image(dy), kept], [out("image", *pool.shape)]).run(tier)
    torch.testing.assert_close((yt.double() * dy).sum(), (xt.double() * dx).sum(), rtol=1e-6, atol=1e-5)


@tiers
@windows
def test_special_values(tier: str, window: tuple) -> None:
    """A NaN is a maximum; windows of nothing but -infinity keep their first element, as in torch."""
    pool = cases(window)[-1]
    x = normal(*pool.shape)
    chosen = torch.rand(x.shape, generator=torch.Generator().manual_seed(3))
    for lower, value in ((0.2, float("nan")), (0.4, float("inf")), (0.9, -float("inf"))):
        x[(chosen > lower - 0.2) & (chosen < lower)] = value
    x[0, 1] = -float("inf")
    made = pool.case("fwd", [image(x)], [out("image", *pool.output), out(pool.kind, *pool.output)])
    y, index = made.run(tier)
    expected, where = made.reference(torch.float32)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(index.long(), where)
    (again,) = pool.case("replay", [image(x), Operand(pool.kind, index)], [out("image", *pool.output)]).run(tier)
    torch.testing.assert_close(again, expected, rtol=0, atol=0, equal_nan=True)
    only_y, _ = pool.case("fwd", [image(x)], [out("image", *pool.output), None]).run(tier)
    torch.testing.assert_close(only_y, expected, rtol=0, atol=0, equal_nan=True)
