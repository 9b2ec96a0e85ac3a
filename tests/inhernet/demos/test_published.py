"""The restated published layer computes what our modules compute."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from inhernet.demos.published import PublishedConv2d, PublishedLinear, published
from inhernet.nn import from_dense


def randomised(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return module


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("heads", "gate"), [(1, None), (1, True), (3, None)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"padding": "same", "dilation": 2}])
def test_convolution(heads: int, gate: bool | None, bias: bool, options: dict) -> None:
    module = randomised(from_dense(nn.Conv2d(3, 8, 3, bias=bias, **options), 4, heads=heads, gate=gate))
    x = torch.randn(4, 3, 9, 9)
    restated = published(nn.Sequential(module))
    assert isinstance(restated[0], PublishedConv2d)
    assert len(restated[0].ups) == heads
    torch.testing.assert_close(restated(x), module(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("heads", "gate"), [(1, None), (1, True), (3, None)])
@pytest.mark.parametrize("shape", [(5, 8), (2, 7, 8)])
def test_linear(heads: int, gate: bool | None, shape: tuple[int, ...]) -> None:
    module = randomised(from_dense(nn.Linear(8, 6), 4, heads=heads, gate=gate))
    x = torch.randn(shape)
    restated = published(module)
    assert isinstance(restated, PublishedLinear)
    torch.testing.assert_close(restated(x), module(x), rtol=1e-4, atol=1e-4)


def test_the_source_keeps_its_weights() -> None:
    module = from_dense(nn.Linear(8, 6), 4, heads=2)
    restated = published(module)
    with torch.no_grad():
        restated.ups[0].weight.zero_()
    assert module.up.abs().min() > 0


def test_refusals() -> None:
    with pytest.raises(ValueError, match="no low-rank module"):
        published(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="'same' with kernel_size"):
        published(from_dense(nn.Conv2d(3, 8, 2, padding="same"), 2, heads=2))


@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.Conv2d(4, 4, 3)])
def test_a_model_can_ask_a_restated_layer_for_its_dtype(layer: nn.Module) -> None:
    restated = published(nn.Sequential(from_dense(layer, rank=2, heads=2))).double()
    assert restated[0].weight.dtype == torch.float64
