"""What a correct gated module must satisfy: METHODS' list of testable properties, and the trap of equal heads."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from inhernet import nn as inn

F64 = torch.float64


def linear_and_conv(heads: int, noise: float, rank: int = 5) -> list[tuple[nn.Module, nn.Module, torch.Tensor]]:
    torch.manual_seed(0)
    linear, conv = nn.Linear(9, 7, dtype=F64), nn.Conv2d(3, 7, 3, padding=1, dtype=F64)
    options = {"heads": heads, "gate": True, "noise": noise, "generator": torch.Generator().manual_seed(1)}
    # Samples differ in their channel means: the gate of a convolution sees nothing else.
    images = torch.randn(4, 3, 8, 8, dtype=F64) + 3 * torch.randn(4, 3, 1, 1, dtype=F64)
    return [
        (linear, inn.from_dense(linear, rank, **options), torch.randn(4, 6, 9, dtype=F64)),
        (conv, inn.from_dense(conv, rank, **options), images),
    ]


def train(module: nn.Module, x: torch.Tensor, steps: int = 150) -> None:
    torch.manual_seed(2)
    target = torch.randn_like(module(x))
    optimiser = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        optimiser.zero_grad()
        ((module(x) - target) ** 2).mean().backward()
        optimiser.step()


@pytest.mark.parametrize(
    "shape, expected", [((9,), (3,)), ((5, 9), (5, 3)), ((2, 5, 9), (2, 5, 3)), ((2, 3, 5, 9), (2, 3, 5, 3))]
)
def test_linear_gates_are_a_distribution_per_row(shape, expected):
    module = inn.GatedLowRankLinear(9, 7, 4, 3)
    nn.init.normal_(module.gate.weight)
    gates = module.gates(torch.randn(shape))
    assert gates.shape == expected
    assert (gates >= 0).all()
    torch.testing.assert_close(gates.sum(-1), torch.ones(expected[:-1]))


@pytest.mark.parametrize("padding", [1, "same"])
def test_conv_gates_are_a_distribution_per_sample(padding):
    module = inn.GatedLowRankConv2d(3, 7, 4 if padding == "same" else 3, 4, 3, padding=padding)
    nn.init.normal_(module.gate.weight)
    x = torch.randn(5, 3, 8, 8)
    gates = module.gates(x)
    assert gates.shape == (5, 3)
    assert (gates >= 0).all()
    torch.testing.assert_close(gates.sum(-1), torch.ones(5))
    torch.testing.assert_close(module.gates(x[2]), gates[2])


@pytest.mark.parametrize("index", [0, 1], ids=["linear", "conv"])
def test_merged_op_equals_head_by_head_forward_and_backward(index):
    _, module, x = linear_and_conv(3, 0.5)[index]
    for parameter in module.gate.parameters():
        nn.init.normal_(parameter)
    x.requires_grad_()

    def by_head() -> torch.Tensor:
        gates = module.gates(x)
        if index == 0:
            t = nn.functional.linear(x, module.down)
            return sum(gates[..., h, None] * (t @ module.up[h].T + module.bias[h]) for h in range(3))
        t = nn.functional.conv2d(x, module.down, padding=1)
        return sum(
            gates[:, h, None, None, None] * nn.functional.conv2d(t, module.up[h][:, :, None, None], module.bias[h])
            for h in range(3)
        )

    merged, expected = module(x), by_head()
    torch.testing.assert_close(merged, expected, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(merged)
    inputs = [x, *module.parameters()]
    for got, want in zip(
        torch.autograd.grad(merged, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("index", [0, 1], ids=["linear", "conv"])
def test_start_is_the_best_low_rank_layer_whatever_the_head_count(index):
    outputs = [linear_and_conv(heads, 0.005)[index][1](linear_and_conv(1, 0.0)[index][2]) for heads in (1, 2, 5)]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("index", [0, 1], ids=["linear", "conv"])
def test_balanced_split_carries_the_spectrum_on_both_sides(index):
    dense, module, _ = linear_and_conv(3, 0.0)[index]
    spectrum = torch.diag(torch.linalg.svdvals(dense.weight.detach().flatten(1))[:5])
    down = module.down.flatten(1)
    torch.testing.assert_close(down @ down.T, spectrum, rtol=1e-10, atol=1e-12)
    for up in module.up:
        torch.testing.assert_close(up.T @ up, spectrum, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("heads", [1, 3])
def test_error_falls_with_the_rank(heads):
    torch.manual_seed(3)
    dense = nn.Linear(12, 10, dtype=F64)
    weights = [inn.from_dense(dense, rank, heads=heads).dense_weight()[0] for rank in range(1, 11)]
    errors = [(weight - dense.weight.detach()).norm().item() for weight in weights]
    assert all(a > b for a, b in itertools.pairwise(errors))
    assert errors[-1] < 1e-12


@pytest.mark.parametrize("index", [0, 1], ids=["linear", "conv"])
def test_equal_heads_give_the_gate_no_gradient_and_noise_gives_it_one(index):
    for noise, random_gate in ((0.0, True), (0.005, False)):
        _, module, x = linear_and_conv(3, noise)[index]
        if random_gate:
            nn.init.normal_(module.gate.weight)
        module(x).square().sum().backward()
        largest = module.gate.weight.grad.abs().max() / module.up.grad.abs().max()
        assert largest < 1e-12 if noise == 0.0 else largest > 1e-5


@pytest.mark.parametrize("index", [0, 1], ids=["linear", "conv"])
def test_trap_equal_heads_with_a_zero_gate_never_separate(index):
    _, module, x = linear_and_conv(3, 0.0)[index]
    start = module.up.detach().clone()
    train(module, x)
    assert not torch.equal(module.up, start)
    torch.testing.assert_close(module.up[1:], module.up[:1].expand(2, -1, -1), rtol=0.0, atol=1e-14)
    assert module.gate.weight.abs().max() < 1e-14


@pytest.mark.parametrize("index", [0, 1], ids=["linear", "conv"])
@pytest.mark.parametrize("way", ["noise", "random gate"])
def test_noise_or_a_random_gate_separates_the_heads(index, way):
    _, module, x = linear_and_conv(3, 0.005 if way == "noise" else 0.0)[index]
    if way == "random gate":
        nn.init.normal_(module.gate.weight)
    apart = (module.up[0] - module.up[1]).detach()
    gate = module.gate.weight.detach().clone()
    train(module, x)
    # Heads that got equal gradients would keep their difference.
    assert ((module.up[0] - module.up[1]) - apart).norm() > 1e-3
    assert (module.gate.weight - gate).abs().max() > 1e-3


@pytest.mark.parametrize("heads", [2, 3, 8])
def test_noise_sums_to_zero_at_the_stated_scale(heads):
    up = torch.randn(64, 32, dtype=F64)
    noise = inn.zero_sum_noise(up, heads, 0.005, torch.Generator().manual_seed(0))
    assert noise.sum(0).abs().max() < 1e-15 * heads
    assert abs(noise.std() / (0.005 * up.std()) - 1) < 0.05
    assert not inn.zero_sum_noise(up, 1, 0.005).any()


def test_gate_is_left_alone_by_tools_that_replace_linear_layers():
    module = inn.GatedLowRankLinear(4, 4, 2, 2)
    assert not any(isinstance(child, nn.Linear) for child in module.modules())
