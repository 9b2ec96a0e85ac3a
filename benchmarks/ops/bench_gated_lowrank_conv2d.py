"""Regression benchmark of `gated_lowrank_conv2d`: `make bench`."""

from __future__ import annotations

import pytest
import torch

from benchmarks.ops.common import bench, bench_baseline, bench_training, parameters
from inherit_kernels.ops.gated_lowrank_conv2d.cases import case
from inhernet.demos.published import published_layer
from inhernet.nn import GatedLowRankConv2d

CASES = [
    case("b8_c64_56x56", (8,), 64, (56, 56), 64, 32, 3, (3, 3), padding=1),
    case("b64_c64_32x32", (64,), 64, (32, 32), 64, 16, 3, (3, 3), padding=1),
    case("b1_c256_14x14", (1,), 256, (14, 14), 256, 64, 3, (3, 3), padding=1),
]


@parameters("gated_lowrank_conv2d", CASES)
def test_forward(benchmark, case, form):
    bench(benchmark, "gated_lowrank_conv2d", case, form)


@parameters("gated_lowrank_conv2d", CASES, training=True)
def test_training(benchmark, case, form):
    bench_training(benchmark, "gated_lowrank_conv2d", case, form)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_dense_layer(benchmark, case):
    channels = case.shapes["x"][1]
    layer = torch.nn.Conv2d(channels, channels, 3, padding=1)
    x = torch.randn(case.shapes["x"])
    bench_baseline(benchmark, "gated_lowrank_conv2d", case, lambda: layer(x))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_published_layer(benchmark, case):
    channels, (_, n, r) = case.shapes["x"][1], case.shapes["up"]
    layer = published_layer(GatedLowRankConv2d(channels, n, 3, rank=r, heads=3, padding=1))
    x = torch.randn(case.shapes["x"])
    bench_baseline(benchmark, "gated_lowrank_conv2d", case, lambda: layer(x))
