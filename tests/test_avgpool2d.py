"""avgpool2d_*, with and without the padding in the mean, and global_avgpool2d_*."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import IMAGES, TIERS, Operand, image, lowered, normal, out, rows
from test_maxpool2d import cases, windows

tiers = pytest.mark.parametrize("tier", TIERS)


def check(tier: str, op: str, attrs: dict, x: Operand, dy: Operand) -> None:
    """All modes, and <jvp(xt), dy> = <xt, bwd(dy)>."""
    attrs, n = attrs | {"input_shape": x.shape[1:]}, len(x.value)
    for mode in ("fwd", "jvp"):
        (y,) = lowered(f"{op}_{mode}", [x], [out(dy.kind, *dy.shape)], n, attrs).check(tier, elementwise=True)
    for mode in ("bwd", "bwd_jvp"):
        (dx,) = lowered(f"{op}_{mode}", [dy], [out(x.kind, *x.shape)], n, attrs).check(tier, elementwise=True)
    torch.testing.assert_close((y.double() * dy.value).sum(), (x.value.double() * dx).sum(), rtol=1e-6, atol=1e-5)


@tiers
@windows
@pytest.mark.parametrize("whole", [True, False], ids=["with_padding", "without"])
def test_windows(tier: str, window: tuple, whole: bool) -> None:
    for pool in cases(window):
        attrs = {"kernel": pool.kernel, "stride": pool.stride, "padding": pool.padding, "count_include_pad": whole}
        check(tier, "avgpool2d", attrs, image(normal(*pool.shape)), image(normal(*pool.output, seed=1)))


@tiers
def test_global(tier: str) -> None:
    for n, c, h, w in [*IMAGES, (2, 16, 40, 41)]:
        check(tier, "global_avgpool2d", {}, image(normal(n, c, h, w, shift=1.0)), rows(normal(n, c, seed=1)))
