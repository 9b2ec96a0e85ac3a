"""Calibration data that is damaged, too little or not like the training's: said with the batch and the layer."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import inhernet
from inhernet import InheritConfig, ParamBudget, UniformRank
from inhernet.decompose import reestimate_batchnorm
from inhernet.decompose.batchnorm import batchnorm_distances


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(64, 32)
    ).eval()


def images(batches: int = 3, size: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, 6, 6, generator=generator) for _ in range(batches)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("init", ["fisher", "activation"])
def test_a_bad_batch_is_named_with_its_layer(init, value):
    # NaN: every layer stayed dense for an untrue reason, and the conversion "succeeded". Infinity named no layer.
    data = images()
    data[1][2, 0, 3, 3] = value
    expected = r"calibration batch 2: the input of layer '0' holds NaN, infinity.*the batch itself holds them"
    for call in (inhernet.plan, inhernet.inherit):
        with pytest.raises(ValueError, match=expected):
            call(network(), InheritConfig(init=init, budget=ParamBudget(0.5)), calibration=data)


def test_a_model_that_makes_nan_is_told_from_a_bad_batch():
    class Logarithm(nn.Module):
        def forward(self, x):
            return x.log()

    net = nn.Sequential(nn.Linear(8, 8), Logarithm(), nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"batch 1: the input of layer '2'.*the batch itself is finite"):
        inhernet.plan(net, calibration=[torch.randn(16, 8)])
    net = nn.Sequential(nn.Linear(8, 8), Logarithm())
    with pytest.raises(ValueError, match=r"batch 1: the model's 'output' holds NaN or infinity \(output_fn="):
        inhernet.plan(net, calibration=[torch.randn(16, 8)])


def test_numbers_whose_squares_overflow_are_named():
    with pytest.raises(ValueError, match=r"batch 1: the input of layer ''.*overflows when squared"):
        inhernet.plan(nn.Linear(8, 8), calibration=[torch.full((16, 8), 1e30)])


def test_nan_on_padded_tokens_stays_out():
    net = nn.Linear(8, 8)

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = net

        def forward(self, x, attention_mask):
            return self.layer(x)

    x, mask = torch.randn(16, 3, 8), torch.ones(16, 3)
    x[:, 2], mask[:, 2] = float("nan"), 0
    plan = inhernet.plan(Tokens(), calibration=[{"x": x, "attention_mask": mask}])
    assert plan["layer"].rank is not None


def test_batchnorm_takes_no_nan():
    # With init="svd" no moment is collected: the statistics took the NaN, and with them the whole network.
    data, net = images(), network()
    data[2][0] = float("nan")
    with pytest.raises(ValueError, match=r"calibration batch 3: the input of BatchNorm '1' holds NaN or infinity"):
        inhernet.inherit(net, InheritConfig(init="svd", budget=UniformRank(4)), calibration=data)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="calibration batch 3"):
        reestimate_batchnorm(net, data)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def trained() -> nn.Sequential:
    """A network whose BatchNorm has counted batches of these images."""
    net = network().train()
    for x in images(60):
        net(x)
    return net.eval()


@pytest.mark.parametrize("change", [lambda x: x + 1, lambda x: 3 * x, lambda x: x / 2], ids=["shifted", "x3", "x0.5"])
def test_other_data_is_warned_of(change):
    # Measured on the digits network: 0.02 relative error with its own data, 0.65 with shifted, 0.51 with none.
    net, data = trained(), [change(x) for x in images()]
    config = InheritConfig(budget=UniformRank(8))
    with pytest.warns(
        UserWarning, match=r"statistics of BatchNorm '1' are \d\.\d standard deviations.*batchnorm=False"
    ):
        model = inhernet.inherit(net, config, calibration=data)
    assert not torch.equal(model[1].running_mean, net[1].running_mean)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = inhernet.inherit(net, config, calibration=data, batchnorm=False)
    assert torch.equal(kept[1].running_mean, net[1].running_mean)
    assert torch.equal(kept[1].running_var, net[1].running_var)


def test_the_trainings_data_is_not_warned_of():
    net = trained()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inhernet.inherit(net, InheritConfig(budget=UniformRank(8)), calibration=images())
        inhernet.inherit(network(), InheritConfig(budget=UniformRank(8)), calibration=images())  # never trained
    distances = batchnorm_distances(net, images())
    assert 0 < distances["1"] < 0.2


def test_distance_is_what_it_says():
    net = trained()
    norm = net[1]
    x = torch.cat(images())
    y = net[0](x).double().detach()
    mean, var = y.mean((0, 2, 3)), torch.stack([net[0](b).double().var((0, 2, 3)) for b in images()]).mean(0)
    sigma, new = (norm.running_var.double() + norm.eps).sqrt(), (var + norm.eps).sqrt()
    expected = (((mean - norm.running_mean.double()) / sigma) ** 2 + ((new - sigma) / sigma) ** 2).mean().sqrt()
    assert batchnorm_distances(net, images())["1"] == pytest.approx(float(expected), rel=1e-5)


def test_one_sample_is_warned_of():
    config = InheritConfig(budget=UniformRank(2))
    with pytest.warns(UserWarning, match="calibration holds 1 sample, .*256 varied samples"):
        inhernet.plan(nn.Linear(8, 8), config, calibration=[torch.randn(1, 8)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inhernet.plan(nn.Linear(8, 8), config, calibration=[torch.randn(8, 8)])
