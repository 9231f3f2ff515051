"""flatten_image_fwd, unflatten_image_fwd: between padded images and rows in torch's order, which may be the caller's own."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import IMAGES, TIERS, Operand, image, lowered, normal, out

tiers = pytest.mark.parametrize("tier", TIERS)
kinds = pytest.mark.parametrize("kind", ["rows", "dense", "plain"])
SHAPES = [*IMAGES, (2, 3, 5, 5), (2, 20, 4, 3), (5, 16, 4, 4)]


@tiers
@kinds
def test_flatten(tier: str, kind: str) -> None:
    for n, c, h, w in SHAPES:
        x, flat = normal(n, c, h, w), c * h * w
        attrs = {"shape": (flat,), "input_shape": (c, h, w), "rows": True}
        made = lowered("reshape_fwd", [image(x)], [out(kind, n, flat)], n, attrs)
        if made.kernel == "flatten_image_fwd":
            made.sizes.append(int(kind == "plain"))
            assert torch.equal(made.check(tier, elementwise=True)[0], x.flatten(1))


@tiers
@kinds
def test_unflatten(tier: str, kind: str) -> None:
    for n, c, h, w in SHAPES:
        x, attrs = normal(n, c * h * w), {"shape": (c * h * w,), "input_shape": (c, h, w), "rows": True}
        made = lowered("reshape_bwd", [Operand(kind, x)], [out("image", n, c, h, w)], n, attrs)
        if made.kernel == "unflatten_image_fwd":
            assert torch.equal(made.check(tier, elementwise=True)[0], x.view(n, c, h, w))


@tiers
def test_reshape(tier: str) -> None:
    for a, b in (((4, 1, 3), (2, 2, 3)), ((1, 6, 6), (36, 1, 1)), ((33, 2, 2), (3, 4, 11)), ((5, 5, 4), (20, 5, 1))):
        x = normal(3, *a)
        made = lowered("reshape_fwd", [image(x)], [out("image", 3, *b)], 3, {"shape": b, "rows": True})
        kind = "unflatten_image_fwd" if a[1] * a[2] == 1 else "flatten_image_fwd" if b[1] * b[2] == 1 else "reshape_image_fwd"
        assert made.kernel == kind
        if kind == "reshape_image_fwd":
            assert torch.equal(made.check(tier, elementwise=True)[0], x.view(3, *b))


def test_images_of_one_pixel_are_copied() -> None:
    made = lowered("reshape_fwd", [image(normal(2, 7, 1, 1))], [out("rows", 2, 7)], 2, {"shape": (7,), "rows": True})
    assert made.kernel == "copy_rows_fwd"
