"""Each module against the dense layer it replaces, in float64: at full rank they are the same function."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from inhernet import nn as inn

F64 = torch.float64
SHARES = [(1, None), (1, True), (3, True)]  # heads, gate
CONVOLUTIONS = [
    {"kernel_size": 1},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 3, "stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
    {"kernel_size": (1, 5), "padding": (0, 2)},
    {"kernel_size": (5, 2), "dilation": 2},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 3, "padding": "same", "dilation": 2},
    {"kernel_size": 3, "padding": "valid"},
    {"kernel_size": 4, "padding": "same"},
    {"kernel_size": (2, 3), "padding": "same", "dilation": (3, 1)},
]


def close(result: torch.Tensor, expected: torch.Tensor) -> None:
    assert result.shape == expected.shape
    assert result.dtype == expected.dtype
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def random_gate(module: nn.Module) -> nn.Module:
    """At full rank with equal heads the function is the dense one under any gate, so give it a strong one."""
    if hasattr(module, "gate"):
        with torch.no_grad():
            module.gate.weight.normal_(std=3.0)
            module.gate.bias.normal_(std=3.0)
    return module


@pytest.mark.parametrize("heads, gate", SHARES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 5, 7), (2, 3, 4, 7), (0, 7)])
def test_linear_at_full_rank(shape, bias, heads, gate):
    torch.manual_seed(0)
    dense = nn.Linear(7, 5, bias=bias, dtype=F64)
    module = random_gate(inn.from_dense(dense, 5, heads=heads, gate=gate, noise=0.0))
    x = torch.randn(shape, dtype=F64)
    close(module(x), dense(x))


@pytest.mark.parametrize("heads, gate", SHARES)
@pytest.mark.parametrize("arguments", CONVOLUTIONS, ids=str)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_conv2d_at_full_rank(arguments, heads, gate):
    torch.manual_seed(1)
    for bias in (True, False):
        dense = nn.Conv2d(3, 6, bias=bias, dtype=F64, **arguments)
        rank = min(dense.weight.shape[0], dense.weight[0].numel())
        module = random_gate(inn.from_dense(dense, rank, heads=heads, gate=gate, noise=0.0))
        x = torch.randn(2, 3, 22, 11, dtype=F64)
        for images in (x, x[0], x[:0], x.contiguous(memory_format=torch.channels_last), x[..., ::2, 1:]):
            close(module(images), dense(images))


def test_gradient_reaches_input_and_every_parameter():
    torch.manual_seed(2)
    dense = nn.Conv2d(3, 6, 3, padding="same", dtype=F64)
    module = inn.from_dense(dense, 6, heads=2)
    x = torch.randn(2, 3, 5, 5, dtype=F64, requires_grad=True)
    reference = torch.autograd.grad(dense(x).square().sum(), x)[0]
    module(x).square().sum().backward()
    close(x.grad, reference)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


@pytest.mark.parametrize("layer", [nn.Linear(12, 9, dtype=F64), nn.Conv2d(4, 9, 3, dtype=F64)], ids=["linear", "conv"])
@pytest.mark.parametrize("heads", [1, 3])
def test_truncation_error_is_the_spectrum_s_tail_for_any_rank_and_head_count(layer, heads):
    spectrum = torch.linalg.svdvals(layer.weight.detach().flatten(1))
    for rank in (1, 4, 8):
        weight, bias = inn.from_dense(layer, rank, heads=heads).dense_weight()
        error = (weight - layer.weight.flatten(1)).square().sum()
        torch.testing.assert_close(error, spectrum[rank:].square().sum(), rtol=1e-9, atol=0.0)
        close(bias, layer.bias)


@pytest.mark.parametrize("heads, gate", SHARES)
def test_given_factors_are_balanced_and_keep_their_product(heads, gate):
    torch.manual_seed(3)
    down, up = torch.randn(4, 27, dtype=F64) * 50, torch.randn(8, 4, dtype=F64)
    module = inn.from_dense(nn.Conv2d(3, 8, 3, dtype=F64), 4, heads=heads, gate=gate, factors=(down, up), noise=0.0)
    close(module.dense_weight()[0], up @ down)
    for head in module.up.reshape(heads, 8, 4):
        close(module.down.flatten(1).norm(dim=1), head.norm(dim=0))


def test_device_dtype_flags_and_random_state_carry_over():
    dense = nn.Linear(6, 4, dtype=torch.bfloat16).eval()
    dense.weight.requires_grad_(False)
    state = torch.random.get_rng_state()
    module = inn.from_dense(dense, 3, heads=1, gate=True)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert not module.training
    assert [n for n, p in module.named_parameters() if p.requires_grad] == ["bias"]
    assert not module.gate.training
    on_meta = inn.from_dense(nn.Conv2d(3, 4, 3, device="meta"), 2, heads=2)
    assert {p.device.type for p in on_meta.parameters()} == {"meta"}


@pytest.mark.parametrize("heads, gate", SHARES)
def test_bias_rule(heads, gate):
    bare = nn.Conv2d(3, 4, 1, bias=False)
    assert inn.from_dense(bare, 2, heads=heads, gate=gate).bias is None
    always = inn.from_dense(bare, 2, heads=heads, gate=gate, head_bias="always").bias
    assert always.numel() == heads * 4
    assert not always.any()
    with pytest.raises(ValueError, match="head_bias is 'never'"):
        inn.from_dense(bare, 2, heads=heads, gate=gate, head_bias="never")


@pytest.mark.parametrize(
    "layer, arguments, error, message",
    [
        (nn.Conv2d(4, 4, 3, groups=2), {}, ValueError, "groups is 2.*stays dense"),
        (
            nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
            {},
            ValueError,
            "padding_mode is 'reflect'.*stays dense",
        ),
        (nn.Linear(4, 4), {"rank": 5}, ValueError, "rank is 5, expected 1 to 4"),
        (nn.Linear(4, 4), {"rank": 0}, ValueError, "rank is 0"),
        (nn.Linear(4, 4), {"heads": 0, "gate": True}, ValueError, "heads is 0"),
        (nn.Linear(4, 4), {"heads": 2, "noise": -0.1}, ValueError, "noise is -0.1"),
        (nn.Linear(4, 4), {"heads": 2, "noise": float("nan")}, ValueError, "noise is nan"),
        (nn.Linear(4, 4), {"heads": 2, "gate": False}, ValueError, "heads is 2 and gate is False"),
        (nn.Linear(4, 4), {"factors": (torch.ones(3, 4), torch.ones(4, 3))}, ValueError, r"down has shape \(3, 4\)"),
        (nn.Linear(4, 4), {"factors": (torch.ones(2, 4), torch.ones(5, 2))}, ValueError, r"up has shape \(5, 2\)"),
        (nn.Conv1d(4, 4, 3), {}, TypeError, "layer is Conv1d"),
        (nn.ConvTranspose2d(4, 4, 3), {}, TypeError, "layer is ConvTranspose2d"),
        (nn.Linear(4, 4, dtype=torch.complex64), {}, TypeError, "complex64"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(layer, arguments, error, message):
    with pytest.raises(error, match=message):
        inn.from_dense(layer, **{"rank": 2, **arguments})


def test_a_weight_with_nan_is_refused():
    dense = nn.Linear(4, 4)
    with torch.no_grad():
        dense.weight[1, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        inn.from_dense(dense, 2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"stride": 0}, "stride is 0"),
        ({"stride": (1, 2, 3)}, "stride is"),
        ({"padding": -1}, "padding is -1"),
        ({"padding": "full"}, "padding is 'full'"),
        ({"padding": "same", "stride": 2}, "stride 1"),
        ({"dilation": 1.5}, "dilation is 1.5"),
        ({"kernel_size": 0}, "kernel_size is 0"),
        ({"rank": 0}, "rank is 0"),
        ({"out_channels": 0}, "output size is 0"),
        ({"in_channels": True}, "input size"),
    ],
    ids=str,
)
def test_conv_constructor_names_what_is_wrong(arguments, message):
    good = {"in_channels": 3, "out_channels": 4, "kernel_size": 3, "rank": 2}
    for build in (inn.LowRankConv2d, lambda **kw: inn.GatedLowRankConv2d(heads=2, **kw)):
        build(**good)
        with pytest.raises(ValueError, match=message):
            build(**{**good, **arguments})


@pytest.mark.parametrize("heads", [1, 3])
def test_published_scaling_is_h_times_too_small(heads):
    torch.manual_seed(4)
    dense = nn.Conv2d(3, 6, 3, dtype=F64)
    module = inn.empty_like_dense(dense, 6, heads=heads, gate=True)
    inn.fill_published_(module, dense, generator=torch.Generator().manual_seed(1))
    x = torch.randn(2, 3, 5, 5, dtype=F64)
    close(module(x), dense(x) / heads)
    close(module.down.flatten(1) @ module.down.flatten(1).T, torch.eye(6, dtype=F64))
    assert module.gate.weight.abs().max() <= 6**-0.5
    assert module.gate.weight.std() > 0.1


def test_random_start_keeps_the_dense_layer_s_variance_and_separates_heads():
    torch.manual_seed(5)
    x = torch.randn(2000, 96)
    expected = nn.Linear(96, 80)(x).var()
    images = torch.randn(16, 24, 9, 9)
    expected_image = nn.Conv2d(24, 40, 3)(images).var()
    for heads in (1, 4):
        linear = inn.GatedLowRankLinear(96, 80, 12, heads)
        conv = inn.GatedLowRankConv2d(24, 40, 3, 16, heads)
        assert 0.7 < linear(x).var() / expected < 1.4
        assert 0.6 < conv(images).var() / expected_image < 1.6
        for a, b in itertools.combinations(linear.up, 2):
            assert (a - b).norm() > a.norm()
    again = [inn.LowRankLinear(9, 9, 3) for _ in range(2)]
    for module in again:
        module.reset_parameters(torch.Generator().manual_seed(3))
    assert torch.equal(again[0].down, again[1].down)
    assert torch.equal(again[0].up, again[1].up)
