"""The networks compute, record how they are built, and scale to a parameter count."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from inhernet import models

GENERAL = {"cifar_resnet": {"depth": 8}, "cifar_resnet_near": {"parameters": 30_000}, "wide_resnet": {"depth": 10}}


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", models.__all__)
def test_every_model_records_how_it_is_built(name):
    with torch.device("meta"):
        model = getattr(models, name)(num_classes=7, in_channels=2, **GENERAL.get(name, {}))
    factory, arguments = model.inhernet_factory
    assert factory.startswith("inhernet.models.")
    assert json.loads(json.dumps(arguments)) == arguments
    with torch.device("meta"):
        twin = getattr(models, factory.removeprefix("inhernet.models."))(**arguments)
    assert {k: v.shape for k, v in twin.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert copy.deepcopy(model).inhernet_factory == model.inhernet_factory


@pytest.mark.parametrize("name", ["resnet20", "resnet8x4", "wrn16_2", "vgg8", "resnet18"])
def test_forward_and_backward(name):
    torch.manual_seed(0)
    model = getattr(models, name)(num_classes=5, in_channels=1)
    logits = model(torch.randn(2, 1, 32, 32))
    assert logits.shape == (2, 5)
    assert logits.isfinite().all()
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_small_images():
    model = models.cifar_resnet(14, (6, 6, 12, 24), num_classes=10, in_channels=1)
    assert model(torch.randn(3, 1, 8, 8)).shape == (3, 10)


def test_no_bias_and_preactivation_where_the_literature_has_them():
    for name in ("resnet20", "wrn16_2", "vgg13", "resnet18"):
        convolutions = [m for m in getattr(models, name)().modules() if isinstance(m, nn.Conv2d)]
        assert all(conv.bias is None for conv in convolutions)
    first = models.wrn16_2().block1[0]
    assert first.bn1.num_features == 16
    assert first.convShortcut.weight.shape == (32, 16, 1, 1)


@pytest.mark.parametrize("target", [20_000, 55_000, 97_321, 172_000, 400_000])
def test_nearest_width_is_within_two_percent(target):
    state = torch.random.get_rng_state()
    with torch.device("meta"):
        model = models.cifar_resnet_near(target, depth=20, num_classes=10, in_channels=1)
    assert abs(parameters(model) - target) <= 0.02 * target
    assert torch.equal(torch.random.get_rng_state(), state)
    widths = model.inhernet_factory[1]["widths"]
    assert widths[0] == widths[1]
    assert abs(widths[2] / widths[1] - 2) <= 0.6


def test_a_count_that_no_width_reaches_is_an_error():
    with pytest.raises(ValueError, match="parameters is 300, but the nearest ResNet-20"):
        models.cifar_resnet_near(300, depth=20)


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("cifar_resnet", {"depth": 9}, "depth is 9"),
        ("cifar_resnet", {"depth": 2}, "depth is 2"),
        ("cifar_resnet", {"depth": 8, "widths": (4, 4, 8)}, "widths is"),
        ("cifar_resnet", {"depth": 8, "widths": (4, 4, 8, 0)}, r"widths\[3\] is 0"),
        ("cifar_resnet", {"depth": 8, "num_classes": "10"}, "num_classes is '10'"),
        ("wide_resnet", {"depth": 11}, "depth is 11"),
        ("wide_resnet", {"depth": 10, "widen": 0}, "widen is 0"),
        ("vgg8", {"in_channels": True}, "in_channels is True"),
        ("resnet18", {"num_classes": -1}, "num_classes is -1"),
        ("cifar_resnet_near", {"parameters": 0}, "parameters is 0"),
    ],
)
def test_bad_arguments_are_named(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(models, name)(**arguments)
