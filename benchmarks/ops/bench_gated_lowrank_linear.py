"""Regression benchmark of `gated_lowrank_linear`: `make bench`."""

from __future__ import annotations

import pytest
import torch

from benchmarks.ops.common import bench, bench_baseline, bench_training, parameters
from inherit_kernels.ops.gated_lowrank_linear.cases import case
from inhernet.demos.published import published_layer
from inhernet.nn import GatedLowRankLinear

CASES = [
    case("1x1024", (1,), 1024, 1024, 64, 3),
    case("64x4096", (64,), 4096, 4096, 256, 3),
    case("1024x1024", (1024,), 1024, 1024, 64, 3),
]


@parameters("gated_lowrank_linear", CASES)
def test_forward(benchmark, case, form):
    bench(benchmark, "gated_lowrank_linear", case, form)


@parameters("gated_lowrank_linear", CASES, training=True)
def test_training(benchmark, case, form):
    bench_training(benchmark, "gated_lowrank_linear", case, form)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_dense_layer(benchmark, case):
    layer = torch.nn.Linear(case.shapes["x"][-1], case.shapes["up"][-2])
    x = torch.randn(case.shapes["x"])
    bench_baseline(benchmark, "gated_lowrank_linear", case, lambda: layer(x))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_published_layer(benchmark, case):
    k, (_, n, r) = case.shapes["x"][-1], case.shapes["up"]
    layer = published_layer(GatedLowRankLinear(k, n, rank=r, heads=3))
    x = torch.randn(case.shapes["x"])
    bench_baseline(benchmark, "gated_lowrank_linear", case, lambda: layer(x))
