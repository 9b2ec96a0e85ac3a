"""Parameter counts of the literature, to the unit (METHODS §1), through `inhernet.plan` and `inhernet.inherit`.

One uniform rank, no break-even guard (a layer stays dense only when rank >= min(m, n)), a gate with bias. In the rows
of the CIFAR-100 pairs a head has a bias where its source layer has one; in the authors' demo every head has one.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import inhernet
from inhernet import models

DENSE = {
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "vgg8": 3_963_556,
    "vgg13": 9_459_236,
    "wrn16_2": 703_284,
    "wrn40_1": 569_780,
    "wrn40_2": 2_255_156,
    "resnet18": 11_181_642,
}
CONVOLUTIONS_ONLY = [  # teacher, rank, parameters, layers factorised, layers
    ("resnet32x4", 4, 249_870, 34, 34),
    ("resnet32x4", 8, 464_018, 34, 34),
    ("vgg13", 128, 3_809_078, 6, 10),
    ("vgg13", 256, 6_906_416, 4, 10),
    ("wrn40_2", 16, 531_910, 38, 40),
    ("wrn40_2", 32, 1_001_183, 25, 40),
    ("resnet56", 8, 205_663, 57, 57),
    ("resnet56", 16, 383_507, 37, 57),
    ("resnet110", 4, 209_905, 111, 111),
    ("resnet110", 8, 404_689, 111, 111),
    ("resnet110", 32, 1_306_976, 36, 111),
]
WITH_CLASSIFIER = [("resnet56", 8, 202_402), ("resnet56", 16, 383_182)]
DEMO = [(1, 1_169_726), (2, 1_328_786), (3, 1_487_846)]


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def inherited(name: str, rank: int, layers: tuple[str, ...], **options) -> tuple[nn.Module, int, int]:
    """The model, how many layers its plan factorised, and out of how many; init="random" needs no decomposition."""
    teacher = getattr(models, name)()
    config = inhernet.InheritConfig(
        budget=inhernet.UniformRank(rank), break_even=False, init="random", layers=layers, **options
    )
    plan = inhernet.plan(teacher, config)
    model = inhernet.inherit(teacher, plan)
    assert count(model) == plan.total_params[0]
    assert count(teacher) == plan.total_params[1] == DENSE[name]
    return model, len(plan.factorised), len(plan.selected)


@pytest.mark.parametrize("name, parameters", DENSE.items())
def test_dense(name, parameters):
    with torch.device("meta"):
        assert count(getattr(models, name)()) == parameters


@pytest.mark.parametrize("name, rank, parameters, factorised, layers", CONVOLUTIONS_ONLY)
def test_convolutions_only_three_heads(name, rank, parameters, factorised, layers):
    model, done, selected = inherited(name, rank, ("conv2d",), heads=3)
    assert (count(model), done, selected) == (parameters, factorised, layers)
    gated = [m for m in model.modules() if isinstance(m, inhernet.nn.LowRankModule)]
    assert len(gated) == factorised
    assert all(m.gate.bias.numel() == 3 and m.bias is None for m in gated)


@pytest.mark.parametrize("name, rank, parameters", WITH_CLASSIFIER)
def test_with_the_classifier(name, rank, parameters):
    model, _, _ = inherited(name, rank, ("linear", "conv2d"), heads=3)
    assert count(model) == parameters
    assert model.fc.bias.shape == (3, 100)


@pytest.mark.parametrize("heads, parameters", DEMO)
def test_demo_gives_every_head_a_bias_and_one_head_a_gate(heads, parameters):
    model, done, _ = inherited("resnet18", 32, ("conv2d",), heads=heads, gate=True, head_bias="always")
    assert (count(model), done) == (parameters, 20)
    assert model.conv1.gate.bias.shape == (heads,)
    assert model.conv1.bias.shape == (heads, 64)


def test_the_guard_changes_the_counts():
    config = inhernet.InheritConfig(budget=inhernet.UniformRank(8), heads=3, init="random", layers=("conv2d",))
    plan = inhernet.plan(models.resnet56(), config)
    assert len(plan.factorised) < 57
    assert plan.total_params[0] < 205_663
