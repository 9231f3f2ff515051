"""pad2d_fwd: zeros around an image, in both directions; negative pads crop."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import IMAGES, TIERS, image, lowered, normal, out
from torch import Tensor

tiers = pytest.mark.parametrize("tier", TIERS)
PADS = [(0, 0, 0, 0), (1, 1, 1, 1), (2, 0, 1, 3), (0, 3, 0, 0), (-1, 2, 0, -2), (3, -2, -1, -1), (2, -3, 4, -3)]


def crop(task: object, attrs: dict, dy: Tensor) -> Tensor:
    """The reverse, for negative pads too."""
    top, bottom, left, right = attrs["padding"]
    return F.pad(dy, (-left, -right, -top, -bottom))


@tiers
@pytest.mark.parametrize("pads", PADS, ids=str)
def test_pads(tier: str, pads: tuple[int, int, int, int]) -> None:
    top, bottom, left, right = pads
    for n, c, h, w in IMAGES:
        oh, ow = h + top + bottom, w + left + right
        if min(oh, ow) < 1 or (min(pads) < 0 and min(h, w) < 4):
            continue
        x, attrs = normal(n, c, h, w), {"padding": pads, "input_shape": (c, h, w)}
        for mode in ("fwd", "jvp"):
            made = lowered(f"pad2d_{mode}", [image(x)], [out("image", n, c, oh, ow)], n, attrs)
            (y,) = made.check(tier, elementwise=True)
            assert torch.equal(y, made.reference(torch.float32)[0])
        for mode in ("bwd", "bwd_jvp"):
            made = lowered(f"pad2d_{mode}", [image(normal(n, c, oh, ow))], [out("image", n, c, h, w)], n, attrs)
            made.formula = crop
            (dx,) = made.check(tier, elementwise=True)
            assert torch.equal(dx, made.reference(torch.float32)[0])
