"""Conversion: the teacher is untouched, the result starts as planned, BatchNorm fits the new weights."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import inhernet
from inhernet import InheritConfig, ParamBudget, UniformRank
from inhernet.decompose import reestimate_batchnorm
from inhernet.nn import GatedLowRankConv2d, LowRankConv2d, LowRankLinear


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 24, 3, padding=1, bias=False),
            nn.BatchNorm2d(24),
            nn.ReLU(inplace=True),
            nn.Conv2d(24, 24, 3, stride=2, padding="valid"),
            nn.BatchNorm2d(24),
            nn.ReLU(inplace=True),
            nn.Dropout(0.3),
        )
        self.head = nn.Linear(24, 10)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    net = Net().eval()
    reestimate_batchnorm(net, images())  # running statistics of its own data
    return net


def images() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(3, 3, generator=generator)
    return [torch.einsum("bchw,cd->bdhw", torch.randn(n, 3, 9, 9, generator=generator), mix) for n in (16, 16, 7)]


@pytest.mark.parametrize(
    "config", [InheritConfig(), InheritConfig(heads=3), InheritConfig(init="svd", budget=UniformRank(5))]
)
def test_the_teacher_is_untouched(net, config):
    net.train()
    net.head.weight.requires_grad_(False)
    before = copy.deepcopy(net)
    model = inhernet.inherit(net, config, calibration=images())
    after, kept = net.state_dict(), before.state_dict()
    assert all(torch.equal(after[k], kept[k]) for k in kept)
    assert [m.training for m in net.modules()] == [m.training for m in before.modules()]
    assert [p.requires_grad for p in net.parameters()] == [p.requires_grad for p in before.parameters()]
    assert [type(m) for m in net.modules()] == [type(m) for m in before.modules()]
    assert all(p.grad is None for p in net.parameters())
    assert {p.data_ptr() for p in net.parameters()}.isdisjoint(p.data_ptr() for p in model.parameters())
    assert all(m.training for m in model.modules())  # the copy keeps the flags of the teacher
    assert not model.head.weight.requires_grad if hasattr(model.head, "weight") else True


def test_svd_is_exactly_the_truncated_svd(net):
    model = inhernet.inherit(net, InheritConfig(init="svd", budget=UniformRank(6)))
    conv, dense = model.body[3], net.body[3]
    assert isinstance(conv, LowRankConv2d)
    u, s, v = torch.linalg.svd(dense.weight.detach().flatten(1).double(), full_matrices=False)
    best = (u[:, :6] * s[:6]) @ v[:6]
    found = (conv.up.double() @ conv.down.flatten(1).double()).detach()
    torch.testing.assert_close(found, best, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(conv.down.flatten(1).norm(dim=1), conv.up.norm(dim=0), rtol=1e-4, atol=1e-6)
    assert torch.equal(conv.bias, dense.bias)


def test_factors_are_balanced_by_norms(net):
    model = inhernet.inherit(net, InheritConfig(), calibration=images())
    low = [m for m in model.modules() if isinstance(m, (LowRankConv2d, LowRankLinear))]
    assert low
    for m in low:
        torch.testing.assert_close(m.down.flatten(1).norm(dim=1), m.up.norm(dim=0), rtol=1e-3, atol=1e-6)


def test_heads_do_not_change_the_start(net):
    rules = {"body.3": {"rank": 5, "heads": 3}, "_default": None}
    three = inhernet.inherit(net, InheritConfig(rules=rules, init="svd"))
    one = inhernet.inherit(net, InheritConfig(rules={"body.3": 5, "_default": None}, init="svd"))
    assert isinstance(three.body[3], GatedLowRankConv2d)
    x = images()[0]
    torch.testing.assert_close(three(x), one(x), rtol=1e-4, atol=1e-5)
    assert not torch.equal(three.body[3].up[0], three.body[3].up[1])


def test_published_scaling_is_the_demos(net):
    rules = {"head": {"rank": 4, "heads": 2}, "_default": None}
    exact = inhernet.inherit(net, InheritConfig(rules=rules, init="svd"))
    shrunk = inhernet.inherit(net, InheritConfig(rules=rules, init="published"))
    x = images()[0]
    torch.testing.assert_close(shrunk(x), exact(x) / 2, rtol=1e-4, atol=1e-5)


def test_random_is_no_inheritance_but_repeats(net):
    config = InheritConfig(init="random", budget=UniformRank(5), seed=4)
    a, b = (inhernet.inherit(net, config).body[3] for _ in range(2))
    c = inhernet.inherit(net, InheritConfig(init="random", budget=UniformRank(5), seed=5)).body[3]
    assert torch.equal(a.up, b.up)
    assert not torch.equal(a.up, c.up)


def test_weightings_keep_more_of_the_output(net):
    """Where the data spans few directions, each weighting loses less of the net's output than the one before."""
    data = images()
    error = {}
    for init in ("random", "svd", "activation", "fisher"):
        config = InheritConfig(init=init, budget=ParamBudget(0.5))
        error[init] = inhernet.verify(inhernet.inherit(net, config, calibration=data), net, data)[
            "output"
        ].relative_error
    assert error["fisher"] < error["activation"] < error["svd"] < error["random"], error


def test_batchnorm_is_reestimated(net):
    data = images()
    p = inhernet.plan(net, InheritConfig(init="svd", budget=UniformRank(4)))
    raw = inhernet.inherit(net, p)
    model = inhernet.inherit(net, p, calibration=data)
    assert torch.equal(raw.body[1].running_mean, net.body[1].running_mean)
    inputs = torch.cat([model.body[0](x) for x in data])
    # Batches count by their sizes, so the mean is that of all images at once.
    torch.testing.assert_close(model.body[1].running_mean, inputs.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert model.body[1].momentum == net.body[1].momentum
    assert torch.equal(model.body[1].num_batches_tracked, net.body[1].num_batches_tracked)
    assert not any(m.training for m in model.modules())
    truth = net(data[0])
    assert (model(data[0]) - truth).norm() < 0.9 * (raw(data[0]) - truth).norm()


def test_a_plan_in_memory_remembers_its_data(net, tmp_path):
    config = InheritConfig(budget=UniformRank(6))
    p = inhernet.plan(net, config, calibration=iter(images()))
    assert p["body.0"].rank is not None
    first = inhernet.inherit(net, p)
    assert not torch.equal(first.body[1].running_mean, net.body[1].running_mean)
    second = inhernet.inherit(net, config, calibration=iter(images()))
    third_plan = p.save(tmp_path) or inhernet.Plan.load(tmp_path)
    third = inhernet.inherit(net, third_plan, calibration=images())
    for other in (second, third):
        assert all(
            torch.equal(a, b) for a, b in zip(first.state_dict().values(), other.state_dict().values(), strict=True)
        )


def test_the_model_carries_its_plan(net):
    p = inhernet.plan(net, InheritConfig(), calibration=images())
    model = inhernet.inherit(net, p)
    assert model.inhernet_plan.layers == p.layers
    assert model.inhernet_plan.statistics is None
    assert model.inhernet_plan.calibration is None
    rank = p["body.3"].rank
    p["body.3"].rank = None
    assert model.inhernet_plan["body.3"].rank == rank  # a copy: later edits of the plan do not reach it
    copy.deepcopy(model)


def test_a_bare_layer_can_be_converted():
    torch.manual_seed(0)
    model = inhernet.inherit(nn.Linear(20, 30), InheritConfig(budget=UniformRank(4)))
    assert isinstance(model, LowRankLinear)
    assert model.inhernet_plan[""].rank == 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_carry_over(dtype):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 12)).to(dtype)
    model = inhernet.inherit(net, InheritConfig(), calibration=[torch.randn(40, 20, dtype=dtype)])
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(torch.randn(2, 20, dtype=dtype)).dtype == dtype


def test_verify_and_summary(net):
    data = images()
    labels = [net(x).argmax(-1) for x in data]
    model = inhernet.inherit(net, InheritConfig(heads=2), calibration=data)
    same = inhernet.verify(net, net, list(zip(data, labels, strict=True)))
    assert same["output"].cosine == pytest.approx(1.0)
    assert same["output"].kl == pytest.approx(0.0, abs=1e-9)
    assert (same["output"].relative_error, same.accuracy, same["output"].rows) == (0.0, 1.0, 39)
    report = inhernet.verify(model, net, list(zip(data, labels, strict=True)))
    assert report["output"].relative_error > 0
    assert report["output"].kl > 0
    assert report.accuracy == report["output"].agreement  # the labels are the teacher's own answers
    assert "relative error" in str(report)
    assert report.params == inhernet.plan(net, InheritConfig(heads=2), calibration=data).total_params[0]
    with pytest.raises(ValueError, match="do not correspond"):
        inhernet.verify(nn.Sequential(net.body, nn.Flatten()), net, data)

    s = inhernet.summary(model, data[0])
    assert s.dense_params == sum(p.numel() for p in net.parameters())
    dense = inhernet.summary(net, data[0])
    assert s.macs[1] == dense.macs[0] == dense.macs[1]
    assert s.macs[0] < s.macs[1]
    by_name = {layer.name: layer for layer in dense.layers}
    assert by_name["body.0"].macs == 16 * 9 * 9 * 24 * 27
    assert by_name["head"].macs == 16 * 240
    assert "MACs" in str(s)


def test_verify_leaves_padding_out():
    class Echo(nn.Module):
        def __init__(self, noise: float) -> None:
            super().__init__()
            self.embed, self.noise = nn.Embedding(5, 4), noise

        def forward(self, input_ids, attention_mask):
            return {"hidden": self.embed(input_ids) + self.noise * (1 - attention_mask).unsqueeze(-1)}

    torch.manual_seed(0)
    teacher = Echo(0.0)
    model = copy.deepcopy(teacher)
    model.noise = 9.0
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    report = inhernet.verify(
        model, teacher, [{"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": mask}]
    )
    assert report["hidden"].rows == 4
    assert report["hidden"].relative_error == 0.0


class _Passes(nn.Module):
    """Gives what it gets times `factor`, so that a batch is its outputs."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * torch.where(x.abs() > 5, self.factor, 1.0)


@pytest.mark.parametrize("factor", [torch.nan, torch.inf])
def test_verify_hides_no_row_that_is_not_finite(factor):
    # Seen: relative error 0.0000 and agreement 1.0000 for outputs that were NaN.
    data = [(torch.tensor([[1.0, 0.0, 2.0], [9.0, 1.0, 0.0]]), torch.tensor([2, 0]))]
    report = inhernet.verify(_Passes(factor), _Passes(), data)
    output = report["output"]
    assert (output.nonfinite, output.teacher_nonfinite, output.rows) == (1, 0, 2)
    figures = (output.cosine, output.relative_error, output.kl, output.agreement, report.accuracy)
    assert not any(math.isfinite(figure) for figure in figures)
    assert report.teacher_accuracy == 1.0
    assert "not finite (NaN or infinity): the model's 'output' in 1 of 2 rows" in str(report)
    other = inhernet.verify(_Passes(), _Passes(factor), data)
    assert other["output"].teacher_nonfinite == 1
    assert not math.isfinite(other["output"].relative_error)
    assert "the teacher's 'output'" in other.trouble
    assert not inhernet.verify(_Passes(), _Passes(), data).trouble
    assert inhernet.verify(_Passes(), _Passes(factor), [data[0][0][:1]]).trouble == ""  # the other row alone


def test_verify_of_a_silent_teacher_is_no_fidelity():
    class Silent(nn.Module):
        def forward(self, x):
            return torch.zeros_like(x)

    assert inhernet.verify(_Passes(), Silent(), [torch.ones(2, 3)])["output"].relative_error == math.inf
    assert inhernet.verify(Silent(), Silent(), [torch.ones(2, 3)])["output"].relative_error == 0.0


def test_verify_leaves_ignored_labels_out():
    # Seen: accuracy 0.5, the ignored row counted as wrong; a mapping's labels were not looked at.
    class Tagger(nn.Module):
        def forward(self, x, labels=None):
            return {"logits": x, "hidden": x}

    x, labels = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, -100])
    for batch, model in (((x, labels), _Passes()), ({"x": x, "labels": labels}, Tagger())):
        report = inhernet.verify(model, model, [batch])
        assert (report.accuracy, report.teacher_accuracy, report.outputs[0].rows) == (1.0, 1.0, 1)
    assert report["hidden"].rows == 2
    with pytest.raises(ValueError, match="batch 1: target has the class 7"):
        inhernet.verify(_Passes(), _Passes(), [(x, torch.tensor([0, 7]))])


def test_verify_refuses_nothing():
    # Seen: rows of all-zero figures for batches of size 0.
    for loader in ([], [torch.randn(0, 3)], iter([])):
        with pytest.raises(ValueError, match="loader gave no rows"):
            inhernet.verify(_Passes(), _Passes(), loader)
    with pytest.raises(TypeError, match="loader is Tensor"):
        inhernet.verify(_Passes(), _Passes(), torch.randn(2, 3))
