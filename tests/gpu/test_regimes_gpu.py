"""Each GPU backend in the regimes that its kernels are made for: few rows, hundreds of rows, many, small and large maps.

Tile edges are where kernels break: every count of rows from 1 to 17, and one either side of the powers of two above.
"""

from __future__ import annotations

import pytest
import torch
from gpu_support import backends, skip_unless_served

from benchmarks.suites import conv_point, linear_point
from inherit_kernels.testing import check_accuracy

pytestmark = pytest.mark.gpu

FEW = tuple(range(1, 18))
MANY = (31, 32, 33, 63, 64, 65, 127, 129, 200, 255, 257, 512, 513, 1000, 2048, 2049)
LINEAR = [pair for pair in backends() if "linear" in pair.values[0]]
CONV = [pair for pair in backends() if "conv" in pair.values[0]]


def check(point, backend, dtype, device, gradients=False):
    skip_unless_served(point.op, backend, point.case, dtype, device, gradients)
    check_accuracy(point.op, point.case, backend, dtype, device=device, layout=point.layout, gradients=gradients)


@pytest.mark.parametrize("op, backend", LINEAR)
@pytest.mark.parametrize("rows", FEW + MANY)
def test_rows(op, backend, rows, device):
    for k, n, r, h in ((512, 520, 64, 3), (264, 136, 24, 2)):
        check(linear_point(op, rows, k, n, r, h, activation="silu", residual=True), backend, torch.bfloat16, device)


@pytest.mark.parametrize("op, backend", LINEAR)
@pytest.mark.parametrize("rows", (1, 3, 16, 33, 200))
def test_rows_of_a_large_layer(op, backend, rows, device):
    for k, n in ((4096, 4096), (4096, 11008), (11008, 4096)) if device == "cuda" else ((96, 160),):
        for r in (64, 256):
            check(linear_point(op, rows, k, n, r, 3), backend, torch.bfloat16, device)


@pytest.mark.parametrize("op, backend", LINEAR)
@pytest.mark.parametrize("rank", (1, 2, 7, 15, 16, 17, 31, 48, 64, 100, 128, 200, 256, 257, 384, 512))
def test_ranks(op, backend, rank, device):
    for rows in (5, 130):
        check(linear_point(op, rows, 272, 200, rank, 2), backend, torch.bfloat16, device)
    check(linear_point(op, 130, 272, 200, rank, 2, activation="relu"), backend, torch.float16, device, gradients=True)


@pytest.mark.parametrize("op, backend", [pair for pair in LINEAR if "gated" in pair.values[0]])
@pytest.mark.parametrize("heads", (1, 2, 3, 4, 5, 8, 16))
def test_heads(op, backend, heads, device):
    for rows in (1, 16, 130):
        check(linear_point(op, rows, 136, 264, 24, heads), backend, torch.bfloat16, device, gradients=rows > 1)


@pytest.mark.parametrize("op, backend", CONV)
@pytest.mark.parametrize("layout", ("channels_last", "contiguous"))
@pytest.mark.parametrize("side", (1, 2, 7, 8, 14, 15, 28, 56))
def test_maps(op, backend, layout, side, device):
    c, r = {56: (64, 16), 28: (64, 32), 14: (256, 64), 7: (512, 128)}.get(side, (40, 24))
    if device == "cpu":
        c, r = 8, 4
    for kernel, stride in ((3, 1), (1, 1), (3, 2), (5, 1)):
        point = conv_point(op, 3, (c, side, c + 8, kernel, stride), r, 3, layout, activation="relu")
        check(point, backend, torch.bfloat16, device)


@pytest.mark.parametrize("op, backend", CONV)
@pytest.mark.parametrize("side", (7, 14, 30))
def test_gradients_of_maps(op, backend, side, device):
    for layout in ("channels_last", "contiguous"):
        for kernel, stride in ((3, 1), (1, 1), (3, 2)):
            point = conv_point(op, 2, (24, side, 40, kernel, stride), 16, 3, layout, residual=True)
            check(point, backend, torch.bfloat16, device, gradients=True)


@pytest.mark.parametrize("op, backend", [pair for pair in CONV if "gated" in pair.values[0]])
@pytest.mark.parametrize("heads", (1, 2, 4, 8))
def test_heads_of_maps(op, backend, heads, device):
    for batch in (1, 5):
        point = conv_point(op, batch, (32, 14, 40, 3, 1), 16, heads, "channels_last")
        check(point, backend, torch.bfloat16, device, gradients=True)


@pytest.mark.parametrize("op, backend", LINEAR)
def test_gradients_of_many_rows(op, backend, device):
    sizes = ((4096, 1024, 1024, 64), (1000, 520, 264, 40)) if device == "cuda" else ((200, 24, 40, 8),)
    for dtype in (torch.bfloat16, torch.float32):
        for m, k, n, r in sizes:
            check(linear_point(op, m, k, n, r, 3, activation="gelu"), backend, dtype, device, gradients=True)
